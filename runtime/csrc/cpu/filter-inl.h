// The guided filter's kernels on rows. kernels.h describes each of them. Most are plain loops that
// the compiler vectorises for the instruction set. Sums are float64, because a window's sum is the
// difference of two much larger sums.

// Implements Kernels::to_planes.
inline void to_planes(float* __restrict planes, ptrdiff_t pitch, const float* __restrict row,
                      int width, int channels) {
  int x = 0;
  if (channels == 1) {
    for (; x < width; ++x) planes[x] = row[x];
  } else if (channels == 3) {
    // Channel c of pixel i is float 3 i + c of the three vectors a, b, d. first picks the floats
    // from a and b; second completes the result with floats from d.
    IntVec first[3], second[3];
    for (int c = 0; c < 3; ++c) {
      for (int i = 0; i < kLanes; ++i) {
        const int n = 3 * i + c;
        first[c][i] = n < 2 * kLanes ? n : 0;
        second[c][i] = n < 2 * kLanes ? i : n - kLanes;
      }
    }
    for (; x + kLanes <= width; x += kLanes) {
      const float* p = row + 3 * x;
      const Vec a = load(p), b = load(p + kLanes), d = load(p + 2 * kLanes);
      for (int c = 0; c < 3; ++c)
        store(planes + c * pitch + x, pick(pick(a, b, first[c]), d, second[c]));
    }
  }
  for (int c = 0; c < channels; ++c)
    for (int i = x; i < width; ++i) planes[c * pitch + i] = row[i * channels + c];
}

// Writes levels [n] = bytes [n] / 255. Only in a function that is not inlined does the compiler use
// that the two arrays do not overlap, and vectorise the loop.
__attribute__((noinline)) inline void to_levels(float* __restrict levels,
                                                const uint8_t* __restrict bytes, size_t n) {
  for (size_t i = 0; i < n; ++i) levels[i] = bytes[i] * (1.0f / 255);
}

// Implements Kernels::bytes_to_planes.
inline void bytes_to_planes(float* planes, ptrdiff_t pitch, const uint8_t* row, int width,
                            int channels) {
  if (channels < 3) return to_levels(planes, row, (size_t)width * channels);
  if constexpr (kLanes == 4) {  // SSE2 cannot shift each lane by its own number of bits
    float pixels[3 * kRun];
    for (int x = 0; x < width; x += kRun) {
      const int n = width - x < kRun ? width - x : kRun;
      to_levels(pixels, row + 3 * (ptrdiff_t)x, 3 * n);
      to_planes(planes + x, pitch, pixels, n, 3);
    }
    return;
  }
  IntVec word[3], shift[3];  // the word that contains byte c of pixel i, and the bits before it
  for (int c = 0; c < 3; ++c) {
    for (int i = 0; i < kLanes; ++i) {
      word[c][i] = (3 * i + c) / 4;
      shift[c][i] = (3 * i + c) % 4 * 8;
    }
  }
  int x = 0;
  for (; x + kLanes <= width; x += kLanes) {
    // A load reads 4 * kLanes bytes, of which 3 * kLanes are used. Near the end of the row a load
    // starts 4 * back bytes earlier, so that it reads no byte behind the row.
    const int back = x + 2 * kLanes > width ? kLanes / 4 : 0;
    if (back > 3 * x / 4) break;
    Vec bytes;
    __builtin_memcpy(&bytes, row + 3 * (ptrdiff_t)x - 4 * back, sizeof(bytes));
    for (int c = 0; c < 3; ++c) {
      const IntVec level = (IntVec)pick(bytes, word[c] + back) >> shift[c] & 255;
      store(planes + c * pitch + x, __builtin_convertvector(level, Vec) * (1.0f / 255));
    }
  }
  for (int c = 0; c < 3; ++c)
    for (int i = x; i < width; ++i) planes[c * pitch + i] = row[3 * i + c] * (1.0f / 255);
}

