// All kernels of one recurrent layer, for every instruction set, and the choice among them: what an
// operation's kernels.cpp consists of, once it has included its cell.h and defined
//   EHRSEQ_OPERATION  its namespace, in which `Cell` is
//   EHRSEQ_GATES      its gates.h
#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <type_traits>

#include "common/amx.h"
#include "common/simd.h"

#pragma GCC diagnostic ignored "-Wignored-attributes"
#define EHRSEQ_ISA_FILE "common/recurrent/kernels.h"
#define EHRSEQ_ISA_HAS_BFLOAT16
#include "common/each_isa.h"

namespace ehrseq::EHRSEQ_OPERATION {

template <>
const Kernels<float>& Cell::kernels<float>() {
  return EHRSEQ_BEST_ISA(ehrseq::EHRSEQ_OPERATION, float_kernels)();
}

template <>
const Kernels<double>& Cell::kernels<double>() {
  return EHRSEQ_BEST_ISA(ehrseq::EHRSEQ_OPERATION, double_kernels)();
}

// Called only where bfloat16 is not widened.
template <>
const Kernels<BFloat16>& Cell::kernels<BFloat16>() {
#if EHRSEQ_HAS_ISAS
  return bfloat16_products() == BFloat16Products::kTiles ? amx::bfloat16_kernels()
                                                         : avx512_bf16::bfloat16_kernels();
#else
  throw std::logic_error("no bfloat16 kernels on this CPU");
#endif
}

}  // namespace ehrseq::EHRSEQ_OPERATION
