// Guided filter, joint upsampling and shrinking on the device. All pointers are device memory, all
// work is queued on the stream.
#pragma once

#include <cstddef>
#include <cstdint>

#include "stream.h"

namespace seg::cuda {

// Floats of scratch memory that a picture of this size needs.
size_t filter_scratch(int height, int width, int guidance_channels, int classes);

// The same as seg::guided_coefficients: coefficients [height][guidance_channels + 1][classes][width],
// guidance [height][width][guidance_channels] (1 or 3), values [height][width][classes].
void guided_coefficients(float* coefficients, float* scratch, const float* guidance,
                         const float* values, int height, int width, int guidance_channels,
                         int classes, int radius, float eps, Stream stream);

// The same as seg::guided_filter: out [height][width][classes].
void guided_filter(float* out, float* scratch, const float* guidance, const float* values, int height,
                   int width, int guidance_channels, int classes, int radius, float eps,
                   Stream stream);

// The same as seg::apply_coefficients: values [height][width][classes].
void apply_coefficients(float* values, const float* coefficients, const float* guidance,
                        int low_height, int low_width, int height, int width, int guidance_channels,
                        int classes, Stream stream);

// The same as seg::joint_upsample: guidance [height][width][3] bytes, guidance_channels 3, or 0 to leave
// it out.
void joint_upsample(int32_t* labels, float* confidence, const float* coefficients,
                    const uint8_t* guidance, int low_height, int low_width, int height, int width,
                    int guidance_channels, int classes, Stream stream);

// Scores [height][width][classes] as coefficients of a bilinear lift.
void bilinear_coefficients(float* coefficients, const float* scores, int height, int width,
                           int classes, Stream stream);

// The same as seg::shrink: out [low_height][low_width][channels].
void shrink(float* out, const float* planes, int low_height, int low_width, int height, int width,
            int channels, Stream stream);

}  // namespace seg::cuda
