// The kernels for x86-64 with AVX-512. All other headers are included before the pragma, so that
// the compiler uses AVX-512 only in the code of table-inl.h.
#if defined(__x86_64__)
#include <cmath>
#include <cstring>
#include <type_traits>

#include "kernels.h"

#define SEG_LANES 16      // floats of a vector
#define SEG_REGISTERS 32  // vector registers of the processor

#if defined(__clang__)
#pragma clang attribute push( \
    __attribute__((target("avx512f,avx512dq,avx512vl,avx512bw,avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512dq,avx512vl,avx512bw,avx2,fma")
#endif
// clang-format off
namespace seg { namespace avx512 {
#include "table-inl.h"
}}
// clang-format on
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace seg {
const Kernels* avx512_kernels() {
  static constexpr Kernels table = avx512::table("avx512");
  return &table;
}
}  // namespace seg
#endif