// Implements Kernels::add_products.
inline void add_products(double* column, ptrdiff_t pitch, const float* guidance,
                         const float* values, double sign, int width, int guidance_channels,
                         int classes) {
  double* __restrict out = column;
  const auto add = [&](const float* __restrict a) {
    for (int x = 0; x < width; ++x) out[x] += sign * a[x];
    out += pitch;
  };
  const auto add_product = [&](const float* __restrict a, const float* __restrict b) {
    for (int x = 0; x < width; ++x) out[x] += sign * ((double)a[x] * b[x]);
    out += pitch;
  };
  const ptrdiff_t plane = width;
  for (int i = 0; i < guidance_channels; ++i) add(guidance + i * plane);
  for (int i = 0; i < guidance_channels; ++i)
    for (int j = i; j < guidance_channels; ++j)
      add_product(guidance + i * plane, guidance + j * plane);
  for (int k = 0; k < classes; ++k) add(values + k * plane);
  for (int i = 0; i < guidance_channels; ++i)
    for (int k = 0; k < classes; ++k) add_product(guidance + i * plane, values + k * plane);
}

// Implements Kernels::add_planes.
inline void add_planes(double* column, ptrdiff_t pitch, const float* planes, double sign, int width,
                       int features) {
  for (int f = 0; f < features; ++f) {
    double* __restrict out = column + f * pitch;
    const float* __restrict a = planes + (ptrdiff_t)f * width;
    for (int x = 0; x < width; ++x) out[x] += sign * a[x];
  }
}

// Writes sums [N][kWindows] by adding the column ahead and subtracting the column behind. Each sum
// depends on the one before it: N sums at a time hide the latency of the additions.
template <int N>
inline void slide_windows(double* __restrict sums, double* __restrict state,
                          const double* __restrict ahead, const double* __restrict behind,
                          ptrdiff_t pitch, int width) {
  double s[N];
  for (int j = 0; j < N; ++j) s[j] = state[j];
  for (int x = 0; x < width; ++x) {
    for (int j = 0; j < N; ++j) {
      s[j] += ahead[j * pitch + x] - behind[j * pitch + x];
      sums[j * kWindows + x] = s[j];
    }
  }
  for (int j = 0; j < N; ++j) state[j] = s[j];
}

// Writes sums [features][kWindows] by adding the 2 R + 1 columns of each window, which is faster
// for small R.
template <int R>
inline void add_windows(double* sums, const double* column, ptrdiff_t pitch, int width,
                        int features) {
  for (int f = 0; f < features; ++f, sums += kWindows, column += pitch) {
    double* __restrict out = sums;
    const double* __restrict in = column;
    for (int x = 0; x < width; ++x) {
      double s = in[x];
      for (int j = 1; j <= 2 * R; ++j) s += (in + j)[x];
      out[x] = s;
    }
  }
}

// Implements Kernels::window_sums.
inline void window_sums(double* sums, double* state, const double* column, ptrdiff_t pitch,
                        int radius, int width, int features) {
  if (radius == 1) return add_windows<1>(sums, column + 1, pitch, width, features);
  if (radius == 2) return add_windows<2>(sums, column + 1, pitch, width, features);
  if (radius == 3) return add_windows<3>(sums, column + 1, pitch, width, features);
  const ptrdiff_t reach = 2 * (ptrdiff_t)radius + 1;
  int f = 0;
  for (; f + 4 <= features; f += 4)
    slide_windows<4>(sums + f * kWindows, state + f, column + f * pitch + reach, column + f * pitch,
                     pitch, width);
  for (; f < features; ++f)
    slide_windows<1>(sums + f * kWindows, state + f, column + f * pitch + reach, column + f * pitch,
                     pitch, width);
}

