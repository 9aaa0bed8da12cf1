#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "survival_nll/rows.h"

#define EHRSEQ_ISA_FILE "survival_nll/rank_kernels.h"
#include "common/each_isa.h"

namespace ehrseq::survival {

#define EHRSEQ_RANKS_NLL(scalar_t)                                                            \
  void ranks_nll(const LossSettings& settings, const RankRows<scalar_t>& rows, double* nll) { \
    static const auto kernel = EHRSEQ_BEST_ISA(ehrseq::survival, ranks_nll<scalar_t>);        \
    kernel(settings, rows, nll);                                                              \
  }

EHRSEQ_RANKS_NLL(float)
EHRSEQ_RANKS_NLL(double)
EHRSEQ_RANKS_NLL(BFloat16)
EHRSEQ_RANKS_NLL(Half)

#undef EHRSEQ_RANKS_NLL

}  // namespace ehrseq::survival
