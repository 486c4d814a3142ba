// Labels, losses and scores from the responses of the network. Maps are planes (conv_operands.cuh).
// losses is [kLosses][blocks]: similarity, guide, and spatial or pair loss of each block of
// kThreads pixels.
#pragma once

#include <cstdint>

#include "mapping.h"

namespace seg::cuda {

// For residual: replaces z by its soft-max, writes labels [pixels] (the first channel with the
// largest z), sets present [classes] to 1 for these labels, and writes the guide loss of each block
// to losses.
void soften_scores(float* z, int32_t* labels, int* present, const float* target, double* losses,
                   int classes, Extent s, cudaStream_t stream);

// For the cluster objectives: writes labels [pixels] (the first channel with the largest response)
// and sets present [classes] to 1 for these labels.
void label_pixels(int32_t* labels, int* present, const Input& response, int classes, Extent s,
                  cudaStream_t stream);

// Writes dr, the gradient by the normed response of the cluster objectives, and the three losses of
// each block. head is the response before the norm.
void cluster_loss(float* dr, double* losses, const float* head, const NormState& norm,
                  const int32_t* labels, const GuideMemory& g, const Control* c,
                  const RefineOptions& options, Extent s, cudaStream_t stream);

// Writes dz, the gradient of guide loss + lambda * pair loss by the scores z, from probabilities =
// softmax(z), and the pair loss of each block to losses. The other arrays are those of
// prepare_prior().
void residual_loss(float* dz, double* losses, const float* probabilities, const float* target,
                   const float* mass, const float* affinity, const Offset* offsets, int count,
                   const RefineOptions& options, Extent s, cudaStream_t stream);

// Writes scores [pixels][classes]: the response, or with softmax its soft-max.
void copy_scores(float* scores, const Input& response, bool softmax, int classes, Extent s,
                 cudaStream_t stream);

}  // namespace seg::cuda
