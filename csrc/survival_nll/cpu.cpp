// survival_nll and competing_risks_nll on the CPU: loss and gradient in one pass over the visits at
// risk. The loops over rows are in row_kernels.h, the formula in likelihood.h.

#include <cstdint>
#include <tuple>

#include "common/dtypes.h"
#include "common/operators.h"
#include "common/survival/groups.h"
#include "common/survival/layouts.h"
#include "common/survival/outcomes.h"
#include "common/tensors.h"
#include "survival_nll/arguments.h"
#include "survival_nll/improbable.h"
#include "survival_nll/rows.h"

namespace ehrseq::survival {
namespace {

std::tuple<Tensor, Tensor> padded_nll(const char* operation, bool competing, const Tensor& hazards,
                                      const Tensor& event_times, const Tensor& event_types,
                                      const OptionalTensor& sequence_mask,
                                      const OptionalTensor& entry_times,
                                      const OptionalTensor& sample_weight, int64_t link,
                                      bool censored_included, double eps, int64_t reduction,
                                      bool needs_grad) {
  expect_on_cpu(operation, hazards, event_times, event_types, sequence_mask, entry_times,
                sample_weight);
  expect_hazards(operation, hazards, competing);
  expect_options(operation, competing, link, eps, reduction);
  const int64_t patients = hazards.size(0);
  const int64_t slots = hazards.size(1);
  const int64_t classes = competing ? hazards.size(2) : 1;
  const int64_t causes = causes_of(operation, classes, link);
  expect_row_length(operation, slots, classes);
  expect_outcomes(operation, patients, competing, event_times, event_types, entry_times,
                  sample_weight);
  expect_sequence_mask(operation, sequence_mask, patients, slots);
  const auto as_reduction = static_cast<Reduction>(reduction);
  const LossSettings settings{
      patients,          slots, classes,      static_cast<Link>(link),
      censored_included, eps,   as_reduction, share_of_a_patient(as_reduction, patients)};
  const OutcomeReader outcomes(patients, VisitMask(sequence_mask, slots), causes,
                               name_of_types(competing), event_times, event_types, entry_times,
                               sample_weight);
  const Tensor rows = made_contiguous(hazards);
  std::tuple<Tensor, Tensor> result;
  dispatch_floating(hazards.scalar_type(), operation, [&](auto tag) {
    using scalar_t = typename decltype(tag)::type;
    const Tensor grad = empty_gradient<scalar_t>(rows, needs_grad);
    const auto* values = data<const scalar_t>(rows);
    const PaddedPatients<scalar_t, LossSettings> all(
        settings, outcomes, values, needs_grad ? data<saved_grad_t<scalar_t>>(grad) : nullptr);
    const Tensor nll = nll_of_groups<scalar_t>(settings, rows, all);
    if (!all.possible()) {
      outcomes.refuse_impossible();
      refuse_improbable(settings, outcomes, [&](int64_t patient, int64_t visit) {
        return values + (patient * slots + visit) * classes;
      });
    }
    result = {nll, grad};
  });
  return result;
}

std::tuple<Tensor, Tensor> survival_nll(const Tensor& hazards, const Tensor& event_times,
                                        const Tensor& event_indicators,
                                        const OptionalTensor& sequence_mask,
                                        const OptionalTensor& entry_times,
                                        const OptionalTensor& sample_weight, int64_t link,
                                        bool censored_included, double eps, int64_t reduction,
                                        bool needs_grad) {
  return padded_nll("survival_nll", false, hazards, event_times, event_indicators, sequence_mask,
                    entry_times, sample_weight, link, censored_included, eps, reduction,
                    needs_grad);
}

std::tuple<Tensor, Tensor> competing_risks_nll(const Tensor& hazards, const Tensor& event_times,
                                               const Tensor& event_types,
                                               const OptionalTensor& sequence_mask,
                                               const OptionalTensor& entry_times,
                                               const OptionalTensor& sample_weight, int64_t link,
                                               bool censored_included, double eps,
                                               int64_t reduction, bool needs_grad) {
  return padded_nll("competing_risks_nll", true, hazards, event_times, event_types, sequence_mask,
                    entry_times, sample_weight, link, censored_included, eps, reduction,
                    needs_grad);
}

}  // namespace
}  // namespace ehrseq::survival

STABLE_TORCH_LIBRARY_IMPL(ehrseq_fast, CPU, m) {
  m.impl("survival_nll", EHRSEQ_BOX(&ehrseq::survival::survival_nll));
  m.impl("competing_risks_nll", EHRSEQ_BOX(&ehrseq::survival::competing_risks_nll));
}
