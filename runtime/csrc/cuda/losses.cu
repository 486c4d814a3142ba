// Labels, losses and scores from the responses of the network.
#include "losses.h"
#include "pixels.cuh"

namespace seg::cuda {
namespace {

// Does the work of soften_scores(). One thread per pixel.
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

// Does the work of label_pixels(). One thread per pixel.
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

// penalty() is the spatial loss of the difference d of two neighbours; slope() is its derivative.
struct SpatialLoss {
  float scale[4];  // of down, right and the two diagonals; 0: the direction is not used
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

// Does the work of cluster_loss(): computes the cross-entropies with the own labels and with the
// mapped guide, and the penalties of the differences from the neighbours. One thread per pixel.
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
    const float best = response(label);  // the largest response: labels are the arg max
    float total = 0;
    for (int k = 0; k < classes; ++k) total += expf(response(k) - best);
    const float log_total = logf(total);
    const bool guided = guide_weight > 0;
    const int hard = guided && g.hard != nullptr ? g.hard[p.number] : -1;
    const float* soft = guided && g.soft != nullptr ? g.soft + p.number * g.classes : nullptr;
    float mass = hard >= 0;  // the sum of the guide's probabilities at this pixel
    if (soft != nullptr)
      for (int k = 0; k < g.classes; ++k) mass += soft[k];
    const float scale = (self_weight + guide_weight * mass) / total;

    constexpr Offset kNear[4] = {kSpatialNeighbours[0], kSpatialNeighbours[1],
                                 kSpatialNeighbours[2], kSpatialNeighbours[3]};
    size_t ahead[4], behind[4];
    for (int d = 0; d < 4; ++d) {  // outside the picture: the pixel itself, so the difference is 0
      const int dy = kNear[d].dy, dx = kNear[d].dx;
      const int y1 = p.y + dy, x1 = p.x + dx, y0 = p.y - dy, x0 = p.x - dx;
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

// Does the work of residual_loss(). One thread per pixel.
__global__ void residual_losses(float* dz, double* losses, const float* probabilities,
                                const float* target, const float* mass, const float* affinity,
                                const Offset* offsets, int count, float lambda, int classes,
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
    float inner = 0;  // the sum over the classes of the gradient by p times p
    for (int k = 0; k < classes; ++k) inner += dz[k * plane + p.n] * probabilities[k * plane + p.n];
    pair = 0.5 * (static_cast<double>(all) + inner);  // every pair is counted twice
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

// Does the work of copy_scores(). One thread per pixel.
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

int blocks_for(Extent s) { return blocks_of(static_cast<size_t>(s.height) * s.width, kThreads); }

constexpr size_t kLossShared = kControlThreads * (sizeof(double) + sizeof(int));

}  // namespace

void soften_scores(float* z, int32_t* labels, int* present, const float* target, double* losses,
                   int classes, Extent s, cudaStream_t stream) {
  SEG_LAUNCH(soften, dim3(blocks_for(s)), dim3(kThreads), kThreads * sizeof(double), stream, z,
             labels, present, target, losses, classes, s);
}

void label_pixels(int32_t* labels, int* present, const Input& response, int classes, Extent s,
                  cudaStream_t stream) {
  SEG_LAUNCH(find_labels, dim3(blocks_for(s)), dim3(kThreads), 0, stream, labels, present, response,
             classes, s);
}

void cluster_loss(float* dr, double* losses, const float* head, const NormState& norm,
                  const int32_t* labels, const GuideMemory& g, const Control* c,
                  const RefineOptions& options, Extent s, cudaStream_t stream) {
  SpatialLoss spatial{};
  spatial.huber = options.huber;
  for (int d = 0; d < 4; ++d) {
    const double pairs =
        static_cast<double>(d == 1 ? s.height : s.height - 1) * (d == 0 ? s.width : s.width - 1);
    if (pairs > 0 && (d < 2 || options.diagonals))
      spatial.scale[d] = static_cast<float>(1.0 / (pairs * options.classes));
  }
  SEG_LAUNCH(cluster_losses, dim3(blocks_for(s)), dim3(kThreads), kLossShared, stream, dr, losses,
             head, norm, labels, g, c, spatial, options.classes, s);
}

void residual_loss(float* dz, double* losses, const float* probabilities, const float* target,
                   const float* mass, const float* affinity, const Offset* offsets, int count,
                   const RefineOptions& options, Extent s, cudaStream_t stream) {
  SEG_LAUNCH(residual_losses, dim3(blocks_for(s)), dim3(kThreads), kLossShared, stream, dz, losses,
             probabilities, target, mass, affinity, offsets, count, options.lambda, options.classes,
             s);
}

void copy_scores(float* scores, const Input& response, bool softmax, int classes, Extent s,
                 cudaStream_t stream) {
  SEG_LAUNCH(write_scores, dim3(blocks_for(s)), dim3(kThreads), 0, stream, scores, response,
             softmax, classes, s);
}

}  // namespace seg::cuda
