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

int wide(int width) { return (width + 2 * kPad) / kPad * kPad; }  // readable past its end

// Where full-resolution pixels lie among n_low: between low and low + 1, weight of the second.
// Pixel centres correspond, as in OpenCV's INTER_LINEAR.
struct Positions {
  std::vector<int32_t> low;
  std::vector<float> weight;
  Positions(int n, int n_low) : low(wide(n), n_low - 1), weight(wide(n)) {
    for (int i = 0; i < n; ++i) {
      const double p = std::clamp((i + 0.5) * n_low / n - 0.5, 0.0, n_low - 1.0);
      low[i] = static_cast<int32_t>(p);
      weight[i] = static_cast<float>(p - low[i]);
    }
  }
};

// The full-resolution pixels under each of n_low, and their shares of its area.
struct Shares {
  std::vector<int> begin;  // of each low pixel's in the two below, and the end
  std::vector<int> pixel;
  std::vector<float> share;
  Shares(int n_low, int n) : begin(1, 0) {
    const double size = static_cast<double>(n) / n_low;
    for (int i = 0; i < n_low; ++i) {
      const double low = i * size, high = low + size;
      for (int j = static_cast<int>(low); j < n && j < high; ++j) {
        const double part = std::min(high, j + 1.0) - std::max(low, static_cast<double>(j));
        if (part < 1e-6) continue;
        pixel.push_back(j);
        share.push_back(static_cast<float>(part / size));
      }
      begin.push_back(static_cast<int>(pixel.size()));
    }
  }
};

// Both passes; emit(y, x, n, sums, share, scratch) gets the window sums of a run's coefficients,
// and floats for them and for its guide.
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
          k.to_planes(planes.data(), width, guide + n * g, width, g);
          k.to_planes(second, width, values + n * classes, width, classes);
          k.add_products(column, pitch, planes.data(), second, sign, width, g, classes);
        },
        [&](int y, int x, int n, const double* sums, const double* share) {
          k.solve(raw.get() + y * row + x, width, sums, share, eps, n, g, classes);
        });
  });
  parallel_for(threads, kBlocks, [&](int block) {
    std::vector<float> scratch(static_cast<size_t>(features + g) * kWindows);
    slide(
        height, width, r, features, block_begin(block, height), block_begin(block + 1, height), k,
        [&](double* column, ptrdiff_t pitch, int y, double sign) {
          k.add_planes(column, pitch, raw.get() + y * row, sign, width, features);
        },
        [&](int y, int x, int n, const double* sums, const double* share) {
          emit(y, x, n, sums, share, scratch.data());
        });
  });
}

// Rows of full-size pixels with their coefficients: emit(y, rows, pitch, px, levels), where levels
// has room for the guide's planes.
template <class Emit>
void lift_rows(const float* coefficients, int low_height, int low_width, int height, int width,
               int features, int guide_channels, int threads, const Kernels& k, const Emit& emit) {
  const Positions py(height, low_height), px(width, low_width);
  const int pitch = wide(low_width + 1);
  const size_t low_row = static_cast<size_t>(features) * low_width;
  parallel_for(threads, kBlocks, [&](int block) {
    std::vector<float> rows(static_cast<size_t>(features) * pitch);
    std::vector<float> levels(static_cast<size_t>(guide_channels) * wide(width));
    for (int y = block_begin(block, height); y < block_begin(block + 1, height); ++y) {
      const float* above = coefficients + py.low[y] * low_row;
      k.mix(rows.data(), pitch, above, py.low[y] + 1 < low_height ? above + low_row : above,
            py.weight[y], low_width, features);
      emit(y, rows.data(), pitch, px, levels.data());
    }
  });
}

}  // namespace

void guided_coefficients(float* coefficients, const float* guide, const float* values, int height,
                         int width, int guide_channels, int classes, int radius, double eps,
                         int threads, const Kernels& k) {
  const int features = (guide_channels + 1) * classes;
  filter(guide, values, height, width, guide_channels, classes, radius, eps, threads, k,
         [&](int y, int x, int n, const double* sums, const double* share, float*) {
           k.window_means(coefficients + static_cast<size_t>(y) * features * width + x, width, sums,
                          share, n, features);
         });
}

void guided_filter(float* out, const float* guide, const float* values, int height, int width,
                   int guide_channels, int classes, int radius, double eps, int threads,
                   const Kernels& k) {
  const int g = guide_channels, features = (g + 1) * classes;
  filter(guide, values, height, width, g, classes, radius, eps, threads, k,
         [&](int y, int x, int n, const double* sums, const double* share, float* run) {
           float* const levels = run + static_cast<size_t>(features) * kWindows;
           const size_t first = static_cast<size_t>(y) * width + x;
           k.window_means(run, kWindows, sums, share, n, features);
           k.to_planes(levels, kWindows, guide + first * g, n, g);
           k.apply(out + first * classes, run, kWindows, levels, kWindows, nullptr, nullptr, n, g,
                   classes);
         });
}

void apply_coefficients(float* values, const float* coefficients, const float* guide,
                        int low_height, int low_width, int height, int width, int guide_channels,
                        int classes, int threads, const Kernels& k) {
  const int g = guide_channels, guide_pitch = wide(width);
  lift_rows(coefficients, low_height, low_width, height, width, (g + 1) * classes, g, threads, k,
            [&](int y, const float* rows, ptrdiff_t pitch, const Positions& px, float* levels) {
              const size_t first = static_cast<size_t>(y) * width;
              k.to_planes(levels, guide_pitch, guide + first * g, width, g);
              k.apply(values + first * classes, rows, pitch, levels, guide_pitch, px.low.data(),
                      px.weight.data(), width, g, classes);
            });
}

void lift(int32_t* labels, float* confidence, const float* coefficients, const uint8_t* guide,
          int low_height, int low_width, int height, int width, int guide_channels, int classes,
          int threads, const Kernels& k) {
  const int g = guide_channels, guide_pitch = wide(width);
  lift_rows(coefficients, low_height, low_width, height, width, (g + 1) * classes, g, threads, k,
            [&](int y, const float* rows, ptrdiff_t pitch, const Positions& px, float* levels) {
              const size_t first = static_cast<size_t>(y) * width;
              k.bytes_to_planes(levels, guide_pitch, guide + first * g, width, g);
              k.lift(labels + first, confidence + first, rows, pitch, levels, guide_pitch,
                     px.low.data(), px.weight.data(), width, g, classes);
            });
}

void shrink(float* out, const float* planes, int low_height, int low_width, int height, int width,
            int channels, int threads, const Kernels& k) {
  const size_t row = static_cast<size_t>(width) * channels;
  const Shares py(low_height, height), px(low_width, width);
  parallel_for(threads, kBlocks, [&](int block) {
    std::vector<float> sum(row);
    std::vector<const float*> rows;
    for (int y = block_begin(block, low_height); y < block_begin(block + 1, low_height); ++y) {
      rows.clear();
      for (int i = py.begin[y]; i < py.begin[y + 1]; ++i)
        rows.push_back(planes + py.pixel[i] * row);
      k.blend_rows(sum.data(), rows.data(), py.share.data() + py.begin[y],
                   static_cast<int>(rows.size()), row);
      k.blend_pixels(out + static_cast<size_t>(y) * low_width * channels, sum.data(),
                     px.begin.data(), px.pixel.data(), px.share.data(), low_width, channels);
    }
  });
}

}  // namespace seg
