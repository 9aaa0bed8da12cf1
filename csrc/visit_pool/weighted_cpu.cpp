// Visit pooling of packed batches with weights per code on the CPU, in modes mean and sum. A weight
// of zero is to a code what a mask's zero is to a padded slot: its row is not read, and gets
// nothing.

#include <algorithm>
#include <cmath>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "common/operators.h"
#include "common/parallel.h"
#include "common/tensors.h"
#include "visit_pool/arguments.h"
#include "visit_pool/code_gradients.h"
#include "visit_pool/packed_batch.h"
#include "visit_pool/segments.h"
#include "visit_pool/table_gradient.h"

namespace ehrseq {
namespace {

template <typename acc_t>
acc_t mean_scale(acc_t total) {
  return acc_t(1) / (total < acc_t(1) ? acc_t(1) : total);
}

// Which entries are left out, by their weights as they were given.
struct OfNoWeight {
  template <typename acc_t>
  bool operator()(acc_t weight) const {
    return weight == acc_t(0);
  }
};

// By their weights over the visits' totals, where -0 stands for a weight of zero: a product may be
// zero itself, of a total of infinity for one, and what it multiplies a NaN to must show.
struct MarkedAsNone {
  template <typename acc_t>
  bool operator()(acc_t product) const {
    return product == acc_t(0) && std::signbit(product);
  }
};

template <typename acc_t, typename LeftOut>
bool leaves_any_out(const acc_t* weights, int64_t count, const LeftOut& is_left_out) {
  bool found = false;
  for (int64_t i = 0; i < count; ++i) found |= is_left_out(weights[i]);
  return found;
}

// Entries without those that are left out; the segments stay.
template <typename acc_t>
struct WeightedEntries {
  std::vector<int32_t> rows;
  std::vector<acc_t> weights;
  std::vector<int32_t> offsets;

  // `offsets` of segments in `all_rows` and `all_weights`.
  template <typename LeftOut>
  WeightedEntries(const int32_t* all_rows, const acc_t* all_weights, const int32_t* all_offsets,
                  int64_t n_segments, const LeftOut& is_left_out)
      : rows(all_offsets[n_segments] - all_offsets[0]), weights(rows.size()), offsets(1, 0) {
    offsets.reserve(n_segments + 1);
    int32_t count = 0;
    for (int64_t segment = 0; segment < n_segments; ++segment) {
      for (int32_t i = all_offsets[segment]; i < all_offsets[segment + 1]; ++i) {
        rows[count] = all_rows[i];
        weights[count] = all_weights[i];
        count += !is_left_out(all_weights[i]);
      }
      offsets.push_back(count);
    }
  }
};

std::tuple<Tensor, Tensor> packed_weighted_pool(Tensor codes, Tensor code_offsets, Tensor weight,
                                                Tensor code_weights, int64_t mode) {
  constexpr auto kName = "packed_weighted_pool";
  expect_on_cpu(kName, weight, code_weights);
  pooling::expect_table(weight, kName);
  pooling::expect_weighted_mode(mode, kName);
  const auto table = made_contiguous(weight);
  const auto in = packed_batch(codes, code_offsets, table.size(0), kName);
  const ScalarType sums = pooling::sum_dtype(table);
  pooling::expect_code_weights(code_weights, codes, sums, kName);
  const auto of_codes = made_contiguous(code_weights);
  const int64_t row_size = table.size(1);
  auto pooled = empty(table, {in.n_visits, row_size}, table.scalar_type());
  auto totals = empty(table, {mode == kMean ? in.n_visits : 0}, sums);

  dispatch_floating(table.scalar_type(), kName, [&](auto scalar_tag) {
    using scalar_t = typename decltype(scalar_tag)::type;
    using acc_t = accumulator_t<scalar_t>;
    const auto* rows = static_cast<const scalar_t*>(table.data_ptr());
    const auto* weights = static_cast<const acc_t*>(of_codes.data_ptr());
    auto* out = static_cast<scalar_t*>(pooled.data_ptr());
    auto* of_visits = static_cast<acc_t*>(totals.data_ptr());
    const int64_t grain = in.visits_worth_a_thread(row_size * sizeof(scalar_t));
    parallel_for(0, in.n_visits, grain, [&](int64_t begin, int64_t end) {
      std::vector<acc_t> scales(mode == kMean ? end - begin : 0);
      for (size_t i = 0; i < scales.size(); ++i) {
        acc_t total = 0;
        for (int32_t at = in.offsets[begin + i]; at < in.offsets[begin + i + 1]; ++at) {
          total += weights[at];
        }
        of_visits[begin + i] = total;
        scales[i] = mean_scale(total);
      }
      const int32_t* offsets = in.offsets + begin;
      Segments<acc_t> segments{in.codes, weights, mode == kMean ? scales.data() : nullptr, offsets};
      std::optional<WeightedEntries<acc_t>> kept;
      if (leaves_any_out(weights + offsets[0], in.offsets[end] - offsets[0], OfNoWeight())) {
        kept.emplace(in.codes, weights, offsets, end - begin, OfNoWeight());
        segments.rows = kept->rows.data();
        segments.weights = kept->weights.data();
        segments.offsets = kept->offsets.data();
      }
      row_kernels<scalar_t>().sum_segments(rows, row_size, segments, 0, end - begin,
                                           out + begin * row_size);
    });
  });
  return {pooled, totals};
}

// ---------------------------------------------------------------------------------------------
// The gradient of the table

// The next entry of each code's segment: by a table of all codes up to the index's last, or by
// search where such a table would be much longer than the batch.
class NextEntries {
 public:
  explicit NextEntries(const PackedIndex& index) : index_(index) {
    const int64_t last = index.n_codes > 0 ? index.codes[index.n_codes - 1] : -1;
    by_code_ = last <= 65536 + 16 * index.n_entries;
    next_.assign(by_code_ ? last + 1 : index.n_codes, static_cast<int32_t>(index.n_entries));
    for (int64_t i = 0; i < index.n_codes; ++i) {
      next_[by_code_ ? index.codes[i] : i] = index.offsets[i];
    }
  }

