// float16 as CUDA names it, on the compiler's own type: rounds to nearest even, as a GPU does.
#pragma once

#include <cuda_runtime.h>

struct __half {
  _Float16 value;
  __half() = default;
  __half(float x) : value(static_cast<_Float16>(x)) {}
  operator float() const { return static_cast<float>(value); }
};
struct alignas(4) __half2 {
  __half x, y;
};

inline __half __float2half_rn(float x) { return __half(x); }
inline float __half2float(__half x) { return x; }
inline float2 __half22float2(__half2 x) { return {x.x, x.y}; }
