// Compiles one file for several instruction sets, each in a namespace of its own, and picks the
// best one that the running CPU has. For code in the compiler's vector types, where EHRSEQ_SIMD
// does not do: GCC takes comparisons of wide vectors apart into scalars before it clones a
// function.
//
//   #define EHRSEQ_ISA_FILE "room/kernels.h"   // defines ehrseq::room::EHRSEQ_ISA::name
//   #include "common/each_isa.h"                 // all standard headers come before
//   const auto* chosen = EHRSEQ_BEST_ISA(ehrseq::room, name);
//
// What the file calls from elsewhere keeps the baseline's instructions, so no function that another
// translation unit could share is compiled for more than every x86-64 has.
//
// EHRSEQ_FAST_CPU_CAPABILITY=baseline or avx2 in the environment holds the choice down, for tests.

// Vectors are passed between inlined helpers only, so no call depends on the ABI that this is
// about.
#pragma GCC diagnostic ignored "-Wpsabi"

#include "common/isa.h"

#define EHRSEQ_ISA baseline
#include EHRSEQ_ISA_FILE
#undef EHRSEQ_ISA

#if EHRSEQ_HAS_ISAS

#pragma GCC push_options
#pragma GCC target("avx2,fma,bmi,bmi2,f16c,lzcnt,popcnt")
#define EHRSEQ_ISA avx2
#include EHRSEQ_ISA_FILE
#undef EHRSEQ_ISA
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target( \
    "avx2,fma,bmi,bmi2,f16c,lzcnt,popcnt,avx512f,avx512vl,avx512bw,avx512dq,avx512cd")
#define EHRSEQ_ISA avx512
#include EHRSEQ_ISA_FILE
#undef EHRSEQ_ISA
#pragma GCC pop_options

#define EHRSEQ_BEST_ISA(scope, name)                                     \
  (::ehrseq::best_isa() == ::ehrseq::Isa::kAvx512 ? &scope::avx512::name \
   : ::ehrseq::best_isa() == ::ehrseq::Isa::kAvx2 ? &scope::avx2::name   \
                                                  : &scope::baseline::name)

#else

#define EHRSEQ_BEST_ISA(scope, name) (&scope::baseline::name)

#endif

#undef EHRSEQ_ISA_FILE
