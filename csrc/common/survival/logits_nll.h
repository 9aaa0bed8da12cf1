// Loss and gradient of padded and of packed logits on the CPU, for the losses whose patients are
// rows in either layout; see layouts.h for what `Settings` bring.
#pragma once

#include <tuple>
#include <vector>

#include "common/dtypes.h"
#include "common/survival/groups.h"
#include "common/survival/layouts.h"
#include "common/survival/outcomes.h"
#include "common/survival/rank_layout.h"
#include "common/tensors.h"

namespace ehrseq::survival {

struct NothingElse {
  void operator()() const {}
};

// After a kernel has refused a patient. `refuse_values` throws for what is wrong beside outcomes.
template <typename Refuse>
[[noreturn]] void refuse_patients(const OutcomeReader& outcomes, const Refuse& refuse_values) {
  outcomes.refuse_impossible();
  refuse_values();
  outcomes.refuse();
}

template <typename Settings, typename Refuse = NothingElse>
std::tuple<Tensor, Tensor> padded_nll(const char* operation, const Tensor& logits,
                                      const Settings& settings, const OutcomeReader& outcomes,
                                      bool needs_grad, const Refuse& refuse_values = {}) {
  const Tensor rows = made_contiguous(logits);
  std::tuple<Tensor, Tensor> result;
  dispatch_floating(rows.scalar_type(), operation, [&](auto tag) {
    using scalar_t = typename decltype(tag)::type;
    const Tensor grad = empty_gradient<scalar_t>(rows, needs_grad);
    const PaddedPatients<scalar_t, Settings> all(
        settings, outcomes, data<const scalar_t>(rows),
        needs_grad ? data<saved_grad_t<scalar_t>>(grad) : nullptr);
    const Tensor nll = nll_of_groups<scalar_t>(settings, rows, all);
    if (!all.possible()) refuse_patients(outcomes, refuse_values);
    result = {nll, grad};
  });
  return result;
}

template <typename Settings, typename Refuse = NothingElse>
std::tuple<Tensor, Tensor> packed_nll(const char* operation, const Tensor& logits,
                                      const Settings& settings, const RankLayout& layout,
                                      const OutcomeReader& reader, bool needs_grad,
                                      const Refuse& refuse_values = {}) {
  const Tensor rows = made_contiguous(logits);
  std::tuple<Tensor, Tensor> result;
  dispatch_floating(rows.scalar_type(), operation, [&](auto tag) {
    using scalar_t = typename decltype(tag)::type;
    const std::vector<Outcome> outcomes = read_all(reader, layout.patients());
    const Tensor grad = empty_gradient<scalar_t>(rows, needs_grad);
    const RankedPatients<scalar_t, Settings> all(
        settings, layout, outcomes, data<const scalar_t>(rows),
        needs_grad ? data<saved_grad_t<scalar_t>>(grad) : nullptr, rows.numel());
    const Tensor nll = nll_of_groups<scalar_t>(settings, rows, all);
    if (!all.possible()) refuse_patients(reader, refuse_values);
    result = {nll, grad};
  });
  return result;
}

}  // namespace ehrseq::survival
