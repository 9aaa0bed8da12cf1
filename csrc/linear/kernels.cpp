// The kernels of linear layers, compiled for several instruction sets.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "common/dtypes.h"
#include "common/simd.h"
#include "linear/layer.h"

#pragma GCC diagnostic ignored "-Wignored-attributes"
#define EHRSEQ_ISA_FILE "linear/kernels.h"
#include "common/each_isa.h"

namespace ehrseq::linear {

template <>
const Kernels<float>& kernels<float>() {
  return EHRSEQ_BEST_ISA(ehrseq::linear, float_kernels)();
}

template <>
const Kernels<double>& kernels<double>() {
  return EHRSEQ_BEST_ISA(ehrseq::linear, double_kernels)();
}

}  // namespace ehrseq::linear
