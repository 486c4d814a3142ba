// The convolutions of conv.cu on tensor cores: inputs in half precision, sums in float32 (mma.sync
// m16n8k16; on compute capability 7.5 two m16n8k8 instead). Half precision has 10 bits of mantissa,
// as TF32, but its largest number is 65504 and its smallest 6e-8. Gradients are small, because they
// are divided by the number of pixels: they are multiplied by a power of two (gain) before they are
// rounded, and the results are divided by it. Values beyond -65504 or 65504 are cut to these
// limits.
#include "tensor_conv.h"

#ifndef SEG_CUDA_SHIM
#include <cuda_fp16.h>
#endif

#include <algorithm>

#include "conv.h"

namespace seg::cuda {
namespace {

constexpr int kWarps = 4;                      // warps of a block
constexpr int kPart = 32;                      // channels that are passed to emit at a time
constexpr int kPartPitch = kTall * kWide + 4;  // words of the results of one channel
constexpr int kPartWords = kPart * kPartPitch + kPart;  // words of the results of kPart channels
constexpr float kMostHalf = 65504;
constexpr int kTensorIns = kWarps * 8;  // input channels of a block's weight gradient

#ifdef SEG_CUDA_SHIM
using shim::halves;
using shim::multiply;
using shim::straddle;
#else
// Returns a word of two halves: a in the lower bits, b in the upper ones.
__device__ inline unsigned halves(float a, float b) {
  const __half2 h = __floats2half2_rn(a, b);
  return *reinterpret_cast<const unsigned*>(&h);
}
// Returns a word of the upper half of `low` and the lower half of `high`.
__device__ inline unsigned straddle(unsigned low, unsigned high) {
  return __byte_perm(low, high, 0x5432);
}

// The matrix product c += a b of a warp, a is 16 x 16, b is 16 x 8. A word holds two neighbours in
// the inner dimension k. With k = 2 t, lane 4 g + t holds the words a (g, k), (g + 8, k), (g, k +
// 8), (g + 8, k + 8), the words b (k, g), (k + 8, g), and the floats c (g, 2 t), (g, 2 t + 1), (g +
// 8, 2 t), (g + 8, 2 t + 1).
__device__ inline void multiply(float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
#if __CUDA_ARCH__ >= 800
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#elif __CUDA_ARCH__ >= 750
  for (int h = 0; h < 2; ++h)
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[2 * h]), "r"(a[2 * h + 1]), "r"(b[h]));
#endif
}
#endif

// Returns the source's values of channel c at (y, x) ... (y, x + 3), 0 outside the picture or the
// channels. x is a multiple of 4.
template <class Source>
__device__ float4 four_of(const Source& source, int c, int channels, int y, int x, Extent s) {
  if (c >= channels || y < 0 || y >= s.height || x >= s.width) return float4{0, 0, 0, 0};
  float4 v = source.four(c, s.at(y, x));
  if (x + 1 >= s.width) v.y = 0;
  if (x + 2 >= s.width) v.z = 0;
  if (x + 3 >= s.width) v.w = 0;
  return v;
}

// Returns the source's value of channel c at (y, x), 0 outside the picture or the channels.
template <class Source>
__device__ float one_of(const Source& source, int c, int channels, int y, int x, Extent s) {
  const bool inside = c < channels && y >= 0 && y < s.height && x >= 0 && x < s.width;
  return inside ? source(c, s.at(y, x)) : 0;
}

// Returns v cut to the range of half precision. A NaN remains.
__device__ inline float cut(float v) {
  return v > kMostHalf ? kMostHalf : v < -kMostHalf ? -kMostHalf : v;
}
__device__ inline unsigned cut_halves(float a, float b) { return halves(cut(a), cut(b)); }

// Returns the first word of the results of channel c of a part. Groups of four channels are shifted
// by 4 words, so that the lanes of a warp read from different banks of shared memory.
__device__ inline int part_at(int c) { return c * kPartPitch + c / kFour * 4; }

// Copies the weights into the order in which conv_tensor() reads them; a word holds the input
// channels c and c + 1. The grid is (words, entry of the list).
__global__ void pack_halves(PackedList list, const float* parameters) {
  const Packed p = list.of[blockIdx.y];
  const int e = blockIdx.x * blockDim.x + threadIdx.x;
  if (e < p.count())
    static_cast<unsigned*>(p.words)[e] =
        halves(p.value(parameters, e, 0), p.value(parameters, e, 1));
}

