// Pooling of embeddings that already exist ([..., C, E] -> [..., E]) on the CPU: the loop of
// visit_pool, with the embeddings themselves as the table.

#include <algorithm>
#include <cstring>
#include <tuple>

#include "common/operators.h"
#include "common/parallel.h"
#include "common/tensors.h"
#include "visit_pool/arguments.h"
#include "visit_pool/masks.h"
#include "visit_pool/segments.h"
#include "visit_pool/winners.h"

namespace ehrseq {
namespace {

struct SlotItself {
  int32_t operator()(int64_t at) const { return static_cast<int32_t>(at); }
  void prefetch(int64_t) const {}
};

// Rows are counted from visit `first`, so that they fit 32 bits whatever the batch.
template <typename acc_t, typename mask_t>
void collect_real_slots(const OptionalTensor& mask, int64_t n_slots, int64_t first, int64_t last,
                        RealSlots<acc_t, mask_t>& kept) {
  kept.collect(mask_of_visit<mask_t>(mask, first, n_slots), last - first, n_slots, SlotItself{});
}

template <typename acc_t, typename mask_t>
void slots_within_visits(const RealSlots<acc_t, mask_t>& kept, int64_t n_slots,
                         std::vector<int32_t>& slots) {
  slots.resize(kept.n_entries);
  for (int64_t i = 0; i < kept.n_entries; ++i) {
    slots[i] = static_cast<int32_t>(kept.rows[i] - kept.visits[i] * n_slots);
  }
}

std::tuple<Tensor, Tensor> masked_pool(Tensor embeddings, OptionalTensor mask, int64_t mode) {
  constexpr auto kName = "masked_pool";
  expect_on_cpu(kName, embeddings, mask);
  if (embeddings.dim() < 2) {
    refuse(kName, "embeddings", "shape [..., C, E]", as_text(shape_of(embeddings)));
  }
  expect_floating(embeddings, kName, "embeddings");
  pooling::expect_mask(mask, leading_shape(embeddings, 1), kName);
  pooling::expect_mode(mode, kName);
  const auto table = made_contiguous(embeddings);
  const auto real = contiguous_or_none(mask);
  auto shape = leading_shape(table, 2);
  const int64_t n_visits = product(shape);
  const int64_t n_slots = table.size(table.dim() - 2);
  pooling::expect_countable(n_slots, kName, "slots per visit");
  const int64_t step = visits_per_step(kVisitsAtOnce, n_slots);
  const int64_t row_size = table.size(table.dim() - 1);
  shape.push_back(row_size);
  auto pooled = empty(table, shape, table.scalar_type());
  auto arg_max = empty(table, mode == kMax ? shape : std::vector<int64_t>{0}, ScalarType::Int);

  dispatch_floating(table.scalar_type(), kName, [&](auto scalar_tag) {
    using scalar_t = typename decltype(scalar_tag)::type;
    using acc_t = accumulator_t<scalar_t>;
    const auto* rows = static_cast<const scalar_t*>(table.data_ptr());
    auto* out = static_cast<scalar_t*>(pooled.data_ptr());
    auto* winners = mode == kMax ? static_cast<int32_t*>(arg_max.data_ptr()) : nullptr;
    dispatch_mask(real, [&](auto mask_tag) {
      using mask_t = typename decltype(mask_tag)::type;
      parallel_for(0, n_visits, kVisitsAtOnce, [&](int64_t begin, int64_t end) {
        RealSlots<acc_t, mask_t> kept;
        std::vector<int32_t> slots;
        for (int64_t first = begin; first < end; first += step) {
          const int64_t last = std::min(first + step, end);
          collect_real_slots(real, n_slots, first, last, kept);
          const scalar_t* base = rows + first * n_slots * row_size;
          if (mode == kMax) slots_within_visits(kept, n_slots, slots);
          pool_real_slots(kept, mode, base, row_size, slots.data(), out + first * row_size,
                          winners == nullptr ? nullptr : winners + first * row_size);
        }
      });
    });
  });
  return {pooled, arg_max};
}

Tensor masked_pool_backward(Tensor grad, OptionalTensor mask, OptionalTensor arg_max,
                            int64_t n_slots, int64_t mode) {
  constexpr auto kName = "masked_pool_backward";
  expect_on_cpu(kName, grad, mask, arg_max);
  if (grad.dim() < 1) refuse(kName, "grad", "shape [..., E]", "[]");
  pooling::expect_gradient(grad, leading_shape(grad, 1), arg_max, mode, kName);
  pooling::expect_countable(n_slots, kName, "n_slots");
  auto shape = leading_shape(grad, 1);
  const int64_t n_visits = product(shape);
  shape.push_back(n_slots);
  pooling::expect_mask(mask, shape, kName);
  const auto rows = made_contiguous(grad);
  const auto real = contiguous_or_none(mask);
  const Winners won(arg_max, mode);
  const int64_t row_size = rows.size(rows.dim() - 1);
  shape.push_back(row_size);
  auto grad_embeddings = empty(rows, shape, rows.scalar_type());

  dispatch_floating(rows.scalar_type(), kName, [&](auto scalar_tag) {
    using scalar_t = typename decltype(scalar_tag)::type;
    using acc_t = accumulator_t<scalar_t>;
    const auto* grad_rows = static_cast<const scalar_t*>(rows.data_ptr());
    const int32_t* winners = won.get();
    auto* out = static_cast<scalar_t*>(grad_embeddings.data_ptr());
    const auto& kernels = row_kernels<scalar_t>();
    dispatch_mask(real, [&](auto mask_tag) {
      using mask_t = typename decltype(mask_tag)::type;
      parallel_for(0, n_visits, kVisitsAtOnce, [&](int64_t begin, int64_t end) {
        RealSlots<acc_t, mask_t> kept;
        for (int64_t visit = begin; visit < end; ++visit) {
          collect_real_slots(real, n_slots, visit, visit + 1, kept);
          const scalar_t* grad_row = grad_rows + visit * row_size;
          scalar_t* visit_out = out + visit * n_slots * row_size;
          if (n_slots * row_size > 0) {
            std::memset(static_cast<void*>(visit_out), 0, n_slots * row_size * sizeof(scalar_t));
          }
          for (int64_t i = 0; i < kept.n_entries; ++i) {
            const int32_t slot = kept.rows[i];
            if (mode == kMax) {
              kernels.keep_won_columns(grad_row, winners + visit * row_size, slot, row_size,
                                       visit_out + slot * row_size);
            } else {
              const acc_t scale = mode == kMean ? kept.scales[0] : acc_t(1);
              kernels.scale_row(grad_row, scale * kept.weight(i), row_size,
                                visit_out + slot * row_size);
            }
          }
        }
      });
    });
  });
  return grad_embeddings;
}

}  // namespace
}  // namespace ehrseq

STABLE_TORCH_LIBRARY_IMPL(ehrseq_fast, CPU, m) {
  m.impl("masked_pool", EHRSEQ_BOX(&ehrseq::masked_pool));
  m.impl("masked_pool_backward", EHRSEQ_BOX(&ehrseq::masked_pool_backward));
}
