// Mean field of the dense CRF. The row of a pixel or point has the classes, rounded up to a
// multiple of 4 floats; the additional ones are 0, and kNever in the unary energy. Pixels are
// stored in tiles.
//
// A narrow Gaussian of distance has a lattice for each tile and its margin. Its values fit the
// cache, and are computed just before the tile is updated. The other lattices are those of the
// whole picture.
#include "dense_crf.h"

#include <cmath>
#include <memory>
#include <utility>
#include <vector>

namespace seg {
namespace {

// The lattices of one Gaussian: that of the whole picture, or one for each tile.
struct Filter {
  std::vector<Lattice> lattices;
  bool tiled;
  size_t points = 0;  // of the largest lattice

  Filter(const uint8_t* picture, const Tiles& tiles, const Gaussian& gaussian, int threads,
         const Kernels& k, const std::function<void()>& check)
      : tiled(gaussian.dims() == 2 && Lattice::reach(gaussian) <= kTile / 4) {
    std::vector<float> factor(tiles.pixels());
    if (!tiled) {
      std::vector<Run> runs;
      for (int t = 0; t < tiles.count(); ++t) tiles.add_runs(runs, t);
      lattices.emplace_back(picture, tiles, runs, tiles.pixels(), gaussian, threads, k, check);
      check();
      lattices[0].factors(factor.data(), threads, k);
      lattices[0].normalize(factor.data(), threads);
      points = lattices[0].points();
      return;
    }
    const int margin = static_cast<int>(std::ceil(Lattice::reach(gaussian)));
    std::vector<std::unique_ptr<Lattice>> made(tiles.count());
    parallel_for(threads, tiles.count(), [&](int t) {
      std::vector<Run> runs;
      tiles.add_runs(runs, t);
      tiles.add_margin(runs, t, margin);
      const size_t own = tiles.first(t + 1) - tiles.first(t);
      made[t].reset(new Lattice(picture, tiles, runs, own, gaussian, 1, k, [] {}));
      made[t]->factors(factor.data(), 1, k);
    });
    for (auto& lattice : made) {
      points = std::max(points, static_cast<size_t>(lattice->points()));
      lattices.push_back(std::move(*lattice));
    }
    parallel_for(threads, tiles.count(), [&](int t) { lattices[t].normalize(factor.data(), 1); });
  }
};

}  // namespace

void dense_crf(float* out, const uint8_t* picture, const float* probabilities, int height,
               int width, int classes, const CrfOptions& options, const float* compatibility,
               int threads, const Kernels& k, const std::function<void()>& check) {
  const Tiles tiles(height, width);
  const size_t row = (classes + 3) / 4 * 4, pixels = tiles.pixels() * row;
  std::vector<Filter> filters;
  if (options.steps > 0) {
    for (const Gaussian& gaussian : {options.gaussian, options.bilateral}) {
      check();
      if (gaussian.weight > 0) filters.emplace_back(picture, tiles, gaussian, threads, k, check);
    }
  }

  // The arena: the unary energy, the distributions before and after a step, the values of the whole
  // picture's lattices, and for each thread the values of a tile and scratch memory of the kernels.
  size_t whole = 0, tile_values = 0;
  for (const Filter& filter : filters) (filter.tiled ? tile_values : whole) += filter.points * row;
  const size_t scratch = 2 * kGroup * static_cast<size_t>(padded(classes));
  const int slots = std::min(threads, tiles.count());
  const Memory arena = allocate(3 * pixels + whole + slots * (tile_values + scratch));
  float *const unary = arena.get(), *q = unary + pixels, *next = q + pixels;
  float* const own = next + pixels + whole;  // [slots][tile_values + scratch]
  std::vector<float*> values;                // by filter that is not tiled
  float* end = next + pixels;
  for (const Filter& filter : filters) {
    values.push_back(end);
    if (!filter.tiled) end += filter.points * row;
  }

  std::vector<float> penalty;  // [classes][row]: of all classes beside class j
  if (compatibility != nullptr) {
    penalty.assign(classes * row, 0.0f);
    for (int j = 0; j < classes; ++j)
      for (int c = 0; c < classes; ++c)
        penalty[j * row + c] = compatibility[static_cast<size_t>(c) * classes + j];
  }

  parallel_for_slots(slots, tiles.count(), [&](int t, int slot) {
    std::vector<Run> runs;
    tiles.add_runs(runs, t);
    for (const Run& run : runs) {
      const size_t pixel = static_cast<size_t>(run.y) * width + run.x;
      k.crf_start(q + run.place * row, unary + run.place * row, probabilities + pixel * classes,
                  options.floor, run.n, classes, own + slot * (tile_values + scratch));
    }
  });
  for (int step = 0; step < options.steps; ++step) {
    check();
    for (size_t i = 0; i < filters.size(); ++i)
      if (!filters[i].tiled)
        filters[i].lattices[0].filter(values[i], q, row, static_cast<int>(row), threads, k);
    check();
    parallel_for_slots(slots, tiles.count(), [&](int t, int slot) {
      float* const z = own + slot * (tile_values + scratch);
      float* const to = z + scratch;  // at most one filter is tiled
      const size_t first = tiles.first(t);
      Slice slices[2];
      for (size_t i = 0; i < filters.size(); ++i) {
        const Filter& filter = filters[i];
        if (filter.tiled) {
          filter.lattices[t].filter(to, q, row, static_cast<int>(row), 1, k);
          slices[i] = filter.lattices[t].slice(to, first);
        } else {
          slices[i] = filter.lattices[0].slice(values[i], first);
        }
      }
      k.crf_update(next + first * row, unary + first * row, slices,
                   static_cast<int>(filters.size()), penalty.empty() ? nullptr : penalty.data(),
                   static_cast<int>(tiles.first(t + 1) - first), classes, z);
    });
    std::swap(q, next);
  }
  parallel_for(threads, tiles.count(), [&](int t) {
    std::vector<Run> runs;
    tiles.add_runs(runs, t);
    for (const Run& run : runs) {
      float* to = out + (static_cast<size_t>(run.y) * width + run.x) * classes;
      for (size_t p = run.place; p < run.place + run.n; ++p, to += classes)
        std::copy(q + p * row, q + p * row + classes, to);
    }
  });
}

}  // namespace seg
