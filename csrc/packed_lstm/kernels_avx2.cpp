// The kernels for x86-64 CPUs with AVX2 and FMA.
#include <cmath>
#include <type_traits>

#include "common/simd.h"
#include "packed_lstm/isa.h"
#include "packed_lstm/kernels.h"

#ifdef EHRSEQ_HAS_X86_KERNELS
#pragma GCC target("arch=x86-64-v3")
#define EHRSEQ_ISA avx2
#define EHRSEQ_VECTOR_BYTES 32
#define EHRSEQ_TILE_ROWS 3
#include "packed_lstm/kernels_impl.h"
#endif
