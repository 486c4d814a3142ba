// The CPU kernels: one table per instruction set, chosen once.
//
// A kernel works on a run of pixels of one row (a convolution by tiles: on two rows), runs on one
// thread and allocates nothing. Feature maps are channels-last; a pixel's channels start at a
// multiple of 16 floats and the channels that pad it are zero (or, in scores, so negative that no
// soft-max sees them). A map that a kernel gets starts at the run's first pixel, unless it says so.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../network.h"

namespace seg {

// Pixel (y, x) starts at data + y * pitch + x * stride.
struct Map {
  float* data = nullptr;
  ptrdiff_t pitch = 0;   // floats from row to row
  ptrdiff_t stride = 0;  // floats from pixel to pixel

  float* at(int y, int x) const { return data + y * pitch + x * stride; }
  Map from(int y, int x) const { return {at(y, x), pitch, stride}; }
};

// x -> (x - mean) * scale + shift, by channel; x -> x where mean is null.
struct Affine {
  const float* mean = nullptr;
  const float* scale = nullptr;
  const float* shift = nullptr;
};

constexpr int kPad = 16;        // the lanes of the widest target
constexpr int kStrip = 72;      // tiles that conv3 takes at a time: rows of whole product tiles
constexpr int kWindows = 128;   // pixels whose window sums are taken at a time
constexpr int kBand = 4;        // rows that are lifted together, at most
constexpr size_t kBlend = 512;  // floats that are averaged at a time: they stay in the cache
constexpr int kMeans = 256;     // bytes whose sum fits 16 bits
constexpr int kRun = 64;        // pixels that other kernels should get: these stay in the cache

inline int padded(int channels) { return (channels + kPad - 1) / kPad * kPad; }
// Floats of scratch memory that conv3 and conv3_dw want.
inline size_t strip_floats(int in_channels, int channels) {
  return size_t{16} * kStrip * (padded(in_channels) + padded(channels));
}

// Floats of a convolution's weights as the kernels read them: by tiles, or by taps.
inline size_t weight_floats(const Conv& conv, bool tiles) {
  const size_t taps = tiles ? 16 : static_cast<size_t>(conv.kernel) * conv.kernel;
  return taps * conv.in * padded(conv.out);
}

// G w G': a 3x3 kernel in the basis of the tiles, see winograd-inl.h.
inline void to_tiles(float* u, const float* w) {
  double r[4][3];
  for (int j = 0; j < 3; ++j) {
    const double even = static_cast<double>(w[j]) + w[6 + j];
    r[0][j] = w[j];
    r[1][j] = 0.5 * (even + w[3 + j]);
    r[2][j] = 0.5 * (even - w[3 + j]);
    r[3][j] = w[6 + j];
  }
  for (int i = 0; i < 4; ++i) {
    const double even = r[i][0] + r[i][2];
    u[4 * i] = static_cast<float>(r[i][0]);
    u[4 * i + 1] = static_cast<float>(0.5 * (even + r[i][1]));
    u[4 * i + 2] = static_cast<float>(0.5 * (even - r[i][1]));
    u[4 * i + 3] = static_cast<float>(r[i][2]);
  }
}

// G' u G: the gradient of the kernel from that of the tiles.
inline void from_tiles(double* w, const double* u) {
  double r[3][4];
  for (int j = 0; j < 4; ++j) {
    const double even = 0.5 * (u[4 + j] + u[8 + j]);
    r[0][j] = u[j] + even;
    r[1][j] = 0.5 * (u[4 + j] - u[8 + j]);
    r[2][j] = even + u[12 + j];
  }
  for (int i = 0; i < 3; ++i) {
    const double even = 0.5 * (r[i][1] + r[i][2]);
    w[3 * i] = r[i][0] + even;
    w[3 * i + 1] = 0.5 * (r[i][1] - r[i][2]);
    w[3 * i + 2] = even + r[i][3];
  }
}

// Rows of pixels whose filter coefficients lie between the same two rows of low pixels.
struct Band {
  const float *above, *below;  // planes [guide_channels + 1][classes][pitch], readable past the end
  ptrdiff_t pitch;
  const int32_t* left;  // pixel x lies between low pixels left[x] and left[x] + 1,
  const float* weight;  // weight[x] of the second; both readable past their end
  int rows;
  float share[kBand];  // of below, in each row
  const float* guide;  // planes [rows][guide_channels][guide_pitch], readable past their end
  ptrdiff_t guide_pitch;
};

// One instruction set's kernels. The members are references, so that a table which lacks one does
// not compile (table-inl.h).
struct Kernels {
  const char* name;
  int lanes;

