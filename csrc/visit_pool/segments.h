// The one loop under visit pooling: weighted sums of table rows over segments.
//
// Forward, a segment is a visit and its entries name rows of the embedding table. Backward, a
// segment is a code and its entries name rows of the incoming gradient (the visits that hold that
// code). Both are the same sum, so both run the same kernel.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/simd.h"

namespace ehrseq {

// Segment s holds entries [offsets[s], offsets[s + 1]). A null `weights` or `scales` means ones.
template <typename acc_t>
struct Segments {
  const int32_t* rows;
  const acc_t* weights;
  const acc_t* scales;
  const int32_t* offsets;
};

// Accumulates WIDTH columns of one segment in registers, then writes them.
template <int WIDTH, typename table_t, typename acc_t, typename out_t>
EHRSEQ_INLINE void sum_columns(const table_t* table, int64_t row_size, const Segments<acc_t>& in,
                               int32_t begin, int32_t end, acc_t scale, out_t* out) {
  acc_t sums[WIDTH] = {};
  if (in.weights == nullptr) {
    for (int32_t entry = begin; entry < end; ++entry) {
      const table_t* row = table + in.rows[entry] * row_size;
      for (int column = 0; column < WIDTH; ++column) {
        sums[column] += static_cast<acc_t>(row[column]);
      }
    }
  } else {
    for (int32_t entry = begin; entry < end; ++entry) {
      const table_t* row = table + in.rows[entry] * row_size;
      const acc_t weight = in.weights[entry];
      for (int column = 0; column < WIDTH; ++column) {
        sums[column] += weight * static_cast<acc_t>(row[column]);
      }
    }
  }
  for (int column = 0; column < WIDTH; ++column) {
    out[column] = static_cast<out_t>(sums[column] * scale);
  }
}

// out[s - first] = scale_s * sum over the entries of s of weight * table[row].
template <typename table_t, typename acc_t, typename out_t>
EHRSEQ_SIMD void sum_segments(const table_t* table, int64_t row_size, Segments<acc_t> in,
                              int64_t first, int64_t last, out_t* out) {
  for (int64_t segment = first; segment < last; ++segment, out += row_size) {
    const int32_t begin = in.offsets[segment];
    const int32_t end = in.offsets[segment + 1];
    if (begin == end) {
      // Padded visits come in long runs: one fill for the run.
      int64_t run = 1;
      while (segment + run < last && in.offsets[segment + run + 1] == end) ++run;
      std::memset(static_cast<void*>(out), 0, run * row_size * sizeof(out_t));
      segment += run - 1;
      out += (run - 1) * row_size;
      continue;
    }
    const acc_t scale = in.scales == nullptr ? acc_t(1) : in.scales[segment];
    int64_t column = 0;
    for (; column + 64 <= row_size; column += 64) {
      sum_columns<64>(table + column, row_size, in, begin, end, scale, out + column);
    }
    for (; column + 16 <= row_size; column += 16) {
      sum_columns<16>(table + column, row_size, in, begin, end, scale, out + column);
    }
    for (; column < row_size; ++column) {
      sum_columns<1>(table + column, row_size, in, begin, end, scale, out + column);
    }
  }
}

// Element-wise maximum over the entries of each segment, and which table row it came from (the
// first, where several are equal; -1 in an empty segment, whose maximum is zero). NaN wins.
template <typename table_t>
EHRSEQ_SIMD void max_segments(const table_t* table, int64_t row_size, const int32_t* rows,
                              const int32_t* offsets, int64_t first, int64_t last, table_t* out,
                              int32_t* arg_max) {
  for (int64_t segment = first; segment < last; ++segment, out += row_size, arg_max += row_size) {
    const int32_t begin = offsets[segment];
    const int32_t end = offsets[segment + 1];
    for (int64_t column = 0; column < row_size; ++column) {
      out[column] = begin == end ? table_t(0) : table[rows[begin] * row_size + column];
      arg_max[column] = begin == end ? -1 : rows[begin];
    }
    for (int32_t entry = begin + 1; entry < end; ++entry) {
      const table_t* row = table + rows[entry] * row_size;
      for (int64_t column = 0; column < row_size; ++column) {
        const bool is_nan = row[column] != row[column] && out[column] == out[column];
        const bool wins = row[column] > out[column] || is_nan;
        out[column] = wins ? row[column] : out[column];
        arg_max[column] = wins ? rows[entry] : arg_max[column];
      }
    }
  }
}

// Gradient of the maximum for one code: from each visit that holds it, the columns that it won.
template <typename grad_t, typename acc_t>
EHRSEQ_SIMD void sum_won_columns(const grad_t* grad, const int32_t* arg_max, int64_t row_size,
                                 int32_t code, const int32_t* visits, int32_t begin, int32_t end,
                                 bool continues, acc_t* sums) {
  for (int64_t column = 0; column < row_size; ++column) sums[column] = acc_t(0);
  for (int32_t entry = begin; entry < end; ++entry) {
    const bool first_entry = entry == begin && !continues;
    // A code that a visit holds twice wins once.
    if (!first_entry && visits[entry] == visits[entry - 1]) continue;
    const int64_t row = visits[entry] * row_size;
    for (int64_t column = 0; column < row_size; ++column) {
      sums[column] +=
          arg_max[row + column] == code ? static_cast<acc_t>(grad[row + column]) : acc_t(0);
    }
  }
}

}  // namespace ehrseq
