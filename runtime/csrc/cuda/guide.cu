// Operations on guides, scores and class maps on the device, so that none of these arrays is copied
// to the host.
#include <cmath>

#include "common.cuh"
#include "guide.h"
#include "guided_filter.h"
#include "place.cuh"

namespace seg::cuda {
namespace {

constexpr int kThreads = 128;

// Does the work of soft_guide(). One thread per pixel. Invalid pixels become NaN, because a kernel
// cannot raise an error: Python checks the guide for NaN after the work is done.
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

// Writes out [height][width][channels], interpolated between the pixel centres of image
// (INTER_LINEAR). One thread per channel of a pixel.
__global__ void interpolate(float* out, const float* image, int height, int width, int from_height,
                            int from_width, int channels) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x, y = blockIdx.y;
  if (i >= width * channels) return;
  const Place v(y, height, from_height), u(i / channels, width, from_width);
  const auto at = [&](int row, int column) {
    return image[(static_cast<size_t>(row) * from_width + column) * channels + i % channels];
  };
  const float above = at(v.low, u.low) + u.weight * (at(v.low, u.high) - at(v.low, u.low)),
              below = at(v.high, u.low) + u.weight * (at(v.high, u.high) - at(v.high, u.low));
  out[static_cast<size_t>(y) * width * channels + i] = above + v.weight * (below - above);
}

// Does the work of class_sums(). One block per part of the pixels and class. Its threads' sums are
// added in a fixed order.
__global__ void sum_classes(float* parts, const float* guide, size_t pixels, int classes) {
  SEG_SHARED(sums);  // [kThreads]
  const int t = threadIdx.x, k = blockIdx.y;
  const size_t begin = pixels * blockIdx.x / kSumParts, end = pixels * (blockIdx.x + 1) / kSumParts;
  float sum = 0;
  for (size_t n = begin + t; n < end; n += kThreads) sum += guide[n * classes + k];
  sums[t] = sum;
  __syncthreads();
  for (int half = kThreads / 2; half > 0; half /= 2) {
    if (t < half) sums[t] += sums[t + half];
    __syncthreads();
  }
  if (t == 0) parts[static_cast<size_t>(k) * kSumParts + blockIdx.x] = sums[0];
}

// Does the work of take_classes(). One thread per pixel.
__global__ void take_columns(float* out, const float* guide, const int32_t* columns, size_t pixels,
                             int classes, int count, bool normalised) {
  const size_t n = static_cast<size_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (n >= pixels) return;
  float total = 0;
  float* to = out + n * count;
  for (int k = 0; k < count; ++k) {
    const float v = columns[k] < classes ? guide[n * classes + columns[k]] : 0.0f;
    total += v;
    to[k] = v;
  }
  if (!normalised || !(total > 0)) return;
  for (int k = 0; k < count; ++k) to[k] /= total;
}

// Does the work of winners(). One thread per pixel.
__global__ void find_winners(int32_t* wins, const float* scores, size_t pixels, int classes) {
  const size_t n = static_cast<size_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (n >= pixels) return;
  int best = 0;
  for (int k = 1; k < classes; ++k)
    if (scores[n * classes + k] > scores[n * classes + best]) best = k;
  wins[best] = 1;
}

// Does the work of hard_labels(). One thread per pixel.
__global__ void find_hard(int32_t* labels, float* shares, const float* guide, size_t pixels,
                          int classes) {
  const size_t n = static_cast<size_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (n >= pixels) return;
  float best = 0;
  int32_t label = -1;
  bool ok = true;
  for (int k = 0; k < classes; ++k) {
    const float v = guide[n * classes + k];
    ok = ok && v == v;
    if (v > best) best = v, label = k;
  }
  labels[n] = ok ? label : -2;
  shares[n] = best;
}

// Does the work of pair_counts(). One thread per pixel.
__global__ void count_both(int32_t* table, const int32_t* labels, const int32_t* hard,
                           size_t pixels, int clusters, int classes) {
  const size_t n = static_cast<size_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (n >= pixels) return;
  const int cluster = labels[n], k = hard[n];
  if (cluster >= 0 && cluster < clusters && k >= 0 && k < classes)
    atomicAdd(table + static_cast<size_t>(cluster) * classes + k, 1);
}

// Does the work of merge_classes(). One thread per pixel.
__global__ void add_columns(float* out, const float* scores, const int32_t* to, size_t pixels,
                            int classes, int count) {
  const size_t n = static_cast<size_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (n >= pixels) return;
  float* const sums = out + n * count;
  for (int j = 0; j < count; ++j) sums[j] = 0;
  for (int k = 0; k < classes; ++k)
    if (to[k] >= 0) sums[to[k]] += scores[n * classes + k];
}

// Does the work of keep_pixels(). One thread per class of a pixel.
__global__ void replace_pixels(float* scores, const float* guide, const uint8_t* mask,
                               size_t pixels, int classes) {
  const size_t i = static_cast<size_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i < pixels * classes && mask[i / classes] != 0) scores[i] = guide[i];
}

