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
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

using std::isfinite;
using std::max;
using std::min;

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorMemoryAllocation = 2,
  cudaErrorNoDevice = 100,
  cudaErrorInvalidDevice = 101,
  cudaErrorNoKernelImageForDevice = 209,
  cudaErrorNotReady = 600,
  cudaErrorIllegalAddress = 700
};
enum cudaMemcpyKind {
  cudaMemcpyHostToDevice = 1,
  cudaMemcpyDeviceToHost = 2,
  cudaMemcpyDeviceToDevice = 3,
  cudaMemcpyDefault = 4
};
enum { cudaStreamNonBlocking = 1, cudaHostAllocPortable = 1, cudaHostAllocMapped = 2 };
enum { cudaEventDefault = 0, cudaEventDisableTiming = 2 };
enum cudaMemoryType { cudaMemoryTypeUnregistered = 0, cudaMemoryTypeDevice = 2 };
enum cudaStreamCaptureMode { cudaStreamCaptureModeThreadLocal = 1 };

struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace shim {

constexpr size_t kStack = size_t{1} << 16;
constexpr unsigned kWarp = 32;

enum Wait { kRuns, kBlock, kWarpOnly, kDone };

#if defined(__x86_64__) && !defined(__SANITIZE_ADDRESS__)
// A thread of the host's at rest: its stack, with the registers that calls keep on top. swapcontext
// does the same with two system calls, twenty times as slow.
using Context = void*;
__attribute__((naked, noinline)) inline void change(Context*, Context*) {
  asm volatile(
      "pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15\n"
      "movq %rsp, (%rdi); movq (%rsi), %rsp\n"
      "popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp; ret");
}
inline void begin(Context* context, char* stack, size_t bytes, void (*enter)()) {
  const auto top = reinterpret_cast<uintptr_t>(stack + bytes) & ~uintptr_t{15};
  void** at = reinterpret_cast<void**>(top) - 2;  // where a call leaves its return address
  *at = reinterpret_cast<void*>(enter);
  at -= 6;
  std::fill(at, at + 6, nullptr);
  *context = at;
}
#else
using Context = ucontext_t;
inline void change(Context* from, Context* to) { swapcontext(from, to); }
inline void begin(Context* context, char* stack, size_t bytes, void (*enter)()) {
  getcontext(context);
  context->uc_stack.ss_sp = stack;
  context->uc_stack.ss_size = bytes;
  context->uc_link = nullptr;
  makecontext(context, enter, 0);
}
#endif

struct Fibre {
  Context context;
  std::unique_ptr<char[]> stack{new char[kStack]};
  dim3 thread;
  Wait wait = kDone;
};

inline dim3 grid, block, block_index;
inline float* shared = nullptr;
inline std::vector<Fibre> fibres;
inline size_t current = 0;
inline Context scheduler;
inline std::function<void()> body;

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "CUDA shim: %s in block (%u, %u, %u)\n", what, block_index.x, block_index.y,
               block_index.z);
  std::abort();
}

inline void enter() {
  body();
  fibres[current].wait = kDone;
  change(&fibres[current].context, &scheduler);
}

inline void pause(Wait why) {
  const size_t me = current;
  fibres[me].wait = why;
  change(&fibres[me].context, &scheduler);
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
    begin(&f.context, f.stack.get(), kStack, enter);
  }
  for (;;) {
    bool ran = false, left = false;
    for (current = 0; current < threads; ++current) {
      if (fibres[current].wait != kRuns) continue;
      ran = true;
      change(&scheduler, &fibres[current].context);
    }
    for (size_t i = 0; i < threads; i += kWarp)
      release(i, std::min(threads, i + kWarp), kWarpOnly);
    release(0, threads, kBlock);
    for (size_t i = 0; i < threads; ++i) left |= fibres[i].wait != kDone;
    if (!left) return;
    if (!ran) fail("threads wait for each other");
  }
}

// What streams capture instead of doing it, in the order in which it came; null when none does. An
// entry records a moment of its stream, waits for one, or is work.
struct Entry {
  void* stream;
  size_t records, awaits;  // moments count from 1
  std::function<void()> work;
};
using Work = std::vector<Entry>;
inline thread_local Work* captured = nullptr;
inline size_t moments = 0;
// The device does one kernel at a time, whichever of the host's threads has launched it.
inline std::mutex device_is_busy;
inline void enqueue(void* stream, std::function<void()> work) {
  if (captured != nullptr)
    captured->push_back({stream, 0, 0, std::move(work)});
  else
    work();
}

