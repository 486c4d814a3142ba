// 3x3 and 1x1 convolution, forward and both gradients, as small matrix products.
//
// Each product is  out[p][:] = sum over k of a[p, k] * b[k][:]. The rows of out are computed P at a
// time, and the sums of these P rows stay in registers. In the forward pass, p is a pixel, k is an
// input channel of one tap, and b is the weights. For the weight gradient, p is an input channel of
// one tap, k is a pixel, and b is the gradient by the output. The gradient by the input is a
// forward convolution of the gradient by the output, with the kernel turned by 180 degrees and its
// input and output channels exchanged. 3x3 convolutions of many channels use the same products in
// another basis (winograd-inl.h).

// Returns P, the number of rows whose sums fit the registers together with v vectors of b and one
// vector of a.
constexpr int tile_rows(int v) {
  return SEG_REGISTERS == 32 ? (v == 4 ? 6 : v == 3 ? 8 : v == 2 ? 12 : 14) : (v == 2 ? 6 : 10);
}
enum { kTileVectors = SEG_REGISTERS == 32 ? 4 : 2 };  // most vectors of columns of a tile

// The operands of a product. The sum runs over `taps` taps of `depth` values each. a[p, k] of tap t
// is a[tap[t] + p * a_row + k * a_depth]; b[k] of tap t starts at b + (t * depth + k) * b_depth;
// out[p] starts at out + p * out_row. bias and add are added to the sum, then relu is applied if it
// is set. Rows of out, b, bias and add have room for whole vectors (padded columns).
struct Product {
  float* out;
  const float* a;
  const float* b;
  const float* bias;  // one row, added to each row of out; or null
  const float* add;   // row p starts at add + p * add_row; or null
  const ptrdiff_t* tap;
  ptrdiff_t out_row, a_row, a_depth, b_depth, add_row;
  int taps, depth;
  bool relu;
};

// Computes one tile of out: P rows from first_row on, and of each row V vectors from first_column
// on.
template <int P, int V>
SEG_INLINE void product_tile(const Product& g, ptrdiff_t first_row, ptrdiff_t first_column) {
  Vec acc[P][V];
  for (int p = 0; p < P; ++p)
    for (int v = 0; v < V; ++v) acc[p][v] = Vec{};
  const float* b = g.b + first_column;
  for (int t = 0; t < g.taps; ++t) {
    const float* a = g.a + g.tap[t] + first_row * g.a_row;
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
      const ptrdiff_t column = first_column + v * kLanes;
      Vec r = acc[p][v];
      if (g.bias) r += load(g.bias + column);
      if (g.add) r += load(g.add + (first_row + p) * g.add_row + column);
      if (g.relu) r = max(r, Vec{});
      store(g.out + (first_row + p) * g.out_row + column, r);
    }
  }
}

// Computes V vectors of each row, from first_column on.
template <int V>
inline void product_columns(const Product& g, int rows, ptrdiff_t first_column) {
  constexpr int P = tile_rows(V);
  int p = 0;
  for (; p + P <= rows; p += P) product_tile<P, V>(g, p, first_column);
  for (; p + 4 <= rows; p += 4) product_tile<4, V>(g, p, first_column);
  for (; p + 3 <= rows; p += 3) product_tile<3, V>(g, p, first_column);
  for (; p < rows; ++p) product_tile<1, V>(g, p, first_column);
}

// Computes all rows and all columns of out. The columns are divided into groups of at most
// kTileVectors vectors, whose sizes differ by at most one vector.
inline void product(const Product& g, int rows, int columns) {
  int left = vectors(columns);
  ptrdiff_t first_column = 0;
  for (int shares = (left + kTileVectors - 1) / kTileVectors; shares > 0; --shares) {
    const int v = (left + shares - 1) / shares;
    if (v == 1) product_columns<1>(g, rows, first_column);
    if (v == 2) product_columns<2>(g, rows, first_column);
#if SEG_REGISTERS == 32
    if (v == 3) product_columns<3>(g, rows, first_column);
    if (v == 4) product_columns<4>(g, rows, first_column);
#endif
    left -= v;
    first_column += v * kLanes;
  }
}

// Implements Kernels::conv (kernels.h). For a 3x3 kernel the input pixels are contiguous
// (in.stride equals in_channels). So the three taps of a kernel row are computed as one tap of
// 3 * in_channels values.
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

// Implements Kernels::conv_dw (kernels.h) with one product for each row of the convolution's
// kernel. In it, p is one of kernel * in_channels input values, and the sum runs over the pixels.
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
