// The only place that knows threads.
#pragma once

#include <cstdint>

namespace seg {

// Calls f(i, slot) for i = 0 ... n - 1 on at most `threads` threads, the caller among them. No two
// threads have the same slot, a number below `threads`.
void run_parallel(int threads, int n, void (*f)(const void* context, int i, int slot),
                  const void* context);

// f(0) ... f(n - 1), each once. What f(i) writes must depend on i alone: then the answer does not
// depend on the number of threads. What f throws first (out of memory, say) is thrown again here,
// once all threads are out of f.
template <class F>
void parallel_for(int threads, int n, const F& f) {
  run_parallel(
      threads, n, [](const void* context, int i, int) { (*static_cast<const F*>(context))(i); },
      &f);
}

// The same with f(i, slot), for those that keep scratch memory for each slot.
template <class F>
void parallel_for_slots(int threads, int n, const F& f) {
  run_parallel(
      threads, n,
      [](const void* context, int i, int slot) { (*static_cast<const F*>(context))(i, slot); }, &f);
}

// Rows are divided into this many blocks, whatever the number of threads: sums of blocks are then
// the same on any number of threads.
constexpr int kBlocks = 16;

inline int block_begin(int block, int rows) {
  return static_cast<int>(int64_t{rows} * block / kBlocks);
}

}  // namespace seg
