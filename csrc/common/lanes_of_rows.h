// Rows of a few numbers each, as many as a vector has lanes, with the rows in the lanes: one vector
// for each column. So few classes are as fast as many, and a row's result does not depend on its
// neighbours.
//
// No include guard, as vector_math.h, which this includes.

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "common/dtypes.h"
#include "common/simd.h"
#include "common/vector_math.h"

namespace ehrseq::EHRSEQ_ISA {

// Four numbers of each of four rows.
template <typename T>
EHRSEQ_INLINE void transpose_four(const T* from, int64_t from_stride, T* to, int64_t to_stride) {
  using Four = lanes_t<T, 4>;
  using Places = lanes_t<bits_t<T>, 4>;
  const Four a = load_exactly<4>(from);
  const Four b = load_exactly<4>(from + from_stride);
  const Four c = load_exactly<4>(from + 2 * from_stride);
  const Four d = load_exactly<4>(from + 3 * from_stride);
  const Four low_ab = __builtin_shuffle(a, b, Places{0, 4, 1, 5});
  const Four high_ab = __builtin_shuffle(a, b, Places{2, 6, 3, 7});
  const Four low_cd = __builtin_shuffle(c, d, Places{0, 4, 1, 5});
  const Four high_cd = __builtin_shuffle(c, d, Places{2, 6, 3, 7});
  store_exactly<4>(to, __builtin_shuffle(low_ab, low_cd, Places{0, 1, 4, 5}));
  store_exactly<4>(to + to_stride, __builtin_shuffle(low_ab, low_cd, Places{2, 3, 6, 7}));
  store_exactly<4>(to + 2 * to_stride, __builtin_shuffle(high_ab, high_cd, Places{0, 1, 4, 5}));
  store_exactly<4>(to + 3 * to_stride, __builtin_shuffle(high_ab, high_cd, Places{2, 3, 6, 7}));
}

// [rows, columns] to [columns, rows], in fours as far as there are; the last four may overlap.
template <typename T>
EHRSEQ_INLINE void transpose(const T* from, int64_t from_stride, T* to, int64_t to_stride,
                             int64_t rows, int64_t columns) {
  if (rows < 4 || columns < 4) {
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < columns; ++j) to[j * to_stride + i] = from[i * from_stride + j];
    }
    return;
  }
  for (int64_t i = 0; i < rows; i += 4) {
    const int64_t row = std::min(i, rows - 4);
    for (int64_t j = 0; j < columns; j += 4) {
      const int64_t column = std::min(j, columns - 4);
      transpose_four(from + row * from_stride + column, from_stride, to + column * to_stride + row,
                     to_stride);
    }
  }
}

#if EHRSEQ_ISA_LEVEL >= 2
// Four numbers of each of sixteen rows, whole vectors at a time: vectors that were stored in parts
// could not be loaded before these have left the processor's queue.
struct FourColumns {
  __m512 column[4];
};

// Rows 4g + i are 16 bytes in part g of row[i], in columns they are four lanes.
EHRSEQ_INLINE FourColumns transpose_parts(const FourColumns& row) {
  const __m512 low_ab = _mm512_unpacklo_ps(row.column[0], row.column[1]);
  const __m512 high_ab = _mm512_unpackhi_ps(row.column[0], row.column[1]);
  const __m512 low_cd = _mm512_unpacklo_ps(row.column[2], row.column[3]);
  const __m512 high_cd = _mm512_unpackhi_ps(row.column[2], row.column[3]);
  return {{_mm512_shuffle_ps(low_ab, low_cd, 0x44), _mm512_shuffle_ps(low_ab, low_cd, 0xee),
           _mm512_shuffle_ps(high_ab, high_cd, 0x44), _mm512_shuffle_ps(high_ab, high_cd, 0xee)}};
}

EHRSEQ_INLINE void columns_of_sixteen(const float* rows, int64_t classes, float* columns) {
  for (int64_t c = 0; c < classes; c += 4) {
    const int64_t first = std::min(c, classes - 4);
    FourColumns four;
    for (int i = 0; i < 4; ++i) {
      const float* from = rows + i * classes + first;
      __m512 parts = _mm512_castps128_ps512(_mm_loadu_ps(from));
      parts = _mm512_insertf32x4(parts, _mm_loadu_ps(from + 4 * classes), 1);
      parts = _mm512_insertf32x4(parts, _mm_loadu_ps(from + 8 * classes), 2);
      four.column[i] = _mm512_insertf32x4(parts, _mm_loadu_ps(from + 12 * classes), 3);
    }
    four = transpose_parts(four);
    for (int i = 0; i < 4; ++i) _mm512_storeu_ps(columns + (first + i) * 16, four.column[i]);
  }
}

