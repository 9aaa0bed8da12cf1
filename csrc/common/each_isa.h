// One source, several instruction sets: compiles one file for the baseline, for AVX2 and for
// AVX-512, each in a namespace of its own, and picks the one that common/isa.h chose. So a wheel
// runs on any x86-64 and is not held to the machine that built it.
//
//   #define EHRSEQ_ISA_FILE "visit_pool/row_kernels.h"
//   #include "common/each_isa.h"
//   const auto* chosen = EHRSEQ_BEST_ISA(ehrseq::pooling, name);
//
// where the file defines ehrseq::pooling::EHRSEQ_ISA::name, and every standard header that it needs
// has been included before.
//
// What the file calls from elsewhere keeps the baseline's instructions, so no function that another
// translation unit could share is compiled for more than every x86-64 has.
//
// EHRSEQ_ISA_LEVEL is 0, 1 and 2 in their order, for what has to be said in intrinsics. With
// EHRSEQ_ISA_HAS_BFLOAT16 there are two more, with products of bfloat16: avx512_bf16 of level 3, in
// pairs, and amx of level 4, in tiles. EHRSEQ_BEST_ISA picks neither, bfloat16_products() does.
//
// (Not target_clones: GCC takes comparisons of wide vectors apart into scalars before it clones a
// function, and the loader's choice among clones cannot be held down.)

// Vectors are passed between inlined helpers only, so no call depends on the ABI that this is
// about.
#pragma GCC diagnostic ignored "-Wpsabi"

#include "common/isa.h"

#if EHRSEQ_HAS_ISAS
// GCC 12 says it of its own intrinsics, which begin with a vector that they do not set.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#endif

#define EHRSEQ_ISA baseline
#define EHRSEQ_ISA_LEVEL 0
#include EHRSEQ_ISA_FILE
#undef EHRSEQ_ISA
#undef EHRSEQ_ISA_LEVEL

#if EHRSEQ_HAS_ISAS

#pragma GCC push_options
#pragma GCC target("avx2,fma,bmi,bmi2,f16c,lzcnt,popcnt")
#define EHRSEQ_ISA avx2
#define EHRSEQ_ISA_LEVEL 1
#include EHRSEQ_ISA_FILE
#undef EHRSEQ_ISA
#undef EHRSEQ_ISA_LEVEL
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target( \
    "avx2,fma,bmi,bmi2,f16c,lzcnt,popcnt,avx512f,avx512vl,avx512bw,avx512dq,avx512cd")
#define EHRSEQ_ISA avx512
#define EHRSEQ_ISA_LEVEL 2
#include EHRSEQ_ISA_FILE
#undef EHRSEQ_ISA
#undef EHRSEQ_ISA_LEVEL
#pragma GCC pop_options

#ifdef EHRSEQ_ISA_HAS_BFLOAT16
#pragma GCC push_options
#pragma GCC target(                                                                    \
    "avx2,fma,bmi,bmi2,f16c,lzcnt,popcnt,avx512f,avx512vl,avx512bw,avx512dq,avx512cd", \
    "avx512bf16,prefer-vector-width=512")
#define EHRSEQ_ISA avx512_bf16
#define EHRSEQ_ISA_LEVEL 3
#include EHRSEQ_ISA_FILE
#undef EHRSEQ_ISA
#undef EHRSEQ_ISA_LEVEL
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target(                                                                    \
    "avx2,fma,bmi,bmi2,f16c,lzcnt,popcnt,avx512f,avx512vl,avx512bw,avx512dq,avx512cd", \
    "prefer-vector-width=512")
#define EHRSEQ_ISA amx
#define EHRSEQ_ISA_LEVEL 4
#include EHRSEQ_ISA_FILE
#undef EHRSEQ_ISA
#undef EHRSEQ_ISA_LEVEL
#pragma GCC pop_options
#endif

#define EHRSEQ_BEST_ISA(scope, name)                                     \
  (::ehrseq::best_isa() >= ::ehrseq::Isa::kAvx512 ? &scope::avx512::name \
   : ::ehrseq::best_isa() >= ::ehrseq::Isa::kAvx2 ? &scope::avx2::name   \
                                                  : &scope::baseline::name)

#else

// Not a comma after best_isa(): GCC 12 does not resolve the address of a template's instance there.
#define EHRSEQ_BEST_ISA(scope, name)                                         \
  (::ehrseq::best_isa() >= ::ehrseq::Isa::kBaseline ? &scope::baseline::name \
                                                    : &scope::baseline::name)

#endif

#undef EHRSEQ_ISA_FILE
#undef EHRSEQ_ISA_HAS_BFLOAT16
