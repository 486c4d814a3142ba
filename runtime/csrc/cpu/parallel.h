// Loops on several threads. No other file of cpu/ uses threads.
#pragma once

#include <cstdint>

namespace seg {

// Calls f(context, i, slot) for i = 0 ... n - 1 on at most `threads` threads; the calling thread is
// one of them. slot is a number below `threads` that differs between the threads of this call.
void run_parallel(int threads, int n, void (*f)(const void* context, int i, int slot),
                  const void* context);

// Calls f(0) ... f(n - 1), each once. The values that f(i) writes must depend on i alone: then the
// result does not depend on the number of threads. If f throws (std::bad_alloc, for example), the
// remaining calls are skipped and the first exception is thrown again here, after all threads have
// left f.
template <class F>
void parallel_for(int threads, int n, const F& f) {
  run_parallel(
      threads, n, [](const void* context, int i, int) { (*static_cast<const F*>(context))(i); },
      &f);
}

// As parallel_for, with f(i, slot). A loop that needs scratch memory allocates it once for each
// slot.
template <class F>
void parallel_for_slots(int threads, int n, const F& f) {
  run_parallel(
      threads, n,
      [](const void* context, int i, int slot) { (*static_cast<const F*>(context))(i, slot); }, &f);
}

// Rows are divided into this many blocks for any number of threads. So the sums of blocks do not
// depend on the number of threads.
constexpr int kBlocks = 16;

// Returns the first row of a block; of block kBlocks, the number of rows.
inline int block_begin(int block, int rows) {
  return static_cast<int>(int64_t{rows} * block / kBlocks);
}

}  // namespace seg
