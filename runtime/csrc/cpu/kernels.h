// The CPU kernels: one table of functions per instruction set (isa), chosen once.
//
// A kernel works on a run: `width` neighbouring pixels of one row (conv3 and conv3_dw: of two
// rows). It runs on one thread and allocates nothing. The caller guarantees that all sizes fit.
//
// A map is channels-last. Each pixel has padded(channels) floats; the extra channels are zero, or
// in scores kNever, whose exp is 0. A map argument starts at the first pixel of the run, unless the
// kernel's comment names the picture's first pixel. Vectors over channels hold padded(channels)
// floats.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../network.h"

namespace seg {

// A map of pixels. Pixel (y, x) starts at data + y * pitch + x * stride.
struct Map {
  float* data = nullptr;
  ptrdiff_t pitch = 0;   // floats from row to row
  ptrdiff_t stride = 0;  // floats from pixel to pixel

  // Returns the first channel of a pixel.
  float* at(int y, int x) const { return data + y * pitch + x * stride; }
  // Returns the map that starts at a pixel of this one.
  Map from(int y, int x) const { return {at(y, x), pitch, stride}; }
};

// The function x -> (x - mean) * scale + shift, by channel; if mean is null, x -> x.
struct Affine {
  const float* mean = nullptr;
  const float* scale = nullptr;
  const float* shift = nullptr;
};

constexpr int kPad = 16;        // lanes of the widest isa
constexpr int kStrip = 72;      // most tiles of one conv3; 6, 8 and 12 (tile_rows()) divide it
constexpr int kWindows = 128;   // most pixels of one call of window_sums
constexpr int kBand = 4;        // most rows that are upsampled together
constexpr size_t kBlend = 512;  // floats that blend_byte_rows averages at a time, for the cache
constexpr int kMeans = 256;     // the sum of this many bytes fits 16 bits
constexpr int kRun = 64;        // pixels of a run in the refinement: its maps fit the cache

// The pixels of the dense CRF whose soft-max is computed together, so that the processor does not
// wait for the sums and maxima of one pixel.
constexpr int kGroup = 4;
constexpr int kTile = 96;  // height and width of the tiles of the dense CRF

// Returns the floats of a pixel with so many channels.
inline int padded(int channels) { return (channels + kPad - 1) / kPad * kPad; }
// Returns the floats of scratch memory that conv3 and conv3_dw need.
inline size_t strip_floats(int in_channels, int channels) {
  return size_t{16} * kStrip * (padded(in_channels) + padded(channels));
}

// Returns the floats of a convolution's weights in the form that conv3 reads (tiles), or that conv
// reads.
inline size_t weight_floats(const Conv& conv, bool tiles) {
  const size_t taps = tiles ? 16 : static_cast<size_t>(conv.kernel) * conv.kernel;
  return taps * conv.in * padded(conv.out);
}

// Writes u [4][4] = G w G': the 3x3 kernel w [3][3] in the basis of the tiles (winograd-inl.h).
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

// Writes w [3][3] = G' u G: the gradient of a 3x3 kernel from the gradient u [4][4] of its tiles.
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

// A part of the full-size picture: up to kBand rows, from some column on. All these rows lie
// between the same two rows of low pixels, which are the pixels of the smaller picture that the
// coefficients belong to. left, weight and guidance start at the first column of the part. The
// arrays can be read kPad values past their end.
struct Band {
  // Coefficients of the two rows of low pixels, planes [guidance_channels + 1][classes][pitch].
  const float *above, *below;
  ptrdiff_t pitch;
  // Pixel x lies between the low pixels left[x] and left[x] + 1; weight[x] is the share of the
  // second.
  const int32_t* left;
  const float* weight;
  int rows;
  float share[kBand];     // the share of `below` in each row
  const float* guidance;  // planes [rows][guidance_channels][guidance_pitch]
  ptrdiff_t guidance_pitch;
};

// What the slice of a filtered lattice reads (lattice.h), from some pixel on.
struct Slice {
  const float* values;     // [points][width]
  const int32_t* corners;  // [pixels][vertices]: points
  const float* shares;     // [pixels][vertices]: their weights
  int vertices;
  float weight;  // of the sum
};

// The kernels of one instruction set. The members are references: a table without one of them does
// not compile (table-inl.h).
struct Kernels {
  const char* name;
  int lanes;  // floats of a vector

