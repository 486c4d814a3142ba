// The only place that starts threads.
#pragma once

namespace seg {

// f(0) ... f(n - 1), each once, on at most `threads` threads. What f(i) writes must depend on i
// alone: then the answer does not depend on the number of threads.
template <class F>
void parallel_for(int threads, int n, const F& f) {
#pragma omp parallel for num_threads(threads) schedule(dynamic) if (threads > 1 && n > 1)
  for (int i = 0; i < n; ++i) f(i);
}

}  // namespace seg
