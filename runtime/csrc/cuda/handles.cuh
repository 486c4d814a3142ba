// Owners of the refinement's streams, events, graph and mapped memory. The destructor of an owner
// frees what it owns.
#pragma once

#include "common.cuh"

namespace seg::cuda {

// The progress of a run: two numbers in host memory that the device writes. The first is the number
// of steps done; the second is 1 if the run has ended.
struct Progress {
  Progress() {
    void* p = nullptr;
    CUDA_CHECK(cudaHostAlloc(&p, 2 * sizeof(int), cudaHostAllocMapped));
    host = static_cast<volatile int*>(p);
    CUDA_CHECK(cudaHostGetDevicePointer(&p, p, 0));
    device = static_cast<volatile int*>(p);
  }
  Progress(const Progress&) = delete;
  ~Progress() { cudaFreeHost(const_cast<int*>(host)); }
  volatile int *host = nullptr, *device = nullptr;
};

// A CUDA stream.
struct OwnStream {
  OwnStream() { CUDA_CHECK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking)); }
  OwnStream(const OwnStream&) = delete;
  ~OwnStream() { cudaStreamDestroy(stream); }
  cudaStream_t stream = nullptr;
};

// A CUDA event that records its time.
struct Event {
  Event() { CUDA_CHECK(cudaEventCreateWithFlags(&event, cudaEventDefault)); }
  Event(const Event&) = delete;
  ~Event() { cudaEventDestroy(event); }
  cudaEvent_t event = nullptr;
};

// The recorded graph of a step; exec is null if none is recorded.
struct Replay {
  Replay() = default;
  Replay(const Replay&) = delete;
  ~Replay() { clear(); }
  void clear() {
    if (exec != nullptr) cudaGraphExecDestroy(exec);
    exec = nullptr;
  }
  cudaGraphExec_t exec = nullptr;
};

}  // namespace seg::cuda
