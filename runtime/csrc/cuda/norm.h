// Batch norms of the refinement network and their gradients. Maps are planes (conv_operands.cuh).
#pragma once

#include "../network.h"
#include "conv_operands.cuh"

namespace seg::cuda {

constexpr int kShares = 64;  // blocks that sum a channel

// Sets mean, inv, scale and shift of a norm from the tiles' moments sums [2][channels][tiles],
// which Forward writes, or, if sums is null, from the running statistics. parameters and buffers
// are those of the network.
void set_norm(const NormState& to, const float* sums, const Norm& norm, const float* parameters,
              const float* buffers, Extent s, cudaStream_t stream);

// Writes the gradients by gamma and beta into gradient (of all parameters), and sets a and b of the
// norm, from sums [2][channels][count] of d and of d * (x - mean). The picture has `pixels` pixels.
void set_norm_gradient(float* gradient, const NormState& of, const Norm& norm, const float* sums,
                       int count, double pixels, cudaStream_t stream);

// Writes sums [2][channels][kShares] of d and of d * (x - mean). d and x have `channels` planes.
void sum_channels(float* sums, const float* d, const float* x, const float* mean, int channels,
                  Extent s, cudaStream_t stream);

}  // namespace seg::cuda
