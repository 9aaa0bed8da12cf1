// survival_nll_scale on the CPU: the saved gradient times that of the loss.
//
// The kernels of the forward pass write +0 where no value counts, or where it was clamped, and -0
// where its derivative is 0. A NaN or an infinity of the loss's gradient reaches the second and not
// the first, as in the formula of reference.py.

#include <algorithm>
#include <cstdint>
#include <optional>
#include <type_traits>

#include "common/denormals.h"
#include "common/dtypes.h"
#include "common/operators.h"
#include "common/parallel.h"
#include "common/survival/rank_layout.h"
#include "common/tensors.h"
#include "survival_nll/arguments.h"
#include "survival_nll/scale.h"

namespace ehrseq::survival {
namespace {

constexpr const char* kName = "survival_nll_scale";
constexpr int64_t kWorthAThread = 32768;  // values

template <typename saved_t, typename grad_t>
void scale_all(const Tensor& saved, const Tensor& grad_nll, const std::optional<RankLayout>& packed,
               const Tensor& grad) {
  using T = accumulator_t<saved_t>;
  const auto* from = static_cast<const saved_t*>(saved.const_data_ptr());
  auto* to = static_cast<grad_t*>(grad.mutable_data_ptr());
  const auto* factors = static_cast<const T*>(grad_nll.const_data_ptr());
  const int64_t values = saved.numel();
  if (grad_nll.dim() == 0) {
    parallel_for(0, values, kWorthAThread, [&](int64_t begin, int64_t end) {
      const KeepDenormals denormals;
      scale(from + begin, end - begin, *factors, to + begin);
    });
    return;
  }
  const int64_t stride = grad_nll.stride(0);
  const int64_t row = values / std::max<int64_t>(1, saved.size(0));
  if (!packed) {
    parallel_for(0, saved.size(0), std::max<int64_t>(1, kWorthAThread / std::max<int64_t>(1, row)),
                 [&](int64_t begin, int64_t end) {
                   const KeepDenormals denormals;
                   for (int64_t i = begin; i < end; ++i)
                     scale(from + i * row, row, factors[i * stride], to + i * row);
                 });
    return;
  }
  const int64_t times = packed->most_visits();
  const int64_t time_values = values / std::max<int64_t>(1, times) + 1;
  parallel_for(
      0, times, std::max<int64_t>(1, kWorthAThread / time_values), [&](int64_t begin, int64_t end) {
        const KeepDenormals denormals;
        for (int64_t time = begin; time < end; ++time) {
          for (int64_t rank = 0; rank < packed->ranks_at(time); ++rank) {
            const int64_t at = packed->row(rank, time) * row;
            scale(from + at, row, factors[packed->patient_of_rank(rank) * stride], to + at);
          }
        }
      });
}

Tensor survival_nll_scale(const Tensor& grad, const Tensor& grad_nll,
                          const OptionalTensor& row_starts, const OptionalTensor& unsorted_indices,
                          const OptionalTensor& last_rows, ScalarType dtype) {
  expect_on_cpu(kName, grad, grad_nll, row_starts, unsorted_indices, last_rows);
  expect_scaling(kName, grad, grad_nll, row_starts, unsorted_indices, last_rows, dtype);
  std::optional<RankLayout> packed;
  if (row_starts.has_value()) {
    packed.emplace(kName, grad.size(0), *row_starts, *unsorted_indices, *last_rows);
  }
  const Tensor saved = made_contiguous(grad);
  Tensor result = allocated(saved, shape_of(saved), dtype);
  if (saved.numel() == 0) return result;
  if (dtype == ScalarType::Half) {
    scale_all<float, Half>(saved, grad_nll, packed, result);
    return result;
  }
  dispatch_floating(dtype, kName, [&](auto tag) {
    using scalar_t = typename decltype(tag)::type;
    if constexpr (!std::is_same_v<scalar_t, Half>) {
      scale_all<scalar_t, scalar_t>(saved, grad_nll, packed, result);
    }
  });
  return result;
}

}  // namespace
}  // namespace ehrseq::survival

STABLE_TORCH_LIBRARY_IMPL(ehrseq_fast, CPU, m) {
  m.impl("survival_nll_scale", EHRSEQ_BOX(&ehrseq::survival::survival_nll_scale));
}
