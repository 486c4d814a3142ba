// 3x3 and 1x1 convolution, forward and both gradients, as small matrix products.
//
// Every one of them is  out[p][:] += sum over k of a[p, k] * b[k][:]  with P rows of out held in
// registers: forward, p is a pixel, k an input channel of one tap; for the weight gradient, p is
// an input channel and k a pixel. The input gradient is a forward pass with the kernel turned.

// Rows p that fit the registers beside V vectors of b and one of a.
constexpr int tile_rows(int v) {
  return SEG_REGISTERS == 32 ? (v == 4 ? 6 : v == 3 ? 8 : v == 2 ? 12 : 14) : (v == 2 ? 6 : 10);
}
enum { kTileVectors = SEG_REGISTERS == 32 ? 4 : 2 };

// Where the operands lie: a[p, k] of tap t is a[tap[t] + p * a_row + k * a_depth], b[k] of tap t is
// b + (t * depth + k) * b_depth, out[p] is out + p * out_row.
struct Product {
  float* out;
  const float* a;
  const float* b;
  const float* bias;  // or null
  const float* add;   // laid out like out, or null
  const ptrdiff_t* tap;
  ptrdiff_t out_row, a_row, a_depth, b_depth, add_row;
  int taps, depth;
  bool relu;
};

template <int P, int V>
SEG_INLINE void product_tile(const Product& g, ptrdiff_t p0, ptrdiff_t v0) {
  Vec acc[P][V];
  for (int p = 0; p < P; ++p)
    for (int v = 0; v < V; ++v) acc[p][v] = Vec{};
  const float* b = g.b + v0;
  for (int t = 0; t < g.taps; ++t) {
    const float* a = g.a + g.tap[t] + p0 * g.a_row;
    for (int k = 0; k < g.depth; ++k, a += g.a_depth, b += g.b_depth) {
      Vec bv[V];
#pragma GCC unroll 16
      for (int v = 0; v < V; ++v) bv[v] = load(b + v * kLanes);
#pragma GCC unroll 16
      for (int p = 0; p < P; ++p) {
        const Vec av = splat(a[p * g.a_row]);
#pragma GCC unroll 16
        for (int v = 0; v < V; ++v) acc[p][v] += av * bv[v];
      }
    }
  }
  for (int p = 0; p < P; ++p) {
    for (int v = 0; v < V; ++v) {
      const ptrdiff_t column = v0 + v * kLanes;
      Vec r = acc[p][v];
      if (g.bias) r += load(g.bias + column);
      if (g.add) r += load(g.add + (p0 + p) * g.add_row + column);
      if (g.relu) r = max(r, Vec{});
      store(g.out + (p0 + p) * g.out_row + column, r);
    }
  }
}

template <int V>
inline void product_columns(const Product& g, int rows, ptrdiff_t v0) {
  constexpr int P = tile_rows(V);
  int p = 0;
  for (; p + P <= rows; p += P) product_tile<P, V>(g, p, v0);
  for (; p + 4 <= rows; p += 4) product_tile<4, V>(g, p, v0);
  for (; p < rows; ++p) product_tile<1, V>(g, p, v0);
}

// All rows, all columns; columns in equal shares of at most kTileVectors vectors.
inline void product(const Product& g, int rows, int columns) {
  int left = vectors(columns);
  ptrdiff_t v0 = 0;
  for (int shares = (left + kTileVectors - 1) / kTileVectors; shares > 0; --shares) {
    const int v = (left + shares - 1) / shares;
    if (v == 1) product_columns<1>(g, rows, v0);
    if (v == 2) product_columns<2>(g, rows, v0);
#if SEG_REGISTERS == 32
    if (v == 3) product_columns<3>(g, rows, v0);
    if (v == 4) product_columns<4>(g, rows, v0);
#endif
    left -= v;
    v0 += v * kLanes;
  }
}

inline void conv(Map out, Map in, const float* w, const float* bias, Map add, int y, int width,
                 int kernel, int in_channels, int channels, bool relu) {
  ptrdiff_t tap[9] = {0};
  if (kernel == 3)
    for (int t = 0; t < 9; ++t) tap[t] = (t / 3 - 1) * in.pitch + (t % 3 - 1) * in.stride;
  const Product g = {
      out.row(y), in.row(y),       w,           bias, add.data ? add.row(y) : nullptr,
      tap,        out.stride,      in.stride,   1,    padded(channels),
      add.stride, kernel * kernel, in_channels, relu};
  product(g, width, channels);
}

// Pixels are taken in chunks, so that a chunk of dout stays in the first-level cache for all taps.
inline void conv_dw(float* dw, Map in, Map dout, int y, int width, int kernel, int in_channels,
                    int channels) {
  const int chunk = 64;
  const ptrdiff_t none[1] = {0};
  const ptrdiff_t row = padded(channels);
  for (int x = 0; x < width; x += chunk) {
    const int count = width - x < chunk ? width - x : chunk;
    for (int t = 0; t < kernel * kernel; ++t) {
      const int dy = kernel == 3 ? t / 3 - 1 : 0, dx = kernel == 3 ? t % 3 - 1 : 0;
      float* out = dw + t * in_channels * row;
      const Product g = {out,           in.data + (y + dy) * in.pitch + (x + dx) * in.stride,
                         dout.at(y, x), nullptr,
                         out,           none,
                         row,           1,
                         in.stride,     dout.stride,
                         row,           1,
                         count,         false};
      product(g, in_channels, channels);
    }
  }
}
