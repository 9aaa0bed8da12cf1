// The rows that the backward pass reads (gradients of visits), and those that it writes: rows of
// the table's gradient, and partial sums of segments that cross chunk boundaries.
#pragma once

#include "visit_pool/rows.cuh"

namespace ehrseq::cuda {

// ---------------------------------------------------------------------------------------------
// What an entry adds to its code's row

// Modes mean and sum, and attention.
template <typename scalar_t_, int kColumns_>
struct VisitGradients {
  using scalar_t = scalar_t_;
  using acc_t = accumulator_t<scalar_t>;
  using Row = Pack<scalar_t, kColumns_>;
  static constexpr int kColumns = kColumns_;
  static constexpr int kRowsInFlight = 8;
  static constexpr bool kSkipsRepeats = false;

  const scalar_t* grad;

  struct Loaded {
    Bits<Row> grad;
  };

  __device__ __forceinline__ Loaded load(int64_t at) const { return {load_bits<Row>(grad + at)}; }

  __device__ static __forceinline__ void add(acc_t (&sums)[kColumns], const Loaded& row,
                                             int32_t /*code*/, acc_t weight) {
    acc_t columns[kColumns];
    widen_bits<Row, scalar_t>(row.grad, columns);
#pragma unroll
    for (int i = 0; i < kColumns; ++i) sums[i] += weight * columns[i];
  }
};

// With weights of codes, which leave out what has a weight of zero, whatever its visit's gradient.
template <typename scalar_t, int kColumns_>
struct WeightedGradients : VisitGradients<scalar_t, kColumns_> {
  using Base = VisitGradients<scalar_t, kColumns_>;
  using typename Base::acc_t;

  __device__ static __forceinline__ void add(acc_t (&sums)[kColumns_],
                                             const typename Base::Loaded& row, int32_t code,
                                             acc_t weight) {
    if (!(weight == acc_t(0))) Base::add(sums, row, code, weight);
  }
};

// Mode max: the columns that the code won. A code that a visit holds twice wins once.
template <typename scalar_t_, int kColumns_>
struct WonGradients {
  using scalar_t = scalar_t_;
  using acc_t = accumulator_t<scalar_t>;
  using Row = Pack<scalar_t, kColumns_>;
  static constexpr int kColumns = kColumns_;
  static constexpr int kRowsInFlight = 4;
  static constexpr bool kSkipsRepeats = true;

  const scalar_t* grad;
  const int32_t* arg_max;

  struct Loaded {
    Bits<Row> grad;
    int32_t winners[kColumns];
  };

  __device__ __forceinline__ Loaded load(int64_t at) const {
    Loaded row;
    row.grad = load_bits<Row>(grad + at);
    load_columns<kColumns>(arg_max + at, row.winners);
    return row;
  }

  __device__ static __forceinline__ void add(acc_t (&sums)[kColumns], const Loaded& row,
                                             int32_t code, acc_t /*weight*/) {
    acc_t columns[kColumns];
    widen_bits<Row, scalar_t>(row.grad, columns);
#pragma unroll
    for (int i = 0; i < kColumns; ++i) sums[i] += row.winners[i] == code ? columns[i] : acc_t(0);
  }
};

// ---------------------------------------------------------------------------------------------
// What is written

// The rows of the gradient: one for each code of the vocabulary or, sparse, one for each code that
// occurs. With attention each code also has a score, whose gradient is a sum over the same entries.
template <typename scalar_t>
struct GradientRows {
  using acc_t = accumulator_t<scalar_t>;

  scalar_t* rows;
  int64_t* sparse_ids;       // null where dense
  int64_t padding_code;      // gets no gradient; -1 where there is none
  bool padding_is_in_index;  // where sparse: then it has a segment, and no row
  scalar_t* scores;          // null without attention

  __device__ bool is_sparse() const { return sparse_ids != nullptr; }

  // -1 where the code has none.
  __device__ int32_t row_of(int32_t code, int32_t segment) const {
    if (!is_sparse()) return code;
    if (code == padding_code) return -1;
    return segment - (padding_is_in_index && code > padding_code ? 1 : 0);
  }

  template <int kColumns>
  __device__ __forceinline__ void write(int32_t row, const RowShape& shape, int64_t column,
                                        const acc_t (&sums)[kColumns]) const {
    if (row < 0 || column >= shape.row_size) return;
    scalar_t* to = rows + (shape.offset(row) + column);
    if (!is_sparse() && row == padding_code) {
      store_zeros<scalar_t, kColumns>(to);
    } else {
      store_row<scalar_t, kColumns>(to, sums, acc_t(1));
    }
  }

  // By one lane of the first column tile. Attention is never sparse, so that rows are codes.
  __device__ void write_score(int32_t row, acc_t score) const {
    if (scores != nullptr) scores[row] = narrow<scalar_t>(score);
  }
  __device__ void write_id(int32_t row, int32_t code) const {
    if (is_sparse() && row >= 0) sparse_ids[row] = code;
  }
};

// Sums of segments that cross chunk boundaries. The head of such a segment is its part in the chunk
// where it begins; its parts in the chunks that follow are continuations, the last of which is its
// tail. A chunk holds at most one continuation, at its beginning, and one head, at its end.
template <typename acc_t>
struct Partials {
  acc_t* rows;         // [chunks, 2, row_size]: continuation, head
  acc_t* scores;       // [chunks, 2]
  int32_t* head_rows;  // [chunks]: the head's row in the gradient, kNoHead where there is no head
  int32_t* ends_here;  // [chunks]: whether the continuation is a tail

  static constexpr int32_t kNoHead = -1;

  __device__ acc_t* continuation(int64_t chunk, const RowShape& shape, int64_t column) const {
    return rows + (shape.offset(2 * chunk) + column);
  }
  __device__ acc_t* head(int64_t chunk, const RowShape& shape, int64_t column) const {
    return rows + (shape.offset(2 * chunk + 1) + column);
  }
};

}  // namespace ehrseq::cuda
