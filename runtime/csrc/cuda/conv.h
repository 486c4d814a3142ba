// Convolutions of the refinement network in float32, forward and backward. A convolution has Taps x
// Taps taps, 1 or 3. Source and Emit are Input and Forward in the forward pass, Gradient and
// Backward for the gradient by the input. conv.cu instantiates the combinations that the network
// uses. All pointers are device memory and all work is queued on the stream.
#pragma once

#include "conv_operands.cuh"

namespace seg::cuda {

// Returns the form in which run_conv() reads the weights of a convolution. weight, words and turned
// are for the caller to set.
Packed packed_for_conv(int taps, int in, int out);

// Copies the weights of all convolutions of the list from the parameters to their words.
void pack_for_conv(const PackedList& list, const float* parameters, cudaStream_t stream);

// Computes the convolution of source with the weights p and calls emit with the results. Does
// nothing if `over` is set and *over is not zero when the kernel starts.
template <int Taps, class Source, class Emit>
void run_conv(const Emit& emit, const Source& source, const Packed& p, Extent s, const int* over,
              cudaStream_t stream);

// Returns the number of parts that run_conv_gradient() needs, each of out * in * Taps^2 + out
// floats.
template <int Taps, int Ins>
int gradient_parts(int in, int out, Extent s);

// Writes gradient [out * in * Taps^2 + out]: the gradients by the weights and then by the bias.
// With add, they are added to gradient. parts is scratch memory for gradient_parts() parts.
template <int Taps, int Ins>
void run_conv_gradient(float* gradient, float* parts, const Input& source, const Gradient& slope,
                       int in, int out, bool add, Extent s, const int* over, cudaStream_t stream);

// gradient [n] = the sum of `count` parts [n], in a fixed order; with add, gradient += that sum.
void run_sum(float* gradient, const float* parts, int n, int count, bool add, cudaStream_t stream);

}  // namespace seg::cuda