// Does captured work as a device may: each stream in its order, and beyond that whichever stream is
// the favourite goes on until it has to wait. The order of the calls is only one that is allowed.
inline bool favour_the_first = true;  // the first stream of the graph; or the last one
inline void replay(const Work& work) {
  std::vector<void*> streams;
  for (const Entry& e : work)
    if (std::find(streams.begin(), streams.end(), e.stream) == streams.end())
      streams.push_back(e.stream);
  if (!favour_the_first) std::reverse(streams.begin(), streams.end());
  std::vector<size_t> next(streams.size(), 0);
  std::vector<size_t> passed;
  for (bool more = true; more;) {
    more = false;
    for (size_t i = 0; i < streams.size() && !more; ++i) {
      for (; next[i] < work.size(); ++next[i]) {
        const Entry& e = work[next[i]];
        if (e.stream != streams[i]) continue;
        if (e.awaits != 0 && std::find(passed.begin(), passed.end(), e.awaits) == passed.end())
          break;
        if (e.records != 0) passed.push_back(e.records);
        if (e.work) e.work();
        more = true;
        ++next[i];
        break;
      }
    }
  }
  for (const size_t n : next)
    if (n < work.size()) fail("a graph whose streams wait for each other");
}

// What the next call of the runtime answers, once (or for ever, as after a fault on a device).
inline cudaError_t planted = cudaSuccess;
inline cudaError_t no_capture = cudaSuccess;  // what beginning to capture answers
inline int compiled_for = 90;
inline bool sticky = false;
inline size_t allocations_left = ~size_t{0};
// Which stream was told to wait for which, in order; and one whose work never ends.
inline std::vector<std::pair<void*, void*>> waits;
inline void* busy = &waits;
inline size_t synchronisations = 0;  // of streams
// The current device of two, and where all device memory is said to lie (-1: on the host).
inline int device = 0, memory_device = 0;
inline cudaError_t last = cudaSuccess;  // error, until it is asked for, which every launch does
inline size_t spared = 0;  // calls that succeed before that
inline cudaError_t answer() {
  if (planted != cudaSuccess && spared > 0) return --spared, cudaSuccess;
  const cudaError_t now = planted;
  if (!sticky) planted = cudaSuccess;
  if (now != cudaSuccess) last = now;
  return now;
}

// Mapped memory: what the device has written there, and what of it the host has seen, which is when
// it waits: the host is late, as it may be. What the host writes, the device has with the next launch.
struct Mapped {
  std::vector<char> written, seen;
};
inline std::map<void*, Mapped> mapped;
inline void look() {
  const std::lock_guard<std::mutex> alone(device_is_busy);
  for (auto& [host, m] : mapped) {
    if (m.written != m.seen) std::memcpy(host, m.written.data(), m.written.size());
    m.seen = m.written;
  }
}
inline void hand_over() {
  for (auto& [host, m] : mapped) {
    if (std::memcmp(host, m.seen.data(), m.seen.size()) == 0) continue;
    std::memcpy(m.seen.data(), host, m.seen.size());
    m.written = m.seen;
  }
}

