#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>

#include "fixed_horizon/masked_bce.h"

#define EHRSEQ_ISA_FILE "fixed_horizon/masked_bce_kernels.h"
#include "common/each_isa.h"

namespace ehrseq::fixed_horizon {

double read_weights(const Numbers& weights, int64_t slots, uint64_t* words, bool* possible) {
  static const auto kernel = EHRSEQ_BEST_ISA(ehrseq::fixed_horizon, read_weights);
  return kernel(weights, slots, words, possible);
}

template <typename scalar_t>
double loss_of_given(const GivenSlots<scalar_t>& given, double share, bool* possible) {
  static const auto kernel = EHRSEQ_BEST_ISA(ehrseq::fixed_horizon, loss_of_given<scalar_t>);
  return kernel(given, share, possible);
}

template double loss_of_given(const GivenSlots<float>&, double, bool*);
template double loss_of_given(const GivenSlots<double>&, double, bool*);
template double loss_of_given(const GivenSlots<BFloat16>&, double, bool*);
template double loss_of_given(const GivenSlots<Half>&, double, bool*);

}  // namespace ehrseq::fixed_horizon
