#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "piecewise_hazard/rows.h"

#define EHRSEQ_ISA_FILE "piecewise_hazard/row_kernels.h"
#include "common/each_isa.h"

namespace ehrseq::survival::piecewise {

#define EHRSEQ_ROWS_NLL(scalar_t)                                                                \
  void rows_nll(const Settings& settings, const Rows<scalar_t>& rows, double* nll) {             \
    static const auto kernel = EHRSEQ_BEST_ISA(ehrseq::survival::piecewise, rows_nll<scalar_t>); \
    kernel(settings, rows, nll);                                                                 \
  }

EHRSEQ_ROWS_NLL(float)
EHRSEQ_ROWS_NLL(double)
EHRSEQ_ROWS_NLL(BFloat16)
EHRSEQ_ROWS_NLL(Half)

#undef EHRSEQ_ROWS_NLL

}  // namespace ehrseq::survival::piecewise
