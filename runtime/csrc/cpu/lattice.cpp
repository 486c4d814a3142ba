// The permutohedral lattice of a picture. The corners of the lattice are numbered by a hash table
// for each remainder: the coordinates of a lattice point have the same remainder modulo dims + 1,
// and the corner r of each simplex has the remainder r. So the tables are filled independently of
// each other, and the neighbours of a point are in the tables of the next and the last remainder.
#include "lattice.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>

namespace seg {
namespace {

// Numbers keys in the order of their first appearance. Open addressing; the table grows with the
// number of its keys, because small tables fit the cache.
class KeyTable {
 public:
  std::vector<uint64_t> keys;  // by number

  KeyTable() { resize(10); }

  // Returns the number of a key, which is added if it is new.
  int32_t add(uint64_t key) {
    size_t slot = find(key);
    if (slots_[slot] == key) return numbers_[slot];
    const int32_t number = static_cast<int32_t>(keys.size());
    slots_[slot] = key, numbers_[slot] = number;
    keys.push_back(key);
    if (2 * keys.size() > slots_.size()) resize(bits_ + 1);
    return number;
  }
  // Returns what renumber() has stored for a key, or -1 if the table has no such key.
  int32_t number(uint64_t key) const {
    const size_t slot = find(key);
    const int32_t number = numbers_[slot];
    return slots_[slot] == key ? number : -1;  // without a branch, which would be guessed wrong
  }
  // Replaces each number n by others[n].
  void renumber(const std::vector<int32_t>& others) {
    for (size_t slot = 0; slot < slots_.size(); ++slot)
      if (slots_[slot] != kFree) numbers_[slot] = others[numbers_[slot]];
  }
  // Begins to load the slot of a key into the cache.
  void prefetch(uint64_t key) const { __builtin_prefetch(&slots_[place(key)]); }

 private:
  static constexpr uint64_t kFree = ~uint64_t{0};  // keys have at most 62 bits
  std::vector<uint64_t> slots_;                    // the keys; most searches read nothing else
  std::vector<int32_t> numbers_;                   // by slot
  int bits_ = 0;

  // Fibonacci hashing: the high bits of the product with 2^64 / golden ratio.
  size_t place(uint64_t key) const { return (key * 0x9e3779b97f4a7c15ull) >> (64 - bits_); }
  // Returns the slot of a key, or the free slot for it.
  size_t find(uint64_t key) const {
    size_t slot = place(key);
    while (slots_[slot] != key && slots_[slot] != kFree) slot = (slot + 1) & (slots_.size() - 1);
    return slot;
  }

  void resize(int bits) {
    bits_ = bits;
    slots_.assign(size_t{1} << bits, kFree);
    numbers_.resize(slots_.size());
    for (size_t n = 0; n < keys.size(); ++n) {
      const size_t slot = find(keys[n]);
      slots_[slot] = keys[n], numbers_[slot] = static_cast<int32_t>(n);
    }
  }
};

// How the first `dims` coordinates of a lattice point become one number, its key. Coordinate i of a
// point with remainder r is (dims + 1) * q + r, and the key has a field of bits for q - lowest[i].
// The last coordinate follows from the others, because the sum of all is 0.
struct Fields {
  int dims;
  int64_t lowest[5];
  uint64_t unit[6];  // what 1 in field i adds to the key; 0 for the last coordinate
  uint64_t all = 0;  // the sum of all units

