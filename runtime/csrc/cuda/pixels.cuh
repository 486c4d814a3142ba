// Kernels with a thread for each pixel, or with a single block: their sizes, and sums over a block.
// Sums are of doubles in a fixed order, so that a seed gives the same answer every time.
#pragma once

#include "conv_operands.cuh"

namespace seg::cuda {

constexpr int kThreads = 128;         // threads of a block with a pixel, or a channel, each
constexpr int kControlThreads = 256;  // threads of single-block kernels

inline int blocks_of(size_t n, int threads) {
  return static_cast<int>((n + threads - 1) / threads);
}

// A picture's pixel: its number, and its place in a plane.
struct Pixel {
  int y, x;
  size_t number, n;
  bool inside;
  __device__ explicit Pixel(Extent s) {
    number = static_cast<size_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    inside = number < static_cast<size_t>(s.height) * s.width;
    y = static_cast<int>(number / s.width);
    x = static_cast<int>(number % s.width);
    n = s.at(y, x);
  }
};

// The sum over a block, a power of two of threads, for all of them.
__device__ inline double block_sum(double value, double* shared) {
  shared[threadIdx.x] = value;
  for (int half = blockDim.x / 2; half > 0; half /= 2) {
    __syncthreads();
    if (static_cast<int>(threadIdx.x) < half) shared[threadIdx.x] += shared[threadIdx.x + half];
  }
  __syncthreads();
  const double total = shared[0];
  __syncthreads();
  return total;
}

}  // namespace seg::cuda
