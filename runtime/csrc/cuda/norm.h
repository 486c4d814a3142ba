// Batch norms of the refinement network and their gradients.
#pragma once

#include "../network.h"
#include "conv_operands.cuh"

namespace seg::cuda {

constexpr int kShares = 64;  // blocks that share the sums of a channel

// A norm from the tiles' moments sums [2][channels][tiles], or from the running statistics if sums
// is null. parameters and buffers are those of the network.
void set_norm(const NormState& to, const float* sums, const Norm& norm, const float* parameters,
              const float* buffers, Extent s, cudaStream_t stream);

// The gradients by gamma and beta, and what the gradient by x subtracts, from sums
// [2][channels][count] of d and d (x - mean) over `pixels` pixels. gradient is that of all
// parameters.
void set_norm_gradient(float* gradient, const NormState& of, const Norm& norm, const float* sums,
                       int count, double pixels, cudaStream_t stream);

// sums [2][channels][kShares] of d and d (x - mean).
void sum_channels(float* sums, const float* d, const float* x, const float* mean, int channels,
                  Extent s, cudaStream_t stream);

}  // namespace seg::cuda
