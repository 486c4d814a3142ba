// One step of the refinement on the CPU: forward pass, labels, mapping, losses, backward pass.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "parallel.h"
#include "refiner.h"

namespace seg {

Refiner::Sums Refiner::clear_sums(int band, int channels) const {
  float* s = sums_ + band * sums_floats_;
  const size_t row = sums_floats_ / 3;
  for (int i = 0; i < 3; ++i) std::fill(s + i * row, s + i * row + padded(channels), 0.0f);
  return {s, s + row, s + 2 * row};
}

// Copies the weights [out][in][k][k] and biases into the kernels' form: packed_ for the forward
// pass, turned_ (rotated by 180 degrees, in and out exchanged) for the gradient by the input.
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

// Sets s to the statistics of x [height][width][padded(channels)]. They are computed from the
// moments of each band about the first pixel of that band, which are in sums_. With `running`, sets
// s to the running statistics.
void Refiner::set_statistics(const Norm& norm, const Statistics& s, Map x, bool running) {
  for (int c = 0; c < norm.channels; ++c) {
    double mean = 0, m2 = 0;
    if (running) {
      mean = buffers[norm.mean + c];
      m2 = buffers[norm.var + c];
    } else {
      double count = 0;
      for (int band = 0; band < bands_; ++band) {  // Chan's rule joins the moments of two parts
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
    const double inv = 1.0 / std::sqrt(m2 + kNormEps);
    s.mean[c] = static_cast<float>(mean);
    s.inv[c] = static_cast<float>(inv);
    s.scale[c] = static_cast<float>(parameters[norm.gamma + c] * inv);
    s.shift[c] = parameters[norm.beta + c];
  }
}

// Updates the running mean and variance by the statistics of this picture.
void Refiner::update_running(const Norm& norm, const Statistics& s) {
  const double n = static_cast<double>(height_) * width_;
  for (int c = 0; c < norm.channels; ++c) {
    const double var = 1.0 / (static_cast<double>(s.inv[c]) * s.inv[c]) - kNormEps;
    const double unbiased = n > 1 ? var * n / (n - 1) : var;
    float& mean = buffers[norm.mean + c];
    float& running = buffers[norm.var + c];
    mean = static_cast<float>((1 - kRunningShare) * mean + kRunningShare * s.mean[c]);
    running = static_cast<float>((1 - kRunningShare) * running + kRunningShare * unbiased);
  }
}

// Writes to out the head's input for a run of pixels: the last block after its norm, plus the skip.
void Refiner::feature(Map out, int y, int x, int width) const {
  const Conv& skip = network_.skip;
  const int i = options_.blocks;
  k_->normalize(out, activation_[i - 1].from(y, x), statistics_[i - 1].affine(), width,
                options_.channels);
  if (options_.skip != kSkipNone)
    k_->conv(out, input_.from(y, x), packed_[i], packed_bias_[i], out, width, 3, skip.in, skip.out,
             false);
}

// Runs the network from the input to the labels, with this picture's statistics or the running
// ones. For residual also computes the soft-max and the guide loss of each band.
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
  const bool follows = options_.channels_follow_classes();
  std::fill(band_losses_.begin(), band_losses_.end(), 0.0);
  parallel_for_slots(threads_, bands_, [&](int band, int slot) {
    const Sums s = clear_sums(band, head.out);
    const int c = padded(head.in), q = padded(head.out);
    float* scratch = scratch_ + slot * scratch_floats_;
    const Map f{scratch, 0, c}, z{scratch + kRun * c, 0, q};
    float* lse = scratch + kRun * (c + q);
    each_run(band, [&](int y, int x, int width) {
      const Map out = head_.from(y, x);
      feature(f, y, x, width);
      if (follows) {
        k_->conv(z, f, packed_[last], packed_bias_[last], log_prior_.from(y, x), width, 1, head.in,
                 head.out, false);
        k_->softmax(out, lse, z, width, head.out);
        k_->argmax(labels_.data() + static_cast<size_t>(y) * width_ + x, z, width, head.out);
        band_losses_[3 * band] += k_->cross_entropy(z, lse, target_.from(y, x), width, head.out);
      } else {
        k_->conv(out, f, packed_[last], packed_bias_[last], Map{}, width, 1, head.in, head.out,
                 false);
        k_->moments(s.a, s.b, head_.at(2 * band, 0), out, width, head.out);
      }
    });
  });
  if (options_.final_bn != kNormNone)
    set_statistics(network_.head_norm, head_statistics_, head_, running);
  if (follows) return;
  parallel_for_slots(threads_, bands_, [&](int band, int slot) {
    const Map r{scratch_ + slot * scratch_floats_, 0, head_.stride};
    each_run(band, [&](int y, int x, int width) {
      k_->normalize(r, head_.from(y, x), head_statistics_.affine(), width, head.out);
      k_->argmax(labels_.data() + static_cast<size_t>(y) * width_ + x, r, width, head.out);
    });
  });
}

// Writes the gradients by gamma and beta, and sets sum_a_ and sum_b_, the means that bn_backward
// subtracts. Both are computed from the bands' sums of dy and of dy * (x - mean).
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

// Writes to gradient_ the sum of the weight gradients of the kBlocks blocks of rows; with `add`,
// adds that sum to gradient_. With `tiles`, partial is in the basis of conv3's tiles.
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

// Writes the gradient by the bias: the sum over the bands of the gradient by the convolution's
// output. With `add`, adds it.
void Refiner::bias_gradient(const Conv& conv, bool add) {
  for (int o = 0; o < conv.out; ++o) {
    double s = 0;
    for (int band = 0; band < bands_; ++band)
      s += sums_[band * sums_floats_ + 2 * (sums_floats_ / 3) + o];
    float& g = gradient_[conv.bias + o];
    g = static_cast<float>(add ? g + s : s);
  }
}

// Computes gradient_ from d_response_. losses() has computed the sums for the gradient of the
// head's norm.
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
    // The gradient by the skip's bias equals the one by the norm's beta: both are sums of
    // d_feature_. A shared skip is conv[0]. Then the gradient of conv[0] in its block is added
    // below.
    if (i == last && skips) {
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

// Sets present_ to 1 for the labels that occur, to 0 for the others, and returns the number of
// labels that occur.
int Refiner::find_labels() {
  std::fill(present_.begin(), present_.end(), 0);
  for (const int32_t label : labels_) present_[label] = 1;
  return static_cast<int>(std::count(present_.begin(), present_.end(), 1));
}

// Maps the i-th class that occurs in the guide to the (i mod K)-th of the K labels that occur, both
// in increasing order. All classes of a soft guide count as occurring.
void Refiner::set_modulo_mapping(const Guide& guide) {
  if (guide_present_.empty()) {
    // In this block mapping_[k] is 1 if class k occurs in the guide.
    std::fill(mapping_.begin(), mapping_.end(), guide.soft != nullptr);
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

// Maps guide classes to labels one to one, so that the area of the pixels with both is largest. If
// there are more classes than labels, each remaining class is mapped to the label that it overlaps
// most.
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

// Computes the losses of the step and d_response_, the gradient by the response. Returns false if
// the total loss is not finite.
bool Refiner::losses(StepRecord* record, const Guide& guide, int clusters) {
  const int h = height_, w = width_, classes = options_.classes;
  const double pixels = static_cast<double>(h) * w;
  record->clusters = clusters;
  record->first = record->spatial = record->guide = 0;
  if (options_.objective == kResidual) {  // forward() has computed the guide loss
    parallel_for(threads_, bands_, [&](int band) {
      each_run(band, [&](int y, int x, int width) {
        band_losses_[3 * band + 1] += k_->residual_loss(
            d_response_, head_, target_, mass_, affinity_, offsets_.data(),
            static_cast<int>(offsets_.size()), options_.lambda, y, x, width, h, w, classes);
      });
    });
    for (int band = 0; band < bands_; ++band) {
      record->guide += band_losses_[3 * band];
      record->spatial += band_losses_[3 * band + 1];
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
    double* loss = &band_losses_[3 * band];
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
    record->first += band_losses_[3 * band] / pixels;
    if (guided) record->guide += band_losses_[3 * band + 1] / guide_pixels_;
    record->spatial += band_losses_[3 * band + 2];
  }
  record->total = record->first + record->guide + weight * record->spatial;
  return std::isfinite(record->total);
}

}  // namespace seg
