// Labels, losses and scores from the responses of the network.
#pragma once

#include <cstdint>

#include "mapping.h"

namespace seg::cuda {

// Residual: z becomes its soft-max; writes the labels, marks them in present, and writes the guide
// term of each block to losses [kLosses][blocks].
void soften_scores(float* z, int32_t* labels, int* present, const float* target, double* losses,
                   int classes, Extent s, cudaStream_t stream);

// The first channel with the largest normed response; marks the labels in present.
void label_pixels(int32_t* labels, int* present, const Input& response, int classes, Extent s,
                  cudaStream_t stream);

// dr by the normed response of the cluster objectives, and losses [kLosses][blocks].
void cluster_loss(float* dr, double* losses, const float* head, const NormState& norm,
                  const int32_t* labels, const GuideMemory& g, const Control* c,
                  const RefineOptions& options, Extent s, cudaStream_t stream);

// dz by the scores from their soft-max: the guide term and the pairs with the neighbours; the pair
// losses of the blocks are written to losses [kLosses][blocks].
void residual_loss(float* dz, double* losses, const float* probabilities, const float* target,
                   const float* mass, const float* affinity, const Offset* offsets, int count,
                   const RefineOptions& options, Extent s, cudaStream_t stream);

// scores [pixels][classes]: the response as it is, or the soft-max of it.
void copy_scores(float* scores, const Input& response, bool softmax, int classes, Extent s,
                 cudaStream_t stream);

}  // namespace seg::cuda
