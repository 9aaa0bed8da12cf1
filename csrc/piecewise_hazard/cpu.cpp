// piecewise_hazard_nll on the CPU, of padded logits and of packed ones: loss and gradient in one
// call. The loops over a row are in row_kernels.h.

#include <cstdint>
#include <tuple>
#include <utility>

#include "common/dtypes.h"
#include "common/operators.h"
#include "common/survival/columns.h"
#include "common/survival/logits_nll.h"
#include "common/survival/outcomes.h"
#include "common/survival/rank_layout.h"
#include "common/survival/visit_weights.h"
#include "common/tensors.h"
#include "piecewise_hazard/arguments.h"
#include "piecewise_hazard/rows.h"

namespace ehrseq::survival::piecewise {
namespace {

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
  // `row_of(patient, visit)` is the number of that visit's row
  const auto refuse_weights = [&](const OutcomeReader& outcomes, const auto& row_of) {
    const Column column = Column::of_visits(*weights);
    refuse_negative(
        shape.patients, outcomes,
        [&](int64_t patient, int64_t visit) { return column.at<double>(row_of(patient, visit)); },
        reads_last);
  };
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
      refuse_weights(outcomes, [&](int64_t patient, int64_t visit) {
        return layout.row(ranks.at<int64_t>(patient), visit);
      });
    });
  }
  const OutcomeReader outcomes = reader_of(VisitMask(sequence_mask, shape.slots));
  return padded_nll(kName, logits, settings, outcomes, needs_grad, [&] {
    refuse_weights(outcomes,
                   [&](int64_t patient, int64_t visit) { return patient * shape.slots + visit; });
  });
}

}  // namespace
}  // namespace ehrseq::survival::piecewise

STABLE_TORCH_LIBRARY_IMPL(ehrseq_fast, CPU, m) {
  m.impl("piecewise_hazard_nll", EHRSEQ_BOX(&ehrseq::survival::piecewise::piecewise_hazard_nll));
}
