// The inputs and outputs of the convolutions of conv.cu and tensor_conv.cu. Maps are planes
// [channel][height][pitch]; the values between width and pitch are undefined and have no influence
// on a result. The structures Input, Gradient, Forward and Backward are template arguments of the
// kernels, so the compiler inlines their operators.
#pragma once

#include <cstddef>

#include "common.cuh"

namespace seg::cuda {

constexpr int kRun = 8;               // neighbouring pixels of a thread, and the unit of a pitch
constexpr int kFour = 4;              // output channels of a thread
constexpr int kTall = 8, kWide = 16;  // pixels of a block's tile
constexpr int kRuns = kTall * kWide / kRun;  // groups of kRun pixels of a tile
constexpr int kDepth = 8;                    // input channels that are in shared memory at a time
constexpr int kGradientRows = 4;             // rows of the tiles of a weight gradient
// Blocks that share a weight gradient: two for each multiprocessor of an H100. The number does not
// depend on the device, so the result does not depend on it either.
constexpr int kGradientBlocks = 264;
constexpr size_t kShared = 48 * 1024;  // bytes of shared memory that every device has for a block

// The size of a map, and its tiles of kTall x kWide pixels. A plane has `height` rows of `pitch`
// floats.
struct Extent {
  int height, width, pitch;
  __host__ __device__ size_t plane() const { return static_cast<size_t>(height) * pitch; }
  __device__ size_t at(int y, int x) const { return static_cast<size_t>(y) * pitch + x; }
  // across() returns the number of tiles side by side, tiles() the number of all tiles.
  __host__ __device__ int across() const { return (width + kWide - 1) / kWide; }
  __host__ __device__ int tiles() const { return across() * ((height + kTall - 1) / kTall); }
  // Returns the number of a tile's pixels that are in the picture.
  __device__ int inside(int tile) const {
    const int top = tile / across() * kTall, left = tile % across() * kWide;
    return min(kTall, height - top) * min(kWide, width - left);
  }
};

// The values of a batch norm for the current picture, [channels] each: y = (x - mean) * scale +
// shift, and for the gradient dx = scale * (dy - a - (x - mean) * b). inv = 1 / the standard
// deviation.
struct NormState {
  float *mean, *inv, *scale, *shift, *a, *b;
};

// Returns four neighbouring floats. from is a multiple of 16 bytes.
__device__ inline float4 load_four(const float* from) {
  return *reinterpret_cast<const float4*>(from);
}

// The input of a convolution: x, or norm(x) if the norm is set, plus the skip if it is set. The
// operator returns the value of channel c at position n of a plane.
struct Input {
  const float* x;
  NormState norm;  // is not applied if scale is null
  const float* skip;
  size_t plane;
  __device__ float operator()(int c, size_t n) const {
    float v = x[c * plane + n];
    if (norm.scale != nullptr) v = (v - norm.mean[c]) * norm.scale[c] + norm.shift[c];
    return skip != nullptr ? v + skip[c * plane + n] : v;
  }
  // Returns the values at n ... n + 3. n is a multiple of 4.
  __device__ float4 four(int c, size_t n) const {
    float4 v = load_four(x + c * plane + n);
    if (norm.scale != nullptr) {
      const float mean = norm.mean[c], scale = norm.scale[c], shift = norm.shift[c];
      v.x = (v.x - mean) * scale + shift, v.y = (v.y - mean) * scale + shift;
      v.z = (v.z - mean) * scale + shift, v.w = (v.w - mean) * scale + shift;
    }
    if (skip == nullptr) return v;
    const float4 more = load_four(skip + c * plane + n);
    return float4{v.x + more.x, v.y + more.y, v.z + more.z, v.w + more.w};
  }
};

// The gradient by a convolution's output. If x is null, it is d. Otherwise x is that output after
// the relu (if relu is set), d is the gradient by norm(x), and the operator computes the gradient
// through the norm and the relu. It returns the value of channel c at position n of a plane.
struct Gradient {
  const float *d, *x;
  NormState norm;
  bool relu;
  size_t plane;
  __device__ float operator()(int c, size_t n) const {
    const float v = d[c * plane + n];
    if (x == nullptr) return v;
    const float a = x[c * plane + n];
    if (relu && a <= 0) return 0;
    return norm.scale[c] * (v - norm.a[c] - (a - norm.mean[c]) * norm.b[c]);
  }
  // Returns the values at n ... n + 3. n is a multiple of 4.
  __device__ float4 four(int c, size_t n) const {
    const float4 v = load_four(d + c * plane + n);
    if (x == nullptr) return v;
    const float4 a = load_four(x + c * plane + n);
    const float scale = norm.scale[c], off = norm.a[c], mean = norm.mean[c], share = norm.b[c];
    const auto behind = [&](float from, float at) {
      return relu && at <= 0 ? 0.0f : scale * (from - off - (at - mean) * share);
    };
    return float4{behind(v.x, a.x), behind(v.y, a.y), behind(v.z, a.z), behind(v.w, a.w)};
  }
};

// A convolution's weights in the order in which the blocks of its kernel read them, so that a block
// copies one contiguous part: words [ceil(in / depth)][groups()][kDepth][taps][pitch]. A group has
// `span` output channels. A word is the weight of one input channel as a float, or in
// tensor_conv.cu of two input channels in half precision; then depth is 2 * kDepth. taps counts all
// taps, 1 or 9.
struct Packed {
  // The offset of the weights in the parameters, where they are [out][in][taps]. Turned weights (of
  // the gradient by the input) are [in][out][taps], and the taps are read from the last to the
  // first.
  size_t weight;
  void* words;
  int in, out, taps, span, pitch, depth;
  bool turned;
  __host__ __device__ int groups() const { return (out + span - 1) / span; }
  // part() returns the number of words that a block copies at a time, count() the number of all
  // words.
  __host__ __device__ int part() const { return kDepth * taps * pitch; }
  __host__ __device__ int count() const { return (in + depth - 1) / depth * groups() * part(); }
  // Returns weight `number` (0, or 1 in half precision) of word e; 0 outside the channels.
  __device__ float value(const float* parameters, int e, int number) const {
    const int column = e % pitch, tap = e / pitch % taps, row = e / (pitch * taps) % kDepth;
    const int channel = e / part() / groups() * depth + row * (depth / kDepth) + number,
              o = e / part() % groups() * span + column;
    if (column >= span || channel >= in || o >= out) return 0;
    const float* const from = parameters + weight;
    return turned ? from[(static_cast<size_t>(channel) * out + o) * taps + taps - 1 - tap]
                  : from[(static_cast<size_t>(o) * in + channel) * taps + tap];
  }
};

constexpr int kMostPacked = 8;  // of a network: three blocks, the skip, the head, three turned ones
constexpr int kPackThreads = 128;
// The packed weights of all convolutions of a network.
struct PackedList {
  Packed of[kMostPacked];
  int count;
  // Returns the grid of a kernel with a thread for each word: (words, entry of the list).
  dim3 grid(int threads) const {
    int most = 0;
    for (int i = 0; i < count; ++i) most = of[i].count() > most ? of[i].count() : most;
    return dim3((most + threads - 1) / threads, count);
  }
};

// The position of a thread's results: kRun pixels from (y, x) on, `count` of which are in the
// picture, for four channels. `run` is the number of these pixels' group in the tile. The block
// computes `span` channels from `first` on; `column` counts groups of four channels. works()
// returns whether the thread has results.
struct Place4 {
  int first, y, x, count, column, run, span, tile;
  __device__ int channel(int j) const { return first + column * kFour + j; }
  __device__ bool works() const { return column * kFour < span; }
};

// Writes the results of the thread's channel j to kRun floats; `to` is a multiple of 16 bytes.
__device__ inline void store_run(float* to, const float (&v)[kRun][kFour], int j) {
  float4* p = reinterpret_cast<float4*>(to);
  p[0] = float4{v[0][j], v[1][j], v[2][j], v[3][j]};
  p[1] = float4{v[4][j], v[5][j], v[6][j], v[7][j]};
}

// Reads kRun floats; `from` is a multiple of 16 bytes.
__device__ inline void load_run(float (&v)[kRun], const float* from) {
  const float4* p = reinterpret_cast<const float4*>(from);
  const float4 a = p[0], b = p[1];
  v[0] = a.x, v[1] = a.y, v[2] = a.z, v[3] = a.w;
  v[4] = b.x, v[5] = b.y, v[6] = b.z, v[7] = b.w;
}

// The end of a forward convolution. Writes out = v + bias + prior (if set), then relu if asked. If
// sums is set, also writes the moments of each channel over the tile: sums [2][channels][tiles] of
// out, and of (out - the tile's mean)^2. The caller provides shared memory for 2 * kRuns * (span +
// 1) floats.
struct Forward {
  float* out;
  const float *bias, *prior;
  float* sums;
  int channels;
  bool relu;
  Extent s;

