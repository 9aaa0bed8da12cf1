// Visit pooling on the CPU: codes -> one vector per visit, gather, mask and mean in one pass, and
// its gradient. Padded input ([..., C] with a mask) is reduced to its real codes, some visits
// at a time (packed_cpu.cpp takes input that has that form already). row_kernels.h holds the
// inner loops, code_index.h the transpose, code_gradients.h the gradient from it.

#include <algorithm>
#include <cstring>
#include <string>
#include <tuple>

#include "common/operators.h"
#include "common/parallel.h"
#include "common/tensors.h"
#include "visit_pool/arguments.h"
#include "visit_pool/code_gradients.h"
#include "visit_pool/code_index.h"
#include "visit_pool/masks.h"
#include "visit_pool/segments.h"
#include "visit_pool/winners.h"

namespace ehrseq {
namespace {

// ---------------------------------------------------------------------------------------------
// Padded input: validation, and its real slots

// How many of the slots are real, and how many are worth a thread to look through, as a guess.
constexpr int64_t kSlotsPerCode = 8;
constexpr int64_t kSlotsWorthAThread = 1 << 17;

// Visits whose real codes are collected before they are pooled: as many as leave the lists of them
// in the nearest cache, in long runs, as what follows a patient's last visit is written at once.
constexpr int64_t kVisitsPerStep = 512;

struct PaddedCodes {
  Tensor codes;
  OptionalTensor mask;
  int64_t n_visits;
  int64_t n_slots;
  int64_t vocabulary;
};

PaddedCodes padded_codes(const Tensor& codes, const OptionalTensor& mask, int64_t vocabulary,
                         const char* operation) {
  expect_on_cpu(operation, codes, mask);
  pooling::expect_padded_codes(codes, mask, operation);
  return {made_contiguous(codes), contiguous_or_none(mask), product(leading_shape(codes, 1)),
          codes.size(codes.dim() - 1), vocabulary};
}

// Calls body with the C++ types of the codes and of the mask.
template <typename Body>
void dispatch_codes_and_mask(const PaddedCodes& in, const Body& body) {
  dispatch_mask(in.mask, [&](auto mask_tag) {
    if (in.codes.scalar_type() == ScalarType::Int) return body(TypeTag<int32_t>{}, mask_tag);
    return body(TypeTag<int64_t>{}, mask_tag);
  });
}

// "[2, 0, 5]" for a flat position in a tensor of that shape.
std::string position(int64_t flat, const std::vector<int64_t>& shape) {
  std::string text;
  for (auto size = shape.rbegin(); size != shape.rend(); ++size) {
    text = std::to_string(flat % *size) + (text.empty() ? "" : ", ") + text;
    flat /= *size;
  }
  return "[" + text + "]";
}

template <typename code_t, typename mask_t>
[[noreturn]] void refuse_codes(const PaddedCodes& in) {
  const auto* codes = static_cast<const code_t*>(in.codes.data_ptr());
  int64_t found = 0;
  int64_t first = -1;
  for_each_real_slot(
      mask_of_visit<mask_t>(in.mask, 0, in.n_slots), in.n_visits, in.n_slots,
      [&](int64_t at, double) {
        if (codes[at] >= 0 && codes[at] < in.vocabulary) return;
        if (found++ == 0) first = at;
      },
      [] {});
  pooling::refuse_codes_outside(found, in.vocabulary, codes[first],
                                position(first, shape_of(in.codes)));
}

template <typename code_t>
struct CodeOfSlot {
  const code_t* codes;
  uint64_t vocabulary;
  bool* outside;