// The layout of conv_tensor()'s inputs in shared memory, in words. The lanes of a product read four
// pairs of channels x eight neighbours; a distance of 8 or 24 words mod 32 between pairs places
// them on different banks.
template <int Taps>
struct TensorTile {
  static constexpr int kRows = kTall + 2 * (Taps / 2);
  static constexpr int kPitch = Taps == 3 ? 20 : 16;  // words of a row of pixels
  static constexpr int kFirst = Taps == 3 ? 4 : 0;    // the word of the tile's first pixel
  static constexpr int kPlane = kRows * kPitch + (Taps == 3 ? 0 : 8);
  static constexpr int kWords = kFirst + kDepth * kPlane;
};
__host__ __device__ constexpr int tensor_pitch(int span) { return span + 8 + span % 16; }

// As conv(). A warp computes Rows rows of 16 pixels of the tile for Eights x 8 output channels. The
// inner dimension of its products is the sixteen input channels in shared memory, one tap after the
// other.
template <int Taps, int Rows, int Eights, class Source, class Emit>
__global__ void __launch_bounds__(kWarps * 32, 2)
    conv_tensor(Emit emit, Source source, const uint4* packed, int in, float gain, Extent s,
                const int* over) {
  SEG_SHARED(shared);
  if (over != nullptr && *over != 0) return;
  using Tile = TensorTile<Taps>;
  constexpr int kTaps = Taps * Taps, kBorder = Taps / 2, kThreads = kWarps * 32;
  constexpr int kDown = kTall / Rows, kSpan = kWarps / kDown * Eights * 8;
  constexpr int kPitch = tensor_pitch(kSpan), kWeights = kDepth * kTaps * kPitch;
  unsigned* const w = reinterpret_cast<unsigned*>(shared);  // [kDepth][kTaps][kPitch]
  unsigned* const x = w + kWeights + Tile::kFirst;          // [kDepth][kRows][Tile::kPitch]
  const int me = threadIdx.x, warp = me / 32, g = me % 32 / 4, t = me % 4;
  const int row0 = warp % kDown * Rows, side = warp / kDown * Eights * 8;
  const int tile = blockIdx.x, first = blockIdx.y * kSpan;
  const int top = tile / s.across() * kTall, left = tile % s.across() * kWide;
  float sum[Rows][Eights][4] = {};

  for (int c0 = 0; c0 < in; c0 += 2 * kDepth) {
    const uint4* const from =
        packed + (static_cast<size_t>(c0 / (2 * kDepth)) * gridDim.y + blockIdx.y) * (kWeights / 4);
    for (int e = me; e < kWeights / 4; e += kThreads) reinterpret_cast<uint4*>(w)[e] = from[e];
    for (int e = me; e < kDepth * Tile::kRows * (kWide / 4); e += kThreads) {
      const int u = e % (kWide / 4) * 4, row = e / (kWide / 4);  // row of all pairs
      const int c = c0 + row / Tile::kRows * 2, y = top + row % Tile::kRows - kBorder;
      const float4 a = four_of(source, c, in, y, left + u, s),
                   b = four_of(source, c + 1, in, y, left + u, s);
      *reinterpret_cast<uint4*>(x + row / Tile::kRows * Tile::kPlane +
                                row % Tile::kRows * Tile::kPitch + u) =
          uint4{cut_halves(a.x * gain, b.x * gain), cut_halves(a.y * gain, b.y * gain),
                cut_halves(a.z * gain, b.z * gain), cut_halves(a.w * gain, b.w * gain)};
    }
    for (int e = me; e < kDepth * Tile::kRows * 2 * kBorder; e += kThreads) {
      const int u = e % 2 == 0 ? -1 : kWide, row = e / 2;
      const int c = c0 + row / Tile::kRows * 2, y = top + row % Tile::kRows - kBorder;
      x[row / Tile::kRows * Tile::kPlane + row % Tile::kRows * Tile::kPitch + u] =
          cut_halves(one_of(source, c, in, y, left + u, s) * gain,
                     one_of(source, c + 1, in, y, left + u, s) * gain);
    }
    __syncthreads();
#pragma unroll 1
    for (int tap = 0; tap < kTaps; ++tap) {
      const int dy = tap / Taps, dx = tap % Taps - kBorder;
      unsigned b[Eights][2];
#pragma unroll
      for (int e = 0; e < Eights; ++e)
#pragma unroll
        for (int h = 0; h < 2; ++h)
          b[e][h] = w[((t + 4 * h) * kTaps + tap) * kPitch + side + e * 8 + g];
#pragma unroll
      for (int r = 0; r < Rows; ++r) {
        unsigned a[4];
#pragma unroll
        for (int h = 0; h < 4; ++h)
          a[h] = x[(t + h / 2 * 4) * Tile::kPlane + (row0 + r + dy) * Tile::kPitch + g + h % 2 * 8 +
                   dx];
#pragma unroll
        for (int e = 0; e < Eights; ++e) multiply(sum[r][e], a, b[e]);
      }
    }
    __syncthreads();
  }

  // Threads exchange the results in shared memory, kPart channels at a time.
  float* const results = shared;  // [kPartWords]
  float* const room = results + kPartWords;
  const int column = me % (kPart / kFour), run = me / (kPart / kFour);
  const int y = top + run / (kWide / kRun), x0 = left + run % (kWide / kRun) * kRun;
  const int count = y < s.height ? max(0, min(kRun, s.width - x0)) : 0;
  const float share = 1.0f / gain;
  for (int part = 0; part < kSpan; part += kPart) {
#pragma unroll
    for (int e = 0; e < Eights; ++e) {
      const int o = side + e * 8 - part;
      if (o < 0 || o >= kPart) continue;
#pragma unroll
      for (int r = 0; r < Rows; ++r)
#pragma unroll
        for (int h = 0; h < 4; ++h)
          results[part_at(o + 2 * t + h % 2) + (row0 + r) * kWide + g + h / 2 * 8] =
              sum[r][e][h] * share;
    }
    __syncthreads();
    float v[kRun][kFour];
#pragma unroll
    for (int j = 0; j < kFour; ++j)
#pragma unroll
      for (int i = 0; i < kRun; ++i)
        v[i][j] = results[part_at(column * kFour + j) + run * kRun + i];
    emit(v, Place4{first + part, y, x0, count, column, run, min(kPart, kSpan - part), tile}, room);
    __syncthreads();
  }
}

