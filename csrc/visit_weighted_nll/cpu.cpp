// The survival losses with a weight for each visit on the CPU, of padded hazards and of packed
// ones: loss and gradient in one call. The loops over rows are in row_kernels.h.

#include <cstdint>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "common/dtypes.h"
#include "common/operators.h"
#include "common/survival/groups.h"
#include "common/survival/layouts.h"
#include "common/survival/outcomes.h"
#include "common/survival/rank_layout.h"
#include "common/survival/visit_weights.h"
#include "common/tensors.h"
#include "survival_nll/improbable.h"
#include "visit_weighted_nll/arguments.h"
#include "visit_weighted_nll/rows.h"

namespace ehrseq::survival {
namespace {

constexpr const char* kName = kVisitWeightedNll;

struct Inputs {
  const Tensor& hazards;
  const Tensor& weights;
  const LossSettings& settings;
  const OutcomeReader& outcomes;
  bool needs_grad;
};

// `row_of(patient, visit)` is the number of that visit's row, `patients(settings, ...)` makes the
// layout of groups.h.
template <typename RowOf, typename MakePatients>
std::tuple<Tensor, Tensor> nll_of(const Inputs& inputs, const int64_t* row_starts,
                                  const RowOf& row_of, const MakePatients& make_patients) {
  const Tensor rows = made_contiguous(inputs.hazards);
  const Tensor of_visits = made_contiguous(inputs.weights);
  std::tuple<Tensor, Tensor> result;
  dispatch_floating(rows.scalar_type(), kName, [&](auto tag) {
    using scalar_t = typename decltype(tag)::type;
    const auto* weights = data<const accumulator_t<scalar_t>>(of_visits);
    const WeightedSettings<scalar_t> settings{inputs.settings, weights, inputs.settings.slots,
                                              row_starts};
    const Tensor grad = empty_gradient<scalar_t>(rows, inputs.needs_grad);
    const auto* values = data<const scalar_t>(rows);
    auto* grads = inputs.needs_grad ? data<saved_grad_t<scalar_t>>(grad) : nullptr;
    const auto all = make_patients(settings, values, grads, rows.numel());
    const Tensor nll = nll_of_groups<scalar_t>(settings, rows, all);
    if (!all.possible()) {
      inputs.outcomes.refuse_impossible();
      if (settings.link == Link::kProbabilities) {
        refuse_improbable(settings, inputs.outcomes, [&](int64_t patient, int64_t visit) {
          return values + row_of(patient, visit) * settings.classes;
        });
      }
      refuse_negative(
          settings.patients, inputs.outcomes,
          [&](int64_t patient, int64_t visit) { return weights[row_of(patient, visit)]; },
          [&](const Outcome& outcome) { return outcome.type > 0 || settings.censored_included; });
    }
    result = {nll, grad};
  });
  return result;
}

std::tuple<Tensor, Tensor> visit_weighted_nll(
    Tensor hazards, Tensor event_times, Tensor event_types, OptionalTensor sequence_mask,
    OptionalTensor row_starts, OptionalTensor unsorted_indices, OptionalTensor last_rows,
    OptionalTensor entry_times, OptionalTensor sample_weight, Tensor visit_weight, bool competing,
    int64_t link, bool censored_included, double eps, int64_t reduction, bool needs_grad) {
  expect_on_cpu(kName, hazards, event_times, event_types, sequence_mask, row_starts,
                unsorted_indices, last_rows, entry_times, sample_weight, visit_weight);
  const LogitsShape shape = expect_visit_weighted(
      competing, hazards, event_times, event_types, sequence_mask, row_starts, unsorted_indices,
      last_rows, entry_times, sample_weight, visit_weight, link, eps, reduction);
  const int64_t causes = causes_of(kName, shape.classes, link);
  const auto as_reduction = static_cast<Reduction>(reduction);
  const LossSettings settings{shape.patients,    shape.slots,
                              shape.classes,     static_cast<Link>(link),
                              censored_included, eps,
                              as_reduction,      share_of_a_patient(as_reduction, shape.patients)};
  const auto reader_of = [&](VisitMask mask) {
    return OutcomeReader(shape.patients, std::move(mask), causes, name_of_types(competing),
                         event_times, event_types, entry_times, sample_weight);
  };
  if (!shape.packed) {
    const OutcomeReader outcomes = reader_of(VisitMask(sequence_mask, shape.slots));
    return nll_of(
        {hazards, visit_weight, settings, outcomes, needs_grad}, nullptr,
        [&](int64_t patient, int64_t visit) { return patient * shape.slots + visit; },
        [&](const auto& with_weights, const auto* values, auto* grads, int64_t) {
          using scalar_t = std::remove_cv_t<std::remove_pointer_t<decltype(values)>>;
          return PaddedPatients<scalar_t, WeightedSettings<scalar_t>>(with_weights, outcomes,
                                                                      values, grads);
        });
  }
  const RankLayout layout(kName, hazards.size(0), *row_starts, *unsorted_indices, *last_rows);
  const OutcomeReader outcomes = reader_of(VisitMask(layout.lengths()));
  const std::vector<Outcome> all = read_all(outcomes, shape.patients);
  const Tensor rank_of = made_contiguous(*unsorted_indices);
  const auto* ranks = data<const int64_t>(rank_of);
  return nll_of(
      {hazards, visit_weight, settings, outcomes, needs_grad}, layout.row_starts(),
      [&](int64_t patient, int64_t visit) { return layout.row(ranks[patient], visit); },
      [&](const auto& with_weights, const auto* values, auto* grads, int64_t count) {
        using scalar_t = std::remove_cv_t<std::remove_pointer_t<decltype(values)>>;
        return RankedPatients<scalar_t, WeightedSettings<scalar_t>>(with_weights, layout, all,
                                                                    values, grads, count);
      });
}

}  // namespace
}  // namespace ehrseq::survival

STABLE_TORCH_LIBRARY_IMPL(ehrseq_fast, CPU, m) {
  m.impl("visit_weighted_nll", EHRSEQ_BOX(&ehrseq::survival::visit_weighted_nll));
}
