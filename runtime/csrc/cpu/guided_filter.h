// The guided filter and joint upsampling. The caller owns all arrays and guarantees the shapes that
// the comments state. `threads` is at least 1; the result does not depend on it. k is the table of
// kernels that compute.
#pragma once

#include <cstdint>

#include "kernels.h"

namespace seg {

// Writes the coefficients of the guided filter (He, Sun, Tang 2013). For each window and each class
// the filter fits value = a . guidance + b, where a has one number per guidance channel. A larger
// eps gives a smaller a. The coefficients of a pixel are the means of a and of b over all windows
// that contain the pixel. A window has (2 radius + 1)^2 pixels around its centre and is cut at the
// borders of the picture. coefficients is [height][guidance_channels + 1][classes][width], first a,
// then b; guidance is [height][width][guidance_channels] with 1 or 3 channels; values is
// [height][width][classes].
void guided_coefficients(float* coefficients, const float* guidance, const float* values,
                         int height, int width, int guidance_channels, int classes, int radius,
                         double eps, int threads, const Kernels& k);

// Filters values: computes the coefficients of guided_coefficients() and writes out
// [height][width][classes] = a . guidance + b. guidance and values have the shapes of that
// function. Guidance is float or uint8_t. Bytes are divided by 255, in this function and in those
// below.
template <class Guidance>
void guided_filter(float* out, const Guidance* guidance, const float* values, int height, int width,
                   int guidance_channels, int classes, int radius, double eps, int threads,
                   const Kernels& k);

// Writes values [height][width][classes] = a . guidance + b. a and b are interpolated bilinearly,
// between pixel centres, from coefficients
// [low_height][guidance_channels + 1][classes][low_width], which guided_coefficients() has written
// for a picture of smaller or equal size. guidance is [height][width][guidance_channels] with 1 or
// 3 channels.
template <class Guidance>
void apply_coefficients(float* values, const float* coefficients, const Guidance* guidance,
                        int low_height, int low_width, int height, int width, int guidance_channels,
                        int classes, int threads, const Kernels& k);

// Joint upsampling: computes the values of apply_coefficients() without storing them. Writes, for
// each pixel, to labels [height][width] the class with the largest value (of equal values the
// first), and to confidence [height][width] this value cut to [0, 1]. guidance_channels is 3 or 0.
// With 0, coefficients contains only b, which is upsampled bilinearly, and guidance is not read.
void joint_upsample(int32_t* labels, float* confidence, const float* coefficients,
                    const uint8_t* guidance, int low_height, int low_width, int height, int width,
                    int guidance_channels, int classes, int threads, const Kernels& k);

// Shrinks a picture of height x width pixels to low_height x low_width pixels, as OpenCV's
// INTER_AREA: writes to each pixel of out [low_height][low_width][channels] the mean over the area
// that this pixel covers in picture [height][width][channels]. T is float or uint8_t; bytes are
// divided by 255. low_height <= height, low_width <= width.
template <class T>
void shrink(float* out, const T* picture, int low_height, int low_width, int height, int width,
            int channels, int threads, const Kernels& k);

}  // namespace seg
