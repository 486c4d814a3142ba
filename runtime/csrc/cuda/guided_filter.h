// The guided filter, joint upsampling and shrinking on the device. All pointers are device memory
// and all work is queued on the stream. cpu/guided_filter.h describes the functions; here the
// guidance of all functions but joint_upsample is float32 and lies in [0, 1].
#pragma once

#include <cstddef>
#include <cstdint>

#include "stream.h"

namespace seg::cuda {

// Returns the floats of scratch memory that the two functions below need.
size_t filter_scratch(int height, int width, int guidance_channels, int classes);

// As seg::guided_coefficients: writes coefficients [height][guidance_channels + 1][classes][width]
// of guidance [height][width][guidance_channels] (1 or 3 channels) and values
// [height][width][classes].
void guided_coefficients(float* coefficients, float* scratch, const float* guidance,
                         const float* values, int height, int width, int guidance_channels,
                         int classes, int radius, float eps, Stream stream);

// As seg::guided_filter: writes out [height][width][classes].
void guided_filter(float* out, float* scratch, const float* guidance, const float* values,
                   int height, int width, int guidance_channels, int classes, int radius, float eps,
                   Stream stream);

// As seg::apply_coefficients: writes values [height][width][classes]. coefficients is
// [low_height][guidance_channels + 1][classes][low_width].
void apply_coefficients(float* values, const float* coefficients, const float* guidance,
                        int low_height, int low_width, int height, int width, int guidance_channels,
                        int classes, Stream stream);

// As seg::joint_upsample: writes labels and confidence [height][width]. guidance is bytes
// [height][width][3]; guidance_channels is 3, or 0 for bilinear upsampling without guidance.
void joint_upsample(int32_t* labels, float* confidence, const float* coefficients,
                    const uint8_t* guidance, int low_height, int low_width, int height, int width,
                    int guidance_channels, int classes, Stream stream);

// Writes coefficients [height][1][classes][width] for bilinear upsampling of scores
// [height][width][classes].
void bilinear_coefficients(float* coefficients, const float* scores, int height, int width,
                           int classes, Stream stream);

// As seg::shrink: writes out [low_height][low_width][channels] from picture
// [height][width][channels].
void shrink(float* out, const float* picture, int low_height, int low_width, int height, int width,
            int channels, Stream stream);

}  // namespace seg::cuda
