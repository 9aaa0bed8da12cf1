// The launch that gives loss and gradient, of any Model (kernels.cuh), and its results.
#pragma once

#include <algorithm>
#include <cmath>
#include <tuple>

#include "common/cuda/launch.h"
#include "common/options.h"
#include "common/survival/arguments.h"
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

// --- hazards of any link ---------------------------------------------------------------------

// The number of visits of a patient of a packed batch, by which lanes are shared out: the mean, as
// the longest patient says little about the others.
inline int64_t visits_of_one(int64_t n_visits, int64_t patients) {
  return n_visits / std::max<int64_t>(1, patients) + 1;
}

// Checked options as the kernel takes them; `visits` is how many a patient has.
inline KernelSettings settings_for(const LogitsShape& shape, int64_t visits, int64_t link,
                                   bool censored_included, double eps, int64_t reduction) {
  const auto as_reduction = static_cast<Reduction>(reduction);
  const bool by_visit = static_cast<Link>(link) == Link::kSoftmax;
  const bool is_mean = as_reduction == Reduction::kMean;
  return {shape.patients,
          static_cast<unsigned>(shape.slots),
          static_cast<unsigned>(shape.classes),
          censored_included,
          as_reduction != Reduction::kNone,
          eps,
          -std::log(eps),
          is_mean ? 1.0 / static_cast<double>(shape.patients) : 1.0,
          lanes_for(by_visit ? visits * kInFlight : visits * shape.classes)};
}

template <typename Layout>
std::tuple<Tensor, Tensor> nll_and_gradient(const char* operation, const KernelSettings& settings,
                                            const Layout& layout, const OutcomeColumns& outcomes,
                                            const Tensor& hazards, int64_t link, bool needs_grad) {
  std::tuple<Tensor, Tensor> both;
  dispatch_floating(hazards.scalar_type(), operation, [&](auto tag) {
    using scalar_t = typename decltype(tag)::type;
    const auto launched = [&](auto model) {
      return launch_nll<decltype(model), Layout, scalar_t>(operation, settings, layout, outcomes,
                                                           hazards, needs_grad);
    };
    switch (static_cast<Link>(link)) {
      case Link::kProbabilities:
        both = launched(BernoulliModel<FromProbabilities>{});
        return;
      case Link::kSigmoid:
        both = launched(BernoulliModel<FromLogits>{});
        return;
      case Link::kCloglog:
        both = launched(BernoulliModel<FromCloglog>{});
        return;
      case Link::kSoftmax:
        both = launched(SoftmaxModel{});
        return;
    }
  });
  return both;
}

}  // namespace ehrseq::survival::cuda
