#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include "visit_cross_entropy/rows.h"

#define EHRSEQ_ISA_FILE "visit_cross_entropy/row_kernels.h"
#include "common/each_isa.h"

namespace ehrseq::visit_cross_entropy {

#define EHRSEQ_ROWS_LOSS(scalar_t)                                                                \
  void rows_loss(const Settings& settings, const Rows<scalar_t>& rows, double* losses) {          \
    static const auto kernel = EHRSEQ_BEST_ISA(ehrseq::visit_cross_entropy, rows_loss<scalar_t>); \
    kernel(settings, rows, losses);                                                               \
  }

EHRSEQ_ROWS_LOSS(float)
EHRSEQ_ROWS_LOSS(double)
EHRSEQ_ROWS_LOSS(BFloat16)
EHRSEQ_ROWS_LOSS(Half)

#undef EHRSEQ_ROWS_LOSS

bool mark_ignored(int64_t* labels, int64_t count, int64_t classes, int64_t ignore_index) {
  static const auto kernel = EHRSEQ_BEST_ISA(ehrseq::visit_cross_entropy, mark_ignored);
  return kernel(labels, count, classes, ignore_index);
}

}  // namespace ehrseq::visit_cross_entropy
