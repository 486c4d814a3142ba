// The convolutions of conv.cuh on tensor cores: inputs rounded to TF32 (10 bits of mantissa, the
// range of float32), sums in float32. mma.sync m16n8k8, which every GPU from compute capability
// 8.0 on has.
#pragma once

#include "conv.cuh"

namespace seg::cuda {

constexpr int kWarps = 4;  // of a block
constexpr int kPart = 32;  // channels that an epilogue hands on at a time
constexpr int kPartPitch = kTall * kWide + 4;
constexpr int kTensorIns = kWarps * 8;  // input channels of a block's weight gradient
constexpr int kSlopePitch = kGradientRows * kWide + 4;  // 4 mod 32: lanes meet different banks

#ifdef SEG_CUDA_SHIM
using shim::multiply;
using shim::to_tf32;
#else
__device__ inline float to_tf32(float x) {
  unsigned out = 0;
#if __CUDA_ARCH__ >= 800
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(out) : "f"(x));
#endif
  return __uint_as_float(out);
}

// c += a b by a warp, a 16 x 8, b 8 x 8. Lane 4 g + t holds a (g, t), (g + 8, t), (g, t + 4),
// (g + 8, t + 4); b (t, g), (t + 4, g); c (g, 2 t), (g, 2 t + 1), (g + 8, 2 t), (g + 8, 2 t + 1).
__device__ inline void multiply(float (&c)[4], const float (&a)[4], const float (&b)[2]) {
#if __CUDA_ARCH__ >= 800
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(__float_as_uint(a[0])), "r"(__float_as_uint(a[1])), "r"(__float_as_uint(a[2])),
        "r"(__float_as_uint(a[3])), "r"(__float_as_uint(b[0])), "r"(__float_as_uint(b[1])));
#endif
}
#endif

// As conv(): a warp computes Rows rows of 16 pixels of the tile for Eights x 8 channels, taking the
// eight input channels in shared memory as the products' inner dimension, tap by tap.
template <int Taps, bool Turned, int Rows, int Eights, class Source, class Emit>
__global__ void __launch_bounds__(kWarps * 32, 2)
    conv_tensor(Emit emit, Source source, const float* weights, int in, int out, Extent s) {
  SEG_SHARED(shared);
  constexpr int kTaps = Taps * Taps, kBorder = Taps / 2, kThreads = kWarps * 32;
  constexpr int kRows = kTall + 2 * kBorder, kAcross = kWide + 2 * kBorder;
  constexpr int kDown = kTall / Rows, kSpan = kWarps / kDown * Eights * 8;
  // Lanes of a product read four channels x eight neighbours: 8 or 24 mod 32 floats between
  // channels keep them on different banks.
  constexpr int kPitch = kSpan + 8 + kSpan % 16, kXPitch = Taps == 3 ? 20 : 21;
  float* const w = shared;                       // [kDepth][kTaps][kPitch]
  float* const x = w + kDepth * kTaps * kPitch;  // [kDepth][kRows][kXPitch]
  const int me = threadIdx.x, warp = me / 32, g = me % 32 / 4, t = me % 4;
  const int row0 = warp % kDown * Rows, side = warp / kDown * Eights * 8;
  const int tile = blockIdx.x, first = blockIdx.y * kSpan;
  const int top = tile / s.across() * kTall, left = tile % s.across() * kWide;
  float sum[Rows][Eights][4] = {};

  for (int c0 = 0; c0 < in; c0 += kDepth) {
    for (int e = me; e < kSpan * kDepth * kTaps; e += kThreads) {
      int c, o, tap;
      if constexpr (Turned) {
        c = e / (kSpan * kTaps), o = e / kTaps % kSpan, tap = e % kTaps;
      } else {
        o = e / (kDepth * kTaps), c = e / kTaps % kDepth, tap = e % kTaps;
      }
      float v = 0;
      if (c0 + c < in && first + o < out)
        v = Turned
                ? weights[(static_cast<size_t>(c0 + c) * out + first + o) * kTaps + kTaps - 1 - tap]
                : weights[(static_cast<size_t>(first + o) * in + c0 + c) * kTaps + tap];
      w[(c * kTaps + tap) * kPitch + o] = to_tf32(v);
    }
    for (int e = me; e < kDepth * kRows * kAcross; e += kThreads) {
      const int c = e / (kRows * kAcross), v = e / kAcross % kRows, u = e % kAcross;
      const int y = top + v - kBorder, col = left + u - kBorder;
      const bool used = c0 + c < in && y >= 0 && y < s.height && col >= 0 && col < s.width;
      x[(c * kRows + v) * kXPitch + u] = to_tf32(used ? source(c0 + c, s.at(y, col)) : 0);
    }
    __syncthreads();
#pragma unroll 1
    for (int tap = 0; tap < kTaps; ++tap) {
      const int dy = tap / Taps, dx = tap % Taps;
      float b[Eights][2];
#pragma unroll
      for (int e = 0; e < Eights; ++e)
#pragma unroll
        for (int h = 0; h < 2; ++h)
          b[e][h] = w[((t + 4 * h) * kTaps + tap) * kPitch + side + e * 8 + g];
#pragma unroll
      for (int r = 0; r < Rows; ++r) {
        float a[4];
#pragma unroll
        for (int h = 0; h < 4; ++h)
          a[h] = x[((t + h / 2 * 4) * kRows + row0 + r + dy) * kXPitch + g + h % 2 * 8 + dx];
#pragma unroll
        for (int e = 0; e < Eights; ++e) multiply(sum[r][e], a, b[e]);
      }
    }
    __syncthreads();
  }

  // The results change hands in shared memory, kPart channels at a time.
  float* const results = shared;  // [kPart][kPartPitch]
  float* const room = results + kPart * kPartPitch;
  const int column = me % (kPart / kFour), run = me / (kPart / kFour);
  const int y = top + run / (kWide / kRun), x0 = left + run % (kWide / kRun) * kRun;
  const int count = y < s.height ? max(0, min(kRun, s.width - x0)) : 0;
  for (int part = 0; part < kSpan; part += kPart) {
#pragma unroll
    for (int e = 0; e < Eights; ++e) {
      const int o = side + e * 8 - part;
      if (o < 0 || o >= kPart) continue;
#pragma unroll
      for (int r = 0; r < Rows; ++r)
#pragma unroll
        for (int h = 0; h < 4; ++h)
          results[(o + 2 * t + h % 2) * kPartPitch + (row0 + r) * kWide + g + h / 2 * 8] =
              sum[r][e][h];
    }
    __syncthreads();
    float v[kRun][kFour];
#pragma unroll
    for (int j = 0; j < kFour; ++j)
#pragma unroll
      for (int i = 0; i < kRun; ++i)
        v[i][j] = results[(column * kFour + j) * kPartPitch + run * kRun + i];
    emit(v, Place4{first + part, y, x0, count, column, run, min(kPart, kSpan - part), tile}, room);
    __syncthreads();
  }
}

