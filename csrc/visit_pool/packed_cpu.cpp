// Visit pooling of packed batches on the CPU: codes grouped by visit, with the transposed index
// that the batch builder made. Nothing is padded and nothing is searched for; the modes mean, sum
// and max share the loops of cpu.cpp, and attention adds a softmax over the codes of each visit.

#include <algorithm>
#include <cmath>
#include <string>
#include <tuple>

#include "common/operators.h"
#include "common/parallel.h"
#include "common/tensors.h"
#include "visit_pool/arguments.h"
#include "visit_pool/code_gradients.h"
#include "visit_pool/packed_batch.h"
#include "visit_pool/segments.h"
#include "visit_pool/table_gradient.h"
#include "visit_pool/winners.h"

namespace ehrseq {
namespace {

// ---------------------------------------------------------------------------------------------
// Mean, sum, max

std::tuple<Tensor, Tensor> packed_visit_pool(Tensor codes, Tensor code_offsets, Tensor weight,
                                             int64_t mode) {
  constexpr auto kName = "packed_visit_pool";
  expect_on_cpu(kName, weight);
  pooling::expect_table(weight, kName);
  pooling::expect_mode(mode, kName);
  const auto table = made_contiguous(weight);
  const auto in = packed_batch(codes, code_offsets, table.size(0), kName);
  const int64_t row_size = table.size(1);
  const std::vector<int64_t> shape{in.n_visits, row_size};
  auto pooled = empty(table, shape, table.scalar_type());
  auto arg_max = empty(table, mode == kMax ? shape : std::vector<int64_t>{0}, ScalarType::Int);

  dispatch_floating(table.scalar_type(), kName, [&](auto scalar_tag) {
    using scalar_t = typename decltype(scalar_tag)::type;
    using acc_t = accumulator_t<scalar_t>;
    const auto* rows = static_cast<const scalar_t*>(table.data_ptr());
    auto* out = static_cast<scalar_t*>(pooled.data_ptr());
    auto* winners = static_cast<int32_t*>(arg_max.data_ptr());
    const int64_t grain = in.visits_worth_a_thread(row_size * sizeof(scalar_t));
    parallel_for(0, in.n_visits, grain, [&](int64_t begin, int64_t end) {
      if (mode == kMax) {
        row_kernels<scalar_t>().max_segments(rows, row_size, in.codes, in.codes, in.offsets, begin,
                                             end, out + begin * row_size,
                                             winners + begin * row_size);
        return;
      }
      std::vector<acc_t> scales(mode == kMean ? end - begin : 0);
      for (size_t i = 0; i < scales.size(); ++i) {
        const int32_t count = in.offsets[begin + i + 1] - in.offsets[begin + i];
        scales[i] = acc_t(1) / static_cast<acc_t>(std::max(count, 1));
      }
      const Segments<acc_t> segments{in.codes, nullptr, mode == kMean ? scales.data() : nullptr,
                                     in.offsets + begin};
      row_kernels<scalar_t>().sum_segments(rows, row_size, segments, 0, end - begin,
                                           out + begin * row_size);
    });
  });
  return {pooled, arg_max};
}

// What each entry of a code multiplies its visit's gradient by: 1 / (codes of the visit).
template <typename acc_t>
std::vector<acc_t> mean_weights(const PackedIndex& index, const int32_t* code_offsets) {
  std::vector<acc_t> weights(index.n_entries);
  parallel_for(0, index.n_entries, 4 * kEntriesPerTask, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int32_t visit = index.visits[i];
      weights[i] = acc_t(1) / static_cast<acc_t>(code_offsets[visit + 1] - code_offsets[visit]);
    }
  });
  return weights;
}

// What a gradient is made from, checked, contiguous.
struct PackedGradient {
  Tensor rows;
  Tensor offsets;
  Winners winners;
  int64_t mode;
  PackedIndex index;

  PackedGradient(const Tensor& grad, const Tensor& code_offsets, const Tensor& index_codes,
                 const Tensor& index_offsets, const Tensor& index_visits, int64_t vocabulary,
                 const OptionalTensor& arg_max, int64_t mode_, int64_t padding_idx,
                 const char* operation)
      : rows(made_contiguous(grad)),
        offsets(made_contiguous(code_offsets)),
        winners(arg_max, mode_),
        mode(mode_) {
    expect_on_cpu(operation, grad, code_offsets, arg_max);
    pooling::expect_padding(padding_idx, vocabulary, operation);
    expect_dim(grad, operation, "grad", 2, "[n_visits, E]");
    pooling::expect_gradient(grad, {grad.size(0)}, arg_max, mode, operation);
    pooling::expect_int32_row(code_offsets, operation, "code_offsets", grad.size(0) + 1);
    index =
        packed_index(index_codes, index_offsets, index_visits, grad.size(0), vocabulary, operation);
    expect_rising(offsets_data(), grad.size(0), index.n_entries, operation);
  }

  int64_t row_size() const { return rows.size(1); }
  const int32_t* offsets_data() const { return static_cast<const int32_t*>(offsets.data_ptr()); }

