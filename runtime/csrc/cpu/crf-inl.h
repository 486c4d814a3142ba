// The dense CRF's kernels. kernels.h describes each of them. A pixel or point of the lattice has a
// row of floats, one for each class; its length is a multiple of 4. A kernel works on pieces of at
// most kPiece floats, which are kept in registers.

enum { kPiece = 32 };

#if SEG_LANES > 4
typedef float Vec4 __attribute__((vector_size(16)));
typedef float UnalignedVec4 __attribute__((vector_size(16), aligned(4), may_alias));
#endif
#if SEG_LANES > 8
typedef float Vec8 __attribute__((vector_size(32)));
typedef float UnalignedVec8 __attribute__((vector_size(32), aligned(4), may_alias));
#endif

// A piece of W floats, W a multiple of 4: full vectors, then one of 8 and one of 4 floats if
// needed.
template <int W>
struct Piece {
  enum { kFull = W / kLanes, kEight = kLanes > 8 && W % 16 >= 8, kFour = kLanes > 4 && W % 8 >= 4 };
  Vec full[kFull > 0 ? kFull : 1];
#if SEG_LANES > 8
  Vec8 eight;
#endif
#if SEG_LANES > 4
  Vec4 four;
#endif

  // Sets all floats to 0.
  SEG_INLINE void clear() {
    for (int i = 0; i < kFull; ++i) full[i] = Vec{};
#if SEG_LANES > 8
    if (kEight) eight = Vec8{};
#endif
#if SEG_LANES > 4
    if (kFour) four = Vec4{};
#endif
  }
  // Adds weight * the W floats at p.
  SEG_INLINE void add(float weight, const float* p) {
    for (int i = 0; i < kFull; ++i) full[i] += weight * load(p + i * kLanes);
#if SEG_LANES > 8
    if (kEight) eight += weight * *(const UnalignedVec8*)(p + W / 16 * 16);
#endif
#if SEG_LANES > 4
    if (kFour) four += weight * *(const UnalignedVec4*)(p + W / 8 * 8);
#endif
  }
  // Adds weight * the piece b.
  SEG_INLINE void add(float weight, const Piece& b) {
    for (int i = 0; i < kFull; ++i) full[i] += weight * b.full[i];
#if SEG_LANES > 8
    if (kEight) eight += weight * b.eight;
#endif
#if SEG_LANES > 4
    if (kFour) four += weight * b.four;
#endif
  }
  // Writes the W floats to p.
  SEG_INLINE void write(float* p) const {
    for (int i = 0; i < kFull; ++i) store(p + i * kLanes, full[i]);
#if SEG_LANES > 8
    if (kEight) *(UnalignedVec8*)(p + W / 16 * 16) = eight;
#endif
#if SEG_LANES > 4
    if (kFour) *(UnalignedVec4*)(p + W / 8 * 8) = four;
#endif
  }
};

// Begins to load the W floats at p into the cache.
template <int W>
SEG_INLINE void prefetch(const float* p) {
  for (int i = 0; i < W; i += 16) __builtin_prefetch(p + i);
  if (W % 16 != 0) __builtin_prefetch(p + W - 1);
}

// Calls f(std::integral_constant<int, W>) for the piece of W floats.
template <class F>
SEG_INLINE void with_width(int width, const F& f) {
  switch (width / 4) {
    case 1:
      return f(std::integral_constant<int, 4>());
    case 2:
      return f(std::integral_constant<int, 8>());
    case 3:
      return f(std::integral_constant<int, 12>());
    case 4:
      return f(std::integral_constant<int, 16>());
    case 5:
      return f(std::integral_constant<int, 20>());
    case 6:
      return f(std::integral_constant<int, 24>());
    case 7:
      return f(std::integral_constant<int, 28>());
    default:
      return f(std::integral_constant<int, 32>());
  }
}

// Calls f(first float, std::integral_constant<int, W>) for all pieces of a row of `width` floats.
template <class F>
SEG_INLINE void pieces(int width, const F& f) {
  for (int c = 0; c < width; c += kPiece)
    with_width(width - c < kPiece ? width - c : kPiece, [&](auto w) { f(c, w); });
}