// Does the work of colour_counts(). One thread per pixel.
__global__ void count_colours(int32_t* counts, const float* picture, size_t pixels) {
  const size_t n = static_cast<size_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (n >= pixels) return;
  int bin = 0;
  for (int c = 0; c < 3; ++c)
    bin = bin * 8 + min(max(static_cast<int>(picture[3 * n + c] * 8), 0), 7);
  atomicAdd(counts + bin, 1);
}

// Returns a grid with a thread for each pixel.
dim3 over(size_t pixels) { return dim3(static_cast<unsigned>((pixels + kThreads - 1) / kThreads)); }

}  // namespace

void class_sums(float* parts, const float* guide, size_t pixels, int classes, Stream stream) {
  SEG_LAUNCH(sum_classes, dim3(kSumParts, classes), dim3(kThreads), sizeof(float) * kThreads,
             stream, parts, guide, pixels, classes);
}

void take_classes(float* out, const float* guide, const int32_t* columns, size_t pixels,
                  int classes, int count, bool normalised, Stream stream) {
  SEG_LAUNCH(take_columns, over(pixels), dim3(kThreads), 0, stream, out, guide, columns, pixels,
             classes, count, normalised);
}

void winners(int32_t* wins, const float* scores, size_t pixels, int classes, Stream stream) {
  CUDA_CHECK(cudaMemsetAsync(wins, 0, sizeof(int32_t) * classes, stream));
  SEG_LAUNCH(find_winners, over(pixels), dim3(kThreads), 0, stream, wins, scores, pixels, classes);
}

void hard_labels(int32_t* labels, float* shares, const float* guide, size_t pixels, int classes,
                 Stream stream) {
  SEG_LAUNCH(find_hard, over(pixels), dim3(kThreads), 0, stream, labels, shares, guide, pixels,
             classes);
}

void pair_counts(int32_t* table, const int32_t* labels, const int32_t* hard, size_t pixels,
                 int clusters, int classes, Stream stream) {
  CUDA_CHECK(
      cudaMemsetAsync(table, 0, sizeof(int32_t) * clusters * static_cast<size_t>(classes), stream));
  SEG_LAUNCH(count_both, over(pixels), dim3(kThreads), 0, stream, table, labels, hard, pixels,
             clusters, classes);
}

void merge_classes(float* out, const float* scores, const int32_t* to, size_t pixels, int classes,
                   int count, Stream stream) {
  SEG_LAUNCH(add_columns, over(pixels), dim3(kThreads), 0, stream, out, scores, to, pixels, classes,
             count);
}

void keep_pixels(float* scores, const float* guide, const uint8_t* mask, size_t pixels, int classes,
                 Stream stream) {
  SEG_LAUNCH(replace_pixels, over(pixels * classes), dim3(kThreads), 0, stream, scores, guide, mask,
             pixels, classes);
}

void colour_counts(int32_t* counts, const float* picture, size_t pixels, Stream stream) {
  CUDA_CHECK(cudaMemsetAsync(counts, 0, sizeof(int32_t) * kColours, stream));
  SEG_LAUNCH(count_colours, over(pixels), dim3(kThreads), 0, stream, counts, picture, pixels);
}

void soft_guide(float* guide, const float* scores, int height, int width, int classes,
                bool exponents, Stream stream) {
  const size_t pixels = static_cast<size_t>(height) * width;
  SEG_LAUNCH(soft_max, over(pixels), dim3(kThreads), 0, stream, guide, scores, pixels, classes,
             exponents);
}

void resize_planes(float* out, const float* image, int height, int width, int from_height,
                   int from_width, int channels, Stream stream) {
  if (height <= from_height && width <= from_width)
    return shrink(out, image, height, width, from_height, from_width, channels, stream);
  SEG_LAUNCH(interpolate, dim3((width * channels + kThreads - 1) / kThreads, height),
             dim3(kThreads), 0, stream, out, image, height, width, from_height, from_width,
             channels);
}

}  // namespace seg::cuda
