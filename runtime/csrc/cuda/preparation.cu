// The values that are constant during a run: the network's input, the prior and the affinities.
#include <algorithm>

#include "pixels.cuh"
#include "preparation.h"

namespace seg::cuda {
namespace {

// Writes sums [3][blocks]: for each block the sum over its pixels of each channel of image
// [pixels][3], or, if mean is set, of the squared difference from the mean.
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

// Writes out [3]: the mean or the standard deviation of each channel, from the sums that
// image_sums() has written. One block.
__global__ void finish_image(double* out, const double* sums, int blocks, double pixels,
                             bool deviation) {
  SEG_SHARED(memory);
  for (int c = 0; c < 3; ++c) {
    double sum = 0;
    for (int b = threadIdx.x; b < blocks; b += blockDim.x) sum += sums[c * blocks + b];
    sum = block_sum(sum, reinterpret_cast<double*>(memory)) / pixels;
    if (threadIdx.x == 0) out[c] = deviation ? fmax(sqrt(sum), kLeastDeviation) : sum;
  }
}

// Does the work of prepare_input(). One thread per pixel.
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

// Writes area [classes][kAreaShares]: sums of soft [pixels][classes] over shares of the pixels. The
// grid is (share, class).
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

// Writes weight [classes] from the sums of guide_area(). One block.
__global__ void balance_classes(float* weight, const double* area, int classes, double balance,
                                double pixels) {
  SEG_SHARED(memory);
  double balanced = 0;
  for (int k = threadIdx.x; k < classes; k += blockDim.x) {
    double share = 0;
    for (int i = 0; i < kAreaShares; ++i) share += area[k * kAreaShares + i];
    share /= pixels;
    weight[k] = static_cast<float>(pow(fmax(share, kLeastArea), -balance));
    balanced += weight[k] * share;
  }
  balanced = block_sum(balanced, reinterpret_cast<double*>(memory));
  const double share = 1.0 / (fmax(balanced, kLeastBalanced) * pixels);
  for (int k = threadIdx.x; k < classes; k += blockDim.x)
    weight[k] = static_cast<float>(weight[k] * share);
}

// Does the work of prepare_prior(). One thread per pixel.
__global__ void set_prior(float* log_prior, float* target, float* mass, float* affinity,
                          const float* soft, const float* weight, const float* image,
                          const Offset* offsets, int count, float sigma, int classes, Extent s) {
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

}  // namespace

void measure_image(double* moments, double* sums, const float* image, size_t pixels,
                   cudaStream_t stream) {
  const int blocks = std::min(blocks_of(pixels, kThreads), kImageBlocks);
  const size_t shared = kControlThreads * sizeof(double);
  for (const bool deviation : {false, true}) {
    SEG_LAUNCH(image_sums, dim3(blocks), dim3(kThreads), shared, stream, sums, image,
               static_cast<const double*>(deviation ? moments : nullptr), pixels);
    SEG_LAUNCH(finish_image, dim3(1), dim3(kControlThreads), shared, stream,
               moments + 3 * deviation, static_cast<const double*>(sums), blocks,
               static_cast<double>(pixels), deviation);
  }
}

void prepare_input(float* input, const float* image, const double* moments, Extent s,
                   cudaStream_t stream) {
  const size_t pixels = static_cast<size_t>(s.height) * s.width;
  SEG_LAUNCH(set_input, dim3(blocks_of(pixels, kThreads)), dim3(kThreads), 0, stream, input, image,
             moments, s);
}

void weigh_classes(float* weight, double* area, const float* soft, size_t pixels,
                   const RefineOptions& options, cudaStream_t stream) {
  const size_t shared = kControlThreads * sizeof(double);
  SEG_LAUNCH(guide_area, dim3(kAreaShares, options.classes), dim3(kControlThreads), shared, stream,
             area, soft, pixels);
  SEG_LAUNCH(balance_classes, dim3(1), dim3(kControlThreads), shared, stream, weight,
             static_cast<const double*>(area), options.classes,
             static_cast<double>(options.balance), static_cast<double>(pixels));
}

void prepare_prior(float* log_prior, float* target, float* mass, float* affinity, const float* soft,
                   const float* weight, const float* image, const Offset* offsets, int count,
                   const RefineOptions& options, Extent s, cudaStream_t stream) {
  const size_t pixels = static_cast<size_t>(s.height) * s.width;
  SEG_LAUNCH(set_prior, dim3(blocks_of(pixels, kThreads)), dim3(kThreads), 0, stream, log_prior,
             target, mass, affinity, soft, weight, image, offsets, count, options.sigma,
             options.classes, s);
}

}  // namespace seg::cuda
