// Device memory of the Python module runtime._cuda. A block is reused after its last owner has
// released it; events guarantee that a stream does not write a block that another stream still
// reads.
#pragma once

#include <algorithm>
#include <atomic>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "common.cuh"

namespace seg::cuda {

// True after a fault has made the GPU unusable for this process: then no function of this file
// calls CUDA.
inline std::atomic<bool> lost{false};

// Makes a device the current one of this thread until the guard is destroyed.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    int current = 0;
    CUDA_CHECK(cudaGetDevice(&current));
    if (current == device) return;
    cuda_check(cudaSetDevice(device), "cudaSetDevice(device)", device);
    before_ = current;
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;
  ~DeviceGuard() {
    if (before_ >= 0 && !lost) cudaSetDevice(before_);
  }

 private:
  int before_ = -1;
};

// The moment at which all work is done that was queued on a stream at construction.
class Moment {
 public:
  explicit Moment(cudaStream_t stream) : stream_(stream) {
    CUDA_CHECK(cudaEventCreateWithFlags(&event_, cudaEventDisableTiming));
    if (const cudaError_t error = cudaEventRecord(event_, stream)) {
      cudaEventDestroy(event_);
      cuda_check(error, "cudaEventRecord(event_, stream)");
    }
  }
  Moment(const Moment&) = delete;
  Moment& operator=(const Moment&) = delete;
  ~Moment() {
    if (!lost) cudaEventDestroy(event_);
  }
  cudaStream_t stream() const { return stream_; }
  // Returns whether that work is done.
  bool passed() const {
    const cudaError_t error = cudaEventQuery(event_);
    if (error == cudaErrorNotReady) {
      cudaGetLastError();  // otherwise the next launch would report the error
      return false;
    }
    cuda_check(error, "cudaEventQuery(event_)");
    return true;
  }
  // Blocks the host until that work is done.
  void wait() const { CUDA_CHECK(cudaEventSynchronize(event_)); }
  // Makes all work that is queued on the stream later wait for the moment.
  void hold(cudaStream_t stream) const { CUDA_CHECK(cudaStreamWaitEvent(stream, event_, 0)); }

 private:
  cudaStream_t stream_;
  cudaEvent_t event_ = nullptr;
};
using Moments = std::vector<std::shared_ptr<const Moment>>;

// Device memory, or with device kPinned page-locked host memory.
struct Block {
  void* data = nullptr;
  size_t bytes = 0;
  int device = 0;
  Moments last_uses;  // the next use must wait for these
};

constexpr int kPinned = -1;        // the device of a block of page-locked host memory
constexpr size_t kMostPinned = 2;  // most such blocks of one size; further uploads wait for one

// The blocks without an owner, by device and size. Reuse avoids cudaMalloc and cudaFree, which wait
// for the device.
class Pool {
 public:
  // Returns the only pool. It is never destroyed, because CUDA may end before it at the process's
  // exit.
  static Pool& get() {
    static Pool& pool = *new Pool;
    return pool;
  }

  // Returns a block of at least so many bytes for work on the stream. The device must be the
  // current one. Throws CudaError if there is no memory.
  Block take(size_t bytes, int device, cudaStream_t stream) {
    const size_t size = rounded(bytes);
    const std::lock_guard<std::mutex> lock(mutex_);
    auto& blocks = free_[{device, size}];
    for (size_t i = blocks.size(); i-- > 0;) {
      if (!usable(blocks[i], stream)) continue;
      // A moment of this stream may also be one of a destroyed stream whose handle had the same
      // value.
      for (const auto& moment : blocks[i].last_uses)
        if (moment->stream() == stream) moment->hold(stream);
      Block found = std::move(blocks[i]);
      blocks.erase(blocks.begin() + static_cast<ptrdiff_t>(i));
      found.last_uses.clear();
      return found;
    }
    return made(size, device);
  }

