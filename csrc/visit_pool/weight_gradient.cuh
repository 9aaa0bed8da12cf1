// Backward of pooling with weights per code: the weights of entries, and the weights' gradient.
#pragma once

#include <limits>

#include "visit_pool/chunk_sums.cuh"

namespace ehrseq::cuda {

// 0 says that an entry is left out (WeightedGradients). What another weight makes 0, over a total
// of infinity for one, is this instead, so that a NaN that it multiplies shows.
template <typename acc_t>
constexpr acc_t kSmallest = std::numeric_limits<acc_t>::denorm_min();

// What each entry of the index multiplies its visit's gradient by: the weight of its code, of a
// mean over the visit's total.
//   grid    x: kGradientThreads entries per block
//   block   kGradientThreads
//   shared  none
//   reads   the index's visits, positions [entries] among the batch's codes, weights [codes],
//   totals
//           [n_visits] (null in mode sum)
//   writes  entry_weights [entries]
template <typename acc_t>
__global__ void __launch_bounds__(kGradientThreads)
    weights_of_entries(BatchIndex index, const int32_t* positions, const acc_t* weights,
                       const acc_t* totals, acc_t* entry_weights) {
  const int64_t entry = static_cast<int64_t>(blockIdx.x) * kGradientThreads + threadIdx.x;
  if (entry >= index.size()) return;
  const int32_t visit = index.visits[entry];
  const int32_t position = positions[entry];
  require(visit >= 0 && visit < index.n_visits);
  require(position >= 0 && position < index.size());
  const acc_t scale = totals != nullptr ? mean_scale(totals[visit]) : acc_t(1);
  const acc_t weight = weights[position];
  const acc_t product = scale * weight;
  const bool is_weight = weight != acc_t(0);
  entry_weights[entry] = is_weight && product == acc_t(0) ? kSmallest<acc_t> : product;
}

// Of the weight of each code of a visit with gradient g: g . table[code], of a mean m over a total
// of 1 or more g . (table[code] - m) / total. The difference is taken first: summed separately, its
// two halves are large and cancel.
//   grid    x: visits, a group of lanes for each (a grid-stride loop)
//   block   kGradientThreads, as groups of 8, 16 or 32 lanes: a group takes the codes of a visit,
//           kCodes at a time, and all columns of their rows
//   shared  none
//   reads   codes and offsets, gradients of visits, the table, in mode mean outputs and totals
//           [n_visits] (both null in mode sum)
//   writes  out [codes]
template <typename scalar_t, int kColumns>
__global__ void __launch_bounds__(kGradientThreads, 4)
    weight_gradients(PackedCodes packed, int64_t n_visits, const scalar_t* grad,
                     const scalar_t* table, const scalar_t* pooled,
                     const accumulator_t<scalar_t>* totals, RowShape shape,
                     accumulator_t<scalar_t>* out) {
  using acc_t = accumulator_t<scalar_t>;
  using Row = Pack<scalar_t, kColumns>;
  constexpr int kCodes = 2;
  const Lanes lanes(shape.lanes_log2);
  const int64_t groups = static_cast<int64_t>(gridDim.x) * lanes.groups();
  for (int64_t visit = static_cast<int64_t>(blockIdx.x) * lanes.groups() + lanes.group();
       visit < n_visits; visit += groups) {
    const auto codes = packed.open<acc_t>(visit, Part());
    const acc_t total = totals != nullptr ? totals[visit] : acc_t(0);
    const bool subtracts = !(total < acc_t(1));
    const acc_t scale = subtracts ? acc_t(1) / total : acc_t(1);
    for (int32_t first = 0; first < codes.end; first += kCodes) {
      int64_t rows[kCodes];
      acc_t products[kCodes] = {};
#pragma unroll
      for (int i = 0; i < kCodes; ++i) {
        // the first of them again, whose sum is not used
        const int32_t at = first + i < codes.end ? first + i : first;
        rows[i] = shape.offset(packed.at(codes.base + at));
      }
      for (int64_t column = lanes.lane * kColumns; column < shape.row_size;
           column += kColumns * lanes.count) {
        acc_t g[kColumns];
        acc_t mean[kColumns] = {};
        Bits<Row> w[kCodes];
        widen_bits<Row, scalar_t>(load_bits<Row>(grad + shape.offset(visit) + column), g);
        if (subtracts) {
          widen_bits<Row, scalar_t>(load_bits<Row>(pooled + shape.offset(visit) + column), mean);
        }
#pragma unroll
        for (int i = 0; i < kCodes; ++i) w[i] = load_bits<Row>(table + rows[i] + column);
#pragma unroll
        for (int i = 0; i < kCodes; ++i) {
          acc_t row[kColumns];
          widen_bits<Row, scalar_t>(w[i], row);
#pragma unroll
          for (int c = 0; c < kColumns; ++c) {
            products[i] += g[c] * (subtracts ? row[c] - mean[c] : row[c]);
          }
        }
      }
#pragma unroll
      for (int i = 0; i < kCodes; ++i) {
        const acc_t product = lanes.sum(products[i]);
        if (lanes.lane == 0 && first + i < codes.end) out[codes.base + first + i] = scale * product;
      }
    }
  }
}

}  // namespace ehrseq::cuda
