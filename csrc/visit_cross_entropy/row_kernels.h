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
    transpose(as_accumulators(logits, count * classes_), classes_, columns_, kRows, count,
              classes_);
    for (int64_t c = 0; c < (count < kRows ? classes_ : 0); ++c) {
      for (int64_t i = count; i < kRows; ++i) columns_[c * kRows + i] = T(0);
    }
  }

  EHRSEQ_INLINE Lanes<T> of(int64_t c) const { return load(&columns_[c * kRows]); }
  EHRSEQ_INLINE void set(int64_t c, const Lanes<T>& lanes) { store(&columns_[c * kRows], lanes); }
  T at(int64_t c, int64_t row) const { return columns_[c * kRows + row]; }
  void set(int64_t c, int64_t row, T value) { columns_[c * kRows + row] = value; }

  template <typename grad_t>
  EHRSEQ_INLINE void give(grad_t* grad, int64_t count) {
    T* rows = rows_;
    if constexpr (std::is_same_v<grad_t, T>) rows = grad;
    transpose(columns_, kRows, rows, classes_, classes_, count);
    if constexpr (!std::is_same_v<grad_t, T>) {
      const int64_t values = count * classes_;
      int64_t at = 0;
      for (; at + kRows <= values; at += kRows) store(grad + at, load(rows + at));
      for (; at < values; ++at) grad[at] = static_cast<grad_t>(rows[at]);
    }
  }

 private:
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

// Each lane's number of class `label`; of class 0 where the label is -1.
template <typename T>
EHRSEQ_INLINE Lanes<T> at_labels(const LanesOfRows<T>& lanes, const int32_t* labels) {
  T found[LanesOfRows<T>::kRows];
  for (int64_t i = 0; i < LanesOfRows<T>::kRows; ++i) found[i] = lanes.at(labels[i], i);
  return load(found);
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

  int32_t labels[kRows] = {};
  double weights[kRows] = {};
  double label_weights[kRows] = {};
  bool all_count = true;
  for (int64_t i = 0; i < count; ++i) {
    const bool counts = given_labels[i] >= 0;
    all_count &= counts;
    labels[i] = static_cast<int32_t>(counts ? given_labels[i] : 0);
    weights[i] = counts ? given_weights[i] : 0.0;
  }
  if (settings.weights != nullptr) {
    for (int64_t i = 0; i < kRows; ++i) label_weights[i] = weights[i] * settings.weights[labels[i]];
  } else {
    std::memcpy(label_weights, weights, sizeof weights);
  }
  Wide<T> of_label = load_wide<T>(label_weights);  // the weight of the label's term
  Wide<T> of_classes = load_wide<T>(weights);      // and of all classes' terms, before theirs
  for (int p = 0; p < kParts; ++p) {
    if (kSmoothed) of_label.part[p] *= 1 - settings.smoothing;
    of_classes.part[p] *= settings.smoothing / static_cast<double>(classes);
  }

  Lanes<T> largest = lanes.of(0);
  for (int64_t c = 1; c < classes; ++c) {
    const Lanes<T> x = lanes.of(c);
    largest = x > largest ? x : largest;  // a NaN is left to the sum
  }
  const Wide<T> at_largest = widen(largest);
  const Wide<T> at_label = widen(at_labels(lanes, labels));

  Wide<T> sums{};
  Wide<T> spread{};  // sum of weight_c (m - x_c)
  for (int64_t c = 0; c < classes; ++c) {
    const Lanes<T> x = lanes.of(c);
    const Lanes<T> term = exp_nonpositive<T>(x - largest);
    lanes.set(c, term);
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
  const Wide<T> label_terms = widen(at_labels(lanes, labels));
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
  const Lanes<T> narrow_ratios = narrow(ratios);
  for (int64_t c = 0; c < classes; ++c) {
    Lanes<T> slope = lanes.of(c) * narrow_ratios;
    if (kSmoothed) {
      const double weight = settings.share * settings.weight_of(c);
      Wide<T> wide = widen(slope);
      for (int p = 0; p < kParts; ++p) wide.part[p] -= weight * of_classes.part[p];
      slope = narrow(wide);
    }
    lanes.set(c, signed_zeros<T>(slope));
  }
  if (kSmoothed) {
    double own[kRows];
    for (int64_t i = 0; i < kRows; ++i) own[i] = settings.share * settings.weight_of(labels[i]);
    const Wide<T> wide = load_wide<T>(own);
    for (int p = 0; p < kParts; ++p) slopes.part[p] -= wide.part[p] * of_classes.part[p];
  }
  T of_labels[kRows];
  store(of_labels, signed_zeros<T>(narrow(slopes)));
  for (int64_t i = 0; i < count; ++i) lanes.set(labels[i], i, of_labels[i]);
  if (!all_count) {
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t c = 0; c < (given_labels[i] < 0 ? classes : 0); ++c) lanes.set(c, i, T(0));
    }
  }
  lanes.give(grad, count);
}

template <bool kSmoothed, typename scalar_t>
void all_rows(const Settings& settings, const Rows<scalar_t>& rows, double* losses) {
  using T = accumulator_t<scalar_t>;
  constexpr int64_t kRows = LanesOfRows<T>::kRows;
  LanesOfRows<T> lanes(settings.classes, rows.memory);
  for (int64_t at = 0; at < rows.count; at += kRows) {
    const int64_t values = at * settings.classes;
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
