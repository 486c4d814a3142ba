// 3x3 convolution by Winograd's F(2x2, 3x3) (Lavin and Gray, CVPR 2016): a tile of 2x2 outputs
// needs 16 products of its 4x4 inputs instead of 36. The weight gradient needs 16 as well.
//
//   out = A' [(G w G') * (B' in B)] A       dw = G' [(B' in B) * (A dout A')] G
//
// B, G and A are the matrices of the paper, ' is the transpose, * multiplies element by element.
// The tiles are computed in strips of at most kStrip, so that the transforms of a strip fit the
// second-level cache. Between the transforms are 16 matrix products of tiles x channels
// (conv-inl.h).

// Writes v [16][tiles][in.stride] = B' in B of each 4x4 tile of `in`. The top left pixel of the
// first tile is (y, x), and each further tile is two columns further right. The 16 planes are
// `plane` floats apart. With kNorm, norm is applied to the pixels. Pixels outside the picture are
// zero after the norm.
template <bool kNorm>
inline void tiles_of_input(float* v, ptrdiff_t plane, Map in, Affine norm, int y, int x, int tiles,
                           int height, int width, int channels) {
  const int n = vectors(channels) * kLanes;
  for (int t = 0; t < tiles; ++t, x += 2, v += in.stride) {
    const bool inside = y >= 0 && y + 4 <= height && x >= 0 && x + 4 <= width;
    const float* corner = in.at(y, x);
    for (int c = 0; c < n; c += kLanes) {
      Vec d[4][4], r[4][4];
      Vec mean, scale, shift;
      if (kNorm)
        mean = load(norm.mean + c), scale = load(norm.scale + c), shift = load(norm.shift + c);
#pragma GCC unroll 16
      for (int i = 0; i < 4; ++i) {
#pragma GCC unroll 16
        for (int j = 0; j < 4; ++j) {
          const bool in_picture =
              inside || (y + i >= 0 && y + i < height && x + j >= 0 && x + j < width);
          d[i][j] = Vec{};
          if (in_picture) {
            d[i][j] = load(corner + i * in.pitch + j * in.stride + c);
            if (kNorm) d[i][j] = (d[i][j] - mean) * scale + shift;
          }
        }
      }
#pragma GCC unroll 16
      for (int j = 0; j < 4; ++j) {
        r[0][j] = d[0][j] - d[2][j];
        r[1][j] = d[1][j] + d[2][j];
        r[2][j] = d[2][j] - d[1][j];
        r[3][j] = d[1][j] - d[3][j];
      }
#pragma GCC unroll 16
      for (int i = 0; i < 4; ++i) {
        store(v + (4 * i + 0) * plane + c, r[i][0] - r[i][2]);
        store(v + (4 * i + 1) * plane + c, r[i][1] + r[i][2]);
        store(v + (4 * i + 2) * plane + c, r[i][2] - r[i][1]);
        store(v + (4 * i + 3) * plane + c, r[i][1] - r[i][3]);
      }
    }
  }
}

// Writes the 2x2 pixels of `out` = A' m A + bias, then relu if asked, for each tile of m
// [16][tiles][padded(channels)], whose planes are `plane` floats apart. Pixels outside the picture
// are not written.
inline void tiles_to_output(Map out, const float* m, ptrdiff_t plane, const float* bias, bool relu,
                            int y, int x, int tiles, int height, int width, int channels) {
  const int n = vectors(channels) * kLanes;
  for (int t = 0; t < tiles; ++t, x += 2, m += padded(channels)) {
    for (int c = 0; c < n; c += kLanes) {
      Vec r[2][4];
#pragma GCC unroll 16
      for (int j = 0; j < 4; ++j) {
        const Vec a = load(m + j * plane + c), b = load(m + (4 + j) * plane + c),
                  d = load(m + (8 + j) * plane + c), e = load(m + (12 + j) * plane + c);
        r[0][j] = a + b + d;
        r[1][j] = b - d - e;
      }
      const Vec add = bias ? load(bias + c) : Vec{};
      for (int i = 0; i < 2 && y + i < height; ++i) {
        Vec left = r[i][0] + r[i][1] + r[i][2] + add, right = r[i][1] - r[i][2] - r[i][3] + add;
        if (relu) left = max(left, Vec{}), right = max(right, Vec{});
        store(out.at(y + i, x) + c, left);
        if (x + 1 < width) store(out.at(y + i, x + 1) + c, right);
      }
    }
  }
}

