// The decisions of the loop, which kernels on the device make, and the update of the weights.
#pragma once

#include <cstdint>

#include "../network.h"
#include "conv_operands.cuh"

namespace seg::cuda {

constexpr int kNorms = 4;   // a network has at most this many norms
constexpr int kLosses = 3;  // losses of each block: similarity, guide, spatial (residual: pair)

// The state of the loop in device memory. The host writes it before a run and reads it afterwards.
// stopped is 1 once the run has ended, and stop is the reason. have_kept is 1 once the state before
// an update has been kept.
struct Control {
  int64_t batches;      // steps that updated the running statistics
  StepRecord* records;  // [steps], device memory
  double guide_pixels;  // pixels whose class the guide knows
  double checked_loss, loss;
  unsigned long long same;  // labels that equal those of the last check
  float weight;             // of the spatial loss in this step
  int label_floor, floor;
  int step, stop, stopped, have_kept, clusters, unchanged_checks;
  int over;  // equals stopped, but changes only between steps
};

// All norms of a network and their values.
struct Norms {
  Norm norm[kNorms];
  NormState state[kNorms];
  int count;
};

// Counts the labels that are marked in present [classes], ends the run if fewer than label_floor
// are left and a state is kept, and sets the weight of the step's spatial loss.
void start_step(Control* c, const int* present, const RefineOptions& options, cudaStream_t stream);

// Sums losses [kLosses][blocks] over the blocks, records the sums, and ends the run if the total
// loss is not finite. The picture has `pixels` pixels.
void record_losses(Control* c, const double* losses, int blocks, double pixels,
                   const RefineOptions& options, cudaStream_t stream);

// One step of SGD with momentum. state is the weights [n] and then the momenta [n]; its previous
// values are copied to kept. gradient is [n].
void update_state(const Control* c, float* state, float* kept, const float* gradient, int n,
                  const RefineOptions& options, cudaStream_t stream);

// Every kCheckEvery steps: counts the labels [pixels] that equal those of the last check, and
// copies the labels to checked [pixels].
void check_labels(Control* c, int32_t* checked, const int32_t* labels, size_t pixels,
                  cudaStream_t stream);

// Updates the running statistics (buffers; their previous values are copied to kept) and the
// counters, and decides whether this was the last step. Clears present. Writes the number of steps
// done and whether the run has ended to progress [2].
void finish_step(Control* c, const Norms& norms, float* buffers, float* kept, int* present,
                 double pixels, const RefineOptions& options, volatile int* progress,
                 cudaStream_t stream);

}  // namespace seg::cuda
