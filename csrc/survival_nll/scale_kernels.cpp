#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "survival_nll/scale.h"

#define EHRSEQ_ISA_FILE "survival_nll/scale_kernels.h"
#include "common/each_isa.h"

namespace ehrseq::survival {

template <typename grad_t>
void scale_many(const saved_grad_t<grad_t>* saved, int64_t values, accumulator_t<grad_t> factor,
                grad_t* grad) {
  static const auto kernel = EHRSEQ_BEST_ISA(ehrseq::survival, scale_many<grad_t>);
  kernel(saved, values, factor, grad);
}

template void scale_many(const float*, int64_t, float, float*);
template void scale_many(const double*, int64_t, double, double*);
template void scale_many(const BFloat16*, int64_t, float, BFloat16*);
template void scale_many(const float*, int64_t, float, Half*);

}  // namespace ehrseq::survival