  // 3x3 convolution by tiles of 2x2 outputs (winograd-inl.h). Computes at most kStrip tiles of the
  // rows y and y + 1, from column x on; y and x are even. Maps start at the picture's first pixel.
  // out = conv(norm(in), w) + bias, then relu if asked. Pixels outside the picture are zero after
  // the norm. w is [16][in_channels][padded(channels)] in the tiles' basis, bias is
  // [padded(channels)] or null, scratch holds strip_floats() floats.
  void (&conv3)(Map out, Map in, Affine norm, const float* w, const float* bias, bool relu, int y,
                int x, int tiles, int height, int width, int in_channels, int channels,
                float* scratch);
  // dw += the gradient by w, summed over the same tiles. dw has the form of w.
  void (&conv3_dw)(float* dw, Map in, Affine norm, Map dout, int y, int x, int tiles, int height,
                   int width, int in_channels, int channels, float* scratch);
  // 1x1 convolution, or 3x3 of few channels. out = conv(in, w) + bias + add, then relu if asked.
  // For 3x3, in.stride equals in_channels and `in` has a border of one zero pixel around the
  // picture. w is [kernel * kernel][in_channels][padded(channels)], bias is [padded(channels)] or
  // null, add is a map like out, or out itself, or has null data.
  void (&conv)(Map out, Map in, const float* w, const float* bias, Map add, int width, int kernel,
               int in_channels, int channels, bool relu);
  // dw += the gradient by w, summed over the run. dw has the form of w. The run has at most kRun
  // pixels.
  void (&conv_dw)(float* dw, Map in, Map dout, int width, int kernel, int in_channels,
                  int channels);
  // sum[c] += the sum of x over the run.
  void (&sums)(float* sum, Map x, int width, int channels);
  // With d = x - reference: sum[c] += the sum of d over the run, square[c] += the sum of d * d.
  void (&moments)(float* sum, float* square, const float* reference, Map x, int width,
                  int channels);
  // out = norm(x).
  void (&normalize)(Map out, Map x, Affine norm, int width, int channels);
  // ddy[c] += the sum of dy over the run, ddx[c] += the sum of dy * (x - mean).
  void (&bn_sums)(float* ddy, float* ddx, Map dy, Map x, const float* mean, int width,
                  int channels);
  // dx = scale * (dy - a - (x - mean) * b); with relu, dx is zero where x <= 0. sum[c] += the sum
  // of dx over the run. a and b are vectors over channels. dx may be dy.
  void (&bn_backward)(Map dx, float* sum, Map dy, Map x, const float* mean, const float* scale,
                      const float* a, const float* b, int width, int channels, bool relu);
  // labels[x] = the channel with the largest score; of equal scores the first.
  void (&argmax)(int32_t* labels, Map scores, int width, int channels);
  // p = softmax(z) over the channels, lse[x] = log(sum(exp(z))). lse may be null; p may be z.
  void (&softmax)(Map p, float* lse, Map z, int width, int channels);
  // Prepares residual from the guide's probabilities q [width][classes]: logs = log(max(q,
  // smallest)), target = (the largest q of the pixel) * class_weight * q, mass[x] = the sum of
  // target over the classes. class_weight is [padded(classes)].
  void (&prior)(Map logs, Map target, float* mass, const float* q, const float* class_weight,
                float smallest, int width, int classes);
  // Returns the sum of target * (lse - z) over the run.
  double (&cross_entropy)(Map z, const float* lse, Map target, int width, int channels);
  // The cross-entropies of the scores r with their own labels (similarity), and with the guide
  // whose class k is mapped to channel table[k]. The guide is hard [width], labels with -1 for
  // unknown, or soft [width][guide_classes], or both are null. Writes dr = the gradient of
  // self_weight * similarity + guide_weight * guide; losses[0] += similarity, losses[1] += guide.
  void (&cluster_loss)(Map dr, double* losses, Map r, const int32_t* labels, const int32_t* hard,
                       const float* soft, int guide_classes, const int32_t* table,
                       float self_weight, float guide_weight, int width, int channels);
  // The spatial loss of the run that starts at (y, x): the sum over four directions of scale * the
  // penalty (huber or absolute value) of the difference between neighbouring scores. *loss += the
  // loss; dr += its gradient times weight. Maps start at the picture's first pixel. The scores are
  // gain * r plus a constant. scale[4] is 1 / (pairs * channels) for down, right and the two
  // diagonals; a direction with scale 0 is not used.
  void (&spatial_loss)(Map dr, double* loss, Map r, const float* gain, float weight,
                       const float* scale, bool huber, int y, int x, int width, int height,
                       int full_width, int channels);
  // For each pixel n of row y and each offset d: out[x][d] = scale[d] * exp(-|I(n) - I(n + d)|^2 /
  // (2 sigma^2)), or 0 if n + d is outside the picture. out is [width][count], image (I) is
  // [height][width][3].
  void (&affinity)(float* out, const float* image, const Offset* offsets, const float* scale,
                   int count, float sigma, int y, int height, int width);
  // The residual objective of the run that starts at (y, x). Writes dz = the gradient of guide loss
  // + lambda * pair loss by the scores z, where p = softmax(z). Returns the pair loss. Maps start
  // at the picture's first pixel. Each offset d in `offsets` is followed by -d; affinity is
  // [height][width][count]; mass [height][width] is the sum of target over the channels.
  double (&residual_loss)(Map dz, Map p, Map target, const float* mass, const float* affinity,
                          const Offset* offsets, int count, float lambda, int y, int x, int width,
                          int height, int full_width, int channels);
  // v = momentum * v + dw, then w -= lr * v. w, v and dw are [n].
  void (&sgd)(float* w, float* v, const float* dw, size_t n, float lr, float momentum);

