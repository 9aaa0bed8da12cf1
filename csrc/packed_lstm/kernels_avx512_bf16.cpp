// The bfloat16 kernels for x86-64 CPUs with AVX512-BF16: products of pairs of bfloat16, added up in
// float32.
#include <cmath>
#include <type_traits>

#include "common/simd.h"
#include "packed_lstm/isa.h"
#include "packed_lstm/kernels.h"

#ifdef EHRSEQ_HAS_X86_KERNELS
#include <immintrin.h>
#pragma GCC target("arch=x86-64-v4,avx512bf16,prefer-vector-width=512")
#define EHRSEQ_ISA avx512_bf16
#define EHRSEQ_VECTOR_BYTES 64
#define EHRSEQ_TILE_ROWS 6
#define EHRSEQ_BFLOAT16_DOTS
#include "packed_lstm/kernels_impl.h"
#endif
