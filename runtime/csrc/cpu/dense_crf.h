// The fully connected CRF of a picture's pixels (Kraehenbuehl, Koltun 2011).
#pragma once

#include <cstdint>
#include <functional>

#include "lattice.h"

namespace seg {

struct CrfOptions {
  int steps;
  Gaussian bilateral;
  Gaussian gaussian;
  float floor;  // smaller probabilities are raised to it
};

// Writes out [height][width][classes]: the distribution of each pixel after `steps` iterations of
// mean field. picture is [height][width][3], probabilities is [height][width][classes].
// compatibility [classes][classes] is the penalty of class k beside class j; null is Potts' model:
// 1, and 0 for equal classes. A Gaussian with weight 0 is not computed. The result does not depend
// on the number of threads. check() is called
// between the parts of the work; it may throw to end the run. Throws
// std::overflow_error (lattice.h).
void dense_crf(float* out, const uint8_t* picture, const float* probabilities, int height,
               int width, int classes, const CrfOptions& options, const float* compatibility,
               int threads, const Kernels& k, const std::function<void()>& check);

}  // namespace seg
