// Chooses the kernels once per process: those of the instruction set that SEG_ISA names, or of the
// fastest one that the processor runs.
#include "kernels.h"

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

namespace seg {

int usable_kernels(const char* names[4]) {
  int count = 0;
  names[count++] = "base";
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    names[count++] = "avx2";
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw"))
      names[count++] = "avx512";
  }
#endif
  return count;
}

const Kernels* find_kernels(const char* name) {
  const char* names[4];
  const int count = usable_kernels(names);
  for (int i = 0; i < count; ++i) {
    if (std::strcmp(name, names[i]) != 0) continue;
#if defined(__x86_64__)
    if (std::strcmp(name, "avx512") == 0) return avx512_kernels();
    if (std::strcmp(name, "avx2") == 0) return avx2_kernels();
#endif
    return base_kernels();
  }
  return nullptr;
}

const Kernels& default_kernels() {
  static const Kernels* const chosen = [] {
    const char* names[4];
    const int count = usable_kernels(names);
    const char* forced = std::getenv("SEG_ISA");
    if (forced == nullptr || *forced == '\0') return find_kernels(names[count - 1]);
    const Kernels* found = find_kernels(forced);
    if (found == nullptr) {
      std::string usable = names[0];
      for (int i = 1; i < count; ++i) usable += std::string(", ") + names[i];
      throw std::runtime_error(std::string("SEG_ISA is '") + forced + "', but this machine runs " +
                               usable);
    }
    return found;
  }();
  return *chosen;
}

}  // namespace seg
