// The mapping of guide classes to labels.
#pragma once

#include <cstdint>

#include "control.h"

namespace seg::cuda {

// A cluster objective's guide: hard [pixels] or soft [pixels][classes]; and room for its mapping.
struct GuideMemory {
  const int32_t* hard;
  const float* soft;
  int classes, clusters;
  int32_t* mapping;             // [classes]
  int* present;                 // [classes + 1]: classes that occur, in order; how many
  unsigned long long* overlap;  // [classes][clusters]
  double *u, *v, *least;        // of the assignment, [most + 1]
  int *row_of, *from, *used;
  int32_t* target;  // [clusters]
};

// Adds the pixels of the hard guide with a known class to *known, and marks the classes that occur.
void count_known(unsigned long long* known, const GuideMemory& g, size_t pixels,
                 cudaStream_t stream);

// The marked classes, in order, and how many they are.
void list_classes(const GuideMemory& g, cudaStream_t stream);

// Guide classes to labels so that the shared area is largest, one to one; further classes get the
// label that they overlap most. Does nothing once the mapping is frozen.
void set_overlap_mapping(const GuideMemory& g, const Control* c, const int32_t* labels,
                         size_t pixels, cudaStream_t stream);

// i-th class that occurs -> (i mod K')-th present label, both in increasing order.
void set_modulo_mapping(const GuideMemory& g, const Control* c, const int* present,
                        cudaStream_t stream);

}  // namespace seg::cuda
