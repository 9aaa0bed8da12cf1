// The survival losses with a weight for each visit on a GPU: the launch of those without
// (survival_nll/launch_nll.h), in a layout that has weights.

#include <cstdint>
#include <tuple>

#include "common/cuda/launch.h"
#include "common/operators.h"
#include "common/survival/layouts_cuda.h"
#include "common/survival/outcomes_cuda.h"
#include "survival_nll/launch_nll.h"
#include "visit_weighted_nll/arguments.h"

namespace ehrseq::survival::cuda {
namespace {

std::tuple<Tensor, Tensor> visit_weighted_nll(
    Tensor hazards, Tensor event_times, Tensor event_types, OptionalTensor sequence_mask,
    OptionalTensor row_starts, OptionalTensor unsorted_indices, OptionalTensor last_rows,
    OptionalTensor entry_times, OptionalTensor sample_weight, Tensor visit_weight, bool competing,
    int64_t link, bool censored_included, double eps, int64_t reduction, bool needs_grad) {
  expect_with(kVisitWeightedNll, hazards, event_times, event_types, sequence_mask, row_starts,
              unsorted_indices, last_rows, entry_times, sample_weight, visit_weight);
  // Values of last_rows are not read: the sizes of row_starts tell where a patient ends.
  const LogitsShape shape = expect_visit_weighted(
      competing, hazards, event_times, event_types, sequence_mask, row_starts, unsorted_indices,
      last_rows, entry_times, sample_weight, visit_weight, link, eps, reduction);
  const OutcomeColumns outcomes =
      outcomes_of(competing, event_times, event_types, entry_times, sample_weight);
  const Tensor rows = made_contiguous(hazards);
  const Tensor weights = made_contiguous(visit_weight);
  const auto run = [&](const auto& layout, int64_t visits) {
    return nll_and_gradient(kVisitWeightedNll,
                            settings_for(shape, visits, link, censored_included, eps, reduction),
                            weighted(layout, weights), outcomes, rows, link, needs_grad);
  };
  if (!shape.packed) return run(padded_layout(sequence_mask), shape.slots);
  const RowTensors numbers(*row_starts, *unsorted_indices);
  return run(numbers.layout(hazards.size(0)), visits_of_one(hazards.size(0), shape.patients));
}

}  // namespace
}  // namespace ehrseq::survival::cuda

EHRSEQ_CUDA_LIBRARY(m) {
  m.impl("visit_weighted_nll", EHRSEQ_BOX(&ehrseq::survival::cuda::visit_weighted_nll));
}
