#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "visit_weighted_nll/rows.h"

#define EHRSEQ_ISA_FILE "visit_weighted_nll/row_kernels.h"
#include "common/each_isa.h"

namespace ehrseq::survival {

#define EHRSEQ_WEIGHTED_ROWS_NLL(scalar_t)                                                     \
  void rows_nll(const WeightedSettings<scalar_t>& settings, const Rows<scalar_t>& rows,        \
                double* nll) {                                                                 \
    static const auto kernel = EHRSEQ_BEST_ISA(ehrseq::survival, weighted_rows_nll<scalar_t>); \
    kernel(settings, rows, nll);                                                               \
  }

EHRSEQ_WEIGHTED_ROWS_NLL(float)
EHRSEQ_WEIGHTED_ROWS_NLL(double)
EHRSEQ_WEIGHTED_ROWS_NLL(BFloat16)
EHRSEQ_WEIGHTED_ROWS_NLL(Half)

#undef EHRSEQ_WEIGHTED_ROWS_NLL

}  // namespace ehrseq::survival
