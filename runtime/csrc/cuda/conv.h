// Convolutions of the refinement network in float32, forward and backward. Taps is 1 for a
// 1x1 convolution and 3 for a 3x3 convolution. The CUDA kernels call source to read a value and
// emit to write results. Their types Source and Emit are Input and Forward in the forward pass,
// Gradient and Backward for the gradient by the input (conv_operands.cuh). `in` and `out` are
// numbers of channels, s is the size of all maps. conv.cu instantiates the combinations that the
// network uses. All pointers are device memory and all work is queued on the stream.
#pragma once

#include "conv_operands.cuh"

namespace seg::cuda {

// Returns a description of the order in which run_conv() reads the weights of a convolution. taps
// is Taps (1 or 3), but Packed::taps is Taps^2. The caller must set the members weight, words and
// turned of the result.
Packed packed_for_conv(int taps, int in, int out);

// Copies the weights of each convolution in the list from the network's parameters to its
// Packed::words, in the order in which run_conv() reads them.
void pack_for_conv(const PackedList& list, const float* parameters, cudaStream_t stream);

// Computes the convolution of source with the weights p and calls emit with the results. Does
// nothing if `over` is not null and *over is not zero when the kernel starts: then the run of the
// refinement has ended.
template <int Taps, class Source, class Emit>
void run_conv(const Emit& emit, const Source& source, const Packed& p, Extent s, const int* over,
              cudaStream_t stream);

// Returns the number of partial sums that run_conv_gradient() writes, each of out * in * Taps^2 +
// out floats. Ins is the number of input channels of a thread.
template <int Taps, int Ins>
int gradient_parts(int in, int out, Extent s);

// Writes gradient [out * in * Taps^2 + out]: first the gradient by the weights, then the gradient
// by the bias. With add, they are added to gradient. source is the input of the convolution, slope
// is the gradient by its output. parts is scratch memory for gradient_parts() partial sums. If the
// run has ended (`over`, see run_conv), the values that are written have no meaning.
template <int Taps, int Ins>
void run_conv_gradient(float* gradient, float* parts, const Input& source, const Gradient& slope,
                       int in, int out, bool add, Extent s, const int* over, cudaStream_t stream);

// Writes to gradient [n] the sum of parts [count][n], added in a fixed order. With add, the sum is
// added to gradient.
void run_sum(float* gradient, const float* parts, int n, int count, bool add, cudaStream_t stream);

}  // namespace seg::cuda