// As conv_gradient(): a warp sums up to Sixteens x 16 output channels x 8 input channels x all
// taps, with eight pixels of a row as the products' inner dimension.
template <int Taps, int Sixteens, class Source, class Slope>
__global__ void __launch_bounds__(kWarps * 32, 2)
    conv_gradient_tensor(float* parts, Source source, Slope slope, int in, int out, Extent s) {
  SEG_SHARED(shared);
  constexpr int kTaps = Taps * Taps, kBorder = Taps / 2, kThreads = kWarps * 32;
  constexpr int kRows = kGradientRows + 2 * kBorder, kAcross = kWide + 2 * kBorder;
  constexpr int kOuts = Sixteens * 16, kPlane = kRows * kAcross + (Taps == 1 ? 4 : 0);
  float* const ds = shared;                    // [kOuts][kSlopePitch]
  float* const xs = ds + kOuts * kSlopePitch;  // [kTensorIns][kPlane], 4 or 12 mod 32
  const int me = threadIdx.x, warp = me / 32, g = me % 32 / 4, t = me % 4;
  const int o0 = blockIdx.z * kOuts, i0 = blockIdx.y * kTensorIns;
  const int tiles = s.across() * ((s.height + kGradientRows - 1) / kGradientRows);
  float sum[Sixteens][kTaps][4] = {}, bias[Sixteens][2] = {};

  for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const int top = tile / s.across() * kGradientRows, left = tile % s.across() * kWide;
    for (int e = me; e < kOuts * kGradientRows * kWide; e += kThreads) {
      const int o = e / (kGradientRows * kWide), n = e % (kGradientRows * kWide);
      const int y = top + n / kWide, x = left + n % kWide;
      const bool used = o0 + o < out && y < s.height && x < s.width;
      ds[o * kSlopePitch + n] = to_tf32(used ? slope(o0 + o, s.at(y, x)) : 0);
    }
    for (int e = me; e < kTensorIns * kRows * kAcross; e += kThreads) {
      const int i = e / (kRows * kAcross), v = e / kAcross % kRows, u = e % kAcross;
      const int y = top + v - kBorder, x = left + u - kBorder;
      const bool used = i0 + i < in && y >= 0 && y < s.height && x >= 0 && x < s.width;
      xs[i * kPlane + v * kAcross + u] = to_tf32(used ? source(i0 + i, s.at(y, x)) : 0);
    }
    __syncthreads();
    if (i0 + warp * 8 < in)
#pragma unroll 1
      for (int n = 0; n < kGradientRows * kWide; n += 8) {
        float a[Sixteens][4];
#pragma unroll
        for (int m = 0; m < Sixteens; ++m) {
#pragma unroll
          for (int h = 0; h < 4; ++h)
            a[m][h] = ds[(m * 16 + g + h % 2 * 8) * kSlopePitch + n + t + h / 2 * 4];
          bias[m][0] += a[m][0] + a[m][2];
          bias[m][1] += a[m][1] + a[m][3];
        }
        const float* from = xs + (warp * 8 + g) * kPlane + n / kWide * kAcross + n % kWide + t;
#pragma unroll
        for (int tap = 0; tap < kTaps; ++tap) {
          const float* at = from + tap / Taps * kAcross + tap % Taps;
          const float b[2] = {at[0], at[4]};
#pragma unroll
          for (int m = 0; m < Sixteens; ++m)
            if (o0 + m * 16 < out) multiply(sum[m][tap], a[m], b);
        }
      }
    __syncthreads();
  }
  float* const part = parts + blockIdx.x * (static_cast<size_t>(out) * in * kTaps + out);
