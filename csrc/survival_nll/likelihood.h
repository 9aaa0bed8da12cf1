// The negative log-likelihood of one patient and its gradient, from a row of hazards or logits.
//
// No logarithm is taken per visit. A sum of logarithms is the logarithm of a product, and a product
// of doubles can hold hundreds of factors, so each patient costs one: of Π (1-h) for
// probabilities, and for logits of Π (1 + e^-|x|), since
//   -log(1 - sigmoid(x)) = softplus(x) = max(x, 0) + log(1 + e^-|x|).
// Exact to double precision, whatever the hazards' dtype.
//
// No include guard: see common/vector_math.h.

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "survival_nll/sums.h"

namespace ehrseq::survival::EHRSEQ_ISA {

// The Bernoulli trials that a patient adds to the likelihood, as positions in the patient's row,
// [V, K] flattened: survived from `begin` to `survived_end`, but for the one at `event` (if any).
// Up to `certain_end`, where the event time starts, every position was survived.
struct Trials {
  int64_t begin;
  int64_t certain_end;
  int64_t survived_end;
  int64_t event;

  int64_t end() const { return std::max(survived_end, event + 1); }
};

// One way from a row's values to the likelihood of trials: adds a vector of trials to the sum and
// gives their gradient. In `mixed`, `event` and `counts` mark lanes: which trial is the event, and
// which are trials at all. `weigh` sets the lanes' weights, of a Total that has some.
//
// A derivative of 0 that a trial has is written as -0, and +0 where no value counts: infinity times
// the one is NaN in the backward pass, times the other 0 (scale_cpu.cpp). So `scale` is never +0.
template <typename T>
EHRSEQ_INLINE T signed_zero(T scale) {
  return scale == T(0) ? T(-0.0) : scale;
}

// `scale` is one number or one of each lane.
template <typename T, typename Scale>
EHRSEQ_INLINE Lanes<T> scale_of_event(const Scale& scale) {
  const Lanes<T> scales = scale - Lanes<T>{};
  return scales == T(0) ? scales : -scales;
}

template <typename T, typename Total = Product<T>>
class FromProbabilities {
 public:
  // In double precision the event's factor may be any number, so a lane holds no other with it.
  static constexpr bool kEventAlone = sizeof(T) == 8;

  explicit FromProbabilities(double eps)
      : lowest_(static_cast<T>(eps)),
        highest_(static_cast<T>(1 - eps)),
        inner_lowest_(lowest_),
        inner_highest_(highest_) {
    if (eps > 0 && highest_ == T(1)) {  // eps has been rounded away, but the clamp shall hold
      least_ = eps;
      inner_highest_ = std::nextafter(T(1), T(0));
      inner_lowest_ = std::max(lowest_, std::numeric_limits<T>::denorm_min());
      const int64_t bits = 1 - std::ilogb(eps);
      most_factors_ = std::max<int64_t>(1, std::min(most_factors_, 960 / bits));
    }
  }

  // Vectors before a flush.
  EHRSEQ_INLINE int64_t flush_interval() const { return most_factors_; }

  template <typename Scale>
  EHRSEQ_INLINE Lanes<T> survived(const Lanes<T>& h, const Scale& scale) {
    const Lanes<T> clamped = clamp(h);
    product_.multiply(1.0, -clamped, least_);
    return only_where<T>(noted_inside(h), scale / (T(1) - clamped));
  }

  // Of some lanes; the others count nothing.
  template <typename Scale>
  EHRSEQ_INLINE Lanes<T> survived_where(const Mask<T>& counts, const Lanes<T>& values,
                                        const Scale& scale) {
    const Lanes<T> h = counts ? values : broadcast(T(0.5));
    const Lanes<T> clamped = clamp(h);
    product_.multiply(1.0, only_where<T>(counts, -clamped), least_);
    return only_where<T>(counts, only_where<T>(noted_inside(h), scale / (T(1) - clamped)));
  }

  template <typename Scale>
  EHRSEQ_INLINE Lanes<T> mixed(const Lanes<T>& values, const Scale& scale, const Mask<T>& event,
                               const Mask<T>& counts) {
    const Lanes<T> h = counts ? values : broadcast(T(0.5));
    const Lanes<T> clamped = clamp(h);
    product_.multiply(widen(event ? Lanes<T>{} : broadcast(T(1))),
                      only_where<T>(counts, event ? clamped : -clamped), least_);
    const Lanes<T> scales = event ? scale_of_event<T>(scale) : scale - Lanes<T>{};
    const Lanes<T> slope = scales / (event ? clamped : T(1) - clamped);
    return only_where<T>(counts, only_where<T>(noted_inside(h), slope));
  }

