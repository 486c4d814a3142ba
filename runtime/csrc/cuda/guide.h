// Guides, scores and class maps on the device. All pointers are device memory, all work is queued
// on the stream.
#pragma once

#include <cstddef>
#include <cstdint>

#include "stream.h"

namespace seg::cuda {

// guide [height][width][classes], each pixel's sum 1, of scores [classes][height][width]: their
// soft-max if `exponents`, else they are probabilities. NaN where they are not what they should be.
void soft_guide(float* guide, const float* scores, int height, int width, int classes,
                bool exponents, Stream stream);

// parts [classes][kSumParts]: sums of guide [pixels][classes] over parts of the pixels.
constexpr int kSumParts = 64;
void class_sums(float* parts, const float* guide, size_t pixels, int classes, Stream stream);

// out [pixels][count]: columns of guide [pixels][classes], zero where there is no such; each pixel
// scaled to sum 1, unless it is zero, if `normalised`.
void take_classes(float* out, const float* guide, const int32_t* columns, size_t pixels,
                  int classes, int count, bool normalised, Stream stream);

// wins [classes]: 1 for those that are the first largest of some pixel of scores.
void winners(int32_t* wins, const float* scores, size_t pixels, int classes, Stream stream);

// labels, shares [pixels]: the first largest class of each pixel of guide [pixels][classes], -1
// where all are zero, -2 where one is NaN; and its value.
void hard_labels(int32_t* labels, float* shares, const float* guide, size_t pixels, int classes,
                 Stream stream);

// table [clusters][classes]: how many pixels have a label and a class; others do not count.
void pair_counts(int32_t* table, const int32_t* labels, const int32_t* hard, size_t pixels,
                 int clusters, int classes, Stream stream);

// out [pixels][count]: column k of scores [pixels][classes] goes to column to[k], added to what is
// there; nowhere if that is negative.
void merge_classes(float* out, const float* scores, const int32_t* to, size_t pixels, int classes,
                   int count, Stream stream);

// scores [pixels][classes] become the guide's where mask [pixels] is not zero.
void keep_pixels(float* scores, const float* guide, const uint8_t* mask, size_t pixels, int classes,
                 Stream stream);

// counts [8][8][8] of the colours of a picture [pixels][3] in [0, 1].
constexpr int kColours = 512;
void colour_counts(int32_t* counts, const float* picture, size_t pixels, Stream stream);

// out [height][width][channels]: planes of another size averaged, or interpolated where a side
// grows.
void resize_planes(float* out, const float* planes, int height, int width, int from_height,
                   int from_width, int channels, Stream stream);

}  // namespace seg::cuda
