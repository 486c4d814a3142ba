// Shared by the CUDA files: checked calls, an owner of device memory, and SEG_LAUNCH. With
// SEG_CUDA_SHIM a host compiler compiles the same files against tests/support/cuda_shim.h, which
// runs the kernels on the CPU, so the tests need no GPU.
#pragma once

#ifndef SEG_CUDA_SHIM
#include <cuda_runtime.h>

// Launches a kernel and throws a CudaError if the launch fails.
#define SEG_LAUNCH(kernel, grid, block, shared, stream, ...)      \
  do {                                                            \
    kernel<<<(grid), (block), (shared), (stream)>>>(__VA_ARGS__); \
    CUDA_CHECK(cudaGetLastError());                               \
  } while (0)
// Declares the shared memory of a block, whose size is the argument `shared` of SEG_LAUNCH.
#define SEG_SHARED(name) extern __shared__ __align__(16) float name[]
#endif

#include <cstddef>
#include <stdexcept>
#include <string>
#include <utility>

namespace seg {

// A CUDA call that failed: code is the runtime's cudaError_t; device is its GPU, or -1 for the
// current one. what() names the call and describes the error.
struct CudaError : std::runtime_error {
  CudaError(int code, const std::string& call, const std::string& description, int device = -1)
      : std::runtime_error(call + ": " + description), code(code), call(call), device(device) {}
  int code;
  std::string call;
  int device;
};

// Throws a CudaError unless error is cudaSuccess.
inline void cuda_check(cudaError_t error, const char* call, int device = -1) {
  if (error == cudaSuccess) return;
  throw CudaError(static_cast<int>(error), call,
                  std::string(cudaGetErrorName(error)) + ", " + cudaGetErrorString(error), device);
}
#define CUDA_CHECK(call) ::seg::cuda_check((call), #call)

// This function is called when the allocation of a DeviceBuffer fails, before the allocation is
// tried once more. It may be null.
inline void (*give_memory_back)() = nullptr;

// An owner of n floats (at least one) of the current device.
class DeviceBuffer {
 public:
  DeviceBuffer() = default;
  explicit DeviceBuffer(size_t n) {
    void* p = nullptr;
    const size_t bytes = (n + !n) * sizeof(float);
    cudaError_t error = cudaMalloc(&p, bytes);
    if (error == cudaErrorMemoryAllocation && give_memory_back != nullptr) {
      cudaGetLastError();
      give_memory_back();
      error = cudaMalloc(&p, bytes);
    }
    cuda_check(error, ("cudaMalloc of " + std::to_string(bytes) + " bytes").c_str());
    data_ = static_cast<float*>(p);
  }
  DeviceBuffer(DeviceBuffer&& other) noexcept : data_(std::exchange(other.data_, nullptr)) {}
  DeviceBuffer& operator=(DeviceBuffer&& other) noexcept {
    std::swap(data_, other.data_);
    return *this;
  }
  ~DeviceBuffer() { cudaFree(data_); }
  float* get() const { return data_; }

 private:
  float* data_ = nullptr;
};

}  // namespace seg