// Implements Kernels::solve: a = (cov(guidance, guidance) + eps I)^-1 cov(guidance, value), b =
// mean(value) - a . mean(guidance).
inline void solve(float* out, ptrdiff_t pitch, const double* sums, const double* __restrict share,
                  double eps, int width, int guidance_channels, int classes) {
  const double* value = sums + kWindows * (guidance_channels == 1 ? 2 : 9);
  const double* cross = value + kWindows * classes;
  if (guidance_channels == 1) {
    const double* __restrict s = sums, * __restrict q = sums + kWindows;
    for (int k = 0; k < classes; ++k) {
      const double* __restrict v = value + k * kWindows, * __restrict c = cross + k * kWindows;
      float* __restrict a = out + k * pitch, * __restrict b = out + (classes + k) * pitch;
      for (int x = 0; x < width; ++x) {
        const double m = s[x] * share[x], p = v[x] * share[x];
        const double slope = (c[x] * share[x] - m * p) / (q[x] * share[x] - m * m + eps);
        a[x] = (float)slope;
        b[x] = (float)(p - slope * m);
      }
    }
    return;
  }
  // Inverse of the symmetric [[c0 c1 c2] [c1 c3 c4] [c2 c4 c5]] by cofactors.
  double mean[3][kWindows], inverse[6][kWindows];
  const double* __restrict s0 = sums, * __restrict s1 = s0 + kWindows, * __restrict s2 = s1 + kWindows;
  const double* __restrict q0 = s2 + kWindows, * __restrict q1 = q0 + kWindows, * __restrict q2 = q1 + kWindows, * __restrict q3 = q2 + kWindows, * __restrict q4 = q3 + kWindows, * __restrict q5 = q4 + kWindows;
  for (int x = 0; x < width; ++x) {
    const double n = share[x], m0 = s0[x] * n, m1 = s1[x] * n, m2 = s2[x] * n;
    const double c0 = q0[x] * n - m0 * m0 + eps, c1 = q1[x] * n - m0 * m1, c2 = q2[x] * n - m0 * m2,
                 c3 = q3[x] * n - m1 * m1 + eps, c4 = q4[x] * n - m1 * m2,
                 c5 = q5[x] * n - m2 * m2 + eps;
    const double i0 = c3 * c5 - c4 * c4, i1 = c2 * c4 - c1 * c5, i2 = c1 * c4 - c2 * c3;
    const double r = 1.0 / (c0 * i0 + c1 * i1 + c2 * i2);
    mean[0][x] = m0, mean[1][x] = m1, mean[2][x] = m2;
    inverse[0][x] = i0 * r, inverse[1][x] = i1 * r, inverse[2][x] = i2 * r;
    inverse[3][x] = (c0 * c5 - c2 * c2) * r;
    inverse[4][x] = (c1 * c2 - c0 * c4) * r;
    inverse[5][x] = (c0 * c3 - c1 * c1) * r;
  }
  for (int k = 0; k < classes; ++k) {
    const double* __restrict v = value + k * kWindows, * __restrict x0 = cross + k * kWindows, * __restrict x1 = x0 + classes * kWindows, * __restrict x2 = x1 + classes * kWindows;
    float* __restrict a0 = out + k * pitch, * __restrict a1 = a0 + classes * pitch, * __restrict a2 = a1 + classes * pitch, * __restrict b = a2 + classes * pitch;
    for (int x = 0; x < width; ++x) {
      const double n = share[x], p = v[x] * n, m0 = mean[0][x], m1 = mean[1][x], m2 = mean[2][x];
      const double r = x0[x] * n - m0 * p, g = x1[x] * n - m1 * p, l = x2[x] * n - m2 * p;
      const double ar = inverse[0][x] * r + inverse[1][x] * g + inverse[2][x] * l;
      const double ag = inverse[1][x] * r + inverse[3][x] * g + inverse[4][x] * l;
      const double ab = inverse[2][x] * r + inverse[4][x] * g + inverse[5][x] * l;
      a0[x] = (float)ar;
      a1[x] = (float)ag;
      a2[x] = (float)ab;
      b[x] = (float)(p - ar * m0 - ag * m1 - ab * m2);
    }
  }
}

