// Batch norms of the refinement network and their gradients.
#include "norm.h"
#include "pixels.cuh"

namespace seg::cuda {
namespace {

// Does the work of set_norm(). One block per channel.
__global__ void finish_norm(NormState to, const float* sums, const float* gamma, const float* beta,
                            const float* running, Extent s) {
  SEG_SHARED(memory);
  double* const shared = reinterpret_cast<double*>(memory);
  const int c = blockIdx.x, channels = gridDim.x, tiles = s.tiles();
  double mean = 0, m2 = 0;
  if (sums == nullptr) {
    mean = running[c];
    m2 = running[channels + c];
  } else {
    const double n = static_cast<double>(s.height) * s.width;
    const float* sum = sums + static_cast<size_t>(c) * tiles;
    const float* square = sums + static_cast<size_t>(channels + c) * tiles;
    for (int t = threadIdx.x; t < tiles; t += blockDim.x) mean += sum[t];
    mean = block_sum(mean, shared) / n;
    for (int t = threadIdx.x; t < tiles; t += blockDim.x) {  // Chan's rule
      const double count = s.inside(t), off = sum[t] / count - mean;
      m2 += square[t] + count * off * off;
    }
    m2 = block_sum(m2, shared) / n;
  }
  if (threadIdx.x != 0) return;
  const double inv = 1.0 / sqrt(m2 + kNormEps);
  to.mean[c] = static_cast<float>(mean);
  to.inv[c] = static_cast<float>(inv);
  to.scale[c] = static_cast<float>(gamma[c] * inv);
  to.shift[c] = beta[c];
}

// Does the work of set_norm_gradient(). One block per channel.
__global__ void finish_norm_gradient(float* dgamma, float* dbeta, NormState of, const float* sums,
                                     int count, double pixels) {
  SEG_SHARED(memory);
  double* const shared = reinterpret_cast<double*>(memory);
  const int c = blockIdx.x, channels = gridDim.x;
  double a = 0, b = 0;
  for (int t = threadIdx.x; t < count; t += blockDim.x) {
    a += sums[static_cast<size_t>(c) * count + t];
    b += sums[static_cast<size_t>(channels + c) * count + t];
  }
  a = block_sum(a, shared);
  b = block_sum(b, shared);
  if (threadIdx.x != 0) return;
  const double inv = of.inv[c];
  dbeta[c] = static_cast<float>(a);
  dgamma[c] = static_cast<float>(b * inv);
  of.a[c] = static_cast<float>(a / pixels);
  of.b[c] = static_cast<float>(b * inv * inv / pixels);
}

// Does the work of sum_channels(). The grid is (share of the rows, channel).
__global__ void channel_sums(float* sums, const float* d, const float* x, const float* mean,
                             Extent s) {
  SEG_SHARED(memory);
  double* const shared = reinterpret_cast<double*>(memory);
  const int c = blockIdx.y, channels = gridDim.y;
  const size_t plane = s.plane();
  float a = 0, b = 0;
  for (int y = blockIdx.x; y < s.height; y += gridDim.x)
    for (int i = threadIdx.x; i < s.width; i += blockDim.x) {
      const float v = d[c * plane + s.at(y, i)];
      a += v;
      b += v * (x[c * plane + s.at(y, i)] - mean[c]);
    }
  const double all = block_sum(a, shared), product = block_sum(b, shared);
  if (threadIdx.x != 0) return;
  sums[static_cast<size_t>(c) * gridDim.x + blockIdx.x] = static_cast<float>(all);
  sums[static_cast<size_t>(channels + c) * gridDim.x + blockIdx.x] = static_cast<float>(product);
}

}  // namespace

void set_norm(const NormState& to, const float* sums, const Norm& norm, const float* parameters,
              const float* buffers, Extent s, cudaStream_t stream) {
  SEG_LAUNCH(finish_norm, dim3(norm.channels), dim3(kThreads), kThreads * sizeof(double), stream,
             to, sums, parameters + norm.gamma, parameters + norm.beta, buffers + norm.mean, s);
}

void set_norm_gradient(float* gradient, const NormState& of, const Norm& norm, const float* sums,
                       int count, double pixels, cudaStream_t stream) {
  SEG_LAUNCH(finish_norm_gradient, dim3(norm.channels), dim3(kThreads), kThreads * sizeof(double),
             stream, gradient + norm.gamma, gradient + norm.beta, of, sums, count, pixels);
}

void sum_channels(float* sums, const float* d, const float* x, const float* mean, int channels,
                  Extent s, cudaStream_t stream) {
  SEG_LAUNCH(channel_sums, dim3(kShares, channels), dim3(kThreads), kThreads * sizeof(double),
             stream, sums, d, x, mean, s);
}

}  // namespace seg::cuda