  __device__ void operator()(float (&v)[kRun][kFour], const Place4& p, float* shared) const {
    const size_t n = s.at(p.y, p.x);
#pragma unroll
    for (int j = 0; j < kFour; ++j) {
      const int c = p.channel(j);
      float sum = 0, m2 = 0;
      if (p.works() && c < channels && p.count > 0) {
        float more[kRun] = {};
        if (prior != nullptr) load_run(more, prior + c * s.plane() + n);
#pragma unroll
        for (int i = 0; i < kRun; ++i) {
          v[i][j] += bias[c] + more[i];
          if (relu && v[i][j] < 0) v[i][j] = 0;  // a NaN remains
          if (i < p.count) sum += v[i][j];
        }
        store_run(out + c * s.plane() + n, v, j);
        const float mean = sum / p.count;
#pragma unroll
        for (int i = 0; i < kRun; ++i)
          if (i < p.count) m2 += (v[i][j] - mean) * (v[i][j] - mean);
      }
      if (sums == nullptr || !p.works()) continue;
      shared[p.run * (p.span + 1) + p.column * kFour + j] = sum;
      shared[(kRuns + p.run) * (p.span + 1) + p.column * kFour + j] = m2;
    }
    if (sums == nullptr) return;
    __syncthreads();
    const int top = p.tile / s.across() * kTall, left = p.tile % s.across() * kWide;
    for (int c = threadIdx.x; c < p.span; c += blockDim.x) {
      if (p.first + c >= channels) break;
      float total = 0, m2 = 0;
      for (int r = 0; r < kRuns; ++r) total += shared[r * (p.span + 1) + c];
      const float mean = total / s.inside(p.tile);
      for (int r = 0; r < kRuns; ++r) {  // Chan's rule
        const int y = top + r / (kWide / kRun), x = left + r % (kWide / kRun) * kRun;
        const int count = y < s.height ? max(0, min(kRun, s.width - x)) : 0;
        if (count == 0) continue;
        const float off = shared[r * (p.span + 1) + c] / count - mean;
        m2 += shared[(kRuns + r) * (p.span + 1) + c] + count * off * off;
      }
      sums[static_cast<size_t>(p.first + c) * s.tiles() + p.tile] = total;
      sums[static_cast<size_t>(channels + p.first + c) * s.tiles() + p.tile] = m2;
    }
  }
};

// The end of a gradient by the input. Writes out = v (called d), and sums [2][channels][tiles]: the
// sums over the tile of d and of d * (x - mean). The caller provides shared memory as for Forward.
struct Backward {
  float* out;
  const float *x, *mean;
  float* sums;
  int channels;
  Extent s;

