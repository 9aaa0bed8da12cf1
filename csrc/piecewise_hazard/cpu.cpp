// piecewise_hazard_nll on the CPU, of padded logits and of packed ones: loss and gradient in one
// call. The loops over a row are in row_kernels.h.

#include <cstdint>
#include <tuple>
#include <utility>
#include <vector>

#include "common/dtypes.h"
#include "common/operators.h"
#include "common/survival/arguments.h"
#include "common/survival/groups.h"
#include "common/survival/layouts.h"
#include "common/survival/outcomes.h"
#include "common/survival/rank_layout.h"
#include "common/tensors.h"
#include "piecewise_hazard/rows.h"

namespace ehrseq::survival::piecewise {
namespace {

constexpr const char* kName = "piecewise_hazard_nll";

std::tuple<Tensor, Tensor> padded_nll(const Tensor& logits, const Settings& settings,
                                      const OutcomeReader& outcomes, bool needs_grad) {
  const Tensor rows = torch::stable::contiguous(logits);
  std::tuple<Tensor, Tensor> result;
  dispatch_floating(rows.scalar_type(), kName, [&](auto tag) {
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

std::tuple<Tensor, Tensor> packed_nll(const Tensor& logits, const Settings& settings,
                                      const RankLayout& layout, const OutcomeReader& reader,
                                      bool needs_grad) {
  const Tensor rows = torch::stable::contiguous(logits);
  std::tuple<Tensor, Tensor> result;
  dispatch_floating(rows.scalar_type(), kName, [&](auto tag) {
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

std::tuple<Tensor, Tensor> piecewise_hazard_nll(
    Tensor logits, Tensor event_times, Tensor event_indicators, OptionalTensor sequence_mask,
    OptionalTensor row_starts, OptionalTensor unsorted_indices, OptionalTensor last_rows,
    OptionalTensor entry_times, OptionalTensor sample_weight, OptionalTensor fraction, int64_t link,
    int64_t reduction, bool needs_grad) {
  expect_on_cpu(kName, logits, event_times, event_indicators, sequence_mask, row_starts,
                unsorted_indices, last_rows, entry_times, sample_weight, fraction);
  const LogitsShape shape =
      expect_logits(kName, false, logits, event_times, event_indicators, sequence_mask, row_starts,
                    unsorted_indices, last_rows, entry_times, sample_weight);
  expect_option(link, kName, "link", 0, static_cast<int64_t>(RateLink::kExp));
  expect_option(reduction, kName, "reduction", 0, static_cast<int64_t>(Reduction::kSum));
  if (fraction.has_value()) {
    expect_shape(*fraction, kName, "fraction", {shape.patients}, "[B]");
    expect_floating(*fraction, kName, "fraction");
  }
  const auto as_reduction = static_cast<Reduction>(reduction);
  const Settings settings{shape.patients, shape.slots,
                          shape.classes,  static_cast<RateLink>(link),
                          as_reduction,   share_of_a_patient(as_reduction, shape.patients)};
  const auto reader_of = [&](VisitMask mask) {
    return OutcomeReader(shape.patients, std::move(mask), 1, name_of_types(false), event_times,
                         event_indicators, entry_times, sample_weight, fraction);
  };
  if (shape.packed) {
    const RankLayout layout(kName, logits.size(0), *row_starts, *unsorted_indices, *last_rows);
    return packed_nll(logits, settings, layout, reader_of(VisitMask(layout.lengths())), needs_grad);
  }
  return padded_nll(logits, settings, reader_of(VisitMask(sequence_mask, shape.slots)), needs_grad);
}

}  // namespace
}  // namespace ehrseq::survival::piecewise

STABLE_TORCH_LIBRARY_IMPL(ehrseq_fast, CPU, m) {
  m.impl("piecewise_hazard_nll", EHRSEQ_BOX(&ehrseq::survival::piecewise::piecewise_hazard_nll));
}
