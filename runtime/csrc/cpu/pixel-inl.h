// Everything that is not a convolution: batch norm, soft-max, the losses and the update.

inline void row_sum(float* out, Map x, int y, int width, int channels) {
  for (int v = 0; v < vectors(channels); ++v) {
    const float* p = x.row(y) + v * kLanes;
    Vec s = Vec{};
    for (int i = 0; i < width; ++i, p += x.stride) s += load(p);
    store(out + v * kLanes, s);
  }
}

inline void row_moments(float* mean, float* m2, Map x, int y, int width, int channels) {
  for (int v = 0; v < vectors(channels); ++v) {
    const float* p = x.row(y) + v * kLanes;
    Vec s = Vec{};
    for (int i = 0; i < width; ++i) s += load(p + i * x.stride);
    const Vec m = s / splat((float)width);
    Vec q = Vec{};
    for (int i = 0; i < width; ++i) {
      const Vec d = load(p + i * x.stride) - m;
      q += d * d;
    }
    store(mean + v * kLanes, m);
    store(m2 + v * kLanes, q);
  }
}

inline void normalize(Map out, Map x, const float* mean, const float* scale, const float* shift,
                      int y, int width, int channels) {
  for (int i = 0; i < width; ++i) {
    const float* p = x.at(y, i);
    float* o = out.at(y, i);
    for (int c = 0; c < vectors(channels) * kLanes; c += kLanes)
      store(o + c, (load(p + c) - load(mean + c)) * load(scale + c) + load(shift + c));
  }
}

inline void bn_sums(float* ddy, float* ddx, Map dy, Map x, const float* mean, int y, int width,
                    int channels) {
  for (int c = 0; c < vectors(channels) * kLanes; c += kLanes) {
    const float* d = dy.row(y) + c;
    const float* p = x.row(y) + c;
    const Vec m = load(mean + c);
    Vec s = Vec{}, q = Vec{};
    for (int i = 0; i < width; ++i, d += dy.stride, p += x.stride) {
      s += load(d);
      q += load(d) * (load(p) - m);
    }
    store(ddy + c, s);
    store(ddx + c, q);
  }
}

inline void bn_backward(Map dx, Map dy, Map x, const float* mean, const float* scale,
                        const float* a, const float* b, int y, int width, int channels, bool relu) {
  for (int i = 0; i < width; ++i) {
    const float* d = dy.at(y, i);
    const float* p = x.at(y, i);
    float* o = dx.at(y, i);
    for (int c = 0; c < vectors(channels) * kLanes; c += kLanes) {
      const Vec xc = load(p + c);
      Vec r = load(scale + c) * (load(d + c) - load(a + c) - (xc - load(mean + c)) * load(b + c));
      if (relu) r = zero_unless(xc > Vec{}, r);
      store(o + c, r);
    }
  }
}

SEG_INLINE float largest(const float* z, int n) {
  Vec m = load(z);
  for (int c = kLanes; c < n; c += kLanes) m = max(m, load(z + c));
  return max(m);
}

inline void argmax(int32_t* labels, Map scores, int y, int width, int channels) {
  for (int i = 0; i < width; ++i) {
    const float* z = scores.at(y, i);
    const float m = largest(z, vectors(channels) * kLanes);
    int c = 0;
    while (c < channels - 1 && z[c] != m) ++c;
    labels[i] = c;
  }
}

inline void softmax(Map p, float* lse, Map z, int y, int width, int channels) {
  const int n = vectors(channels) * kLanes;
  for (int i = 0; i < width; ++i) {
    const float* s = z.at(y, i);
    float* o = p.at(y, i);
    const float m = largest(s, n);
    Vec total = Vec{};
    for (int c = 0; c < n; c += kLanes) {
      const Vec e = exp(load(s + c) - m);
      store(o + c, e);
      total += e;
    }
    const float t = sum(total);
    for (int c = 0; c < n; c += kLanes) store(o + c, load(o + c) / splat(t));
    if (lse) lse[i] = m + std::log(t);
  }
}

inline void cluster_loss(Map dr, double* losses, Map r, const int32_t* labels, const int32_t* hard,
                         const float* soft, int guide_classes, const int32_t* table,
                         float self_weight, float guide_weight, int y, int width, int channels) {
  const int n = vectors(channels) * kLanes;
  double similarity = 0, guide = 0;
  for (int i = 0; i < width; ++i) {
    const float* s = r.at(y, i);
    float* d = dr.at(y, i);
    const float m = s[labels[i]];  // the label is the arg max
    Vec total = Vec{};
    for (int c = 0; c < n; c += kLanes) {
      const Vec e = exp(load(s + c) - m);
      store(d + c, e);
      total += e;
    }
    const float t = sum(total), log_t = std::log(t);
    float mass = 0;  // of the guide at this pixel
    if (hard) mass = hard[i] >= 0;
    if (soft)
      for (int k = 0; k < guide_classes; ++k) mass += soft[i * guide_classes + k];
    const Vec scale = splat((self_weight + guide_weight * mass) / t);
    for (int c = 0; c < n; c += kLanes) store(d + c, load(d + c) * scale);
    d[labels[i]] -= self_weight;
    similarity += log_t;
    if (hard && mass > 0) {
      const int k = table[hard[i]];
      d[k] -= guide_weight;
      guide += log_t - (s[k] - m);
    }
    if (soft) {
      for (int k = 0; k < guide_classes; ++k) {
        const float q = soft[i * guide_classes + k];
        d[table[k]] -= guide_weight * q;
        guide += q * (log_t - (s[table[k]] - m));
      }
    }
  }
  losses[0] += similarity;
  losses[1] += guide;
}