  EHRSEQ_INLINE void weigh(const Lanes<T>& weights) { product_.weigh(weights); }
  EHRSEQ_INLINE void flush() { product_.flush(); }
  EHRSEQ_INLINE auto unfinished() { return product_.unfinished(); }

  static EHRSEQ_INLINE Doubles finish(const Doubles& argument, const Doubles& rest) {
    return rest - log_nonnegative(argument);
  }

  // Clears the lanes of `inside` in which a trial was outside the clamp: one that no probability
  // is may be among them.
  EHRSEQ_INLINE void join(Mask<T>* inside) const { *inside &= all_inside_; }

 private:
  // Comparisons, not min and max: a NaN at risk has to reach the loss.
  EHRSEQ_INLINE Lanes<T> clamp(const Lanes<T>& h) const {
    const Lanes<T> raised = h < lowest_ ? broadcast(lowest_) : h;
    return raised > highest_ ? broadcast(highest_) : raised;
  }

  EHRSEQ_INLINE Mask<T> noted_inside(const Lanes<T>& h) {
    const Mask<T> inside = (h >= inner_lowest_) & (h <= inner_highest_);
    all_inside_ &= inside;
    return inside;
  }

  T lowest_;
  T highest_;
  T inner_lowest_;
  T inner_highest_;
  double least_ = 0;
  // Each factor is at least 2^-24 (2^-53), 1 - h being rounded to T; an event's in single precision
  // at least 2^-149.
  int64_t most_factors_ = sizeof(T) == 4 ? 32 : 16;
  Mask<T> all_inside_ = ~Mask<T>{};
  Total product_;
};

template <typename T, typename Total = SumOfSoftplus<T>>
class FromLogits {
 public:
  static constexpr bool kEventAlone = false;

  explicit FromLogits(double /*eps*/) {}

  EHRSEQ_INLINE int64_t flush_interval() const { return Total::kMostBits; }  // 1 + excess <= 2

  template <typename Scale>
  EHRSEQ_INLINE Lanes<T> survived(const Lanes<T>& x, const Scale& scale) {
    const Lanes<T> decay = exp_nonpositive<T>(x > T(0) ? -x : x);
    sum_.add(x > T(0) ? x : Lanes<T>{}, decay);
    return scaled_sigmoid(x, decay, scale);
  }

  template <typename Scale>
  EHRSEQ_INLINE Lanes<T> survived_where(const Mask<T>& counts, const Lanes<T>& values,
                                        const Scale& scale) {
    const Lanes<T> x = counts ? values : Lanes<T>{};
    const Lanes<T> decay = exp_nonpositive<T>(x > T(0) ? -x : x);
    sum_.add(x > T(0) ? x : Lanes<T>{}, only_where<T>(counts, decay));
    return only_where<T>(counts, scaled_sigmoid(x, decay, scale));
  }

  template <typename Scale>
  EHRSEQ_INLINE Lanes<T> mixed(const Lanes<T>& values, const Scale& scale, const Mask<T>& event,
                               const Mask<T>& counts) {
    const Lanes<T> x = counts ? (event ? -values : values) : Lanes<T>{};
    const Lanes<T> decay = exp_nonpositive<T>(x > T(0) ? -x : x);
    sum_.add(x > T(0) ? x : Lanes<T>{}, only_where<T>(counts, decay));
    const Lanes<T> scales = event ? scale_of_event<T>(scale) : scale - Lanes<T>{};
    return only_where<T>(counts, scaled_sigmoid(x, decay, scales));
  }

  EHRSEQ_INLINE void weigh(const Lanes<T>& weights) { sum_.weigh(weights); }
  EHRSEQ_INLINE void flush() { sum_.flush(); }
  EHRSEQ_INLINE auto unfinished() const { return sum_.unfinished(); }
  EHRSEQ_INLINE void join(Mask<T>* /*inside*/) const {}  // every number is a logit

  static EHRSEQ_INLINE Doubles finish(const Doubles& argument, const Doubles& rest) {
    return rest + log1p_nonnegative(argument);
  }

