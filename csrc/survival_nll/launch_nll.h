// The launch that gives loss and gradient, of any Model (kernels.cuh), and its results.
#pragma once

#include <tuple>

#include "common/cuda/launch.h"
#include "common/survival/sums_cuda.h"
#include "survival_nll/kernels.cuh"

namespace ehrseq::survival::cuda {

template <typename Model, typename Layout, typename scalar_t>
std::tuple<Tensor, Tensor> launch_nll(const char* operation, const KernelSettings& settings,
                                      const Layout& layout, const OutcomeColumns& outcomes,
                                      const Tensor& hazards, bool needs_grad) {
  using grad_t = saved_grad_t<scalar_t>;
  const OnDeviceOf device(operation, hazards);
  const LossTensors<accumulator_t<scalar_t>, grad_t> tensors(
      device, hazards, settings.patients, settings.lanes, settings.reduces, needs_grad);
  const Hazards<scalar_t, grad_t> values{
      data_of<scalar_t>(hazards), needs_grad ? mutable_data_of<grad_t>(tensors.grad) : nullptr};
  launch(nll_and_grad<Model, Layout, scalar_t, grad_t>, dim3(tensors.blocks()), dim3(kThreads), 0,
         device.stream(), settings, layout, outcomes, values, tensors.result());
  return {tensors.nll, tensors.grad};
}

}  // namespace ehrseq::survival::cuda
