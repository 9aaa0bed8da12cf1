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
#include "visit_pool/segments.h"

namespace ehrseq {

constexpr int64_t kEntriesPerTask = 4096;

// For modes mean and sum (arg_max null) the weighted sum of the visits' gradients; for max, of the
// columns that the code won.
template <typename scalar_t, typename acc_t>
void sum_chunk(const scalar_t* grad, const int32_t* arg_max, int64_t row_size,
               const IndexView<acc_t>& index, const Chunk& chunk, acc_t* sums) {
  if (arg_max == nullptr) {
    const int32_t offsets[2] = {chunk.begin, chunk.end};
    const Segments<acc_t> segment{index.visits, index.weights, nullptr, offsets};
    row_kernels<scalar_t>().sum_segments_wide(grad, row_size, segment, 0, 1, sums);
  } else {
    const bool continues = chunk.begin != index.offsets[chunk.segment];
    row_kernels<scalar_t>().sum_won_columns(grad, arg_max, row_size, index.codes[chunk.segment],
                                            index.visits, chunk.begin, chunk.end, continues, sums);
  }
}

template <typename acc_t>
void add_row(const acc_t* row, int64_t row_size, acc_t* sums) {
  for (int64_t column = 0; column < row_size; ++column) sums[column] += row[column];
}

// Sums the gradient of every code in the index and passes it to finish(segment, sums).
template <typename scalar_t, typename acc_t, typename Finish>
void sum_code_gradients(const scalar_t* grad, const int32_t* arg_max, int64_t row_size,
                        const IndexView<acc_t>& index, const Finish& finish) {
  const auto chunks = cut_into_chunks(index.offsets, index.n_codes);
  const auto n_chunks = static_cast<int64_t>(chunks.size());
  std::vector<int64_t> partial_of(n_chunks, -1);
  int64_t n_partials = 0;
  for (int64_t i = 0; i < n_chunks; ++i) {
    if (chunks[i].n_chunks > 1) partial_of[i] = n_partials++;
  }
  std::vector<acc_t> partials(n_partials * row_size);

  // Ranges of entries, not of chunks, so that threads get equal shares whatever the codes' counts.
  auto first_chunk_from = [&](int64_t entry) {
    return std::lower_bound(chunks.begin(), chunks.end(), entry,
                            [](const Chunk& chunk, int64_t at) { return chunk.begin < at; }) -
           chunks.begin();
  };
  parallel_for(0, index.n_entries(), kEntriesPerTask, [&](int64_t begin, int64_t end) {
    std::vector<acc_t> sums(row_size);
    const int64_t last = first_chunk_from(end);
    for (int64_t i = first_chunk_from(begin); i < last; ++i) {
      if (partial_of[i] < 0) {
        sum_chunk(grad, arg_max, row_size, index, chunks[i], sums.data());
        finish(chunks[i].segment, sums.data());
      } else {
        sum_chunk(grad, arg_max, row_size, index, chunks[i],
                  partials.data() + partial_of[i] * row_size);
      }
    }
  });

  if (n_partials == 0) return;
  const int64_t moved = n_partials * row_size * sizeof(acc_t);
  parallel_for(0, n_chunks, grain_of_bytes(n_chunks, moved), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const bool leads = partial_of[i] >= 0 && chunks[i].begin == index.offsets[chunks[i].segment];
      if (!leads) continue;
      acc_t* sums = partials.data() + partial_of[i] * row_size;
      for (int32_t chunk = 1; chunk < chunks[i].n_chunks; ++chunk) {
        add_row(sums + chunk * row_size, row_size, sums);
      }
      finish(chunks[i].segment, sums);
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
  const int64_t absent = (vocabulary - n_codes) * row_size * sizeof(scalar_t);
  const int64_t grain = grain_of_bytes(n_codes + 1, absent);
  parallel_for(0, n_codes + 1, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t from = i == 0 ? 0 : codes[i - 1] + 1;
      const int64_t to = i == n_codes ? vocabulary : codes[i];
      std::memset(static_cast<void*>(out + from * row_size), 0,
                  (to - from) * row_size * sizeof(scalar_t));
    }
  });
}

}  // namespace ehrseq