// The layout of conv_gradient_tensor() in shared memory. A word holds two neighbours of a row; a
// distance of 4 or 28 words mod 32 between channels places the lanes on different banks.
template <int Taps>
struct GradientTile {
  static constexpr int kRows = kGradientRows + 2 * (Taps / 2);
  static constexpr int kPitch = kWide / 2 + Taps / 2;  // words of a row of inputs with its border
  static constexpr int kPlane = Taps == 3 ? 60 : 36;   // words of an input channel
  static constexpr int kSlopes = kGradientRows * kWide / 2 + 4;  // words of an output channel
};

// As conv_gradient(). A warp sums Sixteens x 16 output channels x 8 input channels x all taps. The
// inner dimension of its products is the sixteen pixels of a row. A word of the middle tap's inputs
// has its halves in two neighbouring words of shared memory.
template <int Taps, int Sixteens, class Source, class Slope>
__global__ void __launch_bounds__(kWarps * 32, 2)
    conv_gradient_tensor(float* parts, Source source, Slope slope, int in, int out, float gain,
                         Extent s, const int* over) {
  SEG_SHARED(shared);
  if (over != nullptr && *over != 0) return;
  using Tile = GradientTile<Taps>;
  constexpr int kTaps = Taps * Taps, kBorder = Taps / 2, kThreads = kWarps * 32;
  constexpr int kOuts = Sixteens * 16, kQuads = kGradientRows * kWide / 4;
  constexpr int kTurns = kOuts * kQuads / kThreads;          // loads of gradients by each thread
  unsigned* const ds = reinterpret_cast<unsigned*>(shared);  // [kOuts][kSlopes]
  unsigned* const xs = ds + kOuts * Tile::kSlopes;           // [kTensorIns][kPlane]
  const int me = threadIdx.x, warp = me / 32, g = me % 32 / 4, t = me % 4;
  const int o0 = blockIdx.z * kOuts, i0 = blockIdx.y * kTensorIns;
  const int tiles = s.across() * ((s.height + kGradientRows - 1) / kGradientRows);
  float sum[Sixteens][kTaps][4] = {}, bias[kTurns] = {};

  for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const int top = tile / s.across() * kGradientRows, left = tile % s.across() * kWide;
#pragma unroll
    for (int turn = 0; turn < kTurns; ++turn) {
      const int o = me / kQuads + turn * (kThreads / kQuads), n = me % kQuads * 4;
      const float4 d = four_of(slope, o0 + o, out, top + n / kWide, left + n % kWide, s);
      bias[turn] += (d.x + d.y) + (d.z + d.w);
      *reinterpret_cast<uint2*>(ds + o * Tile::kSlopes + n / 2) =
          uint2{cut_halves(d.x * gain, d.y * gain), cut_halves(d.z * gain, d.w * gain)};
    }
    // The words of an input's row begin one pixel left of the tile. A thread with four pixels
    // writes the words that end with its first and its third pixel; the last thread of a row also
    // writes the word after those.
    for (int e = me; e < kTensorIns * Tile::kRows * (kWide / 4); e += kThreads) {
      const int u = e % (kWide / 4) * 4, row = e / (kWide / 4);
      const int c = i0 + row / Tile::kRows, y = top + row % Tile::kRows - kBorder;
      const float4 v = four_of(source, c, in, y, left + u, s);
      unsigned* const to =
          xs + row / Tile::kRows * Tile::kPlane + row % Tile::kRows * Tile::kPitch + u / 2;
      if constexpr (Taps == 1) {
        *reinterpret_cast<uint2*>(to) = uint2{cut_halves(v.x, v.y), cut_halves(v.z, v.w)};
      } else {
        const float before = one_of(source, c, in, y, left + u - 1, s);
        to[0] = cut_halves(before, v.x);
        to[1] = cut_halves(v.y, v.z);
        if (u == kWide - 4) to[2] = cut_halves(v.w, one_of(source, c, in, y, left + kWide, s));
      }
    }
    __syncthreads();
    if (i0 + warp * 8 < in)
#pragma unroll 1
      for (int row = 0; row < kGradientRows; ++row) {
        unsigned a[Sixteens][4];
#pragma unroll
        for (int m = 0; m < Sixteens; ++m)
#pragma unroll
          for (int h = 0; h < 4; ++h)
            a[m][h] =
                ds[(m * 16 + g + h % 2 * 8) * Tile::kSlopes + row * (kWide / 2) + t + h / 2 * 4];
#pragma unroll
        for (int dy = 0; dy < Taps; ++dy) {
          const unsigned* from = xs + (warp * 8 + g) * Tile::kPlane + (row + dy) * Tile::kPitch + t;
          unsigned b[Taps][2];
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            b[0][h] = from[4 * h];
            if constexpr (Taps == 3) {
              b[2][h] = from[4 * h + 1];
              b[1][h] = straddle(b[0][h], b[2][h]);
            }
          }
#pragma unroll
          for (int dx = 0; dx < Taps; ++dx)
#pragma unroll
            for (int m = 0; m < Sixteens; ++m)
              if (m == 0 || o0 + m * 16 < out) multiply(sum[m][dy * Taps + dx], a[m], b[dx]);
        }
      }
    __syncthreads();
  }
  float* const part = parts + blockIdx.x * (static_cast<size_t>(out) * in * kTaps + out);
  const float share = 1.0f / gain;
