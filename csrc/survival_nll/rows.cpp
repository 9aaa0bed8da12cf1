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

}  // namespace ehrseq::survival