  // n_entries, or more, where there is none.
  int64_t take(int32_t code) {
    int64_t place = code;
    if (!by_code_) place = segment_of(code);
    return place < static_cast<int64_t>(next_.size()) ? next_[place]++ : index_.n_entries;
  }

  // Whether every segment has been taken to its end.
  bool are_taken() const {
    bool taken = true;
    for (int64_t i = 0; i < index_.n_codes; ++i) {
      taken &= next_[by_code_ ? index_.codes[i] : i] == index_.offsets[i + 1];
    }
    return taken;
  }

 private:
  int64_t segment_of(int32_t code) const {
    const int32_t* end = index_.codes + index_.n_codes;
    const int32_t* found = std::lower_bound(index_.codes, end, code);
    return found != end && *found == code ? found - index_.codes : index_.n_codes;
  }

  const PackedIndex& index_;
  bool by_code_;
  std::vector<int32_t> next_;
};

// What each entry of the index multiplies its visit's gradient by, in the index's order: a visit's
// scale times the weight, or -0 (MarkedAsNone). By one pass over the codes, each of which takes the
// next entry of its segment.
template <typename acc_t>
std::vector<acc_t> weights_of_entries(const PackedBatch& in, const PackedIndex& index,
                                      const acc_t* weights, const acc_t* totals,
                                      const char* operation) {
  NextEntries next(index);
  std::vector<acc_t> of_entries(index.n_entries);
  bool found = true;
  for (int64_t visit = 0; visit < in.n_visits; ++visit) {
    const acc_t scale = totals == nullptr ? acc_t(1) : mean_scale(totals[visit]);
    for (int32_t i = in.offsets[visit]; i < in.offsets[visit + 1]; ++i) {
      const int64_t entry = next.take(in.codes[i]);
      if (entry < index.n_entries) {
        // -0 + 0 is 0
        of_entries[entry] = weights[i] == acc_t(0) ? acc_t(-0.0) : scale * weights[i] + acc_t(0);
      } else {
        found = false;
      }
    }
  }
  if (!found || !next.are_taken()) {
    refuse(operation, "index_codes", "the index of these codes", "that of others");
  }
  return of_entries;
}

// What a gradient is made from, checked, contiguous.
struct WeightedGradient {
  Tensor rows;
  PackedBatch batch;
  PackedIndex index;
  Tensor of_codes;
  OptionalTensor of_visits;
  int64_t vocabulary;
  int64_t mode;
  const char* operation;

