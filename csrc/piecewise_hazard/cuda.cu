// piecewise_hazard_nll on a GPU, of padded logits and of packed ones: one launch for loss and
// gradient.

#include <algorithm>
#include <cstdint>
#include <tuple>
#include <type_traits>

#include "common/cuda/launch.h"
#include "common/operators.h"
#include "common/options.h"
#include "common/survival/layouts_cuda.h"
#include "common/survival/outcomes_cuda.h"
#include "common/survival/sums_cuda.h"
#include "piecewise_hazard/arguments.h"
#include "piecewise_hazard/kernels.cuh"
#include "survival_nll/launch_nll.h"

namespace ehrseq::survival::piecewise::cuda {
namespace {

template <typename Layout>
std::tuple<Tensor, Tensor> nll_and_gradient(const KernelSettings& settings, const Layout& layout,
                                            const OutcomeColumns& outcomes, const Tensor& logits,
                                            const OptionalTensor& weights, RateLink link,
                                            bool needs_grad) {
  std::tuple<Tensor, Tensor> both;
  dispatch_floating(logits.scalar_type(), kName, [&](auto tag) {
    using scalar_t = typename decltype(tag)::type;
    const auto launched = [&](auto model, const auto& with_weights) {
      return launch_nll<decltype(model), std::decay_t<decltype(with_weights)>, scalar_t>(
          kName, settings, with_weights, outcomes, logits, needs_grad);
    };
    const auto of_link = [&](const auto& with_weights) {
      return link == RateLink::kExp ? launched(RateModel<Exp>{}, with_weights)
                                    : launched(RateModel<Softplus>{}, with_weights);
    };
    both = weights.has_value() ? of_link(weighted(layout, *weights)) : of_link(layout);
  });
  return both;
}

std::tuple<Tensor, Tensor> piecewise_hazard_nll(
    Tensor logits, Tensor event_times, Tensor event_indicators, OptionalTensor sequence_mask,
    OptionalTensor row_starts, OptionalTensor unsorted_indices, OptionalTensor last_rows,
    OptionalTensor entry_times, OptionalTensor sample_weight, OptionalTensor fraction,
    OptionalTensor visit_weight, int64_t link, int64_t reduction, bool needs_grad) {
  expect_with(kName, logits, event_times, event_indicators, sequence_mask, row_starts,
              unsorted_indices, last_rows, entry_times, sample_weight, fraction, visit_weight);
  // Values of last_rows are not read: the sizes of row_starts tell where a patient ends.
  const LogitsShape shape = expect_rates(logits, event_times, event_indicators, sequence_mask,
                                         row_starts, unsorted_indices, last_rows, entry_times,
                                         sample_weight, fraction, visit_weight, link, reduction);
  KernelSettings settings{};
  settings.patients = shape.patients;
  settings.slots = static_cast<unsigned>(shape.slots);
  settings.classes = 1;
  settings.reduces = static_cast<Reduction>(reduction) != Reduction::kNone;
  const bool is_mean = static_cast<Reduction>(reduction) == Reduction::kMean;
  settings.share = is_mean ? 1.0 / static_cast<double>(shape.patients) : 1.0;
  // By the mean length: the longest patient says little about the others.
  settings.lanes = lanes_for(logits.numel() / std::max<int64_t>(1, shape.patients));
  const OutcomeColumns outcomes =
      outcomes_of(false, event_times, event_indicators, entry_times, sample_weight, fraction);
  const Tensor rows = made_contiguous(logits);
  OptionalTensor weights;
  if (visit_weight.has_value()) weights = made_contiguous(*visit_weight);
  const auto as_link = static_cast<RateLink>(link);
  if (!shape.packed) {
    const PaddedLayout layout = padded_layout(sequence_mask);
    return nll_and_gradient(settings, layout, outcomes, rows, weights, as_link, needs_grad);
  }
  const RowTensors numbers(*row_starts, *unsorted_indices);
  return nll_and_gradient(settings, numbers.layout(logits.size(0)), outcomes, rows, weights,
                          as_link, needs_grad);
}

}  // namespace
}  // namespace ehrseq::survival::piecewise::cuda

EHRSEQ_CUDA_LIBRARY(m) {
  m.impl("piecewise_hazard_nll",
         EHRSEQ_BOX(&ehrseq::survival::piecewise::cuda::piecewise_hazard_nll));
}
