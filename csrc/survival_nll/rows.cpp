#include "survival_nll/rows.h"

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#define EHRSEQ_ISA_FILE "survival_nll/row_kernels.h"
#include "common/each_isa.h"

namespace ehrseq::survival {

#define EHRSEQ_ROWS_NLL(scalar_t)                                                        \
  void rows_nll(const LossSettings& settings, const Rows<scalar_t>& rows, double* nll) { \
    static const auto kernel = EHRSEQ_BEST_ISA(ehrseq::survival, rows_nll<scalar_t>);    \
    kernel(settings, rows, nll);                                                         \
  }

EHRSEQ_ROWS_NLL(float)
EHRSEQ_ROWS_NLL(double)
EHRSEQ_ROWS_NLL(BFloat16)
EHRSEQ_ROWS_NLL(Half)

#undef EHRSEQ_ROWS_NLL

template <typename Values>
void count_visits(const void* mask, int64_t row_stride, int64_t slots, int64_t rows,
                  int64_t* visits) {
  static const auto kernel = EHRSEQ_BEST_ISA(ehrseq::survival, count_in_rows<Values>);
  kernel(mask, row_stride, slots, rows, visits);
}

#define EHRSEQ_COUNT_VISITS(Values) \
  template void count_visits<Values>(const void*, int64_t, int64_t, int64_t, int64_t*);

EHRSEQ_COUNT_VISITS(BoolMask)
EHRSEQ_COUNT_VISITS(Int8Mask)
EHRSEQ_COUNT_VISITS(Int16Mask)
EHRSEQ_COUNT_VISITS(Int32Mask)
EHRSEQ_COUNT_VISITS(Int64Mask)
EHRSEQ_COUNT_VISITS(HalfMask)
EHRSEQ_COUNT_VISITS(BFloat16Mask)
EHRSEQ_COUNT_VISITS(FloatMask)
EHRSEQ_COUNT_VISITS(DoubleMask)

#undef EHRSEQ_COUNT_VISITS

}  // namespace ehrseq::survival