  // 3x3 by tiles of 2x2 outputs (winograd-inl.h), at most kStrip of them from the even (y, x) on,
  // in maps that start at the picture's first pixel: out = (relu)(conv(norm(in), w) + bias), pixels
  // outside the picture are zero. w is [16][in_channels][padded(channels)] in the tiles' basis,
  // bias is [padded(channels)] or null, scratch holds strip_floats().
  void (&conv3)(Map out, Map in, Affine norm, const float* w, const float* bias, bool relu, int y,
                int x, int tiles, int height, int width, int in_channels, int channels,
                float* scratch);
  // dw += the gradient of those tiles, in w's form.
  void (&conv3_dw)(float* dw, Map in, Affine norm, Map dout, int y, int x, int tiles, int height,
                   int width, int in_channels, int channels, float* scratch);
  // 1x1, or 3x3 of few channels: there in.stride is in_channels, and a border of one pixel lies
  // around the picture. out = conv(in, w) + bias + add, with relu when asked. w is
  // [kernel * kernel][in_channels][padded(channels)], bias is [padded(channels)] or null, add is a
  // map like out (and may be out) or null.
  void (&conv)(Map out, Map in, const float* w, const float* bias, Map add, int width, int kernel,
               int in_channels, int channels, bool relu);
  // dw += the gradient of the run, at most kRun pixels, in w's form.
  void (&conv_dw)(float* dw, Map in, Map dout, int width, int kernel, int in_channels,
                  int channels);
  // sum[c] += sum over the run of x.
  void (&sums)(float* sum, Map x, int width, int channels);
  // sum[c] += sum over the run of x - reference, square[c] += sum of its square.
  void (&moments)(float* sum, float* square, const float* reference, Map x, int width,
                  int channels);
  // out = norm(x).
  void (&normalize)(Map out, Map x, Affine norm, int width, int channels);
  // ddy[c] += sum of dy, ddx[c] += sum of dy * (x - mean), over the run.
  void (&bn_sums)(float* ddy, float* ddx, Map dy, Map x, const float* mean, int width,
                  int channels);
  // dx = scale * (dy - a - (x - mean) * b), and zero where relu and x <= 0; sum[c] += sum of dx.
  // dx may be dy.
  void (&bn_backward)(Map dx, float* sum, Map dy, Map x, const float* mean, const float* scale,
                      const float* a, const float* b, int width, int channels, bool relu);
  // labels[x] = the first channel with the largest score.
  void (&argmax)(int32_t* labels, Map scores, int width, int channels);
  // p = softmax(z), lse[x] = log(sum(exp(z))). lse may be null; p may be z.
  void (&softmax)(Map p, float* lse, Map z, int width, int channels);
  // Of the guide's probabilities q[width][classes]: logs = log(max(q, smallest)), target = the
  // largest of the pixel * class_weight * q, mass[x] = its sum. class_weight is [padded(classes)].
  void (&prior)(Map logs, Map target, float* mass, const float* q, const float* class_weight,
                float smallest, int width, int classes);
  // Sum over the run of target * (lse - z).
  double (&cross_entropy)(Map z, const float* lse, Map target, int width, int channels);
  // Cross-entropy of the scores r to their own labels, and to the guide mapped by table.
  // hard (guide labels of the run, -1 = unknown) or soft (guide probabilities of the run,
  // [width][guide_classes]) or neither. dr is written; losses[0] += similarity, [1] += guide.
  void (&cluster_loss)(Map dr, double* losses, Map r, const int32_t* labels, const int32_t* hard,
                       const float* soft, int guide_classes, const int32_t* table,
                       float self_weight, float guide_weight, int width, int channels);
  // Adds the gradient of weight * sum over directions of mean h(difference) to dr, and the
  // unweighted value to *loss, for the run from (y, x) on; maps start at the picture's first pixel.
  // Scores are gain * r (+ anything). scale[4] = 1 / (pairs * channels): down, right, the two
  // diagonals (0 = direction not used).
  void (&spatial_loss)(Map dr, double* loss, Map r, const float* gain, float weight,
                       const float* scale, bool huber, int y, int x, int width, int height,
                       int full_width, int channels);
  // For each pixel of row y and each offset d: out[pixel][d] = exp(-|I_n - I_n+d|^2 / (2 sigma^2))
  // * scale[d], 0 where n + d is outside.
  void (&affinity)(float* out, const float* image, const Offset* offsets, const float* scale,
                   int count, float sigma, int y, int height, int width);
  // dz of the residual objective, guide and pair loss through the soft-max, for the run from (y, x)
  // on; maps start at the picture's first pixel. offsets come in pairs d, -d; affinity is
  // [height][width][count]; mass[height][width] is the target's sum over channels.
  // Returns the pair loss.
  double (&residual_loss)(Map dz, Map p, Map target, const float* mass, const float* affinity,
                          const Offset* offsets, int count, float lambda, int y, int x, int width,
                          int height, int full_width, int channels);
  // v = momentum * v + dw, w -= lr * v.
  void (&sgd)(float* w, float* v, const float* dw, size_t n, float lr, float momentum);

