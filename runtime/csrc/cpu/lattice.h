// The permutohedral lattice of pixels (Adams, Baek, Davis 2010): a Gaussian filter over features of
// pixels, whose cost is linear in the pixels for any size of the Gaussian.
#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>
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

// n pixels from row y and column x on, which are stored from `place` on.
struct Run {
  size_t place;
  int y, x, n;
};

// The order in which the pixels of a picture are stored: square tiles, each row by row. Close
// pixels are close in memory then, and so are the points of a lattice that they share.
class Tiles {
 public:
  Tiles(int height, int width) : height_(height), width_(width) {}

  size_t pixels() const { return static_cast<size_t>(height_) * width_; }
  int height() const { return height_; }
  int width() const { return width_; }
  int count() const { return across() * ((height_ + kTile - 1) / kTile); }
  // Returns the place of the first pixel of a tile; of tile count(), the number of pixels.
  size_t first(int tile) const {
    if (tile == count()) return pixels();
    const int y = tile / across() * kTile, x = tile % across() * kTile;
    return static_cast<size_t>(y) * width_ + static_cast<size_t>(x) * std::min(kTile, height_ - y);
  }
  // Appends the runs of a tile, in the order of their places.
  void add_runs(std::vector<Run>& runs, int tile) const {
    const int y = tile / across() * kTile, x = tile % across() * kTile;
    const int n = std::min(kTile, width_ - x);
    for (int i = 0; i < std::min(kTile, height_ - y); ++i)
      runs.push_back({first(tile) + static_cast<size_t>(i) * n, y + i, x, n});
  }
  // Appends the runs of the pixels that are not in the tile, but at most `margin` pixels away from
  // it in each direction.
  void add_margin(std::vector<Run>& runs, int tile, int margin) const;

 private:
  int height_, width_;

  int across() const { return (width_ + kTile - 1) / kTile; }
};

// A pixel lies in a simplex of the lattice and is a weighted sum of its dims + 1 corners. The
// points of the lattice are the corners of all its pixels. A filter of the rows q of pixels has
// three parts: each point sums the rows of its pixels (splat); along each axis, each point adds
// half of both its neighbours (blur); each pixel sums the values of its corners (slice, in the
// kernel crf_update). After normalize() the weights contain the symmetric normalisation: with the
// filter's matrix K and the diagonal matrix D of the sums of its rows, splat and slice compute
// D^-1/2 K D^-1/2 q.
class Lattice {
 public:
  // Makes the lattice of the pixels of `runs`. The first `own` of them are sliced; their places
  // follow each other. picture is [height][width][3]; it is not read if srgb is 0. Throws
  // std::overflow_error, whose text names the option, if the points cannot be numbered, because sxy
  // or srgb is extremely small. check() is called several times; it may throw to end the work.
  Lattice(const uint8_t* picture, const Tiles& tiles, const std::vector<Run>& runs, size_t own,
          const Gaussian& gaussian, int threads, const Kernels& k,
          const std::function<void()>& check);

  int points() const { return points_; }
  // Writes 1 / the root of the sum of each own pixel's row in the filter's matrix to factor[place].
  void factors(float* factor, int threads, const Kernels& k) const;
  // Multiplies the weights by the factors [pixels] of all pixels.
  void normalize(const float* factor, int threads);
  // Computes the values [points][width] from q [pixels][width]: splat and blur. The width is a
  // multiple of 4. Rows of q are `stride` floats apart.
  void filter(float* values, const float* q, ptrdiff_t stride, int width, int threads,
              const Kernels& k) const;
  // Returns what crf_update needs to slice the values, from the own pixel `place` on.
  Slice slice(const float* values, size_t place) const;
  // Returns the largest distance in pixels between a pixel and one that its filtered row depends
  // on. Only for 2 dimensions.
  static double reach(const Gaussian& gaussian);

 private:
  struct Numbers;

  void number(Numbers& numbers, const std::vector<Run>& runs, int threads,
              const std::function<void()>& check);
  void link(const Numbers& numbers, int threads);

  size_t first_, own_, pixels_;  // place of the first own pixel; own pixels; all pixels
  int vertices_;                 // dims + 1
  float weight_;
  int points_ = 0;
  Memory tables_;     // contains the arrays below
  int32_t* corners_;  // [pixels][vertices]
  float* shares_;     // [pixels][vertices]: the weights of a pixel's corners
  int32_t* members_;  // [pixels * vertices]: the places of each point's pixels; the last as ~place
  float* parts_;      // [pixels * vertices]: their weights
  size_t splats_[kBlocks + 1];  // by block: the first member of the block's first point
  // By axis: the points that have a neighbour, as runs of neighbours. The last point of a run is
  // stored as ~point.
  std::vector<int32_t> chains_[6];
  size_t cuts_[6][kBlocks + 1];  // by axis: the blocks of chains_, which end with a run
};

}  // namespace seg
