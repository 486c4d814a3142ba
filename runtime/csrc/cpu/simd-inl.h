// Vectors of SEG_LANES floats, written with the compiler's vector types. Each target_*.cpp includes
// this file, through table-inl.h, inside the namespace of its instruction set. So this file has no
// include guard, includes no standard header and defines nothing outside this namespace, except
// macros.

#define SEG_INLINE inline __attribute__((always_inline))

typedef float Vec __attribute__((vector_size(SEG_LANES * 4)));
typedef int32_t IntVec __attribute__((vector_size(SEG_LANES * 4)));
typedef float UnalignedVec __attribute__((vector_size(SEG_LANES * 4), aligned(4), may_alias));
typedef int32_t UnalignedIntVec __attribute__((vector_size(SEG_LANES * 4), aligned(4), may_alias));

enum { kLanes = SEG_LANES };

// Returns the number of vectors that hold `channels` floats. The last vector may be partly used.
SEG_INLINE int vectors(int channels) { return (channels + kLanes - 1) / kLanes; }
// load and store take any address of a float; it need not be a multiple of the vector's size.
SEG_INLINE Vec load(const float* p) { return *(const UnalignedVec*)p; }
SEG_INLINE void store(float* p, Vec v) { *(UnalignedVec*)p = v; }
// Returns x in all lanes. x - 0 is x also for x = -0; x + 0 would be +0.
SEG_INLINE Vec splat(float x) { return x - Vec{}; }
// max and min return b in the lanes where a or b is NaN.
SEG_INLINE Vec max(Vec a, Vec b) { return a > b ? a : b; }
SEG_INLINE Vec min(Vec a, Vec b) { return a < b ? a : b; }
SEG_INLINE Vec abs(Vec a) { return (Vec)((IntVec)a & 0x7fffffff); }
// Returns a in the lanes where mask is set (all bits 1), 0 elsewhere.
SEG_INLINE Vec zero_unless(IntVec mask, Vec a) { return (Vec)((IntVec)a & mask); }

// Returns the vector ab[i[0]], ab[i[1]], ... where ab is the lanes of a and then the lanes of b.
SEG_INLINE Vec pick(Vec a, Vec b, IntVec i) {
#if defined(__clang__)
  Vec out;
  for (int n = 0; n < kLanes; ++n) out[n] = i[n] < kLanes ? a[i[n]] : b[i[n] - kLanes];
  return out;
#else
  return __builtin_shuffle(a, b, i);
#endif
}

// Returns the vector a[i[0]], a[i[1]], ...
SEG_INLINE Vec pick(Vec a, IntVec i) {
#if defined(__clang__)
  return pick(a, a, i);
#else
  return __builtin_shuffle(a, i);
#endif
}

// Returns the sum of all lanes.
SEG_INLINE float sum(Vec v) {
  float s[kLanes];
  store(s, v);
  for (int n = kLanes / 2; n > 0; n /= 2)
    for (int i = 0; i < n; ++i) s[i] += s[i + n];
  return s[0];
}

// Returns the largest lane.
SEG_INLINE float max(Vec v) {
  float s[kLanes];
  store(s, v);
  for (int n = kLanes / 2; n > 0; n /= 2)
    for (int i = 0; i < n; ++i) s[i] = s[i] > s[i + n] ? s[i] : s[i + n];
  return s[0];
}

// Returns in each lane the sum of all lanes; every_max() returns the largest lane. Lane i is
// combined with the lanes i ^ 1, i ^ 2, i ^ 4 and so on.
SEG_INLINE Vec every_sum(Vec v) {
  IntVec lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
  for (int n = kLanes / 2; n > 0; n /= 2) v += pick(v, lane ^ n);
  return v;
}
SEG_INLINE Vec every_max(Vec v) {
  IntVec lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
  for (int n = kLanes / 2; n > 0; n /= 2) v = max(v, pick(v, lane ^ n));
  return v;
}

// Returns exp(x) for x from -87 to 88, exactly 0 for x below -87 and for NaN, and exp(88) for x
// above 88. With x = n ln 2 + r and |r| <= ln 2 / 2, the result is 2^n exp(r). exp(r) is computed
// by its Taylor series up to r^7, whose missing terms are less than 1e-8 of exp(r). 2^n is built
// from its exponent bits.
SEG_INLINE Vec exp(Vec x) {
  const float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to the nearest integer
  const Vec y = min(max(x, splat(-87.0f)), splat(88.0f));
  const Vec t = y * 1.44269504f + kRound;
  const Vec n = t - kRound;
  const Vec r = (y - n * 0.693359375f) - n * -2.12194440e-4f;  // ln 2 in two parts
  Vec e = splat(1.0f / 5040) * r + 1.0f / 720;
  e = e * r + 1.0f / 120;
  e = e * r + 1.0f / 24;
  e = e * r + 1.0f / 6;
  e = e * r + 0.5f;
  e = e * r + 1.0f;
  e = e * r + 1.0f;
  // 0x4b400000 is the bits of kRound, so the difference of the bits is n.
  const IntVec exponent = ((IntVec)t - 0x4b400000 + 127) << 23;
  return zero_unless(x >= splat(-87.0f), e * (Vec)exponent);
}

// Returns log(x). x must be a normal number above 0. With x = 2^n m and sqrt(1/2) <= m < sqrt(2),
// the result is n ln 2 + log(m), and log(m) = 2 artanh(s) with s = (m - 1) / (m + 1), |s| < 0.172.
// artanh(s) is computed by its series up to s^9, whose missing terms are less than 3e-9 of log(m).
SEG_INLINE Vec log(Vec x) {
  const int32_t kRootHalf = 0x3f3504f3;  // the bits of sqrt(1/2)
  const IntVec bits = (IntVec)x - kRootHalf;
  const Vec m = (Vec)((bits & 0x007fffff) + kRootHalf);
  const Vec s = (m - 1.0f) / (m + 1.0f), q = s * s;
  Vec series = q * (1.0f / 9) + 1.0f / 7;
  series = series * q + 1.0f / 5;
  series = series * q + 1.0f / 3;
  return __builtin_convertvector(bits >> 23, Vec) * 0.693147181f + (2 * s + 2 * s * (q * series));
}
