// All kernels of one instruction set, and their table: an entry for each member of Kernels
// (kernels.h), in the same order. A missing entry is a compile error. Each target_*.cpp includes
// this file inside the namespace of its instruction set.

// clang-format off
#include "simd-inl.h"
#include "conv-inl.h"
#include "winograd-inl.h"
#include "pixel-inl.h"
#include "filter-inl.h"
#include "crf-inl.h"
// clang-format on

// Returns the table of the instruction set with this name.
constexpr Kernels table(const char* name) {
  return {
      .name = name,
      .lanes = kLanes,
      .conv3 = conv3,
      .conv3_dw = conv3_dw,
      .conv = conv,
      .conv_dw = conv_dw,
      .sums = sums,
      .moments = moments,
      .normalize = normalize,
      .bn_sums = bn_sums,
      .bn_backward = bn_backward,
      .argmax = argmax,
      .softmax = softmax,
      .prior = prior,
      .cross_entropy = cross_entropy,
      .cluster_loss = cluster_loss,
      .spatial_loss = spatial_loss,
      .affinity = affinity,
      .residual_loss = residual_loss,
      .sgd = sgd,
      .to_planes = to_planes,
      .bytes_to_planes = bytes_to_planes,
      .add_products = add_products,
      .add_planes = add_planes,
      .window_sums = window_sums,
      .solve = solve,
      .window_means = window_means,
      .apply = apply,
      .apply_band = apply_band,
      .upsample_band = upsample_band,
      .blend_rows = blend_rows,
      .blend_byte_rows = blend_byte_rows,
      .mean_colours = mean_colours,
      .blend_pixels = blend_pixels,
      .crf_simplex = crf_simplex,
      .crf_splat = crf_splat,
      .crf_blur = crf_blur,
      .crf_start = crf_start,
      .crf_update = crf_update,
  };
}
