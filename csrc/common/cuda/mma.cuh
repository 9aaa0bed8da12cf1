// One product of a warp on tensor cores, sum [16, 8] += a [16, K] * b [K, 8], with float32 sums: K
// is 16 for 16-bit types, 8 for float32, which is multiplied as TF32. sm_80 and later. Every lane
// of the warp takes part.
//
// What lane 4 g + t holds of each (PTX ISA, "Matrix Fragments for mma.m16n8k16" and "m16n8k8"), in
// words of two 16-bit values or of one TF32 value, `k` counting words:
//   a.x     row g, k t
//   a.y     row g + 8, k t
//   a.z     row g, k t + 4
//   a.w     row g + 8, k t + 4
//   b0      k t, column g
//   b1      k t + 4, column g
//   sum[0]  row g, column 2 t
//   sum[1]  row g, column 2 t + 1
//   sum[2], sum[3]  the same of row g + 8
#pragma once

#include "common/cuda/device.cuh"

namespace ehrseq::cuda {

constexpr int kMmaRows = 16;
constexpr int kMmaColumns = 8;

// The tests' build for the host brings its own.
#ifndef EHRSEQ_MMA
#define EHRSEQ_MMA(shape, types, sum, a, b0, b1)                                      \
  asm volatile("mma.sync.aligned." shape ".row.col.f32." types                        \
               ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
               : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])               \
               : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1))
#define EHRSEQ_ROUND_TO_TF32(x, bits) asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x))
#endif

template <typename scalar_t>
__device__ __forceinline__ void multiply_add(float (&sum)[4], const uint4& a, unsigned b0,
                                             unsigned b1) {
  if constexpr (std::is_same_v<scalar_t, __nv_bfloat16>) {
    EHRSEQ_MMA("m16n8k16", "bf16.bf16", sum, a, b0, b1);
  } else if constexpr (std::is_same_v<scalar_t, __half>) {
    EHRSEQ_MMA("m16n8k16", "f16.f16", sum, a, b0, b1);
  } else {
    static_assert(std::is_same_v<scalar_t, float>);
    EHRSEQ_MMA("m16n8k8", "tf32.tf32", sum, a, b0, b1);
  }
}

// A value as tensor cores take it: rounded to nearest, float32 to TF32's 10 bits, of which they
// would else cut off the rest.
template <typename scalar_t>
__device__ inline scalar_t as_operand(float x) {
  if constexpr (std::is_same_v<scalar_t, float>) {
    unsigned bits;
    EHRSEQ_ROUND_TO_TF32(x, bits);
    return __uint_as_float(bits);
  } else {
    return narrow<scalar_t>(x);
  }
}

}  // namespace ehrseq::cuda
