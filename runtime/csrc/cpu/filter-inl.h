// The guided filter's work on rows: plain loops over pixels that the compiler turns into vectors of
// this target. Sums are float64, because a window is the difference of two long sums.

inline void to_planes(float* __restrict planes, const float* __restrict row, int width,
                      int channels) {
  for (int c = 0; c < channels; ++c)
    for (int x = 0; x < width; ++x) planes[(ptrdiff_t)c * width + x] = row[x * channels + c];
}

// Features of a pixel, in order: guide [g], guide products [g (g + 1) / 2], values [k],
// guide times values [g][k].
inline void add_products(double* column, ptrdiff_t pitch, const float* guide, const float* values,
                         double sign, int width, int guide_channels, int classes) {
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
  for (int i = 0; i < guide_channels; ++i) add(guide + i * plane);
  for (int i = 0; i < guide_channels; ++i)
    for (int j = i; j < guide_channels; ++j) add_product(guide + i * plane, guide + j * plane);
  for (int k = 0; k < classes; ++k) add(values + k * plane);
  for (int i = 0; i < guide_channels; ++i)
    for (int k = 0; k < classes; ++k) add_product(guide + i * plane, values + k * plane);
}

inline void add_planes(double* column, ptrdiff_t pitch, const float* planes, double sign, int width,
                       int features) {
  for (int f = 0; f < features; ++f) {
    double* __restrict out = column + f * pitch;
    const float* __restrict a = planes + (ptrdiff_t)f * width;
    for (int x = 0; x < width; ++x) out[x] += sign * a[x];
  }
}

// A sum waits for the one before it: four features at a time hide that.
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

inline void window_sums(double* sums, double* state, const double* column, ptrdiff_t pitch,
                        int radius, int width, int features) {
  const ptrdiff_t reach = 2 * (ptrdiff_t)radius + 1;
  int f = 0;
  for (; f + 4 <= features; f += 4)
    slide_windows<4>(sums + f * kWindows, state + f, column + f * pitch + reach, column + f * pitch,
                     pitch, width);
  for (; f < features; ++f)
    slide_windows<1>(sums + f * kWindows, state + f, column + f * pitch + reach, column + f * pitch,
                     pitch, width);
}

// a = (covariance of the guide + eps)^-1 cov(guide, value), b = mean(value) - a . mean(guide).
inline void solve(float* out, ptrdiff_t pitch, const double* sums, const double* __restrict share,
                  double eps, int width, int guide_channels, int classes) {
  const double* value = sums + kWindows * (guide_channels == 1 ? 2 : 9);
  const double* cross = value + kWindows * classes;
  if (guide_channels == 1) {
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

inline void window_means(float* __restrict out, const double* __restrict sums,
                         const double* __restrict share, int width, int features) {
  for (int x = 0; x < width; ++x)
    for (int f = 0; f < features; ++f) *out++ = (float)(sums[f * kWindows + x] * share[x]);
}

inline void apply(float* values, const float* coefficients, const float* guide, int width,
                  int guide_channels, int classes) {
  for (int x = 0; x < width; ++x, values += classes, guide += guide_channels) {
    const float* c = coefficients + (ptrdiff_t)x * (guide_channels + 1) * classes;
    for (int k = 0; k < classes; ++k) values[k] = c[guide_channels * classes + k];
    for (int g = 0; g < guide_channels; ++g)
      for (int k = 0; k < classes; ++k) values[k] += c[g * classes + k] * guide[g];
  }
}

inline void apply_low(float* values, const float* coefficients, const float* guide,
                      const int32_t* left, const float* weight, int low_width, int width,
                      int guide_channels, int classes) {
  const ptrdiff_t pixel = (ptrdiff_t)(guide_channels + 1) * classes;
  for (int x = 0; x < width; ++x, values += classes, guide += guide_channels) {
    const float* c0 = coefficients + left[x] * pixel;
    const float* c1 = left[x] + 1 < low_width ? c0 + pixel : c0;
    const float w1 = weight[x], w0 = 1.0f - w1;
    if (classes == 1) {  // the compiler's vectors are over classes
      float v = w0 * c0[guide_channels] + w1 * c1[guide_channels];
      for (int g = 0; g < guide_channels; ++g) v += (w0 * c0[g] + w1 * c1[g]) * guide[g];
      values[0] = v;
      continue;
    }
    const ptrdiff_t last = guide_channels * classes;
    for (int k = 0; k < classes; ++k) values[k] = w0 * c0[last + k] + w1 * c1[last + k];
    for (int g = 0; g < guide_channels; ++g) {
      const float *a = c0 + g * classes, *b = c1 + g * classes;
      for (int k = 0; k < classes; ++k) values[k] += (w0 * a[k] + w1 * b[k]) * guide[g];
    }
  }
}

inline void lift(int32_t* labels, float* confidence, const float* coefficients,
                 const uint8_t* guide, const int32_t* left, const float* weight, int low_width,
                 int width, int guide_channels, int classes) {
  const ptrdiff_t pixel = (ptrdiff_t)(guide_channels + 1) * classes;
  for (int x = 0; x < width; ++x, guide += guide_channels) {
    const float* c0 = coefficients + left[x] * pixel;
    const float* c1 = left[x] + 1 < low_width ? c0 + pixel : c0;
    const float w1 = weight[x], w0 = 1.0f - w1;
    float best = -3.0e38f;
    int label = 0;
    for (int k0 = 0; k0 < classes; k0 += 64) {  // 64 classes at a time on the stack
      const int n = classes - k0 < 64 ? classes - k0 : 64;
      float value[64];
      for (int k = 0; k < n; ++k) {
        const ptrdiff_t i = guide_channels * classes + k0 + k;
        value[k] = w0 * c0[i] + w1 * c1[i];
      }
      for (int g = 0; g < guide_channels; ++g) {
        const float level = guide[g] * (1.0f / 255);
        const float s0 = w0 * level, s1 = w1 * level;
        const ptrdiff_t i = g * classes + k0;
        for (int k = 0; k < n; ++k) value[k] += s0 * c0[i + k] + s1 * c1[i + k];
      }
      for (int k = 0; k < n; ++k) {
        if (value[k] > best) {
          best = value[k];
          label = k0 + k;
        }
      }
    }
    labels[x] = label;
    confidence[x] = best < 0.0f ? 0.0f : best > 1.0f ? 1.0f : best;
  }
}

#define SEG_TABLE(target, lanes)                                                                  \
  {                                                                                               \
#target, lanes, target::conv3, target::conv3_dw, target::conv, target::conv_dw, target::sums, \
        target::moments, target::normalize, target::bn_sums, target::bn_backward, target::argmax, \
        target::softmax, target::cross_entropy, target::cluster_loss, target::spatial_loss,       \
        target::affinity, target::residual_loss, target::sgd, target::to_planes,                  \
        target::add_products, target::add_planes, target::window_sums, target::solve,             \
        target::window_means, target::apply, target::apply_low, target::lift                      \
  }
