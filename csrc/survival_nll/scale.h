// The loop of survival_nll_scale on the CPU.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/dtypes.h"
#include "common/survival/saved_grad.h"

namespace ehrseq::survival {

// saved * factor, and +0 where that is +0, whatever the factor.
template <typename grad_t>
void scale_many(const saved_grad_t<grad_t>* saved, int64_t values, accumulator_t<grad_t> factor,
                grad_t* grad);

template <typename grad_t>
void scale(const saved_grad_t<grad_t>* saved, int64_t values, accumulator_t<grad_t> factor,
           grad_t* grad) {
  using T = accumulator_t<grad_t>;
  if (values >= 16) return scale_many(saved, values, factor, grad);
  for (int64_t i = 0; i < values; ++i) {
    const T value = static_cast<T>(saved[i]);
    const bool counts = value != T(0) || std::signbit(value);
    grad[i] = static_cast<grad_t>(counts ? value * factor + T(0) : T(0));
  }
}

}  // namespace ehrseq::survival
