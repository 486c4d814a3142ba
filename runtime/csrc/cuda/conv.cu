// Convolutions of the refinement network, forward and backward, in float32. They are computed as
// matrix products whose operands are read from the maps and not copied out (implicit products).
#include <algorithm>

#include "conv.h"

namespace seg::cuda {
namespace {

constexpr int kRowPitch = kWide + 4;  // floats of a tile's row with its border, in shared memory
constexpr int kMostColumns = 32;      // most groups of four output channels of a block
// Least threads of a block. With few channels fewer threads compute; the others only help to load.
constexpr int kLeast = 128;

// Copies the weights into the order in which conv() reads them. The grid is (words, entry of the
// list).
__global__ void pack(PackedList list, const float* parameters) {
  const Packed p = list.of[blockIdx.y];
  const int e = blockIdx.x * blockDim.x + threadIdx.x;
  if (e < p.count()) static_cast<float*>(p.words)[e] = p.value(parameters, e, 0);
}

// Computes the convolution of source with packed weights and calls emit with the results. A block
// computes one tile of pixels for up to 128 output channels. It copies eight input channels of the
// tile with its border, and their weights, to shared memory, adds their products, and repeats this
// for the next eight channels. A thread holds the sums of 8 pixels x 4 output channels in
// registers. With 3x3 taps a thread reads a row of 12 inputs for 96 products. The grid is (tile,
// group of output channels).
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
  const bool works = run < kRuns;  // the other threads only help to load
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

// The threads and blocks of a weight gradient. A block has outs x ins x lanes threads. Each thread
// computes the gradients by the weights between four output channels and Ins input channels. The
// lanes share the rows of a tile; `blocks` blocks share the tiles. A block needs `shared` bytes of
// shared memory.
struct Split {
  int outs, ins, lanes, blocks;
  size_t shared;
  // Returns the number of partial sums.
  int parts() const { return blocks * lanes; }
};

// Returns the split for `in` and `out` channels, with Ins input channels for each thread.
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

// Writes parts [parts][out * in * Taps^2 + out]: partial sums, over a part of the tiles, of the
// gradients by the weights and by the bias. A thread sums 4 output channels x Ins input channels x
// all taps in registers. The tile's gradients and inputs are in shared memory; four pixels of both
// are used for 16 products of each tap and input channel. The grid is (part of the tiles, group of
// input channels, group of output channels).
template <int Taps, int Ins, class Source, class Slope>
__global__ void __launch_bounds__(512)
    conv_gradient(float* parts, Source source, Slope slope, int in, int out, Split p, Extent s,
                  const int* over) {
  SEG_SHARED(shared);
  if (over != nullptr && *over != 0) return;
  constexpr int kTaps = Taps * Taps, kBorder = Taps / 2;
  constexpr int kRows = kGradientRows + 2 * kBorder, kAcross = kWide + 2 * kBorder;
  const int span = p.outs * kFour, pitch = span + 4, threads = blockDim.x, me = threadIdx.x;
  float* const ds = shared;                              // [kGradientRows * kWide][pitch]
  float* const xs = ds + kGradientRows * kWide * pitch;  // [ins * Ins][kRows][kRowPitch]
  const int og = me % p.outs, ig = me / p.outs % p.ins, lane = me / (p.outs * p.ins);
  const int o0 = blockIdx.z * span, i0 = blockIdx.y * p.ins * Ins;
  const int tiles = s.across() * ((s.height + kGradientRows - 1) / kGradientRows);
  const bool works = lane < p.lanes;  // the other threads only help to load
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

// Does the work of run_sum(). A block computes kSumWide sums with kSumTall threads for each.
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

}  // namespace

Packed packed_for_conv(int taps, int in, int out) {
  const int span = std::min(kMostColumns, (out + kFour - 1) / kFour) * kFour;
  return {0, nullptr, in, out, taps * taps, span, span + 4, kDepth, false};
}

void pack_for_conv(const PackedList& list, const float* parameters, cudaStream_t stream) {
  SEG_LAUNCH(pack, list.grid(kPackThreads), dim3(kPackThreads), 0, stream, list, parameters);
}

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

template <int Taps, int Ins>
int gradient_parts(int in, int out, Extent s) {
  return split_of<Taps, Ins>(in, out, s).parts();
}

void run_sum(float* gradient, const float* parts, int n, int count, bool add, cudaStream_t stream) {
  SEG_LAUNCH(sum_parts, dim3((n + kSumWide - 1) / kSumWide), dim3(kSumWide * kSumTall),
             kSumWide * kSumTall * sizeof(double), stream, gradient, parts, n, count, add);
}

template <int Taps, int Ins>
void run_conv_gradient(float* gradient, float* parts, const Input& source, const Gradient& slope,
                       int in, int out, bool add, Extent s, const int* over, cudaStream_t stream) {
  using Source = Input;
  using Slope = Gradient;
  const Split p = split_of<Taps, Ins>(in, out, s);
  const int across = p.ins * Ins, down = p.outs * kFour;
  SEG_LAUNCH((conv_gradient<Taps, Ins, Source, Slope>),
             dim3(p.blocks, (in + across - 1) / across, (out + down - 1) / down),
             dim3(std::max(kLeast, p.outs * p.ins * p.lanes)), p.shared, stream, parts, source,
             slope, in, out, p, s, over);
  run_sum(gradient, parts, out * in * Taps * Taps + out, p.parts(), add, stream);
}

template void run_conv<3>(const Forward&, const Input&, const Packed&, Extent, const int*,
                          cudaStream_t);
template void run_conv<1>(const Forward&, const Input&, const Packed&, Extent, const int*,
                          cudaStream_t);
template void run_conv<3>(const Backward&, const Gradient&, const Packed&, Extent, const int*,
                          cudaStream_t);
template void run_conv<1>(const Backward&, const Gradient&, const Packed&, Extent, const int*,
                          cudaStream_t);
template int gradient_parts<3, 1>(int, int, Extent);
template int gradient_parts<1, 4>(int, int, Extent);
template void run_conv_gradient<3, 1>(float*, float*, const Input&, const Gradient&, int, int, bool,
                                      Extent, const int*, cudaStream_t);
template void run_conv_gradient<1, 4>(float*, float*, const Input&, const Gradient&, int, int, bool,
                                      Extent, const int*, cudaStream_t);

}  // namespace seg::cuda
