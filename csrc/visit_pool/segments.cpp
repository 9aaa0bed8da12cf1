#include "visit_pool/segments.h"

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "common/dtypes.h"

#define EHRSEQ_ISA_FILE "visit_pool/row_kernels.h"
#include "common/each_isa.h"

namespace ehrseq {

template <typename scalar_t>
const RowKernels<scalar_t>& row_kernels() {
  static const RowKernels<scalar_t> chosen = EHRSEQ_BEST_ISA(ehrseq::pooling, kernels<scalar_t>)();
  return chosen;
}

template const RowKernels<float>& row_kernels();
template const RowKernels<double>& row_kernels();
template const RowKernels<BFloat16>& row_kernels();
template const RowKernels<Half>& row_kernels();

}  // namespace ehrseq
