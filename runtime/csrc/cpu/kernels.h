// The CPU kernels: one table per instruction set, chosen once.
//
// A kernel works on one picture row, runs on one thread and allocates nothing. Feature maps are
// channels-last; a pixel's channels start at a multiple of 16 floats and the channels that pad it
// are zero (or, in scores, so negative that no soft-max sees them).
#pragma once

#include <cstddef>
#include <cstdint>

namespace seg {

// Pixel (y, x) starts at data + y * pitch + x * stride. A map that feeds a 3x3 convolution has a
// border of one zero pixel around it; data then points inside the border.
struct Map {
  float* data = nullptr;
  ptrdiff_t pitch = 0;   // floats from row to row
  ptrdiff_t stride = 0;  // floats from pixel to pixel

  float* row(int y) const { return data + y * pitch; }
  float* at(int y, int x) const { return data + y * pitch + x * stride; }
};

constexpr int kPad = 16;          // the lanes of the widest target
constexpr float kNever = -1e30f;  // the score of a channel that pads a pixel

inline int padded(int channels) { return (channels + kPad - 1) / kPad * kPad; }

// One term of the pair loss: pixel n with pixel n + (dy, dx).
struct Offset {
  int dy, dx;
};

struct Kernels {
  const char* name;
  int lanes;

  // out = (relu)(conv(in, w) + bias + add). w is [kernel * kernel][in_channels][padded(channels)],
  // bias is [padded(channels)] or null, add is a map like out (and may be out) or null.
  void (*conv)(Map out, Map in, const float* w, const float* bias, Map add, int y, int width,
               int kernel, int in_channels, int channels, bool relu);
  // dw += the gradient of row y: dw is [kernel * kernel][in_channels][padded(channels)].
  void (*conv_dw)(float* dw, Map in, Map dout, int y, int width, int kernel, int in_channels,
                  int channels);
  // sum[c] = sum over the row of x.
  void (*row_sum)(float* sum, Map x, int y, int width, int channels);
  // mean[c] of the row and m2[c] = sum of (x - mean)^2.
  void (*row_moments)(float* mean, float* m2, Map x, int y, int width, int channels);
  // out = (x - mean) * scale + shift.
  void (*normalize)(Map out, Map x, const float* mean, const float* scale, const float* shift,
                    int y, int width, int channels);
  // ddy[c] = sum of dy, ddx[c] = sum of dy * (x - mean), over the row.
  void (*bn_sums)(float* ddy, float* ddx, Map dy, Map x, const float* mean, int y, int width,
                  int channels);
  // dx = scale * (dy - a - (x - mean) * b), and zero where relu and x <= 0. dx may be dy.
  void (*bn_backward)(Map dx, Map dy, Map x, const float* mean, const float* scale, const float* a,
                      const float* b, int y, int width, int channels, bool relu);
  // labels[x] = the first channel with the largest score.
  void (*argmax)(int32_t* labels, Map scores, int y, int width, int channels);
  // p = softmax(z), lse[x] = log(sum(exp(z))). lse may be null; p may be z.
  void (*softmax)(Map p, float* lse, Map z, int y, int width, int channels);
  // Cross-entropy of the scores r to their own labels, and to the guide mapped by table.
  // hard (guide labels of the row, -1 = unknown) or soft (guide probabilities of the row,
  // [width][guide_classes]) or neither. dr is written; losses[0] += similarity, [1] += guide.
  void (*cluster_loss)(Map dr, double* losses, Map r, const int32_t* labels, const int32_t* hard,
                       const float* soft, int guide_classes, const int32_t* table,
                       float self_weight, float guide_weight, int y, int width, int channels);
  // Adds the gradient of weight * sum over directions of mean h(difference) to dr, and the
  // unweighted value to *loss. scale[4] = 1 / (pairs * channels): down, right, the two diagonals
  // (0 = direction not used).
  void (*spatial_loss)(Map dr, double* loss, Map r, float weight, const float* scale, bool huber,
                       int y, int height, int width, int channels);
  // affinity[x] = exp(-|I_n - I_n+d|^2 / (2 sigma^2)) * scale, 0 where n + d is outside.
  void (*affinity)(float* affinity, const float* image, Offset d, float sigma, float scale, int y,
                   int height, int width);
  // dz of the residual objective: guide and pair loss through the soft-max. affinity is
  // [offsets][height][width]. losses[0] += guide, losses[1] += pair.
  void (*residual_loss)(Map dz, double* losses, Map p, Map z, const float* lse, Map q,
                        const float* confidence, const float* class_weight, const float* affinity,
                        const Offset* offsets, int offset_count, float guide_weight, float lambda,
                        int y, int height, int width, int channels);
  // v = momentum * v + dw, w -= lr * v.
  void (*sgd)(float* w, float* v, const float* dw, size_t n, float lr, float momentum);

  // Guided filter, see guided_filter.cpp. column[width][features] in float64.
  void (*add_products)(double* column, const float* guide, const float* values, double sign,
                       int width, int guide_channels, int classes);
  void (*add_row)(double* column, const float* row, double sign, size_t n);
  // From the window sums of one pixel (features of add_products) to its coefficients
  // [guide_channels + 1][classes].
  void (*solve)(float* coefficients, const double* sums, double area, double eps,
                int guide_channels, int classes);
  // values = sum over g of coefficients[g] * guide[g] + coefficients[last] for one row whose
  // coefficients are [width][guide_channels + 1][classes].
  void (*apply)(float* values, const float* coefficients, const float* guide, int width,
                int guide_channels, int classes);
  // The same with low-resolution coefficients of one row, already interpolated in y, and an uint8
  // guide: interpolates in x, keeps the best class only. left[x] and weight[x] say where.
  void (*lift)(int32_t* labels, float* confidence, const float* coefficients, const uint8_t* guide,
               const int32_t* left, const float* weight, int low_width, int width,
               int guide_channels, int classes);
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
