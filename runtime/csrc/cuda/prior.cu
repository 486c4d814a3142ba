// A network's scores as a guide: soft-max, at working size, on the device.
#include <cmath>

#include "common.cuh"
#include "filter.h"
#include "place.cuh"

namespace seg::cuda {
namespace {

constexpr int kThreads = 128;

// guide [pixels][classes] of scores [classes][pixels], which are probabilities already unless
// `exponents`. A thread has a pixel. Where scores are not finite, or probabilities are none, the
// pixel becomes NaN: the guide is looked into when it is known to be complete.
__global__ void soft_max(float* guide, const float* scores, size_t pixels, int classes,
                         bool exponents) {
  const size_t n = static_cast<size_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (n >= pixels) return;
  float top = -INFINITY, total = 0;
  bool ok = true;
  for (int k = 0; k < classes; ++k) {
    const float s = scores[k * pixels + n];
    ok = ok && isfinite(s) && (exponents || s >= 0);
    top = max(top, s);
  }
  float* out = guide + n * classes;
  for (int k = 0; k < classes; ++k) {
    const float s = scores[k * pixels + n], p = exponents ? expf(s - top) : s;
    total += p;
    out[k] = p;
  }
  const float share = ok && total > 0 ? 1.0f / total : NAN;
  for (int k = 0; k < classes; ++k) out[k] *= share;
}

// out [height][width][channels], between the pixel centres of planes (INTER_LINEAR).
__global__ void interpolate(float* out, const float* planes, int height, int width, int from_height,
                            int from_width, int channels) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x, y = blockIdx.y;
  if (i >= width * channels) return;
  const Place v(y, height, from_height), u(i / channels, width, from_width);
  const auto at = [&](int row, int column) {
    return planes[(static_cast<size_t>(row) * from_width + column) * channels + i % channels];
  };
  const float above = at(v.low, u.low) + u.weight * (at(v.low, u.high) - at(v.low, u.low)),
              below = at(v.high, u.low) + u.weight * (at(v.high, u.high) - at(v.high, u.low));
  out[static_cast<size_t>(y) * width * channels + i] = above + v.weight * (below - above);
}

}  // namespace

void soft_guide(float* guide, const float* scores, int height, int width, int classes,
                bool exponents, Stream stream) {
  const size_t pixels = static_cast<size_t>(height) * width;
  SEG_LAUNCH(soft_max, dim3(static_cast<unsigned>((pixels + kThreads - 1) / kThreads)),
             dim3(kThreads), 0, stream, guide, scores, pixels, classes, exponents);
}

void resize_planes(float* out, const float* planes, int height, int width, int from_height,
                   int from_width, int channels, Stream stream) {
  if (height <= from_height && width <= from_width)
    return shrink(out, planes, height, width, from_height, from_width, channels, stream);
  SEG_LAUNCH(interpolate, dim3((width * channels + kThreads - 1) / kThreads, height),
             dim3(kThreads), 0, stream, out, planes, height, width, from_height, from_width,
             channels);
}

}  // namespace seg::cuda
