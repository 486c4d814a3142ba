// The refinement on the GPU. It does the same as seg::Refiner (cpu/refiner.h), but pictures, guides
// and results are in device memory. After its first step, a refiner records a step as a CUDA
// graph and launches this graph for each further step. Kernels on the device decide when the run
// stops. The host reads this decision at most four steps later.
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
  // Allocates the memory on the current device. The caller must keep the same device current in all
  // later calls. With tensor_cores, convolutions round their inputs, weights and gradients to half
  // precision; without, they compute in float32. Throws std::invalid_argument if tensor_cores is
  // set and this build has no code for the tensor cores of the device (compute capability 7.5 or
  // above).
  Refiner(const RefineOptions& options, int height, int width, bool tensor_cores);
  Refiner(Refiner&&) noexcept;
  ~Refiner();

  // Does the same as seg::Refiner::run, and has the same shapes. records is host memory, all other
  // arrays are device memory. Work that writes the inputs must be finished or queued on stream()
  // before the call. Returns when the results are written. With in_step, each step starts only
  // after after_step has returned for the step before. Without, after_step may be called for a step
  // while later steps run.
  RunResult run(float* scores, int32_t* labels, StepRecord* records, const float* image,
                const Guide& guide, int label_floor, int steps,
                const std::function<bool(int)>& after_step, bool in_step);

  // A copy in host memory of what a warm run starts from. The vectors have PyTorch's layout
  // (network.h). batches is the number of steps that updated the running statistics.
  struct State {
    std::vector<float> parameters, momenta, buffers;
    int64_t batches;
  };
  // Copies the state from the device.
  State state() const;
  // Copies the state to the device.
  void set_state(const State& state);

  const RefineOptions& options() const;
  int height() const;
  int width() const;
  // Returns the bytes of device memory that the constructor allocates for the network's state,
  // the maps and the sums.
  size_t arena_bytes() const;
  // Returns the stream in which run() works.
  Stream stream() const;
  // Returns the milliseconds between the start of the first step and the end of the last step of
  // the last run, measured by CUDA events.
  float milliseconds() const;

 private:
  struct Work;
  std::unique_ptr<Work> work_;
};

}  // namespace seg::cuda