  // Returns a block of page-locked host memory that no stream reads any more. If kMostPinned blocks
  // of this size exist and are all in use, waits for one.
  Block take_pinned(size_t bytes) {
    const size_t size = rounded(bytes);
    const std::lock_guard<std::mutex> lock(mutex_);
    auto& blocks = free_[{kPinned, size}];
    const auto idle = [](const Block& b) {
      return std::all_of(b.last_uses.begin(), b.last_uses.end(),
                         [](const auto& moment) { return moment->passed(); });
    };
    auto found = std::find_if(blocks.begin(), blocks.end(), idle);
    if (found == blocks.end()) {
      if (blocks.size() < kMostPinned) return made(size, kPinned);
      found = blocks.begin();  // the block that was used longest ago
      for (const auto& moment : found->last_uses) moment->wait();
    }
    Block block = std::move(*found);
    blocks.erase(found);
    block.last_uses.clear();
    return block;
  }

  // Adds a block to the pool.
  void give(Block&& block) {
    if (lost) return;
    const std::lock_guard<std::mutex> lock(mutex_);
    free_[{block.device, block.bytes}].push_back(std::move(block));
  }

  // Frees all blocks of the pool.
  void empty() {
    const std::lock_guard<std::mutex> lock(mutex_);
    clear();
  }

 private:
  // Returns the size of a block for so many bytes: there are eight sizes between powers of two, so
  // that pictures of similar sizes share blocks.
  static size_t rounded(size_t bytes) {
    size_t step = 512;
    while (step * 16 <= bytes) step *= 2;
    return (bytes + step - 1 + !bytes) / step * step;
  }

  // Returns whether the stream can use the block without waiting for other streams.
  static bool usable(const Block& block, cudaStream_t stream) {
    for (const auto& moment : block.last_uses)
      if (moment->stream() != stream && !moment->passed()) return false;
    return true;
  }

  // Allocates a block; if that fails, frees all blocks of the pool and tries once more.
  Block made(size_t size, int device) {
    Block block;
    block.bytes = size;
    block.device = device;
    const auto allocate = [&] {
      return device == kPinned ? cudaHostAlloc(&block.data, size, cudaHostAllocPortable)
                               : cudaMalloc(&block.data, size);
    };
    cudaError_t error = allocate();
    if (error == cudaErrorMemoryAllocation) {
      cudaGetLastError();
      clear();
      error = allocate();
    }
    const std::string call = device == kPinned ? "cudaHostAlloc" : "cudaMalloc";
    cuda_check(error, (call + " of " + std::to_string(size) + " bytes").c_str());
    return block;
  }

  void clear() {
    for (auto& [key, blocks] : free_) {
      for (; !blocks.empty(); blocks.pop_back()) {
        for (const auto& moment : blocks.back().last_uses) moment->wait();
        void* data = blocks.back().data;
        if (key.first == kPinned)
          CUDA_CHECK(cudaFreeHost(data));
        else
          CUDA_CHECK(cudaFree(data));
      }
    }
  }

  std::mutex mutex_;
  std::map<std::pair<int, size_t>, std::vector<Block>> free_;
};

// An owner of a block, which the destructor adds to the pool.
class Memory {
 public:
  Memory(size_t bytes, int device, cudaStream_t stream)
      : block_(Pool::get().take(bytes, device, stream)) {}
  explicit Memory(Block&& block) : block_(std::move(block)) {}
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  ~Memory() { Pool::get().give(std::move(block_)); }
  void* data() const { return block_.data; }
  // Records that work before the moment uses the block. It replaces earlier moments of its stream.
  void used(std::shared_ptr<const Moment> moment) {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (auto& m : block_.last_uses) {
      if (m->stream() != moment->stream()) continue;
      m = std::move(moment);
      return;
    }
    block_.last_uses.push_back(std::move(moment));
  }

 private:
  std::mutex mutex_;
  Block block_;
};

}  // namespace seg::cuda
