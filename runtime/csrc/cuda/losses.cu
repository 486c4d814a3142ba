// What a refinement step does between its convolutions: batch norm, labels, mappings, losses, and
// the decisions of the loop, which are taken on the device. Float sums are of doubles in a fixed
// order, so that a seed gives the same answer every time.
#pragma once

#include "../network.h"
#include "common.cuh"
#include "conv.cuh"

namespace seg::cuda {

constexpr int kThreads = 128;    // of a block with a pixel, or a channel, each
constexpr int kJudges = 256;     // of a block that works alone
constexpr int kNorms = 4;        // most norms of a network
constexpr int kAreaShares = 32;  // blocks that share a class's area
constexpr int kLosses = 3;       // sums: similarity, guide, spatial (residual: pairs)
constexpr int kMappingSteps = 10;
constexpr int kCheckEvery = 10;  // steps between two looks of the early stop
constexpr int kChecks = 3;       // calm looks in a row that stop
constexpr double kNormEps = 1e-5;
constexpr double kRunning = 0.1;              // share of a new picture in the running statistics
constexpr float kSmallestPrior = 1e-4f;       // below it a prior's probability counts as this
constexpr double kFixedPoint = 4294967296.0;  // units of an overlap: integers add in any order

// What the loop knows. The host writes it before a run and reads it after.
struct Control {
  int64_t batches;
  StepRecord* records;
  double guide_pixels, checked_loss, loss;
  unsigned long long same;  // labels as at the last look
  float weight;             // of the spatial loss in this step
  int label_floor, floor;
  int step, stop, stopped, have_kept, clusters, calm;
  int over;  // as stopped, but changed between steps only
};

// A picture's pixel: its number, and its place in a plane.
struct Pixel {
  int y, x;
  size_t number, n;
  bool inside;
  __device__ explicit Pixel(Extent s) {
    number = static_cast<size_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    inside = number < static_cast<size_t>(s.height) * s.width;
    y = static_cast<int>(number / s.width);
    x = static_cast<int>(number % s.width);
    n = s.at(y, x);
  }
};

// The sum over a block, a power of two of threads, for all of them.
__device__ inline double block_sum(double value, double* shared) {
  shared[threadIdx.x] = value;
  for (int half = blockDim.x / 2; half > 0; half /= 2) {
    __syncthreads();
    if (static_cast<int>(threadIdx.x) < half) shared[threadIdx.x] += shared[threadIdx.x + half];
  }
  __syncthreads();
  const double total = shared[0];
  __syncthreads();
  return total;
}

// --- batch norm -------------------------------------------------------------------------------

// From the tiles' moments [2][channels][tiles], or (sums null) from the running ones. A block has a
// channel.
__global__ void finish_norm(NormState to, const float* sums, const float* gamma, const float* beta,
                            const float* running, Extent s) {
  SEG_SHARED(memory);
  double* const shared = reinterpret_cast<double*>(memory);
  const int c = blockIdx.x, channels = gridDim.x, tiles = s.tiles();
  double mean = 0, m2 = 0;
  if (sums == nullptr) {
    mean = running[c];
    m2 = running[channels + c];
  } else {
    const double n = static_cast<double>(s.height) * s.width;
    const float* sum = sums + static_cast<size_t>(c) * tiles;
    const float* square = sums + static_cast<size_t>(channels + c) * tiles;
    for (int t = threadIdx.x; t < tiles; t += blockDim.x) mean += sum[t];
    mean = block_sum(mean, shared) / n;
    for (int t = threadIdx.x; t < tiles; t += blockDim.x) {  // Chan's rule
      const double count = s.inside(t), off = sum[t] / count - mean;
      m2 += square[t] + count * off * off;
    }
    m2 = block_sum(m2, shared) / n;
  }
  if (threadIdx.x != 0) return;
  const double inv = 1.0 / sqrt(m2 + kNormEps);
  to.mean[c] = static_cast<float>(mean);
  to.inv[c] = static_cast<float>(inv);
  to.scale[c] = static_cast<float>(gamma[c] * inv);
  to.shift[c] = beta[c];
}

// dgamma, dbeta and what the gradient takes off, from sums [2][channels][count] of d and
// d (x - mean). A block has a channel.
__global__ void finish_norm_gradient(float* dgamma, float* dbeta, NormState of, const float* sums,
                                     int count, double pixels) {
  SEG_SHARED(memory);
  double* const shared = reinterpret_cast<double*>(memory);
  const int c = blockIdx.x, channels = gridDim.x;
  double a = 0, b = 0;
  for (int t = threadIdx.x; t < count; t += blockDim.x) {
    a += sums[static_cast<size_t>(c) * count + t];
    b += sums[static_cast<size_t>(channels + c) * count + t];
  }
  a = block_sum(a, shared);
  b = block_sum(b, shared);
  if (threadIdx.x != 0) return;
  const double inv = of.inv[c];
  dbeta[c] = static_cast<float>(a);
  dgamma[c] = static_cast<float>(b * inv);
  of.a[c] = static_cast<float>(a / pixels);
  of.b[c] = static_cast<float>(b * inv * inv / pixels);
}

// Sums [2][channels][blocks across] of d and d (x - mean). Blocks: (share of the pixels, channel).
__global__ void channel_sums(float* sums, const float* d, const float* x, const float* mean,
                             Extent s) {
  SEG_SHARED(memory);
  double* const shared = reinterpret_cast<double*>(memory);
  const int c = blockIdx.y, channels = gridDim.y;
  const size_t plane = s.plane();
  float a = 0, b = 0;
  for (int y = blockIdx.x; y < s.height; y += gridDim.x)
    for (int i = threadIdx.x; i < s.width; i += blockDim.x) {
      const float v = d[c * plane + s.at(y, i)];
      a += v;
      b += v * (x[c * plane + s.at(y, i)] - mean[c]);
    }
  const double all = block_sum(a, shared), product = block_sum(b, shared);
  if (threadIdx.x != 0) return;
  sums[static_cast<size_t>(c) * gridDim.x + blockIdx.x] = static_cast<float>(all);
  sums[static_cast<size_t>(channels + c) * gridDim.x + blockIdx.x] = static_cast<float>(product);
}

// --- labels and mappings ----------------------------------------------------------------------

// Residual: z becomes its soft-max; the label; the guide term of each block.
__global__ void soften(float* z, int32_t* labels, int* present, const float* target, double* losses,
                       int classes, Extent s) {
  SEG_SHARED(memory);
  const Pixel p(s);
  const size_t plane = s.plane();
  double guide = 0;
  if (p.inside) {
    float best = z[p.n];
    int label = 0;
    for (int k = 1; k < classes; ++k) {
      const float v = z[k * plane + p.n];
      if (v > best) best = v, label = k;
    }
    labels[p.number] = label;
    present[label] = 1;
    float total = 0;
    for (int k = 0; k < classes; ++k) total += expf(z[k * plane + p.n] - best);
    const float lse = best + logf(total);
    for (int k = 0; k < classes; ++k) {
      float* at = z + k * plane + p.n;
      guide += target[k * plane + p.n] * (lse - *at);
      *at = expf(*at - best) / total;
    }
  }
  guide = block_sum(guide, reinterpret_cast<double*>(memory));
  if (threadIdx.x == 0) losses[gridDim.x + blockIdx.x] = guide;
}

// The first channel with the largest normed response.
__global__ void find_labels(int32_t* labels, int* present, Input response, int classes, Extent s) {
  const Pixel p(s);
  if (!p.inside) return;
  float best = response(0, p.n);
  int label = 0;
  for (int k = 1; k < classes; ++k) {
    const float v = response(k, p.n);
    if (v > best) best = v, label = k;
  }
  labels[p.number] = label;
  present[label] = 1;
}

// Counts the labels, ends the run where too few are left, and sets the step's spatial weight.
__global__ void begin_step(Control* c, const int* present, int classes, int weighting, float mu,
                           float beta) {
  SEG_SHARED(memory);
  double found = 0;
  for (int k = threadIdx.x; k < classes; k += blockDim.x) found += present[k];
  found = block_sum(found, reinterpret_cast<double*>(memory));
  if (threadIdx.x != 0 || c->stopped) return;
  c->clusters = static_cast<int>(found);
  if (c->label_floor > 0 && c->clusters < c->label_floor && c->have_kept) {
    c->stop = kSilhouette;  // the weights before the last update are restored
    c->stopped = 1;
  }
  c->weight = mu;
  if (weighting == kFsf) c->weight = static_cast<float>(found / beta);
  if (weighting == kScf) c->weight = static_cast<float>(mu / found);
}

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

// Whether the overlap mapping still follows the labels.
__device__ inline bool maps(const Control* c) {
  return !c->stopped && (c->batches < kMappingSteps || c->step == 0);
}

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

// Guide classes to labels so that the shared area is largest, one to one (shortest augmenting
// paths, the columns of a row side by side); classes beyond the number of labels take the label
// that they overlap most. One block. Clears the overlap.
__global__ void assign_overlap(GuideMemory g, const Control* c) {
  SEG_SHARED(memory);
  double* const best = reinterpret_cast<double*>(memory);
  int* const where = reinterpret_cast<int*>(best + kJudges);
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
  for (int k = me; k < g.classes; k += threads) {
    const unsigned long long* row = g.overlap + static_cast<size_t>(k) * g.clusters;
    int most = 0;
    for (int j = 1; j < g.clusters; ++j)
      if (row[j] > row[most]) most = j;
    g.mapping[k] = most;
  }
  for (int j = me; j <= columns; j += threads) {  // counted from 1; 0 is none
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
    for (bool more = true; more;) {  // grow the tree of shortest paths until it meets a free column
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
      for (int half = threads / 2; half > 0; half /= 2) {  // the first of the least
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
      more = g.row_of[j] != 0;  // read before anyone changes it
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

// i-th class that occurs -> (i mod K')-th present label, both in increasing order. One block.
__global__ void map_modulo(GuideMemory g, const Control* c, const int* present) {
  if (c->stopped) return;
  for (int k = threadIdx.x; k < g.clusters; k += blockDim.x) {
    if (!present[k]) continue;
    int before = 0;
    for (int j = 0; j < k; ++j) before += present[j];
    g.target[before] = k;
  }
  __syncthreads();
  for (int i = threadIdx.x; i < g.present[g.classes]; i += blockDim.x)
    g.mapping[g.present[i]] = g.target[i % c->clusters];
}

// --- losses -----------------------------------------------------------------------------------

struct SpatialLoss {
  float scale[4];  // down, right, the two diagonals; 0 = not used
  bool huber;
  __device__ float penalty(float d) const {
    const float a = fabsf(d);
    return huber ? (a < 1 ? 0.5f * d * d : a - 0.5f) : a;
  }
  __device__ float slope(float d) const {
    if (huber) return d < -1 ? -1.0f : d > 1 ? 1.0f : d;
    return static_cast<float>((d > 0) - (d < 0));
  }
};

// Cross-entropy to the own labels and to the mapped guide, and the differences to the neighbours:
// dr by the normed response, and the three sums of each block.
__global__ void cluster_losses(float* dr, double* losses, const float* head, NormState norm,
                               const int32_t* labels, GuideMemory g, const Control* c,
                               SpatialLoss spatial, int classes, Extent s) {
  SEG_SHARED(memory);
  const Pixel p(s);
  const size_t plane = s.plane();
  double sums[kLosses] = {};
  if (p.inside) {
    const auto response = [&](int k) {
      return (head[k * plane + p.n] - norm.mean[k]) * norm.scale[k] + norm.shift[k];
    };
    const float self_weight = static_cast<float>(1.0 / (static_cast<double>(s.height) * s.width));
    const float guide_weight =
        c->guide_pixels > 0 ? static_cast<float>(1.0 / c->guide_pixels) : 0.0f;
    const int label = labels[p.number];
    const float best = response(label);  // the label is the arg max
    float total = 0;
    for (int k = 0; k < classes; ++k) total += expf(response(k) - best);
    const float log_total = logf(total);
    const bool guided = guide_weight > 0;
    const int hard = guided && g.hard != nullptr ? g.hard[p.number] : -1;
    const float* soft = guided && g.soft != nullptr ? g.soft + p.number * g.classes : nullptr;
    float mass = hard >= 0;  // of the guide at this pixel
    if (soft != nullptr)
      for (int k = 0; k < g.classes; ++k) mass += soft[k];
    const float scale = (self_weight + guide_weight * mass) / total;

    const int dys[4] = {1, 0, 1, 1}, dxs[4] = {0, 1, 1, -1};
    size_t ahead[4], behind[4];
    for (int d = 0; d < 4; ++d) {  // beyond the picture lies the pixel itself: no difference
      const int y1 = p.y + dys[d], x1 = p.x + dxs[d], y0 = p.y - dys[d], x0 = p.x - dxs[d];
      ahead[d] = y1 < s.height && x1 >= 0 && x1 < s.width ? s.at(y1, x1) : p.n;
      behind[d] = y0 >= 0 && x0 >= 0 && x0 < s.width ? s.at(y0, x0) : p.n;
    }
    float differences = 0;
    for (int k = 0; k < classes; ++k) {
      const float* r = head + k * plane;
      const float here = r[p.n], gain = norm.scale[k];
      float slope = 0;
      for (int d = 0; d < 4; ++d) {
        if (spatial.scale[d] == 0) continue;
        const float e = (r[ahead[d]] - here) * gain, f = (here - r[behind[d]]) * gain;
        differences += spatial.scale[d] * spatial.penalty(e);
        slope += spatial.scale[d] * (spatial.slope(f) - spatial.slope(e));
      }
      float v = expf(response(k) - best) * scale + c->weight * slope;
      if (k == label) v -= self_weight;
      dr[k * plane + p.n] = v;
    }
    sums[0] = log_total;
    sums[2] = differences;
    if (hard >= 0) {
      const int k = g.mapping[hard];
      dr[k * plane + p.n] -= guide_weight;
      sums[1] = log_total - (response(k) - best);
    }
    if (soft != nullptr)
      for (int i = 0; i < g.classes; ++i) {
        const int k = g.mapping[i];
        dr[k * plane + p.n] -= guide_weight * soft[i];
        sums[1] += soft[i] * (log_total - (response(k) - best));
      }
  }
  for (int i = 0; i < kLosses; ++i) {
    const double sum = block_sum(sums[i], reinterpret_cast<double*>(memory));
    if (threadIdx.x == 0) losses[i * gridDim.x + blockIdx.x] = sum;
  }
}

struct Offset2 {
  int dy, dx;
};

// dz by the scores from their soft-max p: the guide term and the pairs with the neighbours.
__global__ void residual_losses(float* dz, double* losses, const float* probabilities,
                                const float* target, const float* mass, const float* affinity,
                                const Offset2* offsets, int count, float lambda, int classes,
                                Extent s) {
  SEG_SHARED(memory);
  constexpr int kSome = 8;  // offsets at a time
  const Pixel p(s);
  const size_t plane = s.plane();
  double pair = 0;
  if (p.inside) {
    float all = 0;
    for (int first = 0; first < count; first += kSome) {
      float e[kSome];
      size_t at[kSome];
#pragma unroll
      for (int i = 0; i < kSome; ++i) {
        const int d = first + i;
        const bool used = d < count;
        const int y = used ? p.y + offsets[d].dy : -1, x = used ? p.x + offsets[d].dx : -1;
        const bool inside = y >= 0 && y < s.height && x >= 0 && x < s.width;
        e[i] = inside ? affinity[d * plane + p.n] : 0;
        at[i] = inside ? s.at(y, x) : p.n;
        all += e[i];
      }
      for (int k = 0; k < classes; ++k) {
        const float* from = probabilities + k * plane;
        float sum = first > 0 ? dz[k * plane + p.n] : 0;
#pragma unroll
        for (int i = 0; i < kSome; ++i) sum -= e[i] * from[at[i]];
        dz[k * plane + p.n] = sum;
      }
    }
    float inner = 0;  // of the gradient by p and p
    for (int k = 0; k < classes; ++k) inner += dz[k * plane + p.n] * probabilities[k * plane + p.n];
    pair = 0.5 * (static_cast<double>(all) + inner);  // every pair is met twice
    for (int k = 0; k < classes; ++k) {
      const size_t n = k * plane + p.n;
      const float q = probabilities[n];
      dz[n] = (mass[p.n] * q - target[n]) + lambda * q * (dz[n] - inner);
    }
  }
  pair = block_sum(pair, reinterpret_cast<double*>(memory));
  if (threadIdx.x == 0) {
    losses[blockIdx.x] = 0;
    losses[2 * gridDim.x + blockIdx.x] = pair;
  }
}

// Adds the blocks' losses up and ends the run where they are not finite. One block.
__global__ void judge(Control* c, const double* losses, int blocks, double pixels, bool residual,
                      float lambda) {
  SEG_SHARED(memory);
  double sums[kLosses];
  for (int i = 0; i < kLosses; ++i) {
    double sum = 0;
    for (int b = threadIdx.x; b < blocks; b += blockDim.x) sum += losses[i * blocks + b];
    sums[i] = block_sum(sum, reinterpret_cast<double*>(memory));
  }
  if (threadIdx.x != 0 || c->stopped) return;
  StepRecord r{};
  r.clusters = c->clusters;
  r.spatial = sums[2];
  if (residual) {
    r.guide = sums[1];
    r.total = r.guide + lambda * r.spatial;
  } else {
    r.first = sums[0] / pixels;
    if (c->guide_pixels > 0) r.guide = sums[1] / c->guide_pixels;
    r.total = r.first + r.guide + static_cast<double>(c->weight) * r.spatial;
  }
  c->records[c->step] = r;
  c->loss = r.total;
  if (!isfinite(r.total)) {
    c->stop = kDiverged;
    c->stopped = 1;
  }
}

// --- the update -------------------------------------------------------------------------------

// SGD with momentum; keeps what was before.
__global__ void update(const Control* c, float* w, float* v, float* kept_w, float* kept_v,
                       const float* gradient, float lr, float momentum, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n || c->stopped) return;
  kept_w[i] = w[i];
  kept_v[i] = v[i];
  v[i] = momentum * v[i] + gradient[i];
  w[i] -= lr * v[i];
}

// Counts the labels that are as at the last look, every kCheckEvery steps, and notes them.
__global__ void compare_labels(Control* c, int32_t* checked, const int32_t* labels, size_t pixels) {
  const size_t n = static_cast<size_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (c->stopped || c->step % kCheckEvery != 0 || n >= pixels) return;
  if (checked[n] == labels[n]) atomicAdd(&c->same, 1ull);
  checked[n] = labels[n];
}

struct Norms {
  Norm norm[kNorms];
  NormState state[kNorms];
  int count;
};

// The running statistics, the counters, and whether this was the last step; clears the labels'
// marks and tells the host. One block.
__global__ void end_step(Control* c, Norms norms, float* buffers, float* kept, int* present,
                         int classes, double pixels, int min_labels, float early_stop,
                         volatile int* told) {
  for (int k = threadIdx.x; k < classes; k += blockDim.x) present[k] = 0;
  if (c->stopped) {
    if (threadIdx.x == 0) told[1] = c->over = 1;
    return;
  }
  for (int i = 0; i < norms.count; ++i) {
    const Norm& of = norms.norm[i];
    for (int k = threadIdx.x; k < of.channels; k += blockDim.x) {
      const double inv = norms.state[i].inv[k], var = 1.0 / (inv * inv) - kNormEps;
      const double unbiased = pixels > 1 ? var * pixels / (pixels - 1) : var;
      float &mean = buffers[of.mean + k], &running = buffers[of.var + k];
      kept[of.mean + k] = mean;
      kept[of.var + k] = running;
      mean = static_cast<float>((1 - kRunning) * mean + kRunning * norms.state[i].mean[k]);
      running = static_cast<float>((1 - kRunning) * running + kRunning * unbiased);
    }
  }
  __syncthreads();  // all have read stopped
  if (threadIdx.x != 0) return;
  const int step = c->step++;
  c->have_kept = 1;
  ++c->batches;
  if (c->floor > 0 && c->clusters <= c->floor) {
    c->stop = c->label_floor >= min_labels ? kSilhouette : kMinLabels;
    c->stopped = 1;
  } else if (early_stop > 0 && step % kCheckEvery == 0) {
    const bool quiet = step > 0 &&
                       static_cast<float>(c->same) >= early_stop * static_cast<float>(pixels) &&
                       fabs(c->loss - c->checked_loss) < 0.01 * fabs(c->checked_loss);
    c->calm = quiet ? c->calm + 1 : 0;
    c->checked_loss = c->loss;
    c->same = 0;
    if (c->calm == kChecks) {
      c->stop = kConverged;
      c->stopped = 1;
    }
  }
  c->over = c->stopped;
  told[0] = c->step;
  told[1] = c->stopped;
}

// --- before and after the loop ----------------------------------------------------------------

// Sums over the blocks of each channel of an image [pixels][3], or, with a mean, of its square
// deviation: sums [3][blocks].
__global__ void image_sums(double* sums, const float* image, const double* mean, size_t pixels) {
  SEG_SHARED(memory);
  double sum[3] = {};
  for (size_t n = static_cast<size_t>(blockIdx.x) * blockDim.x + threadIdx.x; n < pixels;
       n += static_cast<size_t>(gridDim.x) * blockDim.x)
    for (int c = 0; c < 3; ++c) {
      const double v = image[3 * n + c] - (mean != nullptr ? mean[c] : 0);
      sum[c] += mean != nullptr ? v * v : v;
    }
  for (int c = 0; c < 3; ++c) {
    const double all = block_sum(sum[c], reinterpret_cast<double*>(memory));
    if (threadIdx.x == 0) sums[c * gridDim.x + blockIdx.x] = all;
  }
}

// The mean, or the standard deviation, of each channel from image_sums(). One block.
__global__ void finish_image(double* out, const double* sums, int blocks, double pixels,
                             bool deviation) {
  SEG_SHARED(memory);
  for (int c = 0; c < 3; ++c) {
    double sum = 0;
    for (int b = threadIdx.x; b < blocks; b += blockDim.x) sum += sums[c * blocks + b];
    sum = block_sum(sum, reinterpret_cast<double*>(memory)) / pixels;
    if (threadIdx.x == 0) out[c] = deviation ? fmax(sqrt(sum), 1e-3) : sum;
  }
}

// The network's input: the image's planes, or (residual) standardised, and the coordinates.
__global__ void set_input(float* input, const float* image, const double* moments, Extent s) {
  const Pixel p(s);
  if (!p.inside) return;
  const size_t plane = s.plane();
  for (int c = 0; c < 3; ++c) {
    const float v = image[3 * p.number + c];
    input[c * plane + p.n] =
        moments != nullptr ? static_cast<float>((v - moments[c]) / moments[3 + c]) : v;
  }
  if (moments == nullptr) return;
  input[3 * plane + p.n] = s.width > 1 ? 2.0f * p.x / (s.width - 1) - 1.0f : 0.0f;
  input[4 * plane + p.n] = s.height > 1 ? 2.0f * p.y / (s.height - 1) - 1.0f : 0.0f;
}

// Sums [classes][kAreaShares] of a soft guide [pixels][classes]. Blocks: (share, class).
__global__ void guide_area(double* area, const float* soft, size_t pixels) {
  SEG_SHARED(memory);
  const size_t k = blockIdx.y, classes = gridDim.y;
  double sum = 0;
  for (size_t n = static_cast<size_t>(blockIdx.x) * blockDim.x + threadIdx.x; n < pixels;
       n += static_cast<size_t>(gridDim.x) * blockDim.x)
    sum += soft[n * classes + k];
  sum = block_sum(sum, reinterpret_cast<double*>(memory));
  if (threadIdx.x == 0) area[k * gridDim.x + blockIdx.x] = sum;
}

// Class weights over pixels, from the areas. One block.
__global__ void balance_classes(float* weight, const double* area, int classes, double balance,
                                double pixels) {
  SEG_SHARED(memory);
  double balanced = 0;
  for (int k = threadIdx.x; k < classes; k += blockDim.x) {
    double share = 0;
    for (int i = 0; i < kAreaShares; ++i) share += area[k * kAreaShares + i];
    share /= pixels;
    weight[k] = static_cast<float>(pow(fmax(share, 1e-3), -balance));
    balanced += weight[k] * share;
  }
  balanced = block_sum(balanced, reinterpret_cast<double*>(memory));
  const double share = 1.0 / (fmax(balanced, 1e-12) * pixels);
  for (int k = threadIdx.x; k < classes; k += blockDim.x)
    weight[k] = static_cast<float>(weight[k] * share);
}

// The log prior, the targets of the guide term and their sum, and the affinities.
__global__ void set_prior(float* log_prior, float* target, float* mass, float* affinity,
                          const float* soft, const float* weight, const float* image,
                          const Offset2* offsets, int count, float sigma, int classes, Extent s) {
  const Pixel p(s);
  if (!p.inside) return;
  const size_t plane = s.plane();
  const float* q = soft + p.number * classes;
  float confidence = 0, total = 0;
  for (int k = 0; k < classes; ++k) confidence = max(confidence, q[k]);
  for (int k = 0; k < classes; ++k) {
    const float t = confidence * weight[k] * q[k];
    log_prior[k * plane + p.n] = logf(max(q[k], kSmallestPrior));
    target[k * plane + p.n] = t;
    total += t;
  }
  mass[p.n] = total;
  for (int d = 0; d < count; ++d) {
    const int y = p.y + offsets[d].dy, x = p.x + offsets[d].dx;
    float e = 0;
    if (y >= 0 && y < s.height && x >= 0 && x < s.width) {
      const float* a = image + 3 * p.number;
      const float* b = image + 3 * (static_cast<size_t>(y) * s.width + x);
      const float red = a[0] - b[0], green = a[1] - b[1], blue = a[2] - b[2];
      const double down = offsets[d].dy < 0 ? -offsets[d].dy : offsets[d].dy,
                   right = offsets[d].dx < 0 ? -offsets[d].dx : offsets[d].dx;
      const double pairs = (s.height - down) * (s.width - right);
      e = expf(-0.5f / (sigma * sigma) * (red * red + green * green + blue * blue)) *
          static_cast<float>(2.0 / (pairs * count));
    }
    affinity[d * plane + p.n] = e;
  }
}

// Known pixels of a hard guide, and which of its classes occur.
__global__ void guide_census(unsigned long long* known, int32_t* mapping, const int32_t* hard,
                             size_t pixels) {
  const size_t n = static_cast<size_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (n >= pixels || hard[n] < 0) return;
  atomicAdd(known, 1ull);
  mapping[hard[n]] = 1;
}

// The classes that occur, in order, and how many. One block.
__global__ void list_present(GuideMemory g) {
  for (int k = threadIdx.x; k < g.classes; k += blockDim.x) {
    int before = 0;
    for (int j = 0; j < k; ++j) before += g.mapping[j] != 0;
    if (g.mapping[k] != 0) g.present[before] = k;
    if (k == g.classes - 1) g.present[g.classes] = before + (g.mapping[k] != 0);
  }
}

// scores [pixels][classes]: of p as it is, or the soft-max of the normed response.
__global__ void write_scores(float* scores, Input response, bool softmax, int classes, Extent s) {
  const Pixel p(s);
  if (!p.inside) return;
  float* const out = scores + p.number * classes;
  float best = response(0, p.n), total = 0;
  for (int k = 1; k < classes; ++k) best = max(best, response(k, p.n));
  for (int k = 0; k < classes; ++k) {
    out[k] = softmax ? expf(response(k, p.n) - best) : response(k, p.n);
    total += out[k];
  }
  for (int k = 0; softmax && k < classes; ++k) out[k] /= total;
}

}  // namespace seg::cuda
