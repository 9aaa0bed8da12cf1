// Visit pooling of packed batches on the GPU: what each operator launches. Nothing is padded, and
// the transposed index comes with the batch.

#include <algorithm>
#include <tuple>

#include "common/cuda/launch.h"
#include "common/operators.h"
#include "visit_pool/arguments.h"
#include "visit_pool/cuda_launch.h"
#include "visit_pool/packed_cuda.h"
#include "visit_pool/winners.h"

namespace ehrseq::cuda {
namespace {

// ---------------------------------------------------------------------------------------------
// Mean, sum, max

std::tuple<Tensor, Tensor> packed_visit_pool(Tensor codes, Tensor code_offsets, Tensor weight,
                                             int64_t mode) {
  constexpr auto kName = "packed_visit_pool";
  const OnDeviceOf device(kName, weight, codes, code_offsets);
  pooling::expect_table(weight, kName);
  pooling::expect_mode(mode, kName);
  const auto table = torch::stable::contiguous(weight);
  const PackedBatch batch(codes, code_offsets, table.size(0), kName);
  const PooledRows out(table, {batch.n_visits, table.size(1)}, mode);
  dispatch_floating(table.scalar_type(), kName, [&](auto tag) {
    using scalar_t = typename decltype(tag)::type;
    const PackedVisits<accumulator_t<scalar_t>> visits{batch.codes, mode == kMean};
    pool_in_mode<scalar_t>(mode, visits, batch.n_visits, batch.codes_per_visit(), table, out,
                           device.stream());
  });
  return {out.pooled, out.arg_max};
}

// What a gradient is made from, contiguous.
struct PackedGradient {
  Tensor grad;
  Tensor offsets;
  Winners winners;
  int64_t vocabulary;
  int64_t row_size;
  int64_t mode;

  PackedGradient(const Tensor& grad_, const Tensor& offsets_, const OptionalTensor& arg_max,
                 int64_t vocabulary_, int64_t mode_, int64_t padding_idx, const char* operation)
      : grad(torch::stable::contiguous(grad_)),
        offsets(torch::stable::contiguous(offsets_)),
        winners(arg_max, mode_),
        vocabulary(vocabulary_),
        mode(mode_) {
    pooling::expect_padding(padding_idx, vocabulary, operation);
    expect_dim(grad, operation, "grad", 2, "[n_visits, E]");
    pooling::expect_gradient(grad, {grad.size(0)}, arg_max, mode, operation);
    pooling::expect_int32_row(offsets_, operation, "code_offsets", grad.size(0) + 1);
    row_size = grad.size(1);
  }