// h(d): |d| or, for Huber, 0.5 d^2 below 1 and |d| - 0.5 above; and its derivative.
SEG_INLINE Vec penalty(Vec d, bool huber) {
  const Vec a = abs(d);
  return huber ? (a < splat(1.0f) ? 0.5f * d * d : a - 0.5f) : a;
}
SEG_INLINE Vec penalty_slope(Vec d, bool huber) {
  if (huber) return min(max(d, splat(-1.0f)), splat(1.0f));
  return zero_unless(d > Vec{}, splat(1.0f)) - zero_unless(d < Vec{}, splat(1.0f));
}

inline void spatial_loss(Map dr, double* loss, Map r, float weight, const float* scale, bool huber,
                         int y, int height, int width, int channels) {
  const int dys[4] = {1, 0, 1, 1}, dxs[4] = {0, 1, 1, -1};
  double total = 0;
  for (int i = 0; i < width; ++i) {
    const float* here = r.at(y, i);
    float* d = dr.at(y, i);
    for (int k = 0; k < 4; ++k) {
      if (scale[k] == 0) continue;
      const Vec slope = splat(weight * scale[k]);
      const int y1 = y + dys[k], x1 = i + dxs[k], y0 = y - dys[k], x0 = i - dxs[k];
      if (y1 < height && x1 >= 0 && x1 < width) {
        const float* there = r.at(y1, x1);
        Vec value = Vec{};
        for (int c = 0; c < vectors(channels) * kLanes; c += kLanes) {
          const Vec e = load(there + c) - load(here + c);
          value += penalty(e, huber);
          store(d + c, load(d + c) - slope * penalty_slope(e, huber));
        }
        total += (double)sum(value) * scale[k];
      }
      if (y0 >= 0 && x0 >= 0 && x0 < width) {
        const float* there = r.at(y0, x0);
        for (int c = 0; c < vectors(channels) * kLanes; c += kLanes) {
          const Vec e = load(here + c) - load(there + c);
          store(d + c, load(d + c) + slope * penalty_slope(e, huber));
        }
      }
    }
  }
  *loss += total;
}

inline void affinity(float* out, const float* image, Offset d, float sigma, float scale, int y,
                     int height, int width) {
  const float k = -0.5f / (sigma * sigma);
  for (int i = 0; i < width; ++i) {
    out[i] = 0;
    const int y1 = y + d.dy, x1 = i + d.dx;
    if (y1 >= height || x1 < 0 || x1 >= width) continue;
    const float* a = image + ((ptrdiff_t)y * width + i) * 3;
    const float* b = image + ((ptrdiff_t)y1 * width + x1) * 3;
    const float r = a[0] - b[0], g = a[1] - b[1], l = a[2] - b[2];
    out[i] = std::exp(k * (r * r + g * g + l * l)) * scale;
  }
}

inline void residual_loss(Map dz, double* losses, Map p, Map z, const float* lse, Map q,
                          const float* confidence, const float* class_weight, const float* affinity,
                          const Offset* offsets, int offset_count, float guide_weight, float lambda,
                          int y, int height, int width, int channels) {
  const int n = vectors(channels) * kLanes;
  const ptrdiff_t plane = (ptrdiff_t)height * width;
  double guide = 0, pair = 0;
  for (int i = 0; i < width; ++i) {
    const ptrdiff_t here = (ptrdiff_t)y * width + i;
    const float* pn = p.at(y, i);
    float* d = dz.at(y, i);
    // d = the gradient of the pair loss by p; agreement = its inner product with p.
    for (int c = 0; c < n; c += kLanes) store(d + c, Vec{});
    for (int k = 0; k < offset_count; ++k) {
      const Offset o = offsets[k];
      const float* e = affinity + k * plane;
      const bool forward = y + o.dy < height && i + o.dx >= 0 && i + o.dx < width;
      const bool backward = y >= o.dy && i - o.dx >= 0 && i - o.dx < width;
      if (forward) {
        const float* there = p.at(y + o.dy, i + o.dx);
        const float ef = e[here];
        Vec dot = Vec{};
        for (int c = 0; c < n; c += kLanes) {
          const Vec t = load(there + c);
          dot += load(pn + c) * t;
          store(d + c, load(d + c) - ef * t);
        }
        pair += (double)ef * (1.0f - sum(dot));
      }
      if (backward) {
        const float* there = p.at(y - o.dy, i - o.dx);
        const float eb = e[here - o.dy * (ptrdiff_t)width - o.dx];
        for (int c = 0; c < n; c += kLanes) store(d + c, load(d + c) - eb * load(there + c));
      }
    }
    Vec inner = Vec{}, mass = Vec{}, cross = Vec{};
    for (int c = 0; c < n; c += kLanes) {
      const Vec t = load(class_weight + c) * load(q.at(y, i) + c);
      inner += load(d + c) * load(pn + c);
      mass += t;
      cross += t * (lse[here] - load(z.at(y, i) + c));
    }
    const float g = guide_weight * confidence[here], in = sum(inner), m = sum(mass);
    guide += (double)g * sum(cross);
    for (int c = 0; c < n; c += kLanes) {
      const Vec t = load(class_weight + c) * load(q.at(y, i) + c);
      const Vec pc = load(pn + c);
      store(d + c, g * (m * pc - t) + lambda * pc * (load(d + c) - in));
    }
  }
  losses[0] += guide;
  losses[1] += pair;
}

inline void sgd(float* w, float* v, const float* dw, size_t n, float lr, float momentum) {
  size_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const Vec step = momentum * load(v + i) + load(dw + i);
    store(v + i, step);
    store(w + i, load(w + i) - lr * step);
  }
  for (; i < n; ++i) {  // the last n % kLanes
    v[i] = momentum * v[i] + dw[i];
    w[i] -= lr * v[i];
  }
}