// Implements Kernels::window_means.
inline void window_means(float* out, ptrdiff_t pitch, const double* sums,
                         const double* __restrict share, int width, int features) {
  for (int f = 0; f < features; ++f) {
    float* __restrict mean = out + f * pitch;
    const double* __restrict s = sums + f * kWindows;
    for (int x = 0; x < width; ++x) mean[x] = (float)(s[x] * share[x]);
  }
}

// Interpolates kLanes neighbouring pixels between low pixels. left and weight are those of the
// first pixel (Band). A picture is at least as large as its coefficients, so these pixels lie
// between the kLanes + 1 low pixels from left[0] on.
struct Between {
  SEG_INLINE Between(const int32_t* left, const float* weight)
      : low(*left), from(*(const UnalignedIntVec*)left - *left), share(load(weight)) {}
  // Returns the values of the pixels. row is a row of low pixels.
  SEG_INLINE Vec of(const float* row) const {
    const Vec a = pick(load(row + low), from), b = pick(load(row + low + 1), from);
    return a + share * (b - a);
  }
  ptrdiff_t low;
  IntVec from;
  Vec share;
};

// Writes out[r * stride] = a . guidance + b of class k, for each row r of the band and for the
// kLanes pixels from x on. G is the number of guidance channels. Interpolation along the row is
// computed once for all rows of the band.
template <int G>
SEG_INLINE void values_of(Vec* out, int stride, const Band& band, const Between& place, int x,
                          int classes, int k) {
  Vec top[G + 1], step[G + 1];
  for (int g = 0; g <= G; ++g) {
    const ptrdiff_t plane = (g * classes + k) * band.pitch;
    top[g] = place.of(band.above + plane);
    step[g] = place.of(band.below + plane) - top[g];
  }
  const float* guidance = band.guidance + x;
  for (int r = 0; r < band.rows; ++r, out += stride) {
    const float share = band.share[r];
    Vec v = top[G] + share * step[G];
    for (int g = 0; g < G; ++g, guidance += band.guidance_pitch)
      v += (top[g] + share * step[g]) * load(guidance);
    *out = v;
  }
}

// Writes four channels v [4] of kLanes pixels. The pixels are `channels` floats apart.
SEG_INLINE void store_pixels(float* values, ptrdiff_t channels, const Vec* v) {
  IntVec low, high;  // interleave the lower and the upper halves of two vectors
  for (int i = 0; i < kLanes; ++i) {
    low[i] = i / 2 + (i % 2) * kLanes;
    high[i] = low[i] + kLanes / 2;
  }
  const Vec even[2] = {pick(v[0], v[2], low), pick(v[0], v[2], high)};
  const Vec odd[2] = {pick(v[1], v[3], low), pick(v[1], v[3], high)};
  for (int half = 0; half < 2; ++half) {
    float lane[2 * kLanes];
    store(lane, pick(even[half], odd[half], low));
    store(lane + kLanes, pick(even[half], odd[half], high));
    for (int i = 0; i < kLanes / 2; ++i, values += channels)
      __builtin_memcpy(values, lane + 4 * i, 4 * sizeof(float));
  }
}

// Writes v [count], the values of `count` classes, for the first `pixels` lanes: values[i * classes
// + k] = v[k][i].
SEG_INLINE void store_some(float* values, int classes, const Vec* v, int count, int pixels) {
  if (count == 4 && pixels == kLanes) return store_pixels(values, classes, v);
  if (classes == 1 && pixels == kLanes) return store(values, v[0]);
  for (int k = 0; k < count; ++k) {
    float lane[kLanes];
    store(lane, v[k]);
    for (int i = 0; i < pixels; ++i) values[i * classes + k] = lane[i];
  }
}

