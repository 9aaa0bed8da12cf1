// The kernels for x86-64 CPUs with AVX-512.
#include <cmath>
#include <type_traits>

#include "common/simd.h"
#include "packed_lstm/isa.h"
#include "packed_lstm/kernels.h"

#ifdef EHRSEQ_HAS_X86_KERNELS
#pragma GCC target("arch=x86-64-v4,prefer-vector-width=512")
#define EHRSEQ_ISA avx512
#define EHRSEQ_VECTOR_BYTES 64
#define EHRSEQ_TILE_ROWS 6
#include "packed_lstm/kernels_impl.h"
#endif
