#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>

#include "common/survival/visit_blocks.h"
#include "fixed_horizon/rows.h"

#define EHRSEQ_ISA_FILE "fixed_horizon/row_kernels.h"
#include "common/each_isa.h"

namespace ehrseq::fixed_horizon {

double weight_of_visits(const Settings& settings, const Visits& visits, bool* possible) {
  static const auto kernel = EHRSEQ_BEST_ISA(ehrseq::fixed_horizon, weight_of_visits);
  return kernel(settings, visits, possible);
}

template <typename stored_t>
Range range_of_times(const Outcome& outcome, const stored_t* times, int64_t visits) {
  static const auto kernel = EHRSEQ_BEST_ISA(ehrseq::fixed_horizon, range_of_times<stored_t>);
  return kernel(outcome, times, visits);
}

template Range range_of_times(const Outcome&, const float*, int64_t);
template Range range_of_times(const Outcome&, const double*, int64_t);
template Range range_of_times(const Outcome&, const int32_t*, int64_t);
template Range range_of_times(const Outcome&, const int64_t*, int64_t);

template <typename scalar_t>
double loss_of_visits(const Settings& settings, const Visits& visits, const Row<scalar_t>& row,
                      bool* possible) {
  static const auto kernel = EHRSEQ_BEST_ISA(ehrseq::fixed_horizon, loss_of_visits<scalar_t>);
  return kernel(settings, visits, row, possible);
}

template <typename scalar_t>
void losses_of_ranges(const Settings& settings, const Ranges& ranges, const Row<scalar_t>& first,
                      double* losses) {
  static const auto kernel = EHRSEQ_BEST_ISA(ehrseq::fixed_horizon, losses_of_ranges<scalar_t>);
  kernel(settings, ranges, first, losses);
}

#define EHRSEQ_LOSSES(scalar_t)                                                                \
  template double loss_of_visits(const Settings&, const Visits&, const Row<scalar_t>&, bool*); \
  template void losses_of_ranges(const Settings&, const Ranges&, const Row<scalar_t>&, double*);

EHRSEQ_LOSSES(float)
EHRSEQ_LOSSES(double)
EHRSEQ_LOSSES(BFloat16)
EHRSEQ_LOSSES(Half)

#undef EHRSEQ_LOSSES

}  // namespace ehrseq::fixed_horizon
