// The permutohedral lattice of pixels. The coordinates of a lattice point have the same remainder
// modulo dims + 1, and the corner r of each simplex has the remainder r. So the points of each
// remainder are numbered and sorted independently of the others, and the neighbours of a point are
// among those of the next remainder and of the one before.
#include "lattice.h"

#include <cmath>
#include <stdexcept>

namespace seg {
namespace {

// A hash table that numbers keys in the order of their first appearance. Its slots contain numbers
// only, and it grows with their count, so that it fits the cache. Open addressing.
class KeyTable {
 public:
  std::vector<uint64_t> keys;  // by number

  KeyTable() { resize(8); }

  // Returns the number of a key, which is added if it is new.
  int32_t add(uint64_t key) {
    size_t slot = place(key);
    for (; slots_[slot] >= 0; slot = (slot + 1) & (slots_.size() - 1))
      if (keys[slots_[slot]] == key) return slots_[slot];
    const int32_t number = static_cast<int32_t>(keys.size());
    slots_[slot] = number;
    keys.push_back(key);
    if (2 * keys.size() > slots_.size()) resize(bits_ + 1);
    return number;
  }

 private:
  std::vector<int32_t> slots_;  // -1 if free
  int bits_ = 0;

  // Fibonacci hashing: the high bits of the product with 2^64 / golden ratio.
  size_t place(uint64_t key) const { return (key * 0x9e3779b97f4a7c15ull) >> (64 - bits_); }

  void resize(int bits) {
    bits_ = bits;
    slots_.assign(size_t{1} << bits, -1);
    for (size_t n = 0; n < keys.size(); ++n) {
      size_t slot = place(keys[n]);
      while (slots_[slot] >= 0) slot = (slot + 1) & (slots_.size() - 1);
      slots_[slot] = static_cast<int32_t>(n);
    }
  }
};

// How the first `dims` coordinates of a lattice point become one number, its key. Coordinate i of a
// point with remainder r is (dims + 1) * q + r, and the key has a field of bits for q - lowest[i].
// The last coordinate follows from the others, because the sum of all is 0.
struct Fields {
  int dims;
  float scale[5];  // of the features
  int64_t lowest[5];
  uint64_t unit[6];  // what 1 in field i adds to the key; 0 for the last coordinate
  uint64_t all = 0;  // the sum of all units

