// Test-time refinement of one picture size: owns the state and one arena, allocates nothing later.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

#include "cpu/kernels.h"
#include "network.h"

namespace seg {

struct StepRecord {
  double total, first, spatial, guide;  // first: similarity, or the guide term of residual
  int32_t clusters;                     // distinct labels before the update
};

// What the prior says: hard [height][width] (-1 = unknown), soft [height][width][classes], or none.
struct Guide {
  const int32_t* hard = nullptr;
  const float* soft = nullptr;
  int classes = 0;
};

struct RunResult {
  int steps = 0;
  int stop = kSteps;
  int clusters = 0;  // in the labels returned
};

// Rectangular assignment of rows to columns (rows <= columns) of least total cost [rows][columns].
// Shortest augmenting paths, O(rows^2 columns). Allocates in resize() only.
class Assignment {
 public:
  void resize(int rows, int columns);
  void solve();
  std::vector<double> cost;
  std::vector<int32_t> column;  // of each row

 private:
  int rows_ = 0, columns_ = 0;
  std::vector<double> u_, v_, least_;
  std::vector<int> row_of_, from_;
  std::vector<char> used_;
};

class Refiner {
 public:
  Refiner(const RefineOptions& options, int height, int width, int threads, const Kernels& kernels);
  Refiner(Refiner&&) = default;
  Refiner& operator=(Refiner&&) = default;
  ~Refiner();

  // Up to `steps` steps on the picture, then one forward pass.
  // scores [height][width][classes] and labels [height][width] are written; records has `steps`
  // entries. image is [height][width][3] in [0, 1]. The last map with at least label_floor labels
  // is kept (0 = off). after_step(done) runs between steps and may throw.
  RunResult run(float* scores, int32_t* labels, StepRecord* records, const float* image,
                const Guide& guide, int label_floor, int steps,
                const std::function<void(int)>& after_step);

  std::vector<float> parameters, momenta, buffers;  // PyTorch's layout, see network.h
  int64_t batches = 0;                              // steps seen by the running statistics

  const RefineOptions& options() const { return options_; }
  int height() const { return height_; }
  int width() const { return width_; }
  size_t arena_bytes() const { return arena_floats_ * sizeof(float); }

 private:
  struct Statistics {  // of one batch norm, [padded channels] each
    float *mean, *inv, *scale, *shift;
  };
  struct Free {
    void operator()(float* p) const;
  };

  size_t layout(float* base);
  void set_input(const float* image, const Guide& guide);
  void set_overlap_mapping(const Guide& guide);
  void set_modulo_mapping(const Guide& guide);
  void pack();
  void forward(bool running);
  void normalize(Map out, Map in, const Norm& norm, const Statistics& s, bool running);
  void backward();
  void norm_backward(Map dx, Map dy, Map x, const Norm& norm, const Statistics& s, bool relu);
  void conv_gradient(const Conv& conv, Map in, Map dout, bool add);
  int find_labels();
  bool losses(StepRecord* record, const Guide& guide, int clusters);
  void update_running(const Norm& norm, const Statistics& s);

  RefineOptions options_;
  Network network_;
  int height_, width_, threads_;
  const Kernels* k_;
  size_t arena_floats_ = 0;
  std::unique_ptr<float, Free> arena_;

  // Maps, [height][width][padded channels]; "bordered" ones have one zero pixel around them.
  Map input_, head_, response_, d_response_, d_feature_, d_conv_, guide_, log_prior_;
  std::vector<Map> activation_, feature_;  // after relu; after batch norm (bordered)
  std::vector<Statistics> statistics_;
  Statistics head_statistics_{};
  std::vector<float*> packed_, turned_;  // weights as the kernels read them: blocks, skip, head
  std::vector<float*> packed_bias_;
  float *row_a_ = nullptr, *row_b_ = nullptr;  // per-row sums, [height][padded channels]
  float *sum_a_ = nullptr, *sum_b_ = nullptr;
  float *partial_ = nullptr, *affinity_ = nullptr, *lse_ = nullptr, *confidence_ = nullptr;
  float *class_weight_ = nullptr, *zero_ = nullptr, *one_ = nullptr;
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

}  // namespace seg