#pragma unroll
  for (int m = 0; m < Sixteens; ++m)
#pragma unroll
    for (int h = 0; h < 4; ++h) {
      const int o = o0 + m * 16 + g + h / 2 * 8, i = i0 + warp * 8 + 2 * t + h % 2;
      if (o >= out || i >= in) continue;
#pragma unroll
      for (int tap = 0; tap < kTaps; ++tap)
        part[(static_cast<size_t>(o) * in + i) * kTaps + tap] = sum[m][tap][h] * share;
    }
  if (blockIdx.y != 0) return;
  float* const rows = shared;  // [kOuts][kQuads + 1]
#pragma unroll
  for (int turn = 0; turn < kTurns; ++turn)
    rows[(me / kQuads + turn * (kThreads / kQuads)) * (kQuads + 1) + me % kQuads] = bias[turn];
  __syncthreads();
  if (me >= kOuts || o0 + me >= out) return;
  float total = 0;
  for (int i = 0; i < kQuads; ++i) total += rows[me * (kQuads + 1) + i];
  part[static_cast<size_t>(out) * in * kTaps + o0 + me] = total;
}

template <int Taps, int Rows, int Eights, class Source, class Emit>
void launch_conv(const Emit& emit, const Source& source, const Packed& p, float gain, Extent s,
                 const int* over, cudaStream_t stream) {
  constexpr int kSpan = kWarps * Rows / kTall * Eights * 8;
  constexpr int kWords = kDepth * Taps * Taps * tensor_pitch(kSpan) + TensorTile<Taps>::kWords;
  constexpr size_t kBytes = sizeof(float) * std::max(kWords, kPartWords + 2 * kRuns * (kPart + 1));
  static_assert(kBytes <= kShared);
  SEG_LAUNCH((conv_tensor<Taps, Rows, Eights, Source, Emit>), dim3(s.tiles(), p.groups()),
             dim3(kWarps * 32), kBytes, stream, emit, source, static_cast<const uint4*>(p.words),
             p.in, gain, s, over);
}

