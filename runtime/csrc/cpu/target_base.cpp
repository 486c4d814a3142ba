// The kernels for any processor: SSE2 on x86-64, NEON on aarch64.
#if defined(__aarch64__) && !defined(__clang__)
// GCC's first scheduling pass is off on x86-64. On aarch64 it moves all loads of a product tile
// before the products and spills sums to the stack. tests/rules/neon_counts.py fails when that
// happens.
#pragma GCC optimize("no-schedule-insns")
#endif
#include <cmath>
#include <cstring>
#include <type_traits>

#include "kernels.h"

#define SEG_LANES 4  // floats of a vector
#if defined(__aarch64__)
#define SEG_REGISTERS 32  // vector registers of the processor
#else
#define SEG_REGISTERS 16
#endif

// clang-format off
namespace seg { namespace base {
#include "table-inl.h"
}}
// clang-format on

namespace seg {
const Kernels* base_kernels() {
  static constexpr Kernels table = base::table("base");
  return &table;
}
}  // namespace seg