  WeightedGradient(const Tensor& grad, const Tensor& codes, const Tensor& code_offsets,
                   const Tensor& code_weights, const OptionalTensor& totals,
                   const Tensor& index_codes, const Tensor& index_offsets,
                   const Tensor& index_visits, const OptionalTensor& index_positions,
                   int64_t vocabulary_, int64_t mode_, int64_t padding_idx, const char* operation_)
      : rows(made_contiguous(grad)),
        of_codes(made_contiguous(code_weights)),
        of_visits(contiguous_or_none(totals)),
        vocabulary(vocabulary_),
        mode(mode_),
        operation(operation_) {
    expect_on_cpu(operation, grad, code_weights, totals, index_positions);
    pooling::expect_padding(padding_idx, vocabulary, operation);
    pooling::expect_weighted_mode(mode, operation);
    expect_dim(grad, operation, "grad", 2, "[n_visits, E]");
    pooling::expect_gradient(grad, {grad.size(0)}, std::nullopt, mode, operation);
    batch = packed_batch(codes, code_offsets, vocabulary, operation);
    pooling::expect_int32_row(code_offsets, operation, "code_offsets", grad.size(0) + 1);
    const ScalarType sums = pooling::sum_dtype(grad);
    pooling::expect_code_weights(code_weights, codes, sums, operation);
    pooling::expect_totals(totals, grad.size(0), sums, mode, operation);
    index =
        packed_index(index_codes, index_offsets, index_visits, grad.size(0), vocabulary, operation);
    if (index_positions.has_value()) {  // not needed
      pooling::expect_int32_row(*index_positions, operation, "index_positions", codes.size(0));
    }
    if (index.n_entries != codes.size(0)) {
      refuse(operation, "index_visits",
             "one for each of " + std::to_string(codes.size(0)) + " codes",
             std::to_string(index.n_entries));
    }
  }

  int64_t row_size() const { return rows.size(1); }