  // largest [dims] is the largest value of each feature after its scale; the smallest is 0.
  Fields(int dims, const double* largest) : dims(dims) {
    double above = 0;  // the sum of the largest values of the features from i on
    for (int i = 0; i < dims; ++i) above += largest[i];
    int bits = 0;
    for (int i = 0; i < dims; ++i) {
      // Coordinate i is the sum of the features from i on, minus i times the feature i - 1.
      const double low = i > 0 ? -i * largest[i - 1] : 0.0;
      // Two more on each side: a corner is less than 1 away, and a neighbour of a corner 1 more.
      lowest[i] = static_cast<int64_t>(std::floor(low / (dims + 1))) - 3;
      const double range = std::ceil(above / (dims + 1)) + 3 - static_cast<double>(lowest[i]) + 1;
      unit[i] = bits < 62 ? uint64_t{1} << bits : 0;
      bits += static_cast<int>(std::ceil(std::log2(range)));
      if (bits > 62) throw std::overflow_error("the features of the pixels are too far apart");
      all += unit[i];
      above -= largest[i];
    }
    unit[dims] = 0;
  }
};

}  // namespace

// What the points are linked by: their tables, and for each point its key and its remainder.
struct Lattice::Numbers {
  Fields fields;
  std::vector<KeyTable> tables;     // by remainder
  std::vector<uint64_t> keys;       // by point
  std::vector<uint8_t> remainders;  // by point
};

Lattice::Lattice(const uint8_t* picture, const Tiles& tiles, const Gaussian& gaussian, int threads,
                 const Kernels& k)
    : pixels_(tiles.pixels()), vertices_(gaussian.dims() + 1), weight_(gaussian.weight) {
  const int dims = gaussian.dims(), v = vertices_;
  // With this scale, splat, blur and slice together have the variance of the Gaussian.
  float scale[5];
  double largest[5];
  for (int i = 0; i < dims; ++i) {
    const double sigma = i < 2 ? gaussian.sxy : gaussian.srgb;
    const double extent = i == 0 ? tiles.width() - 1 : i == 1 ? tiles.height() - 1 : 255;
    const double s = std::sqrt(2.0 / 3) * v / std::sqrt((i + 1.0) * (i + 2.0)) / sigma;
    scale[i] = static_cast<float>(s);
    largest[i] = s * extent;
  }
  Numbers numbers{Fields(dims, largest), std::vector<KeyTable>(v), {}, {}};
  const Fields& fields = numbers.fields;

  // The keys and the weights of the corners of each pixel.
  std::vector<uint64_t> keys(pixels_ * v);  // [vertices][pixels]
  std::vector<float> shares(pixels_ * v);   // [pixels][vertices]
  parallel_for(threads, kBlocks, [&](int block) {
    float features[5 * kTile] = {}, weight[6 * kTile];
    int32_t corner[6 * kTile], order[6 * kTile];
    tiles.runs(block, [&](size_t place, int y, int x, int n) {
      const uint8_t* const levels = picture + (static_cast<size_t>(y) * tiles.width() + x) * 3;
      for (int i = 0; i < n; ++i) {
        features[i] = static_cast<float>(x + i) * scale[0];
        features[kTile + i] = static_cast<float>(y) * scale[1];
        for (int c = 2; c < dims; ++c) features[c * kTile + i] = levels[i * 3 + c - 2] * scale[c];
      }
      k.crf_simplex(corner, order, weight, features, dims);
      for (int i = 0; i < n; ++i) {
        uint64_t key = 0;
        for (int c = 0; c < dims; ++c)
          key += fields.unit[c] * static_cast<uint64_t>(corner[c * kTile + i] - fields.lowest[c]);
        // Corner r is dims + 1 lower than corner 0 in the coordinates of the r highest ranks.
        for (int r = 0; r < v; ++r) {
          if (r > 0) key -= fields.unit[order[(v - r) * kTile + i]];
          keys[r * pixels_ + place + i] = key;
          shares[(place + i) * v + r] = weight[r * kTile + i];
        }
      }
    });
  });

  std::vector<int32_t> local(pixels_ * v);  // [vertices][pixels]: numbers in the tables
  parallel_for(threads, v, [&](int r) {
    KeyTable& table = numbers.tables[r];
    const uint64_t* key = keys.data() + r * pixels_;
    int32_t* number = local.data() + r * pixels_;
    for (size_t p = 0; p < pixels_; ++p)
      number[p] = p > 0 && key[p] == key[p - 1] ? number[p - 1] : table.add(key[p]);
  });
  std::vector<uint64_t>().swap(keys);

  std::vector<int32_t> known[6];  // by remainder and number in the table: the point
  for (int r = 0; r < v; ++r) {
    known[r].reserve(numbers.tables[r].keys.size());
    points_ += static_cast<int>(numbers.tables[r].keys.size());
  }
  numbers.keys.reserve(points_);
  numbers.remainders.reserve(points_);
  const size_t entries = pixels_ * v;
  tables_ = allocate(4 * entries);
  int32_t* const words = reinterpret_cast<int32_t*>(tables_.get());
  corners_ = words, members_ = words + entries;
  shares_ = tables_.get() + 2 * entries, parts_ = shares_ + entries;
  std::memcpy(shares_, shares.data(), entries * sizeof(float));
  std::vector<float>().swap(shares);

  // The points are numbered in the order of the pixels, so that close pixels have close points.
  std::vector<int32_t> end(points_ + size_t{1}, 0);  // [n + 1]: where the members of point n end
  for (size_t p = 0; p < pixels_; ++p) {
    for (int r = 0; r < v; ++r) {
      const int32_t number = local[r * pixels_ + p];
      if (number == static_cast<int32_t>(known[r].size())) {
        known[r].push_back(static_cast<int32_t>(numbers.keys.size()));
        numbers.keys.push_back(numbers.tables[r].keys[number]);
        numbers.remainders.push_back(static_cast<uint8_t>(r));
      }
      corners_[p * v + r] = known[r][number];
      ++end[known[r][number] + 1];
    }
  }
  for (int i = 0; i < points_; ++i) end[i + 1] += end[i];
  for (int block = 0; block <= kBlocks; ++block) {
    first_[block] = block_begin(block, points_);
    first_member_[block] = end[first_[block]];
  }
  for (size_t p = 0; p < pixels_; ++p) {  // end[n] is where the next member of point n is written
    for (int r = 0; r < v; ++r) {
      const int32_t at = end[corners_[p * v + r]]++;
      members_[at] = static_cast<int32_t>(p);
      parts_[at] = shares_[p * v + r];
    }
  }
  for (int i = 0; i < points_; ++i) members_[end[i] - 1] = ~members_[end[i] - 1];
  parallel_for(threads, v, [&](int r) { numbers.tables[r].renumber(known[r]); });
  link(numbers, threads);
  normalize(threads, k);
}

// Finds the runs of neighbours along each axis. A neighbour along axis j is 1 higher in all
// coordinates, and dims lower in coordinate j.
void Lattice::link(const Numbers& numbers, int threads) {
  const Fields& fields = numbers.fields;
  parallel_for(threads, vertices_, [&](int axis) {
    constexpr int kAhead = 16;  // points whose neighbours are looked up together, for the cache
    std::vector<int32_t> next(points_);
    std::vector<uint8_t> inside(points_ + 1, 0);  // [n + 1]: point n is behind another one
    for (int first = 0; first < points_; first += kAhead) {
      const int n = std::min(kAhead, points_ - first);
      uint64_t key[kAhead];
      const KeyTable* table[kAhead];
      for (int i = 0; i < n; ++i) {
        const int r = numbers.remainders[first + i];
        const bool carry = r == vertices_ - 1;  // the coordinates are divided by dims + 1
        key[i] = numbers.keys[first + i] - fields.unit[axis] + (carry ? fields.all : 0);
        table[i] = &numbers.tables[carry ? 0 : r + 1];
        table[i]->prefetch(key[i]);
      }
      for (int i = 0; i < n; ++i) {
        const int32_t found = table[i]->number(key[i]);
        next[first + i] = found;
        inside[found + 1] = 1;
      }
    }
    std::vector<int32_t>& chain = chains_[axis];
    chain.reserve(points_);
    for (int i = 0; i < points_; ++i) {
      if (inside[i + 1] || next[i] < 0) continue;
      int32_t at = i;
      for (; next[at] >= 0; at = next[at]) chain.push_back(at);
      chain.push_back(~at);
    }
    cuts_[axis][0] = 0;
    for (int block = 1; block <= kBlocks; ++block) {
      size_t cut = std::max(cuts_[axis][block - 1], chain.size() * block / kBlocks);
      while (cut > 0 && cut < chain.size() && chain[cut - 1] >= 0) ++cut;
      cuts_[axis][block] = cut;
    }
  });
}

// Multiplies the weights of each pixel by 1 / the root of its sum in the filter's matrix.
void Lattice::normalize(int threads, const Kernels& k) {
  const Memory values = allocate(4 * static_cast<size_t>(points_)), ones = allocate(4);
  std::fill(ones.get(), ones.get() + 4, 1.0f);
  filter(values.get(), ones.get(), 0, threads, k);
  std::vector<float> factor(pixels_);
  parallel_for(threads, kBlocks, [&](int block) {
    for (size_t p = pixels_ * block / kBlocks; p < pixels_ * (block + 1) / kBlocks; ++p) {
      float sum = 0;
      for (size_t i = p * vertices_; i < (p + 1) * vertices_; ++i)
        sum += shares_[i] * values.get()[4 * static_cast<size_t>(corners_[i])];
      factor[p] = 1 / std::sqrt(std::max(sum, 1e-20f));
      for (size_t i = p * vertices_; i < (p + 1) * vertices_; ++i) shares_[i] *= factor[p];
    }
  });
  parallel_for(threads, kBlocks, [&](int block) {
    const size_t entries = pixels_ * vertices_;
    for (size_t i = entries * block / kBlocks; i < entries * (block + 1) / kBlocks; ++i)
      parts_[i] *= factor[members_[i] < 0 ? ~members_[i] : members_[i]];
  });
}

void Lattice::splat(float* values, const float* q, int stride, int threads,
                    const Kernels& k) const {
  const int width = std::max(stride, 4);
  parallel_for(threads, kBlocks, [&](int block) {
    const size_t first = first_member_[block];
    k.crf_splat(values + static_cast<size_t>(first_[block]) * width, q, stride, members_ + first,
                parts_ + first, first_member_[block + 1] - first, width);
  });
}
void Lattice::filter(float* values, const float* q, int stride, int threads,
                     const Kernels& k) const {
  const int width = std::max(stride, 4);
  splat(values, q, stride, threads, k);
  for (int axis = 0; axis < vertices_; ++axis) {
    parallel_for(threads, kBlocks, [&](int block) {
      const size_t first = cuts_[axis][block], last = cuts_[axis][block + 1];
      k.crf_blur(values, chains_[axis].data() + first, last - first, width);
    });
  }
}

Slice Lattice::slice(const float* values, size_t pixel) const {
  return {values, corners_ + pixel * vertices_, shares_ + pixel * vertices_, vertices_, weight_};
}

}  // namespace seg
