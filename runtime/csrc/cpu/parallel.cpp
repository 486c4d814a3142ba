// A small thread pool, used instead of OpenMP. A caller never waits for a helper that has not
// started. With OpenMP it does: when another program occupies a core, the barrier at the end of
// each loop costs a slice of the scheduler's time (measured in docs/architecture.md). An idle
// helper polls for work for some tens of microseconds, then sleeps.
#include "parallel.h"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

namespace seg {
namespace {

constexpr int kLooks = 4000;  // polls for work before a thread sleeps

void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// One call of run_parallel().
struct Job {
  void (*f)(const void*, int, int);
  const void* context;
  int n;
  int wanted;                // helpers that may still start on the job; guarded by the pool's mutex
  std::atomic<int> next{0};  // the next index to compute
  std::atomic<int> helpers{0};  // helpers that work on the job now
  std::atomic<bool> failed{false};
  std::exception_ptr error;  // the first exception

  // Computes indices until none is left.
  void work(int slot) noexcept {
    try {
      for (int i; (i = next.fetch_add(1, std::memory_order_relaxed)) < n;) f(context, i, slot);
    } catch (...) {
      next.store(n, std::memory_order_relaxed);  // no thread starts another index
      if (!failed.exchange(true)) error = std::current_exception();
    }
  }
};

class Pool {
 public:
  // Works on the job with up to `helpers` helpers and returns when the job is done.
  void run(Job& job, int helpers) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      jobs_.push_back(&job);
      try {
        while (workers_ < helpers) {
          std::thread(&Pool::serve, this).detach();
          ++workers_;
        }
      } catch (const std::system_error&) {
        // The system starts no more threads: the existing ones do the work.
      }
      posted_.fetch_add(1, std::memory_order_release);
    }
    if (sleeping_.load() > 0) wake_.notify_all();
    job.work(0);
    {
      const std::lock_guard<std::mutex> lock(mutex_);  // afterwards no helper joins
      jobs_.erase(std::find(jobs_.begin(), jobs_.end(), &job));
    }
    for (int look = 0; job.helpers.load(std::memory_order_acquire) > 0; ++look) {
      if (look < kLooks) {
        pause();
        continue;
      }
      std::unique_lock<std::mutex> lock(mutex_);
      done_.wait(lock, [&] { return job.helpers.load(std::memory_order_acquire) == 0; });
    }
    if (job.error) std::rethrow_exception(job.error);
  }

 private:
  // The loop of a helper thread.
  [[noreturn]] void serve() {
    uint64_t seen = 0;
    while (true) {
      for (int look = 0; look < kLooks; ++look) {
        if (posted_.load(std::memory_order_acquire) != seen) break;
        pause();
      }
      Job* job = nullptr;
      int slot = 0;
      {
        std::unique_lock<std::mutex> lock(mutex_);
        ++sleeping_;
        wake_.wait(lock, [&] {
          seen = posted_.load(std::memory_order_relaxed);
          for (Job* j : jobs_)
            if (j->wanted > 0) job = j;
          return job != nullptr;
        });
        --sleeping_;
        slot = job->wanted--;
        job->helpers.fetch_add(1, std::memory_order_relaxed);
      }
      job->work(slot);
      const std::lock_guard<std::mutex> lock(mutex_);
      job->helpers.fetch_sub(1, std::memory_order_release);  // afterwards the job may be destroyed
      done_.notify_all();
    }
  }

  std::mutex mutex_;
  std::condition_variable wake_, done_;
  std::vector<Job*> jobs_;  // guarded by mutex_, like workers_
  int workers_ = 0;
  std::atomic<int> sleeping_{0};
  std::atomic<uint64_t> posted_{0};  // number of jobs so far: a new number ends the polling
};

// The pool is never destroyed: its threads sleep until the process ends. A forked child process has
// no copy of these threads, so the child starts a pool of its own.
std::atomic<Pool*> current{nullptr};

Pool& pool() {
  static const int once = pthread_atfork(nullptr, nullptr, [] { current.store(nullptr); });
  (void)once;
  Pool* p = current.load();
  if (p == nullptr) {
    Pool* made = new Pool;
    if (current.compare_exchange_strong(p, made)) return *made;
    delete made;
  }
  return *p;
}

}  // namespace

void run_parallel(int threads, int n, void (*f)(const void*, int, int), const void* context) {
  const int helpers = std::min(threads, n) - 1;
  if (helpers < 1) {
    for (int i = 0; i < n; ++i) f(context, i, 0);
    return;
  }
  Job job;
  job.f = f;
  job.context = context;
  job.n = n;
  job.wanted = helpers;
  pool().run(job, helpers);
}

}  // namespace seg
