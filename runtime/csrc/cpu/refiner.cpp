// The refinement loop on the CPU.
#include "../refiner.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <new>

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

}  // namespace

void Refiner::Free::operator()(float* p) const { std::free(p); }
Refiner::~Refiner() = default;

Refiner::Refiner(const RefineOptions& options, int height, int width, int threads,
                 const Kernels& kernels)
    : options_(options),
      network_(options),
      height_(height),
      width_(width),
      threads_(threads),
      k_(&kernels) {
  activation_.resize(options.blocks);
  feature_.resize(options.blocks);
  statistics_.resize(options.blocks);
  packed_.resize(options.blocks + 2);
  turned_.resize(options.blocks + 2);
  packed_bias_.resize(options.blocks + 2);
  if (options.objective == kResidual) {
    for (const int s : options.distances) {
      for (const Offset o : {Offset{0, s}, Offset{s, 0}, Offset{s, s}, Offset{s, -s}})
        offsets_.push_back(o);
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
  row_losses_.assign(3 * static_cast<size_t>(height), 0.0);

  arena_floats_ = layout(nullptr);
  void* memory = nullptr;
  if (posix_memalign(&memory, 64, arena_floats_ * sizeof(float)) != 0) throw std::bad_alloc();
  arena_.reset(static_cast<float*>(memory));
  std::memset(memory, 0, arena_floats_ * sizeof(float));
  layout(arena_.get());
  std::fill(one_, one_ + padded(std::max(options.channels, options.classes)), 1.0f);
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
  for (int i = 0; i < o.blocks; ++i) {
    activation_[i] = map(c, false);
    feature_[i] = map(c, true);
  }
  head_ = o.final_bn != kNormNone ? map(q, false) : Map{};
  response_ = map(q, false);
  d_response_ = map(q, false);
  d_feature_ = map(c, false);
  d_conv_ = map(c, true);
  if (o.objective == kResidual) {
    guide_ = map(q, false);
    log_prior_ = map(q, false);
    head_ = map(q, false);  // the soft-max of the response
    affinity_ = take(offsets_.size() * pixels);
    lse_ = take(pixels);
    confidence_ = take(pixels);
    class_weight_ = take(q);
  }
  const auto take_statistics = [&](int n) {
    return Statistics{take(n), take(n), take(n), take(n)};
  };
  for (Statistics& s : statistics_) s = take_statistics(c);
  head_statistics_ = take_statistics(q);
  size_t largest = 0;
  const auto take_conv = [&](int i, const Conv& conv) {
    const size_t taps = static_cast<size_t>(conv.kernel) * conv.kernel;
    packed_[i] = take(taps * conv.in * padded(conv.out));
    turned_[i] = take(taps * conv.out * padded(conv.in));
    packed_bias_[i] = take(padded(conv.out));
    largest = std::max(largest, taps * conv.in * padded(conv.out));
  };
  for (int i = 0; i < o.blocks; ++i) take_conv(i, network_.conv[i]);
  if (o.skip != kSkipNone) take_conv(o.blocks, network_.skip);
  take_conv(o.blocks + 1, network_.head);
  partial_ = take(largest * kBlocks);
  row_a_ = take(static_cast<size_t>(height_) * most);
  row_b_ = take(static_cast<size_t>(height_) * most);
  sum_a_ = take(most);
  sum_b_ = take(most);
  zero_ = take(most);
  one_ = take(most);
  return used;
}

// Fills the network's input and, for residual, all that stays the same from step to step.
void Refiner::set_input(const float* image, const Guide& guide) {
  const int h = height_, w = width_, classes = options_.classes;
  const size_t pixels = static_cast<size_t>(h) * w;
  if (options_.objective == kCluster) {
    parallel_for(threads_, h, [&](int y) {
      std::memcpy(input_.row(y), image + static_cast<size_t>(y) * w * 3, sizeof(float) * 3 * w);
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
  double balanced = 0;
  for (int k = 0; k < classes; ++k) {
    area[k] /= static_cast<double>(pixels);
    class_weight_[k] = static_cast<float>(std::pow(std::max(area[k], 1e-3), -options_.balance));
    balanced += class_weight_[k] * area[k];
  }
  for (int k = 0; k < classes; ++k)
    class_weight_[k] = static_cast<float>(class_weight_[k] / std::max(balanced, 1e-12));

  parallel_for(threads_, h, [&](int y) {
    for (int x = 0; x < w; ++x) {
      const size_t n = static_cast<size_t>(y) * w + x;
      float* in = input_.at(y, x);
      for (int c = 0; c < 3; ++c)
        in[c] = static_cast<float>((image[3 * n + c] - mean[c]) / deviation[c]);
      in[3] = w > 1 ? 2.0f * x / (w - 1) - 1.0f : 0.0f;
      in[4] = h > 1 ? 2.0f * y / (h - 1) - 1.0f : 0.0f;
      float* q = guide_.at(y, x);
      float* u = log_prior_.at(y, x);
      confidence_[n] = 0;
      for (int k = 0; k < classes; ++k) {
        q[k] = guide.soft[n * classes + k];
        u[k] = std::log(std::max(q[k], kSmallestPrior));
        confidence_[n] = std::max(confidence_[n], q[k]);
      }
      for (int k = classes; k < padded(classes); ++k) u[k] = kNever;
    }
    for (size_t i = 0; i < offsets_.size(); ++i) {
      const Offset d = offsets_[i];
      const double pairs =
          std::max(h - d.dy, 0) * static_cast<double>(std::max(w - std::abs(d.dx), 0));
      const double scale = pairs > 0 ? 1.0 / (pairs * static_cast<double>(offsets_.size())) : 0.0;
      k_->affinity(affinity_ + i * pixels + static_cast<size_t>(y) * w, image, d, options_.sigma,
                   static_cast<float>(scale), y, h, w);
    }
  });
}

// Weights from PyTorch's (out, in, k, k) to [tap][in][out], and turned for the input gradient.
void Refiner::pack() {
  const auto pack_conv = [&](int i, const Conv& conv) {
    const int taps = conv.kernel * conv.kernel;
    const float* w = parameters.data() + conv.weight;
    const size_t out_row = padded(conv.out), in_row = padded(conv.in);
    for (int o = 0; o < conv.out; ++o) {
      packed_bias_[i][o] = parameters[conv.bias + o];
      for (int c = 0; c < conv.in; ++c) {
        for (int t = 0; t < taps; ++t) {
          const float v = *w++;
          packed_[i][(static_cast<size_t>(t) * conv.in + c) * out_row + o] = v;
          turned_[i][(static_cast<size_t>(taps - 1 - t) * conv.out + o) * in_row + c] = v;
        }
      }
    }
  };
  for (int i = 0; i < options_.blocks; ++i) pack_conv(i, network_.conv[i]);
  if (options_.skip != kSkipNone) pack_conv(options_.blocks, network_.skip);
  pack_conv(options_.blocks + 1, network_.head);
}

// out = batch norm of in, whose per-row means and deviations lie in row_a_ and row_b_.
void Refiner::normalize(Map out, Map in, const Norm& norm, const Statistics& s, bool running) {
  const size_t row = padded(norm.channels);
  for (int c = 0; c < norm.channels; ++c) {
    double mean = 0, m2 = 0;
    if (running) {
      mean = buffers[norm.mean + c];
      m2 = buffers[norm.var + c];
    } else {
      for (int y = 0; y < height_; ++y) mean += row_a_[y * row + c];
      mean /= height_;
      for (int y = 0; y < height_; ++y) {
        const double d = row_a_[y * row + c] - mean;
        m2 += row_b_[y * row + c] + width_ * d * d;
      }
      m2 /= static_cast<double>(height_) * width_;
    }
    const double inv = 1.0 / std::sqrt(m2 + kEps);
    s.mean[c] = static_cast<float>(mean);
    s.inv[c] = static_cast<float>(inv);
    s.scale[c] = static_cast<float>(parameters[norm.gamma + c] * inv);
    s.shift[c] = parameters[norm.beta + c];
  }
  parallel_for(threads_, height_, [&](int y) {
    k_->normalize(out, in, s.mean, s.scale, s.shift, y, width_, norm.channels);
  });
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

void Refiner::forward(bool running) {
  pack();
  Map in = input_;
  for (int i = 0; i < options_.blocks; ++i) {
    const Conv& conv = network_.conv[i];
    const size_t row = padded(conv.out);
    parallel_for(threads_, height_, [&](int y) {
      k_->conv(activation_[i], in, packed_[i], packed_bias_[i], Map{}, y, width_, 3, conv.in,
               conv.out, true);
      k_->row_moments(row_a_ + y * row, row_b_ + y * row, activation_[i], y, width_, conv.out);
    });
    normalize(feature_[i], activation_[i], network_.norm[i], statistics_[i], running);
    in = feature_[i];
  }
  const Conv& head = network_.head;
  const bool residual = options_.objective == kResidual;
  const bool norm = options_.final_bn != kNormNone;
  const size_t row = padded(head.out);
  const Map out = norm ? head_ : response_;
  parallel_for(threads_, height_, [&](int y) {
    if (options_.skip != kSkipNone)
      k_->conv(in, input_, packed_[options_.blocks], packed_bias_[options_.blocks], in, y, width_,
               3, network_.skip.in, network_.skip.out, false);
    k_->conv(out, in, packed_[options_.blocks + 1], packed_bias_[options_.blocks + 1],
             residual ? log_prior_ : Map{}, y, width_, 1, head.in, head.out, false);
    if (norm) k_->row_moments(row_a_ + y * row, row_b_ + y * row, out, y, width_, head.out);
  });
  if (norm) {
    normalize(response_, head_, network_.head_norm, head_statistics_, running);
  }
  if (!residual && options_.classes % kPad != 0) {  // no soft-max may see the padding
    parallel_for(threads_, height_, [&](int y) {
      for (int x = 0; x < width_; ++x) {
        float* r = response_.at(y, x);
        for (int k = options_.classes; k < padded(options_.classes); ++k) r[k] = kNever;
      }
    });
  }
}

// dw and db of one convolution, summed over fixed blocks of rows, into gradient_.
void Refiner::conv_gradient(const Conv& conv, Map in, Map dout, bool add) {
  const int taps = conv.kernel * conv.kernel;
  const size_t row = padded(conv.out), size = static_cast<size_t>(taps) * conv.in * row;
  parallel_for(threads_, kBlocks, [&](int block) {
    float* dw = partial_ + block * size;
    std::memset(dw, 0, size * sizeof(float));
    for (int y = block_begin(block, height_); y < block_begin(block + 1, height_); ++y)
      k_->conv_dw(dw, in, dout, y, width_, conv.kernel, conv.in, conv.out);
  });
  parallel_for(threads_, height_,
               [&](int y) { k_->row_sum(row_a_ + y * row, dout, y, width_, conv.out); });
  parallel_for(threads_, conv.in, [&](int c) {
    for (int t = 0; t < taps; ++t) {
      for (int o = 0; o < conv.out; ++o) {
        double s = 0;
        for (int b = 0; b < kBlocks; ++b)
          s += partial_[b * size + (static_cast<size_t>(t) * conv.in + c) * row + o];
        float& g = gradient_[conv.weight + (static_cast<size_t>(o) * conv.in + c) * taps + t];
        g = static_cast<float>(add ? g + s : s);
      }
    }
  });
  for (int o = 0; o < conv.out; ++o) {
    double s = 0;
    for (int y = 0; y < height_; ++y) s += row_a_[y * row + o];
    float& g = gradient_[conv.bias + o];
    g = static_cast<float>(add ? g + s : s);
  }
}

// dx of x -> norm(x), or of x = relu(z) -> norm(x) with respect to z; dgamma, dbeta.
void Refiner::norm_backward(Map dx, Map dy, Map x, const Norm& norm, const Statistics& s,
                            bool relu) {
  const size_t row = padded(norm.channels);
  parallel_for(threads_, height_, [&](int y) {
    k_->bn_sums(row_a_ + y * row, row_b_ + y * row, dy, x, s.mean, y, width_, norm.channels);
  });
  const double n = static_cast<double>(height_) * width_;
  for (int c = 0; c < norm.channels; ++c) {
    double a = 0, b = 0;
    for (int y = 0; y < height_; ++y) {
      a += row_a_[y * row + c];
      b += row_b_[y * row + c];
    }
    gradient_[norm.beta + c] = static_cast<float>(a);
    gradient_[norm.gamma + c] = static_cast<float>(b * s.inv[c]);
    sum_a_[c] = static_cast<float>(a / n);
    sum_b_[c] = static_cast<float>(b * s.inv[c] * s.inv[c] / n);
  }
  parallel_for(threads_, height_, [&](int y) {
    k_->bn_backward(dx, dy, x, s.mean, s.scale, sum_a_, sum_b_, y, width_, norm.channels, relu);
  });
}

// From d_response_ to gradient_.
void Refiner::backward() {
  const int last = options_.blocks - 1;
  const Conv& head = network_.head;
  if (options_.final_bn != kNormNone)
    norm_backward(d_response_, d_response_, head_, network_.head_norm, head_statistics_, false);
  conv_gradient(head, feature_[last], d_response_, false);
  parallel_for(threads_, height_, [&](int y) {
    k_->conv(d_feature_, d_response_, turned_[options_.blocks + 1], nullptr, Map{}, y, width_, 1,
             head.out, head.in, false);
  });
  // A shared skip is conv1 itself: its gradient starts here, the block's share is added below.
  if (options_.skip != kSkipNone) conv_gradient(network_.skip, input_, d_feature_, false);
  for (int i = last; i >= 0; --i) {
    norm_backward(d_conv_, d_feature_, activation_[i], network_.norm[i], statistics_[i], true);
    const Conv& conv = network_.conv[i];
    conv_gradient(conv, i > 0 ? feature_[i - 1] : input_, d_conv_,
                  i == 0 && options_.skip == kSkipShared);
    if (i == 0) break;
    parallel_for(threads_, height_, [&](int y) {
      k_->conv(d_feature_, d_conv_, turned_[i], nullptr, Map{}, y, width_, 3, conv.out, conv.in,
               false);
    });
  }
}

// Labels of the response map, and how many differ.
int Refiner::find_labels() {
  const bool residual = options_.objective == kResidual;
  parallel_for(threads_, height_, [&](int y) {
    if (residual)
      k_->softmax(head_, lse_ + static_cast<size_t>(y) * width_, response_, y, width_,
                  options_.classes);
    k_->argmax(labels_.data() + static_cast<size_t>(y) * width_, response_, y, width_,
               options_.classes);
  });
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
  std::fill(row_losses_.begin(), row_losses_.end(), 0.0);
  record->clusters = clusters;
  if (options_.objective == kResidual) {
    parallel_for(threads_, h, [&](int y) {
      k_->residual_loss(d_response_, &row_losses_[3 * y], head_, response_, lse_, guide_,
                        confidence_, class_weight_, affinity_, offsets_.data(),
                        static_cast<int>(offsets_.size()), static_cast<float>(1.0 / pixels),
                        options_.lambda, y, h, w, classes);
    });
    record->first = record->spatial = record->guide = 0;
    for (int y = 0; y < h; ++y) {
      record->guide += row_losses_[3 * y];
      record->spatial += row_losses_[3 * y + 1];
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
  parallel_for(threads_, h, [&](int y) {
    const size_t row = static_cast<size_t>(y) * w;
    k_->cluster_loss(d_response_, &row_losses_[3 * y], response_, labels_.data() + row,
                     guided && guide.hard ? guide.hard + row : nullptr,
                     guided && guide.soft ? guide.soft + row * guide.classes : nullptr,
                     guide.classes, mapping_.data(), self_weight, guide_weight, y, w, classes);
    k_->spatial_loss(d_response_, &row_losses_[3 * y + 2], response_, static_cast<float>(weight),
                     scale, options_.huber, y, h, w, classes);
  });
  record->first = record->spatial = record->guide = 0;
  for (int y = 0; y < h; ++y) {
    record->first += row_losses_[3 * y] / pixels;
    if (guided) record->guide += row_losses_[3 * y + 1] / guide_pixels_;
    record->spatial += row_losses_[3 * y + 2];
  }
  record->total = record->first + record->guide + weight * record->spatial;
  return std::isfinite(record->total);
}

RunResult Refiner::run(float* scores, int32_t* labels, StepRecord* records, const float* image,
                       const Guide& guide, int label_floor, int steps,
                       const std::function<void(int)>& after_step) {
  RunResult result;
  set_input(image, guide);
  const int floor = std::max(options_.min_labels, label_floor);
  bool have_kept = false;
  int calm = 0;
  double checked_loss = 0;
  const auto keep_or_restore = [&](bool restore) {
    kept_parameters_.swap(parameters);
    kept_momenta_.swap(momenta);
    kept_buffers_.swap(buffers);
    std::swap(kept_batches_, batches);
    if (restore) return;
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
    keep_or_restore(false);
    have_kept = true;
    for (int i = 0; i < options_.blocks; ++i) update_running(network_.norm[i], statistics_[i]);
    if (options_.final_bn != kNormNone) update_running(network_.head_norm, head_statistics_);
    k_->sgd(parameters.data(), momenta.data(), gradient_.data(), parameters.size(), options_.lr,
            options_.momentum);
    ++batches;
    result.steps = step + 1;
    if (after_step) after_step(result.steps);
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
  if (result.stop == kDiverged && have_kept) keep_or_restore(true);
  forward(false);
  result.clusters = find_labels();
  if (label_floor > 0 && result.clusters < label_floor && have_kept) {
    keep_or_restore(true);
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
  parallel_for(threads_, height_, [&](int y) {
    if (options_.objective == kCluster)
      k_->softmax(d_response_, nullptr, response_, y, width_, classes);
    const Map p = options_.objective == kCluster ? d_response_ : head_;
    for (int x = 0; x < width_; ++x)
      std::memcpy(scores + (static_cast<size_t>(y) * width_ + x) * classes, p.at(y, x),
                  sizeof(float) * classes);
  });
  return result;
}

}  // namespace seg