// Implements Kernels::crf_simplex for one number of dimensions.
template <int D>
SEG_INLINE void simplex(int32_t* corner, int32_t* order, float* weight, const float* features) {
  const float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to the nearest integer
  for (int x = 0; x < kTile; x += kLanes) {
    // The point on the hyperplane on which the sum of all D + 1 coordinates is 0.
    Vec point[D + 1], sum = Vec{};
    for (int i = D; i > 0; --i) {
      const Vec f = load(features + (i - 1) * kTile + x);
      point[i] = sum - f * (float)i;
      sum += f;
    }
    point[0] = sum;
    // The nearest point whose coordinates are multiples of D + 1, and the rest. If their sum is not
    // 0, the coordinates with the largest or the smallest rests are corrected.
    IntVec near[D + 1], rank[D + 1], excess = IntVec{};
    Vec rest[D + 1];
    for (int i = 0; i <= D; ++i) {
      const Vec t = point[i] * (1.0f / (D + 1)) + kRound;
      near[i] = (IntVec)t - 0x4b400000;  // the bits of kRound
      rest[i] = point[i] - (t - kRound) * (float)(D + 1);
      excess += near[i];
      rank[i] = IntVec{};
    }
    // Coordinates are ranked by their rests, the largest first; of equal rests the first.
    for (int i = 0; i < D; ++i) {
      for (int j = i + 1; j <= D; ++j) {
        const IntVec less = rest[i] < rest[j];  // -1 where true
        rank[i] -= less;
        rank[j] += 1 + less;
      }
    }
    for (int i = 0; i <= D; ++i) {
      rank[i] += excess;
      const IntVec low = rank[i]<0, high = rank[i]> D;
      rank[i] += ((D + 1) & low) - ((D + 1) & high);
      near[i] += high - low;
      rest[i] += __builtin_convertvector(low - high, Vec) * (float)(D + 1);
    }
    for (int i = 0; i < D; ++i) *(UnalignedIntVec*)(corner + i * kTile + x) = near[i];
    // By rank: the rest, and the coordinate.
    Vec sorted[D + 1];
    for (int r = 0; r <= D; ++r) {
      IntVec which = IntVec{};
      sorted[r] = Vec{};
      for (int i = 0; i <= D; ++i) {
        const IntVec here = rank[i] == r;
        which |= i & here;
        sorted[r] = (Vec)((IntVec)sorted[r] | ((IntVec)rest[i] & here));
      }
      *(UnalignedIntVec*)(order + r * kTile + x) = which;
    }
    // The barycentric coordinates of the point in its simplex.
    const float part = 1.0f / (D + 1);
    store(weight + x, 1.0f + (sorted[D] - sorted[0]) * part);
    for (int r = 1; r <= D; ++r)
      store(weight + r * kTile + x, (sorted[D - r] - sorted[D - r + 1]) * part);
  }
}

// Implements Kernels::crf_simplex.
inline void crf_simplex(int32_t* corner, int32_t* order, float* weight, const float* features,
                        int dims) {
  dims == 2 ? simplex<2>(corner, order, weight, features)
            : simplex<5>(corner, order, weight, features);
}

// A list of numbers marks the end of each part by ~number in place of number. plain() returns the
// number, is_end() whether it was marked.
SEG_INLINE int32_t plain(int32_t marked) { return marked ^ (marked >> 31); }
SEG_INLINE bool is_end(int32_t marked) { return marked < 0; }

// Does crf_splat() for one piece, which starts at values and q.
template <int W>
inline void splat_piece(float* values, const float* q, ptrdiff_t stride, const int32_t* members,
                        const float* weights, size_t n, ptrdiff_t width) {
  const size_t kAhead = 160;  // members: how early a row is loaded into the cache
  for (size_t i = 0; i < n; values += width) {
    Piece<W> sum;
    sum.clear();
    int32_t member;
    do {
      member = members[i];
      prefetch<W>(q + plain(members[i + kAhead < n ? i + kAhead : i]) * stride);
      sum.add(weights[i], q + plain(member) * stride);
      ++i;
    } while (!is_end(member));
    sum.write(values);
  }
}

// Implements Kernels::crf_splat.
inline void crf_splat(float* values, const float* q, ptrdiff_t stride, const int32_t* members,
                      const float* weights, size_t n, int width) {
  pieces(width, [&](int c, auto w) {
    splat_piece<w>(values + c, q + c, stride, members, weights, n, width);
  });
}

// Does crf_blur() for one piece, which starts at values.
template <int W>
inline void blur_piece(float* values, const int32_t* chain, size_t n, ptrdiff_t width) {
  const size_t kAhead = 64;  // points: how early a row is loaded into the cache
  for (size_t i = 0; i < n; ++i) {
    float* here = values + chain[i] * width;
    Piece<W> before, now;
    before.clear();
    now.clear();
    now.add(1.0f, here);
    while (!is_end(chain[i])) {
      ++i;
      prefetch<W>(values + plain(chain[i + kAhead < n ? i + kAhead : i]) * width);
      float* const there = values + plain(chain[i]) * width;
      Piece<W> next, sum = now;
      next.clear();
      next.add(1.0f, there);
      sum.add(0.5f, before);
      sum.add(0.5f, next);
      sum.write(here);
      before = now;
      now = next;
      here = there;
    }
    now.add(0.5f, before);
    now.write(here);
  }
}

// Implements Kernels::crf_blur.
inline void crf_blur(float* values, const int32_t* chain, size_t n, int width) {
  pieces(width, [&](int c, auto w) { blur_piece<w>(values + c, chain, n, width); });
}

