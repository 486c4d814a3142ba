// 8-bit pictures on the device, resized. All pointers are device memory, all work is queued on the
// stream.
#pragma once

#include <cstdint>

#include "stream.h"

namespace seg::cuda {

// out [low_height][low_width][channels] in [0, 1]: the picture [height][width][channels] resized as
// OpenCV does, grey level by grey level.
void working_picture(float* out, const uint8_t* picture, int low_height, int low_width, int height,
                     int width, int channels, Stream stream);

// out [3][low_height][low_width] = (level - mean) / std of the picture [height][width][3] resized
// so; planes in the opposite order if `swapped`. mean and std are the host's.
void network_input(float* out, const uint8_t* picture, int low_height, int low_width, int height,
                   int width, const float* mean, const float* std, bool swapped, Stream stream);

}  // namespace seg::cuda
