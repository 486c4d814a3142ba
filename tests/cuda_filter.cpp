// The guided filter's CUDA kernels on the host, called by test_cuda.py through ctypes.
#include "cuda_shim.h"
// The shim comes first: it stands in for the CUDA runtime.
#include "../runtime/csrc/cuda/guided_filter.cu"

extern "C" void filter(float* out, const float* guide, const float* values, int height, int width,
                       int guide_channels, int classes, int radius, float eps, int coefficients) {
  const size_t pixels = static_cast<size_t>(height) * width;
  const auto upload = [](const float* from, size_t n) {
    seg::DeviceBuffer to(n);  // as large as the data and no larger
    std::memcpy(to.get(), from, n * sizeof(float));
    return to;
  };
  const seg::DeviceBuffer g = upload(guide, pixels * guide_channels),
                          v = upload(values, pixels * classes),
                          scratch(seg::cuda::filter_scratch(height, width, guide_channels, classes));
  const size_t n = pixels * classes * (coefficients ? guide_channels + 1 : 1);
  const seg::DeviceBuffer made(n);
  (coefficients ? seg::cuda::guided_coefficients : seg::cuda::guided_filter)(
      made.get(), scratch.get(), g.get(), v.get(), height, width, guide_channels, classes, radius,
      eps, nullptr);
  std::memcpy(out, made.get(), n * sizeof(float));
}
