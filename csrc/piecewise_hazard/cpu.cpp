// piecewise_hazard_nll on the CPU, of padded logits and of packed ones: loss and gradient in one
// call. The loops over a row are in row_kernels.h.

#include <cstdint>
#include <tuple>
#include <utility>

#include "common/dtypes.h"
#include "common/operators.h"
#include "common/survival/columns.h"
#include "common/survival/faults.h"
#include "common/survival/logits_nll.h"
#include "common/survival/outcomes.h"
#include "common/survival/rank_layout.h"
#include "common/tensors.h"
#include "piecewise_hazard/arguments.h"
#include "piecewise_hazard/rows.h"

namespace ehrseq::survival::piecewise {
namespace {

// Throws std::invalid_argument, unless no visit that the loss reads has a negative weight.
// `row_of(patient, visit)` is the number of that visit's row. The outcomes have been checked.
template <typename RowOf>
void refuse_negative(int64_t patients, const OutcomeReader& outcomes, const Tensor& visit_weight,
                     const RowOf& row_of) {
  const Column weights = Column::of_visits(visit_weight);
  Faults negative;
  double first = 0;
  for (int64_t patient = 0; patient < patients; ++patient) {
    Outcome outcome;
    outcomes.read(patient, patient + 1, &outcome);
    const int64_t end = outcome.time + (reads_last(outcome) ? 1 : 0);
    for (int64_t visit = outcome.entry; visit < end; ++visit) {
      const auto weight = weights.at<double>(row_of(patient, visit));
      if (!(weight < 0)) continue;
      if (negative.count() == 0) first = weight;
      negative.add(patient, visit);
    }
  }
  if (negative.count() > 0) negative.refuse("visit_weight must not be negative", short_text(first));
}

std::tuple<Tensor, Tensor> piecewise_hazard_nll(
    Tensor logits, Tensor event_times, Tensor event_indicators, OptionalTensor sequence_mask,
    OptionalTensor row_starts, OptionalTensor unsorted_indices, OptionalTensor last_rows,
    OptionalTensor entry_times, OptionalTensor sample_weight, OptionalTensor fraction,
    OptionalTensor visit_weight, int64_t link, int64_t reduction, bool needs_grad) {
  expect_on_cpu(kName, logits, event_times, event_indicators, sequence_mask, row_starts,
                unsorted_indices, last_rows, entry_times, sample_weight, fraction, visit_weight);
  const LogitsShape shape = expect_rates(logits, event_times, event_indicators, sequence_mask,
                                         row_starts, unsorted_indices, last_rows, entry_times,
                                         sample_weight, fraction, visit_weight, link, reduction);
  const auto as_reduction = static_cast<Reduction>(reduction);
  Settings settings{shape.patients, shape.slots,
                    shape.classes,  static_cast<RateLink>(link),
                    as_reduction,   share_of_a_patient(as_reduction, shape.patients)};
  OptionalTensor weights;
  if (visit_weight.has_value()) {
    weights = made_contiguous(*visit_weight);
    settings.weights = weights->const_data_ptr();
  }
  const auto reader_of = [&](VisitMask mask) {
    return OutcomeReader(shape.patients, std::move(mask), 1, name_of_types(false), event_times,
                         event_indicators, entry_times, sample_weight, fraction);
  };
  if (shape.packed) {
    const RankLayout layout(kName, logits.size(0), *row_starts, *unsorted_indices, *last_rows);
    const OutcomeReader outcomes = reader_of(VisitMask(layout.lengths()));
    settings.row_starts = layout.row_starts();
    return packed_nll(kName, logits, settings, layout, outcomes, needs_grad, [&] {
      const Column ranks(*unsorted_indices);
      refuse_negative(shape.patients, outcomes, *weights, [&](int64_t patient, int64_t visit) {
        return layout.row(ranks.at<int64_t>(patient), visit);
      });
    });
  }
  const OutcomeReader outcomes = reader_of(VisitMask(sequence_mask, shape.slots));
  return padded_nll(kName, logits, settings, outcomes, needs_grad, [&] {
    refuse_negative(shape.patients, outcomes, *weights,
                    [&](int64_t patient, int64_t visit) { return patient * shape.slots + visit; });
  });
}

}  // namespace
}  // namespace ehrseq::survival::piecewise

STABLE_TORCH_LIBRARY_IMPL(ehrseq_fast, CPU, m) {
  m.impl("piecewise_hazard_nll", EHRSEQ_BOX(&ehrseq::survival::piecewise::piecewise_hazard_nll));
}
