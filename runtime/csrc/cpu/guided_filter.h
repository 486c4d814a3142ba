// The guided filter on one picture. The functions own no memory.
#pragma once

#include <cstdint>

#include "kernels.h"

namespace seg {

// Coefficients of the guided filter (He, Sun, Tang 2013): for every pixel the mean over its window
// of a (one per guide channel) and b, so that value = a . guide + b.
// coefficients [height][guide_channels + 1][classes][width], guide [height][width][guide_channels]
// (1 or 3), values [height][width][classes]. Windows are (2 radius + 1)^2, cut at the borders.
void guided_coefficients(float* coefficients, const float* guide, const float* values, int height,
                         int width, int guide_channels, int classes, int radius, double eps,
                         int threads, const Kernels& k);

// The same applied at once: out [height][width][classes] = a . guide + b. A guide of bytes counts
// as these / 255, here and below.
template <class Guide>
void guided_filter(float* out, const Guide* guide, const float* values, int height, int width,
                   int guide_channels, int classes, int radius, double eps, int threads,
                   const Kernels& k);

// values [height][width][classes] from coefficients of a picture of low_height x low_width, which
// is at most as large, interpolated bilinearly between pixel centres, and a guide of the full size.
template <class Guide>
void apply_coefficients(float* values, const float* coefficients, const Guide* guide,
                        int low_height, int low_width, int height, int width, int guide_channels,
                        int classes, int threads, const Kernels& k);

// The same for an 8-bit guide, keeping only the best class and its value cut to [0, 1].
// guide_channels is 3, or 0 for plain bilinear lifting (guide is not read then).
void joint_upsample(int32_t* labels, float* confidence, const float* coefficients,
                    const uint8_t* guide, int low_height, int low_width, int height, int width,
                    int guide_channels, int classes, int threads, const Kernels& k);

// out [low_height][low_width][channels] = means of planes [height][width][channels] over the area
// of each pixel, as OpenCV's INTER_AREA; of bytes, / 255.
template <class T>
void shrink(float* out, const T* planes, int low_height, int low_width, int height, int width,
            int channels, int threads, const Kernels& k);

}  // namespace seg
