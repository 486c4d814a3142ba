// The permutohedral lattice of a picture (Adams, Baek, Davis 2010): a Gaussian filter over features
// of pixels, whose cost is linear in the pixels for any size of the Gaussian.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "kernels.h"
#include "memory.h"
#include "parallel.h"

namespace seg {

// The features of a pixel are x / sxy and y / sxy and, if srgb is not 0, R / srgb, G / srgb and B /
// srgb with levels from 0 to 255.
struct Gaussian {
  float weight;  // of the kernel in the energy
  float sxy;
  float srgb;

  int dims() const { return srgb > 0 ? 5 : 2; }
};

// The order in which the pixels of a picture are stored and visited: square tiles, each row by row.
// Close pixels are close in memory then, and so are the points of a lattice that they share.
class Tiles {
 public:
  Tiles(int height, int width) : height_(height), width_(width) {}

  // Calls f(place, y, x, n) for runs of n <= kTile pixels, which begin in row y and column x and
  // are stored from `place` on. The runs of all blocks 0 ... kBlocks - 1 cover the picture.
  template <class F>
  void runs(int block, const F& f) const {
    const int across = (width_ + kTile - 1) / kTile, down = (height_ + kTile - 1) / kTile;
    const int64_t tiles = int64_t{across} * down;
    for (int64_t t = tiles * block / kBlocks; t < tiles * (block + 1) / kBlocks; ++t) {
      const int y = static_cast<int>(t / across) * kTile, x = static_cast<int>(t % across) * kTile;
      const int rows = std::min(kTile, height_ - y), n = std::min(kTile, width_ - x);
      const size_t first = static_cast<size_t>(y) * width_ + static_cast<size_t>(rows) * x;
      for (int row = 0; row < rows; ++row) f(first + static_cast<size_t>(row) * n, y + row, x, n);
    }
  }
  size_t pixels() const { return static_cast<size_t>(height_) * width_; }
  int height() const { return height_; }
  int width() const { return width_; }

 private:
  int height_, width_;
};

// A pixel lies in a simplex of the lattice and is a weighted sum of its dims + 1 corners. The
// points of the lattice are the corners of all pixels, numbered in the order in which rows of
// pixels reach them. A filter of values Q [pixels][classes] has three parts: each point sums the
// values of its pixels (splat); along each axis, each point adds half of both its neighbours
// (blur); each pixel sums the values of its corners (slice). The weights contain the symmetric
// normalisation: with the filter's matrix K and the diagonal matrix D of the sums of its rows,
// splat and slice compute D^-1/2 K D^-1/2 Q.
class Lattice {
 public:
  // picture is [height][width][3]; it is not read if srgb is 0. Throws std::overflow_error if the
  // numbers of the points do not fit 62 bits, because sxy or srgb is extremely small.
  Lattice(const uint8_t* picture, const Tiles& tiles, const Gaussian& gaussian, int threads,
          const Kernels& k);

  int points() const { return points_; }
  // Computes the values of all points, [points][stride], from q [pixels][stride]: splat and blur.
  // The stride is a multiple of 4.
  void splat(float* values, const float* q, int stride, int threads, const Kernels& k) const;
  void filter(float* values, const float* q, int stride, int threads, const Kernels& k) const;
  // Returns what the kernel crf_update needs to slice values [points][stride], from a pixel on.
  Slice slice(const float* values, size_t pixel) const;

 private:
  struct Numbers;

  void link(const Numbers& numbers, int threads);
  void normalize(int threads, const Kernels& k);

  size_t pixels_;
  int vertices_;  // dims + 1
  float weight_;
  int points_ = 0;
  Memory tables_;           // contains the arrays below
  int32_t* corners_;        // [pixels][vertices]
  float* shares_;           // [pixels][vertices]: the weights of a pixel's corners
  int32_t* members_;        // [pixels * vertices]: the pixels of each point; the last one as ~pixel
  float* parts_;            // [pixels * vertices]: their weights
  int first_[kBlocks + 1];  // by block: its first point,
  size_t first_member_[kBlocks + 1];  // and the first member of this point
  // By axis: the points that have a neighbour, as runs of neighbours. The last point of a run is
  // stored as ~number.
  std::vector<int32_t> chains_[6];
  size_t cuts_[6][kBlocks + 1];  // by axis: the blocks of chains_, which end with a run
};

}  // namespace seg
