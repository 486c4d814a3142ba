// The convolutions of conv.h on tensor cores, with inputs in half precision. gain is the power of
// two that gradients are multiplied by before they are rounded.
#pragma once

#include "conv_operands.cuh"

namespace seg::cuda {

// Whether this build has code for tensor cores on the current GPU. Code for older GPUs has none,
// and would compute zeros.
bool has_tensor_code();

// As packed_for_conv() and pack_for_conv().
Packed packed_for_tensor(int taps, int in, int out);
void pack_for_tensor(const PackedList& list, const float* parameters, cudaStream_t stream);

// As run_conv().
template <int Taps, class Source, class Emit>
void run_conv_tensor(const Emit& emit, const Source& source, const Packed& p, float gain, Extent s,
                     const int* over, cudaStream_t stream);

// The number of parts of run_conv_gradient_tensor().
int tensor_parts(int in, int out, Extent s);

// As run_conv_gradient().
template <int Taps>
void run_conv_gradient_tensor(float* gradient, float* parts, const Input& source,
                              const Gradient& slope, int in, int out, float gain, bool add,
                              Extent s, const int* over, cudaStream_t stream);

}  // namespace seg::cuda