// Writes z [16][tiles][dout.stride] = A dout A' of the 2x2 pixels of each tile. Pixels outside the
// picture are zero.
inline void tiles_of_gradient(float* z, ptrdiff_t plane, Map dout, int y, int x, int tiles,
                              int height, int width, int channels) {
  const int n = vectors(channels) * kLanes;
  for (int t = 0; t < tiles; ++t, x += 2, z += dout.stride) {
    const bool down = y + 1 < height, right = x + 1 < width;
    for (int c = 0; c < n; c += kLanes) {
      const float* p = dout.at(y, x) + c;
      const Vec d00 = load(p), d01 = right ? load(p + dout.stride) : Vec{};
      const Vec d10 = down ? load(p + dout.pitch) : Vec{};
      const Vec d11 = down && right ? load(p + dout.pitch + dout.stride) : Vec{};
      const Vec r[4][2] = {
          {d00, d01}, {d00 + d10, d01 + d11}, {d00 - d10, d01 - d11}, {-d10, -d11}};
#pragma GCC unroll 16
      for (int i = 0; i < 4; ++i) {
        store(z + (4 * i + 0) * plane + c, r[i][0]);
        store(z + (4 * i + 1) * plane + c, r[i][0] + r[i][1]);
        store(z + (4 * i + 2) * plane + c, r[i][0] - r[i][1]);
        store(z + (4 * i + 3) * plane + c, -r[i][1]);
      }
    }
  }
}

// As the template of the same name; kNorm is true if norm.mean is not null.
inline void tiles_of_input(float* v, ptrdiff_t plane, Map in, Affine norm, int y, int x, int tiles,
                           int height, int width, int channels) {
  if (norm.mean)
    tiles_of_input<true>(v, plane, in, norm, y, x, tiles, height, width, channels);
  else
    tiles_of_input<false>(v, plane, in, norm, y, x, tiles, height, width, channels);
}

// Implements Kernels::conv3.
inline void conv3(Map out, Map in, Affine norm, const float* w, const float* bias, bool relu, int y,
                  int x, int tiles, int height, int width, int in_channels, int channels,
                  float* scratch) {
  const ptrdiff_t none[1] = {0}, row = padded(channels);
  const ptrdiff_t in_plane = kStrip * in.stride, out_plane = kStrip * row;
  float *v = scratch, *m = scratch + 16 * in_plane;
  tiles_of_input(v, in_plane, in, norm, y - 1, x - 1, tiles, height, width, in_channels);
  for (int i = 0; i < 16; ++i) {
    const Product g = {m + i * out_plane,
                       v + i * in_plane,
                       w + i * in_channels * row,
                       nullptr,
                       nullptr,
                       none,
                       row,
                       in.stride,
                       1,
                       row,
                       0,
                       1,
                       in_channels,
                       false};
    product(g, tiles, channels);
  }
  tiles_to_output(out, m, out_plane, bias, relu, y, x, tiles, height, width, channels);
}

// Implements Kernels::conv3_dw.
inline void conv3_dw(float* dw, Map in, Affine norm, Map dout, int y, int x, int tiles, int height,
                     int width, int in_channels, int channels, float* scratch) {
  const ptrdiff_t none[1] = {0}, row = padded(channels);
  const ptrdiff_t in_plane = kStrip * in.stride, out_plane = kStrip * row;
  float *v = scratch, *z = scratch + 16 * in_plane;
  tiles_of_input(v, in_plane, in, norm, y - 1, x - 1, tiles, height, width, in_channels);
  tiles_of_gradient(z, out_plane, dout, y, x, tiles, height, width, channels);
  for (int i = 0; i < 16; ++i) {
    float* sum = dw + i * in_channels * row;
    const Product g = {sum,
                       v + i * in_plane,
                       z + i * out_plane,
                       nullptr,
                       sum,
                       none,
                       row,
                       1,
                       in.stride,
                       row,
                       row,
                       1,
                       tiles,
                       false};
    product(g, in_channels, channels);
  }
}
