// Visit pooling on the GPU: what each operator launches. kernels.cuh lists the kernels; launches
// that padded and packed batches share are in cuda_launch.h.
//
// Launches: forward 1 in every mode; backward 2 where the batch has its index, 3 with
// attention. A padded batch has its index built first, by 3 launches for each 10 bits of the
// vocabulary's size. Nothing waits for the device, but for the size of a sparse gradient.

#include <algorithm>
#include <tuple>

#include "common/cuda/launch.h"
#include "common/operators.h"
#include "visit_pool/cuda_launch.h"
#include "visit_pool/sorted_batch.h"
#include "visit_pool/winners.h"

namespace ehrseq::cuda {
namespace {

// ---------------------------------------------------------------------------------------------
// Forward

std::tuple<Tensor, Tensor> visit_pool(Tensor codes, Tensor weight, OptionalTensor visit_mask,
                                      int64_t mode) {
  constexpr auto kName = "visit_pool";
  const OnDeviceOf device(kName, weight, codes, visit_mask);
  pooling::expect_table(weight, kName);
  pooling::expect_mode(mode, kName);
  pooling::expect_padded_codes(codes, visit_mask, kName);
  const auto table = torch::stable::contiguous(weight);
  const PaddedBatch batch(codes, visit_mask, table.size(0));
  auto shape = batch.visits_shape;
  shape.push_back(table.size(1));
  const PooledRows out(table, shape, mode);
  dispatch_floating(table.scalar_type(), kName, [&](auto tag) {
    using scalar_t = typename decltype(tag)::type;
    const PaddedVisits<accumulator_t<scalar_t>> visits{batch.codes, batch.mask, batch.n_slots,
                                                       mode == kMean};
    pool_in_mode<scalar_t>(mode, visits, batch.n_visits, batch.n_slots / kSlotsPerCode, table, out,
                           device.stream());
  });
  return {out.pooled, out.arg_max};
}

std::tuple<Tensor, Tensor> masked_pool(Tensor embeddings, OptionalTensor mask, int64_t mode) {
  constexpr auto kName = "masked_pool";
  const OnDeviceOf device(kName, embeddings, mask);
  if (embeddings.dim() < 2) {
    refuse(kName, "embeddings", "shape [..., C, E]", as_text(shape_of(embeddings)));
  }
  expect_floating(embeddings, kName, "embeddings");
  pooling::expect_mask(mask, leading_shape(embeddings, 1), kName);
  pooling::expect_mode(mode, kName);
  const auto table = torch::stable::contiguous(embeddings);
  const auto slots_mask = contiguous_or_none(mask);
  auto shape = leading_shape(table, 2);
  const int64_t n_visits = product(shape);
  const int32_t n_slots = slots_of_a_visit(table.size(table.dim() - 2));
  shape.push_back(table.size(table.dim() - 1));
  const PooledRows out(table, shape, mode);
  dispatch_floating(table.scalar_type(), kName, [&](auto tag) {
    using scalar_t = typename decltype(tag)::type;
    const PaddedVisits<accumulator_t<scalar_t>> visits{SlotCodes{nullptr, false, n_slots},
                                                       mask_of(slots_mask), n_slots, mode == kMean};
    pool_in_mode<scalar_t>(mode, visits, n_visits, n_slots / kSlotsPerCode, table, out,
                           device.stream());
  });
  return {out.pooled, out.arg_max};
}

Tensor masked_pool_backward(Tensor grad, OptionalTensor mask, OptionalTensor arg_max,
                            int64_t n_slots, int64_t mode) {
  constexpr auto kName = "masked_pool_backward";
  const OnDeviceOf device(kName, grad, mask, arg_max);
  if (grad.dim() < 1) refuse(kName, "grad", "shape [..., E]", "[]");
  auto shape = leading_shape(grad, 1);
  pooling::expect_gradient(grad, shape, arg_max, mode, kName);
  pooling::expect_countable(n_slots, kName, "n_slots");
  const int64_t n_visits = product(shape);
  shape.push_back(n_slots);
  pooling::expect_mask(mask, shape, kName);
  const auto rows = torch::stable::contiguous(grad);
  const auto slots_mask = contiguous_or_none(mask);
  const Winners winners(arg_max, mode);
  const int64_t row_size = rows.size(rows.dim() - 1);
  shape.push_back(row_size);
  const auto grad_embeddings = empty(rows, shape, rows.scalar_type());
  dispatch_floating(rows.scalar_type(), kName, [&](auto tag) {
    using scalar_t = typename decltype(tag)::type;
    const auto* from = data_of<scalar_t>(rows);
    auto* to = mutable_data_of<scalar_t>(grad_embeddings);
    const auto* won = winners.get();
    const auto alignment = Alignment().rows(from, row_size).rows(to, row_size).winners(won);
    dispatch_columns<scalar_t>(alignment, [&](auto columns) {
      constexpr int kColumns = columns();
      const RowLaunch launch_rows(row_size, kColumns);
      const int64_t groups = kSpreadThreads / launch_rows.lanes;
      const int parts_log2 = parts_log2_for(n_visits, n_slots, 8, groups, launch_rows.tiles);
      launch(spread_gradients<scalar_t, kColumns>,
             grid_over_visits(n_visits, groups >> parts_log2, launch_rows.tiles), kSpreadThreads, 0,
             device.stream(), mask_of(slots_mask), n_visits, n_slots, parts_log2, mode == kMean,
             launch_rows.shape, from, won, to);
    });
  });
  return grad_embeddings;
}

// ---------------------------------------------------------------------------------------------
// Backward

void expect_padded_gradient(const Tensor& grad, const Tensor& codes, int64_t vocabulary,
                            const OptionalTensor& visit_mask, const OptionalTensor& arg_max,
                            int64_t mode, int64_t padding_idx, const char* operation) {
  pooling::expect_padded_codes(codes, visit_mask, operation);
  pooling::expect_padding(padding_idx, vocabulary, operation);
  pooling::expect_gradient(grad, leading_shape(codes, 1), arg_max, mode, operation);
}

Tensor visit_pool_backward(Tensor grad, Tensor codes, int64_t vocabulary, OptionalTensor visit_mask,
                           OptionalTensor arg_max, int64_t mode, int64_t padding_idx) {
  constexpr auto kName = "visit_pool_backward";
  const OnDeviceOf device(kName, grad, codes, visit_mask, arg_max);
  expect_padded_gradient(grad, codes, vocabulary, visit_mask, arg_max, mode, padding_idx, kName);
  const auto rows = torch::stable::contiguous(grad);
  const Winners winners(arg_max, mode);
  const int64_t row_size = rows.size(rows.dim() - 1);
  const PaddedBatch batch(codes, visit_mask, vocabulary);
  const auto grad_weight = empty(rows, {vocabulary, row_size}, rows.scalar_type());
  if (batch.n_visits * batch.n_slots == 0) {
    fill_zero(grad_weight, device.stream());
    return grad_weight;
  }
  dispatch_floating(rows.scalar_type(), kName, [&](auto tag) {
    using scalar_t = typename decltype(tag)::type;
    const SortedBatch<accumulator_t<scalar_t>> sorted(batch, mode, padding_idx, rows,
                                                      device.stream());
    const GradientRows<scalar_t> out{mutable_data_of<scalar_t>(grad_weight), nullptr, padding_idx,
                                     false, nullptr};
    gradients_in_mode<scalar_t>(mode, data_of<scalar_t>(rows), winners.get(), sorted.index(),
                                EntryCount{sorted.count(), 0}, sorted.most_entries(),
                                sorted.weights(), out, vocabulary, row_size, rows, device.stream());
  });
  return grad_weight;
}

// The number of distinct codes is the size of what is returned: the one wait of this file.
std::tuple<Tensor, Tensor> visit_pool_backward_sparse(Tensor grad, Tensor codes, int64_t vocabulary,
                                                      OptionalTensor visit_mask,
                                                      OptionalTensor arg_max, int64_t mode,
                                                      int64_t padding_idx) {
  constexpr auto kName = "visit_pool_backward_sparse";
  const OnDeviceOf device(kName, grad, codes, visit_mask, arg_max);
  expect_padded_gradient(grad, codes, vocabulary, visit_mask, arg_max, mode, padding_idx, kName);
  const auto rows = torch::stable::contiguous(grad);
  const Winners winners(arg_max, mode);
  const int64_t row_size = rows.size(rows.dim() - 1);
  const PaddedBatch batch(codes, visit_mask, vocabulary);
  const int64_t n_slots_in_all = batch.n_visits * batch.n_slots;
  auto code_ids = empty(rows, {0}, ScalarType::Long);
  auto code_rows = empty(rows, {0, row_size}, rows.scalar_type());
  if (n_slots_in_all == 0) return {code_ids, code_rows};
  dispatch_floating(rows.scalar_type(), kName, [&](auto tag) {
    using scalar_t = typename decltype(tag)::type;
    const SortedBatch<accumulator_t<scalar_t>> sorted(batch, mode, padding_idx, rows,
                                                      device.stream());
    const int64_t most_codes = std::min(vocabulary, n_slots_in_all);
    const auto index_codes = empty(rows, {most_codes}, ScalarType::Int);
    const auto index_offsets = empty(rows, {most_codes + 1}, ScalarType::Int);
    const auto sizes = empty(rows, {2}, ScalarType::Int);
    sorted.write_distinct(mutable_data_of<int32_t>(index_codes),
                          mutable_data_of<int32_t>(index_offsets), mutable_data_of<int32_t>(sizes),
                          mutable_data_of<int32_t>(sizes) + 1);
    const auto known_sizes = on_host(sizes);
    const int64_t n_distinct = data_of<int32_t>(known_sizes)[0];
    const int64_t n_entries = data_of<int32_t>(known_sizes)[1];
    if (n_distinct == 0) return;

    code_ids = empty(rows, {n_distinct}, ScalarType::Long);
    code_rows = empty(rows, {n_distinct, row_size}, rows.scalar_type());
    const BatchIndex index{data_of<int32_t>(index_codes),
                           data_of<int32_t>(index_offsets),
                           sorted.visits(),
                           n_distinct,
                           n_entries,
                           batch.n_visits,
                           vocabulary};
    const GradientRows<scalar_t> out{mutable_data_of<scalar_t>(code_rows),
                                     mutable_data_of<int64_t>(code_ids), padding_idx, false,
                                     nullptr};
    gradients_in_mode<scalar_t>(mode, data_of<scalar_t>(rows), winners.get(), index,
                                EntryCount{nullptr, n_entries}, n_entries, sorted.weights(), out,
                                vocabulary, row_size, rows, device.stream());
  });
  return {code_ids, code_rows};
}

}  // namespace
}  // namespace ehrseq::cuda

EHRSEQ_CUDA_LIBRARY(m) {
  m.impl("visit_pool", EHRSEQ_BOX(&ehrseq::cuda::visit_pool));
  m.impl("visit_pool_backward", EHRSEQ_BOX(&ehrseq::cuda::visit_pool_backward));
  m.impl("visit_pool_backward_sparse", EHRSEQ_BOX(&ehrseq::cuda::visit_pool_backward_sparse));
  m.impl("masked_pool", EHRSEQ_BOX(&ehrseq::cuda::masked_pool));
  m.impl("masked_pool_backward", EHRSEQ_BOX(&ehrseq::cuda::masked_pool_backward));
}
