// The mapping of guide classes to labels.
#include "mapping.h"
#include "pixels.cuh"

namespace seg::cuda {
namespace {

// An overlap with a soft guide is counted in units of 2^-32 pixels, because a sum of integers does
// not depend on the order of its terms. An overlap with a hard guide is a number of pixels.
constexpr double kFixedPoint = 4294967296.0;

// Returns whether this step computes the overlap mapping. The first step of each run does. A later
// step does if c->batches, which in a warm run also counts the steps of earlier runs, is below
// kMappingSteps. No step does after the run has stopped.
__device__ inline bool maps(const Control* c) {
  return !c->stopped && (c->batches < kMappingSteps || c->step == 0);
}

// Adds each pixel to the overlap of its label with its guide class; with a soft guide, adds the
// probability of each class to the overlap of the label with this class. One thread per pixel.
__global__ void measure_overlap(GuideMemory g, const Control* c, const int32_t* labels,
                                size_t pixels) {
  const size_t n = static_cast<size_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (!maps(c) || n >= pixels) return;
  unsigned long long* const column = g.overlap + labels[n];
  if (g.hard != nullptr) {
    const int k = g.hard[n];
    if (k >= 0) atomicAdd(column + static_cast<size_t>(k) * g.clusters, 1ull);
    return;
  }
  for (int k = 0; k < g.classes; ++k) {
    const double q = g.soft[n * g.classes + k];
    if (q > 0)
      atomicAdd(column + static_cast<size_t>(k) * g.clusters,
                static_cast<unsigned long long>(q * kFixedPoint + 0.5));
  }
}

// Writes the mapping of set_overlap_mapping(), then sets the overlap to zero. The method is
// shortest augmenting paths, with the same variables as in cpu/assignment.cpp. Rows are the smaller
// of the two sets (classes and labels). Each thread computes some of the columns. One block.
__global__ void assign_overlap(GuideMemory g, const Control* c) {
  SEG_SHARED(memory);
  double* const best = reinterpret_cast<double*>(memory);
  int* const where = reinterpret_cast<int*>(best + kControlThreads);
  if (!maps(c)) return;
  const int me = threadIdx.x, threads = blockDim.x;
  const bool classes_are_rows = g.classes <= g.clusters;
  const int rows = classes_are_rows ? g.classes : g.clusters,
            columns = classes_are_rows ? g.clusters : g.classes;
  const auto cost = [&](int row, int column) {
    const size_t k = classes_are_rows ? row : column, to = classes_are_rows ? column : row;
    return -static_cast<double>(g.overlap[k * g.clusters + to]);
  };
  const double kFar = 1e300;
  // Map each class to the label that it overlaps most. The assignment below replaces this label for
  // each class that gets a label of its own.
  for (int k = me; k < g.classes; k += threads) {
    const unsigned long long* row = g.overlap + static_cast<size_t>(k) * g.clusters;
    int most = 0;
    for (int j = 1; j < g.clusters; ++j)
      if (row[j] > row[most]) most = j;
    g.mapping[k] = most;
  }
  for (int j = me; j <= columns; j += threads) {  // columns count from 1; 0 stands for none
    g.v[j] = 0;
    g.row_of[j] = 0;
    if (j <= rows) g.u[j] = 0;
  }
  __syncthreads();
  for (int r = 1; r <= rows; ++r) {
    if (me == 0) g.row_of[0] = r;
    for (int j = me; j <= columns; j += threads) g.least[j] = kFar, g.used[j] = 0;
    __syncthreads();
    int j = 0;
    for (bool more = true;
         more;) {  // extend the tree of shortest paths until it contains a column without a row
      if (me == 0) g.used[j] = 1;
      __syncthreads();
      const int i = g.row_of[j];
      double delta = kFar;
      int next = columns + 1;
      for (int k = me + 1; k <= columns; k += threads) {
        if (g.used[k]) continue;
        const double reduced = cost(i - 1, k - 1) - g.u[i] - g.v[k];
        if (reduced < g.least[k]) {
          g.least[k] = reduced;
          g.from[k] = j;
        }
        if (g.least[k] < delta) {
          delta = g.least[k];
          next = k;
        }
      }
      best[me] = delta;
      where[me] = next;
      for (int half = threads / 2; half > 0; half /= 2) {  // the first of the smallest
        __syncthreads();
        if (me < half && (best[me + half] < best[me] ||
                          (best[me + half] == best[me] && where[me + half] < where[me]))) {
          best[me] = best[me + half];
          where[me] = where[me + half];
        }
      }
      __syncthreads();
      delta = best[0];
      next = where[0];
      for (int k = me; k <= columns; k += threads) {
        if (g.used[k]) {
          g.u[g.row_of[k]] += delta;
          g.v[k] -= delta;
        } else {
          g.least[k] -= delta;
        }
      }
      j = next;
      more = g.row_of[j] != 0;  // read before another thread changes it
      __syncthreads();
    }
    if (me == 0)
      for (; j != 0; j = g.from[j]) g.row_of[j] = g.row_of[g.from[j]];
    __syncthreads();
  }
  for (int k = me + 1; k <= columns; k += threads) {
    if (g.row_of[k] == 0) continue;
    if (classes_are_rows)
      g.mapping[g.row_of[k] - 1] = k - 1;
    else
      g.mapping[k - 1] = g.row_of[k] - 1;
  }
  __syncthreads();
  const size_t cells = static_cast<size_t>(g.classes) * g.clusters;
  for (size_t e = me; e < cells; e += threads) g.overlap[e] = 0;
}

// Does the work of set_modulo_mapping(). label_occurs [g.clusters] is 1 for each label that occurs,
// 0 for others; c->clusters is the number of ones. g.present lists the classes. One block.
__global__ void map_modulo(GuideMemory g, const Control* c, const int* label_occurs) {
  if (c->stopped) return;
  for (int k = threadIdx.x; k < g.clusters; k += blockDim.x) {
    if (!label_occurs[k]) continue;
    int before = 0;
    for (int j = 0; j < k; ++j) before += label_occurs[j];
    g.target[before] = k;
  }
  __syncthreads();
  for (int i = threadIdx.x; i < g.present[g.classes]; i += blockDim.x)
    g.mapping[g.present[i]] = g.target[i % c->clusters];
}

// Does the work of count_known(): mapping marks the classes that occur. One thread per pixel.
__global__ void guide_census(unsigned long long* known, int32_t* mapping, const int32_t* hard,
                             size_t pixels) {
  const size_t n = static_cast<size_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (n >= pixels || hard[n] < 0) return;
  atomicAdd(known, 1ull);
  mapping[hard[n]] = 1;
}

// Does the work of list_classes(). One block.
__global__ void list_present(GuideMemory g) {
  for (int k = threadIdx.x; k < g.classes; k += blockDim.x) {
    int before = 0;
    for (int j = 0; j < k; ++j) before += g.mapping[j] != 0;
    if (g.mapping[k] != 0) g.present[before] = k;
    if (k == g.classes - 1) g.present[g.classes] = before + (g.mapping[k] != 0);
  }
}

}  // namespace

void count_known(unsigned long long* known, const GuideMemory& g, size_t pixels,
                 cudaStream_t stream) {
  SEG_LAUNCH(guide_census, dim3(blocks_of(pixels, kThreads)), dim3(kThreads), 0, stream, known,
             g.mapping, g.hard, pixels);
}

void list_classes(const GuideMemory& g, cudaStream_t stream) {
  SEG_LAUNCH(list_present, dim3(1), dim3(kControlThreads), 0, stream, g);
}

void set_overlap_mapping(const GuideMemory& g, const Control* c, const int32_t* labels,
                         size_t pixels, cudaStream_t stream) {
  SEG_LAUNCH(measure_overlap, dim3(blocks_of(pixels, kThreads)), dim3(kThreads), 0, stream, g, c,
             labels, pixels);
  SEG_LAUNCH(assign_overlap, dim3(1), dim3(kControlThreads),
             kControlThreads * (sizeof(double) + sizeof(int)), stream, g, c);
}

void set_modulo_mapping(const GuideMemory& g, const Control* c, const int* present,
                        cudaStream_t stream) {
  SEG_LAUNCH(map_modulo, dim3(1), dim3(kControlThreads), 0, stream, g, c, present);
}

}  // namespace seg::cuda
