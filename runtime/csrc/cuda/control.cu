// The decisions of the loop, which kernels on the device make, and the update of the weights.
#include "control.h"
#include "pixels.cuh"

namespace seg::cuda {
namespace {

// Does the work of start_step(). One block.
__global__ void begin_step(Control* c, const int* present, int classes, int weighting, float mu,
                           float beta) {
  SEG_SHARED(memory);
  double found = 0;
  for (int k = threadIdx.x; k < classes; k += blockDim.x) found += present[k];
  found = block_sum(found, reinterpret_cast<double*>(memory));
  if (threadIdx.x != 0 || c->stopped) return;
  c->clusters = static_cast<int>(found);
  if (c->label_floor > 0 && c->clusters < c->label_floor && c->have_kept) {
    c->stop = kSilhouette;  // the weights before the last update are restored
    c->stopped = 1;
  }
  c->weight = mu;
  if (weighting == kFsf) c->weight = static_cast<float>(found / beta);
  if (weighting == kScf) c->weight = static_cast<float>(mu / found);
}

// Does the work of record_losses(). One block.
__global__ void judge(Control* c, const double* losses, int blocks, double pixels, bool residual,
                      float lambda) {
  SEG_SHARED(memory);
  double sums[kLosses];
  for (int i = 0; i < kLosses; ++i) {
    double sum = 0;
    for (int b = threadIdx.x; b < blocks; b += blockDim.x) sum += losses[i * blocks + b];
    sums[i] = block_sum(sum, reinterpret_cast<double*>(memory));
  }
  if (threadIdx.x != 0 || c->stopped) return;
  StepRecord r{};
  r.clusters = c->clusters;
  r.spatial = sums[2];
  if (residual) {
    r.guide = sums[1];
    r.total = r.guide + lambda * r.spatial;
  } else {
    r.first = sums[0] / pixels;
    if (c->guide_pixels > 0) r.guide = sums[1] / c->guide_pixels;
    r.total = r.first + r.guide + static_cast<double>(c->weight) * r.spatial;
  }
  c->records[c->step] = r;
  c->loss = r.total;
  if (!isfinite(r.total)) {
    c->stop = kDiverged;
    c->stopped = 1;
  }
}

// Does the work of update_state(). One thread per weight.
__global__ void update(const Control* c, float* w, float* v, float* kept_w, float* kept_v,
                       const float* gradient, float lr, float momentum, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n || c->stopped) return;
  kept_w[i] = w[i];
  kept_v[i] = v[i];
  v[i] = momentum * v[i] + gradient[i];
  w[i] -= lr * v[i];
}

// Does the work of check_labels(). One thread per pixel.
__global__ void compare_labels(Control* c, int32_t* checked, const int32_t* labels, size_t pixels) {
  const size_t n = static_cast<size_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (c->stopped || c->step % kCheckEvery != 0 || n >= pixels) return;
  if (checked[n] == labels[n]) atomicAdd(&c->same, 1ull);
  checked[n] = labels[n];
}

// Does the work of finish_step(). One block.
__global__ void end_step(Control* c, Norms norms, float* buffers, float* kept, int* present,
                         int classes, double pixels, int min_labels, float early_stop,
                         volatile int* progress) {
  for (int k = threadIdx.x; k < classes; k += blockDim.x) present[k] = 0;
  if (c->stopped) {
    if (threadIdx.x == 0) progress[1] = c->over = 1;
    return;
  }
  for (int i = 0; i < norms.count; ++i) {
    const Norm& of = norms.norm[i];
    for (int k = threadIdx.x; k < of.channels; k += blockDim.x) {
      const double inv = norms.state[i].inv[k], var = 1.0 / (inv * inv) - kNormEps;
      const double unbiased = pixels > 1 ? var * pixels / (pixels - 1) : var;
      float &mean = buffers[of.mean + k], &running = buffers[of.var + k];
      kept[of.mean + k] = mean;
      kept[of.var + k] = running;
      mean =
          static_cast<float>((1 - kRunningShare) * mean + kRunningShare * norms.state[i].mean[k]);
      running = static_cast<float>((1 - kRunningShare) * running + kRunningShare * unbiased);
    }
  }
  __syncthreads();  // all threads have read c->stopped
  if (threadIdx.x != 0) return;
  const int step = c->step++;
  c->have_kept = 1;
  ++c->batches;
  if (c->floor > 0 && c->clusters <= c->floor) {
    c->stop = c->label_floor >= min_labels ? kSilhouette : kMinLabels;
    c->stopped = 1;
  } else if (early_stop > 0 && step % kCheckEvery == 0) {
    const bool unchanged = step > 0 &&
                           static_cast<float>(c->same) >= early_stop * static_cast<float>(pixels) &&
                           fabs(c->loss - c->checked_loss) < kLossChange * fabs(c->checked_loss);
    c->unchanged_checks = unchanged ? c->unchanged_checks + 1 : 0;
    c->checked_loss = c->loss;
    c->same = 0;
    if (c->unchanged_checks == kChecks) {
      c->stop = kConverged;
      c->stopped = 1;
    }
  }
  c->over = c->stopped;
  progress[0] = c->step;
  progress[1] = c->stopped;
}

}  // namespace

void start_step(Control* c, const int* present, const RefineOptions& options, cudaStream_t stream) {
  SEG_LAUNCH(begin_step, dim3(1), dim3(kControlThreads),
             kControlThreads * (sizeof(double) + sizeof(int)), stream, c, present, options.classes,
             options.weighting, options.mu, options.beta);
}

void record_losses(Control* c, const double* losses, int blocks, double pixels,
                   const RefineOptions& options, cudaStream_t stream) {
  SEG_LAUNCH(judge, dim3(1), dim3(kControlThreads), kControlThreads * sizeof(double), stream, c,
             losses, blocks, pixels, options.objective == kResidual, options.lambda);
}

void update_state(const Control* c, float* state, float* kept, const float* gradient, int n,
                  const RefineOptions& options, cudaStream_t stream) {
  SEG_LAUNCH(update, dim3(blocks_of(n, kThreads)), dim3(kThreads), 0, stream, c, state, state + n,
             kept, kept + n, gradient, options.lr, options.momentum, n);
}

void check_labels(Control* c, int32_t* checked, const int32_t* labels, size_t pixels,
                  cudaStream_t stream) {
  SEG_LAUNCH(compare_labels, dim3(blocks_of(pixels, kThreads)), dim3(kThreads), 0, stream, c,
             checked, labels, pixels);
}

void finish_step(Control* c, const Norms& norms, float* buffers, float* kept, int* present,
                 double pixels, const RefineOptions& options, volatile int* progress,
                 cudaStream_t stream) {
  SEG_LAUNCH(end_step, dim3(1), dim3(kControlThreads), 0, stream, c, norms, buffers, kept, present,
             options.classes, pixels, options.min_labels, options.early_stop, progress);
}

}  // namespace seg::cuda
