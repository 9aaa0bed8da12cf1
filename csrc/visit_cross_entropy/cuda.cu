// visit_cross_entropy on a GPU: one launch for loss and gradient, after one for the sum of the
// weights where the mean is asked for.

#include <algorithm>
#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

#include "common/cuda/launch.h"
#include "common/operators.h"
#include "common/options.h"
#include "common/survival/visit_loss_cuda.h"
#include "visit_cross_entropy/arguments.h"
#include "visit_cross_entropy/kernels.cuh"

namespace ehrseq::visit_cross_entropy::cuda {
namespace {

template <typename Layout>
std::tuple<Tensor, Tensor> loss_of(const Shape& shape, const Layout& layout, const Targets& targets,
                                   Settings settings, const Tensor& logits, Reduction reduction,
                                   bool needs_grad) {
  std::tuple<Tensor, Tensor> both;
  dispatch_floating(logits.scalar_type(), kName, [&](auto tag) {
    using scalar_t = typename decltype(tag)::type;
    using grad_t = saved_grad_t<scalar_t>;
    const OnDeviceOf device(kName, logits);
    settings.reduces = reduction != Reduction::kNone;
    std::vector<int64_t> of_visits = shape_of(logits);
    of_visits.pop_back();
    const LossTensors<accumulator_t<scalar_t>, grad_t> tensors(
        device, logits, shape.patients, kWarp, settings.reduces, needs_grad, of_visits);
    const OptionalTensor total = total_weight(device, shape, layout, targets, logits, reduction);
    const Logits<scalar_t, grad_t> values{
        data_of<scalar_t>(logits), needs_grad ? mutable_data_of<grad_t>(tensors.grad) : nullptr};
    if (tensors.blocks() > 0) {
      launch(cross_entropy_and_grad<Layout, scalar_t, grad_t>, dim3(tensors.blocks()),
             dim3(kThreads), 0, device.stream(), shape, layout, targets, settings,
             total.has_value() ? data_of<double>(*total) : nullptr, values, tensors.result());
    }
    both = {tensors.nll, tensors.grad};
  });
  return both;
}

std::tuple<Tensor, Tensor> visit_cross_entropy(
    Tensor logits, Tensor labels, OptionalTensor sequence_mask, OptionalTensor row_starts,
    OptionalTensor unsorted_indices, OptionalTensor last_rows, OptionalTensor class_weight,
    OptionalTensor visit_weight, OptionalTensor sample_weight, int64_t ignore_index,
    double label_smoothing, int64_t reduction, bool needs_grad) {
  expect_with(kName, logits, labels, sequence_mask, row_starts, unsorted_indices, last_rows,
              class_weight, visit_weight, sample_weight);
  const bool packed =
      expect_arguments(logits, labels, sequence_mask, row_starts, unsorted_indices, last_rows,
                       class_weight, visit_weight, sample_weight, label_smoothing, reduction);
  const int64_t classes = logits.size(packed ? 1 : 2);
  const VisitNumbers of_labels(labels);
  const VisitNumbers of_visits(visit_weight);
  const Targets targets{of_labels.numbers(), column(class_weight),
                        VisitWeights{of_visits.numbers(), column(sample_weight)}, classes,
                        ignore_index};
  const Settings settings{label_smoothing, true, lanes_for(classes)};
  const Tensor rows = made_contiguous(logits);
  const auto as_reduction = static_cast<Reduction>(reduction);
  if (!packed) {
    return loss_of(shape_for(logits.size(0), logits.size(1)), padded_layout(sequence_mask), targets,
                   settings, rows, as_reduction, needs_grad);
  }
  const RowTensors numbers(*row_starts, *unsorted_indices);
  return loss_of(shape_for(numbers, logits.size(0)), numbers.layout(logits.size(0)), targets,
                 settings, rows, as_reduction, needs_grad);
}

}  // namespace
}  // namespace ehrseq::visit_cross_entropy::cuda

EHRSEQ_CUDA_LIBRARY(m) {
  m.impl("visit_cross_entropy",
         EHRSEQ_BOX(&ehrseq::visit_cross_entropy::cuda::visit_cross_entropy));
}
