// deephit_ranking on a GPU: what is launched, and where its memory comes from.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <string>
#include <tuple>
#include <vector>

#include "common/cuda/launch.h"
#include "common/operators.h"
#include "common/survival/arguments.h"
#include "common/survival/layouts_cuda.h"
#include "common/survival/outcomes_cuda.h"
#include "common/survival/sums_cuda.h"
#include "deephit_ranking/kernels.cuh"

namespace ehrseq::survival::ranking::cuda {
namespace {

constexpr const char* kName = "deephit_ranking";

// One allocation for several arrays, which can be used once it is made.
class Workspace {
 public:
  template <typename T>
  void add(T*& array, int64_t count) {
    constexpr int64_t kAligned = 16;
    places_.push_back(
        [&array, offset = bytes_](char* memory) { array = reinterpret_cast<T*>(memory + offset); });
    bytes_ += (count * static_cast<int64_t>(sizeof(T)) + kAligned - 1) / kAligned * kAligned;
  }
  void allocate(const Tensor& like) {
    memory_ = empty(like, {bytes_}, ScalarType::Byte);
    for (const auto& place : places_) place(mutable_data_of<char>(memory_));
  }

 private:
  std::vector<std::function<void(char*)>> places_;
  int64_t bytes_ = 0;
  Tensor memory_;
};

template <typename scalar_t, typename Layout>
std::tuple<Tensor, Tensor> launch_all(const Settings& settings, const Layout& layout,
                                      const OutcomeColumns& outcomes, const Tensor& logits,
                                      bool needs_grad) {
  using T = accumulator_t<scalar_t>;
  using grad_t = saved_grad_t<scalar_t>;
  const OnDeviceOf device(kName, logits);
  const int64_t values = int64_t{settings.slots} * settings.classes;
  // in place of patients there are visits and causes, 32 for each block
  const LossTensors<T, grad_t> tensors(device, logits, values, kThreads / kWarp, true, needs_grad);

  OfPatients<T> patients{};
  Later<T> later{};
  Slopes<T> slopes{};
  Workspace workspace;
  workspace.add(later.sum, settings.groups * values);
  workspace.add(later.largest, settings.groups * values);
  workspace.add(slopes.largest, values);
  workspace.add(slopes.of_events, values);
  workspace.add(patients.own, settings.patients);
  workspace.add(patients.event, settings.patients);
  if (needs_grad) {
    workspace.add(patients.softmax, settings.patients);
    workspace.add(patients.incidence, settings.patients * settings.classes);
  }
  workspace.allocate(logits);

  const auto* x = data_of<scalar_t>(logits);
  launch(sum_later<Layout, scalar_t>, dim3(blocks_for(settings.groups, kWarps)), dim3(kThreads), 0,
         device.stream(), settings, layout, outcomes, x, patients, later);
  launch(join_later<T>, dim3(tensors.blocks()), dim3(kThreads), 0, device.stream(), settings,
         outcomes, patients, later, slopes, tensors.result());
  if (needs_grad) {
    launch(write_gradients<Layout, scalar_t, grad_t>, dim3(blocks_for(settings.patients, kWarps)),
           dim3(kThreads), 0, device.stream(), settings, layout, outcomes, x, patients, slopes,
           mutable_data_of<grad_t>(tensors.grad));
  }
  return {tensors.nll, tensors.grad};
}

template <typename Layout>
std::tuple<Tensor, Tensor> loss_and_grad(const Settings& settings, const Layout& layout,
                                         const OutcomeColumns& outcomes, const Tensor& logits,
                                         bool needs_grad) {
  std::tuple<Tensor, Tensor> both;
  dispatch_floating(logits.scalar_type(), kName, [&](auto tag) {
    using scalar_t = typename decltype(tag)::type;
    both = launch_all<scalar_t>(settings, layout, outcomes, logits, needs_grad);
  });
  return both;
}

std::tuple<Tensor, Tensor> deephit_ranking(
    const Tensor& logits, const Tensor& event_times, const Tensor& event_types,
    const OptionalTensor& sequence_mask, const OptionalTensor& row_starts,
    const OptionalTensor& unsorted_indices, const OptionalTensor& last_rows,
    const OptionalTensor& entry_times, const OptionalTensor& sample_weight, bool competing,
    bool censored_included, double sigma, bool needs_grad) {
  expect_with(kName, logits, event_times, event_types, sequence_mask, row_starts, unsorted_indices,
              last_rows, entry_times, sample_weight);
  // Values of last_rows are not read: the sizes of row_starts tell where a patient ends.
  const LogitsShape shape =
      expect_logits(kName, competing, logits, event_times, event_types, sequence_mask, row_starts,
                    unsorted_indices, last_rows, entry_times, sample_weight);
  if (!(sigma > 0 && std::isfinite(sigma))) {
    refuse(kName, "sigma", "a finite number above 0", std::to_string(sigma));
  }
  const double patients = static_cast<double>(shape.patients);
  Settings settings{};
  settings.patients = shape.patients;
  settings.group = std::max(kFewestOfGroup, (shape.patients + kMostGroups - 1) / kMostGroups);
  settings.groups = (shape.patients + settings.group - 1) / settings.group;
  settings.slots = static_cast<unsigned>(shape.slots);
  settings.classes = static_cast<unsigned>(shape.classes);
  settings.censored_included = censored_included;
  settings.of_incidence = 1 / sigma;
  settings.share = 1 / (patients * patients);  // of none: the loss is 0 * inf, NaN
  const OutcomeColumns outcomes =
      outcomes_of(competing, event_times, event_types, entry_times, sample_weight);
  const Tensor rows = made_contiguous(logits);
  if (!shape.packed) {
    return loss_and_grad(settings, padded_layout(sequence_mask), outcomes, rows, needs_grad);
  }
  const RowTensors numbers(*row_starts, *unsorted_indices);
  return loss_and_grad(settings, numbers.layout(logits.size(0)), outcomes, rows, needs_grad);
}

}  // namespace
}  // namespace ehrseq::survival::ranking::cuda

EHRSEQ_CUDA_LIBRARY(m) {
  m.impl("deephit_ranking", EHRSEQ_BOX(&ehrseq::survival::ranking::cuda::deephit_ranking));
}
