// Connected regions by union-find, and merging of small ones.
#include "regions.h"

#include <algorithm>
#include <queue>
#include <unordered_map>
#include <vector>

namespace seg {
namespace {

// A union-find forest of indices.
struct Forest {
  std::vector<int32_t> parent;
  // Returns the root of i's tree and shortens the path to it.
  int32_t find(int32_t i) {
    while (parent[i] != i) i = parent[i] = parent[parent[i]];
    return i;
  }
  // Joins the trees of a and b. The smaller root is the root of the joined tree.
  void join(int32_t a, int32_t b) {
    a = find(a);
    b = find(b);
    if (a != b) parent[std::max(a, b)] = std::min(a, b);
  }
};

struct Region {
  int64_t area = 0;
  int32_t label = 0;
  // The length of the common border with each neighbour. A neighbour that was merged later is still
  // listed by its old number: find() returns the current one.
  std::unordered_map<int32_t, int64_t> border;
};

// Merges regions of less than min_area pixels, the smallest first, as regions.h describes. region
// and forest have one entry for each region of number_regions().
void merge_small(Forest& forest, std::vector<Region>& region, int64_t min_area) {
  using Entry = std::pair<int64_t, int32_t>;  // area, region
  std::priority_queue<Entry, std::vector<Entry>, std::greater<Entry>> small;
  for (size_t i = 0; i < region.size(); ++i)
    if (region[i].area < min_area) small.push({region[i].area, static_cast<int32_t>(i)});
  while (!small.empty()) {
    const auto [area, id] = small.top();
    small.pop();
    if (forest.find(id) != id || region[id].area != area) continue;  // an old entry
    std::unordered_map<int32_t, int64_t> border;                     // by the current roots
    for (const auto& [neighbour, length] : region[id].border) {
      const int32_t root = forest.find(neighbour);
      if (root != id) border[root] += length;
    }
    int32_t best = -1;
    for (const auto& [root, length] : border) {
      const auto better = [&](int32_t a, int64_t a_length, int32_t b, int64_t b_length) {
        if (a_length != b_length) return a_length > b_length;
        if (region[a].area != region[b].area) return region[a].area > region[b].area;
        return a < b;
      };
      if (best < 0 || better(root, length, best, border[best])) best = root;
    }
    if (best < 0) continue;  // the region is the whole picture
    const int32_t label = region[best].label;
    const int32_t root = std::min(best, id), other = std::max(best, id);
    forest.join(id, best);
    region[id].border = std::move(border);
    Region &a = region[root], &b = region[other];
    if (a.border.size() < b.border.size()) a.border.swap(b.border);
    for (const auto& [neighbour, length] : b.border) a.border[neighbour] += length;
    std::unordered_map<int32_t, int64_t>().swap(b.border);
    a.area += b.area;
    a.label = label;
    if (a.area < min_area) small.push({a.area, root});
  }
}

// Writes regions [height][width]: 0, 1, ... for the connected regions of equal label, in the order
// of their first pixels. Returns the number of regions. labels is [height][width].
int32_t number_regions(int32_t* regions, const int32_t* labels, int height, int width) {
  const size_t pixels = static_cast<size_t>(height) * width;
  // Pass 1: provisional numbers; numbers of one region that touch are joined.
  Forest forest;
  for (int y = 0; y < height; ++y) {
    for (int x = 0; x < width; ++x) {
      const size_t n = static_cast<size_t>(y) * width + x;
      const bool left = x > 0 && labels[n - 1] == labels[n];
      const bool up = y > 0 && labels[n - width] == labels[n];
      if (left) {
        regions[n] = regions[n - 1];
        const bool joined = up && labels[n - width - 1] == labels[n];  // by the pixel up and left
        if (up && !joined) forest.join(regions[n], regions[n - width]);
      } else if (up) {
        regions[n] = regions[n - width];
      } else {
        regions[n] = static_cast<int32_t>(forest.parent.size());
        forest.parent.push_back(regions[n]);
      }
    }
  }
  // Pass 2: consecutive numbers. A root is the smallest number of its tree, so the regions keep the
  // order of their first pixels.
  std::vector<int32_t> number(forest.parent.size(), 0);
  int32_t count = 0;
  for (size_t i = 0; i < number.size(); ++i) {
    const int32_t root = forest.find(static_cast<int32_t>(i));
    number[i] = root == static_cast<int32_t>(i) ? count++ : number[root];
  }
  for (size_t n = 0; n < pixels; ++n) regions[n] = number[regions[n]];
  return count;
}

}  // namespace

int32_t connected_regions(int32_t* regions, int32_t* labels, int height, int width,
                          int64_t min_area) {
  const size_t pixels = static_cast<size_t>(height) * width;
  int32_t count = number_regions(regions, labels, height, width);
  if (min_area > 1 && count > 1) {
    std::vector<Region> region(count);
    for (size_t n = 0; n < pixels; ++n) {
      Region& here = region[regions[n]];
      here.label = labels[n];
      ++here.area;
    }
    // The borders of all regions are measured, because a small region may be merged into any
    // neighbour.
    for (size_t n = 0; n < pixels; ++n) {
      const auto touch = [&](size_t m) {
        const int32_t a = regions[n], b = regions[m];
        if (a == b) return;
        ++region[a].border[b];
        ++region[b].border[a];
      };
      if (n % width > 0) touch(n - 1);
      if (n >= static_cast<size_t>(width)) touch(n - width);
    }
    Forest merged;
    merged.parent.resize(count);
    for (int32_t i = 0; i < count; ++i) merged.parent[i] = i;
    merge_small(merged, region, min_area);
    for (size_t n = 0; n < pixels; ++n) labels[n] = region[merged.find(regions[n])].label;
    // After merging, touching regions of one label are one region.
    count = number_regions(regions, labels, height, width);
  }
  for (size_t n = 0; n < pixels; ++n) ++regions[n];
  return count;
}

}  // namespace seg
