// What kernels call has to become a part of them: on its own it would be compiled for the baseline
// alone (common/each_isa.h).
#pragma once

#define EHRSEQ_INLINE inline __attribute__((always_inline))
