// The one choice of instruction set: every kernel of the package that comes in several variants
// (common/each_isa.h, packed_lstm) asks best_isa().
#pragma once

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && !defined(EHRSEQ_NO_CLONES)
#define EHRSEQ_HAS_ISAS 1
#else
#define EHRSEQ_HAS_ISAS 0
#endif

namespace ehrseq {

// In rising order: each has what those before it have.
enum class Isa { kBaseline, kAvx2, kAvx512, kAvx512Bf16 };

// What this CPU has, or less where EHRSEQ_FAST_CPU_CAPABILITY holds it down. Read once. Throws
// std::invalid_argument, at every call, where that variable names no instruction set.
Isa best_isa();

}  // namespace ehrseq
