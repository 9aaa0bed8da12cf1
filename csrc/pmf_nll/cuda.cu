// pmf_nll on a GPU, of padded logits and of packed ones: one launch for loss and gradient.

#include <algorithm>
#include <cstdint>
#include <tuple>

#include "common/cuda/launch.h"
#include "common/operators.h"
#include "common/options.h"
#include "common/survival/arguments.h"
#include "common/survival/layouts_cuda.h"
#include "common/survival/outcomes_cuda.h"
#include "common/survival/sums_cuda.h"
#include "pmf_nll/kernels.cuh"

namespace ehrseq::survival::pmf::cuda {
namespace {

constexpr const char* kName = "pmf_nll";

template <typename Layout>
std::tuple<Tensor, Tensor> nll_and_gradient(const Settings& settings, const Layout& layout,
                                            const OutcomeColumns& outcomes, const Tensor& logits,
                                            bool needs_grad) {
  std::tuple<Tensor, Tensor> both;
  dispatch_floating(logits.scalar_type(), kName, [&](auto tag) {
    using scalar_t = typename decltype(tag)::type;
    using grad_t = saved_grad_t<scalar_t>;
    const OnDeviceOf device(kName, logits);
    const LossTensors<accumulator_t<scalar_t>, grad_t> tensors(
        device, logits, settings.patients, settings.lanes, settings.reduces, needs_grad);
    const Logits<scalar_t, grad_t> values{
        data_of<scalar_t>(logits), needs_grad ? mutable_data_of<grad_t>(tensors.grad) : nullptr};
    launch(pmf_nll_and_grad<Layout, scalar_t, grad_t>, dim3(tensors.blocks()), dim3(kThreads), 0,
           device.stream(), settings, layout, outcomes, values, tensors.result());
    both = {tensors.nll, tensors.grad};
  });
  return both;
}

std::tuple<Tensor, Tensor> pmf_nll(Tensor logits, Tensor event_times, Tensor event_types,
                                   OptionalTensor sequence_mask, OptionalTensor row_starts,
                                   OptionalTensor unsorted_indices, OptionalTensor last_rows,
                                   OptionalTensor entry_times, OptionalTensor sample_weight,
                                   bool competing, bool censored_included, int64_t reduction,
                                   bool needs_grad) {
  expect_with(kName, logits, event_times, event_types, sequence_mask, row_starts, unsorted_indices,
              last_rows, entry_times, sample_weight);
  // Values of last_rows are not read: the sizes of row_starts tell where a patient ends.
  const LogitsShape shape =
      expect_logits(kName, competing, logits, event_times, event_types, sequence_mask, row_starts,
                    unsorted_indices, last_rows, entry_times, sample_weight);
  expect_option(reduction, kName, "reduction", 0, static_cast<int64_t>(Reduction::kSum));
  Settings settings{};
  settings.patients = shape.patients;
  settings.slots = static_cast<unsigned>(shape.slots);
  settings.classes = static_cast<unsigned>(shape.classes);
  settings.censored_included = censored_included;
  settings.reduces = static_cast<Reduction>(reduction) != Reduction::kNone;
  const bool is_mean = static_cast<Reduction>(reduction) == Reduction::kMean;
  settings.share = is_mean ? 1.0 / static_cast<double>(shape.patients) : 1.0;
  // By the mean length: the longest patient says little about the others.
  settings.lanes = lanes_for(logits.numel() / std::max<int64_t>(1, shape.patients));
  const OutcomeColumns outcomes =
      outcomes_of(competing, event_times, event_types, entry_times, sample_weight);
  const Tensor rows = made_contiguous(logits);
  if (!shape.packed) {
    return nll_and_gradient(settings, padded_layout(sequence_mask), outcomes, rows, needs_grad);
  }
  const RowTensors numbers(*row_starts, *unsorted_indices);
  return nll_and_gradient(settings, numbers.layout(logits.size(0)), outcomes, rows, needs_grad);
}

}  // namespace
}  // namespace ehrseq::survival::pmf::cuda

EHRSEQ_CUDA_LIBRARY(m) { m.impl("pmf_nll", EHRSEQ_BOX(&ehrseq::survival::pmf::cuda::pmf_nll)); }
