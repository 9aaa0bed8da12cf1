// A saved gradient times that of the loss, in vectors.
//
// Compiled once for each instruction set, hence no include guard: see common/each_isa.h.

#include "common/vector_math.h"
#include "survival_nll/scale.h"

namespace ehrseq::survival::EHRSEQ_ISA {

using namespace ehrseq::EHRSEQ_ISA;  // NOLINT: the lanes of the same instruction set

template <typename grad_t>
void scale_many(const saved_grad_t<grad_t>* saved, int64_t values, accumulator_t<grad_t> factor,
                grad_t* grad) {
  using saved_t = saved_grad_t<grad_t>;
  using T = accumulator_t<grad_t>;
  const auto scaled = [&](const saved_t* from) __attribute__((always_inline)) {
    const Lanes<T> value = load(from);
    const Mask<T> counts = (Mask<T>)value != 0;  // any bits but those of +0
    return (Lanes<T>)((Mask<T>)(value * factor + T(0)) & counts);
  };
  int64_t at = 0;
  for (; at + kLanes<T> <= values; at += kLanes<T>) store(grad + at, scaled(saved + at));
  if (at == values) return;
  saved_t some[kLanes<T>] = {};
  grad_t of_some[kLanes<T>];
  std::copy(saved + at, saved + values, some);
  store(of_some, scaled(some));
  std::copy(of_some, of_some + (values - at), grad + at);
}

}  // namespace ehrseq::survival::EHRSEQ_ISA
