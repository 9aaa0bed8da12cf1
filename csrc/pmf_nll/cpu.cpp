// pmf_nll on the CPU, of padded logits and of packed ones: loss and gradient in one call. The loops
// over a row are in row_kernels.h.

#include <cstdint>
#include <tuple>
#include <vector>

#include "common/dtypes.h"
#include "common/operators.h"
#include "common/survival/arguments.h"
#include "common/survival/groups.h"
#include "common/survival/layouts.h"
#include "common/survival/outcomes.h"
#include "common/survival/rank_layout.h"
#include "common/tensors.h"
#include "pmf_nll/rows.h"

namespace ehrseq::survival::pmf {
namespace {

std::tuple<Tensor, Tensor> padded_nll(const char* operation, const Tensor& logits,
                                      const Settings& settings, const OutcomeReader& outcomes,
                                      bool needs_grad) {
  const Tensor rows = torch::stable::contiguous(logits);
  std::tuple<Tensor, Tensor> result;
  dispatch_floating(rows.scalar_type(), operation, [&](auto tag) {
    using scalar_t = typename decltype(tag)::type;
    const Tensor grad = empty_gradient<scalar_t>(rows, needs_grad);
    const PaddedPatients<scalar_t, Settings> all(
        settings, outcomes, data<const scalar_t>(rows),
        needs_grad ? data<saved_grad_t<scalar_t>>(grad) : nullptr);
    const Tensor nll = nll_of_groups<scalar_t>(settings, rows, all);
    if (!all.possible()) outcomes.refuse();
    result = {nll, grad};
  });
  return result;
}

std::tuple<Tensor, Tensor> packed_nll(const char* operation, const Tensor& logits,
                                      const Settings& settings, const RankLayout& layout,
                                      const OutcomeReader& reader, bool needs_grad) {
  const Tensor rows = torch::stable::contiguous(logits);
  std::tuple<Tensor, Tensor> result;
  dispatch_floating(rows.scalar_type(), operation, [&](auto tag) {
    using scalar_t = typename decltype(tag)::type;
    const std::vector<Outcome> outcomes = read_all(reader, layout.patients());
    const Tensor grad = empty_gradient<scalar_t>(rows, needs_grad);
    const RankedPatients<scalar_t, Settings> all(
        settings, layout, outcomes, data<const scalar_t>(rows),
        needs_grad ? data<saved_grad_t<scalar_t>>(grad) : nullptr, rows.numel());
    result = {nll_of_groups<scalar_t>(settings, rows, all), grad};
  });
  return result;
}

std::tuple<Tensor, Tensor> pmf_nll(Tensor logits, Tensor event_times, Tensor event_types,
                                   OptionalTensor sequence_mask, OptionalTensor row_starts,
                                   OptionalTensor unsorted_indices, OptionalTensor last_rows,
                                   OptionalTensor entry_times, OptionalTensor sample_weight,
                                   bool competing, bool censored_included, int64_t reduction,
                                   bool needs_grad) {
  constexpr const char* kName = "pmf_nll";
  expect_on_cpu(kName, logits, event_times, event_types, sequence_mask, row_starts,
                unsorted_indices, last_rows, entry_times, sample_weight);
  const bool packed = row_starts.has_value();
  if (packed != unsorted_indices.has_value() || packed != last_rows.has_value()) {
    refuse(kName, "row_starts, unsorted_indices, last_rows", "all or none of them", "some");
  }
  const int64_t dims = (packed ? 1 : 2) + (competing ? 1 : 0);
  expect_dim(
      logits, kName, "logits", dims,
      packed ? (competing ? "[n_visits, K]" : "[n_visits]") : (competing ? "[B, V, K]" : "[B, V]"));
  expect_floating(logits, kName, "logits");
  expect_option(reduction, kName, "reduction", 0, static_cast<int64_t>(Reduction::kSum));
  const int64_t classes = competing ? logits.size(dims - 1) : 1;
  if (classes < 1) refuse(kName, "logits", "at least one cause", "0 values per visit");
  if (packed) expect_row_numbers(kName, *row_starts, *unsorted_indices, *last_rows);
  const auto as_reduction = static_cast<Reduction>(reduction);
  const auto settings_of = [&](int64_t patients, int64_t slots) {
    expect_row_length(kName, slots, classes);
    expect_outcomes(kName, patients, competing, event_times, event_types, entry_times,
                    sample_weight);
    return Settings{patients,          slots,        classes,
                    censored_included, as_reduction, share_of_a_patient(as_reduction, patients)};
  };
  const auto reader_of = [&](int64_t patients, VisitMask mask) {
    return OutcomeReader(patients, std::move(mask), classes, name_of_types(competing), event_times,
                         event_types, entry_times, sample_weight);
  };
  if (packed) {
    if (sequence_mask.has_value()) {
      refuse(kName, "sequence_mask", "none with a packed batch", "one");
    }
    const RankLayout layout(kName, logits.size(0), *row_starts, *unsorted_indices, *last_rows);
    return packed_nll(kName, logits, settings_of(layout.patients(), layout.most_visits()), layout,
                      reader_of(layout.patients(), VisitMask(layout.lengths())), needs_grad);
  }
  const int64_t patients = logits.size(0);
  const int64_t slots = logits.size(1);
  const Settings settings = settings_of(patients, slots);
  expect_sequence_mask(kName, sequence_mask, patients, slots);
  return padded_nll(kName, logits, settings, reader_of(patients, VisitMask(sequence_mask, slots)),
                    needs_grad);
}

}  // namespace
}  // namespace ehrseq::survival::pmf

STABLE_TORCH_LIBRARY_IMPL(ehrseq_fast, CPU, m) {
  m.impl("pmf_nll", EHRSEQ_BOX(&ehrseq::survival::pmf::pmf_nll));
}
