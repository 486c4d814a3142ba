// The guided filter on the CPU. In each block of rows, float64 column sums slide down the rows and
// window sums slide along each row, so the cost does not depend on the radius.
#include "guided_filter.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "memory.h"
#include "parallel.h"

namespace seg {
namespace {

constexpr int kLift = 256;  // pixels of a row that are upsampled at a time, for the cache

// Computes the window sums of the rows begin ... end - 1. add(column, pitch, y, sign) must add sign
// * the features of row y to the column sums [features][pitch]. emit(y, x, n, sums, share) is
// called for each run of n windows with their sums [features][kWindows] and share [n] = 1 / the
// windows' areas.
template <class Add, class Emit>
void slide(int height, int width, int radius, int features, int begin, int end, const Kernels& k,
           const Add& add, const Emit& emit) {
  const int r = radius;
  const ptrdiff_t pitch = ptrdiff_t{width} + 2 * r + 1;  // r + 1 zeros before the row, r behind it
  std::vector<double> column(pitch * features, 0.0), state(features), share(width);
  std::vector<double> sums(static_cast<size_t>(features) * kWindows);
  int first = std::max(begin - r, 0), last = first - 1, rows = 0;  // rows in the column sums
  for (int y = begin; y < end; ++y) {
    while (last < std::min(y + r, height - 1)) add(column.data() + r + 1, pitch, ++last, 1.0);
    while (first < y - r) add(column.data() + r + 1, pitch, first++, -1.0);
    if (last - first + 1 != rows) {
      rows = last - first + 1;
      for (int x = 0; x < width; ++x) {
        const int columns = std::min(x + r, width - 1) - std::max(x - r, 0) + 1;
        share[x] = 1.0 / (static_cast<double>(rows) * columns);
      }
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

// Returns the length of an array of `width` values that can be read at least kPad values past the
// last one.
int wide(int width) { return (width + 2 * kPad) / kPad * kPad; }

// The positions of n full-size pixels among n_low low pixels: pixel i lies between low[i] and
// low[i] + 1, and weight[i] is the share of the second. Pixel centres correspond, as in OpenCV's
// INTER_LINEAR.
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

// The full-size pixels (n) under each of n_low low pixels. Low pixel i covers the pixels from
// first[i] on, with the shares share[begin[i]] ... share[begin[i + 1] - 1] of its area.
struct Shares {
  std::vector<int> first;  // [n_low]
  std::vector<int> begin;  // [n_low + 1]
  std::vector<float> share;
  Shares(int n_low, int n) : begin(1, 0) {
    const double size = static_cast<double>(n) / n_low;
    for (int i = 0; i < n_low; ++i) {
      const double low = i * size, high = low + size;
      for (int j = static_cast<int>(low); j < n && j < high; ++j) {
        const double part = std::min(high, j + 1.0) - std::max(low, static_cast<double>(j));
        if (part < 1e-6) continue;
        if (static_cast<int>(share.size()) == begin.back()) first.push_back(j);
        share.push_back(static_cast<float>(part / size));
      }
      begin.push_back(static_cast<int>(share.size()));
    }
  }
};

// The functions below choose the kernel for rows of floats or of bytes.

void to_planes(const Kernels& k, float* planes, ptrdiff_t pitch, const float* row, int width,
               int channels) {
  k.to_planes(planes, pitch, row, width, channels);
}

void to_planes(const Kernels& k, float* planes, ptrdiff_t pitch, const uint8_t* row, int width,
               int channels) {
  k.bytes_to_planes(planes, pitch, row, width, channels);
}

// Writes out [low_width][channels]: each value is the mean over `count` rows and over the width /
// low_width pixels of each row that a low pixel covers. Returns false and writes nothing if this
// fast way does not apply; for floats it never does.
bool mean(const Kernels&, float*, const float* const*, int, int, int, int) { return false; }

// The fast way sums the bytes of colours as whole numbers. It applies if each low pixel covers
// whole pixels, at most kMeans.
bool mean(const Kernels& k, float* out, const uint8_t* const* rows, int count, int low_width,
          int width, int channels) {
  const int pixels = width / low_width;
  if (channels != 3 || width % low_width || count * pixels > kMeans) return false;
  k.mean_colours(out, rows, count, pixels, low_width);
  return true;
}

void blend_rows(const Kernels& k, float* out, const float* const* rows, const float* weights,
                int count, size_t n) {
  k.blend_rows(out, rows, weights, count, n);
}

void blend_rows(const Kernels& k, float* out, const uint8_t* const* rows, const float* weights,
                int count, size_t n) {
  k.blend_byte_rows(out, rows, weights, count, n);
}

// Runs both passes of the filter. emit(y, x, n, sums, share, scratch) is called for each run of n
// pixels with the window sums of its coefficients [features][kWindows], share [n] = 1 / the
// windows' areas, and (features + guidance_channels) * kWindows floats of scratch memory.
template <class Guidance, class Emit>
void filter(const Guidance* guidance, const float* values, int height, int width,
            int guidance_channels, int classes, int radius, double eps, int threads,
            const Kernels& k, const Emit& emit) {
  const int g = guidance_channels, features = (g + 1) * classes;
  const int r = std::min(radius, std::max(height, width));
  const size_t row = static_cast<size_t>(features) * width;
  // The coefficients a and b of each window, before their mean: rows of planes [features][width].
  const Memory raw = allocate(row * height);
  parallel_for(threads, kBlocks, [&](int block) {
    std::vector<float> planes(static_cast<size_t>(g + classes) * width);
    float* const second = planes.data() + static_cast<size_t>(g) * width;
    slide(
        height, width, r, g + g * (g + 1) / 2 + classes + g * classes, block_begin(block, height),
        block_begin(block + 1, height), k,
        [&](double* column, ptrdiff_t pitch, int y, double sign) {
          const size_t n = static_cast<size_t>(y) * width;
          to_planes(k, planes.data(), width, guidance + n * g, width, g);
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

// Calls emit(index of the first pixel, band, width) for bands that together cover all full-size
// pixels. band.guidance contains the guidance of the band, as planes.
template <class Guidance, class Emit>
void upsample_bands(const float* coefficients, const Guidance* guidance, int low_height,
                    int low_width, int height, int width, int features, int guidance_channels,
                    int threads, const Kernels& k, const Emit& emit) {
  const Positions py(height, low_height), px(width, low_width);
  const int g = guidance_channels;
  const size_t row = static_cast<size_t>(features) * low_width;
  // Rows of coefficients are read kPad floats past their end. Behind a row is the next row; the
  // last few rows are copied to memory with kPad more floats.
  const int few = static_cast<int>(std::min<size_t>(low_height, (kPad + row - 1) / row));
  const int whole = low_height - few;
  std::vector<float> last(coefficients + whole * row, coefficients + low_height * row);
  last.resize(few * row + kPad);
  parallel_for(threads, kBlocks, [&](int block) {
    std::vector<float> levels(static_cast<size_t>(kBand) * g * kLift);
    const int end = block_begin(block + 1, height);
    const auto at = [&](int y) {
      return y < whole ? coefficients + y * row : last.data() + (y - whole) * row;
    };
    for (int y = block_begin(block, height); y < end;) {
      const int low = py.low[y];
      Band band = {};
      band.above = at(low), band.below = at(std::min(low + 1, low_height - 1));
      band.pitch = low_width;
      band.guidance = levels.data(), band.guidance_pitch = kLift;
      const int first = y;
      for (; y < end && py.low[y] == low && band.rows < kBand; ++y)
        band.share[band.rows++] = py.weight[y];
      for (int x = 0; x < width; x += kLift) {
        const int n = std::min(kLift, width - x);
        band.left = px.low.data() + x, band.weight = px.weight.data() + x;
        for (int r = 0; r < band.rows; ++r)
          to_planes(k, levels.data() + static_cast<size_t>(r) * g * kLift, kLift,
                    guidance + (static_cast<size_t>(first + r) * width + x) * g, n, g);
        emit(static_cast<size_t>(first) * width + x, band, n);
      }
    }
  });
}

}  // namespace

void guided_coefficients(float* coefficients, const float* guidance, const float* values,
                         int height, int width, int guidance_channels, int classes, int radius,
                         double eps, int threads, const Kernels& k) {
  const int features = (guidance_channels + 1) * classes;
  filter(guidance, values, height, width, guidance_channels, classes, radius, eps, threads, k,
         [&](int y, int x, int n, const double* sums, const double* share, float*) {
           k.window_means(coefficients + static_cast<size_t>(y) * features * width + x, width, sums,
                          share, n, features);
         });
}

template <class Guidance>
void guided_filter(float* out, const Guidance* guidance, const float* values, int height, int width,
                   int guidance_channels, int classes, int radius, double eps, int threads,
                   const Kernels& k) {
  const int g = guidance_channels, features = (g + 1) * classes;
  filter(guidance, values, height, width, g, classes, radius, eps, threads, k,
         [&](int y, int x, int n, const double* sums, const double* share, float* run) {
           float* const levels = run + static_cast<size_t>(features) * kWindows;
           const size_t first = static_cast<size_t>(y) * width + x;
           k.window_means(run, kWindows, sums, share, n, features);
           to_planes(k, levels, kWindows, guidance + first * g, n, g);
           k.apply(out + first * classes, run, kWindows, levels, kWindows, n, g, classes);
         });
}

template <class Guidance>
void apply_coefficients(float* values, const float* coefficients, const Guidance* guidance,
                        int low_height, int low_width, int height, int width, int guidance_channels,
                        int classes, int threads, const Kernels& k) {
  upsample_bands(coefficients, guidance, low_height, low_width, height, width,
                 (guidance_channels + 1) * classes, guidance_channels, threads, k,
                 [&](size_t first, const Band& band, int n) {
                   k.apply_band(values + first * classes, static_cast<ptrdiff_t>(width) * classes,
                                band, n, guidance_channels, classes);
                 });
}

void joint_upsample(int32_t* labels, float* confidence, const float* coefficients,
                    const uint8_t* guidance, int low_height, int low_width, int height, int width,
                    int guidance_channels, int classes, int threads, const Kernels& k) {
  upsample_bands(coefficients, guidance, low_height, low_width, height, width,
                 (guidance_channels + 1) * classes, guidance_channels, threads, k,
                 [&](size_t first, const Band& band, int n) {
                   k.upsample_band(labels + first, confidence + first, width, band, n,
                                   guidance_channels, classes);
                 });
}

template <class T>
void shrink(float* out, const T* picture, int low_height, int low_width, int height, int width,
            int channels, int threads, const Kernels& k) {
  const size_t row = static_cast<size_t>(width) * channels;
  const Shares py(low_height, height), px(low_width, width);
  parallel_for(threads, kBlocks, [&](int block) {
    std::vector<float> sum(row + 1);
    std::vector<const T*> rows;
    for (int y = block_begin(block, low_height); y < block_begin(block + 1, low_height); ++y) {
      rows.clear();
      for (int i = 0; i < py.begin[y + 1] - py.begin[y]; ++i)
        rows.push_back(picture + (py.first[y] + i) * row);
      float* const means = out + static_cast<size_t>(y) * low_width * channels;
      const int count = static_cast<int>(rows.size());
      if (height % low_height == 0 &&
          mean(k, means, rows.data(), count, low_width, width, channels))
        continue;
      blend_rows(k, sum.data(), rows.data(), py.share.data() + py.begin[y], count, row);
      k.blend_pixels(means, sum.data(), px.first.data(), px.begin.data(), px.share.data(),
                     low_width, channels);
    }
  });
}

template void guided_filter(float*, const float*, const float*, int, int, int, int, int, double,
                            int, const Kernels&);
template void guided_filter(float*, const uint8_t*, const float*, int, int, int, int, int, double,
                            int, const Kernels&);
template void apply_coefficients(float*, const float*, const float*, int, int, int, int, int, int,
                                 int, const Kernels&);
template void apply_coefficients(float*, const float*, const uint8_t*, int, int, int, int, int, int,
                                 int, const Kernels&);
template void shrink(float*, const float*, int, int, int, int, int, int, const Kernels&);
template void shrink(float*, const uint8_t*, int, int, int, int, int, int, const Kernels&);

}  // namespace seg
