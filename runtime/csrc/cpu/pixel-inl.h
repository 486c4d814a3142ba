// The refinement's kernels that are not convolutions: batch norm, soft-max, the losses and the
// update. kernels.h describes each of them.
//
// A kernel computes the sum of its run and then adds it to the caller's sum: short sums have
// smaller rounding errors.

// Implements Kernels::sums.
inline void sums(float* sum, Map x, int width, int channels) {
  for (int c = 0; c < vectors(channels) * kLanes; c += kLanes) {
    Vec s = Vec{};
    for (int i = 0; i < width; ++i) s += load(x.at(0, i) + c);
    store(sum + c, load(sum + c) + s);
  }
}

// Implements Kernels::moments.
inline void moments(float* sum, float* square, const float* reference, Map x, int width,
                    int channels) {
  for (int c = 0; c < vectors(channels) * kLanes; c += kLanes) {
    const Vec r = load(reference + c);
    Vec s = Vec{}, q = Vec{};
    for (int i = 0; i < width; ++i) {
      const Vec d = load(x.at(0, i) + c) - r;
      s += d;
      q += d * d;
    }
    store(sum + c, load(sum + c) + s);
    store(square + c, load(square + c) + q);
  }
}

// Implements Kernels::normalize.
inline void normalize(Map out, Map x, Affine norm, int width, int channels) {
  for (int c = 0; c < vectors(channels) * kLanes; c += kLanes) {
    const Vec mean = load(norm.mean + c), scale = load(norm.scale + c),
              shift = load(norm.shift + c);
    for (int i = 0; i < width; ++i)
      store(out.at(0, i) + c, (load(x.at(0, i) + c) - mean) * scale + shift);
  }
}

// Implements Kernels::bn_sums.
inline void bn_sums(float* ddy, float* ddx, Map dy, Map x, const float* mean, int width,
                    int channels) {
  for (int c = 0; c < vectors(channels) * kLanes; c += kLanes) {
    const Vec m = load(mean + c);
    Vec s = Vec{}, q = Vec{};
    for (int i = 0; i < width; ++i) {
      const Vec d = load(dy.at(0, i) + c);
      s += d;
      q += d * (load(x.at(0, i) + c) - m);
    }
    store(ddy + c, load(ddy + c) + s);
    store(ddx + c, load(ddx + c) + q);
  }
}

// Implements Kernels::bn_backward.
inline void bn_backward(Map dx, float* sum, Map dy, Map x, const float* mean, const float* scale,
                        const float* a, const float* b, int width, int channels, bool relu) {
  for (int c = 0; c < vectors(channels) * kLanes; c += kLanes) {
    const Vec m = load(mean + c), s = load(scale + c), ac = load(a + c), bc = load(b + c);
    Vec total = Vec{};
    for (int i = 0; i < width; ++i) {
      const Vec xc = load(x.at(0, i) + c);
      Vec r = s * (load(dy.at(0, i) + c) - ac - (xc - m) * bc);
      if (relu) r = zero_unless(xc > Vec{}, r);
      store(dx.at(0, i) + c, r);
      total += r;
    }
    store(sum + c, load(sum + c) + total);
  }
}

// Returns the largest of z [n]. n is a multiple of kLanes.
SEG_INLINE float largest(const float* z, int n) {
  Vec m = load(z);
  for (int c = kLanes; c < n; c += kLanes) m = max(m, load(z + c));
  return max(m);
}

// Implements Kernels::argmax.
inline void argmax(int32_t* labels, Map scores, int width, int channels) {
  for (int i = 0; i < width; ++i) {
    const float* z = scores.at(0, i);
    const float m = largest(z, vectors(channels) * kLanes);
    int c = 0;
    while (c < channels - 1 && z[c] != m) ++c;
    labels[i] = c;
  }
}

