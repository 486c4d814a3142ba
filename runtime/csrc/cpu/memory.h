// Memory for maps, in large pages where the system supports them.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdlib>
#include <memory>
#include <new>

namespace seg {

struct Free {
  void operator()(float* p) const { std::free(p); }
};
using Memory = std::unique_ptr<float, Free>;

// Returns n uninitialised floats at a multiple of 64 bytes; throws std::bad_alloc. Blocks of 2 MiB
// or more use large pages, which the system clears faster than small ones (docs/architecture.md).
inline Memory allocate(size_t n) {
  constexpr size_t kLarge = size_t{1} << 21;
  size_t bytes = n * sizeof(float);
  const bool large = bytes >= kLarge;
  if (large) bytes = (bytes + kLarge - 1) / kLarge * kLarge;
  void* p = nullptr;
  if (posix_memalign(&p, large ? kLarge : 64, bytes) != 0) throw std::bad_alloc();
#ifdef MADV_HUGEPAGE
  if (large) madvise(p, bytes, MADV_HUGEPAGE);
#endif
  return Memory(static_cast<float*>(p));
}

}  // namespace seg
