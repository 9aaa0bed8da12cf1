// bfloat16 as CUDA names it: the upper half of a float, rounded to nearest even.
#pragma once

#include <cuda_runtime.h>

struct __nv_bfloat16 {
  uint16_t bits;
  __nv_bfloat16() = default;
  __nv_bfloat16(float x) {
    const uint32_t all = cuda_on_cpu::bit_cast<uint32_t>(x);
    const uint32_t rounded = all + 0x7fff + ((all >> 16) & 1);
    bits = x != x ? uint16_t{0x7fff} : static_cast<uint16_t>(rounded >> 16);
  }
  operator float() const { return cuda_on_cpu::bit_cast<float>(uint32_t{bits} << 16); }
};

inline __nv_bfloat16 __float2bfloat16_rn(float x) { return __nv_bfloat16(x); }
inline float __bfloat162float(__nv_bfloat16 x) { return x; }
