// Visit pooling on the CPU: codes -> one vector per visit, gather, mask and mean in one pass, and
// its gradient. Padded input ([..., C] with a mask) is reduced to its real codes, some visits
// at a time (packed_cpu.cpp takes input that has that form already). row_kernels.h holds the
// inner loops, code_index.h the transpose, code_gradients.h the gradient from it.

#include <algorithm>
#include <cstring>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

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
  int64_t find_others(int64_t at, int64_t count, int64_t code, int32_t* positions) const {
    return ehrseq::find_others(codes + at, count, static_cast<code_t>(code),
                               static_cast<int32_t>(at), positions);
  }
};

constexpr int64_t kNone = -1;

// Where there is no mask, slots of the code `skipped` may be left out: one of the vocabulary, whose
// row or gradient is known to be zeros.
template <typename code_t, typename acc_t, typename mask_t>
void collect_real_codes(const PaddedCodes& in, int64_t first, int64_t last, int64_t skipped,
                        RealSlots<acc_t, mask_t>& kept) {
  const auto* codes = static_cast<const code_t*>(in.codes.data_ptr()) + first * in.n_slots;
  bool outside = false;
  const CodeOfSlot<code_t> row_of{codes, static_cast<uint64_t>(in.vocabulary), &outside};
  if constexpr (!RealSlots<acc_t, mask_t>::kIsWeighted) {
    if (!in.mask.has_value() && skipped != kNone && in.n_slots > 0) {
      kept.collect_others(skipped, last - first, in.n_slots, row_of);
      if (outside) refuse_codes<code_t, mask_t>(in);
      return;
    }
  }
  kept.collect(mask_of_visit<mask_t>(in.mask, first, in.n_slots), last - first, in.n_slots, row_of);
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

// The code that pads visits, where it adds nothing to a sum: its row is zeros, as that of an
// nn.Embedding's padding_idx is. Visits are padded at their end, so it is looked for there; where
// it is not found, all slots are summed, to the same bits.
template <typename code_t, typename scalar_t>
int64_t code_that_adds_nothing(const PaddedCodes& in, const scalar_t* table, int64_t row_size) {
  if (in.mask.has_value() || in.n_visits * in.n_slots == 0) return kNone;
  const auto* codes = static_cast<const code_t*>(in.codes.data_ptr());
  for (const int64_t end : {in.n_visits, int64_t{1}}) {
    const auto code = static_cast<int64_t>(codes[end * in.n_slots - 1]);
    if (code < 0 || code >= in.vocabulary) continue;
    const scalar_t* row = table + code * row_size;
    const auto is_zero = [](scalar_t number) {
      return static_cast<accumulator_t<scalar_t>>(number) == 0;
    };
    if (std::all_of(row, row + row_size, is_zero)) return code;
  }
  return kNone;
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
      // a maximum may be that row's
      const int64_t skipped =
          mode == kMax ? kNone : code_that_adds_nothing<code_t>(in, table_data, row_size);
      parallel_for(0, in.n_visits, grain, [&](int64_t begin, int64_t end) {
        RealSlots<accumulator_t<scalar_t>, mask_t> kept;
        for (int64_t first = begin; first < end; first += step) {
          const int64_t last = std::min(first + step, end);
          collect_real_codes<code_t>(in, first, last, skipped, kept);
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

// The real codes of a padded batch in parts of neighbouring visits, one for each thread or, where
// their slots would not fit 32 bits, more.
template <typename acc_t, typename code_t, typename mask_t>
std::vector<FoundEntries<acc_t>> find_real_codes(const PaddedCodes& in, int64_t padding_idx) {
  // A thread counts entries by code, which it has to have many more slots for than there are codes.
  const int64_t slots_worth_a_thread = std::max(kSlotsWorthAThread, 4 * in.vocabulary);
  const int64_t worth = in.n_visits * in.n_slots / slots_worth_a_thread;
  const int64_t shares = std::max<int64_t>(1, std::min({num_threads(), worth, in.n_visits}));
  const int64_t most = visits_per_step(std::max<int64_t>(1, in.n_visits), in.n_slots);
  const int64_t n_parts = std::max(shares, (in.n_visits + most - 1) / most);
  std::vector<FoundEntries<acc_t>> parts(n_parts);
  share_out(n_parts, shares, [&](int64_t from, int64_t to, int64_t) {
    for (int64_t part = from; part < to; ++part) {
      const int64_t begin = in.n_visits * part / n_parts;
      RealSlots<acc_t, mask_t> kept;
      collect_real_codes<code_t>(in, begin, in.n_visits * (part + 1) / n_parts, padding_idx, kept);
      kept.first_visit = begin;
      parts[part] = std::move(kept);
    }
  });
  return parts;
}

// The transpose of a padded batch. Codes equal to padding_idx get no gradient and are left out.
template <typename acc_t>
WeightedIndex<acc_t> index_padded_codes(const PaddedCodes& in, int64_t mode, int64_t padding_idx) {
  WeightedIndex<acc_t> index;
  dispatch_codes_and_mask(in, [&](auto code_tag, auto mask_tag) {
    using code_t = typename decltype(code_tag)::type;
    using mask_t = typename decltype(mask_tag)::type;
    const bool weighted = mode != kMax && RealSlots<acc_t, mask_t>::kIsWeighted;
    index = transpose(find_real_codes<acc_t, code_t, mask_t>(in, padding_idx), in.vocabulary,
                      mode == kMean, weighted, padding_idx);
  });
  return index;
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
