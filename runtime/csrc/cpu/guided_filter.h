// The guided filter and joint upsampling. The caller owns all arrays and guarantees the shapes that
// the comments state. `threads` is at least 1; the result does not depend on it.
#pragma once

#include <cstdint>

#include "kernels.h"

namespace seg {

// Writes the coefficients of the guided filter (He, Sun, Tang 2013): for each pixel the mean over
// its window of a (one per guidance channel) and b, so that value = a . guidance + b. coefficients
// is [height][guidance_channels + 1][classes][width], guidance is
// [height][width][guidance_channels] with 1 or 3 channels, values is [height][width][classes]. A
// window has (2 radius + 1)^2 pixels and is cut at the borders of the picture.
void guided_coefficients(float* coefficients, const float* guidance, const float* values,
                         int height, int width, int guidance_channels, int classes, int radius,
                         double eps, int threads, const Kernels& k);

// Writes out [height][width][classes] = a . guidance + b with the coefficients of
// guided_coefficients(). Guidance is float or uint8_t. Bytes are divided by 255, in this function
// and in those below.
template <class Guidance>
void guided_filter(float* out, const Guidance* guidance, const float* values, int height, int width,
                   int guidance_channels, int classes, int radius, double eps, int threads,
                   const Kernels& k);

// Writes values [height][width][classes] = a . guidance + b. coefficients is
// [low_height][guidance_channels + 1][classes][low_width], of a smaller picture or one of equal
// size; they are interpolated bilinearly between pixel centres. guidance is
// [height][width][guidance_channels] with 1 or 3 channels.
template <class Guidance>
void apply_coefficients(float* values, const float* coefficients, const Guidance* guidance,
                        int low_height, int low_width, int height, int width, int guidance_channels,
                        int classes, int threads, const Kernels& k);

// Joint upsampling: computes the values of apply_coefficients() and keeps, for each pixel, labels
// [height][width] = the class with the largest value and confidence [height][width] = that value
// cut to [0, 1]. guidance_channels is 3, or 0 for bilinear upsampling, which does not read
// guidance.
void joint_upsample(int32_t* labels, float* confidence, const float* coefficients,
                    const uint8_t* guidance, int low_height, int low_width, int height, int width,
                    int guidance_channels, int classes, int threads, const Kernels& k);

// Writes out [low_height][low_width][channels]: the mean of planes [height][width][channels] over
// the area of each low pixel, as OpenCV's INTER_AREA. T is float or uint8_t; bytes are divided by
// 255. low_height <= height, low_width <= width.
template <class T>
void shrink(float* out, const T* planes, int low_height, int low_width, int height, int width,
            int channels, int threads, const Kernels& k);

}  // namespace seg