 private:
  // decay = e^-|x|
  template <typename Scale>
  static EHRSEQ_INLINE Lanes<T> scaled_sigmoid(const Lanes<T>& x, const Lanes<T>& decay,
                                               const Scale& scale) {
    const Lanes<T> slope = scale * (x > T(0) ? broadcast(T(1)) : decay) / (T(1) + decay);
    return slope == T(0) ? broadcast(T(-0.0)) : slope;
  }

  Total sum_;
};

// With h = 1 - exp(-m), m = e^x: -log(1 - h) = m, and -log h is
//   -x + log(m / (1 - e^-m))  for x <= 0, where the logarithm's argument is 1 and a series in m,
//   log(1 + 1 / (e^m - 1))    for x > 0,
// so that no digit is lost where m is tiny or large. Both are linear + log(1 + excess).
template <typename T, typename Total = SumOfSoftplus<T>>
class FromCloglog {
 public:
  static constexpr bool kEventAlone = false;

  explicit FromCloglog(double /*eps*/) {}

  EHRSEQ_INLINE int64_t flush_interval() const { return Total::kMostBits; }  // 1 + excess <= 2

  template <typename Scale>
  EHRSEQ_INLINE Lanes<T> survived(const Lanes<T>& x, const Scale& scale) {
    const Lanes<T> m = power(x);
    sum_.add(m, Lanes<T>{});
    return with_sign(scale * m);
  }

  template <typename Scale>
  EHRSEQ_INLINE Lanes<T> survived_where(const Mask<T>& counts, const Lanes<T>& values,
                                        const Scale& scale) {
    const Lanes<T> m = only_where<T>(counts, power(counts ? values : Lanes<T>{}));
    sum_.add(m, Lanes<T>{});
    return only_where<T>(counts, with_sign(scale * m));
  }

  template <typename Scale>
  EHRSEQ_INLINE Lanes<T> mixed(const Lanes<T>& values, const Scale& scale, const Mask<T>& event,
                               const Mask<T>& counts) {
    constexpr T kMost = 7;  // e^-e^7 is 0 in double precision
    const Lanes<T> x = counts ? values : Lanes<T>{};
    const Lanes<T> m = power(event & (x > kMost) ? broadcast(kMost) : x);
    const Lanes<T> decay = exp_nonpositive<T>(-m);
    const Lanes<T> excess = x > T(0) ? decay / (T(1) - decay) : ratio_above_one(m);
    const Lanes<T> linear = event ? (x > T(0) ? Lanes<T>{} : -x) : m;
    sum_.add(only_where<T>(counts, linear), only_where<T>(counts & event, excess));
    const Lanes<T> scales = event ? scale_of_event<T>(scale) : scale - Lanes<T>{};
    const Lanes<T> slope = x > T(0) ? m * excess : decay * (T(1) + excess);
    return only_where<T>(counts, with_sign(scales * (event ? slope : m)));
  }

  EHRSEQ_INLINE void weigh(const Lanes<T>& weights) { sum_.weigh(weights); }
  EHRSEQ_INLINE void flush() { sum_.flush(); }
  EHRSEQ_INLINE auto unfinished() const { return sum_.unfinished(); }
  EHRSEQ_INLINE void join(Mask<T>* /*inside*/) const {}  // every number is a logit

  static EHRSEQ_INLINE Doubles finish(const Doubles& argument, const Doubles& rest) {
    return rest + log1p_nonnegative(argument);
  }

 private:
  // e^x. By its root: 1 / e^-x would be infinite where e^-x is not normal, before e^x is.
  static EHRSEQ_INLINE Lanes<T> power(const Lanes<T>& x) {
    const Lanes<T> root = exp_nonpositive<T>((x > T(0) ? -x : x) * T(0.5));
    const Lanes<T> raised = x > T(0) ? T(1) / root : root;
    return raised * raised;
  }

  // m / (1 - e^-m) - 1 for m in [0, 1]: m / 2 + Σ B_2n m^2n / (2n)!, of Bernoulli's numbers.
  static EHRSEQ_INLINE Lanes<T> ratio_above_one(const Lanes<T>& m) {
    constexpr double kTerms[] = {1.0 / 12,
                                 -1.0 / 720,
                                 1.0 / 30240,
                                 -1.0 / 1209600,
                                 1.0 / 47900160,
                                 -691.0 / 1307674368000,
                                 1.0 / 74724249600,
                                 -3617.0 / 10670622842880000,
                                 43867.0 / 5109094217170944000,
                                 -174611.0 / 802857662698291200000.0};
    constexpr int kCount = sizeof(kTerms) / sizeof(double);
    const Lanes<T> square = m * m;
    Lanes<T> series = broadcast(static_cast<T>(kTerms[kCount - 1]));
    for (int i = kCount - 2; i >= 0; --i) series = series * square + static_cast<T>(kTerms[i]);
    return m * T(0.5) + square * series;
  }

