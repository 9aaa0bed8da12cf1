// The one choice of instruction set: every kernel of the package that comes in several variants
// (common/each_isa.h) asks best_isa().
#pragma once

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && !defined(EHRSEQ_NO_CLONES)
#define EHRSEQ_HAS_ISAS 1
#else
#define EHRSEQ_HAS_ISAS 0
#endif

#if EHRSEQ_HAS_ISAS && defined(__linux__) && __GNUC__ >= 11
#define EHRSEQ_HAS_AMX 1
#else
#define EHRSEQ_HAS_AMX 0
#endif

namespace ehrseq {

// In rising order: each has what those before it have.
enum class Isa { kBaseline, kAvx2, kAvx512, kAvx512Bf16, kAmx };

// What this CPU has, or less where EHRSEQ_FAST_CPU_CAPABILITY holds it down. Read once. Throws
// std::invalid_argument, at every call, where that variable names no instruction set.
Isa best_isa();

// How bfloat16 is multiplied: widened to float32, in pairs (avx512_bf16) or in tiles (amx).
//
// Having AVX512-BF16 says that a CPU can multiply such pairs, not that this is fast: AMD's start as
// many such instructions per cycle as FMAs, each for twice the products; Intel's half as many or
// fewer, so that nothing is gained, and the conversions come on top. There bfloat16 is widened to
// float32, unless EHRSEQ_FAST_CPU_CAPABILITY=avx512_bf16 asks for these products, or there are
// tiles.
enum class BFloat16Products { kWidened, kPairs, kTiles };
BFloat16Products bfloat16_products();

}  // namespace ehrseq
