// The loops under visit pooling, for the instruction set that common/isa.h chose: weighted sums and
// maxima of table rows over segments, and what their gradients need. row_kernels.h defines them.
//
// Forward, a segment is a visit and its entries name rows of the embedding table. Backward, a
// segment is a code and its entries name rows of the incoming gradient (the visits that hold that
// code). Both are the same sum, so both run the same kernel.
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/parallel.h"
#include "common/scalar_types.h"

namespace ehrseq {

// Visits that a kernel pools in one call; of padded ones, the real slots are collected first.
constexpr int64_t kVisitsAtOnce = 64;

// Visits that are worth a thread, where all of them move `rows` rows of so many bytes.
inline int64_t visits_worth_a_thread(int64_t n_visits, int64_t rows, int64_t row_bytes) {
  constexpr int64_t kBytesOfLookingUp = 32;
  return std::max(kVisitsAtOnce, grain_of_bytes(n_visits, rows * (row_bytes + kBytesOfLookingUp)));
}

// Segment s holds entries [offsets[s], offsets[s + 1]). A null `weights` or `scales` means ones.
template <typename acc_t>
struct Segments {
  const int32_t* rows;
  const acc_t* weights;
  const acc_t* scales;
  const int32_t* offsets;
};

// The transposed index of a batch: visit_pool builds it for padded input, the batch builder for
// packed.
template <typename acc_t>
struct IndexView {
  const int32_t* codes;  // distinct, ascending
  const int32_t* offsets;
  const int32_t* visits;
  const acc_t* weights;  // nullptr where all are 1
  int64_t n_codes;

  int32_t n_entries() const { return offsets[n_codes]; }
};

// No output may overlap an input. Sums run entry by entry, each product rounded before it is added,
// so that every instruction set gives the same bits.
template <typename scalar_t>
struct RowKernels {
  using acc_t = accumulator_t<scalar_t>;

  // out[s - first] = scale_s * sum over the entries of s of weight * table[row].
  void (*sum_segments)(const scalar_t* table, int64_t row_size, const Segments<acc_t>& in,
                       int64_t first, int64_t last, scalar_t* out);
  void (*sum_segments_wide)(const scalar_t* table, int64_t row_size, const Segments<acc_t>& in,
                            int64_t first, int64_t last, acc_t* out);

  // Element-wise maximum over the entries of each segment, and the id of the entry that it came
  // from: the first, where several are equal; -1 in an empty segment, whose maximum is zero. NaN
  // wins.
  void (*max_segments)(const scalar_t* table, int64_t row_size, const int32_t* rows,
                       const int32_t* ids, const int32_t* offsets, int64_t first, int64_t last,
                       scalar_t* out, int32_t* winners);

  // Gradient of the maximum for one code: from each visit that holds it, the columns that it won.
  // `continues`: the entry before `begin` is of the same code.
  void (*sum_won_columns)(const scalar_t* grad, const int32_t* winners, int64_t row_size,
                          int32_t code, const int32_t* visits, int32_t begin, int32_t end,
                          bool continues, acc_t* sums);

  // out = factor * grad, and grad where `winners` says `id`, zeros elsewhere.
  void (*scale_row)(const scalar_t* grad, acc_t factor, int64_t row_size, scalar_t* out);
  void (*keep_won_columns)(const scalar_t* grad, const int32_t* winners, int32_t id,
                           int64_t row_size, scalar_t* out);

  // d score[k] = sum over the visits v that hold k of a (g . (table[k] - o)), with a the attention
  // and g, o the visit's gradient and output. The difference is taken first: summed separately, its
  // two halves are large and cancel.
  void (*sum_score_gradients)(const scalar_t* grad, const scalar_t* table, const scalar_t* pooled,
                              int64_t row_size, const IndexView<acc_t>& index, int64_t first,
                              int64_t last, scalar_t* grad_scores);

  // d weight[i] of the entries i of each segment, a visit of gradient g: g . table[row], of a mean
  // m by `totals` (null for a sum) g . (table[row] - m) / total. Where a total is below 1, and the
  // sum was not divided by it, m is left out.
  void (*sum_weight_gradients)(const scalar_t* grad, const scalar_t* table, const scalar_t* pooled,
                               const acc_t* totals, int64_t row_size, const int32_t* rows,
                               const int32_t* offsets, int64_t first, int64_t last,
                               acc_t* grad_weights);
};

template <typename scalar_t>
const RowKernels<scalar_t>& row_kernels();

}  // namespace ehrseq
