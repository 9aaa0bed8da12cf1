// Cross-entropy of rows of logits and its gradient, as many rows at a time as a vector has lanes:
// the lanes are rows, so that few classes are as fast as many, and a row's result does not depend
// on its neighbours.
//
// With m the largest logit of a row, s = Σ e^(x - m) and y the label, the term is
// log(s) + (m - x_y), where s is summed in double precision: near 1 it keeps the digits of
// log(s).
//
// Compiled once for each instruction set, hence no include guard: see common/each_isa.h.

#include "common/lanes_of_rows.h"
#include "common/simd.h"
#include "visit_cross_entropy/rows.h"

namespace ehrseq::visit_cross_entropy::EHRSEQ_ISA {

using namespace ehrseq::EHRSEQ_ISA;  // NOLINT: the lanes of the same instruction set

// A derivative of 0 that a row has is -0, as +0 says that the row does not count: the backward pass
// tells them apart (survival_nll/scale_cpu.cpp).
template <typename T>
EHRSEQ_INLINE Lanes<T> signed_zeros(const Lanes<T>& slopes) {
  return slopes == T(0) ? broadcast(T(-0.0)) : slopes;
}

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
