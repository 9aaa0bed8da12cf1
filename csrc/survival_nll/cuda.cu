// The survival losses on a GPU: what is launched, and where its memory comes from.

#include <algorithm>
#include <optional>
#include <tuple>

#include "common/cuda/launch.h"
#include "common/operators.h"
#include "common/survival/layouts_cuda.h"
#include "common/survival/outcomes_cuda.h"
#include "common/survival/sums_cuda.h"
#include "survival_nll/arguments.h"
#include "survival_nll/kernels.cuh"
#include "survival_nll/launch_nll.h"
#include "survival_nll/scaling.cuh"

namespace ehrseq::survival::cuda {
namespace {

using torch::headeronly::ScalarType;

// --- forward ---------------------------------------------------------------------------------

std::tuple<Tensor, Tensor> padded_nll(const char* operation, bool competing, const Tensor& hazards,
                                      const Tensor& times, const Tensor& types,
                                      const OptionalTensor& mask, const OptionalTensor& entries,
                                      const OptionalTensor& weights, int64_t link,
                                      bool censored_included, double eps, int64_t reduction,
                                      bool needs_grad) {
  expect_with(operation, hazards, times, types, mask, entries, weights);
  expect_hazards(operation, hazards, competing);
  expect_options(operation, competing, link, eps, reduction);
  const Tensor rows = made_contiguous(hazards);
  const int64_t patients = rows.size(0);
  const int64_t slots = rows.size(1);
  const int64_t classes = competing ? rows.size(2) : 1;
  causes_of(operation, classes, link);
  expect_row_length(operation, slots, classes);
  expect_outcomes(operation, patients, competing, times, types, entries, weights);
  expect_sequence_mask(operation, mask, patients, slots);
  const LogitsShape shape{false, patients, slots, classes};
  return nll_and_gradient(
      operation, settings_for(shape, slots, link, censored_included, eps, reduction),
      padded_layout(mask), outcomes_of(competing, times, types, entries, weights), rows, link,
      needs_grad);
}

std::tuple<Tensor, Tensor> survival_nll(const Tensor& hazards, const Tensor& event_times,
                                        const Tensor& event_indicators,
                                        const OptionalTensor& sequence_mask,
                                        const OptionalTensor& entry_times,
                                        const OptionalTensor& sample_weight, int64_t link,
                                        bool censored_included, double eps, int64_t reduction,
                                        bool needs_grad) {
  return padded_nll("survival_nll", false, hazards, event_times, event_indicators, sequence_mask,
                    entry_times, sample_weight, link, censored_included, eps, reduction,
                    needs_grad);
}

std::tuple<Tensor, Tensor> competing_risks_nll(const Tensor& hazards, const Tensor& event_times,
                                               const Tensor& event_types,
                                               const OptionalTensor& sequence_mask,
                                               const OptionalTensor& entry_times,
                                               const OptionalTensor& sample_weight, int64_t link,
                                               bool censored_included, double eps,
                                               int64_t reduction, bool needs_grad) {
  return padded_nll("competing_risks_nll", true, hazards, event_times, event_types, sequence_mask,
                    entry_times, sample_weight, link, censored_included, eps, reduction,
                    needs_grad);
}

std::tuple<Tensor, Tensor> packed_survival_nll(
    const Tensor& hazards, const Tensor& row_starts, const Tensor& unsorted_indices,
    const Tensor& last_rows, const Tensor& event_times, const Tensor& event_types,
    const OptionalTensor& entry_times, const OptionalTensor& sample_weight, int64_t link,
    bool censored_included, double eps, int64_t reduction, bool needs_grad) {
  constexpr auto kName = "packed_survival_nll";
  expect_packed_hazards(kName, hazards);
  expect_with(kName, hazards, row_starts, unsorted_indices, event_times, event_types, entry_times,
              sample_weight);
  const bool competing = hazards.dim() == 2;
  const int64_t classes = competing ? hazards.size(1) : 1;
  expect_options(kName, competing, link, eps, reduction);
  causes_of(kName, classes, link);
  // Values of last_rows are not read: the sizes of row_starts tell where a patient ends.
  expect_row_numbers(kName, row_starts, unsorted_indices, last_rows);
  const RowTensors rows(row_starts, unsorted_indices);
  expect_row_length(kName, rows.slots(), classes);
  expect_outcomes(kName, rows.patients(), competing, event_times, event_types, entry_times,
                  sample_weight);
  const LogitsShape shape{true, rows.patients(), rows.slots(), classes};
  const int64_t visits = visits_of_one(hazards.size(0), rows.patients());
  return nll_and_gradient(
      kName, settings_for(shape, visits, link, censored_included, eps, reduction),
      rows.layout(hazards.size(0)),
      outcomes_of(competing, event_times, event_types, entry_times, sample_weight),
      made_contiguous(hazards), link, needs_grad);
}

// --- backward --------------------------------------------------------------------------------

constexpr auto kScale = "survival_nll_scale";
constexpr int64_t kMostScalingBlocks = 65536;

template <int kValues, typename saved_t, typename grad_t>
void launch_scale_rows(const Scaling<saved_t, grad_t>& task,
                       const LossGradient<accumulator_t<saved_t>>& loss, cudaStream_t stream) {
  const int64_t blocks =
      std::min<int64_t>(kMostScalingBlocks, blocks_for(task.values, kThreads * kValues));
  launch(scale_rows<kValues, saved_t, grad_t>, dim3(static_cast<unsigned>(blocks)), dim3(kThreads),
         0, stream, task, loss);
}

template <typename saved_t, typename grad_t>
Tensor scaled(const Tensor& saved, const Tensor& grad_nll,
              const std::optional<RowTensors>& packed) {
  using nll_t = accumulator_t<saved_t>;
  const bool per_patient = grad_nll.dim() == 1;
  const int64_t patients = packed ? packed->patients() : saved.size(0);
  const OnDeviceOf device(kScale, saved);
  Tensor grad = empty(saved, shape_of(saved), kDtypeOf<grad_t>);
  if (saved.numel() == 0) return grad;

  Scaling<saved_t, grad_t> task{data_of<saved_t>(saved), mutable_data_of<grad_t>(grad),
                                saved.numel(), saved.numel() / saved.size(0)};
  const LossGradient<nll_t> loss{data_of<nll_t>(grad_nll), per_patient ? grad_nll.stride(0) : 0};
  if (packed && loss.stride != 0) {
    const unsigned blocks =
        std::min<int64_t>(kMostScalingBlocks, blocks_for(patients, kThreads / kWarp));
    launch(scale_packed<saved_t, grad_t>, dim3(blocks), dim3(kThreads), 0, device.stream(), task,
           packed->layout(saved.size(0)), static_cast<unsigned>(packed->slots()), patients, loss);
    return grad;
  }
  // The saved gradient may be a view of a larger tensor; the new one begins an allocation.
  constexpr int kWide = 16 / sizeof(saved_t);
  const bool is_aligned = reinterpret_cast<uintptr_t>(task.saved) % 16 == 0;
  if (is_aligned && task.values % kWide == 0) {
    launch_scale_rows<kWide>(task, loss, device.stream());
  } else {
    launch_scale_rows<1>(task, loss, device.stream());
  }
  return grad;
}

Tensor survival_nll_scale(const Tensor& grad, const Tensor& grad_nll,
                          const OptionalTensor& row_starts, const OptionalTensor& unsorted_indices,
                          const OptionalTensor& last_rows, ScalarType dtype) {
  expect_with(kScale, grad, grad_nll, row_starts, unsorted_indices);
  expect_scaling(kScale, grad, grad_nll, row_starts, unsorted_indices, last_rows, dtype);
  const Tensor saved = made_contiguous(grad);
  std::optional<RowTensors> packed;
  if (row_starts.has_value()) packed.emplace(*row_starts, *unsorted_indices);
  if (dtype == ScalarType::Half) return scaled<float, __half>(saved, grad_nll, packed);
  switch (saved.scalar_type()) {
    case ScalarType::Double:
      return scaled<double, double>(saved, grad_nll, packed);
    case ScalarType::BFloat16:
      return scaled<__nv_bfloat16, __nv_bfloat16>(saved, grad_nll, packed);
    default:
      return scaled<float, float>(saved, grad_nll, packed);
  }
}

}  // namespace
}  // namespace ehrseq::survival::cuda

EHRSEQ_CUDA_LIBRARY(m) {
  m.impl("survival_nll", EHRSEQ_BOX(&ehrseq::survival::cuda::survival_nll));
  m.impl("competing_risks_nll", EHRSEQ_BOX(&ehrseq::survival::cuda::competing_risks_nll));
  m.impl("packed_survival_nll", EHRSEQ_BOX(&ehrseq::survival::cuda::packed_survival_nll));
  m.impl("survival_nll_scale", EHRSEQ_BOX(&ehrseq::survival::cuda::survival_nll_scale));
}
