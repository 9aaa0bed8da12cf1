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
#include "visit_pool/code_gradients.h"
#include "visit_pool/modes.h"
#include "visit_pool/segments.h"

namespace ehrseq {
namespace {

struct PackedCodes {
  Tensor codes_tensor;
  Tensor offsets_tensor;
  const int32_t* codes;
  const int32_t* offsets;
  int64_t n_visits;
};

// Checked at every call: a wrong offset or code would read outside the table.
PackedCodes packed_codes(const Tensor& codes, const Tensor& code_offsets, int64_t vocabulary) {
  PackedCodes in{torch::stable::contiguous(codes), torch::stable::contiguous(code_offsets), nullptr,
                 nullptr, code_offsets.numel() - 1};
  if (in.codes_tensor.scalar_type() != ScalarType::Int ||
      in.offsets_tensor.scalar_type() != ScalarType::Int || in.n_visits < 0) {
    throw std::invalid_argument(
        "packed_visit_pool: codes and code_offsets must be int32, and "
        "code_offsets one longer than the visits");
  }
  in.codes = static_cast<const int32_t*>(in.codes_tensor.data_ptr());
  in.offsets = static_cast<const int32_t*>(in.offsets_tensor.data_ptr());
  const int64_t n_codes = codes.numel();
  bool rising = in.offsets[0] == 0 && in.offsets[in.n_visits] == n_codes;
  for (int64_t visit = 0; visit < in.n_visits; ++visit) {
    rising &= in.offsets[visit] <= in.offsets[visit + 1];
  }
  if (!rising) {
    throw std::invalid_argument(
        "packed_visit_pool: code_offsets must rise from 0 to the number of codes");
  }
  bool inside = true;
  for (int64_t i = 0; i < n_codes; ++i) inside &= uint32_t(in.codes[i]) < uint64_t(vocabulary);
  if (!inside) {
    int64_t found = 0;
    int64_t first = -1;
    for (int64_t i = 0; i < n_codes; ++i) {
      const bool outside = uint32_t(in.codes[i]) >= uint64_t(vocabulary);
      if (outside && found++ == 0) first = i;
    }
    throw std::out_of_range("Found " + std::to_string(found) + " codes outside the vocabulary of " +
                            std::to_string(vocabulary) + " codes. The first is code " +
                            std::to_string(in.codes[first]) + " at position " +
                            std::to_string(first) + " of the packed codes.");
  }
  return in;
}

struct PackedIndex {
  Tensor codes_tensor;
  Tensor offsets_tensor;
  Tensor visits_tensor;
  const int32_t* codes;
  const int32_t* offsets;
  const int32_t* visits;
  int64_t n_codes;
  int64_t n_entries;
};

PackedIndex packed_index(const Tensor& index_codes, const Tensor& index_offsets,
                         const Tensor& index_visits, int64_t n_visits, int64_t vocabulary) {
  PackedIndex in{torch::stable::contiguous(index_codes),
                 torch::stable::contiguous(index_offsets),
                 torch::stable::contiguous(index_visits),
                 nullptr,
                 nullptr,
                 nullptr,
                 index_codes.numel(),
                 index_visits.numel()};
  in.codes = static_cast<const int32_t*>(in.codes_tensor.data_ptr());
  in.offsets = static_cast<const int32_t*>(in.offsets_tensor.data_ptr());
  in.visits = static_cast<const int32_t*>(in.visits_tensor.data_ptr());
  bool sound = in.codes_tensor.scalar_type() == ScalarType::Int &&
               in.offsets_tensor.scalar_type() == ScalarType::Int &&
               in.visits_tensor.scalar_type() == ScalarType::Int &&
               index_offsets.numel() == in.n_codes + 1;
  sound = sound && in.offsets[0] == 0 && in.offsets[in.n_codes] == in.n_entries;
  for (int64_t i = 0; sound && i < in.n_codes; ++i) {
    sound = in.offsets[i] < in.offsets[i + 1] && uint32_t(in.codes[i]) < uint64_t(vocabulary) &&
            (i == 0 || in.codes[i - 1] < in.codes[i]);
  }
  if (sound) {
    for (int64_t i = 0; i < in.n_entries; ++i) {
      sound &= uint32_t(in.visits[i]) < uint64_t(n_visits);
    }
  }
  if (!sound)
    throw std::invalid_argument("packed_visit_pool: the code index is not one of a batch");
  return in;
}

// ---------------------------------------------------------------------------------------------
// Mean, sum, max

std::tuple<Tensor, Tensor> packed_visit_pool(Tensor codes, Tensor code_offsets, Tensor weight,
                                             int64_t mode) {
  const auto table = torch::stable::contiguous(weight);
  const auto in = packed_codes(codes, code_offsets, table.size(0));
  const int64_t row_size = table.size(1);
  const std::vector<int64_t> shape{in.n_visits, row_size};
  auto pooled = empty(table, shape, table.scalar_type());
  auto arg_max = empty(table, mode == kMax ? shape : std::vector<int64_t>{0}, ScalarType::Int);

  dispatch_floating(table.scalar_type(), "packed_visit_pool", [&](auto scalar_tag) {
    using scalar_t = typename decltype(scalar_tag)::type;
    using acc_t = accumulator_t<scalar_t>;
    const auto* rows = static_cast<const scalar_t*>(table.data_ptr());
    auto* out = static_cast<scalar_t*>(pooled.data_ptr());
    auto* winners = static_cast<int32_t*>(arg_max.data_ptr());
    parallel_for(0, in.n_visits, kTileVisits, [&](int64_t begin, int64_t end) {
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

// What each occurrence of a code multiplies its visit's gradient by: 1 / (codes of the visit).
template <typename acc_t>
std::vector<acc_t> mean_weights(const PackedIndex& index, const int32_t* code_offsets) {
  std::vector<acc_t> weights(index.n_entries);
  parallel_for(0, index.n_entries, kEntriesPerTask, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int32_t visit = index.visits[i];
      weights[i] = acc_t(1) / static_cast<acc_t>(code_offsets[visit + 1] - code_offsets[visit]);
    }
  });
  return weights;
}

// Sums the gradient of every code but padding_idx and hands it to finish(segment, sums).
template <typename scalar_t, typename Finish>
void packed_code_gradients(const Tensor& grad, const PackedIndex& index,
                           const int32_t* code_offsets, const OptionalTensor& arg_max, int64_t mode,
                           const Finish& finish) {
  using acc_t = accumulator_t<scalar_t>;
  const auto weights =
      mode == kMean ? mean_weights<acc_t>(index, code_offsets) : std::vector<acc_t>();
  const IndexView<acc_t> view{index.codes, index.offsets, index.visits,
                              mode == kMean ? weights.data() : nullptr, index.n_codes};
  sum_code_gradients(static_cast<const scalar_t*>(grad.data_ptr()), winners_or_null(arg_max, mode),
                     grad.size(1), view, finish);
}

Tensor packed_visit_pool_backward(Tensor grad, Tensor code_offsets, Tensor index_codes,
                                  Tensor index_offsets, Tensor index_visits, Tensor weight,
                                  OptionalTensor arg_max, int64_t mode, int64_t padding_idx) {
  const int64_t row_size = weight.size(1);
  const auto rows = torch::stable::contiguous(grad);
  const auto offsets = torch::stable::contiguous(code_offsets);
  const auto index =
      packed_index(index_codes, index_offsets, index_visits, rows.size(0), weight.size(0));
  auto grad_weight = empty(rows, shape_of(weight), rows.scalar_type());
  dispatch_floating(rows.scalar_type(), "packed_visit_pool_backward", [&](auto scalar_tag) {
    using scalar_t = typename decltype(scalar_tag)::type;
    auto* out = static_cast<scalar_t*>(grad_weight.data_ptr());
    zero_absent_rows(index.codes, index.n_codes, weight.size(0), row_size, out);
    packed_code_gradients<scalar_t>(rows, index, static_cast<const int32_t*>(offsets.data_ptr()),
                                    arg_max, mode, [&](int64_t segment, const auto* sums) {
                                      write_row(sums, row_size,
                                                out + index.codes[segment] * row_size);
                                    });
    if (padding_idx >= 0) {
      std::fill_n(out + padding_idx * row_size, row_size, static_cast<scalar_t>(0.0f));
    }
  });
  return grad_weight;
}

std::tuple<Tensor, Tensor> packed_visit_pool_backward_sparse(
    Tensor grad, Tensor code_offsets, Tensor index_codes, Tensor index_offsets, Tensor index_visits,
    Tensor weight, OptionalTensor arg_max, int64_t mode, int64_t padding_idx) {
  const int64_t row_size = weight.size(1);
  const auto rows = torch::stable::contiguous(grad);
  const auto offsets = torch::stable::contiguous(code_offsets);
  const auto index =
      packed_index(index_codes, index_offsets, index_visits, rows.size(0), weight.size(0));
  const int32_t* padding = std::lower_bound(index.codes, index.codes + index.n_codes, padding_idx);
  const bool has_padding = padding != index.codes + index.n_codes && *padding == padding_idx;
  const int64_t padding_segment = has_padding ? padding - index.codes : index.n_codes;
  const int64_t n_rows = index.n_codes - has_padding;
  auto code_ids = empty(rows, {n_rows}, ScalarType::Long);
  auto code_rows = empty(rows, {n_rows, row_size}, rows.scalar_type());
  auto* ids = static_cast<int64_t*>(code_ids.data_ptr());
  std::copy(index.codes + padding_segment + has_padding, index.codes + index.n_codes,
            std::copy(index.codes, index.codes + padding_segment, ids));
  dispatch_floating(rows.scalar_type(), "packed_visit_pool_backward_sparse", [&](auto scalar_tag) {
    using scalar_t = typename decltype(scalar_tag)::type;
    auto* out = static_cast<scalar_t*>(code_rows.data_ptr());
    packed_code_gradients<scalar_t>(rows, index, static_cast<const int32_t*>(offsets.data_ptr()),
                                    arg_max, mode, [&](int64_t segment, const auto* sums) {
                                      if (segment == padding_segment) return;
                                      const int64_t row = segment - (segment > padding_segment);
                                      write_row(sums, row_size, out + row * row_size);
                                    });
  });
  return {code_ids, code_rows};
}

// ---------------------------------------------------------------------------------------------
// Attention: a softmax of the codes' scores within each visit

// log(sum of exp) of the scores of one visit. In double: attention is exp(score - this), and the
// rounding of a float near 1,000 would be felt in it. -inf for an empty visit, which has no codes
// to give weights to.
template <typename scalar_t>
double log_sum_exp(const scalar_t* scores, const int32_t* codes, int32_t begin, int32_t end) {
  double highest = -INFINITY;
  for (int32_t i = begin; i < end; ++i) {
    highest = std::max(highest, static_cast<double>(scores[codes[i]]));
  }
  double total = 0;
  for (int32_t i = begin; i < end; ++i) {
    total += std::exp(static_cast<double>(scores[codes[i]]) - highest);
  }
  return highest + std::log(total);
}

template <typename acc_t, typename scalar_t>
acc_t attention_of(scalar_t score, double normaliser) {
  return std::exp(static_cast<acc_t>(static_cast<double>(score) - normaliser));
}

std::tuple<Tensor, Tensor> packed_attention_pool(Tensor codes, Tensor code_offsets, Tensor weight,
                                                 Tensor scores) {
  const auto table = torch::stable::contiguous(weight);
  const auto score = torch::stable::contiguous(scores);
  const auto in = packed_codes(codes, code_offsets, table.size(0));
  const int64_t row_size = table.size(1);
  auto pooled = empty(table, {in.n_visits, row_size}, table.scalar_type());
  auto normaliser = empty(table, {in.n_visits}, ScalarType::Double);
  dispatch_floating(table.scalar_type(), "packed_attention_pool", [&](auto scalar_tag) {
    using scalar_t = typename decltype(scalar_tag)::type;
    using acc_t = accumulator_t<scalar_t>;
    const auto* rows = static_cast<const scalar_t*>(table.data_ptr());
    const auto* code_scores = static_cast<const scalar_t*>(score.data_ptr());
    auto* log_sums = static_cast<double*>(normaliser.data_ptr());
    auto* out = static_cast<scalar_t*>(pooled.data_ptr());
    parallel_for(0, in.n_visits, kTileVisits, [&](int64_t begin, int64_t end) {
      const int32_t first_entry = in.offsets[begin];
      std::vector<acc_t> attention(in.offsets[end] - first_entry);
      std::vector<int32_t> offsets(end - begin + 1, 0);
      for (int64_t visit = begin; visit < end; ++visit) {
        const int32_t from = in.offsets[visit];
        const int32_t to = in.offsets[visit + 1];
        log_sums[visit] = log_sum_exp(code_scores, in.codes, from, to);
        for (int32_t i = from; i < to; ++i) {
          attention[i - first_entry] =
              attention_of<acc_t>(code_scores[in.codes[i]], log_sums[visit]);
        }
        offsets[visit - begin + 1] = to - first_entry;
      }
      const Segments<acc_t> segments{in.codes + first_entry, attention.data(), nullptr,
                                     offsets.data()};
      row_kernels<scalar_t>().sum_segments(rows, row_size, segments, 0, end - begin,
                                           out + begin * row_size);
    });
  });
  return {pooled, normaliser};
}

std::tuple<Tensor, Tensor> packed_attention_pool_backward(Tensor grad, Tensor pooled,
                                                          Tensor normaliser, Tensor index_codes,
                                                          Tensor index_offsets, Tensor index_visits,
                                                          Tensor weight, Tensor scores,
                                                          int64_t padding_idx) {
  const auto rows = torch::stable::contiguous(grad);
  const auto table = torch::stable::contiguous(weight);
  const auto score = torch::stable::contiguous(scores);
  const int64_t row_size = table.size(1);
  const int64_t vocabulary = table.size(0);
  const auto index =
      packed_index(index_codes, index_offsets, index_visits, rows.size(0), vocabulary);
  auto grad_weight = empty(rows, {vocabulary, row_size}, rows.scalar_type());
  auto grad_scores = empty(rows, {vocabulary}, rows.scalar_type());
  dispatch_floating(rows.scalar_type(), "packed_attention_pool_backward", [&](auto scalar_tag) {
    using scalar_t = typename decltype(scalar_tag)::type;
    using acc_t = accumulator_t<scalar_t>;
    const auto* visit_grads = static_cast<const scalar_t*>(rows.data_ptr());
    const auto* code_scores = static_cast<const scalar_t*>(score.data_ptr());
    const auto* log_sums = static_cast<const double*>(normaliser.data_ptr());
    auto* out = static_cast<scalar_t*>(grad_weight.data_ptr());
    auto* out_scores = static_cast<scalar_t*>(grad_scores.data_ptr());

    std::vector<acc_t> attention(index.n_entries);
    parallel_for(0, index.n_codes, 64, [&](int64_t begin, int64_t end) {
      for (int64_t segment = begin; segment < end; ++segment) {
        const auto code_score = code_scores[index.codes[segment]];
        for (int32_t i = index.offsets[segment]; i < index.offsets[segment + 1]; ++i) {
          attention[i] = attention_of<acc_t>(code_score, log_sums[index.visits[i]]);
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
    parallel_for(0, index.n_codes, 16, [&](int64_t begin, int64_t end) {
      row_kernels<scalar_t>().sum_score_gradients(
          visit_grads, static_cast<const scalar_t*>(table.data_ptr()),
          static_cast<const scalar_t*>(pooled.data_ptr()), row_size, view, begin, end, out_scores);
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
