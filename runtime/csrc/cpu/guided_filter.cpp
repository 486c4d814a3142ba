// Guided filter: float64 column sums slide down a block of rows, window sums slide along each row.
#include <algorithm>
#include <cmath>
#include <vector>

#include "../filter.h"
#include "parallel.h"

namespace seg {
namespace {

constexpr int kBlocks = 16;  // of rows, whatever the threads: same answer on any number of them

struct Windows {
  int height, width, radius;
  size_t features;  // per pixel
};

// Calls add(column, y, sign) to add or take away row y, and emit(y, x, window sums, area) for every
// pixel of rows [begin, end).
template <class Add, class Emit>
void slide(const Windows& w, int begin, int end, const Add& add, const Emit& emit) {
  std::vector<double> column(w.features * w.width, 0.0), window(w.features);
  const int r = w.radius;
  int first = std::max(begin - r, 0), last = first - 1;  // rows in the column sums
  for (int y = begin; y < end; ++y) {
    while (last < std::min(y + r, w.height - 1)) add(column.data(), ++last, 1.0);
    while (first < y - r) add(column.data(), first++, -1.0);
    std::fill(window.begin(), window.end(), 0.0);
    int left = 0, right = -1;  // columns in the window
    for (int x = 0; x < w.width; ++x) {
      while (right < std::min(x + r, w.width - 1)) {
        const double* c = column.data() + w.features * ++right;
        for (size_t f = 0; f < w.features; ++f) window[f] += c[f];
      }
      while (left < x - r) {
        const double* c = column.data() + w.features * left++;
        for (size_t f = 0; f < w.features; ++f) window[f] -= c[f];
      }
      emit(y, x, window.data(), static_cast<double>(last - first + 1) * (right - left + 1));
    }
  }
}

int block_begin(int block, int rows) { return static_cast<int>(int64_t{rows} * block / kBlocks); }

// Where full-resolution pixel i lies among n_low pixels: between low and low + 1, weight of the
// second. Pixel centres correspond, as in OpenCV's INTER_LINEAR.
void position(int i, int n, int n_low, int32_t* low, float* weight) {
  const double p = std::clamp((i + 0.5) * n_low / n - 0.5, 0.0, n_low - 1.0);
  *low = static_cast<int32_t>(p);
  *weight = static_cast<float>(p - *low);
}

struct Positions {
  std::vector<int32_t> low;
  std::vector<float> weight;
  Positions(int n, int n_low) : low(n), weight(n) {
    for (int i = 0; i < n; ++i) position(i, n, n_low, &low[i], &weight[i]);
  }
};

// out = the coefficient row that lies at row y of the full picture.
void mix_rows(float* out, const float* coefficients, size_t row, int low_height, int low,
              float weight) {
  const float* a = coefficients + low * row;
  const float* b = low + 1 < low_height ? a + row : a;
  for (size_t i = 0; i < row; ++i) out[i] = a[i] + weight * (b[i] - a[i]);
}

}  // namespace

void guided_coefficients(float* coefficients, const float* guide, const float* values, int height,
                         int width, int guide_channels, int classes, int radius, double eps,
                         int threads, const Kernels& k) {
  const int g = guide_channels;
  const size_t pixel = static_cast<size_t>(g + 1) * classes, row = pixel * width;
  std::vector<float> raw(row * height);  // a and b of each window, before their own mean
  const Windows products{height, width, radius,
                         static_cast<size_t>(g + g * (g + 1) / 2 + classes + g * classes)};
  parallel_for(threads, kBlocks, [&](int block) {
    slide(
        products, block_begin(block, height), block_begin(block + 1, height),
        [&](double* column, int y, double sign) {
          k.add_products(column, guide + static_cast<size_t>(y) * width * g,
                         values + static_cast<size_t>(y) * width * classes, sign, width, g,
                         classes);
        },
        [&](int y, int x, const double* sums, double area) {
          k.solve(raw.data() + y * row + x * pixel, sums, area, eps, g, classes);
        });
  });
  const Windows means{height, width, radius, pixel};
  parallel_for(threads, kBlocks, [&](int block) {
    slide(
        means, block_begin(block, height), block_begin(block + 1, height),
        [&](double* column, int y, double sign) {
          k.add_row(column, raw.data() + y * row, sign, row);
        },
        [&](int y, int x, const double* sums, double area) {
          float* out = coefficients + y * row + x * pixel;
          for (size_t i = 0; i < pixel; ++i) out[i] = static_cast<float>(sums[i] / area);
        });
  });
}

void apply_coefficients(float* values, const float* coefficients, const float* guide,
                        int low_height, int low_width, int height, int width, int guide_channels,
                        int classes, int threads, const Kernels& k) {
  const size_t pixel = static_cast<size_t>(guide_channels + 1) * classes;
  const bool same = low_height == height && low_width == width;
  const Positions py(height, low_height), px(width, low_width);
  parallel_for(threads, kBlocks, [&](int block) {
    std::vector<float> low_row(pixel * low_width), full_row(same ? 0 : pixel * width);
    for (int y = block_begin(block, height); y < block_begin(block + 1, height); ++y) {
      const float* row = coefficients + y * pixel * width;
      if (!same) {
        mix_rows(low_row.data(), coefficients, pixel * low_width, low_height, py.low[y],
                 py.weight[y]);
        for (int x = 0; x < width; ++x)
          mix_rows(full_row.data() + x * pixel, low_row.data(), pixel, low_width, px.low[x],
                   px.weight[x]);
        row = full_row.data();
      }
      k.apply(values + static_cast<size_t>(y) * width * classes, row,
              guide + static_cast<size_t>(y) * width * guide_channels, width, guide_channels,
              classes);
    }
  });
}

void lift(int32_t* labels, float* confidence, const float* coefficients, const uint8_t* guide,
          int low_height, int low_width, int height, int width, int guide_channels, int classes,
          int threads, const Kernels& k) {
  const size_t row = static_cast<size_t>(guide_channels + 1) * classes * low_width;
  const Positions py(height, low_height), px(width, low_width);
  parallel_for(threads, kBlocks, [&](int block) {
    std::vector<float> low_row(row);
    for (int y = block_begin(block, height); y < block_begin(block + 1, height); ++y) {
      mix_rows(low_row.data(), coefficients, row, low_height, py.low[y], py.weight[y]);
      const size_t first = static_cast<size_t>(y) * width;
      k.lift(labels + first, confidence + first, low_row.data(), guide + first * guide_channels,
             px.low.data(), px.weight.data(), low_width, width, guide_channels, classes);
    }
  });
}

}  // namespace seg