  int32_t operator()(int64_t at) const {
    const auto code = static_cast<int64_t>(codes[at]);
    *outside |= static_cast<uint64_t>(code) >= vocabulary;
    return static_cast<int32_t>(code);
  }
  void prefetch(int64_t at) const { __builtin_prefetch(codes + at); }
};

template <typename code_t, typename acc_t, typename mask_t>
void collect_real_codes(const PaddedCodes& in, int64_t first, int64_t last,
                        RealSlots<acc_t, mask_t>& kept) {
  const auto* codes = static_cast<const code_t*>(in.codes.data_ptr()) + first * in.n_slots;
  bool outside = false;
  kept.collect(mask_of_visit<mask_t>(in.mask, first, in.n_slots), last - first, in.n_slots,
               CodeOfSlot<code_t>{codes, static_cast<uint64_t>(in.vocabulary), &outside});
  if (outside) refuse_codes<code_t, mask_t>(in);
}

// ---------------------------------------------------------------------------------------------
// Forward

std::tuple<Tensor, Tensor> empty_outputs(const Tensor& table, std::vector<int64_t> shape,
                                         int64_t mode) {
  auto pooled = empty(table, shape, table.scalar_type());
  auto arg_max = empty(table, mode == kMax ? shape : std::vector<int64_t>{0}, ScalarType::Int);
  return {pooled, arg_max};
}

std::tuple<Tensor, Tensor> visit_pool(Tensor codes, Tensor weight, OptionalTensor visit_mask,
                                      int64_t mode) {
  constexpr auto kName = "visit_pool";
  expect_on_cpu(kName, weight);
  pooling::expect_table(weight, kName);
  pooling::expect_mode(mode, kName);
  const auto in = padded_codes(codes, visit_mask, weight.size(0), kName);
  const auto table = made_contiguous(weight);
  const int64_t step = visits_per_step(kVisitsPerStep, in.n_slots);
  const int64_t row_size = table.size(1);
  auto shape = leading_shape(codes, 1);
  shape.push_back(row_size);
  auto [pooled, arg_max] = empty_outputs(table, shape, mode);

  dispatch_floating(table.scalar_type(), kName, [&](auto scalar_tag) {
    using scalar_t = typename decltype(scalar_tag)::type;
    const auto* table_data = static_cast<const scalar_t*>(table.data_ptr());
    auto* out = static_cast<scalar_t*>(pooled.data_ptr());
    auto* winners = mode == kMax ? static_cast<int32_t*>(arg_max.data_ptr()) : nullptr;
    dispatch_codes_and_mask(in, [&](auto code_tag, auto mask_tag) {
      using code_t = typename decltype(code_tag)::type;
      using mask_t = typename decltype(mask_tag)::type;
      const int64_t rows = in.n_visits + in.n_visits * in.n_slots / kSlotsPerCode;
      const int64_t grain = visits_worth_a_thread(in.n_visits, rows, row_size * sizeof(scalar_t));
      parallel_for(0, in.n_visits, grain, [&](int64_t begin, int64_t end) {
        RealSlots<accumulator_t<scalar_t>, mask_t> kept;
        for (int64_t first = begin; first < end; first += step) {
          const int64_t last = std::min(first + step, end);
          collect_real_codes<code_t>(in, first, last, kept);
          pool_real_slots(kept, mode, table_data, row_size, kept.rows.data(),
                          out + first * row_size,
                          winners == nullptr ? nullptr : winners + first * row_size);
        }
      });
    });
  });
  return {pooled, arg_max};
}

// ---------------------------------------------------------------------------------------------
// Backward

template <typename acc_t, typename mask_t>
void append_entries(const RealSlots<acc_t, mask_t>& kept, int64_t first_visit, int64_t mode,
                    FoundEntries<acc_t>& found) {
  const auto before = static_cast<int64_t>(found.codes.size());
  const int64_t count = kept.n_entries();
  found.codes.insert(found.codes.end(), kept.rows.begin(), kept.rows.begin() + count);
  found.visits.resize(found.codes.size());
  for (int64_t i = 0; i < count; ++i) {
    ++found.next[kept.rows[i]];
    found.visits[before + i] = static_cast<int32_t>(first_visit + kept.visits[i]);
  }
  if (mode == kMean) {
    found.weights.resize(found.codes.size());
    kept.for_each_held([&](int64_t held, int32_t begin, int32_t end) {
      for (int32_t i = begin; i < end; ++i) {
        found.weights[before + i] = kept.scales[held] * kept.weight(i);
      }
    });
  } else if (mode == kSum && kept.kIsWeighted) {
    found.weights.insert(found.weights.end(), kept.weights.begin(), kept.weights.begin() + count);
  }
}

// The transpose of a padded batch. Codes equal to padding_idx get no gradient and are left out.
template <typename acc_t>
WeightedIndex<acc_t> index_padded_codes(const PaddedCodes& in, int64_t mode, int64_t padding_idx) {
  // A thread counts entries by code, which it has to have many more slots for than there are codes.
  const int64_t slots_worth_a_thread = std::max(kSlotsWorthAThread, 4 * in.vocabulary);
  const int64_t worth = in.n_visits * in.n_slots / slots_worth_a_thread;
  const int64_t shares = std::max<int64_t>(1, std::min({num_threads(), worth, in.n_visits}));
  const int64_t step = visits_per_step(kVisitsPerStep, in.n_slots);
  std::vector<FoundEntries<acc_t>> found(shares);
  bool weighted = mode == kMean;
  dispatch_codes_and_mask(in, [&](auto code_tag, auto mask_tag) {
    using code_t = typename decltype(code_tag)::type;
    using mask_t = typename decltype(mask_tag)::type;
    weighted |= mode == kSum && !std::is_same_v<mask_t, bool>;
    share_out(shares, shares, [&](int64_t share, int64_t, int64_t) {
      const int64_t begin = in.n_visits * share / shares;
      const int64_t end = in.n_visits * (share + 1) / shares;
      found[share].next.assign(in.vocabulary, 0);
      RealSlots<acc_t, mask_t> kept;
      for (int64_t first = begin; first < end; first += step) {
        collect_real_codes<code_t>(in, first, std::min(first + step, end), kept);
        append_entries(kept, first, mode, found[share]);
      }
    });
  });
  return transpose(found, in.vocabulary, weighted, padding_idx);
}

// Calls body(TypeTag<scalar_t>{}, index) with the transpose of the batch.
template <typename Body>
void with_padded_index(const char* operation, const Tensor& grad, const Tensor& codes,
                       int64_t vocabulary, const OptionalTensor& visit_mask,
                       const OptionalTensor& arg_max, int64_t mode, int64_t padding_idx,
                       const Body& body) {
  expect_on_cpu(operation, grad, arg_max);
  pooling::expect_padding(padding_idx, vocabulary, operation);
  const auto in = padded_codes(codes, visit_mask, vocabulary, operation);
  pooling::expect_gradient(grad, leading_shape(codes, 1), arg_max, mode, operation);
  dispatch_floating(grad.scalar_type(), operation, [&](auto scalar_tag) {
    using acc_t = accumulator_t<typename decltype(scalar_tag)::type>;
    const auto index = index_padded_codes<acc_t>(in, mode, padding_idx);
    body(scalar_tag, IndexView<acc_t>{index.codes.data(), index.offsets.data(), index.visits.data(),
                                      index.weights.empty() ? nullptr : index.weights.data(),
                                      static_cast<int64_t>(index.codes.size())});
  });
}

Tensor visit_pool_backward(Tensor grad, Tensor codes, int64_t vocabulary, OptionalTensor visit_mask,
                           OptionalTensor arg_max, int64_t mode, int64_t padding_idx) {
  const Winners winners(arg_max, mode);
  std::optional<Tensor> grad_weight;
  with_padded_index("visit_pool_backward", grad, codes, vocabulary, visit_mask, arg_max, mode,
                    padding_idx, [&](auto tag, auto index) {
                      using scalar_t = typename decltype(tag)::type;
                      const auto rows = made_contiguous(grad);
                      const int64_t row_size = rows.size(rows.dim() - 1);
                      grad_weight = empty(rows, {vocabulary, row_size}, rows.scalar_type());
                      auto* out = static_cast<scalar_t*>(grad_weight->data_ptr());
                      zero_absent_rows(index.codes, index.n_codes, vocabulary, row_size, out);
                      sum_code_gradients(
                          static_cast<const scalar_t*>(rows.data_ptr()), winners.get(), row_size,
                          index, [&](int64_t segment, const auto* sums) {
                            write_row(sums, row_size, out + index.codes[segment] * row_size);
                          });
                    });
  return *grad_weight;
}

std::tuple<Tensor, Tensor> visit_pool_backward_sparse(Tensor grad, Tensor codes, int64_t vocabulary,
                                                      OptionalTensor visit_mask,
                                                      OptionalTensor arg_max, int64_t mode,
                                                      int64_t padding_idx) {
  const Winners winners(arg_max, mode);
  std::optional<std::tuple<Tensor, Tensor>> result;
  with_padded_index("visit_pool_backward_sparse", grad, codes, vocabulary, visit_mask, arg_max,
                    mode, padding_idx, [&](auto tag, auto index) {
                      using scalar_t = typename decltype(tag)::type;
                      const auto rows = made_contiguous(grad);
                      const int64_t row_size = rows.size(rows.dim() - 1);
                      auto code_ids = empty(rows, {index.n_codes}, ScalarType::Long);
                      auto code_rows = empty(rows, {index.n_codes, row_size}, rows.scalar_type());
                      std::copy(index.codes, index.codes + index.n_codes,
                                static_cast<int64_t*>(code_ids.data_ptr()));
                      auto* out = static_cast<scalar_t*>(code_rows.data_ptr());
                      sum_code_gradients(static_cast<const scalar_t*>(rows.data_ptr()),
                                         winners.get(), row_size, index,
                                         [&](int64_t segment, const auto* sums) {
                                           write_row(sums, row_size, out + segment * row_size);
                                         });
                      result.emplace(code_ids, code_rows);
                    });
  return *result;
}

}  // namespace
}  // namespace ehrseq

STABLE_TORCH_LIBRARY_IMPL(ehrseq_fast, CPU, m) {
  m.impl("visit_pool", EHRSEQ_BOX(&ehrseq::visit_pool));
  m.impl("visit_pool_backward", EHRSEQ_BOX(&ehrseq::visit_pool_backward));
  m.impl("visit_pool_backward_sparse", EHRSEQ_BOX(&ehrseq::visit_pool_backward_sparse));
}
