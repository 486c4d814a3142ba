// Test-time refinement of pictures of one size.
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

// Owns the network's state and one block of memory (the arena) for all maps. The steps of run()
// allocate nothing.
class Refiner {
 public:
  Refiner(const RefineOptions& options, int height, int width, int threads, const Kernels& kernels);
  Refiner(Refiner&&) = default;
  Refiner& operator=(Refiner&&) = default;
  ~Refiner();

  // Executes up to `steps` steps on the picture, then a forward pass, and returns why and when the
  // run ended. Writes scores [height][width][classes], labels [height][width] and records [steps].
  // image is [height][width][3] in [0, 1]. Residual needs a soft guide of options.classes classes.
  // The returned map is the last one with at least label_floor distinct labels, or the first map if
  // no map has so many; 0 disables this rule. after_step(steps done) is called after each step
  // unless it is empty. If it returns true, the run ends. It may throw.
  RunResult run(float* scores, int32_t* labels, StepRecord* records, const float* image,
                const Guide& guide, int label_floor, int steps,
                const std::function<bool(int)>& after_step);

  std::vector<float> parameters, momenta, buffers;  // PyTorch's layout, see network.h
  int64_t batches = 0;  // steps that have updated the running statistics

  const RefineOptions& options() const { return options_; }
  int height() const { return height_; }
  int width() const { return width_; }
  size_t arena_bytes() const { return arena_floats_ * sizeof(float); }

 private:
  // The values of one batch norm for the current picture, [padded(channels)] each. inv is 1 / the
  // standard deviation; affine() is the norm itself.
  struct Statistics {
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
  // A band is two rows. each_run calls f(y, x, pixels) for each run of a band, each_strip calls
  // f(y, x, tiles, pixels) for each strip of conv3's tiles.
  template <class F>
  void each_run(int band, const F& f) const;
  template <class F>
  void each_strip(int band, const F& f) const;
  // Sums over the pixels of a band, [padded(channels)] each.
  struct Sums {
    float *a, *b, *c;
  };
  // Sets the sums of a band to zero and returns them.
  Sums clear_sums(int band, int channels) const;

  RefineOptions options_;
  Network network_;
  int height_, width_, bands_, threads_;
  const Kernels* k_;
  size_t arena_floats_ = 0;
  Memory arena_;

  // Maps [height][width][padded(channels)]. The input is [height][width][channels] with a border of
  // one zero pixel.
  Map input_;
  std::vector<Map> activation_;  // of each block, after relu
  Map head_;                     // the head's output before its norm; for residual its soft-max
  Map d_response_, d_feature_;   // gradients
  Map spare_;                    // the memory of d_response_ with the layout of d_feature_
  Map target_, log_prior_;       // for residual, as the kernel `prior` writes them
  std::vector<Statistics> statistics_;
  Statistics head_statistics_{};
  // Weights of blocks, skip and head as the kernels read them; turned_ is for gradients by inputs.
  std::vector<float*> packed_, turned_;
  std::vector<float*> packed_bias_;
  float* sums_ = nullptr;                      // [bands][3][padded channels]
  float *sum_a_ = nullptr, *sum_b_ = nullptr;  // the arguments a and b of bn_backward
  float *partial_ = nullptr,
        *skip_partial_ = nullptr;  // weight gradients of each of kBlocks blocks of rows
  float *scratch_ = nullptr, *affinity_ = nullptr, *mass_ = nullptr;
  size_t scratch_floats_ = 0, sums_floats_ = 0;
  std::vector<float> gradient_, kept_parameters_, kept_momenta_, kept_buffers_;
  int64_t kept_batches_ = 0;
  std::vector<int32_t> labels_, checked_labels_;  // of this step, and of the last check
  std::vector<int32_t> mapping_;                  // the channel of each class of the guide
  std::vector<uint8_t> present_;                  // [classes]: 1 for each label that occurs
  // [bands][3]: similarity, guide and spatial loss; for residual guide loss, pair loss and 0.
  std::vector<double> band_losses_;
  std::vector<Offset> offsets_;
  std::vector<int32_t> guide_present_, targets_;  // scratch memory of the mappings
  std::vector<double> overlap_;
  Assignment assignment_;
  double guide_pixels_ = 0;  // pixels whose class the guide knows
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
