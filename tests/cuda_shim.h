// Runs CUDA kernels on the host, one block after the other, to prove them without a GPU: threads are
// fibres that change places at barriers only, shared memory starts as NaN, device memory is malloc'd
// with NaN in it, so that an address sanitizer sees every read and write that is out of bounds.
//
// A thread that leaves a kernel while others wait at a barrier is an error here, as are warps that
// do not fill their 32 lanes before __syncwarp.
#pragma once
#define SEG_CUDA_SHIM

#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline

using std::max;
using std::min;

enum cudaError_t { cudaSuccess = 0, cudaErrorMemoryAllocation = 2 };
inline const char* cudaGetErrorName(cudaError_t) { return "cudaErrorMemoryAllocation"; }
inline const char* cudaGetErrorString(cudaError_t) { return "out of memory"; }

inline cudaError_t cudaMalloc(void** p, size_t bytes) {
  *p = std::malloc(bytes);
  if (*p == nullptr) return cudaErrorMemoryAllocation;
  std::memset(*p, 0xff, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaFree(void* p) {
  std::free(p);
  return cudaSuccess;
}

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace shim {

constexpr size_t kStack = size_t{1} << 16;
constexpr unsigned kWarp = 32;

enum Wait { kRuns, kBlock, kWarpOnly, kDone };

struct Fibre {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStack]};
  dim3 thread;
  Wait wait = kDone;
};

inline dim3 grid, block, block_index;
inline float* shared = nullptr;
inline std::vector<Fibre> fibres;
inline size_t current = 0;
inline ucontext_t scheduler;
inline std::function<void()> body;

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "CUDA shim: %s in block (%u, %u, %u)\n", what, block_index.x, block_index.y,
               block_index.z);
  std::abort();
}

inline void enter() {
  body();
  fibres[current].wait = kDone;
  swapcontext(&fibres[current].context, &scheduler);
}

inline void pause(Wait why) {
  const size_t me = current;
  fibres[me].wait = why;
  swapcontext(&fibres[me].context, &scheduler);
}

// Releases those that wait together: a warp at __syncwarp, a block at __syncthreads.
inline void release(size_t begin, size_t end, Wait what) {
  size_t waiting = 0, done = 0;
  for (size_t i = begin; i < end; ++i) {
    waiting += fibres[i].wait == what;
    done += fibres[i].wait == kDone;
  }
  if (waiting == 0) return;
  if (done != 0) fail("threads wait at a barrier that others have left behind");
  if (waiting != end - begin) return;  // the rest is on its way
  for (size_t i = begin; i < end; ++i) fibres[i].wait = kRuns;
}

inline void run_block(size_t threads) {
  for (size_t i = 0; i < threads; ++i) {
    Fibre& f = fibres[i];
    f.thread = dim3(i % block.x, i / block.x % block.y, i / (size_t{block.x} * block.y));
    f.wait = kRuns;
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = f.stack.get();
    f.context.uc_stack.ss_size = kStack;
    f.context.uc_link = &scheduler;
    makecontext(&f.context, enter, 0);
  }
  for (;;) {
    bool ran = false, left = false;
    for (current = 0; current < threads; ++current) {
      if (fibres[current].wait != kRuns) continue;
      ran = true;
      swapcontext(&scheduler, &fibres[current].context);
    }
    for (size_t i = 0; i < threads; i += kWarp)
      release(i, std::min(threads, i + kWarp), kWarpOnly);
    release(0, threads, kBlock);
    for (size_t i = 0; i < threads; ++i) left |= fibres[i].wait != kDone;
    if (!left) return;
    if (!ran) fail("threads wait for each other");
  }
}

template <class Kernel, class... Args>
void launch(Kernel kernel, dim3 g, dim3 b, size_t bytes, Args... args) {
  grid = g, block = b;
  const size_t threads = size_t{b.x} * b.y * b.z;
  if (threads == 0 || threads > 1024 || g.x == 0 || g.y == 0 || g.z == 0 || g.y > 65535 ||
      g.z > 65535 || bytes > 48 * 1024)
    fail("a launch that a GPU would refuse");
  if (fibres.size() < threads) fibres = std::vector<Fibre>(threads);
  body = [&] { kernel(args...); };
  for (unsigned z = 0; z < g.z; ++z)
    for (unsigned y = 0; y < g.y; ++y)
      for (unsigned x = 0; x < g.x; ++x) {
        block_index = dim3(x, y, z);
        shared = static_cast<float*>(std::malloc(bytes + 1));  // fresh: overruns are seen
        std::memset(shared, 0xff, bytes);
        run_block(threads);
        std::free(shared);
      }
}

}  // namespace shim

#define blockIdx shim::block_index
#define blockDim shim::block
#define gridDim shim::grid
#define threadIdx shim::fibres[shim::current].thread
#define __syncthreads() shim::pause(shim::kBlock)
#define __syncwarp() shim::pause(shim::kWarpOnly)
#define SEG_LAUNCH(kernel, grid, block, shared, stream, ...)          \
  do {                                                                \
    (void)(stream);                                                   \
    shim::launch((kernel), (grid), (block), (shared), __VA_ARGS__);   \
  } while (0)
#define SEG_SHARED(name) float* const name = shim::shared
