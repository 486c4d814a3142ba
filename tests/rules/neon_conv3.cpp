// Runs conv3 on one strip of tiles, for neon_counts.py: neon_conv3 channels tiles times.
#include <cstdlib>
#include <vector>

#include "kernels.h"

int main(int, char** argv) {
  const int channels = std::atoi(argv[1]), tiles = std::atoi(argv[2]), times = std::atoi(argv[3]);
  const int stride = seg::padded(channels), width = 2 * tiles;
  std::vector<float> in(2 * width * stride), out(2 * width * stride), w(16 * channels * stride),
      scratch(seg::strip_floats(channels, channels));
  const seg::Map from = {in.data(), width * stride, stride};
  const seg::Map to = {out.data(), width * stride, stride};
  for (int i = 0; i < times; ++i)
    seg::base_kernels()->conv3(to, from, {}, w.data(), nullptr, true, 0, 0, tiles, 2, width,
                               channels, channels, scratch.data());
}
