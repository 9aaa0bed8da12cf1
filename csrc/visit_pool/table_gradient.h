// The table's gradient from the sums of each code, dense or sparse. `Source` has
//   rows       the incoming gradient, one row per visit
//   index      the batch's transposed index
//   row_size() numbers in a row of the table
//   sum<scalar_t>(finish)  sums every code's gradient and passes it to finish(segment, sums)
#pragma once

#include <algorithm>
#include <cstdint>
#include <tuple>

#include "common/dtypes.h"
#include "common/tensors.h"
#include "visit_pool/code_gradients.h"
#include "visit_pool/packed_batch.h"

namespace ehrseq {

template <typename Source>
Tensor dense_gradient(const Source& from, int64_t vocabulary, int64_t padding_idx,
                      const char* operation) {
  const auto& index = from.index;
  const int64_t row_size = from.row_size();
  auto grad_weight = empty(from.rows, {vocabulary, row_size}, from.rows.scalar_type());
  dispatch_floating(from.rows.scalar_type(), operation, [&](auto scalar_tag) {
    using scalar_t = typename decltype(scalar_tag)::type;
    auto* out = static_cast<scalar_t*>(grad_weight.data_ptr());
    zero_absent_rows(index.codes, index.n_codes, vocabulary, row_size, out);
    from.template sum<scalar_t>([&](int64_t segment, const auto* sums) {
      write_row(sums, row_size, out + index.codes[segment] * row_size);
    });
    if (padding_idx >= 0) {
      std::fill_n(out + padding_idx * row_size, row_size, static_cast<scalar_t>(0.0f));
    }
  });
  return grad_weight;
}

// The codes that have a row, and the rows.
template <typename Source>
std::tuple<Tensor, Tensor> sparse_gradient(const Source& from, int64_t padding_idx,
                                           const char* operation) {
  const int64_t row_size = from.row_size();
  const SparseRows sparse(from.index, padding_idx);
  auto code_ids = empty(from.rows, {sparse.count}, ScalarType::Long);
  auto code_rows = empty(from.rows, {sparse.count, row_size}, from.rows.scalar_type());
  sparse.write_ids(from.index, static_cast<int64_t*>(code_ids.data_ptr()));
  dispatch_floating(from.rows.scalar_type(), operation, [&](auto scalar_tag) {
    using scalar_t = typename decltype(scalar_tag)::type;
    auto* out = static_cast<scalar_t*>(code_rows.data_ptr());
    from.template sum<scalar_t>([&](int64_t segment, const auto* sums) {
      const int64_t row = sparse.row_of(segment);
      if (row >= 0) write_row(sums, row_size, out + row * row_size);
    });
  });
  return {code_ids, code_rows};
}

}  // namespace ehrseq
