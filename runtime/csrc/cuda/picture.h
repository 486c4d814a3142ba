// Resizes 8-bit pictures on the device. All pointers are device memory unless stated, and all work
// is queued on the stream. The result may be larger than the picture, despite the names low_height
// and low_width. Grey levels are those of OpenCV's INTER_AREA, or of INTER_LINEAR if a side grows.
// A level may differ by one where an area's mean lies halfway between two levels, or where a side
// grows.
#pragma once

#include <cstdint>

#include "stream.h"

namespace seg::cuda {

// Writes out [low_height][low_width][channels] in [0, 1]: picture [height][width][channels],
// resized.
void working_picture(float* out, const uint8_t* picture, int low_height, int low_width, int height,
                     int width, int channels, Stream stream);

// Writes out [3][low_height][low_width] = (level - mean) / std of picture [height][width][3],
// resized; level is in [0, 1]. With swapped the planes are in the opposite order. mean and std are
// [3], in the order of the planes of out, in host memory.
void network_input(float* out, const uint8_t* picture, int low_height, int low_width, int height,
                   int width, const float* mean, const float* std, bool swapped, Stream stream);

}  // namespace seg::cuda
