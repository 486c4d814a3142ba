// The refinement on the CPU: its memory, its input and the loop. The work of a step is in
// refiner_step.cpp.
#include "refiner.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "parallel.h"

namespace seg {
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
  if (options.channels_follow_classes()) offsets_ = pair_offsets(options.distances);
  parameters.assign(network_.parameters, 0.0f);
  momenta = gradient_ = kept_parameters_ = kept_momenta_ = parameters;
  buffers.assign(network_.buffers, 0.0f);
  kept_buffers_ = buffers;
  const size_t pixels = static_cast<size_t>(height) * width;
  labels_.assign(pixels, 0);
  checked_labels_ = labels_;
  present_.assign(options.classes, 0);
  band_losses_.assign(3 * static_cast<size_t>(bands_), 0.0);

  arena_floats_ = layout(nullptr);
  arena_ = allocate(arena_floats_);
  std::memset(arena_.get(), 0, arena_floats_ * sizeof(float));
  layout(arena_.get());
  // A head without a norm has scale 1. The extra channels of a map have the score kNever, whose exp
  // is 0 in every soft-max.
  const int q = padded(options.classes);
  std::fill(head_statistics_.scale, head_statistics_.scale + options.classes, 1.0f);
  std::fill(head_statistics_.shift + options.classes, head_statistics_.shift + q, kNever);
}

// Sets all pointers into the arena that starts at base, and returns the arena's floats. With a null
// base only the returned number counts.
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
  if (o.channels_follow_classes()) {
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

// Fills the network's input from image [height][width][3]. For residual also computes target, log
// prior, mass and affinities, which are constant during a run.
void Refiner::set_input(const float* image, const Guide& guide) {
  const int h = height_, w = width_, classes = options_.classes;
  const size_t pixels = static_cast<size_t>(h) * w;
  if (!options_.channels_follow_classes()) {
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
  for (double& d : deviation)
    d = std::max(std::sqrt(d / static_cast<double>(pixels)), kLeastDeviation);

  std::vector<double> area(classes, 0.0);
  for (size_t n = 0; n < pixels; ++n)
    for (int k = 0; k < classes; ++k) area[k] += guide.soft[n * classes + k];
  std::vector<float> class_weight(padded(classes));
  double balanced = 0;
  for (int k = 0; k < classes; ++k) {
    area[k] /= static_cast<double>(pixels);
    class_weight[k] =
        static_cast<float>(std::pow(std::max(area[k], kLeastArea), -options_.balance));
    balanced += class_weight[k] * area[k];
  }
  const double share = 1.0 / (std::max(balanced, kLeastBalanced) * static_cast<double>(pixels));
  for (float& weight : class_weight) weight = static_cast<float>(weight * share);
  std::vector<float> scale;  // of the pairs of each offset
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

RunResult Refiner::run(float* scores, int32_t* labels, StepRecord* records, const float* image,
                       const Guide& guide, int label_floor, int steps,
                       const std::function<bool(int)>& after_step) {
  RunResult result;
  set_input(image, guide);
  const int floor = std::max(options_.min_labels, label_floor);
  bool have_kept = false;
  int unchanged_checks = 0;  // consecutive checks without a change
  double checked_loss = 0;
  const auto keep = [&] {
    kept_parameters_ = parameters;
    kept_momenta_ = momenta;
    kept_buffers_ = buffers;
    kept_batches_ = batches;
  };
  const auto restore = [&] {  // may be called twice, so the kept vectors are copied, not moved
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
    if (!options_.channels_follow_classes() && guide_pixels_ > 0) {
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
      const bool unchanged = step > 0 && same >= options_.early_stop * labels_.size() &&
                             std::abs(loss - checked_loss) < kLossChange * std::abs(checked_loss);
      unchanged_checks = unchanged ? unchanged_checks + 1 : 0;
      checked_labels_ = labels_;
      checked_loss = loss;
      if (unchanged_checks == kChecks) {
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
      if (!options_.channels_follow_classes()) {
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