template <class Kernel, class... Args>
void launch(Kernel kernel, dim3 g, dim3 b, size_t bytes, Args... args) {
  const std::lock_guard<std::mutex> alone(device_is_busy);
  hand_over();
  grid = g, block = b;
  const size_t threads = size_t{b.x} * b.y * b.z;
  if (threads == 0 || threads > 1024 || g.x == 0 || g.y == 0 || g.z == 0 || g.y > 65535 ||
      g.z > 65535 || bytes > 48 * 1024)
    fail("a launch that a GPU would refuse");
  if (fibres.size() < threads) fibres = std::vector<Fibre>(threads);
  body = [=] { kernel(args...); };
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

// A warp's product on tensor cores, as runtime/csrc/cuda/tensor_conv.cu describes it: lanes lay down what
// they hold, and each takes the sums that are its own.
inline uint16_t to_half(float x) {  // to the nearest, ties to even
  const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  const float size = std::fabs(x);
  if (size == 0) return sign;
  if (!(size < 65520)) return sign | (std::isnan(x) ? 0x7e00 : 0x7c00);
  int exponent = 0;
  std::frexp(size, &exponent);  // size < 2^exponent
  exponent = std::max(exponent, -13);
  const auto units = static_cast<int>(std::nearbyint(std::ldexp(size, 11 - exponent)));
  return sign | static_cast<uint16_t>(((exponent + 13) << 10) + units);  // carries fit
}
inline float from_half(unsigned h) {
  const unsigned exponent = h >> 10 & 31, units = h & 1023;
  const float size = exponent == 31  ? (units != 0 ? NAN : INFINITY)
                     : exponent == 0 ? std::ldexp(units, -24)
                                     : std::ldexp(units + 1024, static_cast<int>(exponent) - 25);
  return (h & 0x8000) != 0 ? -size : size;
}
// A word is two halves; or, where tensor cores are told to round nothing, so that products can be
// compared to the bit, the number of a pair of floats.
inline bool exact = false;
inline std::vector<std::pair<float, float>> pairs;
inline unsigned halves(float a, float b) {
  if (!exact) return to_half(a) | static_cast<unsigned>(to_half(b)) << 16;
  pairs.emplace_back(a, b);
  return static_cast<unsigned>(pairs.size() - 1);
}
inline std::pair<float, float> floats(unsigned word) {
  if (!exact) return {from_half(word & 0xffff), from_half(word >> 16)};
  return word < pairs.size() ? pairs[word] : std::pair<float, float>(NAN, NAN);
}
inline unsigned straddle(unsigned low, unsigned high) {
  return exact ? halves(floats(low).second, floats(high).first) : low >> 16 | high << 16;
}
struct Fragments {
  unsigned a[32][4], b[32][2];
};
inline Fragments fragments[32];  // of each warp
inline void multiply(float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  const size_t lane = current % kWarp;
  Fragments& all = fragments[current / kWarp];
  std::memcpy(all.a[lane], a, sizeof(a));
  std::memcpy(all.b[lane], b, sizeof(b));
  pause(kWarpOnly);
  const size_t g = lane / 4, t = lane % 4;
  for (size_t h = 0; h < 4; ++h) {
    const size_t row = g + h / 2 * 8, column = 2 * t + h % 2;
    double sum = 0;
    for (size_t k = 0; k < 8; ++k) {  // words, of two neighbours each
      const auto [a0, a1] = floats(all.a[row % 8 * 4 + k % 4][row / 8 + k / 4 * 2]);
      const auto [b0, b1] = floats(all.b[column * 4 + k % 4][k / 4]);
      sum += static_cast<double>(a0) * b0 + static_cast<double>(a1) * b1;
    }
    c[h] += static_cast<float>(sum);
  }
  pause(kWarpOnly);
}

// The most shared memory that launches of each kernel have asked for, by the kernel's words.
inline std::map<std::string, size_t> most_shared;
template <class Kernel, class... Args>
cudaError_t later(const char* name, void* stream, Kernel kernel, dim3 g, dim3 b, size_t bytes, Args... args) {
  const cudaError_t error = answer();
  {
    const std::lock_guard<std::mutex> alone(device_is_busy);
    most_shared[name] = std::max(most_shared[name], bytes);
  }
  if (error == cudaSuccess) enqueue(stream, [=] { launch(kernel, g, b, bytes, args...); });
  return std::exchange(last, cudaSuccess);
}

}  // namespace shim

// The runtime's functions that the project calls. Streams do their work at once, in order.
struct CUstream_st {};
struct CUevent_st {
  CUstream_st* stream = nullptr;  // that it was recorded on
  size_t moment = 0;              // while it captured
  std::chrono::steady_clock::time_point when;
};
struct CUgraph_st {
  shim::Work work;
};
using cudaStream_t = CUstream_st*;
using cudaEvent_t = CUevent_st*;
using cudaGraph_t = CUgraph_st*;
using cudaGraphExec_t = CUgraph_st*;

