// The mapping of guide classes to labels.
#pragma once

#include <cstdint>

#include "control.h"

namespace seg::cuda {

// The guide of a cluster objective, hard [pixels] or soft [pixels][classes] (the other is null),
// and the memory for its mapping. `most` is the larger of classes and clusters.
struct GuideMemory {
  const int32_t* hard;
  const float* soft;
  int classes, clusters;
  int32_t* mapping;             // [classes]: the label that each class is mapped to
  int* present;                 // [classes + 1]: the classes that occur, in order, and their number
  unsigned long long* overlap;  // [classes][clusters]
  double *u, *v, *least;        // of the assignment, [most + 1], as the next three
  int *row_of, *from, *used;
  int32_t* target;  // [clusters]: the labels that occur, in order
};

// Adds the number of known pixels of the hard guide to *known, and sets mapping to 1 for the
// classes that occur.
void count_known(unsigned long long* known, const GuideMemory& g, size_t pixels,
                 cudaStream_t stream);

// Writes present: the classes whose mapping is not 0, in order, and their number.
void list_classes(const GuideMemory& g, cudaStream_t stream);

// Maps guide classes to labels [pixels] one to one, so that the area of pixels with both is
// largest. Further classes are mapped to the label that they overlap most. Does nothing once the
// mapping is frozen.
void set_overlap_mapping(const GuideMemory& g, const Control* c, const int32_t* labels,
                         size_t pixels, cudaStream_t stream);

// Maps the i-th class that occurs to the (i mod K)-th of the K labels that are marked in present,
// both in increasing order.
void set_modulo_mapping(const GuideMemory& g, const Control* c, const int* present,
                        cudaStream_t stream);

}  // namespace seg::cuda
