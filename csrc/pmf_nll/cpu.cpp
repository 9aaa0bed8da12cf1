// pmf_nll on the CPU, of padded logits and of packed ones: loss and gradient in one call. The loops
// over a row are in row_kernels.h.

#include <cstdint>
#include <tuple>
#include <utility>

#include "common/dtypes.h"
#include "common/operators.h"
#include "common/survival/arguments.h"
#include "common/survival/logits_nll.h"
#include "common/survival/outcomes.h"
#include "common/survival/rank_layout.h"
#include "common/tensors.h"
#include "pmf_nll/rows.h"

namespace ehrseq::survival::pmf {
namespace {

std::tuple<Tensor, Tensor> pmf_nll(Tensor logits, Tensor event_times, Tensor event_types,
                                   OptionalTensor sequence_mask, OptionalTensor row_starts,
                                   OptionalTensor unsorted_indices, OptionalTensor last_rows,
                                   OptionalTensor entry_times, OptionalTensor sample_weight,
                                   bool competing, bool censored_included, int64_t reduction,
                                   bool needs_grad) {
  constexpr const char* kName = "pmf_nll";
  expect_on_cpu(kName, logits, event_times, event_types, sequence_mask, row_starts,
                unsorted_indices, last_rows, entry_times, sample_weight);
  const LogitsShape shape =
      expect_logits(kName, competing, logits, event_times, event_types, sequence_mask, row_starts,
                    unsorted_indices, last_rows, entry_times, sample_weight);
  expect_option(reduction, kName, "reduction", 0, static_cast<int64_t>(Reduction::kSum));
  const auto as_reduction = static_cast<Reduction>(reduction);
  const Settings settings{shape.patients, shape.slots,
                          shape.classes,  censored_included,
                          as_reduction,   share_of_a_patient(as_reduction, shape.patients)};
  const auto reader_of = [&](VisitMask mask) {
    return OutcomeReader(shape.patients, std::move(mask), shape.classes, name_of_types(competing),
                         event_times, event_types, entry_times, sample_weight);
  };
  if (shape.packed) {
    const RankLayout layout(kName, logits.size(0), *row_starts, *unsorted_indices, *last_rows);
    return packed_nll(kName, logits, settings, layout, reader_of(VisitMask(layout.lengths())),
                      needs_grad);
  }
  return padded_nll(kName, logits, settings, reader_of(VisitMask(sequence_mask, shape.slots)),
                    needs_grad);
}

}  // namespace
}  // namespace ehrseq::survival::pmf

STABLE_TORCH_LIBRARY_IMPL(ehrseq_fast, CPU, m) {
  m.impl("pmf_nll", EHRSEQ_BOX(&ehrseq::survival::pmf::pmf_nll));
}
