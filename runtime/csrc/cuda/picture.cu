// Resizes pictures of bytes on the device. picture.h states how the results differ from OpenCV's.
#include "common.cuh"
#include "picture.h"

namespace seg::cuda {
namespace {

constexpr int kThreads = 128;

// Bytes [height][width][channels].
struct Picture {
  const uint8_t* data;
  int height, width, channels;
  __device__ int at(int y, int x, int c) const {
    return data[(static_cast<size_t>(y) * width + x) * channels + c];
  }
};

// Returns the mean over the area of a low pixel (INTER_AREA), rounded to a grey level. The mean of
// 2x2 pixels rounds halves up, as OpenCV's integer mean; other means round halves to even.
__device__ float mean_of(const Picture& p, int y, int x, int c, int low_height, int low_width) {
  if (p.height == 2 * low_height && p.width == 2 * low_width) {
    const int sum = p.at(2 * y, 2 * x, c) + p.at(2 * y, 2 * x + 1, c) + p.at(2 * y + 1, 2 * x, c) +
                    p.at(2 * y + 1, 2 * x + 1, c);
    return static_cast<float>((sum + 2) >> 2);
  }
  const double tall = static_cast<double>(p.height) / low_height,
               wide = static_cast<double>(p.width) / low_width;
  const double top = y * tall, left = x * wide;
  float sum = 0;
  for (int v = static_cast<int>(top); v < p.height && v < top + tall - 1e-6; ++v) {
    const float rows = static_cast<float>((min(top + tall, v + 1.0) - max(top, 1.0 * v)) / tall);
    float line = 0;
    for (int u = static_cast<int>(left); u < p.width && u < left + wide - 1e-6; ++u) {
      const double part = min(left + wide, u + 1.0) - max(left, 1.0 * u);
      line += static_cast<float>(part / wide) * p.at(v, u, c);
    }
    sum += rows * line;
  }
  return rintf(sum);
}

// The position of pixel i of n_low among the n pixels of the picture (INTER_LINEAR): it lies
// between low and high, whose weights first and second are in units of 1 / 2048.
struct Between {
  int low, high, first, second;
  __device__ Between(int i, int n_low, int n) {
    float at = static_cast<float>((i + 0.5) * (static_cast<double>(n) / n_low) - 0.5);
    low = static_cast<int>(floorf(at));
    at -= low;
    if (low < 0) low = 0, at = 0;
    if (low >= n - 1) low = n - 1, at = 0;
    high = min(low + 1, n - 1);
    first = static_cast<int>(rintf((1 - at) * 2048));
    second = static_cast<int>(rintf(at * 2048));
  }
};

// Returns the grey level that is interpolated in fixed point, as in OpenCV. OpenCV's versions
// differ from each other by one grey level.
__device__ float between(const Picture& p, int y, int x, int c, int low_height, int low_width) {
  const Between v(y, low_height, p.height), u(x, low_width, p.width);
  const int above = p.at(v.low, u.low, c) * u.first + p.at(v.low, u.high, c) * u.second,
            below = p.at(v.high, u.low, c) * u.first + p.at(v.high, u.high, c) * u.second;
  const int sum = (v.first * (above >> 4) >> 16) + (v.second * (below >> 4) >> 16);
  return static_cast<float>((sum + 2) >> 2);
}

// The output array. put() writes a level in [0, 1] to out [height][width][channels]. If planes is
// set, it writes (level - mean) / std to out [channels][height][width] instead; with swapped the
// channels are in the opposite order.
struct Target {
  float* out;
  bool planes, swapped;
  float mean[3], std[3];
  __device__ void put(float level, int y, int x, int c, int channels, int height, int width) const {
    if (!planes) {
      out[(static_cast<size_t>(y) * width + x) * channels + c] = level;
      return;
    }
    const int plane = swapped ? channels - 1 - c : c;
    out[(static_cast<size_t>(plane) * height + y) * width + x] = (level - mean[plane]) / std[plane];
  }
};

// Resizes the picture. One thread per channel of a low pixel; neighbouring threads read
// neighbouring bytes.
__global__ void resize_bytes(Target to, Picture p, int low_height, int low_width) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x, y = blockIdx.y;
  if (i >= low_width * p.channels) return;
  const int x = i / p.channels, c = i % p.channels;
  const bool shrinks = low_height <= p.height && low_width <= p.width;
  const float level = shrinks ? mean_of(p, y, x, c, low_height, low_width)
                              : between(p, y, x, c, low_height, low_width);
  to.put(level / 255, y, x, c, p.channels, low_height, low_width);
}

void resize(const Target& to, const Picture& p, int low_height, int low_width, Stream stream) {
  SEG_LAUNCH(resize_bytes, dim3((low_width * p.channels + kThreads - 1) / kThreads, low_height),
             dim3(kThreads), 0, stream, to, p, low_height, low_width);
}

}  // namespace

void working_picture(float* out, const uint8_t* picture, int low_height, int low_width, int height,
                     int width, int channels, Stream stream) {
  resize(Target{out, false, false, {}, {}}, Picture{picture, height, width, channels}, low_height,
         low_width, stream);
}

void network_input(float* out, const uint8_t* picture, int low_height, int low_width, int height,
                   int width, const float* mean, const float* std, bool swapped, Stream stream) {
  Target to{out, true, swapped, {}, {}};
  for (int c = 0; c < 3; ++c) to.mean[c] = mean[c], to.std[c] = std[c];
  resize(to, Picture{picture, height, width, 3}, low_height, low_width, stream);
}

}  // namespace seg::cuda