// Writes q [n][width] = the soft-max of the n rows of z [kGroup][padded(width)], n at most kGroup.
// e is scratch memory of the size of z. All rows of z are finite.
SEG_INLINE void write_softmax(float* q, const float* z, float* e, int n, int width) {
  const int pitch = padded(width);
  Vec shift[kGroup], total[kGroup];
  for (int g = 0; g < kGroup; ++g) {
    shift[g] = load(z + g * pitch);
    for (int c = kLanes; c < width; c += kLanes) shift[g] = max(shift[g], load(z + g * pitch + c));
  }
  for (int g = 0; g < kGroup; ++g) shift[g] = every_max(shift[g]), total[g] = Vec{};
  for (int c = 0; c < width; c += kLanes) {
    for (int g = 0; g < kGroup; ++g) {
      const Vec power = exp(load(z + g * pitch + c) - shift[g]);
      store(e + g * pitch + c, power);
      total[g] += power;
    }
  }
  for (int g = 0; g < kGroup; ++g) total[g] = every_sum(total[g]);
  pieces(width, [&](int c, auto w) {
    for (int g = 0; g < n; ++g) {
      Piece<w> out;
      out.clear();
      out.add(1 / total[g][0], e + g * pitch + c);
      out.write(q + g * width + c);
    }
  });
}

// Implements Kernels::crf_start.
inline void crf_start(float* q, float* unary, const float* probabilities, float floor, int count,
                      int classes, float* scratch) {
  const int width = (classes + 3) / 4 * 4, pitch = padded(classes);
  float *const p = scratch, *const logs = p + pitch, *const is_class = logs + pitch;
  for (int c = 0; c < pitch; ++c) is_class[c] = c < classes ? 1.0f : 0.0f, p[c] = 0;
  for (int x = 0; x < count; ++x, q += width, unary += width, probabilities += classes) {
    const float* from = probabilities;
    if (ptrdiff_t{count - x} * classes <
        pitch) {  // the vectors of the last pixels end behind the array
      std::memcpy(p, from, classes * sizeof(float));
      from = p;
    }
    Vec total = Vec{};
    for (int c = 0; c < width; c += kLanes) {
      const Vec here = load(is_class + c), value = max(load(from + c), splat(floor));
      const Vec log_value = here > 0.5f ? log(value) : splat(kNever);
      store(logs + c, log_value);
      store(p + c, value * here);
      total += value * here;
    }
    const float scale = 1 / every_sum(total)[0];
    pieces(width, [&](int c, auto w) {
      Piece<w> row;
      row.clear();
      row.add(1.0f, logs + c);
      row.write(unary + c);
      row.clear();
      row.add(scale, p + c);
      row.write(q + c);
    });
  }
}

// Returns the sum of V corners of pixel x.
template <int V, int W>
SEG_INLINE Piece<W> sum_corners(const Slice& slice, ptrdiff_t x, ptrdiff_t width, int c) {
  Piece<W> sum;
  sum.clear();
  for (ptrdiff_t i = x * V; i < (x + 1) * V; ++i)
    sum.add(slice.shares[i], slice.values + slice.corners[i] * width + c);
  return sum;
}

// Implements Kernels::crf_update.
inline void crf_update(float* q, const float* unary, const Slice* slices, int count,
                       const float* compatibility, int pixels, int classes, float* scratch) {
  const int kAhead = 16;  // pixels: how early rows are loaded into the cache
  const int width = (classes + 3) / 4 * 4, pitch = padded(classes);
  float *const e = scratch + kGroup * pitch, *const messages = e;
  for (int i = 0; i < kGroup * pitch; ++i) scratch[i] = kNever;
  for (int x = 0; x < pixels; x += kGroup) {
    const int n = pixels - x < kGroup ? pixels - x : kGroup;
    pieces(width, [&](int c, auto w) {
      if (x + kAhead + kGroup <= pixels) {
        for (int s = 0; s < count; ++s) {
          const int v = slices[s].vertices;
          for (ptrdiff_t i = ptrdiff_t{x + kAhead} * v; i < ptrdiff_t{x + kAhead + kGroup} * v; ++i)
            prefetch<w>(slices[s].values + (ptrdiff_t)slices[s].corners[i] * width + c);
        }
      }
      for (int g = 0; g < n; ++g) {
        Piece<w> total;
        total.clear();
        if (compatibility == nullptr) total.add(1.0f, unary + g * width + c);
        for (int s = 0; s < count; ++s)
          total.add(slices[s].weight, slices[s].vertices == 3
                                          ? sum_corners<3, w>(slices[s], x + g, width, c)
                                          : sum_corners<6, w>(slices[s], x + g, width, c));
        total.write((compatibility == nullptr ? scratch : messages) + g * pitch + c);
      }
    });
    if (compatibility != nullptr) {
      pieces(width, [&](int c, auto w) {
        for (int g = 0; g < n; ++g) {
          Piece<w> total;
          total.clear();
          total.add(1.0f, unary + g * width + c);
          for (int j = 0; j < classes; ++j)
            total.add(-messages[g * pitch + j], compatibility + (ptrdiff_t)j * width + c);
          total.write(scratch + g * pitch + c);
        }
      });
    }
    write_softmax(q, scratch, e, n, width);
    q += n * width, unary += n * width;
  }
}
