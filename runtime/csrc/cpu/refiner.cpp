// The refinement loop on the CPU.
#include "../refiner.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "parallel.h"

namespace seg {
namespace {

constexpr double kEps = 1e-5;      // of batch norm
constexpr double kRunning = 0.1;   // share of a new picture in the running statistics
constexpr int kBlocks = 16;        // rows are summed in this many blocks, whatever the threads
constexpr int kMappingSteps = 10;  // the overlap mapping is frozen after these
constexpr int kCheckEvery = 10;    // steps between two looks of the early stop
constexpr int kChecks = 3;         // calm looks in a row that stop
constexpr float kSmallestPrior = 1e-4f;  // below it a prior's probability counts as this

int block_begin(int block, int rows) { return static_cast<int>(int64_t{rows} * block / kBlocks); }

// Floats of a convolution's weights as the kernels read them: by tiles, or by taps.
size_t weight_floats(const Conv& conv, bool tiles) {
  const size_t taps = tiles ? 16 : static_cast<size_t>(conv.kernel) * conv.kernel;
  return taps * conv.in * padded(conv.out);
}

}  // namespace

Refiner::~Refiner() = default;

Refiner::Refiner(const RefineOptions& options, int height, int width, int threads,
                 const Kernels& kernels)
    : options_(options),
      network_(options),
      height_(height),
      width_(width),
      bands_((height + 1) / 2),
      threads_(threads),
      k_(&kernels) {
  activation_.resize(options.blocks);
  statistics_.resize(options.blocks);
  packed_.resize(options.blocks + 2);
  turned_.resize(options.blocks + 2);
  packed_bias_.resize(options.blocks + 2);
  if (options.objective == kResidual) {
    for (const int s : options.distances) {
      for (const Offset o : {Offset{0, s}, Offset{s, 0}, Offset{s, s}, Offset{s, -s}})
        offsets_.insert(offsets_.end(), {o, Offset{-o.dy, -o.dx}});
    }
  }
  parameters.assign(network_.parameters, 0.0f);
  momenta = gradient_ = kept_parameters_ = kept_momenta_ = parameters;
  buffers.assign(network_.buffers, 0.0f);
  kept_buffers_ = buffers;
  const size_t pixels = static_cast<size_t>(height) * width;
  labels_.assign(pixels, 0);
  checked_labels_ = labels_;
  present_.assign(options.classes, 0);
  row_losses_.assign(3 * static_cast<size_t>(bands_), 0.0);

  arena_floats_ = layout(nullptr);
  arena_ = allocate(arena_floats_);
  std::memset(arena_.get(), 0, arena_floats_ * sizeof(float));
  layout(arena_.get());
  // Of a head without norm, and of the channels that pad: no soft-max may see them.
  const int q = padded(options.classes);
  std::fill(head_statistics_.scale, head_statistics_.scale + options.classes, 1.0f);
  std::fill(head_statistics_.shift + options.classes, head_statistics_.shift + q, kNever);
}

// Lays everything out after base and returns how many floats that takes.
size_t Refiner::layout(float* base) {
  size_t used = 0;
  const auto take = [&](size_t n) {
    float* p = base + used;
    used += (n + kPad - 1) / kPad * kPad;
    return p;
  };
  const auto map = [&](int stride, bool border) {
    const int b = border ? 1 : 0;
    const ptrdiff_t pitch = static_cast<ptrdiff_t>(width_ + 2 * b) * stride;
    float* p = take(static_cast<size_t>(pitch) * (height_ + 2 * b));
    return Map{p + b * (pitch + stride), pitch, stride};
  };
  const RefineOptions& o = options_;
  const int c = padded(o.channels), q = padded(o.classes), most = std::max(c, q);
  const size_t pixels = static_cast<size_t>(height_) * width_;

  input_ = map(o.inputs(), true);
  for (Map& activation : activation_) activation = map(c, false);
  head_ = map(q, false);
  d_feature_ = map(c, false);
  spare_ = map(most, false);
  d_response_ = {spare_.data, ptrdiff_t{width_} * q, q};
  spare_ = {spare_.data, ptrdiff_t{width_} * c, c};
  if (o.objective == kResidual) {
    target_ = map(q, false);
    log_prior_ = map(q, false);
    affinity_ = take(offsets_.size() * pixels);
    mass_ = take(pixels);
  }
  const auto take_statistics = [&](int n) {
    return Statistics{take(n), take(n), take(n), take(n)};
  };
  for (Statistics& s : statistics_) s = take_statistics(c);
  head_statistics_ = take_statistics(q);
  size_t largest = 0;
  const auto take_conv = [&](int i, const Conv& conv, bool tiles) {
    packed_[i] = take(weight_floats(conv, tiles));
    turned_[i] = take(weight_floats({conv.kernel, conv.out, conv.in, 0, 0}, tiles));
    packed_bias_[i] = take(padded(conv.out));
    largest = std::max(largest, weight_floats(conv, tiles));
  };
  for (int i = 0; i < o.blocks; ++i) take_conv(i, network_.conv[i], i > 0);
  take_conv(o.blocks + 1, network_.head, false);
  partial_ = take(largest * kBlocks);
  if (o.skip != kSkipNone) {
    take_conv(o.blocks, network_.skip, false);
    skip_partial_ = take(weight_floats(network_.skip, false) * kBlocks);
  }
  sums_floats_ = 3 * static_cast<size_t>(most);
  sums_ = take(sums_floats_ * bands_);
  sum_a_ = take(most);
  sum_b_ = take(most);
  scratch_floats_ = std::max(strip_floats(c, c), static_cast<size_t>(kRun) * (c + q + 1));
  scratch_ = take(scratch_floats_ * threads_);
  return used;
}

// Fills the network's input and, for residual, all that stays the same from step to step.
void Refiner::set_input(const float* image, const Guide& guide) {
  const int h = height_, w = width_, classes = options_.classes;
  const size_t pixels = static_cast<size_t>(h) * w;
  if (options_.objective == kCluster) {
    parallel_for(threads_, h, [&](int y) {
      std::memcpy(input_.at(y, 0), image + static_cast<size_t>(y) * w * 3, sizeof(float) * 3 * w);
    });
    guide_pixels_ = 0;
    if (guide.soft != nullptr) guide_pixels_ = static_cast<double>(pixels);
    if (guide.hard != nullptr)
      for (size_t n = 0; n < pixels; ++n) guide_pixels_ += guide.hard[n] >= 0;
    mapping_.assign(std::max(guide.classes, 1), 0);
    overlap_.assign(mapping_.size() * classes, 0.0);
    assignment_.resize(std::min(guide.classes, classes), std::max(guide.classes, classes));
    targets_.reserve(classes);
    guide_present_.clear();
    guide_present_.reserve(guide.classes);
    return;
  }

  double mean[3] = {}, deviation[3] = {};
  for (size_t n = 0; n < pixels; ++n)
    for (int c = 0; c < 3; ++c) mean[c] += image[3 * n + c];
  for (double& m : mean) m /= static_cast<double>(pixels);
  for (size_t n = 0; n < pixels; ++n)
    for (int c = 0; c < 3; ++c)
      deviation[c] += (image[3 * n + c] - mean[c]) * (image[3 * n + c] - mean[c]);
  for (double& d : deviation) d = std::max(std::sqrt(d / static_cast<double>(pixels)), 1e-3);

  std::vector<double> area(classes, 0.0);
  for (size_t n = 0; n < pixels; ++n)
    for (int k = 0; k < classes; ++k) area[k] += guide.soft[n * classes + k];
  std::vector<float> class_weight(padded(classes));
  double balanced = 0;
  for (int k = 0; k < classes; ++k) {
    area[k] /= static_cast<double>(pixels);
    class_weight[k] = static_cast<float>(std::pow(std::max(area[k], 1e-3), -options_.balance));
    balanced += class_weight[k] * area[k];
  }
  const double share = 1.0 / (std::max(balanced, 1e-12) * static_cast<double>(pixels));
  for (float& weight : class_weight) weight = static_cast<float>(weight * share);
  std::vector<float> scale;  // of each offset's pairs
  for (const Offset d : offsets_) {
    const double pairs =
        std::max(h - std::abs(d.dy), 0) * static_cast<double>(std::max(w - std::abs(d.dx), 0));
    scale.push_back(pairs > 0 ? static_cast<float>(2.0 / (pairs * offsets_.size())) : 0.0f);
  }

  parallel_for(threads_, h, [&](int y) {
    for (int x = 0; x < w; ++x) {
      const size_t n = static_cast<size_t>(y) * w + x;
      float* in = input_.at(y, x);
      for (int c = 0; c < 3; ++c)
        in[c] = static_cast<float>((image[3 * n + c] - mean[c]) / deviation[c]);
      in[3] = w > 1 ? 2.0f * x / (w - 1) - 1.0f : 0.0f;
      in[4] = h > 1 ? 2.0f * y / (h - 1) - 1.0f : 0.0f;
    }
    const size_t first = static_cast<size_t>(y) * w;
    k_->prior(log_prior_.from(y, 0), target_.from(y, 0), mass_ + first,
              guide.soft + first * classes, class_weight.data(), kSmallestPrior, w, classes);
    const size_t count = offsets_.size();
    k_->affinity(affinity_ + static_cast<size_t>(y) * w * count, image, offsets_.data(),
                 scale.data(), static_cast<int>(count), options_.sigma, y, h, w);
  });
}

template <class F>
void Refiner::each_run(int band, const F& f) const {
  for (int y = 2 * band; y < std::min(2 * band + 2, height_); ++y)
    for (int x = 0; x < width_; x += kRun) f(y, x, std::min(kRun, width_ - x));
}

template <class F>
void Refiner::each_strip(int band, const F& f) const {
  const int all = (width_ + 1) / 2;
  int done = 0;
  for (int left = (all + kStrip - 1) / kStrip; left > 0; --left) {  // in equal shares
    const int tiles = (all - done + left - 1) / left;
    f(2 * band, 2 * done, tiles, std::min(2 * tiles, width_ - 2 * done));
    done += tiles;
  }
}

Refiner::Sums Refiner::clear_sums(int band, int channels) const {
  float* s = sums_ + band * sums_floats_;
  const size_t row = sums_floats_ / 3;
  for (int i = 0; i < 3; ++i) std::fill(s + i * row, s + i * row + padded(channels), 0.0f);
  return {s, s + row, s + 2 * row};
}

// Weights from PyTorch's (out, in, k, k) to the kernels' form, and turned for the input gradient.
void Refiner::pack() {
  const auto pack_conv = [&](int i, const Conv& conv, bool tiles, bool turn) {
    const int size = conv.kernel * conv.kernel, taps = tiles ? 16 : size;
    const size_t out_row = padded(conv.out), in_row = padded(conv.in);
    const float* weights = parameters.data() + conv.weight;
    std::copy_n(parameters.data() + conv.bias, conv.out, packed_bias_[i]);
    parallel_for(threads_, conv.in, [&](int c) {
      for (int o = 0; o < conv.out; ++o) {
        const float* w = weights + (static_cast<size_t>(o) * conv.in + c) * size;
        float u[16];
        if (tiles) to_tiles(u, w);
        for (int t = 0; t < taps; ++t)
          packed_[i][(static_cast<size_t>(t) * conv.in + c) * out_row + o] = tiles ? u[t] : w[t];
      }
    });
    if (!turn) return;
    parallel_for(threads_, conv.out, [&](int o) {
      for (int c = 0; c < conv.in; ++c) {
        const float* w = weights + (static_cast<size_t>(o) * conv.in + c) * size;
        float v[9], u[16];
        for (int t = 0; t < size; ++t) v[t] = w[size - 1 - t];
        if (tiles) to_tiles(u, v);
        for (int t = 0; t < taps; ++t)
          turned_[i][(static_cast<size_t>(t) * conv.out + o) * in_row + c] = tiles ? u[t] : v[t];
      }
    });
  };
  for (int i = 0; i < options_.blocks; ++i) pack_conv(i, network_.conv[i], i > 0, i > 0);
  if (options_.skip != kSkipNone) pack_conv(options_.blocks, network_.skip, false, false);
  pack_conv(options_.blocks + 1, network_.head, false, true);
}

// Of x, from the bands' moments about their first pixel; or the running ones.
void Refiner::set_statistics(const Norm& norm, const Statistics& s, Map x, bool running) {
  for (int c = 0; c < norm.channels; ++c) {
    double mean = 0, m2 = 0;
    if (running) {
      mean = buffers[norm.mean + c];
      m2 = buffers[norm.var + c];
    } else {
      double count = 0;
      for (int band = 0; band < bands_; ++band) {  // Chan's rule joins mean and m2 of two parts
        const double n = static_cast<double>(std::min(2, height_ - 2 * band)) * width_;
        const float* sums = sums_ + band * sums_floats_;
        const double sum = sums[c], square = sums[sums_floats_ / 3 + c];
        const double d = x.at(2 * band, 0)[c] + sum / n - mean;
        m2 += std::max(square - sum * sum / n, 0.0) + d * d * count * n / (count + n);
        mean += d * n / (count + n);
        count += n;
      }
      m2 /= count;
    }
    const double inv = 1.0 / std::sqrt(m2 + kEps);
    s.mean[c] = static_cast<float>(mean);
    s.inv[c] = static_cast<float>(inv);
    s.scale[c] = static_cast<float>(parameters[norm.gamma + c] * inv);
    s.shift[c] = parameters[norm.beta + c];
  }
}

void Refiner::update_running(const Norm& norm, const Statistics& s) {
  const double n = static_cast<double>(height_) * width_;
  for (int c = 0; c < norm.channels; ++c) {
    const double var = 1.0 / (static_cast<double>(s.inv[c]) * s.inv[c]) - kEps;
    const double unbiased = n > 1 ? var * n / (n - 1) : var;
    float& mean = buffers[norm.mean + c];
    float& running = buffers[norm.var + c];
    mean = static_cast<float>((1 - kRunning) * mean + kRunning * s.mean[c]);
    running = static_cast<float>((1 - kRunning) * running + kRunning * unbiased);
  }
}

// What the head sees of a run: the last block after its norm, with the skip.
void Refiner::feature(Map out, int y, int x, int width) const {
  const Conv& skip = network_.skip;
  const int i = options_.blocks;
  k_->normalize(out, activation_[i - 1].from(y, x), statistics_[i - 1].affine(), width,
                options_.channels);
  if (options_.skip != kSkipNone)
    k_->conv(out, input_.from(y, x), packed_[i], packed_bias_[i], out, width, 3, skip.in, skip.out,
             false);
}

void Refiner::forward(bool running) {
  pack();
  for (int i = 0; i < options_.blocks; ++i) {
    const Conv& conv = network_.conv[i];
    const Map out = activation_[i];
    parallel_for_slots(threads_, bands_, [&](int band, int slot) {
      const Sums s = clear_sums(band, conv.out);
      const float* first = out.at(2 * band, 0);
      if (i == 0) {
        each_run(band, [&](int y, int x, int width) {
          k_->conv(out.from(y, x), input_.from(y, x), packed_[0], packed_bias_[0], Map{}, width, 3,
                   conv.in, conv.out, true);
          k_->moments(s.a, s.b, first, out.from(y, x), width, conv.out);
        });
        return;
      }
      each_strip(band, [&](int y, int x, int tiles, int width) {
        k_->conv3(out, activation_[i - 1], statistics_[i - 1].affine(), packed_[i], packed_bias_[i],
                  true, y, x, tiles, height_, width_, conv.in, conv.out,
                  scratch_ + slot * scratch_floats_);
        for (int row = y; row < std::min(y + 2, height_); ++row)
          k_->moments(s.a, s.b, first, out.from(row, x), width, conv.out);
      });
    });
    set_statistics(network_.norm[i], statistics_[i], out, running);
  }

  const Conv& head = network_.head;
  const int last = options_.blocks + 1;
  const bool residual = options_.objective == kResidual;
  std::fill(row_losses_.begin(), row_losses_.end(), 0.0);
  parallel_for_slots(threads_, bands_, [&](int band, int slot) {
    const Sums s = clear_sums(band, head.out);
    const int c = padded(head.in), q = padded(head.out);
    float* scratch = scratch_ + slot * scratch_floats_;
    const Map f{scratch, 0, c}, z{scratch + kRun * c, 0, q};
    float* lse = scratch + kRun * (c + q);
    each_run(band, [&](int y, int x, int width) {
      const Map out = head_.from(y, x);
      feature(f, y, x, width);
      if (residual) {
        k_->conv(z, f, packed_[last], packed_bias_[last], log_prior_.from(y, x), width, 1, head.in,
                 head.out, false);
        k_->softmax(out, lse, z, width, head.out);
        k_->argmax(labels_.data() + static_cast<size_t>(y) * width_ + x, z, width, head.out);
        row_losses_[3 * band] += k_->cross_entropy(z, lse, target_.from(y, x), width, head.out);
      } else {
        k_->conv(out, f, packed_[last], packed_bias_[last], Map{}, width, 1, head.in, head.out,
                 false);
        k_->moments(s.a, s.b, head_.at(2 * band, 0), out, width, head.out);
      }
    });
  });
  if (options_.final_bn != kNormNone)
    set_statistics(network_.head_norm, head_statistics_, head_, running);
  if (residual) return;
  parallel_for_slots(threads_, bands_, [&](int band, int slot) {
    const Map r{scratch_ + slot * scratch_floats_, 0, head_.stride};
    each_run(band, [&](int y, int x, int width) {
      k_->normalize(r, head_.from(y, x), head_statistics_.affine(), width, head.out);
      k_->argmax(labels_.data() + static_cast<size_t>(y) * width_ + x, r, width, head.out);
    });
  });
}

// dgamma, dbeta and the means that bn_backward takes, from the bands' sums of dy and dy (x - mean).
void Refiner::norm_gradient(const Norm& norm, const Statistics& s) {
  const double n = static_cast<double>(height_) * width_;
  for (int c = 0; c < norm.channels; ++c) {
    double a = 0, b = 0;
    for (int band = 0; band < bands_; ++band) {
      const float* sums = sums_ + band * sums_floats_;
      a += sums[c];
      b += sums[sums_floats_ / 3 + c];
    }
    gradient_[norm.beta + c] = static_cast<float>(a);
    gradient_[norm.gamma + c] = static_cast<float>(b * s.inv[c]);
    sum_a_[c] = static_cast<float>(a / n);
    sum_b_[c] = static_cast<float>(b * s.inv[c] * s.inv[c] / n);
  }
}

// Sums the blocks' weight gradients into gradient_.
void Refiner::conv_gradient(const Conv& conv, const float* partial, bool tiles, bool add) {
  const int size = conv.kernel * conv.kernel, taps = tiles ? 16 : size;
  const size_t row = padded(conv.out), block = weight_floats(conv, tiles);
  parallel_for(threads_, conv.in, [&](int c) {
    for (int o0 = 0; o0 < conv.out; o0 += kPad) {
      double sum[16][kPad] = {};
      for (int t = 0; t < taps; ++t) {
        const float* p = partial + (static_cast<size_t>(t) * conv.in + c) * row + o0;
        for (int b = 0; b < kBlocks; ++b, p += block)
          for (int o = 0; o < kPad; ++o) sum[t][o] += p[o];
      }
      for (int o = 0; o < std::min(kPad, conv.out - o0); ++o) {
        double u[16], w[9];
        for (int t = 0; t < taps; ++t) u[t] = sum[t][o];
        if (tiles) from_tiles(w, u);
        float* g = &gradient_[conv.weight + (static_cast<size_t>(o0 + o) * conv.in + c) * size];
        for (int t = 0; t < size; ++t)
          g[t] = static_cast<float>((add ? g[t] : 0.0f) + (tiles ? w[t] : u[t]));
      }
    }
  });
}

// From the bands' sums of the gradient of the convolution's output.
void Refiner::bias_gradient(const Conv& conv, bool add) {
  for (int o = 0; o < conv.out; ++o) {
    double s = 0;
    for (int band = 0; band < bands_; ++band)
      s += sums_[band * sums_floats_ + 2 * (sums_floats_ / 3) + o];
    float& g = gradient_[conv.bias + o];
    g = static_cast<float>(add ? g + s : s);
  }
}

// From d_response_ to gradient_. losses() has left the sums of the head's norm.
void Refiner::backward() {
  const int last = options_.blocks - 1;
  const Conv &head = network_.head, &skip = network_.skip;
  const bool norm = options_.final_bn != kNormNone, skips = options_.skip != kSkipNone;
  if (norm) norm_gradient(network_.head_norm, head_statistics_);
  size_t size = weight_floats(head, false);
  const size_t skip_size = skips ? weight_floats(skip, false) : 0;
  parallel_for_slots(threads_, kBlocks, [&](int block, int slot) {
    float *dw = partial_ + block * size, *dw_skip = skip_partial_ + block * skip_size;
    std::memset(dw, 0, size * sizeof(float));
    if (skips) std::memset(dw_skip, 0, skip_size * sizeof(float));
    const Map f{scratch_ + slot * scratch_floats_, 0, padded(head.in)};
    for (int band = block_begin(block, bands_); band < block_begin(block + 1, bands_); ++band) {
      const Sums s = clear_sums(band, std::max(head.in, head.out));
      each_run(band, [&](int y, int x, int width) {
        const Map d = d_response_.from(y, x), df = d_feature_.from(y, x);
        if (norm)
          k_->bn_backward(d, s.c, d, head_.from(y, x), head_statistics_.mean,
                          head_statistics_.scale, sum_a_, sum_b_, width, head.out, false);
        else
          k_->sums(s.c, d, width, head.out);
        feature(f, y, x, width);
        k_->conv_dw(dw, f, d, width, 1, head.in, head.out);
        k_->conv(df, d, turned_[last + 2], nullptr, Map{}, width, 1, head.out, head.in, false);
        if (skips) k_->conv_dw(dw_skip, input_.from(y, x), df, width, 3, skip.in, skip.out);
        k_->bn_sums(s.a, s.b, df, activation_[last].from(y, x), statistics_[last].mean, width,
                    head.in);
      });
    }
  });
  conv_gradient(head, partial_, false, false);
  bias_gradient(head, false);

  Map d = d_feature_, other = spare_;
  for (int i = last; i >= 0; --i) {
    const Conv& conv = network_.conv[i];
    const Map x = activation_[i];
    const Statistics& of = statistics_[i];
    norm_gradient(network_.norm[i], of);
    if (i == last && skips) {  // the same sum; a shared skip is conv1, whose own share comes on top
      conv_gradient(skip, skip_partial_, false, false);
      std::copy_n(&gradient_[network_.norm[i].beta], skip.out, &gradient_[skip.bias]);
    }
    size = weight_floats(conv, i > 0);
    parallel_for_slots(threads_, kBlocks, [&](int block, int slot) {
      float *dw = partial_ + block * size, *scratch = scratch_ + slot * scratch_floats_;
      std::memset(dw, 0, size * sizeof(float));
      for (int band = block_begin(block, bands_); band < block_begin(block + 1, bands_); ++band) {
        const Sums s = clear_sums(band, conv.out);
        each_run(band, [&](int y, int column, int width) {
          const Map run = d.from(y, column), dz = i > 0 ? run : Map{scratch, 0, run.stride};
          k_->bn_backward(dz, s.c, run, x.from(y, column), of.mean, of.scale, sum_a_, sum_b_, width,
                          conv.out, true);
          if (i == 0) k_->conv_dw(dw, input_.from(y, column), dz, width, 3, conv.in, conv.out);
        });
        if (i == 0) continue;
        each_strip(band, [&](int y, int column, int tiles, int) {
          k_->conv3_dw(dw, activation_[i - 1], statistics_[i - 1].affine(), d, y, column, tiles,
                       height_, width_, conv.in, conv.out, scratch);
        });
      }
    });
    const bool shared = i == 0 && options_.skip == kSkipShared;
    conv_gradient(conv, partial_, i > 0, shared);
    bias_gradient(conv, shared);
    if (i == 0) break;
    parallel_for_slots(threads_, bands_, [&](int band, int slot) {
      const Sums s = clear_sums(band, conv.in);
      each_strip(band, [&](int y, int column, int tiles, int width) {
        k_->conv3(other, d, Affine{}, turned_[i], nullptr, false, y, column, tiles, height_, width_,
                  conv.out, conv.in, scratch_ + slot * scratch_floats_);
        for (int row = y; row < std::min(y + 2, height_); ++row)
          k_->bn_sums(s.a, s.b, other.from(row, column), activation_[i - 1].from(row, column),
                      statistics_[i - 1].mean, width, conv.in);
      });
    });
    std::swap(d, other);
  }
}

// How many labels differ.
int Refiner::find_labels() {
  std::fill(present_.begin(), present_.end(), 0);
  for (const int32_t label : labels_) present_[label] = 1;
  return static_cast<int>(std::count(present_.begin(), present_.end(), 1));
}

// i-th present guide class -> (i mod K')-th present label, both in increasing order.
void Refiner::set_modulo_mapping(const Guide& guide) {
  if (guide_present_.empty()) {
    std::fill(mapping_.begin(), mapping_.end(), guide.soft != nullptr);  // now: is it present?
    if (guide.hard != nullptr)
      for (size_t n = 0; n < labels_.size(); ++n)
        if (guide.hard[n] >= 0) mapping_[guide.hard[n]] = 1;
    for (int s = 0; s < guide.classes; ++s)
      if (mapping_[s]) guide_present_.push_back(s);
  }
  targets_.clear();
  for (int k = 0; k < options_.classes; ++k)
    if (present_[k]) targets_.push_back(k);
  for (size_t i = 0; i < guide_present_.size(); ++i)
    mapping_[guide_present_[i]] = targets_[i % targets_.size()];
}

// Guide classes to labels so that the shared area is largest, one to one; classes beyond the
// number of labels take the label that they overlap most.
void Refiner::set_overlap_mapping(const Guide& guide) {
  const int s = guide.classes, q = options_.classes;
  std::fill(overlap_.begin(), overlap_.end(), 0.0);
  for (size_t n = 0; n < labels_.size(); ++n) {
    if (guide.hard != nullptr) {
      if (guide.hard[n] >= 0) overlap_[static_cast<size_t>(guide.hard[n]) * q + labels_[n]] += 1;
    } else {
      for (int i = 0; i < s; ++i)
        overlap_[static_cast<size_t>(i) * q + labels_[n]] += guide.soft[n * s + i];
    }
  }
  const bool classes_are_rows = s <= q;
  for (int i = 0; i < s; ++i) {
    const double* row = overlap_.data() + static_cast<size_t>(i) * q;
    for (int k = 0; k < q; ++k)
      assignment_.cost[classes_are_rows ? static_cast<size_t>(i) * q + k
                                        : static_cast<size_t>(k) * s + i] = -row[k];
    mapping_[i] = static_cast<int32_t>(std::max_element(row, row + q) - row);
  }
  assignment_.solve();
  for (size_t i = 0; i < assignment_.column.size(); ++i) {
    if (classes_are_rows)
      mapping_[i] = assignment_.column[i];
    else
      mapping_[assignment_.column[i]] = static_cast<int32_t>(i);
  }
}

void Assignment::resize(int rows, int columns) {
  rows_ = rows;
  columns_ = columns;
  cost.assign(static_cast<size_t>(rows) * columns, 0.0);
  column.assign(rows, 0);
  u_.resize(rows + 1);
  v_.resize(columns + 1);
  least_.resize(columns + 1);
  row_of_.resize(columns + 1);
  from_.resize(columns + 1);
  used_.resize(columns + 1);
}

void Assignment::solve() {
  const double kFar = std::numeric_limits<double>::infinity();
  std::fill(u_.begin(), u_.end(), 0.0);  // potentials; rows and columns count from 1, 0 is none
  std::fill(v_.begin(), v_.end(), 0.0);
  std::fill(row_of_.begin(), row_of_.end(), 0);
  for (int r = 1; r <= rows_; ++r) {
    row_of_[0] = r;
    int j = 0;
    std::fill(least_.begin(), least_.end(), kFar);
    std::fill(used_.begin(), used_.end(), 0);
    do {  // grow the tree of shortest paths until it meets a free column
      used_[j] = 1;
      const int i = row_of_[j];
      double delta = kFar;
      int next = 0;
      for (int k = 1; k <= columns_; ++k) {
        if (used_[k]) continue;
        const double reduced = cost[static_cast<size_t>(i - 1) * columns_ + k - 1] - u_[i] - v_[k];
        if (reduced < least_[k]) {
          least_[k] = reduced;
          from_[k] = j;
        }
        if (least_[k] < delta) {
          delta = least_[k];
          next = k;
        }
      }
      for (int k = 0; k <= columns_; ++k) {
        if (used_[k]) {
          u_[row_of_[k]] += delta;
          v_[k] -= delta;
        } else {
          least_[k] -= delta;
        }
      }
      j = next;
    } while (row_of_[j] != 0);
    for (; j != 0; j = from_[j]) row_of_[j] = row_of_[from_[j]];
  }
  for (int k = 1; k <= columns_; ++k)
    if (row_of_[k] > 0) column[row_of_[k] - 1] = k - 1;
}

// The losses and d_response_. False when the loss is not finite.
bool Refiner::losses(StepRecord* record, const Guide& guide, int clusters) {
  const int h = height_, w = width_, classes = options_.classes;
  const double pixels = static_cast<double>(h) * w;
  record->clusters = clusters;
  record->first = record->spatial = record->guide = 0;
  if (options_.objective == kResidual) {  // forward() has summed the guide term
    parallel_for(threads_, bands_, [&](int band) {
      each_run(band, [&](int y, int x, int width) {
        row_losses_[3 * band + 1] += k_->residual_loss(
            d_response_, head_, target_, mass_, affinity_, offsets_.data(),
            static_cast<int>(offsets_.size()), options_.lambda, y, x, width, h, w, classes);
      });
    });
    for (int band = 0; band < bands_; ++band) {
      record->guide += row_losses_[3 * band];
      record->spatial += row_losses_[3 * band + 1];
    }
    record->total = record->guide + options_.lambda * record->spatial;
    return std::isfinite(record->total);
  }
  const bool guided = guide_pixels_ > 0;
  double weight = options_.mu;
  if (options_.weighting == kFsf) weight = clusters / static_cast<double>(options_.beta);
  if (options_.weighting == kScf) weight = options_.mu / static_cast<double>(clusters);
  float scale[4];
  for (int d = 0; d < 4; ++d) {
    const double pairs = static_cast<double>(d == 1 ? h : h - 1) * (d == 0 ? w : w - 1);
    const bool used = pairs > 0 && (d < 2 || options_.diagonals);
    scale[d] = used ? static_cast<float>(1.0 / (pairs * classes)) : 0.0f;
  }
  const float self_weight = static_cast<float>(1.0 / pixels);
  const float guide_weight = guided ? static_cast<float>(1.0 / guide_pixels_) : 0.0f;
  const bool norm = options_.final_bn != kNormNone;
  parallel_for_slots(threads_, bands_, [&](int band, int slot) {
    const Sums s = clear_sums(band, classes);
    const Map r{scratch_ + slot * scratch_floats_, 0, head_.stride};
    double* loss = &row_losses_[3 * band];
    each_run(band, [&](int y, int x, int width) {
      const size_t n = static_cast<size_t>(y) * w + x;
      const Map d = d_response_.from(y, x);
      k_->normalize(r, head_.from(y, x), head_statistics_.affine(), width, classes);
      k_->cluster_loss(d, loss, r, labels_.data() + n,
                       guided && guide.hard ? guide.hard + n : nullptr,
                       guided && guide.soft ? guide.soft + n * guide.classes : nullptr,
                       guide.classes, mapping_.data(), self_weight, guide_weight, width, classes);
      k_->spatial_loss(d_response_, loss + 2, head_, head_statistics_.scale,
                       static_cast<float>(weight), scale, options_.huber, y, x, width, h, w,
                       classes);
      if (norm) k_->bn_sums(s.a, s.b, d, head_.from(y, x), head_statistics_.mean, width, classes);
    });
  });
  for (int band = 0; band < bands_; ++band) {
    record->first += row_losses_[3 * band] / pixels;
    if (guided) record->guide += row_losses_[3 * band + 1] / guide_pixels_;
    record->spatial += row_losses_[3 * band + 2];
  }
  record->total = record->first + record->guide + weight * record->spatial;
  return std::isfinite(record->total);
}

RunResult Refiner::run(float* scores, int32_t* labels, StepRecord* records, const float* image,
                       const Guide& guide, int label_floor, int steps,
                       const std::function<bool(int)>& after_step) {
  RunResult result;
  set_input(image, guide);
  const int floor = std::max(options_.min_labels, label_floor);
  bool have_kept = false;
  int calm = 0;
  double checked_loss = 0;
  const auto keep = [&] {
    kept_parameters_ = parameters;
    kept_momenta_ = momenta;
    kept_buffers_ = buffers;
    kept_batches_ = batches;
  };
  const auto restore = [&] {  // may come twice
    parameters = kept_parameters_;
    momenta = kept_momenta_;
    buffers = kept_buffers_;
    batches = kept_batches_;
  };

  for (int step = 0; step < steps; ++step) {
    forward(false);
    const int clusters = find_labels();
    if (label_floor > 0 && clusters < label_floor && have_kept) {
      result.stop = kSilhouette;  // the weights before the last update are restored below
      break;
    }
    if (options_.objective == kCluster && guide_pixels_ > 0) {
      if (options_.mapping == kIndexModulo)
        set_modulo_mapping(guide);
      else if (batches < kMappingSteps || step == 0)
        set_overlap_mapping(guide);
    }
    if (!losses(&records[step], guide, clusters)) {
      result.stop = kDiverged;
      break;
    }
    backward();
    keep();
    have_kept = true;
    for (int i = 0; i < options_.blocks; ++i) update_running(network_.norm[i], statistics_[i]);
    if (options_.final_bn != kNormNone) update_running(network_.head_norm, head_statistics_);
    k_->sgd(parameters.data(), momenta.data(), gradient_.data(), parameters.size(), options_.lr,
            options_.momentum);
    ++batches;
    result.steps = step + 1;
    if (after_step && after_step(result.steps)) {
      result.stop = kBudget;
      break;
    }
    if (floor > 0 && clusters <= floor) {
      result.stop = label_floor >= options_.min_labels ? kSilhouette : kMinLabels;
      break;
    }
    if (options_.early_stop > 0 && step % kCheckEvery == 0) {
      size_t same = 0;
      for (size_t n = 0; n < labels_.size(); ++n) same += labels_[n] == checked_labels_[n];
      const double loss = records[step].total;
      const bool quiet = step > 0 && same >= options_.early_stop * labels_.size() &&
                         std::abs(loss - checked_loss) < 0.01 * std::abs(checked_loss);
      calm = quiet ? calm + 1 : 0;
      checked_labels_ = labels_;
      checked_loss = loss;
      if (calm == kChecks) {
        result.stop = kConverged;
        break;
      }
    }
  }

  const bool running = options_.final_bn == kNormRunning;
  if (result.stop == kDiverged && have_kept) restore();
  forward(false);
  result.clusters = find_labels();
  if (label_floor > 0 && result.clusters < label_floor && have_kept) {
    restore();
    forward(false);
    result.clusters = find_labels();
    result.stop = kSilhouette;
  }
  if (running) {
    forward(true);
    result.clusters = find_labels();
  }
  std::memcpy(labels, labels_.data(), labels_.size() * sizeof(int32_t));
  const int classes = options_.classes;
  parallel_for_slots(threads_, bands_, [&](int band, int slot) {
    const Map r{scratch_ + slot * scratch_floats_, 0, head_.stride};
    each_run(band, [&](int y, int x, int width) {
      Map p = head_.from(y, x);
      if (options_.objective == kCluster) {
        k_->normalize(r, p, head_statistics_.affine(), width, classes);
        k_->softmax(r, nullptr, r, width, classes);
        p = r;
      }
      for (int i = 0; i < width; ++i)
        std::memcpy(scores + (static_cast<size_t>(y) * width_ + x + i) * classes, p.at(0, i),
                    sizeof(float) * classes);
    });
  });
  return result;
}

}  // namespace seg
