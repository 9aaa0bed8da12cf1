// Tensors and launches of the losses whose terms are visits, on a GPU (visit_loss.cuh).
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/cuda/launch.h"
#include "common/options.h"
#include "common/survival/layouts_cuda.h"
#include "common/survival/sums_cuda.h"
#include "common/survival/visit_loss.cuh"

namespace ehrseq::survival::cuda {

// Numbers of visits [B, V] or [n_visits] by row, as a tensor that lives while a kernel is launched.
class VisitNumbers {
 public:
  explicit VisitNumbers(const OptionalTensor& tensor) {
    if (tensor.has_value()) tensor_ = made_contiguous(*tensor);
  }

  Numbers numbers() const { return tensor_.has_value() ? numbers_of(*tensor_, 1) : Numbers{}; }

 private:
  OptionalTensor tensor_;
};

inline Shape shape_for(int64_t patients, int64_t slots) {
  return {patients, static_cast<unsigned>(slots), lanes_for(slots)};
}

// By the mean length: the longest patient says little about the others.
inline Shape shape_for(const RowTensors& numbers, int64_t n_visits) {
  const int64_t patients = numbers.patients();
  return {patients, static_cast<unsigned>(numbers.slots()),
          lanes_for(n_visits / std::max<int64_t>(1, patients))};
}

// The sum of the weights of the visits that count, a number on the GPU; none without a mean.
template <typename Targets, typename Layout>
OptionalTensor total_weight(const OnDeviceOf& device, const Shape& shape, const Layout& layout,
                            const Targets& targets, const Tensor& like, Reduction reduction) {
  if (reduction != Reduction::kMean) return std::nullopt;
  const LossTensors<double, double> tensors(device, like, shape.patients, shape.lanes, true, false);
  launch(weigh_visits<Targets, Layout>, dim3(tensors.blocks()), dim3(kThreads), 0, device.stream(),
         shape, layout, targets, tensors.result());
  return tensors.nll;
}

}  // namespace ehrseq::survival::cuda