  // The rest belongs to the guided filter (guided_filter.cpp). Column sums are float64 planes
  // [features][pitch].

  // planes[c * pitch + x] = row[x][c]; bytes_to_planes divides by 255.
  void (&to_planes)(float* planes, ptrdiff_t pitch, const float* row, int width, int channels);
  void (&bytes_to_planes)(float* planes, ptrdiff_t pitch, const uint8_t* row, int width,
                          int channels);
  // column += sign * the features of a row. guidance and values are planes [channels][width] of the
  // row. The features are, in this order: guidance [g], guidance products [g (g + 1) / 2], values
  // [k], guidance times values [g][k].
  void (&add_products)(double* column, ptrdiff_t pitch, const float* guidance, const float* values,
                       double sign, int width, int guidance_channels, int classes);
  // column += sign * planes. planes is [features][width].
  void (&add_planes)(double* column, ptrdiff_t pitch, const float* planes, double sign, int width,
                     int features);
  // sums[f][x] = the sum of column[f * pitch + j] for j = x + 1 ... x + 2 radius + 1. state
  // [features] is the sum before x = 0 and becomes the sum of the last pixel. sums is
  // [features][kWindows], width is at most kWindows. A radius of 1 to 3 neither reads nor changes
  // state.
  void (&window_sums)(double* sums, double* state, const double* column, ptrdiff_t pitch,
                      int radius, int width, int features);
  // Writes the coefficients a and b of each window, planes out [guidance_channels +
  // 1][classes][pitch], from the window sums of the features of add_products and share [width] = 1
  // / the window's area.
  void (&solve)(float* out, ptrdiff_t pitch, const double* sums, const double* share, double eps,
                int width, int guidance_channels, int classes);
  // out[f * pitch + x] = sums[f][x] * share[x].
  void (&window_means)(float* out, ptrdiff_t pitch, const double* sums, const double* share,
                       int width, int features);
  // values[x][k] = the sum over g of rows[g][k][x] * guidance[g][x], plus
  // rows[guidance_channels][k][x], for one row of pixels. rows and guidance are planes that can be
  // read kPad floats past their end.
  void (&apply)(float* values, const float* rows, ptrdiff_t pitch, const float* guidance,
                ptrdiff_t guidance_pitch, int width, int guidance_channels, int classes);
  // As apply, for the rows of a band, with interpolated coefficients. Rows of values are `row`
  // floats apart.
  void (&apply_band)(float* values, ptrdiff_t row, const Band& band, int width,
                     int guidance_channels, int classes);
  // labels = the class with the largest value of apply_band, of equal values the first; confidence
  // = that value cut to [0, 1]. Rows are `row` elements apart. guidance_channels is 0 or 3.
  void (&upsample_band)(int32_t* labels, float* confidence, ptrdiff_t row, const Band& band,
                        int width, int guidance_channels, int classes);
  // out[n] = the sum over i < count of weights[i] * rows[i]; blend_byte_rows divides by 255.
  void (&blend_rows)(float* out, const float* const* rows, const float* weights, int count,
                     size_t n);
  void (&blend_byte_rows)(float* out, const uint8_t* const* rows, const float* weights, int count,
                          size_t n);
  // out [width][3] = the mean over `pixels` neighbours in each of `count` rows, divided by 255. A
  // row is [width * pixels][3]. pixels * count is at most kMeans.
  void (&mean_colours)(float* out, const uint8_t* const* rows, int count, int pixels, int width);
  // out[x] = the sum over i of weights[begin[x] + i] * row[first[x] + i], over the begin[x + 1] -
  // begin[x] >= 1 pixels of `row` that pixel x < width of out covers. A pixel has `channels`
  // floats. row can be read one float past its end.
  void (&blend_pixels)(float* out, const float* row, const int* first, const int* begin,
                       const float* weights, int width, int channels);

