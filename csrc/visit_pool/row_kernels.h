// What segments.h declares. Compiled once for each instruction set, hence no include guard: see
// common/each_isa.h.

#include "common/native_vectors.h"
#include "visit_pool/segments.h"

namespace ehrseq::pooling::EHRSEQ_ISA {

using namespace ehrseq::EHRSEQ_ISA;

// Registers that a loop keeps sums in, and as many again for the rows that maxima come from.
constexpr int kSums = EHRSEQ_ISA_LEVEL == 2 ? 4 : 8;
constexpr int kMaxima = 4;

// Neighbouring columns of rows: kVectors vectors from `column` on or, where rows are narrower than
// one vector (kNarrow), the first `count` lanes of one.
template <typename T, int kVectors_, bool kNarrow>
struct Block {
  static constexpr int kVectors = kVectors_;
  int64_t column;
  int64_t count;

  template <typename scalar_t>
  EHRSEQ_INLINE Native<T> get(const scalar_t* row, int vector) const {
    if constexpr (kNarrow) {
      scalar_t columns[kWidth<T>] = {};
      for (int64_t i = 0; i < count; ++i) columns[i] = row[i];
      return load_native(columns);
    } else {
      return load_native(row + column + vector * kWidth<T>);
    }
  }
  EHRSEQ_INLINE NativeMask<T> get_ids(const int32_t* row, int vector) const {
    if constexpr (kNarrow) {
      int32_t ids[kWidth<T>] = {};
      for (int64_t i = 0; i < count; ++i) ids[i] = row[i];
      return load_ids<T>(ids);
    } else {
      return load_ids<T>(row + column + vector * kWidth<T>);
    }
  }
  template <typename scalar_t>
  EHRSEQ_INLINE void put(scalar_t* row, int vector, const Native<T>& lanes) const {
    if constexpr (kNarrow) {
      scalar_t columns[kWidth<T>];
      store_native(columns, lanes);
      for (int64_t i = 0; i < count; ++i) row[i] = columns[i];
    } else {
      store_native(row + column + vector * kWidth<T>, lanes);
    }
  }
  EHRSEQ_INLINE void put_ids(int32_t* row, int vector, const NativeMask<T>& lanes) const {
    if constexpr (kNarrow) {
      int32_t ids[kWidth<T>];
      store_ids<T>(ids, lanes);
      for (int64_t i = 0; i < count; ++i) row[i] = ids[i];
    } else {
      store_ids<T>(row + column + vector * kWidth<T>, lanes);
    }
  }
};

// Calls body(block) for blocks that cover all columns. The last may cover some once more, which
// then get the same values again.
template <typename T, int kVectors, typename Body>
EHRSEQ_INLINE void over_columns(int64_t row_size, const Body& body) {
  constexpr int kFewer = kVectors > 2 ? 2 : 1;
  if (row_size < kWidth<T>) {
    body(Block<T, 1, true>{0, row_size});
    return;
  }
  int64_t column = 0;
  for (; column + kVectors * kWidth<T> <= row_size; column += kVectors * kWidth<T>) {
    body(Block<T, kVectors, false>{column, 0});
  }
  for (; column + kFewer * kWidth<T> <= row_size; column += kFewer * kWidth<T>) {
    body(Block<T, kFewer, false>{column, 0});
  }
  for (; column < row_size; column += kWidth<T>) {
    const int64_t last = row_size - kWidth<T>;
    body(Block<T, 1, false>{column < last ? column : last, 0});
  }
}

// Accumulates the columns of one segment in registers, then writes them.
template <typename BlockType, typename scalar_t, typename acc_t, typename out_t>
EHRSEQ_INLINE void sum_columns(const BlockType& block, const scalar_t* table, int64_t row_size,
                               const Segments<acc_t>& in, int32_t begin, int32_t end, acc_t scale,
                               out_t* out) {
  Native<acc_t> sums[BlockType::kVectors] = {};
  if (in.weights == nullptr) {
    for (int32_t entry = begin; entry < end; ++entry) {
      const scalar_t* row = table + in.rows[entry] * row_size;
      for (int i = 0; i < BlockType::kVectors; ++i) sums[i] += block.get(row, i);
    }
  } else {
    for (int32_t entry = begin; entry < end; ++entry) {
      const scalar_t* row = table + in.rows[entry] * row_size;
      const acc_t weight = in.weights[entry];
      for (int i = 0; i < BlockType::kVectors; ++i) {
        sums[i] += rounded(weight * block.get(row, i));
      }
    }
  }
  for (int i = 0; i < BlockType::kVectors; ++i) block.put(out, i, sums[i] * scale);
}

// Padded visits follow one another: from `segment` on, how many have no entry.
EHRSEQ_INLINE int64_t empty_segments(const int32_t* offsets, int64_t segment, int64_t last) {
  int64_t empty = 0;
  while (segment + empty < last && offsets[segment + empty] == offsets[segment + empty + 1])
    ++empty;
  return empty;
}

template <typename scalar_t, typename out_t>
void sum_segments(const scalar_t* table, int64_t row_size,
                  const Segments<accumulator_t<scalar_t>>& in, int64_t first, int64_t last,
                  out_t* out) {
  using acc_t = accumulator_t<scalar_t>;
  for (int64_t segment = first; segment < last; ++segment, out += row_size) {
    if (const int64_t empty = empty_segments(in.offsets, segment, last); empty > 0) {
      std::memset(static_cast<void*>(out), 0, empty * row_size * sizeof(out_t));
      segment += empty - 1;
      out += (empty - 1) * row_size;
      continue;
    }
    const acc_t scale = in.scales == nullptr ? acc_t(1) : in.scales[segment];
    over_columns<acc_t, kSums>(row_size, [&](const auto& block) __attribute__((always_inline)) {
      sum_columns(block, table, row_size, in, in.offsets[segment], in.offsets[segment + 1], scale,
                  out);
    });
  }
}

template <typename BlockType, typename scalar_t>
EHRSEQ_INLINE void max_columns(const BlockType& block, const scalar_t* table, int64_t row_size,
                               const int32_t* rows, const int32_t* ids, int32_t begin, int32_t end,
                               scalar_t* out, int32_t* winners) {
  using acc_t = accumulator_t<scalar_t>;
  Native<acc_t> best[BlockType::kVectors];
  NativeMask<acc_t> won[BlockType::kVectors];
  for (int i = 0; i < BlockType::kVectors; ++i) {
    best[i] = block.get(table + rows[begin] * row_size, i);
    won[i] = NativeMask<acc_t>{} + ids[begin];
  }
  for (int32_t entry = begin + 1; entry < end; ++entry) {
    const scalar_t* row = table + rows[entry] * row_size;
    const NativeMask<acc_t> id = NativeMask<acc_t>{} + ids[entry];
    for (int i = 0; i < BlockType::kVectors; ++i) {
      const Native<acc_t> values = block.get(row, i);
      // greater, or the first NaN
      const NativeMask<acc_t> wins = ~(values <= best[i]) & (best[i] == best[i]);
      best[i] = wins ? values : best[i];
      won[i] = wins ? id : won[i];
    }
  }
  for (int i = 0; i < BlockType::kVectors; ++i) {
    block.put(out, i, best[i]);
    block.put_ids(winners, i, won[i]);
  }
}

template <typename scalar_t>
void max_segments(const scalar_t* table, int64_t row_size, const int32_t* rows, const int32_t* ids,
                  const int32_t* offsets, int64_t first, int64_t last, scalar_t* out,
                  int32_t* winners) {
  for (int64_t segment = first; segment < last; ++segment, out += row_size, winners += row_size) {
    if (const int64_t empty = empty_segments(offsets, segment, last); empty > 0) {
      std::memset(static_cast<void*>(out), 0, empty * row_size * sizeof(scalar_t));
      std::fill_n(winners, empty * row_size, -1);
      segment += empty - 1;
      out += (empty - 1) * row_size;
      winners += (empty - 1) * row_size;
      continue;
    }
    over_columns<accumulator_t<scalar_t>, kMaxima>(
        row_size, [&](const auto& block) __attribute__((always_inline)) {
          max_columns(block, table, row_size, rows, ids, offsets[segment], offsets[segment + 1],
                      out, winners);
        });
  }
}

template <typename scalar_t>
void sum_won_columns(const scalar_t* grad, const int32_t* winners, int64_t row_size, int32_t code,
                     const int32_t* visits, int32_t begin, int32_t end, bool continues,
                     accumulator_t<scalar_t>* sums) {
  using acc_t = accumulator_t<scalar_t>;
  over_columns<acc_t, kSums>(row_size, [&](const auto& block) __attribute__((always_inline)) {
    constexpr int kVectors = std::decay_t<decltype(block)>::kVectors;
    Native<acc_t> won[kVectors] = {};
    const NativeMask<acc_t> id = NativeMask<acc_t>{} + code;
    // A code that a visit holds twice wins once.
    int32_t before = continues ? visits[begin - 1] : -1;
    for (int32_t entry = begin; entry < end; ++entry) {
      const int32_t visit = visits[entry];
      if (visit == before) continue;
      before = visit;
      const int64_t row = visit * row_size;
      for (int i = 0; i < kVectors; ++i) {
        const Native<acc_t> values = block.get(grad + row, i);
        won[i] += block.get_ids(winners + row, i) == id ? values : Native<acc_t>{};
      }
    }
    for (int i = 0; i < kVectors; ++i) block.put(sums, i, won[i]);
  });
}

template <typename scalar_t>
void scale_row(const scalar_t* grad, accumulator_t<scalar_t> factor, int64_t row_size,
               scalar_t* out) {
  using acc_t = accumulator_t<scalar_t>;
  over_columns<acc_t, 1>(row_size, [&](const auto& block) __attribute__((always_inline)) {
    block.put(out, 0, factor * block.get(grad, 0));
  });
}

template <typename scalar_t>
void keep_won_columns(const scalar_t* grad, const int32_t* winners, int32_t id, int64_t row_size,
                      scalar_t* out) {
  using acc_t = accumulator_t<scalar_t>;
  over_columns<acc_t, 1>(row_size, [&](const auto& block) __attribute__((always_inline)) {
    const NativeMask<acc_t> won = block.get_ids(winners, 0) == (NativeMask<acc_t>{} + id);
    const Native<acc_t> values = block.get(grad, 0);
    block.put(out, 0, won ? values : Native<acc_t>{});
  });
}

// g . (w - o), in sixteen running sums that are added in their order.
template <typename scalar_t>
EHRSEQ_INLINE accumulator_t<scalar_t> dot_with_difference(const scalar_t* g, const scalar_t* w,
                                                          const scalar_t* o, int64_t size) {
  using acc_t = accumulator_t<scalar_t>;
  constexpr int64_t kVectors = 16 / kWidth<acc_t>;
  Native<acc_t> sums[kVectors] = {};
  int64_t i = 0;
  for (; i + 16 <= size; i += 16) {
    for (int64_t vector = 0; vector < kVectors; ++vector) {
      const int64_t at = i + vector * kWidth<acc_t>;
      sums[vector] += rounded(load_native(g + at) * (load_native(w + at) - load_native(o + at)));
    }
  }
  acc_t lanes[16];
  std::memcpy(lanes, sums, sizeof lanes);
  for (int lane = 0; i < size; ++i, ++lane) {
    const acc_t difference = static_cast<acc_t>(w[i]) - static_cast<acc_t>(o[i]);
    lanes[lane] += rounded(static_cast<acc_t>(g[i]) * difference);
  }
  acc_t sum = 0;
  for (const acc_t lane : lanes) sum += lane;
  return sum;
}

template <typename scalar_t>
void sum_score_gradients(const scalar_t* grad, const scalar_t* table, const scalar_t* pooled,
                         int64_t row_size, const IndexView<accumulator_t<scalar_t>>& index,
                         int64_t first, int64_t last, scalar_t* grad_scores) {
  using acc_t = accumulator_t<scalar_t>;
  for (int64_t segment = first; segment < last; ++segment) {
    const scalar_t* row = table + index.codes[segment] * row_size;
    acc_t sum = 0;
    for (int32_t i = index.offsets[segment]; i < index.offsets[segment + 1]; ++i) {
      const int64_t visit = index.visits[i] * row_size;
      const acc_t dot = dot_with_difference(grad + visit, row, pooled + visit, row_size);
      sum += rounded(index.weights[i] * dot);
    }
    grad_scores[index.codes[segment]] = static_cast<scalar_t>(sum);
  }
}

// g . w or g . (w - o) for several rows w, each in sixteen running sums that are added in pairs.
template <bool kSubtracts, int kRows, typename scalar_t>
EHRSEQ_INLINE void dots_of_rows(const scalar_t* g, const scalar_t* const (&w)[kRows],
                                const scalar_t* o, int64_t size, accumulator_t<scalar_t> scale,
                                accumulator_t<scalar_t>* out) {
  using acc_t = accumulator_t<scalar_t>;
  constexpr int64_t kVectors = 16 / kWidth<acc_t>;
  Native<acc_t> sums[kRows][kVectors] = {};
  int64_t i = 0;
  for (; i + 16 <= size; i += 16) {
    for (int64_t vector = 0; vector < kVectors; ++vector) {
      const int64_t at = i + vector * kWidth<acc_t>;
      const Native<acc_t> wide_g = load_native(g + at);
      Native<acc_t> wide_o = {};
      if constexpr (kSubtracts) wide_o = load_native(o + at);
      for (int r = 0; r < kRows; ++r) {
        Native<acc_t> row = load_native(w[r] + at);
        if constexpr (kSubtracts) row -= wide_o;
        sums[r][vector] += rounded(wide_g * row);
      }
    }
  }
  acc_t lanes[kRows][16];
  std::memcpy(lanes, sums, sizeof lanes);
  for (int lane = 0; i < size; ++i, ++lane) {
    for (int r = 0; r < kRows; ++r) {
      acc_t row = static_cast<acc_t>(w[r][i]);
      if constexpr (kSubtracts) row -= static_cast<acc_t>(o[i]);
      lanes[r][lane] += rounded(static_cast<acc_t>(g[i]) * row);
    }
  }
  for (int half = 8; half > 0; half /= 2) {
    for (int r = 0; r < kRows; ++r) {
      for (int lane = 0; lane < half; ++lane) lanes[r][lane] += lanes[r][lane + half];
    }
  }
  for (int r = 0; r < kRows; ++r) out[r] = scale * lanes[r][0];
}

template <bool kSubtracts, typename scalar_t>
EHRSEQ_INLINE void dots_of_visit(const scalar_t* g, const scalar_t* table, const scalar_t* o,
                                 int64_t row_size, const int32_t* rows, int32_t begin, int32_t end,
                                 accumulator_t<scalar_t> scale, accumulator_t<scalar_t>* out) {
  int32_t i = begin;
  for (; i + 4 <= end; i += 4) {
    const scalar_t* const w[4] = {table + rows[i] * row_size, table + rows[i + 1] * row_size,
                                  table + rows[i + 2] * row_size, table + rows[i + 3] * row_size};
    dots_of_rows<kSubtracts>(g, w, o, row_size, scale, out + i);
  }
  for (; i < end; ++i) {
    const scalar_t* const w[1] = {table + rows[i] * row_size};
    dots_of_rows<kSubtracts>(g, w, o, row_size, scale, out + i);
  }
}

template <typename scalar_t>
void sum_weight_gradients(const scalar_t* grad, const scalar_t* table, const scalar_t* pooled,
                          const accumulator_t<scalar_t>* totals, int64_t row_size,
                          const int32_t* rows, const int32_t* offsets, int64_t first, int64_t last,
                          accumulator_t<scalar_t>* grad_weights) {
  using acc_t = accumulator_t<scalar_t>;
  for (int64_t visit = first; visit < last; ++visit) {
    const acc_t total = totals == nullptr ? acc_t(0) : totals[visit];
    const scalar_t* g = grad + visit * row_size;
    if (total < acc_t(1)) {
      dots_of_visit<false>(g, table, g, row_size, rows, offsets[visit], offsets[visit + 1],
                           acc_t(1), grad_weights);
    } else {
      dots_of_visit<true>(g, table, pooled + visit * row_size, row_size, rows, offsets[visit],
                          offsets[visit + 1], acc_t(1) / total, grad_weights);
    }
  }
}

template <typename scalar_t>
RowKernels<scalar_t> kernels() {
  return {sum_segments<scalar_t, scalar_t>,
          sum_segments<scalar_t, accumulator_t<scalar_t>>,
          max_segments<scalar_t>,
          sum_won_columns<scalar_t>,
          scale_row<scalar_t>,
          keep_won_columns<scalar_t>,
          sum_score_gradients<scalar_t>,
          sum_weight_gradients<scalar_t>};
}

}  // namespace ehrseq::pooling::EHRSEQ_ISA