  // Sums the gradient of every code and passes it to finish(segment, sums).
  template <typename scalar_t, typename Finish>
  void sum(const Finish& finish) const {
    using acc_t = accumulator_t<scalar_t>;
    const auto weights =
        mode == kMean ? mean_weights<acc_t>(index, offsets_data()) : std::vector<acc_t>();
    const IndexView<acc_t> view{index.codes, index.offsets, index.visits,
                                mode == kMean ? weights.data() : nullptr, index.n_codes};
    sum_code_gradients(static_cast<const scalar_t*>(rows.data_ptr()), winners.get(), row_size(),
                       view, finish);
  }
};

Tensor packed_visit_pool_backward(Tensor grad, Tensor code_offsets, Tensor index_codes,
                                  Tensor index_offsets, Tensor index_visits, int64_t vocabulary,
                                  OptionalTensor arg_max, int64_t mode, int64_t padding_idx) {
  constexpr auto kName = "packed_visit_pool_backward";
  const PackedGradient from(grad, code_offsets, index_codes, index_offsets, index_visits,
                            vocabulary, arg_max, mode, padding_idx, kName);
  return dense_gradient(from, vocabulary, padding_idx, kName);
}

std::tuple<Tensor, Tensor> packed_visit_pool_backward_sparse(
    Tensor grad, Tensor code_offsets, Tensor index_codes, Tensor index_offsets, Tensor index_visits,
    int64_t vocabulary, OptionalTensor arg_max, int64_t mode, int64_t padding_idx) {
  constexpr auto kName = "packed_visit_pool_backward_sparse";
  const PackedGradient from(grad, code_offsets, index_codes, index_offsets, index_visits,
                            vocabulary, arg_max, mode, padding_idx, kName);
  return sparse_gradient(from, padding_idx, kName);
}

// ---------------------------------------------------------------------------------------------
// Attention: a softmax of the codes' scores within each visit

// Softmax statistics of a visit's scores: attention is exp(score - highest) * inverse, with inverse
// = 1 / (sum of exponentials). Not one log-sum-exp: added to a large score, the logarithm of the
// sum would be rounded away. In double, as the difference of two scores near 1,000 would be, too.
struct SoftmaxStats {
  double highest;
  double inverse;
};

// Of an empty visit, which has no codes to give weights to: {-inf, 1}. A NaN makes `inverse` one.
template <typename scalar_t>
SoftmaxStats softmax_stats_of(const scalar_t* scores, const int32_t* codes, int32_t begin,
                              int32_t end) {
  double highest = -INFINITY;
  for (int32_t i = begin; i < end; ++i) {
    highest = std::max(highest, static_cast<double>(scores[codes[i]]));
  }
  double total = 0;
  for (int32_t i = begin; i < end; ++i) {
    total += std::exp(static_cast<double>(scores[codes[i]]) - highest);
  }
  return {highest, total == 0 ? 1 : 1 / total};
}

template <typename acc_t, typename scalar_t>
acc_t attention_of(scalar_t score, const SoftmaxStats& stats) {
  const double below = static_cast<double>(score) - stats.highest;
  return std::exp(static_cast<acc_t>(below)) * static_cast<acc_t>(stats.inverse);
}

