// Convolutions of the refinement network, forward and backward, as implicit matrix products in
// float32. Maps are planes [channel][height][pitch]; what lies right of the picture in a row is
// never read.
#pragma once

#include <algorithm>

#include "common.cuh"

namespace seg::cuda {

constexpr int kRun = 8;               // neighbouring pixels of a thread, and the unit of a pitch
constexpr int kFour = 4;              // output channels of a thread
constexpr int kTall = 8, kWide = 16;  // pixels of a block's tile
constexpr int kRuns = kTall * kWide / kRun;
constexpr int kRowPitch = kWide + 4;  // of a tile with its border in shared memory
constexpr int kDepth = 8;             // input channels that are in shared memory at a time
constexpr int kMostColumns = 32;      // groups of four output channels that a block computes
constexpr int kLeast = 128;           // threads of a block: what few channels need not, loads
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
// channel, or (tensor.cuh) of two in half precision.
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
struct PackedList {
  Packed of[kMostPacked];
  int count;
};

// Lays the weights out for conv(). Blocks: (words, list).
__global__ void pack(PackedList list, const float* parameters) {
  const Packed p = list.of[blockIdx.y];
  const int e = blockIdx.x * blockDim.x + threadIdx.x;
  if (e < p.count()) static_cast<float*>(p.words)[e] = p.value(parameters, e, 0);
}

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

// A block computes a tile of pixels for up to 128 channels: input channels come into shared memory
// eight at a time, with a border, and their weights beside them. A thread keeps 8 pixels x 4
// channels in registers; with 3x3 taps, a row of 12 inputs serves 96 products.
template <int Taps, class Source, class Emit>
__global__ void __launch_bounds__(kMostColumns* kRuns)
    conv(Emit emit, Source source, const float* packed, int in, int columns, Extent s,
         const int* over) {
  SEG_SHARED(shared);
  if (over != nullptr && *over != 0) return;
  constexpr int kTaps = Taps * Taps, kBorder = Taps / 2;
  constexpr int kRows = kTall + 2 * kBorder, kAcross = kWide + 2 * kBorder;
  const int span = columns * kFour, pitch = span + 4, threads = blockDim.x, me = threadIdx.x;
  float* const w = shared;                      // [kDepth][kTaps][pitch]
  float* const x = w + kDepth * kTaps * pitch;  // [kDepth][kRows][kRowPitch]
  const int column = me % columns, run = me / columns;
  const int top = blockIdx.x / s.across() * kTall, left = blockIdx.x % s.across() * kWide;
  const int first = blockIdx.y * span;
  const int row = run / (kWide / kRun), at = run % (kWide / kRun) * kRun;
  const bool works = run < kRuns;  // the others help to load
  float sum[kRun][kFour] = {};

  for (int c0 = 0; c0 < in; c0 += kDepth) {
    const int depth = min(kDepth, in - c0), part = depth * kTaps * pitch;
    const float* const from = packed + (static_cast<size_t>(c0 / kDepth) * gridDim.y + blockIdx.y) *
                                           kDepth * kTaps * pitch;
    for (int e = me * 4; e < part; e += threads * 4)
      *reinterpret_cast<float4*>(w + e) = load_four(from + e);
    for (int e = me; e < depth * kRows * kAcross; e += threads) {
      const int c = e / (kRows * kAcross), v = e / kAcross % kRows, u = e % kAcross;
      const int y1 = top + v - kBorder, x1 = left + u - kBorder;
      const bool in_picture = y1 >= 0 && y1 < s.height && x1 >= 0 && x1 < s.width;
      x[(c * kRows + v) * kRowPitch + u] = in_picture ? source(c0 + c, s.at(y1, x1)) : 0;
    }
    __syncthreads();
#pragma unroll 1
    for (int c = 0; works && c < depth; ++c) {
#pragma unroll
      for (int dy = 0; dy < Taps; ++dy) {
        const float4* from =
            reinterpret_cast<const float4*>(x + (c * kRows + row + dy) * kRowPitch + at);
        float a[12];
#pragma unroll
        for (int i = 0; i < 2 + kBorder; ++i) {
          const float4 v = from[i];
          a[4 * i] = v.x, a[4 * i + 1] = v.y, a[4 * i + 2] = v.z, a[4 * i + 3] = v.w;
        }
#pragma unroll
        for (int dx = 0; dx < Taps; ++dx) {
          const float4 k = *reinterpret_cast<const float4*>(
              w + (c * kTaps + dy * Taps + dx) * pitch + column * kFour);
#pragma unroll
          for (int i = 0; i < kRun; ++i) {
            sum[i][0] += a[i + dx] * k.x;
            sum[i][1] += a[i + dx] * k.y;
            sum[i][2] += a[i + dx] * k.z;
            sum[i][3] += a[i + dx] * k.w;
          }
        }
      }
    }
    __syncthreads();
  }
  const int y = top + row, x0 = left + at;
  const int count = y < s.height ? max(0, min(kRun, s.width - x0)) : 0;
  emit(sum,
       Place4{first, y, x0, count, works ? column : columns, run, span,
              static_cast<int>(blockIdx.x)},
       shared);
}

// How run_conv() wants the weights of in channels, taps^2 each, for out channels.
inline Packed packed_for_conv(int taps, int in, int out) {
  const int span = std::min(kMostColumns, (out + kFour - 1) / kFour) * kFour;
  return {0, nullptr, in, out, taps * taps, span, span + 4, kDepth, false};
}

// Nothing is done where `over` says so when its turn comes.
template <int Taps, class Source, class Emit>
void run_conv(const Emit& emit, const Source& source, const Packed& p, Extent s, const int* over,
              cudaStream_t stream) {
  const int columns = p.span / kFour, rows = kTall + 2 * (Taps / 2);
  const size_t shared =
      std::max<size_t>(p.part() + kDepth * rows * kRowPitch, 2 * kRuns * (p.span + 1));
  SEG_LAUNCH((conv<Taps, Source, Emit>), dim3(s.tiles(), p.groups()),
             dim3(std::max(kLeast, columns * kRuns)), shared * sizeof(float), stream, emit, source,
             static_cast<const float*>(p.words), p.in, columns, s, over);
}

// The split of a weight gradient's sum: threads hold outs x ins groups of channels, lanes of them
// take turns in a tile's rows, and blocks share the tiles.
struct Split {
  int outs, ins, lanes, blocks;
  size_t shared;
  int parts() const { return blocks * lanes; }
};

template <int Taps, int Ins>
Split split_of(int in, int out, Extent s) {
  Split p;
  p.outs = std::min(kMostColumns, (out + kFour - 1) / kFour);
  const size_t d = kGradientRows * kWide * (p.outs * kFour + 4) * sizeof(float);
  const size_t x = Ins * (kGradientRows + 2 * (Taps / 2)) * kRowPitch * sizeof(float);
  p.ins = std::min({(in + Ins - 1) / Ins, 512 / p.outs, static_cast<int>((kShared - d) / x), 64});
  p.lanes = std::max(1, std::min(kGradientRows, 128 / (p.outs * p.ins)));
  const int groups = (in + p.ins * Ins - 1) / (p.ins * Ins);
  const int tiles = s.across() * ((s.height + kGradientRows - 1) / kGradientRows);
  p.blocks = std::min(tiles, std::max(1, kGradientBlocks / groups));
  p.shared = d + x * p.ins;
  return p;
}

// Parts [parts][out in Taps^2 + out] of the gradients by weights and bias. A thread sums 4 output
// channels x Ins input channels x all taps in registers; the tile's gradients and inputs lie in
// shared memory, four pixels of both serve 16 products a tap.
template <int Taps, int Ins, class Source, class Slope>
__global__ void __launch_bounds__(512)
    conv_gradient(float* parts, Source source, Slope slope, int in, int out, Split p, Extent s,
                  const int* over) {
  SEG_SHARED(shared);
  if (over != nullptr && *over != 0) return;
  constexpr int kTaps = Taps * Taps, kBorder = Taps / 2;
  constexpr int kRows = kGradientRows + 2 * kBorder, kAcross = kWide + 2 * kBorder;
  const int span = p.outs * kFour, pitch = span + 4, threads = blockDim.x, me = threadIdx.x;
  float* const ds = shared;                              // [kGradientRows kWide][pitch]
  float* const xs = ds + kGradientRows * kWide * pitch;  // [ins Ins][kRows][kRowPitch]
  const int og = me % p.outs, ig = me / p.outs % p.ins, lane = me / (p.outs * p.ins);
  const int o0 = blockIdx.z * span, i0 = blockIdx.y * p.ins * Ins;
  const int tiles = s.across() * ((s.height + kGradientRows - 1) / kGradientRows);
  const bool works = lane < p.lanes;  // the others help to load
  float sum[Ins][kTaps][kFour] = {}, bias[kFour] = {};

  for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const int top = tile / s.across() * kGradientRows, left = tile % s.across() * kWide;
    for (int e = me; e < span * kGradientRows * kWide; e += threads) {
      const int o = e / (kGradientRows * kWide), n = e % (kGradientRows * kWide);
      const int y = top + n / kWide, x = left + n % kWide;
      const bool used = o0 + o < out && y < s.height && x < s.width;
      ds[n * pitch + o] = used ? slope(o0 + o, s.at(y, x)) : 0;
    }
    for (int e = me; e < p.ins * Ins * kRows * kAcross; e += threads) {
      const int i = e / (kRows * kAcross), v = e / kAcross % kRows, u = e % kAcross;
      const int y = top + v - kBorder, x = left + u - kBorder;
      const bool used = i0 + i < in && y >= 0 && y < s.height && x >= 0 && x < s.width;
      xs[(i * kRows + v) * kRowPitch + u] = used ? source(i0 + i, s.at(y, x)) : 0;
    }
    __syncthreads();
    for (int row = lane; works && row < kGradientRows; row += p.lanes)
#pragma unroll 1
      for (int col = 0; col < kWide; col += 4) {
        float d[4][kFour];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float4 v =
              *reinterpret_cast<const float4*>(ds + (row * kWide + col + i) * pitch + og * kFour);
          d[i][0] = v.x, d[i][1] = v.y, d[i][2] = v.z, d[i][3] = v.w;
#pragma unroll
          for (int j = 0; j < kFour; ++j) bias[j] += d[i][j];
        }
#pragma unroll
        for (int m = 0; m < Ins; ++m)
#pragma unroll
          for (int dy = 0; dy < Taps; ++dy) {
            const float* from = xs + ((ig * Ins + m) * kRows + row + dy) * kRowPitch + col;
            const float4 v = *reinterpret_cast<const float4*>(from);
            float a[6] = {v.x, v.y, v.z, v.w};
            if constexpr (Taps == 3) {
              const float2 more = *reinterpret_cast<const float2*>(from + 4);
              a[4] = more.x, a[5] = more.y;
            }
#pragma unroll
            for (int dx = 0; dx < Taps; ++dx)
#pragma unroll
              for (int i = 0; i < 4; ++i)
#pragma unroll
                for (int j = 0; j < kFour; ++j) sum[m][dy * Taps + dx][j] += a[i + dx] * d[i][j];
          }
      }
    __syncthreads();
  }
  if (!works) return;
  float* const part = parts + (static_cast<size_t>(blockIdx.x) * p.lanes + lane) *
                                  (static_cast<size_t>(out) * in * kTaps + out);
