// The gradient of the embedding table from a code index: every row summed in a fixed order and
// written once.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "common/parallel.h"
#include "common/tensors.h"
#include "visit_pool/code_index.h"
#include "visit_pool/modes.h"
#include "visit_pool/segments.h"

namespace ehrseq {

// Mode max's winners, contiguous; null in other modes and where there are none (an operator refuses
// that before it uses them).
class Winners {
 public:
  Winners(const OptionalTensor& arg_max, int64_t mode) {
    if (mode == kMax && arg_max.has_value()) tensor_ = torch::stable::contiguous(*arg_max);
  }
  const int32_t* get() const {
    return tensor_.has_value() ? static_cast<const int32_t*>(tensor_->data_ptr()) : nullptr;
  }

 private:
  OptionalTensor tensor_;
};

constexpr int64_t kEntriesPerTask = 4096;

// For modes mean and sum (arg_max null) the weighted sum of the visits' gradients; for max, of the
// columns that the code won.
template <typename scalar_t, typename acc_t>
void sum_piece(const scalar_t* grad, const int32_t* arg_max, int64_t row_size,
               const IndexView<acc_t>& index, const Piece& piece, acc_t* sums) {
  if (arg_max == nullptr) {
    const int32_t offsets[2] = {piece.begin, piece.end};
    const Segments<acc_t> segment{index.visits, index.weights, nullptr, offsets};
    row_kernels<scalar_t>().sum_segments_wide(grad, row_size, segment, 0, 1, sums);
  } else {
    const bool continues = piece.begin != index.offsets[piece.segment];
    row_kernels<scalar_t>().sum_won_columns(grad, arg_max, row_size, index.codes[piece.segment],
                                            index.visits, piece.begin, piece.end, continues, sums);
  }
}

template <typename acc_t>
void add_row(const acc_t* row, int64_t row_size, acc_t* sums) {
  for (int64_t column = 0; column < row_size; ++column) sums[column] += row[column];
}

// Sums the gradient of every code in the index and hands it to finish(segment, sums).
template <typename scalar_t, typename acc_t, typename Finish>
void sum_code_gradients(const scalar_t* grad, const int32_t* arg_max, int64_t row_size,
                        const IndexView<acc_t>& index, const Finish& finish) {
  const auto pieces = cut_into_pieces(index.offsets, index.n_codes);
  const auto n_pieces = static_cast<int64_t>(pieces.size());
  std::vector<int64_t> partial_of(n_pieces, -1);
  int64_t n_partials = 0;
  for (int64_t i = 0; i < n_pieces; ++i) {
    if (pieces[i].n_pieces > 1) partial_of[i] = n_partials++;
  }
  std::vector<acc_t> partials(n_partials * row_size);

  // Ranges of entries, not of pieces, so that threads get equal shares whatever the codes' counts.
  auto first_piece_from = [&](int64_t entry) {
    return std::lower_bound(pieces.begin(), pieces.end(), entry,
                            [](const Piece& piece, int64_t at) { return piece.begin < at; }) -
           pieces.begin();
  };
  parallel_for(0, index.n_entries(), kEntriesPerTask, [&](int64_t begin, int64_t end) {
    std::vector<acc_t> sums(row_size);
    const int64_t last = first_piece_from(end);
    for (int64_t i = first_piece_from(begin); i < last; ++i) {
      if (partial_of[i] < 0) {
        sum_piece(grad, arg_max, row_size, index, pieces[i], sums.data());
        finish(pieces[i].segment, sums.data());
      } else {
        sum_piece(grad, arg_max, row_size, index, pieces[i],
                  partials.data() + partial_of[i] * row_size);
      }
    }
  });

  parallel_for(0, n_pieces, 64, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const bool leads = partial_of[i] >= 0 && pieces[i].begin == index.offsets[pieces[i].segment];
      if (!leads) continue;
      acc_t* sums = partials.data() + partial_of[i] * row_size;
      for (int32_t piece = 1; piece < pieces[i].n_pieces; ++piece) {
        add_row(sums + piece * row_size, row_size, sums);
      }
      finish(pieces[i].segment, sums);
    }
  });
}

template <typename scalar_t, typename acc_t>
void write_row(const acc_t* sums, int64_t row_size, scalar_t* out) {
  for (int64_t column = 0; column < row_size; ++column) {
    out[column] = static_cast<scalar_t>(sums[column]);
  }
}

// Zeros for the codes that no visit holds: the rows between those in `codes`.
template <typename scalar_t>
void zero_absent_rows(const int32_t* codes, int64_t n_codes, int64_t vocabulary, int64_t row_size,
                      scalar_t* out) {
  parallel_for(0, n_codes + 1, 1024, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t from = i == 0 ? 0 : codes[i - 1] + 1;
      const int64_t to = i == n_codes ? vocabulary : codes[i];
      std::memset(static_cast<void*>(out + from * row_size), 0,
                  (to - from) * row_size * sizeof(scalar_t));
    }
  });
}

}  // namespace ehrseq
