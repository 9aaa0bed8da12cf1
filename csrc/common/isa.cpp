#include "common/isa.h"

#include <algorithm>
#include <cstdlib>
#include <exception>
#include <stdexcept>
#include <string>

namespace ehrseq {
namespace {

constexpr const char* kNames[] = {"baseline", "avx2", "avx512", "avx512_bf16"};

Isa isa_of_this_cpu() {
#if EHRSEQ_HAS_ISAS
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") ||
      !__builtin_cpu_supports("bmi2")) {
    return Isa::kBaseline;
  }
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512vl") ||
      !__builtin_cpu_supports("avx512bw") || !__builtin_cpu_supports("avx512dq") ||
      !__builtin_cpu_supports("avx512cd")) {
    return Isa::kAvx2;
  }
  return __builtin_cpu_supports("avx512bf16") ? Isa::kAvx512Bf16 : Isa::kAvx512;
#else
  return Isa::kBaseline;
#endif
}

std::string asked_isa() {
  const char* variable = std::getenv("EHRSEQ_FAST_CPU_CAPABILITY");
  return variable == nullptr ? "" : variable;
}

Isa chosen_isa() {
  const std::string asked = asked_isa();
  if (asked.empty()) return isa_of_this_cpu();
  for (int isa = 0; isa <= static_cast<int>(Isa::kAvx512Bf16); ++isa) {
    if (asked == kNames[isa]) return std::min(static_cast<Isa>(isa), isa_of_this_cpu());
  }
  throw std::invalid_argument(
      "EHRSEQ_FAST_CPU_CAPABILITY: expected baseline, avx2, avx512 or avx512_bf16, got '" + asked +
      "'");
}

}  // namespace

Isa best_isa() {
  static const Isa chosen = chosen_isa();
  return chosen;
}

bool multiplies_bfloat16() {
#if EHRSEQ_HAS_ISAS
  static const bool is_fast =
      asked_isa() == kNames[static_cast<int>(Isa::kAvx512Bf16)] || __builtin_cpu_is("amd");
  return best_isa() == Isa::kAvx512Bf16 && is_fast;
#else
  return false;
#endif
}

}  // namespace ehrseq

// For `python -m ehrseq_fast info`: the instruction set in use, or why none is.
extern "C" __attribute__((visibility("default"))) const char* ehrseq_fast_cpu_capability() {
  static const std::string text = [] {
    try {
      return std::string(ehrseq::kNames[static_cast<int>(ehrseq::best_isa())]);
    } catch (const std::exception& error) {
      return std::string(error.what());
    }
  }();
  return text.c_str();
}

// Likewise: what the recurrent layers make of products of bfloat16.
extern "C" __attribute__((visibility("default"))) const char* ehrseq_fast_bfloat16_products() {
  try {
    return ehrseq::multiplies_bfloat16() ? "pairs" : "float32";
  } catch (const std::exception&) {
    return "float32";
  }
}