  Fields(const Gaussian& gaussian, int height, int width) : dims(gaussian.dims()) {
    double largest[5], above = 0;  // of each feature; their sum from feature i on
    for (int i = 0; i < dims; ++i) {
      const double sigma = i < 2 ? gaussian.sxy : gaussian.srgb;
      // With this scale, splat, blur and slice together have the variance of the Gaussian.
      const double s = std::sqrt(2.0 / 3) * (dims + 1) / std::sqrt((i + 1.0) * (i + 2.0)) / sigma;
      scale[i] = static_cast<float>(s);
      largest[i] = s * (i == 0 ? width - 1 : i == 1 ? height - 1 : 255);
      above += largest[i];
    }
    int bits = 0;
    for (int i = 0; i < dims; ++i) {
      // Coordinate i is the sum of the features from i on, minus i times the feature i - 1. A
      // corner is less than 1 away after the division, and a neighbour of a corner at most 1 more.
      const double low = std::floor((i > 0 ? -i * largest[i - 1] : 0.0) / (dims + 1)) - 3;
      const double range = std::ceil(above / (dims + 1)) + 3 - low + 1;
      const bool fits = range <= 1 << 20;  // float32 represents whole numbers of this size exactly
      const int more = fits ? static_cast<int>(std::ceil(std::log2(range))) : 0;
      if (!fits || bits + more > 62)
        throw std::overflow_error(dims == 2 ? "gaussian_sxy" : "bilateral_sxy or bilateral_srgb");
      unit[i] = uint64_t{1} << bits;
      bits += more;
      lowest[i] = static_cast<int64_t>(low);
      all += unit[i];
      above -= largest[i];
    }
    unit[dims] = 0;
  }
};

// A point and its key.
struct Point {
  uint64_t key;
  int32_t number;
};

// Sorts points by their keys: a radix sort by 11 bits at a time.
void sort(std::vector<Point>& points) {
  uint64_t differ = 0;  // the bits in which keys differ
  for (const Point& p : points) differ |= p.key ^ points[0].key;
  std::vector<Point> sorted(points.size());
  for (int shift = 0; shift < 64; shift += 11) {
    if ((differ >> shift & 2047) == 0) continue;
    size_t begin[2049] = {};
    for (const Point& p : points) ++begin[(p.key >> shift & 2047) + 1];
    for (int i = 0; i < 2048; ++i) begin[i + 1] += begin[i];
    for (const Point& p : points) sorted[begin[p.key >> shift & 2047]++] = p;
    points.swap(sorted);
  }
}

// Returns the first element of a block of n elements; of block kBlocks, n.
size_t block_first(int block, size_t n) { return n * block / kBlocks; }

}  // namespace

void Tiles::add_margin(std::vector<Run>& runs, int tile, int margin) const {
  const int y = tile / across() * kTile, x = tile % across() * kTile;
  const int bottom = std::min(y + kTile, height_), right = std::min(x + kTile, width_);
  for (int row = std::max(y - margin, 0); row < std::min(bottom + margin, height_); ++row) {
    const int end = std::min(right + margin, width_);
    for (int column = std::max(x - margin, 0); column < end;) {
      const int other = row / kTile * across() + column / kTile;
      const int left = column / kTile * kTile;
      const int n = std::min(left + kTile, end) - column;
      const int pitch = std::min(kTile, width_ - left);
      if (other != tile)
        runs.push_back({first(other) + static_cast<size_t>(row % kTile) * pitch + column - left,
                        row, column, n});
      column += n;
    }
  }
}

// The keys of corners and points, which only the making of a lattice needs.
struct Lattice::Numbers {
  Fields fields;
  std::vector<uint64_t> corners;  // [vertices][pixels]: the keys of the corners
  std::vector<Point> points[6];   // by remainder
};

double Lattice::reach(const Gaussian& gaussian) {
  // A corner is at most 1 away from its pixel. The blur moves a value by at most 2, for example by
  // two axes and against the third. A pixel of that corner is at most 1 away: 1 + 2 + 1.
  return 4 * gaussian.sxy;
}

Lattice::Lattice(const uint8_t* picture, const Tiles& tiles, const std::vector<Run>& runs,
                 size_t own, const Gaussian& gaussian, int threads, const Kernels& k,
                 const std::function<void()>& check)
    : first_(runs[0].place), own_(own), vertices_(gaussian.dims() + 1), weight_(gaussian.weight) {
  const int dims = gaussian.dims(), v = vertices_;
  std::vector<size_t> starts;  // of the runs in the order of this lattice's pixels
  pixels_ = 0;
  for (const Run& run : runs) starts.push_back(pixels_), pixels_ += run.n;
  Numbers numbers{Fields(gaussian, tiles.height(), tiles.width()), {}, {}};
  const Fields& fields = numbers.fields;

  const size_t entries = pixels_ * v;
  tables_ = allocate(4 * entries);
  corners_ = reinterpret_cast<int32_t*>(tables_.get());
  members_ = corners_ + entries;
  shares_ = tables_.get() + 2 * entries;
  parts_ = shares_ + entries;
  numbers.corners.resize(entries);
  parallel_for(threads, kBlocks, [&](int block) {
    float features[5 * kTile] = {}, weight[6 * kTile];
    int32_t corner[6 * kTile], order[6 * kTile];
    for (size_t j = block_first(block, runs.size()); j < block_first(block + 1, runs.size()); ++j) {
      const Run& run = runs[j];
      const uint8_t* const levels =
          picture + (static_cast<size_t>(run.y) * tiles.width() + run.x) * 3;
      for (int i = 0; i < run.n; ++i) {
        features[i] = static_cast<float>(run.x + i) * fields.scale[0];
        features[kTile + i] = static_cast<float>(run.y) * fields.scale[1];
        for (int c = 2; c < dims; ++c)
          features[c * kTile + i] = levels[i * 3 + c - 2] * fields.scale[c];
      }
      k.crf_simplex(corner, order, weight, features, dims);
      for (int i = 0; i < run.n; ++i) {
        const size_t pixel = starts[j] + i;
        uint64_t key = 0;
        for (int c = 0; c < dims; ++c)
          key += fields.unit[c] * static_cast<uint64_t>(corner[c * kTile + i] - fields.lowest[c]);
        // Corner r is dims + 1 lower than corner 0 in the coordinates of the r highest ranks.
        for (int r = 0; r < v; ++r) {
          if (r > 0) key -= fields.unit[order[(v - r) * kTile + i]];
          numbers.corners[r * pixels_ + pixel] = key;
          shares_[pixel * v + r] = weight[r * kTile + i];
        }
      }
    }
  });
  check();
  number(numbers, runs, threads, check);
  check();
  link(numbers, threads);
}

// Numbers the points, and finds the corners of each pixel and the pixels of each point.
void Lattice::number(Numbers& numbers, const std::vector<Run>& runs, int threads,
                     const std::function<void()>& check) {
  const int v = vertices_;
  std::vector<int32_t> local(pixels_ * v);  // [vertices][pixels]: numbers in the points of r
  parallel_for(threads, v, [&](int r) {
    KeyTable table;
    const uint64_t* key = numbers.corners.data() + r * pixels_;
    int32_t* number = local.data() + r * pixels_;
    for (size_t p = 0; p < pixels_; ++p)
      number[p] = p > 0 && key[p] == key[p - 1] ? number[p - 1] : table.add(key[p]);
    numbers.points[r].resize(table.keys.size());
    for (size_t i = 0; i < table.keys.size(); ++i) numbers.points[r][i].key = table.keys[i];
  });
  check();
  for (int r = 0; r < v; ++r) points_ += static_cast<int>(numbers.points[r].size());

  // The points are numbered in the order of the pixels, so that close pixels have close points.
  std::vector<int32_t> end(points_ + size_t{1}, 0);  // [n + 1]: where the members of point n end
  int32_t count = 0, known[6] = {};                  // the points that have a number, in all, by r
  for (size_t p = 0; p < pixels_; ++p) {
    for (int r = 0; r < v; ++r) {
      const int32_t number = local[r * pixels_ + p];
      Point& point = numbers.points[r][number];
      if (number == known[r]) ++known[r], point.number = count++;
      corners_[p * v + r] = point.number;
      ++end[point.number + 1];
    }
  }
  check();
  for (int i = 0; i < points_; ++i) end[i + 1] += end[i];
  for (int block = 0; block <= kBlocks; ++block) splats_[block] = end[block_begin(block, points_)];
  size_t entry = 0;
  for (const Run& run : runs) {
    for (int i = 0; i < run.n; ++i) {
      for (int r = 0; r < v; ++r, ++entry) {
        // end[n] is where the next member of point n is written.
        const int32_t at = end[corners_[entry]]++;
        members_[at] = static_cast<int32_t>(run.place + i);
        parts_[at] = shares_[entry];
      }
    }
  }
  for (int i = 0; i < points_; ++i) members_[end[i] - 1] = ~members_[end[i] - 1];
  check();
  parallel_for(threads, v, [&](int r) { sort(numbers.points[r]); });
}

// Finds the runs of neighbours along each axis. A neighbour along axis j is dims lower in
// coordinate j, and 1 higher in all others.
void Lattice::link(const Numbers& numbers, int threads) {
  const Fields& fields = numbers.fields;
  parallel_for(threads, vertices_, [&](int axis) {
    std::vector<int32_t> next(points_, -1);
    std::vector<uint8_t> inside(points_, 0);  // the point is behind another one
    for (int r = 0; r < vertices_; ++r) {
      // The keys of the neighbours are sorted, too, so one walk over both lists finds them all.
      // From the last remainder to 0 there is a carry, because coordinates are divided by dims + 1.
      const bool carry = r == vertices_ - 1;
      const uint64_t step = (carry ? fields.all : 0) - fields.unit[axis];
      const std::vector<Point>& others = numbers.points[carry ? 0 : r + 1];
      auto other = others.begin();
      for (const Point& point : numbers.points[r]) {
        const uint64_t key = point.key + step;
        while (other != others.end() && other->key < key) ++other;
        if (other == others.end()) break;
        if (other->key == key) next[point.number] = other->number, inside[other->number] = 1;
      }
    }
    std::vector<int32_t>& chain = chains_[axis];
    chain.reserve(points_);
    for (int i = 0; i < points_; ++i) {
      if (inside[i] || next[i] < 0) continue;
      int32_t at = i;
      for (; next[at] >= 0; at = next[at]) chain.push_back(at);
      chain.push_back(~at);
    }
    cuts_[axis][0] = 0;
    for (int block = 1; block <= kBlocks; ++block) {
      size_t cut = block_first(block, chain.size());
      while (cut > 0 && cut < chain.size() && chain[cut - 1] >= 0) ++cut;
      cuts_[axis][block] = cut;
    }
  });
}

void Lattice::factors(float* factor, int threads, const Kernels& k) const {
  const Memory values = allocate(4 * static_cast<size_t>(points_));
  const float ones[4] = {1, 1, 1, 1};
  filter(values.get(), ones, 0, 4, threads, k);
  parallel_for(threads, kBlocks, [&](int block) {
    for (size_t p = block_first(block, own_); p < block_first(block + 1, own_); ++p) {
      float sum = 0;
      for (size_t i = p * vertices_; i < (p + 1) * vertices_; ++i)
        sum += shares_[i] * values.get()[4 * static_cast<size_t>(corners_[i])];
      factor[first_ + p] = 1 / std::sqrt(sum);
    }
  });
}

void Lattice::normalize(const float* factor, int threads) {
  parallel_for(threads, kBlocks, [&](int block) {
    for (size_t p = block_first(block, own_); p < block_first(block + 1, own_); ++p)
      for (int r = 0; r < vertices_; ++r) shares_[p * vertices_ + r] *= factor[first_ + p];
    const size_t entries = pixels_ * vertices_;
    for (size_t i = block_first(block, entries); i < block_first(block + 1, entries); ++i)
      parts_[i] *= factor[members_[i] < 0 ? ~members_[i] : members_[i]];
  });
}

void Lattice::filter(float* values, const float* q, ptrdiff_t stride, int width, int threads,
                     const Kernels& k) const {
  parallel_for(threads, kBlocks, [&](int block) {
    const size_t first = splats_[block];
    k.crf_splat(values + static_cast<size_t>(block_begin(block, points_)) * width, q, stride,
                members_ + first, parts_ + first, splats_[block + 1] - first, width);
  });
  for (int axis = 0; axis < vertices_; ++axis) {
    parallel_for(threads, kBlocks, [&](int block) {
      const size_t first = cuts_[axis][block];
      k.crf_blur(values, chains_[axis].data() + first, cuts_[axis][block + 1] - first, width);
    });
  }
}

Slice Lattice::slice(const float* values, size_t place) const {
  const size_t first = (place - first_) * vertices_;
  return {values, corners_ + first, shares_ + first, vertices_, weight_};
}

}  // namespace seg