// Returns the output channels of a block's weight gradient.
inline int tensor_outs(int out) { return out > 32 ? 64 : 32; }

template <int Taps, int Sixteens, class Source, class Slope>
void launch_gradient(float* parts, const Source& source, const Slope& slope, int in, int out,
                     float gain, Extent s, const int* over, cudaStream_t stream) {
  using Tile = GradientTile<Taps>;
  constexpr int kOuts = Sixteens * 16;
  constexpr size_t kBytes =
      sizeof(float) * std::max(kOuts * Tile::kSlopes + kTensorIns * Tile::kPlane,
                               kOuts * (kGradientRows * kWide / 4 + 1));
  static_assert(kBytes <= kShared);
  SEG_LAUNCH(
      (conv_gradient_tensor<Taps, Sixteens, Source, Slope>),
      dim3(tensor_parts(in, out, s), (in + kTensorIns - 1) / kTensorIns, (out + kOuts - 1) / kOuts),
      dim3(kWarps * 32), kBytes, stream, parts, source, slope, in, out, gain, s, over);
}

}  // namespace

bool has_tensor_code() {
  cudaFuncAttributes code{};
  CUDA_CHECK(cudaFuncGetAttributes(&code, conv_tensor<1, 2, 4, Input, Forward>));
  return code.ptxVersion >= 75;
}

// A block computes 112 channels if blocks of 112 compute no more channels in total than blocks of
// 32, otherwise 32.
Packed packed_for_tensor(int taps, int in, int out) {
  const int span = (out + 111) / 112 * 112 <= (out + 31) / 32 * 32 ? 112 : 32;
  return {0, nullptr, in, out, taps * taps, span, tensor_pitch(span), 2 * kDepth, false};
}

void pack_for_tensor(const PackedList& list, const float* parameters, cudaStream_t stream) {
  SEG_LAUNCH(pack_halves, list.grid(kPackThreads), dim3(kPackThreads), 0, stream, list, parameters);
}

template <int Taps, class Source, class Emit>
void run_conv_tensor(const Emit& emit, const Source& source, const Packed& p, float gain, Extent s,
                     const int* over, cudaStream_t stream) {
  if (p.span == 112)
    launch_conv<Taps, 4, 7>(emit, source, p, gain, s, over, stream);
  else
    launch_conv<Taps, 2, 4>(emit, source, p, gain, s, over, stream);
}

int tensor_parts(int in, int out, Extent s) {
  const int outs = tensor_outs(out);
  const int groups = (in + kTensorIns - 1) / kTensorIns * ((out + outs - 1) / outs);
  const int tiles = s.across() * ((s.height + kGradientRows - 1) / kGradientRows);
  return std::min(tiles, std::max(1, 2 * kGradientBlocks / groups));
}

template <int Taps>
void run_conv_gradient_tensor(float* gradient, float* parts, const Input& source,
                              const Gradient& slope, int in, int out, float gain, bool add,
                              Extent s, const int* over, cudaStream_t stream) {
  if (tensor_outs(out) == 64)
    launch_gradient<Taps, 4>(parts, source, slope, in, out, gain, s, over, stream);
  else
    launch_gradient<Taps, 2>(parts, source, slope, in, out, gain, s, over, stream);
  run_sum(gradient, parts, out * in * Taps * Taps + out, tensor_parts(in, out, s), add, stream);
}

template void run_conv_tensor<3>(const Forward&, const Input&, const Packed&, float, Extent,
                                 const int*, cudaStream_t);
template void run_conv_tensor<1>(const Forward&, const Input&, const Packed&, float, Extent,
                                 const int*, cudaStream_t);
template void run_conv_tensor<3>(const Backward&, const Gradient&, const Packed&, float, Extent,
                                 const int*, cudaStream_t);
template void run_conv_tensor<1>(const Backward&, const Gradient&, const Packed&, float, Extent,
                                 const int*, cudaStream_t);
template void run_conv_gradient_tensor<3>(float*, float*, const Input&, const Gradient&, int, int,
                                          float, bool, Extent, const int*, cudaStream_t);
template void run_conv_gradient_tensor<1>(float*, float*, const Input&, const Gradient&, int, int,
                                          float, bool, Extent, const int*, cudaStream_t);

}  // namespace seg::cuda
