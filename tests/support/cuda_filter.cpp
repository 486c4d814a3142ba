// The guided filter's CUDA kernels on the host, with so little scratch memory that several turns
// are needed for many classes. tests/cuda/test_guided_filter.py calls the functions through ctypes.
#include "cuda_shim.h"
// The shim comes first: it stands in for the CUDA runtime.
#define SEG_FILTER_SCRATCH (1 << 12)
#include "../../runtime/csrc/cuda/guided_filter.cu"

namespace {

// A copy on the "device", as large as the data and no larger.
seg::DeviceBuffer upload(const float* from, size_t n) {
  seg::DeviceBuffer to(n);
  std::memcpy(to.get(), from, n * sizeof(float));
  return to;
}

}  // namespace

#define HOOK extern "C" __attribute__((visibility("default")))
HOOK void filter(float* out, const float* guidance, const float* values, int height, int width,
                 int guide_channels, int classes, int radius, float eps, int coefficients) {
  const size_t pixels = static_cast<size_t>(height) * width;
  const seg::DeviceBuffer g = upload(guidance, pixels * guide_channels),
                          v = upload(values, pixels * classes),
                          scratch(
                              seg::cuda::filter_scratch(height, width, guide_channels, classes));
  const size_t n = pixels * classes * (coefficients ? guide_channels + 1 : 1);
  const seg::DeviceBuffer made(n);
  (coefficients ? seg::cuda::guided_coefficients : seg::cuda::guided_filter)(
      made.get(), scratch.get(), g.get(), v.get(), height, width, guide_channels, classes, radius,
      eps, nullptr);
  std::memcpy(out, made.get(), n * sizeof(float));
}

HOOK void apply(float* out, const float* coefficients, const float* guidance, int low_height,
                int low_width, int height, int width, int guide_channels, int classes) {
  const size_t pixels = static_cast<size_t>(height) * width,
               low = static_cast<size_t>(low_height) * low_width;
  const seg::DeviceBuffer c = upload(coefficients, low * (guide_channels + 1) * classes),
                          g = upload(guidance, pixels * guide_channels), made(pixels * classes);
  seg::cuda::apply_coefficients(made.get(), c.get(), g.get(), low_height, low_width, height, width,
                                guide_channels, classes, nullptr);
  std::memcpy(out, made.get(), pixels * classes * sizeof(float));
}

HOOK void joint_upsample(int32_t* labels, float* confidence, const float* coefficients,
                         const uint8_t* guidance, int low_height, int low_width, int height,
                         int width, int guide_channels, int classes) {
  const size_t pixels = static_cast<size_t>(height) * width,
               low = static_cast<size_t>(low_height) * low_width;
  const seg::DeviceBuffer c = upload(coefficients, low * (guide_channels + 1) * classes),
                          best(pixels);
  const std::vector<uint8_t> g(guidance, guidance + pixels * guide_channels);
  std::vector<int32_t> found(pixels, -1);
  seg::cuda::joint_upsample(found.data(), best.get(), c.get(), g.data(), low_height, low_width,
                            height, width, guide_channels, classes, nullptr);
  std::copy(found.begin(), found.end(), labels);
  std::memcpy(confidence, best.get(), pixels * sizeof(float));
}

HOOK void shrink(float* out, const float* planes, int low_height, int low_width, int height,
                 int width, int channels) {
  const size_t n = static_cast<size_t>(low_height) * low_width * channels;
  const seg::DeviceBuffer from = upload(planes, static_cast<size_t>(height) * width * channels),
                          made(n);
  seg::cuda::shrink(made.get(), from.get(), low_height, low_width, height, width, channels,
                    nullptr);
  std::memcpy(out, made.get(), n * sizeof(float));
}