EHRSEQ_INLINE void rows_of_sixteen(const float* columns, int64_t classes, float* rows) {
  for (int64_t c = 0; c < classes; c += 4) {
    const int64_t first = std::min(c, classes - 4);
    FourColumns four;
    for (int i = 0; i < 4; ++i) four.column[i] = _mm512_loadu_ps(columns + (first + i) * 16);
    four = transpose_parts(four);
    for (int i = 0; i < 4; ++i) {
      float* to = rows + i * classes + first;
      _mm_storeu_ps(to, _mm512_castps512_ps128(four.column[i]));
      _mm_storeu_ps(to + 4 * classes, _mm512_extractf32x4_ps(four.column[i], 1));
      _mm_storeu_ps(to + 8 * classes, _mm512_extractf32x4_ps(four.column[i], 2));
      _mm_storeu_ps(to + 12 * classes, _mm512_extractf32x4_ps(four.column[i], 3));
    }
  }
}
#endif

// The logits of up to kLanes rows, one vector for each class.
template <typename T>
class LanesOfRows {
 public:
  static constexpr int64_t kRows = kLanes<T>;
  static int64_t values_in_memory(int64_t classes) { return 2 * kRows * classes; }

  // `memory` holds values_in_memory(classes).
  LanesOfRows(int64_t classes, T* memory)
      : classes_(classes), columns_(memory), rows_(memory + classes * kRows) {}

  // Rows from `count` on are zeros.
  template <typename scalar_t>
  EHRSEQ_INLINE void take(const scalar_t* logits, int64_t count) {
    const T* rows = as_accumulators(logits, count * classes_);
#if EHRSEQ_ISA_LEVEL >= 2
    if constexpr (sizeof(T) == 4) {
      if (count == kRows && classes_ >= 4) return columns_of_sixteen(rows, classes_, columns_);
    }
#endif
    transpose(rows, classes_, columns_, kRows, count, classes_);
    for (int64_t c = 0; c < (count < kRows ? classes_ : 0); ++c) {
      for (int64_t i = count; i < kRows; ++i) columns_[c * kRows + i] = T(0);
    }
  }

  EHRSEQ_INLINE Lanes<T> of(int64_t c) const { return load(&columns_[c * kRows]); }
  EHRSEQ_INLINE void set(int64_t c, const Lanes<T>& lanes) { store(&columns_[c * kRows], lanes); }

  template <typename grad_t>
  EHRSEQ_INLINE void give(grad_t* grad, int64_t count) {
    T* rows = rows_;
    if constexpr (std::is_same_v<grad_t, T>) rows = grad;
    give_rows(rows, count);
    if constexpr (!std::is_same_v<grad_t, T>) {
      const int64_t values = count * classes_;
      int64_t at = 0;
      for (; at + kRows <= values; at += kRows) store(grad + at, load(rows + at));
      for (; at < values; ++at) grad[at] = static_cast<grad_t>(rows[at]);
    }
  }

 private:
  EHRSEQ_INLINE void give_rows(T* rows, int64_t count) const {
#if EHRSEQ_ISA_LEVEL >= 2
    if constexpr (sizeof(T) == 4) {
      if (count == kRows && classes_ >= 4) return rows_of_sixteen(columns_, classes_, rows);
    }
#endif
    transpose(columns_, kRows, rows, classes_, classes_, count);
  }

  template <typename scalar_t>
  EHRSEQ_INLINE const T* as_accumulators(const scalar_t* logits, int64_t values) {
    if constexpr (std::is_same_v<scalar_t, T>) {
      return logits;
    } else {
      int64_t at = 0;
      for (; at + kRows <= values; at += kRows) store(&rows_[at], load(logits + at));
      for (; at < values; ++at) rows_[at] = static_cast<T>(logits[at]);
      return rows_;
    }
  }

  int64_t classes_;
  T* columns_;  // [K, rows]
  T* rows_;     // [rows, K], of 16-bit numbers
};

}  // namespace ehrseq::EHRSEQ_ISA
