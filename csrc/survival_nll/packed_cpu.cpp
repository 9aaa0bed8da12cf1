// The survival losses of packed batches on the CPU. The visits of a patient are far apart in
// time-major rows, but those of patients of neighbouring ranks are side by side at every time. So
// patients are taken in the order of their ranks, some at a time. With softmax their visits are
// transposed into rows of the padded layout, given to its kernel, and their gradients transposed
// back.

#include <atomic>
#include <cstdint>
#include <tuple>
#include <vector>

#include "common/dtypes.h"
#include "common/operators.h"
#include "common/survival/groups.h"
#include "common/survival/layouts.h"
#include "common/survival/outcomes.h"
#include "common/survival/rank_layout.h"
#include "common/survival/transposed_visits.h"
#include "common/tensors.h"
#include "survival_nll/arguments.h"
#include "survival_nll/improbable.h"
#include "survival_nll/rows.h"

namespace ehrseq::survival {
namespace {

// Patients of neighbouring ranks, read where they are.
template <typename scalar_t>
class NeighbouringRanks : public RankedPatients<scalar_t, LossSettings> {
 public:
  using RankedPatients<scalar_t, LossSettings>::RankedPatients;

  struct Worker {
    const NeighbouringRanks& all;

    bool nll(int64_t first, int64_t count, Outcome* outcomes, double* patient_nll) {
      all.copy_outcomes(first, count, outcomes);
      bool possible = true;
      const RankRows<scalar_t> rows{all.values_,
                                    all.grad_,
                                    all.count_,
                                    all.layout_.row_starts(),
                                    all.layout_.most_visits(),
                                    first,
                                    outcomes,
                                    count,
                                    &possible};
      ranks_nll(all.settings_, rows, patient_nll);
      if (!possible) all.possible_.store(false, std::memory_order_relaxed);
      return possible;
    }
  };

  Worker worker() const { return {*this}; }
};

std::tuple<Tensor, Tensor> packed_survival_nll(
    const Tensor& hazards, const Tensor& row_starts, const Tensor& unsorted_indices,
    const Tensor& last_rows, const Tensor& event_times, const Tensor& event_types,
    const OptionalTensor& entry_times, const OptionalTensor& sample_weight, int64_t link,
    bool censored_included, double eps, int64_t reduction, bool needs_grad) {
  constexpr auto kName = "packed_survival_nll";
  expect_on_cpu(kName, hazards, row_starts, unsorted_indices, last_rows, event_times, event_types,
                entry_times, sample_weight);
  expect_packed_hazards(kName, hazards);
  const bool competing = hazards.dim() == 2;
  expect_options(kName, competing, link, eps, reduction);
  const int64_t classes = competing ? hazards.size(1) : 1;
  const int64_t causes = causes_of(kName, classes, link);
  expect_row_numbers(kName, row_starts, unsorted_indices, last_rows);
  const RankLayout layout(kName, hazards.size(0), row_starts, unsorted_indices, last_rows);
  expect_row_length(kName, layout.most_visits(), classes);
  expect_outcomes(kName, layout.patients(), competing, event_times, event_types, entry_times,
                  sample_weight);
  const auto as_reduction = static_cast<Reduction>(reduction);
  const LossSettings settings{
      layout.patients(), 0,   classes,      static_cast<Link>(link),
      censored_included, eps, as_reduction, share_of_a_patient(as_reduction, layout.patients())};
  const OutcomeReader reader(layout.patients(), VisitMask(layout.lengths()), causes,
                             name_of_types(competing), event_times, event_types, entry_times,
                             sample_weight);
  const Tensor rows = made_contiguous(hazards);
  std::tuple<Tensor, Tensor> result;
  dispatch_floating(rows.scalar_type(), kName, [&](auto tag) {
    using scalar_t = typename decltype(tag)::type;
    const std::vector<Outcome> outcomes = read_all(reader, layout.patients());
    const Tensor grad = empty_gradient<scalar_t>(rows, needs_grad);
    const auto* values = data<const scalar_t>(rows);
    auto* grads = needs_grad ? data<saved_grad_t<scalar_t>>(grad) : nullptr;
    if (settings.link == Link::kSoftmax) {
      const RankedPatients<scalar_t, LossSettings> all(settings, layout, outcomes, values, grads,
                                                       rows.numel());
      result = {nll_of_groups<scalar_t>(settings, rows, all), grad};
      return;
    }
    const NeighbouringRanks<scalar_t> all(settings, layout, outcomes, values, grads, rows.numel());
    result = {nll_of_groups<scalar_t>(settings, rows, all), grad};
    if (all.possible()) return;
    std::vector<int64_t> ranks(layout.patients());
    for (int64_t rank = 0; rank < layout.patients(); ++rank)
      ranks[layout.patient_of_rank(rank)] = rank;
    refuse_improbable(settings, reader, [&](int64_t patient, int64_t visit) {
      return values + layout.row(ranks[patient], visit) * classes;
    });
  });
  return result;
}

}  // namespace
}  // namespace ehrseq::survival

STABLE_TORCH_LIBRARY_IMPL(ehrseq_fast, CPU, m) {
  m.impl("packed_survival_nll", EHRSEQ_BOX(&ehrseq::survival::packed_survival_nll));
}
