// The decisions of the loop, which are taken on the device, and the update of the weights.
#pragma once

#include <cstdint>

#include "../network.h"
#include "conv_operands.cuh"

namespace seg::cuda {

constexpr int kNorms = 4;   // most norms of a network
constexpr int kLosses = 3;  // sums of each block: similarity, guide, spatial (residual: pairs)

// What the loop knows. The host writes it before a run and reads it after.
struct Control {
  int64_t batches;
  StepRecord* records;
  double guide_pixels, checked_loss, loss;
  unsigned long long same;  // labels that are as at the last check
  float weight;             // of the spatial loss in this step
  int label_floor, floor;
  int step, stop, stopped, have_kept, clusters, unchanged_checks;
  int over;  // as stopped, but changed between steps only
};

struct Norms {
  Norm norm[kNorms];
  NormState state[kNorms];
  int count;
};

// Counts the labels, ends the run where too few are left, and sets the step's spatial weight.
void start_step(Control* c, const int* present, const RefineOptions& options, cudaStream_t stream);

// Sums the losses [kLosses][blocks] of the blocks, records them, and ends the run where they are
// not finite.
void record_losses(Control* c, const double* losses, int blocks, double pixels,
                   const RefineOptions& options, cudaStream_t stream);

// SGD with momentum on the state (w, then v, [n] each); the state before is copied to kept.
void update_state(const Control* c, float* state, float* kept, const float* gradient, int n,
                  const RefineOptions& options, cudaStream_t stream);

// Counts the labels that are as at the last check, every kCheckEvery steps, and copies them.
void check_labels(Control* c, int32_t* checked, const int32_t* labels, size_t pixels,
                  cudaStream_t stream);

// Updates the running statistics and the counters, and decides whether this was the last step;
// clears present and writes the number of steps, and whether they ended, to told.
void finish_step(Control* c, const Norms& norms, float* buffers, float* kept, int* present,
                 double pixels, const RefineOptions& options, volatile int* told,
                 cudaStream_t stream);

}  // namespace seg::cuda
