// The guided filter on the device; all pointers are device memory, all work goes to the stream.
#pragma once

#include <cstddef>

namespace seg::cuda {

using Stream = struct CUstream_st*;

// Floats of scratch memory that a picture of this size needs.
size_t filter_scratch(int height, int width, int guide_channels, int classes);

// The same as seg::guided_coefficients: coefficients [height][guide_channels + 1][classes][width],
// guide [height][width][guide_channels] (1 or 3), values [height][width][classes].
void guided_coefficients(float* coefficients, float* scratch, const float* guide,
                         const float* values, int height, int width, int guide_channels,
                         int classes, int radius, float eps, Stream stream);

// The same as seg::guided_filter: out [height][width][classes].
void guided_filter(float* out, float* scratch, const float* guide, const float* values, int height,
                   int width, int guide_channels, int classes, int radius, float eps,
                   Stream stream);

}  // namespace seg::cuda
