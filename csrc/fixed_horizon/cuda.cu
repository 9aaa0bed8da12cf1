// fixed_horizon_bce and masked_bce on a GPU: one launch for loss and gradient, after one for the
// sum of the weights where the mean is asked for.

#include <cstdint>
#include <optional>
#include <tuple>

#include "common/cuda/launch.h"
#include "common/operators.h"
#include "common/options.h"
#include "common/survival/visit_loss_cuda.h"
#include "fixed_horizon/arguments.h"
#include "fixed_horizon/kernels.cuh"

namespace ehrseq::fixed_horizon::cuda {
namespace {

template <typename Targets, typename Layout>
std::tuple<Tensor, Tensor> loss_of(const char* operation, const Shape& shape, const Layout& layout,
                                   const Targets& targets, double pos_weight, const Tensor& logits,
                                   Reduction reduction, bool needs_grad) {
  std::tuple<Tensor, Tensor> both;
  dispatch_floating(logits.scalar_type(), operation, [&](auto tag) {
    using scalar_t = typename decltype(tag)::type;
    using grad_t = saved_grad_t<scalar_t>;
    const OnDeviceOf device(operation, logits);
    const bool reduces = reduction != Reduction::kNone;
    const LossTensors<accumulator_t<scalar_t>, grad_t> tensors(
        device, logits, shape.patients, shape.lanes, reduces, needs_grad, shape_of(logits));
    const OptionalTensor total = total_weight(device, shape, layout, targets, logits, reduction);
    const Logits<scalar_t, grad_t> values{
        data_of<scalar_t>(logits), needs_grad ? mutable_data_of<grad_t>(tensors.grad) : nullptr};
    if (tensors.blocks() > 0) {
      launch(bce_and_grad<Targets, Layout, scalar_t, grad_t>, dim3(tensors.blocks()),
             dim3(kThreads), 0, device.stream(), shape, layout, targets, pos_weight,
             total.has_value() ? data_of<double>(*total) : nullptr, reduces, values,
             tensors.result());
    }
    both = {tensors.nll, tensors.grad};
  });
  return both;
}

std::tuple<Tensor, Tensor> fixed_horizon_bce(
    Tensor logits, Tensor event_times, Tensor event_indicators, OptionalTensor sequence_mask,
    OptionalTensor row_starts, OptionalTensor unsorted_indices, OptionalTensor last_rows,
    OptionalTensor visit_times, OptionalTensor visit_weight, OptionalTensor sample_weight,
    double horizon, double pos_weight, int64_t reduction, bool needs_grad) {
  constexpr const char* kName = "fixed_horizon_bce";
  expect_with(kName, logits, event_times, event_indicators, sequence_mask, row_starts,
              unsorted_indices, last_rows, visit_times, visit_weight, sample_weight);
  const bool packed = expect_arguments(logits, event_times, event_indicators, sequence_mask,
                                       row_starts, unsorted_indices, last_rows, visit_times,
                                       visit_weight, sample_weight, horizon, pos_weight, reduction);
  const VisitNumbers times(visit_times);
  const VisitNumbers weights(visit_weight);
  const MadeLabels targets{column(event_times), column(event_indicators), times.numbers(),
                           VisitWeights{weights.numbers(), column(sample_weight)}, horizon};
  const Tensor rows = made_contiguous(logits);
  const auto as_reduction = static_cast<Reduction>(reduction);
  if (!packed) {
    return loss_of(kName, shape_for(logits.size(0), logits.size(1)), padded_layout(sequence_mask),
                   targets, pos_weight, rows, as_reduction, needs_grad);
  }
  const RowTensors numbers(*row_starts, *unsorted_indices);
  return loss_of(kName, shape_for(numbers, logits.size(0)), numbers.layout(logits.size(0)), targets,
                 pos_weight, rows, as_reduction, needs_grad);
}

std::tuple<Tensor, Tensor> masked_bce(Tensor logits, Tensor labels, Tensor weights,
                                      bool needs_grad) {
  constexpr const char* kName = "masked_bce";
  expect_with(kName, logits, labels, weights);
  expect_given_labels(logits, labels, weights);
  const VisitNumbers of_labels(labels);
  const VisitNumbers of_weights(weights);
  return loss_of(kName, shape_for(logits.size(0), logits.size(1)), padded_layout(std::nullopt),
                 GivenLabels{of_labels.numbers(), of_weights.numbers()}, 1.0,
                 made_contiguous(logits), Reduction::kMean, needs_grad);
}

}  // namespace
}  // namespace ehrseq::fixed_horizon::cuda

EHRSEQ_CUDA_LIBRARY(m) {
  m.impl("fixed_horizon_bce", EHRSEQ_BOX(&ehrseq::fixed_horizon::cuda::fixed_horizon_bce));
  m.impl("masked_bce", EHRSEQ_BOX(&ehrseq::fixed_horizon::cuda::masked_bce));
}
