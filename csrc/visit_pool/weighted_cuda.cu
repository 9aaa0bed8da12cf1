// Visit pooling of packed batches with weights per code on the GPU, in modes mean and sum: what
// each operator launches. A weight of zero is to a code what a mask's zero is to a padded slot.
//
// Launches: forward 1; backward 3 for the table and 1 for the weights.

#include <tuple>

#include "common/cuda/launch.h"
#include "common/operators.h"
#include "visit_pool/arguments.h"
#include "visit_pool/cuda_launch.h"
#include "visit_pool/packed_cuda.h"

namespace ehrseq::cuda {
namespace {

// Null but in mode mean.
template <typename acc_t>
const acc_t* totals_of(const OptionalTensor& totals, int64_t mode) {
  return mode == kMean ? data_of<acc_t>(*totals) : nullptr;
}

std::tuple<Tensor, Tensor> packed_weighted_pool(Tensor codes, Tensor code_offsets, Tensor weight,
                                                Tensor code_weights, int64_t mode) {
  constexpr auto kName = "packed_weighted_pool";
  const OnDeviceOf device(kName, weight, codes, code_offsets, code_weights);
  pooling::expect_table(weight, kName);
  pooling::expect_weighted_mode(mode, kName);
  const auto table = torch::stable::contiguous(weight);
  const PackedBatch batch(codes, code_offsets, table.size(0), kName);
  const ScalarType sums = pooling::sum_dtype(table);
  pooling::expect_code_weights(code_weights, codes, sums, kName);
  const auto of_codes = torch::stable::contiguous(code_weights);
  const PooledRows out(table, {batch.n_visits, table.size(1)}, mode);
  const auto totals = empty(table, {mode == kMean ? batch.n_visits : 0}, sums);
  dispatch_floating(table.scalar_type(), kName, [&](auto tag) {
    using scalar_t = typename decltype(tag)::type;
    using acc_t = accumulator_t<scalar_t>;
    const WeightedVisits<acc_t> visits{batch.codes, data_of<acc_t>(of_codes),
                                       mode == kMean ? mutable_data_of<acc_t>(totals) : nullptr};
    const auto* rows = data_of<scalar_t>(table);
    auto* pooled = mutable_data_of<scalar_t>(out.pooled);
    const int64_t row_size = table.size(1);
    const auto alignment = Alignment().rows(rows, row_size).rows(pooled, row_size);
    dispatch_columns<scalar_t>(alignment, [&](auto columns) {
      launch_pool<WeightedSum<scalar_t, columns()>>(visits, batch.n_visits, batch.codes_per_visit(),
                                                    row_size, rows, pooled, nullptr,
                                                    device.stream());
    });
  });
  return {out.pooled, totals};
}

// ---------------------------------------------------------------------------------------------
// The gradient of the table

// What a gradient is made from, contiguous.
struct WeightedGradient {
  Tensor grad;
  Tensor of_codes;
  OptionalTensor of_visits;
  Tensor positions;
  PackedIndex index;
  int64_t vocabulary;
  int64_t mode;

  WeightedGradient(const Tensor& grad_, const Tensor& codes, const Tensor& code_offsets,
                   const Tensor& code_weights, const OptionalTensor& totals,
                   const Tensor& index_codes, const Tensor& index_offsets,
                   const Tensor& index_visits, const OptionalTensor& index_positions,
                   int64_t vocabulary_, int64_t mode_, int64_t padding_idx, const char* operation)
      : grad(torch::stable::contiguous(grad_)),
        of_codes(torch::stable::contiguous(code_weights)),
        of_visits(contiguous_or_none(totals)),
        positions(torch::stable::contiguous(required(index_positions, operation))),
        index(index_codes, index_offsets, index_visits, visits_of(grad_, operation), vocabulary_,
              operation),
        vocabulary(vocabulary_),
        mode(mode_) {
    pooling::expect_padding(padding_idx, vocabulary, operation);
    pooling::expect_weighted_mode(mode, operation);
    pooling::expect_gradient(grad, {grad.size(0)}, std::nullopt, mode, operation);
    pooling::expect_packed_codes(codes, code_offsets, operation);
    pooling::expect_int32_row(code_offsets, operation, "code_offsets", grad.size(0) + 1);
    pooling::expect_int32_row(index_visits, operation, "index_visits", codes.size(0));
    pooling::expect_int32_row(positions, operation, "index_positions", codes.size(0));
    const ScalarType sums = pooling::sum_dtype(grad);
    pooling::expect_code_weights(code_weights, codes, sums, operation);
    pooling::expect_totals(totals, grad.size(0), sums, mode, operation);
  }