  static EHRSEQ_INLINE Lanes<T> with_sign(const Lanes<T>& slope) {
    return slope == T(0) ? broadcast(T(-0.0)) : slope;
  }

  Total sum_;
};

// One vector from `at` on; what is past the end of the row is read as 0 and never written.
template <typename T, typename scalar_t>
EHRSEQ_INLINE Lanes<T> load_within(const scalar_t* row, int64_t at, int64_t row_length) {
  if (at + kLanes<T> <= row_length) return load(row + at);
  scalar_t values[kLanes<T>] = {};
  std::copy(row + at, row + row_length, values);
  return load(values);
}

template <typename T, typename stored_t>
EHRSEQ_INLINE void store_within(stored_t* row, int64_t at, int64_t row_length,
                                const Lanes<T>& lanes) {
  if (at + kLanes<T> <= row_length) return store(row + at, lanes);
  stored_t values[kLanes<T>];
  store(values, lanes);
  std::copy(values, values + (row_length - at), row + at);
}

// Returns the loss of one patient, unfinished, and where `grad` is given (a row of zeros) writes
// `scale` times the derivative for each trial. Values that are no trial change nothing. `inside` is
// as in FromProbabilities::join.
template <typename Likelihood, typename T, typename scalar_t, typename grad_t>
EHRSEQ_INLINE Unfinished nll_of_trials(double eps, const scalar_t* row, grad_t* grad,
                                       int64_t row_length, const Trials& trials, T scale,
                                       Mask<T>* inside) {
  Likelihood likelihood(eps);
  const bool wants_grad = grad != nullptr;
  const int64_t end = trials.end();
  int64_t at = trials.begin;
  int64_t until_flush = likelihood.flush_interval();

  while (at + kLanes<T> <= trials.certain_end) {
    if (until_flush == 0) {
      likelihood.flush();
      until_flush = likelihood.flush_interval();
    }
    const int64_t blocks = std::min(until_flush, (trials.certain_end - at) / kLanes<T>);
    for (int64_t i = 0; i < blocks; ++i, at += kLanes<T>) {
      const Lanes<T> slopes = likelihood.survived(load(row + at), scale);
      if (wants_grad) store(grad + at, slopes);
    }
    until_flush -= blocks;
  }

  for (; at < end; at += kLanes<T>, --until_flush) {
    const bool alone =
        Likelihood::kEventAlone && at <= trials.event && trials.event < at + kLanes<T>;
    if (until_flush == 0 || alone) {
      likelihood.flush();
      until_flush = alone ? 1 : likelihood.flush_interval();
    }
    const Mask<T> position = lane_numbers<T>();
    const Mask<T> event = position == static_cast<bits_t<T>>(trials.event - at);
    const Mask<T> survived = position < static_cast<bits_t<T>>(trials.survived_end - at);
    const Lanes<T> slopes =
        likelihood.mixed(load_within<T>(row, at, row_length), scale, event, event | survived);
    if (wants_grad) store_within<T>(grad, at, row_length, slopes);
  }

  likelihood.join(inside);
  return likelihood.unfinished();
}

template <typename T>
EHRSEQ_INLINE bool all_set(const Mask<T>& mask) {
  bits_t<T> lanes[kLanes<T>];
  std::memcpy(lanes, &mask, sizeof lanes);
  bits_t<T> all = -1;
  for (const bits_t<T> lane : lanes) all &= lane;
  return all == -1;
}

// Whether a value is outside [0, 1], as no NaN is.
template <typename scalar_t>
EHRSEQ_INLINE bool any_improbable(const scalar_t* values, int64_t count) {
  using T = accumulator_t<scalar_t>;
  int64_t found = 0;
  for (int64_t i = 0; i < count; ++i) {
    const T value = static_cast<T>(values[i]);
    found |= (value < T(0)) | (value > T(1));
  }
  return found != 0;
}

// Softmax over "no event" (class 0) and the causes. For a visit whose class is c, with m the
// largest logit: -log p_c = (m - x_c) + log(1 + (Σ e^(x - m) - 1)).
template <typename T>
class Softmax {
 public:
  explicit Softmax(int64_t classes)
      : classes_(classes),
        blocks_per_flush_(std::max<int64_t>(
            1, static_cast<int64_t>(SumOfSoftplus<T>::kMostBits /
                                    std::log2(static_cast<double>(classes) + 1)))),
        memory_(LanesOfRows<T>::values_in_memory(classes)),
        lanes_(classes, memory_.data()) {}

