// Test-time refinement on the device: the same as seg::Refiner, with pictures, guides and results
// in device memory. A step is a CUDA graph that is replayed; the loop decides on the device when to
// stop, the host looks a few steps later.
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
  // On the current device, which has to be current in all calls. With tensor_cores (compute
  // capability 7.5) convolutions round their inputs to half precision; otherwise all is float32.
  Refiner(const RefineOptions& options, int height, int width, bool tensor_cores);
  Refiner(Refiner&&) noexcept;
  ~Refiner();

  // As seg::Refiner::run; records lies on the host, all other arrays on the device. Their data must
  // be complete in the order of stream(). Returns when the results are written. With in_step the
  // host waits for each step, and none is begun before after_step has answered; otherwise
  // after_step hears of steps when the next ones are under way.
  RunResult run(float* scores, int32_t* labels, StepRecord* records, const float* image,
                const Guide& guide, int label_floor, int steps,
                const std::function<bool(int)>& after_step, bool in_step);

  // The state, in PyTorch's layout (network.h), on the host.
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
  // Of the last run's loop, on the device's clock.
  float milliseconds() const;

 private:
  struct Work;
  std::unique_ptr<Work> work_;
};

}  // namespace seg::cuda
