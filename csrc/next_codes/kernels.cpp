#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "next_codes/row.h"

#define EHRSEQ_ISA_FILE "next_codes/row_kernels.h"
#include "common/each_isa.h"

namespace ehrseq::next_codes {

template <>
RowKernel<float> row_kernel<float>() {
  static const auto kernel = EHRSEQ_BEST_ISA(ehrseq::next_codes, row_loss<float>);
  return kernel;
}

template <>
RowKernel<double> row_kernel<double>() {
  static const auto kernel = EHRSEQ_BEST_ISA(ehrseq::next_codes, row_loss<double>);
  return kernel;
}

}  // namespace ehrseq::next_codes