  // As nll_of_trials, for the visits from `entry` to `time`: class 0 at each before `time`,
  // `target` at it; a negative target leaves that visit out.
  template <typename scalar_t, typename grad_t>
  EHRSEQ_INLINE Unfinished nll_of_visits(const scalar_t* row, grad_t* grad, int64_t entry,
                                         int64_t time, int64_t target, T scale) {
    SumOfSoftplus<T> sum;
    int64_t until_flush = blocks_per_flush_;
    for (int64_t visit = entry; visit < time; visit += kLanes<T>, --until_flush) {
      if (until_flush == 0) {
        sum.flush();
        until_flush = blocks_per_flush_;
      }
      add(sum, row, grad, visit, std::min(kLanes<T>, time - visit), 0, scale);
    }
    if (target >= 0) {
      if (until_flush == 0) sum.flush();
      add(sum, row, grad, time, 1, target, scale);
    }
    return sum.unfinished();
  }

  // Visits side by side in the lanes. `scale` is one number or one of each visit.
  template <typename Sum, typename Scale, typename scalar_t, typename grad_t>
  EHRSEQ_INLINE void add(Sum& sum, const scalar_t* row, grad_t* grad, int64_t visit, int64_t visits,
                         int64_t target, const Scale& scale) {
    lanes_.take(row + visit * classes_, visits);
    Lanes<T> largest = lanes_.of(0);
    for (int64_t c = 1; c < classes_; ++c) {
      largest = lanes_.of(c) > largest ? lanes_.of(c) : largest;
    }
    Wide<T> linear = widen(largest);
    Wide<T> excess{};
    const Wide<T> chosen = widen(lanes_.of(target));
    const Wide<T> counts =
        widen(lane_numbers<T>() < static_cast<bits_t<T>>(visits) ? broadcast(T(1)) : Lanes<T>{});
    for (int i = 0; i < Wide<T>::kParts; ++i) linear.part[i] -= chosen.part[i];
    for (int64_t c = 0; c < classes_; ++c) {
      const Lanes<T> odds = exp_nonpositive<T>(lanes_.of(c) - largest);
      lanes_.set(c, odds);
      const Wide<T> wide = widen(odds);
      for (int i = 0; i < Wide<T>::kParts; ++i) excess.part[i] += wide.part[i];
    }
    const Lanes<T> share = scale / narrow(excess);
    for (int i = 0; i < Wide<T>::kParts; ++i) {
      excess.part[i] = counts.part[i] * (excess.part[i] - 1.0);  // unused lanes hold zeros, no NaN
    }
    sum.add(linear, excess);

    if (grad == nullptr) return;
    for (int64_t c = 0; c < classes_; ++c) {
      const Lanes<T> slope = lanes_.of(c) * share - (c == target ? scale : Scale{});
      lanes_.set(c, slope == T(0) ? broadcast(T(-0.0)) : slope);
    }
    lanes_.give(grad + visit * classes_, visits);
  }

 private:
  int64_t classes_;
  int64_t blocks_per_flush_;
  std::vector<T> memory_;
  LanesOfRows<T> lanes_;
};

// A group of patients on its way from Unfinished to losses.
template <int64_t kPatients>
class Group {
 public:
  EHRSEQ_INLINE void set(int64_t patient, const Unfinished& unfinished) {
    arguments_[patient] = unfinished.argument;
    rests_[patient] = unfinished.rest;
  }

  template <typename Likelihood>
  EHRSEQ_INLINE void finish(int64_t patients, double* nll) {
    for (int64_t at = 0; at < patients; at += kLanes<double>) {
      store_within<double>(nll, at, patients,
                           Likelihood::finish(load(arguments_ + at), load(rests_ + at)));
    }
  }

 private:
  static_assert(kPatients % kLanes<double> == 0);
  double arguments_[kPatients] = {};
  double rests_[kPatients] = {};
};

}  // namespace ehrseq::survival::EHRSEQ_ISA
