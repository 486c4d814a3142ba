// What the convolutions of conv.cu and tensor_conv.cu read and write. Maps are planes
// [channel][height][pitch]; what lies right of the picture in a row is never read. The kernels of
// both files take these structures as template arguments, so that the compiler inlines them.
#pragma once

#include <cstddef>

#include "common.cuh"

namespace seg::cuda {

constexpr int kRun = 8;               // neighbouring pixels of a thread, and the unit of a pitch
constexpr int kFour = 4;              // output channels of a thread
constexpr int kTall = 8, kWide = 16;  // pixels of a block's tile
constexpr int kRuns = kTall * kWide / kRun;
constexpr int kDepth = 8;             // input channels that are in shared memory at a time
constexpr int kGradientRows = 4;      // of the tiles that weight gradients are summed over
constexpr int kGradientBlocks = 264;  // blocks that share a weight gradient: two for each of an
                                      // H100's multiprocessors, the same on every device
constexpr size_t kShared = 48 * 1024;

struct Extent {
  int height, width, pitch;
  __host__ __device__ size_t plane() const { return static_cast<size_t>(height) * pitch; }
  __device__ size_t at(int y, int x) const { return static_cast<size_t>(y) * pitch + x; }
  __host__ __device__ int across() const { return (width + kWide - 1) / kWide; }
  __host__ __device__ int tiles() const { return across() * ((height + kTall - 1) / kTall); }
  // Pixels of a tile of so many rows that lie in the picture.
  __device__ int inside(int tile) const {
    const int top = tile / across() * kTall, left = tile % across() * kWide;
    return min(kTall, height - top) * min(kWide, width - left);
  }
};

// A batch norm of one picture, [channels] each: y = (x - mean) scale + shift; a and b are what its
// gradient takes off: dx = scale (dy - a - (x - mean) b).
struct NormState {
  float *mean, *inv, *scale, *shift, *a, *b;
};

__device__ inline float4 load_four(const float* from) {
  return *reinterpret_cast<const float4*>(from);
}

// What a convolution reads: x, or its norm, and the skip on top.
struct Input {
  const float* x;
  NormState norm;  // scale is null: none
  const float* skip;
  size_t plane;
  __device__ float operator()(int c, size_t n) const {
    float v = x[c * plane + n];
    if (norm.scale != nullptr) v = (v - norm.mean[c]) * norm.scale[c] + norm.shift[c];
    return skip != nullptr ? v + skip[c * plane + n] : v;
  }
  // Of n .. n + 3, n a multiple of 4.
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

// The gradient by a convolution's output: d, or where x is given, d behind the norm of x, and the
// relu that made x.
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

// A convolution's weights in the order in which blocks take them into shared memory, so that they
// are copied in one piece: words [input channels / depth][groups of output channels][kDepth]
// [Taps^2][pitch] for a span of output channels in each group; a word holds the weight of one input
// channel, or (tensor_conv.cu) of two in half precision.
struct Packed {
  size_t weight;  // where they lie among the parameters, [out][in][Taps^2]; or, turned, as those of
                  // the gradient by the input, [in][out][Taps^2] from the last tap on
  void* words;
  int in, out, taps, span, pitch, depth;
  bool turned;
  __host__ __device__ int groups() const { return (out + span - 1) / span; }
  __host__ __device__ int part() const { return kDepth * taps * pitch; }  // that a block takes
  __host__ __device__ int count() const { return (in + depth - 1) / depth * groups() * part(); }
  // The weight, of those that word e holds, with this number.
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

constexpr int kMostPacked = 8;  // of a network: three blocks, skip and head, and three turned
constexpr int kPackThreads = 128;
struct PackedList {
  Packed of[kMostPacked];
  int count;
  // The blocks of a kernel that fills the words: (words, list).
  dim3 grid(int threads) const {
    int most = 0;
    for (int i = 0; i < count; ++i) most = of[i].count() > most ? of[i].count() : most;
    return dim3((most + threads - 1) / threads, count);
  }
};

// Where a thread's results lie: kRun pixels from (y, x), count of which are in the picture, of a
// column of four among span channels from first on.
struct Place4 {
  int first, y, x, count, column, run, span, tile;
  __device__ int channel(int j) const { return first + column * kFour + j; }
  __device__ bool works() const { return column * kFour < span; }
};

__device__ inline void store_run(float* to, const float (&v)[kRun][kFour], int j) {
  float4* p = reinterpret_cast<float4*>(to);
  p[0] = float4{v[0][j], v[1][j], v[2][j], v[3][j]};
  p[1] = float4{v[4][j], v[5][j], v[6][j], v[7][j]};
}

__device__ inline void load_run(float (&v)[kRun], const float* from) {
  const float4* p = reinterpret_cast<const float4*>(from);
  const float4 a = p[0], b = p[1];
  v[0] = a.x, v[1] = a.y, v[2] = a.z, v[3] = a.w;
  v[4] = b.x, v[5] = b.y, v[6] = b.z, v[7] = b.w;
}

// Writes x conv w + bias (+ prior), after relu where asked, and the moments of each channel over
// the tile: sums [2][out][tiles] of x and of (x - its mean)^2.
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
          if (relu && v[i][j] < 0) v[i][j] = 0;  // NaN stays
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

// Writes d, and over the tile the sums [2][out][tiles] of d and of d (x - mean of x).
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
