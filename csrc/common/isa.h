// The instruction set that kernels of common/each_isa.h are chosen for.
#pragma once

#include <cstdlib>
#include <cstring>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && !defined(EHRSEQ_NO_CLONES)
#define EHRSEQ_HAS_ISAS 1
#else
#define EHRSEQ_HAS_ISAS 0
#endif

namespace ehrseq {

enum class Isa { kBaseline, kAvx2, kAvx512 };

inline Isa best_isa() {
#if EHRSEQ_HAS_ISAS
  const char* asked = std::getenv("EHRSEQ_FAST_CPU_CAPABILITY");
  const bool at_most_avx2 = asked != nullptr && std::strcmp(asked, "avx2") == 0;
  const bool baseline = asked != nullptr && std::strcmp(asked, "baseline") == 0;
  if (baseline || !__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") ||
      !__builtin_cpu_supports("bmi2")) {
    return Isa::kBaseline;
  }
  if (at_most_avx2 || !__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512vl") ||
      !__builtin_cpu_supports("avx512bw") || !__builtin_cpu_supports("avx512dq") ||
      !__builtin_cpu_supports("avx512cd")) {
    return Isa::kAvx2;
  }
  return Isa::kAvx512;
#else
  return Isa::kBaseline;
#endif
}

}  // namespace ehrseq
