// What stays the same from step to step: the input of the network, the prior and the affinities.
#pragma once

#include "../network.h"
#include "conv_operands.cuh"

namespace seg::cuda {

constexpr int kAreaShares = 32;    // blocks that share the area of a class
constexpr int kImageBlocks = 256;  // at most so many blocks share the sums of an image

// moments [6]: mean and standard deviation of each channel of an image [pixels][3]. sums is scratch
// memory [3][blocks], with a block for each kThreads pixels.
void measure_image(double* moments, double* sums, const float* image, size_t pixels,
                   cudaStream_t stream);

// The input of the network: the planes of the image, or with moments (residual) standardised, and
// the coordinates.
void prepare_input(float* input, const float* image, const double* moments, Extent s,
                   cudaStream_t stream);

// weight [classes] of the classes of a soft guide [pixels][classes], divided by the pixels. area is
// scratch memory [classes][kAreaShares].
void weigh_classes(float* weight, double* area, const float* soft, size_t pixels,
                   const RefineOptions& options, cudaStream_t stream);

// The log prior, the targets of the guide term and their sum, and the affinities.
void prepare_prior(float* log_prior, float* target, float* mass, float* affinity, const float* soft,
                   const float* weight, const float* image, const Offset* offsets, int count,
                   const RefineOptions& options, Extent s, cudaStream_t stream);

}  // namespace seg::cuda
