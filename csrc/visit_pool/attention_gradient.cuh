// Backward of attention pooling: the weights of entries, and their terms of the scores' gradient.
#pragma once

#include "visit_pool/chunk_sums.cuh"

namespace ehrseq::cuda {

// For every entry its attention a, and a (g . (table[code] - o)), which the gradient of the code's
// score is a sum of; g and o are the visit's gradient and output. The difference is taken first:
// summed separately, its two halves are large and cancel.
//   grid    x: kGradientThreads entries per block
//   block   kGradientThreads, as groups of 8, 16 or 32 lanes: a group takes as many entries as it
//           has lanes, kEntries at a time, and all columns of their rows
//   shared  none
//   reads   the index, gradients and outputs of visits, the table, scores and softmax statistics
//   writes  attention [entries], score_terms [entries]
template <typename scalar_t, int kColumns>
__global__ void __launch_bounds__(kGradientThreads, 4)
    weigh_entries(BatchIndex index, const scalar_t* grad, const scalar_t* table,
                  const scalar_t* pooled, const scalar_t* scores, SoftmaxStatsArrays stats,
                  RowShape shape, accumulator_t<scalar_t>* attention,
                  accumulator_t<scalar_t>* score_terms) {
  using acc_t = accumulator_t<scalar_t>;
  using Row = Pack<scalar_t, kColumns>;
  constexpr int kEntries = 2;
  const Lanes lanes(shape.lanes_log2);
  const int64_t first = (static_cast<int64_t>(blockIdx.x) * lanes.groups() + lanes.group())
                        << lanes.log2;
  if (first >= index.size()) return;
  const int64_t left = index.size() - first;
  const int n = left < lanes.count ? static_cast<int>(left) : lanes.count;
  auto cursor = index.open(first, lanes);
  const Entry entry = index.load(cursor, first, n, lanes);
  acc_t weight = 0;
  if (lanes.lane < n) {
    weight = attention_of<acc_t>(scores[entry.code], stats.of(entry.visit));
  }

  acc_t mine = 0;
  for (int i = 0; i < n; i += kEntries) {
    acc_t products[kEntries] = {};
    int64_t visit_rows[kEntries];
    int64_t code_rows[kEntries];
#pragma unroll
    for (int e = 0; e < kEntries; ++e) {
      const int source = i + e < n ? i + e : i;  // the first of them again, whose sum is not used
      visit_rows[e] = shape.offset(lanes.from(source, entry.visit));
      code_rows[e] = shape.offset(lanes.from(source, entry.code));
    }
    for (int64_t column = lanes.lane * kColumns; column < shape.row_size;
         column += kColumns * lanes.count) {
      Bits<Row> g[kEntries];
      Bits<Row> w[kEntries];
      Bits<Row> o[kEntries];
#pragma unroll
      for (int e = 0; e < kEntries; ++e) {
        g[e] = load_bits<Row>(grad + visit_rows[e] + column);
        w[e] = load_bits<Row>(table + code_rows[e] + column);
        o[e] = load_bits<Row>(pooled + visit_rows[e] + column);
      }
#pragma unroll
      for (int e = 0; e < kEntries; ++e) {
        acc_t wide_g[kColumns];
        acc_t wide_w[kColumns];
        acc_t wide_o[kColumns];
        widen_bits<Row, scalar_t>(g[e], wide_g);
        widen_bits<Row, scalar_t>(w[e], wide_w);
        widen_bits<Row, scalar_t>(o[e], wide_o);
#pragma unroll
        for (int c = 0; c < kColumns; ++c) products[e] += wide_g[c] * (wide_w[c] - wide_o[c]);
      }
    }
#pragma unroll
    for (int e = 0; e < kEntries; ++e) {
      const acc_t product = lanes.sum(products[e]);
      if (lanes.lane == i + e) mine = weight * product;
    }
  }
  if (lanes.lane < n) {
    attention[first + lanes.lane] = weight;
    score_terms[first + lanes.lane] = mine;
  }
}

}  // namespace ehrseq::cuda