  static const Tensor& required(const OptionalTensor& index_positions, const char* operation) {
    if (!index_positions.has_value()) {
      refuse(operation, "index_positions", "a tensor on a GPU", "None");
    }
    return *index_positions;
  }
  static int64_t visits_of(const Tensor& grad, const char* operation) {
    expect_dim(grad, operation, "grad", 2, "[n_visits, E]");
    return grad.size(0);
  }

  int64_t row_size() const { return grad.size(1); }

  template <typename scalar_t>
  void launch_into(const GradientRows<scalar_t>& out, cudaStream_t stream) const {
    using acc_t = accumulator_t<scalar_t>;
    const int64_t n_entries = index.view.n_entries;
    Scratch scratch;
    const auto weights_at = scratch.reserve<acc_t>(n_entries);
    scratch.allocate(grad);
    auto* entry_weights = scratch.at<acc_t>(weights_at);
    if (n_entries > 0) {
      launch(weights_of_entries<acc_t>, blocks_for(n_entries, kGradientThreads), kGradientThreads,
             0, stream, index.view, data_of<int32_t>(positions), data_of<acc_t>(of_codes),
             totals_of<acc_t>(of_visits, mode), entry_weights);
    }
    const EntryWeights<acc_t> weights{1, nullptr, nullptr, entry_weights};
    const auto* rows = data_of<scalar_t>(grad);
    const auto alignment = Alignment().rows(rows, row_size()).rows(out.rows, row_size());
    dispatch_columns<scalar_t>(alignment, [&](auto columns) {
      launch_gradients(WeightedGradients<scalar_t, columns()>{{rows}}, index.view, index.count(),
                       n_entries, weights, nullptr, out, vocabulary, row_size(), grad, stream);
    });
  }
};

Tensor packed_weighted_pool_backward(Tensor grad, Tensor codes, Tensor code_offsets,
                                     Tensor code_weights, OptionalTensor totals, Tensor index_codes,
                                     Tensor index_offsets, Tensor index_visits,
                                     OptionalTensor index_positions, int64_t vocabulary,
                                     int64_t mode, int64_t padding_idx) {
  constexpr auto kName = "packed_weighted_pool_backward";
  const OnDeviceOf device(kName, grad, codes, code_offsets, code_weights, totals, index_codes,
                          index_offsets, index_visits, index_positions);
  const WeightedGradient from(grad, codes, code_offsets, code_weights, totals, index_codes,
                              index_offsets, index_visits, index_positions, vocabulary, mode,
                              padding_idx, kName);
  const auto grad_weight = empty(from.grad, {vocabulary, from.row_size()}, grad.scalar_type());
  dispatch_floating(grad.scalar_type(), kName, [&](auto tag) {
    using scalar_t = typename decltype(tag)::type;
    from.launch_into(GradientRows<scalar_t>{mutable_data_of<scalar_t>(grad_weight), nullptr,
                                            padding_idx, false, nullptr},
                     device.stream());
  });
  return grad_weight;
}

std::tuple<Tensor, Tensor> packed_weighted_pool_backward_sparse(
    Tensor grad, Tensor codes, Tensor code_offsets, Tensor code_weights, OptionalTensor totals,
    Tensor index_codes, Tensor index_offsets, Tensor index_visits, OptionalTensor index_positions,
    int64_t vocabulary, int64_t mode, int64_t padding_idx) {
  constexpr auto kName = "packed_weighted_pool_backward_sparse";
  const OnDeviceOf device(kName, grad, codes, code_offsets, code_weights, totals, index_codes,
                          index_offsets, index_visits, index_positions);
  const WeightedGradient from(grad, codes, code_offsets, code_weights, totals, index_codes,
                              index_offsets, index_visits, index_positions, vocabulary, mode,
                              padding_idx, kName);
  const bool has_padding = is_in_index(padding_idx, from.index.codes_tensor);
  const int64_t n_rows = from.index.view.n_codes - (has_padding ? 1 : 0);
  const auto code_ids = empty(from.grad, {n_rows}, ScalarType::Long);
  const auto code_rows = empty(from.grad, {n_rows, from.row_size()}, grad.scalar_type());
  if (n_rows == 0) return {code_ids, code_rows};
  dispatch_floating(grad.scalar_type(), kName, [&](auto tag) {
    using scalar_t = typename decltype(tag)::type;
    from.launch_into(GradientRows<scalar_t>{mutable_data_of<scalar_t>(code_rows),
                                            mutable_data_of<int64_t>(code_ids), padding_idx,
                                            has_padding, nullptr},
                     device.stream());
  });
  return {code_ids, code_rows};
}

// ---------------------------------------------------------------------------------------------
// The gradient of the weights

Tensor packed_weighted_pool_backward_weights(Tensor grad, OptionalTensor pooled,
                                             OptionalTensor totals, Tensor codes,
                                             Tensor code_offsets, Tensor weight, int64_t mode) {
  constexpr auto kName = "packed_weighted_pool_backward_weights";
  const OnDeviceOf device(kName, grad, pooled, totals, codes, code_offsets, weight);
  pooling::expect_table(weight, kName);
  const auto table = torch::stable::contiguous(weight);
  const PackedBatch batch(codes, code_offsets, table.size(0), kName);
  pooling::expect_weights_gradient(grad, pooled, totals, batch.n_visits, table, mode, kName);
  const auto rows = torch::stable::contiguous(grad);
  const auto means = contiguous_or_none(pooled);
  const auto of_visits = contiguous_or_none(totals);
  const int64_t row_size = table.size(1);
  const auto grad_weights = empty(table, {batch.codes.n_codes}, pooling::sum_dtype(table));
  if (batch.n_visits == 0) return grad_weights;
  dispatch_floating(table.scalar_type(), kName, [&](auto tag) {
    using scalar_t = typename decltype(tag)::type;
    using acc_t = accumulator_t<scalar_t>;
    const auto* g = data_of<scalar_t>(rows);
    const auto* w = data_of<scalar_t>(table);
    const auto* o = mode == kMean ? data_of<scalar_t>(*means) : g;
    const auto alignment = Alignment().rows(g, row_size).rows(w, row_size).rows(o, row_size);
    dispatch_columns<scalar_t>(alignment, [&](auto columns) {
      constexpr int kColumns = columns();
      const RowLaunch launch_rows(row_size, kColumns);
      const int64_t groups = kGradientThreads / launch_rows.lanes;
      launch(weight_gradients<scalar_t, kColumns>, grid_over_visits(batch.n_visits, groups, 1),
             kGradientThreads, 0, device.stream(), batch.codes, batch.n_visits, g, w, o,
             totals_of<acc_t>(of_visits, mode), launch_rows.shape,
             mutable_data_of<acc_t>(grad_weights));
    });
  });
  return grad_weights;
}

}  // namespace
}  // namespace ehrseq::cuda

EHRSEQ_CUDA_LIBRARY(m) {
  m.impl("packed_weighted_pool", EHRSEQ_BOX(&ehrseq::cuda::packed_weighted_pool));
  m.impl("packed_weighted_pool_backward", EHRSEQ_BOX(&ehrseq::cuda::packed_weighted_pool_backward));
  m.impl("packed_weighted_pool_backward_sparse",
         EHRSEQ_BOX(&ehrseq::cuda::packed_weighted_pool_backward_sparse));
  m.impl("packed_weighted_pool_backward_weights",
         EHRSEQ_BOX(&ehrseq::cuda::packed_weighted_pool_backward_weights));
}
