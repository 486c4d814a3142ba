// The positions of the pixels of one size among those of another.
#pragma once

#include "common.cuh"

namespace seg::cuda {

// Pixel i of n lies between the pixels low and high of n_low; weight is the share of the second.
// Pixel centres correspond, as in OpenCV's INTER_LINEAR.
struct Place {
  int low, high;
  float weight;
  __device__ Place(int i, int n, int n_low) {
    const double p = min(max((i + 0.5) * n_low / n - 0.5, 0.0), n_low - 1.0);
    low = static_cast<int>(p);
    high = min(low + 1, n_low - 1);
    weight = static_cast<float>(p - low);
  }
};

}  // namespace seg::cuda
