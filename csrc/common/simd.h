// One source, several instruction sets: functions marked EHRSEQ_SIMD are compiled for the baseline,
// for AVX2 and for AVX-512, and the loader picks the best that the running CPU has. So a wheel runs
// on any x86-64 and is not held to the machine that built it.
#pragma once

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && defined(__linux__) && \
    !defined(EHRSEQ_NO_CLONES)
#define EHRSEQ_SIMD __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#else
#define EHRSEQ_SIMD
#endif

// Helpers that a marked function calls must be inlined into it: on their own they would be compiled
// for the baseline alone.
#define EHRSEQ_INLINE inline __attribute__((always_inline))