std::tuple<Tensor, Tensor, Tensor> packed_attention_pool(Tensor codes, Tensor code_offsets,
                                                         Tensor weight, Tensor scores) {
  constexpr auto kName = "packed_attention_pool";
  expect_on_cpu(kName, weight, scores);
  pooling::expect_table(weight, kName);
  pooling::expect_scores(scores, weight, kName);
  const auto table = made_contiguous(weight);
  const auto score = made_contiguous(scores);
  const auto in = packed_batch(codes, code_offsets, table.size(0), kName);
  const int64_t row_size = table.size(1);
  auto pooled = empty(table, {in.n_visits, row_size}, table.scalar_type());
  auto highest = empty(table, {in.n_visits}, ScalarType::Double);
  auto inverse = empty(table, {in.n_visits}, ScalarType::Double);
  dispatch_floating(table.scalar_type(), kName, [&](auto scalar_tag) {
    using scalar_t = typename decltype(scalar_tag)::type;
    using acc_t = accumulator_t<scalar_t>;
    const auto* rows = static_cast<const scalar_t*>(table.data_ptr());
    const auto* code_scores = static_cast<const scalar_t*>(score.data_ptr());
    auto* highest_scores = static_cast<double*>(highest.data_ptr());
    auto* inverses = static_cast<double*>(inverse.data_ptr());
    auto* out = static_cast<scalar_t*>(pooled.data_ptr());
    const int64_t grain = in.visits_worth_a_thread(row_size * sizeof(scalar_t));
    parallel_for(0, in.n_visits, grain, [&](int64_t begin, int64_t end) {
      const int32_t first_entry = in.offsets[begin];
      std::vector<acc_t> attention(in.offsets[end] - first_entry);
      std::vector<int32_t> offsets(end - begin + 1, 0);
      for (int64_t visit = begin; visit < end; ++visit) {
        const int32_t from = in.offsets[visit];
        const int32_t to = in.offsets[visit + 1];
        const SoftmaxStats stats = softmax_stats_of(code_scores, in.codes, from, to);
        highest_scores[visit] = stats.highest;
        inverses[visit] = stats.inverse;
        for (int32_t i = from; i < to; ++i) {
          attention[i - first_entry] = attention_of<acc_t>(code_scores[in.codes[i]], stats);
        }
        offsets[visit - begin + 1] = to - first_entry;
      }
      const Segments<acc_t> segments{in.codes + first_entry, attention.data(), nullptr,
                                     offsets.data()};
      row_kernels<scalar_t>().sum_segments(rows, row_size, segments, 0, end - begin,
                                           out + begin * row_size);
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
  expect_on_cpu(kName, grad, pooled, highest, inverse, weight, scores);
  pooling::expect_table(weight, kName);
  pooling::expect_scores(scores, weight, kName);
  pooling::expect_attention_gradient(grad, pooled, highest, inverse, weight, kName);
  pooling::expect_padding(padding_idx, weight.size(0), kName);
  const auto rows = made_contiguous(grad);
  const auto table = made_contiguous(weight);
  const auto outputs = made_contiguous(pooled);
  const auto score = made_contiguous(scores);
  const auto highest_of = made_contiguous(highest);
  const auto inverse_of = made_contiguous(inverse);
  const int64_t row_size = table.size(1);
  const int64_t vocabulary = table.size(0);
  const auto index =
      packed_index(index_codes, index_offsets, index_visits, rows.size(0), vocabulary, kName);
  auto grad_weight = empty(rows, {vocabulary, row_size}, rows.scalar_type());
  auto grad_scores = empty(rows, {vocabulary}, rows.scalar_type());
  dispatch_floating(rows.scalar_type(), kName, [&](auto scalar_tag) {
    using scalar_t = typename decltype(scalar_tag)::type;
    using acc_t = accumulator_t<scalar_t>;
    const auto* visit_grads = static_cast<const scalar_t*>(rows.data_ptr());
    const auto* code_scores = static_cast<const scalar_t*>(score.data_ptr());
    const auto* highest_scores = static_cast<const double*>(highest_of.data_ptr());
    const auto* inverses = static_cast<const double*>(inverse_of.data_ptr());
    auto* out = static_cast<scalar_t*>(grad_weight.data_ptr());
    auto* out_scores = static_cast<scalar_t*>(grad_scores.data_ptr());

    std::vector<acc_t> attention(index.n_entries);
    // an exponential for each entry
    const int64_t codes_apart = grain_of_bytes(index.n_codes, index.n_entries * 128);
    parallel_for(0, index.n_codes, codes_apart, [&](int64_t begin, int64_t end) {
      for (int64_t segment = begin; segment < end; ++segment) {
        const auto code_score = code_scores[index.codes[segment]];
        for (int32_t i = index.offsets[segment]; i < index.offsets[segment + 1]; ++i) {
          const int32_t visit = index.visits[i];
          attention[i] = attention_of<acc_t>(code_score, {highest_scores[visit], inverses[visit]});
        }
      }
    });
    const IndexView<acc_t> view{index.codes, index.offsets, index.visits, attention.data(),
                                index.n_codes};

    zero_absent_rows(index.codes, index.n_codes, vocabulary, row_size, out);
    sum_code_gradients(visit_grads, nullptr, row_size, view,
                       [&](int64_t segment, const acc_t* sums) {
                         write_row(sums, row_size, out + index.codes[segment] * row_size);
                       });
    if (padding_idx >= 0) {
      std::fill_n(out + padding_idx * row_size, row_size, static_cast<scalar_t>(0.0f));
    }
    zero_absent_rows(index.codes, index.n_codes, vocabulary, 1, out_scores);
    const int64_t moved = 3 * index.n_entries * row_size * sizeof(scalar_t);
    const int64_t grain = grain_of_bytes(index.n_codes, moved);
    parallel_for(0, index.n_codes, grain, [&](int64_t begin, int64_t end) {
      row_kernels<scalar_t>().sum_score_gradients(
          visit_grads, static_cast<const scalar_t*>(table.data_ptr()),
          static_cast<const scalar_t*>(outputs.data_ptr()), row_size, view, begin, end, out_scores);
    });
  });
  return {grad_weight, grad_scores};
}

}  // namespace
}  // namespace ehrseq

STABLE_TORCH_LIBRARY_IMPL(ehrseq_fast, CPU, m) {
  m.impl("packed_visit_pool", EHRSEQ_BOX(&ehrseq::packed_visit_pool));
  m.impl("packed_visit_pool_backward", EHRSEQ_BOX(&ehrseq::packed_visit_pool_backward));
  m.impl("packed_visit_pool_backward_sparse",
         EHRSEQ_BOX(&ehrseq::packed_visit_pool_backward_sparse));
  m.impl("packed_attention_pool", EHRSEQ_BOX(&ehrseq::packed_attention_pool));
  m.impl("packed_attention_pool_backward", EHRSEQ_BOX(&ehrseq::packed_attention_pool_backward));
}