  template <typename scalar_t>
  void launch_into(const GradientRows<scalar_t>& out, const PackedIndex& index,
                   cudaStream_t stream) const {
    const EntryWeights<accumulator_t<scalar_t>> weights{
        1, mode == kMean ? data_of<int32_t>(offsets) : nullptr, nullptr, nullptr};
    gradients_in_mode<scalar_t>(mode, data_of<scalar_t>(grad), winners.get(), index.view,
                                index.count(), index.view.n_entries, weights, out, vocabulary,
                                row_size, grad, stream);
  }
};

Tensor packed_visit_pool_backward(Tensor grad, Tensor code_offsets, Tensor index_codes,
                                  Tensor index_offsets, Tensor index_visits, int64_t vocabulary,
                                  OptionalTensor arg_max, int64_t mode, int64_t padding_idx) {
  constexpr auto kName = "packed_visit_pool_backward";
  const OnDeviceOf device(kName, grad, code_offsets, index_codes, index_offsets, index_visits,
                          arg_max);
  const PackedGradient from(grad, code_offsets, arg_max, vocabulary, mode, padding_idx, kName);
  const PackedIndex index(index_codes, index_offsets, index_visits, from.grad.size(0), vocabulary,
                          kName);
  const auto grad_weight = empty(from.grad, {vocabulary, from.row_size}, from.grad.scalar_type());
  dispatch_floating(grad_weight.scalar_type(), kName, [&](auto tag) {
    using scalar_t = typename decltype(tag)::type;
    const GradientRows<scalar_t> out{mutable_data_of<scalar_t>(grad_weight), nullptr, padding_idx,
                                     false, nullptr};
    from.launch_into(out, index, device.stream());
  });
  return grad_weight;
}

std::tuple<Tensor, Tensor> packed_visit_pool_backward_sparse(
    Tensor grad, Tensor code_offsets, Tensor index_codes, Tensor index_offsets, Tensor index_visits,
    int64_t vocabulary, OptionalTensor arg_max, int64_t mode, int64_t padding_idx) {
  constexpr auto kName = "packed_visit_pool_backward_sparse";
  const OnDeviceOf device(kName, grad, code_offsets, index_codes, index_offsets, index_visits,
                          arg_max);
  const PackedGradient from(grad, code_offsets, arg_max, vocabulary, mode, padding_idx, kName);
  const PackedIndex index(index_codes, index_offsets, index_visits, from.grad.size(0), vocabulary,
                          kName);
  const bool has_padding = is_in_index(padding_idx, index.codes_tensor);
  const int64_t n_rows = index.view.n_codes - (has_padding ? 1 : 0);
  const auto code_ids = empty(from.grad, {n_rows}, ScalarType::Long);
  const auto code_rows = empty(from.grad, {n_rows, from.row_size}, from.grad.scalar_type());
  if (n_rows == 0) return {code_ids, code_rows};
  dispatch_floating(code_rows.scalar_type(), kName, [&](auto tag) {
    using scalar_t = typename decltype(tag)::type;
    const GradientRows<scalar_t> out{mutable_data_of<scalar_t>(code_rows),
                                     mutable_data_of<int64_t>(code_ids), padding_idx, has_padding,
                                     nullptr};
    from.launch_into(out, index, device.stream());
  });
  return {code_ids, code_rows};
}

// ---------------------------------------------------------------------------------------------
// Attention: a softmax of the codes' scores within each visit

// Only read in the backward pass.
SoftmaxStatsArrays softmax_stats_of(const Tensor& highest, const Tensor& inverse) {
  return {const_cast<double*>(data_of<double>(highest)),
          const_cast<double*>(data_of<double>(inverse))};
}

std::tuple<Tensor, Tensor, Tensor> packed_attention_pool(Tensor codes, Tensor code_offsets,
                                                         Tensor weight, Tensor scores) {
  constexpr auto kName = "packed_attention_pool";
  const OnDeviceOf device(kName, weight, codes, code_offsets, scores);
  pooling::expect_table(weight, kName);
  pooling::expect_scores(scores, weight, kName);
  const auto table = torch::stable::contiguous(weight);
  const auto code_scores = torch::stable::contiguous(scores);
  const PackedBatch batch(codes, code_offsets, table.size(0), kName);
  const int64_t row_size = table.size(1);
  const auto pooled = empty(table, {batch.n_visits, row_size}, table.scalar_type());
  const auto highest = empty(table, {batch.n_visits}, ScalarType::Double);
  const auto inverse = empty(table, {batch.n_visits}, ScalarType::Double);
  dispatch_floating(table.scalar_type(), kName, [&](auto tag) {
    using scalar_t = typename decltype(tag)::type;
    const AttentiveVisits<scalar_t> visits{
        batch.codes,
        data_of<scalar_t>(code_scores),
        {mutable_data_of<double>(highest), mutable_data_of<double>(inverse)}};
    const auto* rows = data_of<scalar_t>(table);
    auto* out = mutable_data_of<scalar_t>(pooled);
    const auto alignment = Alignment().rows(rows, row_size).rows(out, row_size);
    dispatch_columns<scalar_t>(alignment, [&](auto columns) {
      launch_pool<WeightedSum<scalar_t, columns()>>(visits, batch.n_visits, batch.codes_per_visit(),
                                                    row_size, rows, out, nullptr, device.stream());
    });
  });
  return {pooled, highest, inverse};
}

std::tuple<Tensor, Tensor> packed_attention_pool_backward(Tensor grad, Tensor pooled,
                                                          Tensor highest, Tensor inverse,
                                                          Tensor index_codes, Tensor index_offsets,
                                                          Tensor index_visits, Tensor weight,
                                                          Tensor scores, int64_t padding_idx) {
  constexpr auto kName = "packed_attention_pool_backward";
  const OnDeviceOf device(kName, grad, pooled, highest, inverse, index_codes, index_offsets,
                          index_visits, weight, scores);
  pooling::expect_table(weight, kName);
  pooling::expect_scores(scores, weight, kName);
  pooling::expect_attention_gradient(grad, pooled, highest, inverse, weight, kName);
  pooling::expect_padding(padding_idx, weight.size(0), kName);
  const auto rows = torch::stable::contiguous(grad);
  const auto table = torch::stable::contiguous(weight);
  const auto outputs = torch::stable::contiguous(pooled);
  const auto highest_of = torch::stable::contiguous(highest);
  const auto inverse_of = torch::stable::contiguous(inverse);
  const auto code_scores = torch::stable::contiguous(scores);
  const int64_t vocabulary = table.size(0);
  const int64_t row_size = table.size(1);
  const PackedIndex index(index_codes, index_offsets, index_visits, rows.size(0), vocabulary,
                          kName);
  const auto grad_weight = empty(rows, {vocabulary, row_size}, rows.scalar_type());
  const auto grad_scores = empty(rows, {vocabulary}, rows.scalar_type());
  dispatch_floating(rows.scalar_type(), kName, [&](auto tag) {
    using scalar_t = typename decltype(tag)::type;
    using acc_t = accumulator_t<scalar_t>;
    const int64_t n_entries = index.view.n_entries;
    Scratch scratch;
    const auto attention_at = scratch.reserve<acc_t>(n_entries);
    const auto terms_at = scratch.reserve<acc_t>(n_entries);
    scratch.allocate(rows);
    auto* attention = scratch.at<acc_t>(attention_at);
    auto* terms = scratch.at<acc_t>(terms_at);
    const EntryWeights<acc_t> weights{1, nullptr, nullptr, attention};
    const GradientRows<scalar_t> out{mutable_data_of<scalar_t>(grad_weight), nullptr, padding_idx,
                                     false, mutable_data_of<scalar_t>(grad_scores)};
    const auto* g = data_of<scalar_t>(rows);
    const auto* w = data_of<scalar_t>(table);
    const auto* o = data_of<scalar_t>(outputs);
    const auto alignment =
        Alignment().rows(g, row_size).rows(w, row_size).rows(o, row_size).rows(out.rows, row_size);
    dispatch_columns<scalar_t>(alignment, [&](auto columns) {
      constexpr int kColumns = columns();
      const RowLaunch launch_rows(row_size, kColumns);
      launch(weigh_entries<scalar_t, kColumns>, blocks_for(n_entries, kGradientThreads),
             kGradientThreads, 0, device.stream(), index.view, g, w, o,
             data_of<scalar_t>(code_scores), softmax_stats_of(highest_of, inverse_of),
             launch_rows.shape, attention, terms);
      launch_gradients(VisitGradients<scalar_t, kColumns>{g}, index.view, index.count(), n_entries,
                       weights, terms, out, vocabulary, row_size, rows, device.stream());
    });
  });
  return {grad_weight, grad_scores};
}

}  // namespace
}  // namespace ehrseq::cuda

EHRSEQ_CUDA_LIBRARY(m) {
  m.impl("packed_visit_pool", EHRSEQ_BOX(&ehrseq::cuda::packed_visit_pool));
  m.impl("packed_visit_pool_backward", EHRSEQ_BOX(&ehrseq::cuda::packed_visit_pool_backward));
  m.impl("packed_visit_pool_backward_sparse",
         EHRSEQ_BOX(&ehrseq::cuda::packed_visit_pool_backward_sparse));
  m.impl("packed_attention_pool", EHRSEQ_BOX(&ehrseq::cuda::packed_attention_pool));
  m.impl("packed_attention_pool_backward",
         EHRSEQ_BOX(&ehrseq::cuda::packed_attention_pool_backward));
}
