// Mean field of the dense CRF. Rows of pixels and points have the classes, rounded up to a multiple
// of 4 floats; the additional ones are 0 and in the unary energy kNever.
#include "dense_crf.h"

#include <algorithm>
#include <vector>

namespace seg {

void dense_crf(float* out, const uint8_t* picture, const float* probabilities, int height,
               int width, int classes, const CrfOptions& options, const float* compatibility,
               int threads, const Kernels& k, const std::function<void()>& check) {
  const Tiles tiles(height, width);
  const size_t pixels = tiles.pixels();
  const int row = (classes + 3) / 4 * 4;
  std::vector<Lattice> lattices;
  lattices.reserve(2);
  if (options.steps > 0) {
    for (const Gaussian& gaussian : {options.gaussian, options.bilateral}) {
      check();
      if (gaussian.weight > 0) lattices.emplace_back(picture, tiles, gaussian, threads, k);
    }
  }
  size_t points = 0;
  for (const Lattice& lattice : lattices) points += lattice.points();

  // The arena: the unary energy, the distributions, and the values of all lattices.
  const Memory arena = allocate((2 * pixels + points) * row);
  float *const unary = arena.get(), *const q = unary + pixels * row;
  float* values[2] = {q + pixels * row, nullptr};
  if (!lattices.empty()) values[1] = values[0] + lattices[0].points() * static_cast<size_t>(row);

  std::vector<float> penalty;  // [classes][row]: of all classes k beside class j
  if (compatibility != nullptr) {
    penalty.assign(static_cast<size_t>(classes) * row, 0.0f);
    for (int j = 0; j < classes; ++j)
      for (int c = 0; c < classes; ++c) penalty[j * row + c] = compatibility[c * classes + j];
  }
  const size_t scratch_floats = 2 * kGroup * static_cast<size_t>(padded(classes));
  std::vector<float> scratch(kBlocks * scratch_floats);
  // The runs of each block are computed with the scratch memory z of this block.
  parallel_for(threads, kBlocks, [&](int block) {
    float* const z = scratch.data() + block * scratch_floats;
    tiles.runs(block, [&](size_t place, int y, int x, int n) {
      const size_t pixel = static_cast<size_t>(y) * width + x;
      k.crf_start(q + place * row, unary + place * row, probabilities + pixel * classes,
                  options.smallest, n, classes, z);
    });
  });
  for (int step = 0; step < options.steps; ++step) {
    check();
    for (size_t i = 0; i < lattices.size(); ++i) lattices[i].filter(values[i], q, row, threads, k);
    parallel_for(threads, kBlocks, [&](int block) {
      const size_t first = pixels * block / kBlocks, last = pixels * (block + 1) / kBlocks;
      Slice slices[2];
      for (size_t i = 0; i < lattices.size(); ++i) slices[i] = lattices[i].slice(values[i], first);
      k.crf_update(q + first * row, unary + first * row, slices, static_cast<int>(lattices.size()),
                   penalty.empty() ? nullptr : penalty.data(), static_cast<int>(last - first),
                   classes, scratch.data() + block * scratch_floats);
    });
  }
  parallel_for(threads, kBlocks, [&](int block) {
    tiles.runs(block, [&](size_t place, int y, int x, int n) {
      float* to = out + (static_cast<size_t>(y) * width + x) * classes;
      for (size_t p = place; p < place + n; ++p, to += classes)
        std::copy(q + p * row, q + p * row + classes, to);
    });
  });
}

}  // namespace seg
