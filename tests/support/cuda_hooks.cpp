// Functions with which the tests change what the CUDA runtime of cuda_shim.h does, and read what it
// has done; tests/support/cuda_module.py calls them through ctypes.
#include "../../runtime/csrc/cuda/common.cuh"
#include "../../runtime/csrc/cuda/memory.h"

#define HOOK extern "C" __attribute__((visibility("default")))
HOOK void plant(int code, int sticky, size_t spared) {
  shim::spared = spared;
  shim::planted = static_cast<cudaError_t>(code);
  shim::sticky = sticky != 0;
}
HOOK int planted() { return shim::planted; }
HOOK void round_nothing(bool exact) {
  shim::exact = exact;
  shim::pairs = {};
}
HOOK void favour_the_first_stream(bool yes) { shim::favour_the_first = yes; }
HOOK void forbid_capture(int code) { shim::no_capture = static_cast<cudaError_t>(code); }
HOOK void compile_for(int ptx) { shim::compiled_for = ptx; }
HOOK void recover() {
  shim::last = cudaSuccess;
  seg::cuda::lost = false;
}
HOOK void empty_pool() { seg::cuda::Pool::get().empty(); }
HOOK void allow_allocations(size_t n) { shim::allocations_left = n; }
HOOK size_t allocations_left() { return shim::allocations_left; }
HOOK void keep_busy(void* stream) { shim::busy = stream; }
HOOK void lie_on_device(int device) { shim::memory_device = device; }
HOOK size_t synchronisations() { return shim::synchronisations; }
HOOK void shared_memory(char* out, size_t size) {
  std::string told;
  for (const auto& [name, bytes] : shim::most_shared)
    told += name + "=" + std::to_string(bytes) + ";";
  std::snprintf(out, size, "%s", told.c_str());
  shim::most_shared.clear();
}
HOOK int current_device() { return shim::device; }
HOOK size_t waits(void** out, size_t most) {
  size_t n = 0;
  for (const auto& [waiting, awaited] : shim::waits)
    if (n < most) out[2 * n] = waiting, out[2 * n + 1] = awaited, ++n;
  shim::waits.clear();
  return n;
}
// Kernels with a mistake each, which the shim sees: it aborts the program.
HOOK void mistake(int which) {
  const auto leaves = [](int) {
    if (threadIdx.x) __syncthreads();
  };
  const auto parts = [](int) {
    if (threadIdx.x < 32)
      __syncthreads();
    else
      __syncwarp();
  };
  const auto nothing = [](int) {};
  if (which == 0) SEG_LAUNCH(leaves, dim3(1), dim3(64), 0, nullptr, 0);
  if (which == 1) SEG_LAUNCH(parts, dim3(1), dim3(64), 0, nullptr, 0);
  if (which == 2) SEG_LAUNCH(nothing, dim3(1), dim3(2048), 0, nullptr, 0);
}