  // Sums the gradient of every code of the index and passes it to finish(segment, sums).
  template <typename scalar_t, typename Finish>
  void sum(const Finish& finish) const {
    using acc_t = accumulator_t<scalar_t>;
    const auto* totals =
        mode == kMean ? static_cast<const acc_t*>(of_visits->const_data_ptr()) : nullptr;
    const auto* weights_of_codes = static_cast<const acc_t*>(of_codes.data_ptr());
    const auto weights = weights_of_entries(batch, index, weights_of_codes, totals, operation);
    IndexView<acc_t> view{index.codes, index.offsets, index.visits, weights.data(), index.n_codes};
    std::optional<WeightedEntries<acc_t>> kept;
    if (leaves_any_out(weights.data(), index.n_entries, MarkedAsNone())) {
      kept.emplace(index.visits, weights.data(), index.offsets, index.n_codes, MarkedAsNone());
      view = {index.codes, kept->offsets.data(), kept->rows.data(), kept->weights.data(),
              index.n_codes};
      const std::vector<acc_t> zeros(row_size());
      for (int64_t segment = 0; segment < index.n_codes; ++segment) {
        if (view.offsets[segment] == view.offsets[segment + 1]) finish(segment, zeros.data());
      }
    }
    sum_code_gradients(static_cast<const scalar_t*>(rows.data_ptr()), nullptr, row_size(), view,
                       finish);
  }
};

Tensor packed_weighted_pool_backward(Tensor grad, Tensor codes, Tensor code_offsets,
                                     Tensor code_weights, OptionalTensor totals, Tensor index_codes,
                                     Tensor index_offsets, Tensor index_visits,
                                     OptionalTensor index_positions, int64_t vocabulary,
                                     int64_t mode, int64_t padding_idx) {
  constexpr auto kName = "packed_weighted_pool_backward";
  const WeightedGradient from(grad, codes, code_offsets, code_weights, totals, index_codes,
                              index_offsets, index_visits, index_positions, vocabulary, mode,
                              padding_idx, kName);
  return dense_gradient(from, vocabulary, padding_idx, kName);
}

std::tuple<Tensor, Tensor> packed_weighted_pool_backward_sparse(
    Tensor grad, Tensor codes, Tensor code_offsets, Tensor code_weights, OptionalTensor totals,
    Tensor index_codes, Tensor index_offsets, Tensor index_visits, OptionalTensor index_positions,
    int64_t vocabulary, int64_t mode, int64_t padding_idx) {
  constexpr auto kName = "packed_weighted_pool_backward_sparse";
  const WeightedGradient from(grad, codes, code_offsets, code_weights, totals, index_codes,
                              index_offsets, index_visits, index_positions, vocabulary, mode,
                              padding_idx, kName);
  return sparse_gradient(from, padding_idx, kName);
}

// ---------------------------------------------------------------------------------------------
// The gradient of the weights

Tensor packed_weighted_pool_backward_weights(Tensor grad, OptionalTensor pooled,
                                             OptionalTensor totals, Tensor codes,
                                             Tensor code_offsets, Tensor weight, int64_t mode) {
  constexpr auto kName = "packed_weighted_pool_backward_weights";
  expect_on_cpu(kName, grad, pooled, totals, weight);
  pooling::expect_table(weight, kName);
  const auto table = made_contiguous(weight);
  const auto in = packed_batch(codes, code_offsets, table.size(0), kName);
  pooling::expect_weights_gradient(grad, pooled, totals, in.n_visits, table, mode, kName);
  const auto rows = made_contiguous(grad);
  const auto means = contiguous_or_none(pooled);
  const auto of_visits = contiguous_or_none(totals);
  auto grad_weights = empty(table, {codes.size(0)}, pooling::sum_dtype(table));
  dispatch_floating(table.scalar_type(), kName, [&](auto scalar_tag) {
    using scalar_t = typename decltype(scalar_tag)::type;
    using acc_t = accumulator_t<scalar_t>;
    const bool mean = mode == kMean;
    const auto* visit_grads = static_cast<const scalar_t*>(rows.data_ptr());
    const auto* table_rows = static_cast<const scalar_t*>(table.data_ptr());
    const auto* outputs = mean ? static_cast<const scalar_t*>(means->const_data_ptr()) : nullptr;
    const auto* sums = mean ? static_cast<const acc_t*>(of_visits->const_data_ptr()) : nullptr;
    auto* out = static_cast<acc_t*>(grad_weights.data_ptr());
    const int64_t grain = in.visits_worth_a_thread(table.size(1) * sizeof(scalar_t));
    parallel_for(0, in.n_visits, grain, [&](int64_t begin, int64_t end) {
      row_kernels<scalar_t>().sum_weight_gradients(visit_grads, table_rows, outputs, sums,
                                                   table.size(1), in.codes, in.offsets, begin, end,
                                                   out);
    });
  });
  return grad_weights;
}

}  // namespace
}  // namespace ehrseq

STABLE_TORCH_LIBRARY_IMPL(ehrseq_fast, CPU, m) {
  m.impl("packed_weighted_pool", EHRSEQ_BOX(&ehrseq::packed_weighted_pool));
  m.impl("packed_weighted_pool_backward", EHRSEQ_BOX(&ehrseq::packed_weighted_pool_backward));
  m.impl("packed_weighted_pool_backward_sparse",
         EHRSEQ_BOX(&ehrseq::packed_weighted_pool_backward_sparse));
  m.impl("packed_weighted_pool_backward_weights",
         EHRSEQ_BOX(&ehrseq::packed_weighted_pool_backward_weights));
}
