// The guided filter's per-row work: plain loops over channels that the compiler turns into vectors
// of this target. Sums are float64, because a window is the difference of two long sums.

// Features of a pixel, in order: guide [g], guide products [g (g + 1) / 2], values [k],
// guide times values [g][k].
inline void add_products(double* column, const float* guide, const float* values, double sign,
                         int width, int guide_channels, int classes) {
  for (int x = 0; x < width; ++x) {
    const float* g = guide + (ptrdiff_t)x * guide_channels;
    const float* v = values + (ptrdiff_t)x * classes;
    for (int i = 0; i < guide_channels; ++i) *column++ += sign * g[i];
    for (int i = 0; i < guide_channels; ++i)
      for (int j = i; j < guide_channels; ++j) *column++ += sign * ((double)g[i] * g[j]);
    for (int k = 0; k < classes; ++k) column[k] += sign * v[k];
    column += classes;
    for (int i = 0; i < guide_channels; ++i, column += classes) {
      const double s = sign * g[i];
      for (int k = 0; k < classes; ++k) column[k] += s * v[k];
    }
  }
}

inline void add_row(double* column, const float* row, double sign, size_t n) {
  for (size_t i = 0; i < n; ++i) column[i] += sign * row[i];
}

// a = (covariance of the guide + eps)^-1 cov(guide, value), b = mean(value) - a . mean(guide).
inline void solve(float* out, const double* sums, double area, double eps, int guide_channels,
                  int classes) {
  const double scale = 1.0 / area;
  double mean[3], cov[6];
  for (int i = 0; i < guide_channels; ++i) mean[i] = sums[i] * scale;
  const double* product = sums + guide_channels;
  int n = 0;
  for (int i = 0; i < guide_channels; ++i)
    for (int j = i; j < guide_channels; ++j, ++n)
      cov[n] = product[n] * scale - mean[i] * mean[j] + (i == j ? eps : 0.0);
  const double* value = product + n;
  const double* cross = value + classes;
  if (guide_channels == 1) {
    for (int k = 0; k < classes; ++k) {
      const double v = value[k] * scale;
      const double a = (cross[k] * scale - mean[0] * v) / cov[0];
      out[k] = (float)a;
      out[classes + k] = (float)(v - a * mean[0]);
    }
    return;
  }
  // Inverse of the symmetric [[c0 c1 c2] [c1 c3 c4] [c2 c4 c5]] by cofactors.
  const double i0 = cov[3] * cov[5] - cov[4] * cov[4], i1 = cov[2] * cov[4] - cov[1] * cov[5],
               i2 = cov[1] * cov[4] - cov[2] * cov[3], i3 = cov[0] * cov[5] - cov[2] * cov[2],
               i4 = cov[1] * cov[2] - cov[0] * cov[4], i5 = cov[0] * cov[3] - cov[1] * cov[1];
  const double inv = 1.0 / (cov[0] * i0 + cov[1] * i1 + cov[2] * i2);
  for (int k = 0; k < classes; ++k) {
    const double v = value[k] * scale;
    const double r = cross[k] * scale - mean[0] * v, g = cross[classes + k] * scale - mean[1] * v,
                 b = cross[2 * classes + k] * scale - mean[2] * v;
    const double ar = (i0 * r + i1 * g + i2 * b) * inv, ag = (i1 * r + i3 * g + i4 * b) * inv,
                 ab = (i2 * r + i4 * g + i5 * b) * inv;
    out[k] = (float)ar;
    out[classes + k] = (float)ag;
    out[2 * classes + k] = (float)ab;
    out[3 * classes + k] = (float)(v - ar * mean[0] - ag * mean[1] - ab * mean[2]);
  }
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
        target::affinity, target::residual_loss, target::sgd, target::add_products,               \
        target::add_row, target::solve, target::apply, target::lift                               \
  }
