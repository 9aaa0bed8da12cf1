#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include "deephit_ranking/rows.h"

#define EHRSEQ_ISA_FILE "deephit_ranking/row_kernels.h"
#include "common/each_isa.h"

namespace ehrseq::survival::ranking {

#define EHRSEQ_RANKING_ROWS(scalar_t)                                                          \
  void sum_later(const Settings& settings, const Rows<scalar_t>& rows,                         \
                 const Later<accumulator_t<scalar_t>>& later, double* own,                     \
                 std::vector<accumulator_t<scalar_t>>& memory) {                               \
    static const auto kernel = EHRSEQ_BEST_ISA(ehrseq::survival::ranking, sum_rows<scalar_t>); \
    kernel(settings, rows, later, own, memory);                                                \
  }                                                                                            \
  void write_gradients(const Settings& settings, const Rows<scalar_t>& rows,                   \
                       const Slopes<accumulator_t<scalar_t>>& slopes,                          \
                       saved_grad_t<scalar_t>* const* grads,                                   \
                       std::vector<accumulator_t<scalar_t>>& memory) {                         \
    static const auto kernel =                                                                 \
        EHRSEQ_BEST_ISA(ehrseq::survival::ranking, gradients_of_rows<scalar_t>);               \
    kernel(settings, rows, slopes, grads, memory);                                             \
  }

EHRSEQ_RANKING_ROWS(float)
EHRSEQ_RANKING_ROWS(double)
EHRSEQ_RANKING_ROWS(BFloat16)
EHRSEQ_RANKING_ROWS(Half)

#undef EHRSEQ_RANKING_ROWS

void exponentiate(double* values, int64_t count) {
  static const auto kernel = EHRSEQ_BEST_ISA(ehrseq::survival::ranking, exponentiate);
  kernel(values, count);
}

#define EHRSEQ_JOIN_LATER(T)                                                               \
  void join_later(int64_t groups, int64_t stride, const Later<T>& of_groups,               \
                  const Later<T>& all) {                                                   \
    static const auto kernel = EHRSEQ_BEST_ISA(ehrseq::survival::ranking, join_groups<T>); \
    kernel(groups, stride, of_groups, all);                                                \
  }

EHRSEQ_JOIN_LATER(float)
EHRSEQ_JOIN_LATER(double)

#undef EHRSEQ_JOIN_LATER

}  // namespace ehrseq::survival::ranking
