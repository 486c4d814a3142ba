// Shared by kernels that have one thread per pixel and by kernels of a single block: the numbers of
// their threads, and the sum over a block. Sums are float64 in a fixed order, so the result is the
// same in each run.
#pragma once

#include "conv_operands.cuh"

namespace seg::cuda {

constexpr int kThreads = 128;         // threads of a block
constexpr int kControlThreads = 256;  // threads of the block of a single-block kernel

// Returns the number of blocks for n threads.
inline int blocks_of(size_t n, int threads) {
  return static_cast<int>((n + threads - 1) / threads);
}

// The pixel of this thread: row, column, number in the picture, and position n in a plane.
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

// Returns the sum of value over the block to all its threads. Their number is a power of two;
// shared is scratch memory of one double per thread.
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