#pragma unroll
  for (int m = 0; m < Sixteens; ++m)
#pragma unroll
    for (int h = 0; h < 4; ++h) {
      const int o = o0 + m * 16 + g + h / 2 * 8, i = i0 + warp * 8 + 2 * t + h % 2;
      if (o >= out || i >= in) continue;
#pragma unroll
      for (int tap = 0; tap < kTaps; ++tap)
        part[(static_cast<size_t>(o) * in + i) * kTaps + tap] = sum[m][tap][h];
    }
  if (blockIdx.y != 0) return;
  float* const rows = shared;  // [kOuts][4]
  if (warp == 0)
    for (int m = 0; m < Sixteens; ++m)
      for (int h = 0; h < 2; ++h) rows[(m * 16 + g + h * 8) * 4 + t] = bias[m][h];
  __syncthreads();
  if (me < kOuts && o0 + me < out)
    part[static_cast<size_t>(out) * in * kTaps + o0 + me] =
        (rows[me * 4] + rows[me * 4 + 1]) + (rows[me * 4 + 2] + rows[me * 4 + 3]);
}

// run_conv() on tensor cores.
template <int Taps, bool Turned, int Rows, int Eights, class Source, class Emit>
void run_conv_tensor(const Emit& emit, const Source& source, const float* weights, int in, int out,
                     Extent s, cudaStream_t stream) {
  constexpr int kSpan = kWarps * Rows / kTall * Eights * 8, kRows = kTall + 2 * (Taps / 2);
  constexpr int kPitch = kSpan + 8 + kSpan % 16, kXPitch = Taps == 3 ? 20 : 21;
  const size_t shared = std::max<size_t>(kDepth * (Taps * Taps * kPitch + kRows * kXPitch),
                                         kPart * kPartPitch + 2 * kRuns * kPart);
  SEG_LAUNCH((conv_tensor<Taps, Turned, Rows, Eights, Source, Emit>),
             dim3(s.tiles(), (out + kSpan - 1) / kSpan), dim3(kWarps * 32), shared * sizeof(float),
             stream, emit, source, weights, in, out, s);
}

// 112 channels a block where that wastes little, else 32.
template <int Taps, bool Turned, class Source, class Emit>
void run_conv_tensor(const Emit& emit, const Source& source, const float* weights, int in, int out,
                     Extent s, cudaStream_t stream) {
  if ((out + 111) / 112 * 112 <= (out + 31) / 32 * 32)
    run_conv_tensor<Taps, Turned, 4, 7>(emit, source, weights, in, out, s, stream);
  else
    run_conv_tensor<Taps, Turned, 2, 4>(emit, source, weights, in, out, s, stream);
}

inline int tensor_outs(int out) { return out > 32 ? 64 : 32; }

// Blocks that share the sum of a weight gradient.
inline int tensor_parts(int in, int out, Extent s) {
  const int outs = tensor_outs(out);
  const int groups = (in + kTensorIns - 1) / kTensorIns * ((out + outs - 1) / outs);
  const int tiles = s.across() * ((s.height + kGradientRows - 1) / kGradientRows);
  return std::min(tiles, std::max(1, 2 * kGradientBlocks / groups));
}

// run_conv_gradient() on tensor cores.
template <int Taps, int Sixteens, class Source, class Slope>
void run_conv_gradient_tensor(float* parts, const Source& source, const Slope& slope, int in,
                              int out, Extent s, cudaStream_t stream) {
  constexpr int kOuts = Sixteens * 16;
  const int rows = kGradientRows + 2 * (Taps / 2), across = kWide + 2 * (Taps / 2);
  const size_t shared = kOuts * kSlopePitch + kTensorIns * (rows * across + (Taps == 1 ? 4 : 0));
  SEG_LAUNCH(
      (conv_gradient_tensor<Taps, Sixteens, Source, Slope>),
      dim3(tensor_parts(in, out, s), (in + kTensorIns - 1) / kTensorIns, (out + kOuts - 1) / kOuts),
      dim3(kWarps * 32), shared * sizeof(float), stream, parts, source, slope, in, out, s);
}

template <int Taps, class Source, class Slope>
void run_conv_gradient_tensor(float* gradient, float* parts, const Source& source,
                              const Slope& slope, int in, int out, bool add, Extent s,
                              cudaStream_t stream) {
  if (tensor_outs(out) == 64)
    run_conv_gradient_tensor<Taps, 4>(parts, source, slope, in, out, s, stream);
  else
    run_conv_gradient_tensor<Taps, 2>(parts, source, slope, in, out, s, stream);
  run_sum(gradient, parts, out * in * Taps * Taps + out, tensor_parts(in, out, s), add, stream);
}

}  // namespace seg::cuda
