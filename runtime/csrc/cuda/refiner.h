// Test-time refinement on the device: as seg::Refiner, with pictures, guides and results in device
// memory. A step is a CUDA graph that is replayed. Kernels on the device decide when the run stops;
// the host reads this decision up to a few steps later.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

#include "../network.h"
#include "stream.h"

namespace seg::cuda {

class Refiner {
 public:
  // Uses the current device; the caller keeps it current in all calls. With tensor_cores (compute
  // capability 7.5 or above) convolutions round their inputs to half precision; otherwise
  // everything is float32.
  Refiner(const RefineOptions& options, int height, int width, bool tensor_cores);
  Refiner(Refiner&&) noexcept;
  ~Refiner();

  // As seg::Refiner::run. records is host memory, all other arrays are device memory; work that
  // writes the inputs must be queued on stream() or done. Returns when the results are written.
  // With in_step the host waits for each step, and the next one starts after after_step has
  // returned. Otherwise after_step may be called for a step while later ones run.
  RunResult run(float* scores, int32_t* labels, StepRecord* records, const float* image,
                const Guide& guide, int label_floor, int steps,
                const std::function<bool(int)>& after_step, bool in_step);

  // The state in host memory, in PyTorch's layout (network.h).
  struct State {
    std::vector<float> parameters, momenta, buffers;
    int64_t batches;
  };
  State state() const;
  void set_state(const State& state);

  const RefineOptions& options() const;
  int height() const;
  int width() const;
  size_t arena_bytes() const;
  Stream stream() const;
  // Returns the milliseconds of the last run's steps, measured by events of the device.
  float milliseconds() const;

 private:
  struct Work;
  std::unique_ptr<Work> work_;
};

}  // namespace seg::cuda