#pragma unroll
  for (int j = 0; j < kFour; ++j) {
    const int o = o0 + og * kFour + j;
    if (o >= out) break;
#pragma unroll
    for (int m = 0; m < Ins; ++m) {
      const int i = i0 + ig * Ins + m;
      if (i >= in) break;
#pragma unroll
      for (int t = 0; t < kTaps; ++t)
        part[(static_cast<size_t>(o) * in + i) * kTaps + t] = sum[m][t][j];
    }
    if (blockIdx.y == 0 && ig == 0) part[static_cast<size_t>(out) * in * kTaps + o] = bias[j];
  }
}

constexpr int kSumWide = 32, kSumTall = 8;

// gradient [n] = the sum of count parts [n], in a fixed order; with add, on top of what is there.
__global__ void sum_parts(float* gradient, const float* parts, int n, int count, bool add) {
  SEG_SHARED(shared);
  double* const sums = reinterpret_cast<double*>(shared);  // [kSumTall][kSumWide]
  const int x = threadIdx.x % kSumWide, y = threadIdx.x / kSumWide;
  const int e = blockIdx.x * kSumWide + x;
  double sum = 0;
#pragma unroll 4
  for (int i = y; e < n && i < count; i += kSumTall) sum += parts[static_cast<size_t>(i) * n + e];
  sums[y * kSumWide + x] = sum;
  __syncthreads();
  if (y != 0 || e >= n) return;
  for (int i = 1; i < kSumTall; ++i) sum += sums[i * kSumWide + x];
  gradient[e] = static_cast<float>(add ? gradient[e] + sum : sum);
}

inline void run_sum(float* gradient, const float* parts, int n, int count, bool add,
                    cudaStream_t stream) {
  SEG_LAUNCH(sum_parts, dim3((n + kSumWide - 1) / kSumWide), dim3(kSumWide * kSumTall),
             kSumWide * kSumTall * sizeof(double), stream, gradient, parts, n, count, add);
}

// The gradients by weights and bias, which lie behind each other; parts is scratch.
template <int Taps, int Ins, class Source, class Slope>
void run_conv_gradient(float* gradient, float* parts, const Source& source, const Slope& slope,
                       int in, int out, bool add, Extent s, const int* over, cudaStream_t stream) {
  const Split p = split_of<Taps, Ins>(in, out, s);
  const int across = p.ins * Ins, down = p.outs * kFour;
  SEG_LAUNCH((conv_gradient<Taps, Ins, Source, Slope>),
             dim3(p.blocks, (in + across - 1) / across, (out + down - 1) / down),
             dim3(std::max(kLeast, p.outs * p.ins * p.lanes)), p.shared, stream, parts, source,
             slope, in, out, p, s, over);
  run_sum(gradient, parts, out * in * Taps * Taps + out, p.parts(), add, stream);
}

}  // namespace seg::cuda
