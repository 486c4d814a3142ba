// Guided filter: float64 column sums slide down a block of rows, window sums slide along each row.
#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "../filter.h"
#include "memory.h"
#include "parallel.h"

namespace seg {
namespace {

constexpr int kBlocks = 16;  // of rows, whatever the threads: same answer on any number of them

// Window sums of rows [begin, end). add(column, pitch, y, sign) adds or takes away row y of the
// column sums, emit(y, x, width, sums, share) gets the sums of a run of windows and 1 / their
// areas.
template <class Add, class Emit>
void slide(int height, int width, int radius, int features, int begin, int end, const Kernels& k,
           const Add& add, const Emit& emit) {
  const int r = radius;
  const ptrdiff_t pitch = ptrdiff_t{width} + 2 * r + 1;  // zeros around: r + 1 before, r behind
  std::vector<double> column(pitch * features, 0.0), state(features), share(width);
  std::vector<double> sums(static_cast<size_t>(features) * kWindows);
  int first = std::max(begin - r, 0), last = first - 1;  // rows in the column sums
  for (int y = begin; y < end; ++y) {
    while (last < std::min(y + r, height - 1)) add(column.data() + r + 1, pitch, ++last, 1.0);
    while (first < y - r) add(column.data() + r + 1, pitch, first++, -1.0);
    for (int x = 0; x < width; ++x) {
      const int columns = std::min(x + r, width - 1) - std::max(x - r, 0) + 1;
      share[x] = 1.0 / (static_cast<double>(last - first + 1) * columns);
    }
    for (int f = 0; f < features; ++f) {
      const double* c = column.data() + f * pitch + r + 1;
      state[f] = std::accumulate(c, c + std::min(r, width), 0.0);
    }
    for (int x = 0; x < width; x += kWindows) {
      const int n = std::min(kWindows, width - x);
      k.window_sums(sums.data(), state.data(), column.data() + x, pitch, r, n, features);
      emit(y, x, n, sums.data(), share.data() + x);
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

// Both passes; emit(y, x, n, coefficients) gets those of a run, [n][guide_channels + 1][classes].
template <class Emit>
void filter(const float* guide, const float* values, int height, int width, int guide_channels,
            int classes, int radius, double eps, int threads, const Kernels& k, const Emit& emit) {
  const int g = guide_channels, features = (g + 1) * classes;
  const int r = std::min(radius, std::max(height, width));
  const size_t row = static_cast<size_t>(features) * width;
  // a and b of each window, before their own mean: planes, row by row.
  const Memory raw = allocate(row * height);
  parallel_for(threads, kBlocks, [&](int block) {
    std::vector<float> planes(static_cast<size_t>(g + classes) * width);
    float* const second = planes.data() + static_cast<size_t>(g) * width;
    slide(
        height, width, r, g + g * (g + 1) / 2 + classes + g * classes, block_begin(block, height),
        block_begin(block + 1, height), k,
        [&](double* column, ptrdiff_t pitch, int y, double sign) {
          const size_t n = static_cast<size_t>(y) * width;
          k.to_planes(planes.data(), guide + n * g, width, g);
          k.to_planes(second, values + n * classes, width, classes);
          k.add_products(column, pitch, planes.data(), second, sign, width, g, classes);
        },
        [&](int y, int x, int n, const double* sums, const double* share) {
          k.solve(raw.get() + y * row + x, width, sums, share, eps, n, g, classes);
        });
  });
  parallel_for(threads, kBlocks, [&](int block) {
    std::vector<float> run(static_cast<size_t>(features) * kWindows);
    slide(
        height, width, r, features, block_begin(block, height), block_begin(block + 1, height), k,
        [&](double* column, ptrdiff_t pitch, int y, double sign) {
          k.add_planes(column, pitch, raw.get() + y * row, sign, width, features);
        },
        [&](int y, int x, int n, const double* sums, const double* share) {
          k.window_means(run.data(), sums, share, n, features);
          emit(y, x, n, run.data());
        });
  });
}

}  // namespace

void guided_coefficients(float* coefficients, const float* guide, const float* values, int height,
                         int width, int guide_channels, int classes, int radius, double eps,
                         int threads, const Kernels& k) {
  const size_t pixel = static_cast<size_t>(guide_channels + 1) * classes;
  filter(guide, values, height, width, guide_channels, classes, radius, eps, threads, k,
         [&](int y, int x, int n, const float* run) {
           std::copy_n(run, n * pixel, coefficients + (static_cast<size_t>(y) * width + x) * pixel);
         });
}

void guided_filter(float* out, const float* guide, const float* values, int height, int width,
                   int guide_channels, int classes, int radius, double eps, int threads,
                   const Kernels& k) {
  filter(guide, values, height, width, guide_channels, classes, radius, eps, threads, k,
         [&](int y, int x, int n, const float* run) {
           const size_t first = static_cast<size_t>(y) * width + x;
           k.apply(out + first * classes, run, guide + first * guide_channels, n, guide_channels,
                   classes);
         });
}

void apply_coefficients(float* values, const float* coefficients, const float* guide,
                        int low_height, int low_width, int height, int width, int guide_channels,
                        int classes, int threads, const Kernels& k) {
  const size_t pixel = static_cast<size_t>(guide_channels + 1) * classes;
  const Positions py(height, low_height), px(width, low_width);
  parallel_for(threads, kBlocks, [&](int block) {
    std::vector<float> low_row(pixel * low_width);
    for (int y = block_begin(block, height); y < block_begin(block + 1, height); ++y) {
      mix_rows(low_row.data(), coefficients, pixel * low_width, low_height, py.low[y],
               py.weight[y]);
      const size_t first = static_cast<size_t>(y) * width;
      k.apply_low(values + first * classes, low_row.data(), guide + first * guide_channels,
                  px.low.data(), px.weight.data(), low_width, width, guide_channels, classes);
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