// Implements Kernels::apply.
inline void apply(float* values, const float* rows, ptrdiff_t pitch, const float* guidance,
                  ptrdiff_t guidance_pitch, int width, int guidance_channels, int classes) {
  for (int x = 0; x < width; x += kLanes, values += kLanes * classes) {
    for (int k = 0; k < classes; k += 4) {
      const int some = classes - k < 4 ? classes - k : 4;
      Vec v[4];
      for (int j = 0; j < some; ++j) {
        const float* row = rows + (k + j) * pitch + x;
        v[j] = load(row + guidance_channels * classes * pitch);
        for (int g = 0; g < guidance_channels; ++g, row += classes * pitch)
          v[j] += load(row) * load(guidance + g * guidance_pitch + x);
      }
      store_some(values + k, classes, v, some, width - x < kLanes ? width - x : kLanes);
    }
  }
}

// Implements Kernels::apply_band for G channels of guidance.
template <int G>
inline void apply_band(float* values, ptrdiff_t row, const Band& band, int width, int classes) {
  for (int x = 0; x < width; x += kLanes, values += kLanes * classes) {
    const Between place(band.left + x, band.weight + x);
    for (int k = 0; k < classes; k += 4) {
      const int some = classes - k < 4 ? classes - k : 4;
      Vec v[4 * kBand];
      for (int j = 0; j < some; ++j) values_of<G>(v + j, 4, band, place, x, classes, k + j);
      for (int r = 0; r < band.rows; ++r)
        store_some(values + r * row + k, classes, v + 4 * r, some,
                   width - x < kLanes ? width - x : kLanes);
    }
  }
}

// Implements Kernels::apply_band.
inline void apply_band(float* values, ptrdiff_t row, const Band& band, int width,
                       int guidance_channels, int classes) {
  (guidance_channels == 1 ? apply_band<1> : apply_band<3>)(values, row, band, width, classes);
}

// Implements Kernels::upsample_band for G channels of guidance.
template <int G>
inline void upsample_band(int32_t* labels, float* confidence, ptrdiff_t row, const Band& band,
                          int width, int classes) {
  for (int x = 0; x < width; x += kLanes) {
    const Between place(band.left + x, band.weight + x);
    Vec best[kBand], v[kBand];
    IntVec label[kBand];
    for (int r = 0; r < band.rows; ++r) best[r] = splat(-3.0e38f), label[r] = IntVec{};
    for (int k = 0; k < classes; ++k) {
      values_of<G>(v, 1, band, place, x, classes, k);
      for (int r = 0; r < band.rows; ++r) {
        const IntVec better = v[r] > best[r];
        best[r] = better ? v[r] : best[r];
        label[r] = better ? k - IntVec{} : label[r];
      }
    }
    for (int r = 0; r < band.rows; ++r) {
      float lane[kLanes];
      store(lane, min(max(best[r], Vec{}), splat(1.0f)));
      for (int i = 0; i < kLanes && x + i < width; ++i) {
        labels[r * row + x + i] = label[r][i];
        confidence[r * row + x + i] = lane[i];
      }
    }
  }
}

// Implements Kernels::upsample_band.
inline void upsample_band(int32_t* labels, float* confidence, ptrdiff_t row, const Band& band,
                          int width, int guidance_channels, int classes) {
  (guidance_channels == 0 ? upsample_band<0> : upsample_band<3>)(labels, confidence, row, band,
                                                                 width, classes);
}

// Implements Kernels::blend_rows.
inline void blend_rows(float* out, const float* const* rows, const float* weights, int count,
                       size_t n) {
  size_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    Vec sum = {};
    for (int j = 0; j < count; ++j) sum += weights[j] * load(rows[j] + i);
    store(out + i, sum);
  }
  for (; i < n; ++i) {
    out[i] = 0;
    for (int j = 0; j < count; ++j) out[i] += weights[j] * rows[j][i];
  }
}

// Implements Kernels::blend_byte_rows.
inline void blend_byte_rows(float* out, const uint8_t* const* rows, const float* weights, int count,
                            size_t n) {
  float levels[4][kBlend];
  const float* const floats[4] = {levels[0], levels[1], levels[2], levels[3]};
  for (size_t x = 0; x < n; x += kBlend) {
    const size_t part = n - x < kBlend ? n - x : kBlend;
    for (int first = 0; first < count; first += 4) {
      const int some = count - first < 4 ? count - first : 4;
      for (int j = 0; j < some; ++j) to_levels(levels[j], rows[first + j] + x, part);
      float sum[kBlend];
      blend_rows(first ? sum : out + x, floats, weights + first, some, part);
      for (size_t i = 0; first && i < part; ++i) out[x + i] += sum[i];
    }
  }
}

