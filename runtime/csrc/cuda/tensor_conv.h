// The convolutions of conv.h on tensor cores: inputs and weights are rounded to half precision,
// sums are float32. Gradients are multiplied by `gain`, a power of two, before they are rounded,
// and the results are divided by it.
#pragma once

#include "conv_operands.cuh"

namespace seg::cuda {

// Returns whether this build has tensor-core code for the current GPU. On a GPU without it the
// kernels would compute zeros.
bool has_tensor_code();

// As packed_for_conv() and pack_for_conv().
Packed packed_for_tensor(int taps, int in, int out);
void pack_for_tensor(const PackedList& list, const float* parameters, cudaStream_t stream);

// As run_conv(). The values of source are multiplied by gain, and the sums are divided by it.
template <int Taps, class Source, class Emit>
void run_conv_tensor(const Emit& emit, const Source& source, const Packed& p, float gain, Extent s,
                     const int* over, cudaStream_t stream);

// Returns the number of parts that run_conv_gradient_tensor() needs, as gradient_parts().
int tensor_parts(int in, int out, Extent s);

// As run_conv_gradient().
template <int Taps>
void run_conv_gradient_tensor(float* gradient, float* parts, const Input& source,
                              const Gradient& slope, int in, int out, float gain, bool add,
                              Extent s, const int* over, cudaStream_t stream);

}  // namespace seg::cuda