  // The rest belongs to the dense CRF (dense_crf.cpp, lattice.h). A row of pixels or points has
  // `width` floats: the classes, rounded up to a multiple of 4.

  // For kTile pixels with features [dims][kTile], dims 2 or 5: the simplex of the lattice that
  // contains the pixel. corner [dims][kTile] is the coordinates of its corner 0, divided by dims +
  // 1; order [dims + 1][kTile] is the coordinates by the size of the pixel's distance to corner 0,
  // the largest first; weight [dims + 1][kTile] is the pixel's barycentric coordinates.
  void (&crf_simplex)(int32_t* corner, int32_t* order, float* weight, const float* features,
                      int dims);
  // values [points][width]: the row of each point = the sum of weights[i] * row members[i] of q,
  // over the point's members; the last one is stored as ~member. The n members are those of all
  // points of `values`. Rows of q are `stride` floats apart.
  void (&crf_splat)(float* values, const float* q, ptrdiff_t stride, const int32_t* members,
                    const float* weights, size_t n, int width);
  // In each run of points in `chain`, adds to each row of values [points][width] half of the row
  // before and of the row behind it. The last point of a run is stored as ~point. The n points are
  // whole runs.
  void (&crf_blur)(float* values, const int32_t* chain, size_t n, int width);
  // unary [count][width] = log(max(probabilities [count][classes], floor)), and kNever behind
  // the classes; q [count][width] = softmax(unary). scratch has 2 * kGroup * padded(classes)
  // floats.
  void (&crf_start)(float* q, float* unary, const float* probabilities, float floor, int count,
                    int classes, float* scratch);
  // q [pixels][width] = softmax(unary + the message), where the message is the weighted sum of
  // `count` slices, or with a compatibility [classes][width], the sum over classes j of
  // -compatibility[j] times this sum of class j. scratch has 2 * kGroup * padded(classes) floats.
  void (&crf_update)(float* q, const float* unary, const Slice* slices, int count,
                     const float* compatibility, int pixels, int classes, float* scratch);
};

// Returns the table of the isa "base", "avx2" or "avx512"; null if the name is another one or if
// this machine cannot run the isa.
const Kernels* find_kernels(const char* name);
// Returns the table that the environment variable SEG_ISA names; if SEG_ISA is unset or empty, the
// fastest one. Throws std::runtime_error if SEG_ISA names no usable table.
const Kernels& default_kernels();
// Writes the names of the usable tables, the slowest first, and returns their number.
int usable_kernels(const char* names[4]);

// The tables. A program may call the kernels of a table only if the machine runs its isa.
const Kernels* base_kernels();
const Kernels* avx2_kernels();
const Kernels* avx512_kernels();

}  // namespace seg
