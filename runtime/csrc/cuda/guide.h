// Operations on guides (the prior's output), scores and class maps on the device. All pointers are
// device memory and all work is queued on the stream.
#pragma once

#include <cstddef>
#include <cstdint>

#include "stream.h"

namespace seg::cuda {

// Writes guide [height][width][classes] with a sum of 1 at each pixel: with exponents the soft-max
// of scores [classes][height][width], otherwise the scores divided by their sum. All classes of a
// pixel are NaN if one of its scores is not finite, or without exponents negative, or if their sum
// is 0.
void soft_guide(float* guide, const float* scores, int height, int width, int classes,
                bool exponents, Stream stream);

// Writes parts [classes][kSumParts]: the sums of guide [pixels][classes] over kSumParts parts of
// the pixels.
constexpr int kSumParts = 64;
void class_sums(float* parts, const float* guide, size_t pixels, int classes, Stream stream);

// Writes out [pixels][count]: the columns of guide [pixels][classes] with the numbers columns
// [count], 0 for a number >= classes. With normalised, the values of each pixel are divided by
// their sum unless it is 0.
void take_classes(float* out, const float* guide, const int32_t* columns, size_t pixels,
                  int classes, int count, bool normalised, Stream stream);

// Writes wins [classes]: 1 for a class that has the largest score of some pixel of scores
// [pixels][classes] (of equal scores the first class counts), 0 for the others.
void winners(int32_t* wins, const float* scores, size_t pixels, int classes, Stream stream);

// Writes labels [pixels]: the class with the largest value of each pixel of guide
// [pixels][classes], of equal values the first; -1 if no value is above 0, -2 if a value is NaN.
// Writes shares [pixels]: the largest value of each pixel, or 0 if none is above 0.
void hard_labels(int32_t* labels, float* shares, const float* guide, size_t pixels, int classes,
                 Stream stream);

// Writes table [clusters][classes]: the number of pixels with each pair of labels [pixels] and hard
// [pixels]. Pixels whose label or class is out of range are not counted.
void pair_counts(int32_t* table, const int32_t* labels, const int32_t* hard, size_t pixels,
                 int clusters, int classes, Stream stream);

// Writes out [pixels][count]: column j is the sum of the columns k of scores [pixels][classes] with
// to[k] == j. A column with a negative to[k] is not used. to is [classes].
void merge_classes(float* out, const float* scores, const int32_t* to, size_t pixels, int classes,
                   int count, Stream stream);

// Copies guide [pixels][classes] to scores [pixels][classes] at the pixels where mask [pixels] is
// not zero.
void keep_pixels(float* scores, const float* guide, const uint8_t* mask, size_t pixels, int classes,
                 Stream stream);

// Writes counts [8][8][8]: the number of pixels of picture [pixels][3] in each of 8 x 8 x 8 equal
// parts of the colours in [0, 1].
constexpr int kColours = 512;
void colour_counts(int32_t* counts, const float* picture, size_t pixels, Stream stream);

// Writes out [height][width][channels] from image [from_height][from_width][channels]: with
// shrink() if no side grows, otherwise interpolated bilinearly between pixel centres.
void resize_planes(float* out, const float* image, int height, int width, int from_height,
                   int from_width, int channels, Stream stream);

}  // namespace seg::cuda
