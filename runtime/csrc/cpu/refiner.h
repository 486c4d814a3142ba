// Test-time refinement of one picture size: owns the state and one arena, allocates nothing later.
#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>
#include <vector>

#include "../network.h"
#include "assignment.h"
#include "kernels.h"
#include "memory.h"

namespace seg {

class Refiner {
 public:
  Refiner(const RefineOptions& options, int height, int width, int threads, const Kernels& kernels);
  Refiner(Refiner&&) = default;
  Refiner& operator=(Refiner&&) = default;
  ~Refiner();

  // Up to `steps` steps on the picture, then one forward pass.
  // scores [height][width][classes] and labels [height][width] are written; records has `steps`
  // entries. image is [height][width][3] in [0, 1]. The last map with at least label_floor labels
  // is kept (0 = off). after_step(done) runs between steps; true ends the run; it may throw.
  RunResult run(float* scores, int32_t* labels, StepRecord* records, const float* image,
                const Guide& guide, int label_floor, int steps,
                const std::function<bool(int)>& after_step);

  std::vector<float> parameters, momenta, buffers;  // PyTorch's layout, see network.h
  int64_t batches = 0;                              // steps seen by the running statistics

  const RefineOptions& options() const { return options_; }
  int height() const { return height_; }
  int width() const { return width_; }
  size_t arena_bytes() const { return arena_floats_ * sizeof(float); }

 private:
  struct Statistics {  // of one batch norm, [padded channels] each
    float *mean, *inv, *scale, *shift;
    Affine affine() const { return {mean, scale, shift}; }
  };

  size_t layout(float* base);
  void set_input(const float* image, const Guide& guide);
  void set_overlap_mapping(const Guide& guide);
  void set_modulo_mapping(const Guide& guide);
  void pack();
  void forward(bool running);
  void feature(Map out, int y, int x, int width) const;
  void set_statistics(const Norm& norm, const Statistics& s, Map x, bool running);
  int find_labels();
  bool losses(StepRecord* record, const Guide& guide, int clusters);
  void backward();
  void norm_gradient(const Norm& norm, const Statistics& s);
  void conv_gradient(const Conv& conv, const float* partial, bool tiles, bool add);
  void bias_gradient(const Conv& conv, bool add);
  void update_running(const Norm& norm, const Statistics& s);
  // f(y, x, pixels) for the runs of a band of two rows; f(y, x, tiles, pixels) for its strips.
  template <class F>
  void each_run(int band, const F& f) const;
  template <class F>
  void each_strip(int band, const F& f) const;
  // The sums over a band, [padded channels] each.
  struct Sums {
    float *a, *b, *c;
  };
  Sums clear_sums(int band, int channels) const;

  RefineOptions options_;
  Network network_;
  int height_, width_, bands_, threads_;
  const Kernels* k_;
  size_t arena_floats_ = 0;
  Memory arena_;

  // Maps, [height][width][padded channels]; the input has one zero pixel around it.
  Map input_;
  std::vector<Map> activation_;  // of each block, after relu
  Map head_;                     // the head's output before its norm; residual: the soft-max of it
  Map d_response_, d_feature_;   // gradients
  Map spare_;                    // d_response_'s memory, laid out like d_feature_
  Map target_, log_prior_;       // residual: class weight * confidence * prior / pixels
  std::vector<Statistics> statistics_;
  Statistics head_statistics_{};
  std::vector<float*> packed_, turned_;  // weights as the kernels read them: blocks, skip, head
  std::vector<float*> packed_bias_;
  float* sums_ = nullptr;  // [bands][3][padded channels]
  float *sum_a_ = nullptr, *sum_b_ = nullptr;
  float *partial_ = nullptr,
        *skip_partial_ = nullptr;  // weight gradients of kBlocks blocks of rows
  float *scratch_ = nullptr, *affinity_ = nullptr, *mass_ = nullptr;
  size_t scratch_floats_ = 0, sums_floats_ = 0;
  std::vector<float> gradient_, kept_parameters_, kept_momenta_, kept_buffers_;
  int64_t kept_batches_ = 0;
  std::vector<int32_t> labels_, checked_labels_, mapping_;
  std::vector<uint8_t> present_;
  std::vector<double> row_losses_;
  std::vector<Offset> offsets_;
  std::vector<int32_t> guide_present_, targets_;  // scratch of the mappings
  std::vector<double> overlap_;
  Assignment assignment_;
  double guide_pixels_ = 0;
};

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

}  // namespace seg