  __device__ void operator()(float (&v)[kRun][kFour], const Place4& p, float* shared) const {
    const size_t n = s.at(p.y, p.x);
#pragma unroll
    for (int j = 0; j < kFour; ++j) {
      const int c = p.channel(j);
      float a = 0, b = 0;
      if (p.works() && c < channels && p.count > 0) {
        store_run(out + c * s.plane() + n, v, j);
        float of[kRun];
        load_run(of, x + c * s.plane() + n);
#pragma unroll
        for (int i = 0; i < kRun; ++i) {
          if (i >= p.count) break;
          a += v[i][j];
          b += v[i][j] * (of[i] - mean[c]);
        }
      }
      if (!p.works()) continue;
      shared[p.run * (p.span + 1) + p.column * kFour + j] = a;
      shared[(kRuns + p.run) * (p.span + 1) + p.column * kFour + j] = b;
    }
    __syncthreads();
    for (int c = threadIdx.x; c < p.span; c += blockDim.x) {
      if (p.first + c >= channels) break;
      float a = 0, b = 0;
      for (int r = 0; r < kRuns; ++r) {
        a += shared[r * (p.span + 1) + c];
        b += shared[(kRuns + r) * (p.span + 1) + c];
      }
      sums[static_cast<size_t>(p.first + c) * s.tiles() + p.tile] = a;
      sums[static_cast<size_t>(channels + p.first + c) * s.tiles() + p.tile] = b;
    }
  }
};

}  // namespace seg::cuda