// Adds bytes [n] to sums [n]. This function and the next one are not inlined, as to_levels() above.
__attribute__((noinline)) inline void add_bytes(uint16_t* __restrict sums,
                                                const uint8_t* __restrict bytes, size_t n) {
  for (size_t i = 0; i < n; ++i) sums[i] = sums[i] + bytes[i];
}

// Writes out [n] = sums [n] * share.
__attribute__((noinline)) inline void to_means(float* __restrict out,
                                               const uint16_t* __restrict sums, float share,
                                               size_t n) {
  for (size_t i = 0; i < n; ++i) out[i] = sums[i] * share;
}

// Implements Kernels::mean_colours.
inline void mean_colours(float* out, const uint8_t* const* rows, int count, int pixels, int width) {
  const float share = 1.0f / (255.0f * count * pixels);
  // One value more than the colours need, because the copy of a pixel copies four values.
  uint16_t sums[3 * kMeans + 1], means[3 * kMeans + 1];
  const int most = kMeans / pixels;
  for (int x = 0; x < width; x += most) {
    const int some = width - x < most ? width - x : most;
    const size_t n = 3 * (size_t)some * pixels, begin = 3 * (size_t)x * pixels;
    for (size_t i = 0; i <= n; ++i) sums[i] = 0;
    for (int j = 0; j < count; ++j) add_bytes(sums, rows[j] + begin, n);
    const uint16_t* at = sums;
    for (int i = 0; i < some; ++i) {
      uint64_t all = 0;  // one 16-bit sum per channel: none overflows into the next
      for (int j = 0; j < pixels; ++j, at += 3) {
        uint64_t four;
        __builtin_memcpy(&four, at, sizeof(four));
        all += four;
      }
      __builtin_memcpy(means + 3 * i, &all, sizeof(all));
    }
    to_means(out + 3 * (size_t)x, means, share, 3 * some);
  }
}

// Computes N neighbouring channels of Kernels::blend_pixels. A pixel's channels are loaded as one
// T, which may have more than N floats; only N are written. The frequent case of four pixels under
// one pixel of out has no loop.
template <class T, int N>
inline void blend_channels(float* __restrict out, const float* row, const int* first,
                           const int* begin, const float* weights, int width, int channels) {
  for (int x = 0; x < width; ++x, out += channels) {
    const float* w = weights + begin[x];
    const float* p = row + (ptrdiff_t)first[x] * channels;
    const int n = begin[x + 1] - begin[x];
    const auto at = [&](ptrdiff_t i) {
      T pixel;
      __builtin_memcpy(&pixel, p + i * channels, sizeof(T));
      return w[i] * pixel;
    };
    T sum = at(0);
    if (n == 4) {
      sum += at(1), sum += at(2), sum += at(3);
    } else {
      for (int i = 1; i < n; ++i) sum += at(i);
    }
    __builtin_memcpy(out, &sum, N * sizeof(float));
  }
}

// Implements Kernels::blend_pixels.
inline void blend_pixels(float* out, const float* row, const int* first, const int* begin,
                         const float* weights, int width, int channels) {
  typedef float Four __attribute__((vector_size(16)));
  typedef float Eight __attribute__((vector_size(32)));
  int c = 0;
  for (; c + 8 <= channels; c += 8)
    blend_channels<Eight, 8>(out + c, row + c, first, begin, weights, width, channels);
  for (; c + 3 <= channels; c += 3)
    blend_channels<Four, 3>(out + c, row + c, first, begin, weights, width, channels);
  for (; c < channels; ++c)
    blend_channels<float, 1>(out + c, row + c, first, begin, weights, width, channels);
}
