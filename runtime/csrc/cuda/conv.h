// Convolutions of the refinement network in float32, forward and backward. A convolution has 3x3 or
// 1x1 taps; Source is Input for the forward pass and Gradient for the gradient by the input, Emit
// is Forward or Backward. conv.cu instantiates what the network uses.
#pragma once

#include "conv_operands.cuh"

namespace seg::cuda {

// How run_conv() needs the weights of `in` channels, taps^2 each, for `out` channels.
Packed packed_for_conv(int taps, int in, int out);

// Copies the weights of all convolutions of the list in that order.
void pack_for_conv(const PackedList& list, const float* parameters, cudaStream_t stream);

// emit(source conv p); does nothing if *over is not zero when the kernel starts.
template <int Taps, class Source, class Emit>
void run_conv(const Emit& emit, const Source& source, const Packed& p, Extent s, const int* over,
              cudaStream_t stream);

// The number of parts of run_conv_gradient(), each [out * in * Taps^2 + out].
template <int Taps, int Ins>
int gradient_parts(int in, int out, Extent s);

// The gradients by weights and bias, one after the other; parts is scratch memory. With add they
// are added to what gradient holds.
template <int Taps, int Ins>
void run_conv_gradient(float* gradient, float* parts, const Input& source, const Gradient& slope,
                       int in, int out, bool add, Extent s, const int* over, cudaStream_t stream);

// gradient [n] = the sum of count parts [n], in a fixed order; with add, added to what it holds.
void run_sum(float* gradient, const float* parts, int n, int count, bool add, cudaStream_t stream);

}  // namespace seg::cuda