// Implements Kernels::softmax.
inline void softmax(Map p, float* lse, Map z, int width, int channels) {
  const int n = vectors(channels) * kLanes;
  for (int i = 0; i < width; ++i) {
    const float* s = z.at(0, i);
    float* o = p.at(0, i);
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

// Implements Kernels::prior.
inline void prior(Map logs, Map target, float* mass, const float* q, const float* class_weight,
                  float smallest, int width, int classes) {
  const int padded = vectors(classes) * kLanes;
  IntVec lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
  for (int x = 0; x < width; ++x, q += classes) {
    float *u = logs.at(0, x), *t = target.at(0, x);
    for (int c = 0; c < padded; c += kLanes) {
      Vec p = {};
      if ((ptrdiff_t)(width - x) * classes >= c + kLanes)  // otherwise a load reads past q
        p = zero_unless(lane < classes - c, load(q + c));
      else
        for (int k = c; k < classes; ++k) p[k - c] = q[k];
      const Vec l = log(max(p, splat(smallest)));
      store(u + c, lane < classes - c ? l : splat(kNever));
      store(t + c, p);
    }
    const Vec confidence = splat(largest(t, padded));
    Vec total = {};
    for (int c = 0; c < padded; c += kLanes) {
      const Vec weighted = confidence * load(class_weight + c) * load(t + c);
      store(t + c, weighted);
      total += weighted;
    }
    mass[x] = sum(total);
  }
}

// Implements Kernels::cross_entropy.
inline double cross_entropy(Map z, const float* lse, Map target, int width, int channels) {
  Vec total = Vec{};
  for (int i = 0; i < width; ++i)
    for (int c = 0; c < vectors(channels) * kLanes; c += kLanes)
      total += load(target.at(0, i) + c) * (lse[i] - load(z.at(0, i) + c));
  return sum(total);
}

// Implements Kernels::cluster_loss.
inline void cluster_loss(Map dr, double* losses, Map r, const int32_t* labels, const int32_t* hard,
                         const float* soft, int guide_classes, const int32_t* table,
                         float self_weight, float guide_weight, int width, int channels) {
  const int n = vectors(channels) * kLanes;
  double similarity = 0, guide = 0;
  for (int i = 0; i < width; ++i) {
    const float* s = r.at(0, i);
    float* d = dr.at(0, i);
    const float m = s[labels[i]];  // the largest score: labels are the arg max
    Vec total = Vec{};
    for (int c = 0; c < n; c += kLanes) {
      const Vec e = exp(load(s + c) - m);
      store(d + c, e);
      total += e;
    }
    const float t = sum(total), log_t = std::log(t);
    float mass = 0;  // the sum of the guide's probabilities at this pixel
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

// Returns |d|; with huber, 0.5 d^2 where |d| < 1 and |d| - 0.5 elsewhere.
SEG_INLINE Vec penalty(Vec d, bool huber) {
  const Vec a = abs(d);
  return huber ? (a < splat(1.0f) ? 0.5f * d * d : a - 0.5f) : a;
}
// Returns the derivative of penalty() by d.
SEG_INLINE Vec penalty_slope(Vec d, bool huber) {
  if (huber) return min(max(d, splat(-1.0f)), splat(1.0f));
  return zero_unless(d > Vec{}, splat(1.0f)) - zero_unless(d < Vec{}, splat(1.0f));
}

// Implements Kernels::spatial_loss.
inline void spatial_loss(Map dr, double* loss, Map r, const float* gain, float weight,
                         const float* scale, bool huber, int y, int x, int width, int height,
                         int full_width, int channels) {
  Vec total = Vec{};
  for (int i = x; i < x + width; ++i) {
    const float *here = r.at(y, i), *ahead[4], *behind[4];
    for (int k = 0; k < 4; ++k) {  // outside the picture: the pixel itself, so the difference is 0
      const Offset o = kSpatialNeighbours[k];
      const int y1 = y + o.dy, x1 = i + o.dx, y0 = y - o.dy, x0 = i - o.dx;
      ahead[k] = y1 < height && x1 >= 0 && x1 < full_width ? r.at(y1, x1) : here;
      behind[k] = y0 >= 0 && x0 >= 0 && x0 < full_width ? r.at(y0, x0) : here;
    }
    float* d = dr.at(y, i);
    for (int c = 0; c < vectors(channels) * kLanes; c += kLanes) {
      const Vec s = load(here + c), g = load(gain + c);
      Vec slope = Vec{};
      for (int k = 0; k < 4; ++k) {
        if (scale[k] == 0) continue;
        const Vec e = (load(ahead[k] + c) - s) * g, f = (s - load(behind[k] + c)) * g;
        total += scale[k] * penalty(e, huber);
        slope += scale[k] * (penalty_slope(f, huber) - penalty_slope(e, huber));
      }
      store(d + c, load(d + c) + weight * slope);
    }
  }
  *loss += sum(total);
}

// Implements Kernels::affinity.
inline void affinity(float* out, const float* image, const Offset* offsets, const float* scale,
                     int count, float sigma, int y, int height, int width) {
  const float k = -0.5f / (sigma * sigma);
  const ptrdiff_t n = (ptrdiff_t)width * count;
  for (int d = 0; d < count; ++d) {
    const int y1 = y + offsets[d].dy;
    for (int i = 0; i < width; ++i) {
      const int x1 = i + offsets[d].dx;
      out[(ptrdiff_t)i * count + d] = kNever;
      if (y1 < 0 || y1 >= height || x1 < 0 || x1 >= width) continue;
      const float* a = image + ((ptrdiff_t)y * width + i) * 3;
      const float* b = image + ((ptrdiff_t)y1 * width + x1) * 3;
      const float red = a[0] - b[0], green = a[1] - b[1], blue = a[2] - b[2];
      out[(ptrdiff_t)i * count + d] = k * (red * red + green * green + blue * blue);
    }
  }
  ptrdiff_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(out + i, exp(load(out + i)));
  for (; i < n; ++i) out[i] = std::exp(out[i]);
  for (int x = 0; x < width; ++x)
    for (int d = 0; d < count; ++d) out[(ptrdiff_t)x * count + d] *= scale[d];
}

// Implements Kernels::residual_loss.
inline double residual_loss(Map dz, Map p, Map target, const float* mass, const float* affinity,
                            const Offset* offsets, int count, float lambda, int y, int x, int width,
                            int height, int full_width, int channels) {
  const int n = vectors(channels) * kLanes;
  int reach = 0;
  for (int k = 0; k < count; ++k) {
    const Offset o = offsets[k];
    reach = o.dy > reach ? o.dy : o.dx > reach ? o.dx : reach;
  }
  double pair = 0;
  for (int i = x; i < x + width; ++i) {
    const ptrdiff_t here = (ptrdiff_t)y * full_width + i;
    const float *pn = p.at(y, i), *t = target.at(y, i), *e = affinity + here * count;
    float* d = dz.at(y, i);
    const bool inside = y >= reach && y + reach < height && i >= reach && i + reach < full_width;
    // d = the gradient of the pair loss by p; inner = the sum over the channels of d * p.
    Vec inner = Vec{};
    float all = 0;  // the sum of the affinities of this pixel
    for (int k = 0; k < count; ++k) all += e[k];
    for (int c = 0; c < n; c += kLanes) {
      Vec s = Vec{};
      for (int k = 0; k < count; ++k) {
        const Offset o = offsets[k];
        if (!inside &&
            (y + o.dy < 0 || y + o.dy >= height || i + o.dx < 0 || i + o.dx >= full_width))
          continue;
        s -= e[k] * load(pn + o.dy * p.pitch + o.dx * p.stride + c);
      }
      store(d + c, s);
      inner += s * load(pn + c);
    }
    const float in = sum(inner), m = mass[here];
    pair += all + in;
    for (int c = 0; c < n; c += kLanes) {
      const Vec pc = load(pn + c);
      store(d + c, (m * pc - load(t + c)) + lambda * pc * (load(d + c) - in));
    }
  }
  return 0.5 * pair;  // every pair was counted twice
}

// Implements Kernels::sgd.
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
