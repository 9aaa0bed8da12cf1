#include "survival_nll/rows.h"

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#define EHRSEQ_ISA_FILE "survival_nll/row_kernels.h"
#include "common/each_isa.h"

namespace ehrseq::survival {

#define EHRSEQ_ROWS_NLL(scalar_t)                                                     \
  void rows_nll(const Settings& settings, const Rows<scalar_t>& rows, double* nll) {  \
    static const auto kernel = EHRSEQ_BEST_ISA(ehrseq::survival, rows_nll<scalar_t>); \
    kernel(settings, rows, nll);                                                      \
  }

EHRSEQ_ROWS_NLL(float)
EHRSEQ_ROWS_NLL(double)
EHRSEQ_ROWS_NLL(BFloat16)
EHRSEQ_ROWS_NLL(Half)

#undef EHRSEQ_ROWS_NLL

void count_in_bytes(const uint8_t* mask, int64_t row_stride, int64_t slots, int64_t rows,
                    int64_t* visits) {
  static const auto kernel = EHRSEQ_BEST_ISA(ehrseq::survival, count_in_bytes);
  kernel(mask, row_stride, slots, rows, visits);
}

}  // namespace ehrseq::survival
