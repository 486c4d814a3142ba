// The values that are constant during a run: the network's input, and for residual the log prior,
// the targets and the affinities.
#pragma once

#include "../network.h"
#include "conv_operands.cuh"

namespace seg::cuda {

constexpr int kAreaShares = 32;    // blocks that together sum the area of a class
constexpr int kImageBlocks = 256;  // most blocks that sum the pixels of an image

// Writes moments [6]: the means and then the standard deviations of the channels of image
// [pixels][3]. sums is scratch memory [3][blocks], where blocks is pixels / kThreads, rounded up,
// but at most kImageBlocks.
void measure_image(double* moments, double* sums, const float* image, size_t pixels,
                   cudaStream_t stream);

// Writes input, the planes of image [height][width][3]. If moments is set (residual), the colours
// are standardised and two planes of coordinates follow: input has five planes instead of three.
void prepare_input(float* input, const float* image, const double* moments, Extent s,
                   cudaStream_t stream);

// Writes weight [classes]: the weights of the classes of the soft guide [pixels][classes], divided
// by the number of pixels. area is scratch memory [classes][kAreaShares].
void weigh_classes(float* weight, double* area, const float* soft, size_t pixels,
                   const RefineOptions& options, cudaStream_t stream);

// Writes log_prior and target, planes of the classes; mass, the plane of the sum of target over the
// classes; and affinity, a plane for each of `count` offsets. soft [pixels][classes] is the guide,
// weight is the result of weigh_classes().
void prepare_prior(float* log_prior, float* target, float* mass, float* affinity, const float* soft,
                   const float* weight, const float* image, const Offset* offsets, int count,
                   const RefineOptions& options, Extent s, cudaStream_t stream);

}  // namespace seg::cuda
