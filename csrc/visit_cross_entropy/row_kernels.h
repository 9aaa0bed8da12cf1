// Cross-entropy of rows of logits and its gradient, as many rows at a time as a vector has lanes:
// the lanes are rows, so that few classes are as fast as many, and a row's result does not depend
// on its neighbours.
//
// With m the largest logit of a row, s = Σ e^(x - m) and y the label, the term is
// log(s) + (m - x_y), where s is summed in double precision: near 1 it keeps the digits of
// log(s).
//
// Compiled once for each instruction set, hence no include guard: see common/each_isa.h.

#include "common/simd.h"
#include "common/vector_math.h"
#include "visit_cross_entropy/rows.h"

namespace ehrseq::visit_cross_entropy::EHRSEQ_ISA {

using namespace ehrseq::EHRSEQ_ISA;  // NOLINT: the lanes of the same instruction set

// A derivative of 0 that a row has is -0, as +0 says that the row does not count: the backward pass
// tells them apart (survival_nll/scale_cpu.cpp).
template <typename T>
EHRSEQ_INLINE Lanes<T> signed_zeros(const Lanes<T>& slopes) {
  return slopes == T(0) ? broadcast(T(-0.0)) : slopes;
}

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

  // `memory` holds values_in_memory(K).
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

template <typename T>
EHRSEQ_INLINE Wide<T> load_wide(const double* from) {
  Wide<T> wide;
  std::memcpy(&wide, from, sizeof wide);
  return wide;
}

// The classes that lanes have as labels; -1 for a lane that is left out, or beyond the rows.
template <typename T>
EHRSEQ_INLINE Mask<T> load_labels(const int64_t* labels, int64_t count) {
  constexpr int64_t kRows = LanesOfRows<T>::kRows;
  lanes_t<int64_t, kRows> wide = lanes_t<int64_t, kRows>{} - 1;
  if (count == kRows) {
    __builtin_memcpy(&wide, labels, sizeof wide);
  } else {
    __builtin_memcpy(&wide, labels, count * sizeof(int64_t));
  }
  return __builtin_convertvector(wide, Mask<T>);
}

template <typename T>
EHRSEQ_INLINE bool all_lanes(const Mask<T>& mask) {
  const auto both = [](const auto& a, const auto& b)
                        __attribute__((always_inline)) { return a & b; };
  return join_lanes<int64_t>((Mask<double>)mask, both) == -1;
}

// Settings::smoothing is 0 unless kSmoothed.
template <bool kSmoothed, typename T, typename scalar_t, typename grad_t>
void some_rows(const Settings& settings, LanesOfRows<T>& lanes, const scalar_t* logits,
               grad_t* grad, const int64_t* given_labels, const double* given_weights,
               int64_t count, double* losses) {
  constexpr int64_t kRows = LanesOfRows<T>::kRows;
  constexpr int kParts = Wide<T>::kParts;
  const int64_t classes = settings.classes;
  const double all_weights = settings.sum_of_weights;
  lanes.take(logits, count);

  const Mask<T> label = load_labels<T>(given_labels, count);
  const Mask<T> counts = label >= 0;
  const bool all_count =
      all_lanes<T>(counts | (lane_numbers<T>() >= static_cast<bits_t<T>>(count)));
  double weights[kRows] = {};
  double label_weights[kRows];
  for (int64_t i = 0; i < count; ++i) weights[i] = given_labels[i] < 0 ? 0.0 : given_weights[i];
  std::memcpy(label_weights, weights, sizeof weights);
  if (settings.weights != nullptr) {
    for (int64_t i = 0; i < count; ++i) {
      if (given_labels[i] >= 0) label_weights[i] *= settings.weights[given_labels[i]];
    }
  }
  Wide<T> of_label = load_wide<T>(label_weights);  // the weight of the label's term
  Wide<T> of_classes = load_wide<T>(weights);      // and of all classes' terms, before theirs
  for (int p = 0; p < kParts; ++p) {
    if (kSmoothed) of_label.part[p] *= 1 - settings.smoothing;
    of_classes.part[p] *= settings.smoothing / static_cast<double>(classes);
  }

  const auto is_label = [&](int64_t c) __attribute__((always_inline)) {
    return label == broadcast<bits_t<T>>(static_cast<bits_t<T>>(c));
  };
  Lanes<T> largest = lanes.of(0);
  Lanes<T> of_own_class = largest;
  for (int64_t c = 1; c < classes; ++c) {
    const Lanes<T> x = lanes.of(c);
    largest = x > largest ? x : largest;  // a NaN is left to the sum
    of_own_class = is_label(c) ? x : of_own_class;
  }
  const Wide<T> at_largest = widen(largest);
  const Wide<T> at_label = widen(of_own_class);

  Wide<T> sums{};
  Wide<T> spread{};  // sum of weight_c (m - x_c)
  for (int64_t c = 0; c < classes; ++c) {
    const Lanes<T> x = lanes.of(c);
    const Lanes<T> term = exp_nonpositive<T>(x - largest);
    lanes.set(c, term);
    of_own_class = is_label(c) ? term : of_own_class;
    const Wide<T> wide = widen(term);
    for (int p = 0; p < kParts; ++p) sums.part[p] += wide.part[p];
    if (kSmoothed) {
      const double weight = settings.weight_of(c);
      const Wide<T> value = widen(x);
      for (int p = 0; p < kParts; ++p) {
        spread.part[p] += weight * (at_largest.part[p] - value.part[p]);
      }
    }
  }

  Wide<T> terms;
  for (int p = 0; p < kParts; ++p) {
    const Doubles log_sum = log_nonnegative(sums.part[p]);
    terms.part[p] = of_label.part[p] * (log_sum + (at_largest.part[p] - at_label.part[p]));
    if (kSmoothed) {
      terms.part[p] += of_classes.part[p] * (all_weights * log_sum + spread.part[p]);
    }
  }
  double found[kRows];
  std::memcpy(found, &terms, sizeof found);
  std::copy_n(found, count, losses);
  if (!all_count) {
    for (int64_t i = 0; i < count; ++i) losses[i] = given_labels[i] < 0 ? 0.0 : losses[i];
  }
  if (grad == nullptr) return;

  // The label's derivative is -share (s - e^(x_y - m)) / s, without the digits that p_y - 1 loses.
  const Wide<T> label_terms = widen(of_own_class);
  Wide<T> ratios;  // what e^(x - m) is multiplied by
  Wide<T> slopes;  // the derivatives by the labels' logits
  for (int p = 0; p < kParts; ++p) {
    const Doubles inverse = settings.share / sums.part[p];
    const Doubles from_label = of_label.part[p] * inverse;
    ratios.part[p] = from_label;
    slopes.part[p] = from_label * (label_terms.part[p] - sums.part[p]);
    if (kSmoothed) {
      const Doubles from_classes = of_classes.part[p] * (all_weights * inverse);
      ratios.part[p] += from_classes;
      slopes.part[p] += from_classes * label_terms.part[p];
    }
  }
  if (kSmoothed) {
    double own[kRows] = {};
    for (int64_t i = 0; i < count; ++i) {
      if (given_labels[i] >= 0) own[i] = settings.share * settings.weight_of(given_labels[i]);
    }
    const Wide<T> wide = load_wide<T>(own);
    for (int p = 0; p < kParts; ++p) slopes.part[p] -= wide.part[p] * of_classes.part[p];
  }
  const Lanes<T> of_labels = narrow(slopes);
  const Lanes<T> narrow_ratios = narrow(ratios);
  for (int64_t c = 0; c < classes; ++c) {
    Lanes<T> slope = lanes.of(c) * narrow_ratios;
    if (kSmoothed) {
      const double weight = settings.share * settings.weight_of(c);
      Wide<T> wide = widen(slope);
      for (int p = 0; p < kParts; ++p) wide.part[p] -= weight * of_classes.part[p];
      slope = narrow(wide);
    }
    slope = signed_zeros<T>(is_label(c) ? of_labels : slope);
    lanes.set(c, all_count ? slope : (counts ? slope : Lanes<T>{}));
  }
  lanes.give(grad, count);
}

// Patients' visits are far apart where they are padded, which the processor's own prefetcher cannot
// follow.
template <typename scalar_t>
EHRSEQ_INLINE void prefetch(const scalar_t* from, int64_t values) {
  constexpr int64_t kLine = 64 / sizeof(scalar_t);
  constexpr int64_t kMost = 32 * kLine;  // of a row of many classes the prefetcher sees the rest
  for (int64_t at = 0; at < std::min(values, kMost); at += kLine) __builtin_prefetch(from + at);
}

template <bool kSmoothed, typename scalar_t>
void all_rows(const Settings& settings, const Rows<scalar_t>& rows, double* losses) {
  using T = accumulator_t<scalar_t>;
  constexpr int64_t kRows = LanesOfRows<T>::kRows;
  LanesOfRows<T> lanes(settings.classes, rows.memory);
  for (int64_t at = 0; at < rows.count; at += kRows) {
    const int64_t values = at * settings.classes;
    if (at < rows.count_ahead) prefetch(rows.ahead + values, kRows * settings.classes);
    some_rows<kSmoothed, T>(settings, lanes, rows.logits + values,
                            rows.grad ? rows.grad + values : nullptr, rows.labels + at,
                            rows.weights + at, std::min(kRows, rows.count - at), losses + at);
  }
}

template <typename scalar_t>
void rows_loss(const Settings& settings, const Rows<scalar_t>& rows, double* losses) {
  return settings.smoothing > 0 ? all_rows<true>(settings, rows, losses)
                                : all_rows<false>(settings, rows, losses);
}

inline bool mark_ignored(int64_t* labels, int64_t count, int64_t classes, int64_t ignore_index) {
  int64_t wrong = 0;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t label = labels[i];
    const int64_t ignored = label == ignore_index;
    wrong |= !ignored & (static_cast<uint64_t>(label) >= static_cast<uint64_t>(classes));
    labels[i] = ignored ? -1 : label;
  }
  return wrong == 0;
}

}  // namespace ehrseq::visit_cross_entropy::EHRSEQ_ISA
