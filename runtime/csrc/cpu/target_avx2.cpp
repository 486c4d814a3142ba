// The kernels for x86-64 with AVX2. All other headers are included before the pragma, so that the
// compiler uses AVX2 only in the code of table-inl.h.
#if defined(__x86_64__)
#include <cmath>
#include <cstring>
#include <type_traits>

#include "kernels.h"

#define SEG_LANES 8       // floats of a vector
#define SEG_REGISTERS 16  // vector registers of the processor

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif
// clang-format off
namespace seg { namespace avx2 {
#include "table-inl.h"
}}
// clang-format on
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace seg {
const Kernels* avx2_kernels() {
  static constexpr Kernels table = avx2::table("avx2");
  return &table;
}
}  // namespace seg
#endif
