#include "common/isa.h"

#include <algorithm>
#include <cstdlib>
#include <exception>
#include <stdexcept>
#include <string>

#include "common/amx.h"

namespace ehrseq {
namespace {

constexpr const char* kNames[] = {"baseline", "avx2", "avx512", "avx512_bf16", "amx"};
constexpr const char* kEmulated = "amx_emulated";

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
  if (!__builtin_cpu_supports("avx512bf16")) return Isa::kAvx512;
  return amx_tiles::why_not() == nullptr ? Isa::kAmx : Isa::kAvx512Bf16;
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
  if (asked == kEmulated) {
    const Isa has = isa_of_this_cpu();
    if (has < Isa::kAvx512) return has;
    amx_tiles::emulate();
    return Isa::kAmx;
  }
  for (int isa = 0; isa <= static_cast<int>(Isa::kAmx); ++isa) {
    if (asked == kNames[isa]) return std::min(static_cast<Isa>(isa), isa_of_this_cpu());
  }
  throw std::invalid_argument(
      "EHRSEQ_FAST_CPU_CAPABILITY: expected baseline, avx2, avx512, avx512_bf16, amx or "
      "amx_emulated, got '" +
      asked + "'");
}

}  // namespace

Isa best_isa() {
  static const Isa chosen = chosen_isa();
  return chosen;
}

BFloat16Products bfloat16_products() {
#if EHRSEQ_HAS_ISAS
  static const bool pairs_are_fast =
      asked_isa() == kNames[static_cast<int>(Isa::kAvx512Bf16)] || __builtin_cpu_is("amd");
  if (best_isa() == Isa::kAmx) return BFloat16Products::kTiles;
  if (best_isa() == Isa::kAvx512Bf16 && pairs_are_fast) return BFloat16Products::kPairs;
#endif
  return BFloat16Products::kWidened;
}

}  // namespace ehrseq

// For `python -m ehrseq_fast info`: the instruction set in use, or why none is.
extern "C" __attribute__((visibility("default"))) const char* ehrseq_fast_cpu_capability() {
  static const std::string text = [] {
    try {
      const ehrseq::Isa isa = ehrseq::best_isa();
      if (ehrseq::amx_tiles::is_emulated()) return std::string(ehrseq::kEmulated);
      return std::string(ehrseq::kNames[static_cast<int>(isa)]);
    } catch (const std::exception& error) {
      return std::string(error.what());
    }
  }();
  return text.c_str();
}

// Likewise: what the recurrent layers make of products of bfloat16.
extern "C" __attribute__((visibility("default"))) const char* ehrseq_fast_bfloat16_products() {
  try {
    switch (ehrseq::bfloat16_products()) {
      case ehrseq::BFloat16Products::kTiles:
        return "tiles";
      case ehrseq::BFloat16Products::kPairs:
        return "pairs";
      default:
        return "float32";
    }
  } catch (const std::exception&) {
    return "float32";
  }
}

// Likewise: why the tiles of this CPU cannot be used, or null.
extern "C" __attribute__((visibility("default"))) const char* ehrseq_fast_why_no_amx() {
  return ehrseq::amx_tiles::why_not();
}