  // Guided filter, see guided_filter.cpp. Column sums are float64 planes [features][pitch].
  // planes[c * pitch + x] = row[x][c]; of bytes, / 255.
  void (&to_planes)(float* planes, ptrdiff_t pitch, const float* row, int width, int channels);
  void (&bytes_to_planes)(float* planes, ptrdiff_t pitch, const uint8_t* row, int width,
                          int channels);
  // column += sign * the features of a row: guide, guide products, values, guide times values, of
  // planes [channels][width].
  void (&add_products)(double* column, ptrdiff_t pitch, const float* guide, const float* values,
                       double sign, int width, int guide_channels, int classes);
  // column += sign * planes [features][width].
  void (&add_planes)(double* column, ptrdiff_t pitch, const float* planes, double sign, int width,
                     int features);
  // Sums of 2 radius + 1 columns: at pixel x of those up to column[x + 2 radius + 1], goes on from
  // state[features]. sums is [features][kWindows], width at most kWindows.
  void (&window_sums)(double* sums, double* state, const double* column, ptrdiff_t pitch,
                      int radius, int width, int features);
  // From window sums (features of add_products) and share = 1 / area to the coefficients, planes
  // [guide_channels + 1][classes][pitch].
  void (&solve)(float* out, ptrdiff_t pitch, const double* sums, const double* share, double eps,
                int width, int guide_channels, int classes);
  // out[f * pitch + x] = sums[f][x] * share[x].
  void (&window_means)(float* out, ptrdiff_t pitch, const double* sums, const double* share,
                       int width, int features);
  // values[x][k] = sum over g of rows[g][k][x] * guide[g][x] + rows[last][k][x] for one row of
  // pixels; rows and guide are planes that can be read kPad floats past their end.
  void (&apply)(float* values, const float* rows, ptrdiff_t pitch, const float* guide,
                ptrdiff_t guide_pitch, int width, int guide_channels, int classes);
  // The same for the rows of a band, `row` floats apart.
  void (&apply_band)(float* values, ptrdiff_t row, const Band& band, int width, int guide_channels,
                     int classes);
  // The class with the largest such value, the first of equals; confidence is that cut to [0, 1].
  void (&upsample_band)(int32_t* labels, float* confidence, ptrdiff_t row, const Band& band,
                        int width, int guide_channels, int classes);
  // out = sum over i < count of weights[i] * rows[i]; of bytes, / 255.
  void (&blend_rows)(float* out, const float* const* rows, const float* weights, int count,
                     size_t n);
  void (&blend_byte_rows)(float* out, const uint8_t* const* rows, const float* weights, int count,
                          size_t n);
  // The means of `pixels` neighbours of `count` rows of colours, / 255; pixels * count at most
  // kMeans.
  void (&mean_colours)(float* out, const uint8_t* const* rows, int count, int pixels, int width);
  // out[x] = sum over i of weights[begin[x] + i] * row[first[x] + i], as many as until begin[x +
  // 1], at least one, x < width, for pixels of some channels; row can be read one float past its
  // end.
  void (&blend_pixels)(float* out, const float* row, const int* first, const int* begin,
                       const float* weights, int width, int channels);
};

// The table called name ("base", "avx2", "avx512"), or null if this machine cannot run it.
const Kernels* find_kernels(const char* name);
// What SEG_ISA names, or the best. Throws std::runtime_error when SEG_ISA names no usable table.
const Kernels& default_kernels();
// Names of the usable tables, slowest first; returns how many.
int usable_kernels(const char* names[4]);

const Kernels* base_kernels();
const Kernels* avx2_kernels();
const Kernels* avx512_kernels();

}  // namespace seg
