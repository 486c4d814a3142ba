// 3x3 and 1x1 convolution, forward and both gradients, as small matrix products.
//
// Every one of them is  out[p][:] += sum over k of a[p, k] * b[k][:]  with P rows of out held in
// registers: forward, p is a pixel, k an input channel of one tap; for the weight gradient, p is
// an input channel and k a pixel. The input gradient is a forward pass with the kernel turned.
// 3x3 of many channels goes the same way after a change of basis, see winograd-inl.h.

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
  for (; p + 3 <= rows; p += 3) product_tile<3, V>(g, p, v0);
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

// Where pixels lie next to each other, the three taps of a row are one of three times the channels.
inline void conv(Map out, Map in, const float* w, const float* bias, Map add, int width, int kernel,
                 int in_channels, int channels, bool relu) {
  const int reach = kernel / 2;
  const ptrdiff_t tap[3] = {-reach * (in.pitch + in.stride), -reach * in.stride,
                            in.pitch - in.stride};
  const Product g = {out.data,
                     in.data,
                     w,
                     bias,
                     add.data,
                     tap,
                     out.stride,
                     in.stride,
                     1,
                     padded(channels),
                     add.stride,
                     kernel,
                     kernel * in_channels,
                     relu};
  product(g, width, channels);
}

inline void conv_dw(float* dw, Map in, Map dout, int width, int kernel, int in_channels,
                    int channels) {
  const ptrdiff_t none[1] = {0}, row = padded(channels);
  const int reach = kernel / 2, depth = kernel * in_channels;
  for (int dy = -reach; dy <= reach; ++dy, dw += depth * row) {
    const Product g = {dw, in.at(dy, -reach), dout.data,   nullptr, dw, none,  row,
                       1,  in.stride,         dout.stride, row,     1,  width, false};
    product(g, depth, channels);
  }
}