inline const char* cudaGetErrorName(cudaError_t e) {
  return e == cudaErrorMemoryAllocation ? "cudaErrorMemoryAllocation" : "cudaErrorOther";
}
inline const char* cudaGetErrorString(cudaError_t e) {
  return e == cudaErrorMemoryAllocation ? "out of memory" : "another error";
}
inline cudaError_t cudaMalloc(void** p, size_t bytes) {
  if (const cudaError_t error = shim::answer()) return error;
  *p = nullptr;
  if (shim::allocations_left == 0 || (*p = std::malloc(bytes)) == nullptr)
    return shim::last = cudaErrorMemoryAllocation;
  --shim::allocations_left;
  std::memset(*p, 0xff, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaFree(void* p) {
  std::free(p);
  return cudaSuccess;
}
inline cudaError_t cudaHostAlloc(void** p, size_t bytes, unsigned flags) {
  const cudaError_t error = cudaMalloc(p, bytes);
  const std::lock_guard<std::mutex> alone(shim::device_is_busy);
  if (error == cudaSuccess && flags == cudaHostAllocMapped)
    shim::mapped[*p] = {std::vector<char>(bytes), std::vector<char>(bytes)};
  return error;
}
inline cudaError_t cudaFreeHost(void* p) {
  const std::lock_guard<std::mutex> alone(shim::device_is_busy);
  shim::mapped.erase(p);
  return cudaFree(p);
}
inline cudaError_t cudaHostGetDevicePointer(void** device, void* host, unsigned) {
  *device = shim::mapped[host].written.data();
  return cudaSuccess;
}
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind,
                                   cudaStream_t stream) {
  const cudaError_t error = shim::answer();
  if (error == cudaSuccess && bytes != 0) shim::enqueue(stream, [=] { std::memcpy(to, from, bytes); });
  return error;
}
inline cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t stream) {
  const cudaError_t error = shim::answer();
  if (error == cudaSuccess) shim::enqueue(stream, [=] { std::memset(to, value, bytes); });
  return error;
}
inline cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
  *stream = new CUstream_st;
  return shim::answer();
}
inline cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  delete stream;
  return cudaSuccess;
}
inline cudaError_t cudaStreamSynchronize(cudaStream_t) {
  ++shim::synchronisations;
  return shim::answer();
}
inline cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
  if (shim::captured != nullptr)
    shim::captured->push_back({stream, 0, event->moment, nullptr});
  else
    shim::waits.emplace_back(stream, event->stream);
  return shim::answer();
}
inline cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  *event = new CUevent_st;
  return shim::answer();
}
inline cudaError_t cudaEventDestroy(cudaEvent_t event) {
  delete event;
  return cudaSuccess;
}
inline cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  event->stream = stream;
  event->when = std::chrono::steady_clock::now();
  if (shim::captured != nullptr) {
    event->moment = ++shim::moments;
    shim::captured->push_back({stream, event->moment, 0, nullptr});
  }
  return shim::answer();
}
inline cudaError_t cudaEventQuery(cudaEvent_t event) {
  const cudaError_t error = shim::answer();
  if (error != cudaSuccess || event->stream != shim::busy) return error;
  return shim::last = cudaErrorNotReady;
}
inline cudaError_t cudaEventSynchronize(cudaEvent_t) {
  shim::look();
  return shim::answer();
}
inline cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t from, cudaEvent_t to) {
  *milliseconds = std::chrono::duration<float, std::milli>(to->when - from->when).count();
  return shim::answer();
}
struct cudaFuncAttributes {
  int ptxVersion;
};
template <class Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, Kernel*) {
  attributes->ptxVersion = shim::compiled_for;
  return shim::answer();
}
inline cudaError_t cudaStreamBeginCapture(cudaStream_t, cudaStreamCaptureMode) {
  const cudaError_t error = shim::answer();
  if (error == cudaSuccess && shim::no_capture == cudaSuccess) shim::captured = new shim::Work;
  return error != cudaSuccess ? error : shim::no_capture;
}
inline cudaError_t cudaStreamEndCapture(cudaStream_t, cudaGraph_t* graph) {
  *graph = new CUgraph_st{std::move(*shim::captured)};
  delete std::exchange(shim::captured, nullptr);
  return cudaSuccess;
}
inline cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t* exec, cudaGraph_t graph,
                                                 unsigned long long) {
  *exec = new CUgraph_st{graph->work};
  return shim::answer();
}
inline cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t) {
  const cudaError_t error = shim::answer();
  if (error == cudaSuccess) shim::replay(exec->work);
  return error;
}
inline cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  delete graph;
  return cudaSuccess;
}
inline cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec) { return cudaGraphDestroy(exec); }
inline cudaError_t cudaGetDevice(int* device) {
  *device = shim::device;
  return shim::answer();
}
inline cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device > 1) return cudaErrorInvalidDevice;
  shim::device = device;
  return shim::answer();
}
inline cudaError_t cudaDeviceSynchronize() { return shim::answer(); }
struct cudaPointerAttributes {
  cudaMemoryType type;
  int device;
};
inline cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* to, const void*) {
  *to = {shim::memory_device < 0 ? cudaMemoryTypeUnregistered : cudaMemoryTypeDevice,
         shim::memory_device};
  return shim::answer();
}
inline cudaError_t cudaGetLastError() { return std::exchange(shim::last, cudaSuccess); }
inline cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = 13000;
  return cudaSuccess;
}

// One thread runs at a time.
template <class T>
T atomicAdd(T* at, T value) {
  const T before = *at;
  *at += value;
  return before;
}

#define blockIdx shim::block_index
#define blockDim shim::block
#define gridDim shim::grid
#define threadIdx shim::fibres[shim::current].thread
#define __syncthreads() shim::pause(shim::kBlock)
#define __syncwarp() shim::pause(shim::kWarpOnly)
#define SEG_LAUNCH(kernel, grid, block, shared, stream, ...)          \
  do {                                                                \
    CUDA_CHECK(shim::later(#kernel, stream, kernel, grid, block, shared, __VA_ARGS__)); \
  } while (0)
#define SEG_SHARED(name) float* const name = shim::shared
