// The negative log-likelihood of one patient and its gradient, from a row of hazards or logits.
//
// No logarithm is taken per visit. A sum of logarithms is the logarithm of a product, and a product
// of doubles has room for hundreds of factors, so each patient costs one: of Π (1-h) for
// probabilities, and for logits of Π (1 + e^-|x|), since
//   -log(1 - sigmoid(x)) = softplus(x) = max(x, 0) + log(1 + e^-|x|).
// Exact to double precision, whatever the hazards' dtype.
#pragma once

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "common/simd.h"
#include "common/vector_math.h"

namespace ehrseq::survival {

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

// What is left of a patient's loss once its visits are read: `rest`, and a logarithm of `argument`,
// which is taken for eight patients at a time.
struct Unfinished {
  double argument;
  double rest;
};

// Π of factors in (0, 1], eight running products wide.
class Product {
 public:
  EHRSEQ_INLINE void multiply(Doubles factors) { lanes_ *= factors; }

  // Splits the product so far into mantissa and exponent, before it can underflow.
  EHRSEQ_INLINE void flush() {
    constexpr int64_t kNotNormal = int64_t{1} << 32;
    const Mask<double> bits = (Mask<double>)lanes_;
    const Doubles mantissas = (Doubles)((bits & kFraction) | kOneBits);
    const Mask<double> e =
        lanes_ >= DBL_MIN ? (bits >> 52) - 1023 : broadcast<int64_t>(kNotNormal);
    const int64_t exponent = sum_of_lanes<int64_t>(e);
    if (exponent < kNotNormal / 2) {
      mantissa_ *= product_of_lanes<double>(mantissas);
      exponent_ += exponent;
    } else {  // a zero or a NaN: the logarithm shall see it
      mantissa_ *= product_of_lanes<double>(lanes_);
    }
    lanes_ = broadcast(1.0);
  }

  // Between two flushes, so that the mantissa cannot grow without end.
  EHRSEQ_INLINE void shrink_mantissa() {
    if (!(mantissa_ >= DBL_MIN)) return;
    int64_t bits;
    std::memcpy(&bits, &mantissa_, sizeof bits);
    exponent_ += (bits >> 52) - 1023;
    bits = (bits & kFraction) | kOneBits;
    std::memcpy(&mantissa_, &bits, sizeof bits);
  }

  // -log(Π): as much of the exponent as a double can hold goes back into the argument, so that a
  // product near 1 keeps its logarithm's digits.
  EHRSEQ_INLINE Unfinished unfinished() {
    flush();
    const int64_t held = std::max<int64_t>(exponent_, -1000);
    const int64_t bits = (held + 1023) << 52;
    double power_of_two;
    std::memcpy(&power_of_two, &bits, sizeof power_of_two);
    return {mantissa_ * power_of_two,
            static_cast<double>(held - exponent_) * 0.69314718055994530942};
  }

 private:
  static constexpr int64_t kFraction = (int64_t{1} << 52) - 1;
  static constexpr int64_t kOneBits = int64_t{1023} << 52;

  Doubles lanes_ = broadcast(1.0);
  double mantissa_ = 1;
  int64_t exponent_ = 0;
};

// Σ (linear + log(1 + excess)), with Π (1 + excess) kept as its distance from 1: tiny terms keep
// their digits.
class SumOfSoftplus {
 public:
  EHRSEQ_INLINE void add(Doubles linear, Doubles excess) {
    linear_ += linear;
    excess_ += excess * (1.0 + excess_);
  }

  // Before the product can overflow.
  EHRSEQ_INLINE void flush() {
    logs_ += std::log1p(excess_of_all());
    excess_ = Doubles{};
  }

  EHRSEQ_INLINE Unfinished unfinished() const {
    return {excess_of_all(), sum_of_lanes<double>(linear_) + logs_};
  }

 private:
  EHRSEQ_INLINE double excess_of_all() const {
    return join_lanes<double>(
        excess_, [](auto a, auto b) __attribute__((always_inline)) { return a + b * (1.0 + a); });
  }

  Doubles linear_{};
  Doubles excess_{};
  double logs_ = 0;
};

// One way from a row's values to the likelihood of trials: adds eight trials to the sum and gives
// their gradient. `event` and `counts` mark lanes: which trial is the event, and which are trials.
template <typename T>
class FromProbabilities {
 public:
  // Before a flush each lane holds at most 32 (16) factors of at least 2^-24 (2^-53), 1 - h being
  // rounded to T, and one more: the event's.
  static constexpr int64_t kBlocksPerFlush = sizeof(T) == 4 ? 32 : 16;

  explicit FromProbabilities(double eps)
      : lowest_(static_cast<T>(eps)), highest_(static_cast<T>(1 - eps)) {}

  EHRSEQ_INLINE Lanes<T> survived(Lanes<T> h, T scale) {
    const Lanes<T> clamped = clamp(h);
    product_.multiply(1.0 - convert<double>(clamped));
    return inside(h) ? scale / (T(1) - clamped) : Lanes<T>{};
  }

  EHRSEQ_INLINE Lanes<T> mixed(Lanes<T> h, T scale, Mask<T> event, Mask<T> counts) {
    const Lanes<T> clamped = clamp(counts ? h : broadcast(T(0.5)));
    const Doubles wide = convert<double>(clamped);
    const Doubles factors = convert<int64_t>(event) ? wide : 1.0 - wide;
    product_.multiply(convert<int64_t>(counts) ? factors : broadcast(1.0));
    const Lanes<T> slope = event ? -scale / clamped : scale / (T(1) - clamped);
    return counts & inside(h) ? slope : Lanes<T>{};
  }

  EHRSEQ_INLINE void flush() {
    product_.flush();
    product_.shrink_mantissa();
  }

  EHRSEQ_INLINE Unfinished unfinished() { return product_.unfinished(); }

  static EHRSEQ_INLINE Doubles finish(Doubles argument, Doubles rest) {
    return rest - log_nonnegative(argument);
  }

 private:
  // Comparisons, not min and max: a NaN at risk has to reach the loss.
  EHRSEQ_INLINE Lanes<T> clamp(Lanes<T> h) const {
    const Lanes<T> raised = h < lowest_ ? broadcast(lowest_) : h;
    return raised > highest_ ? broadcast(highest_) : raised;
  }

  EHRSEQ_INLINE Mask<T> inside(Lanes<T> h) const { return (h >= lowest_) & (h <= highest_); }

  T lowest_;
  T highest_;
  Product product_;
};

template <typename T>
class FromLogits {
 public:
  static constexpr int64_t kBlocksPerFlush = 120;  // 1 + excess <= 2^(8 * 120), all lanes together

  explicit FromLogits(double /*eps*/) {}

  EHRSEQ_INLINE Lanes<T> survived(Lanes<T> x, T scale) {
    const Lanes<T> decay = exp_nonpositive<T>(x < T(0) ? x : -x);
    sum_.add(convert<double>(x > T(0) ? x : Lanes<T>{}), convert<double>(decay));
    return scale * (x > T(0) ? broadcast(T(1)) : decay) / (T(1) + decay);
  }

  EHRSEQ_INLINE Lanes<T> mixed(Lanes<T> x, T scale, Mask<T> event, Mask<T> counts) {
    x = event ? -x : x;
    x = counts ? x : Lanes<T>{};
    const Lanes<T> decay = exp_nonpositive<T>(x < T(0) ? x : -x);
    sum_.add(convert<double>(x > T(0) ? x : Lanes<T>{}),
             convert<double>(counts ? decay : Lanes<T>{}));
    const Lanes<T> slope = scale * (x > T(0) ? broadcast(T(1)) : decay) / (T(1) + decay);
    return counts ? (event ? -slope : slope) : Lanes<T>{};
  }

  EHRSEQ_INLINE void flush() { sum_.flush(); }
  EHRSEQ_INLINE Unfinished unfinished() const { return sum_.unfinished(); }

  static EHRSEQ_INLINE Doubles finish(Doubles argument, Doubles rest) {
    return rest + log1p_nonnegative(argument);
  }

 private:
  SumOfSoftplus sum_;
};

// Eight values from `at` on; what lies past the end of the row is read as 0 and never written.
template <typename T>
EHRSEQ_INLINE auto load_within(const T* row, int64_t at, int64_t row_length) {
  if (at + kLanes <= row_length) return load(row + at);
  T values[kLanes] = {};
  std::copy(row + at, row + row_length, values);
  return load(values);
}

template <typename T, typename L>
EHRSEQ_INLINE void store_within(T* row, int64_t at, int64_t row_length, const L& lanes) {
  if (at + kLanes <= row_length) return store(row + at, lanes);
  T values[kLanes];
  store(values, lanes);
  std::copy(values, values + (row_length - at), row + at);
}

// Returns the loss of one patient, unfinished, and, where `grad` is given, writes all of its row: `scale` times
// the derivative for each trial, zero elsewhere. Values that are no trial are not used.
template <typename Likelihood, typename T, typename scalar_t, typename grad_t>
EHRSEQ_INLINE Unfinished nll_of_trials(double eps, const scalar_t* row, grad_t* grad,
                                   int64_t row_length, const Trials& trials, T scale) {
  Likelihood likelihood(eps);
  constexpr int64_t kRoom = Likelihood::kBlocksPerFlush;
  const bool wants_grad = grad != nullptr;
  const int64_t end = trials.end();
  int64_t at = trials.begin;
  int64_t room = kRoom;

  while (at + kLanes <= trials.certain_end) {
    if (room == 0) {
      likelihood.flush();
      room = kRoom;
    }
    const int64_t blocks = std::min(room, (trials.certain_end - at) / kLanes);
    for (int64_t i = 0; i < blocks; ++i, at += kLanes) {
      const Lanes<T> slopes = likelihood.survived(load(row + at), scale);
      if (wants_grad) store(grad + at, slopes);
    }
    room -= blocks;
  }

  for (; at < end; at += kLanes, --room) {
    if (room == 0) {
      likelihood.flush();
      room = kRoom;
    }
    const Mask<T> position = lane_numbers<T>();
    const Mask<T> event = position == static_cast<bits_t<T>>(trials.event - at);
    const Mask<T> survived = position < static_cast<bits_t<T>>(trials.survived_end - at);
    const Lanes<T> slopes = likelihood.mixed(load_within(row, at, row_length), scale, event,
                                             event | survived);
    if (wants_grad) store_within(grad, at, row_length, slopes);
  }

  if (wants_grad) {
    std::fill(grad, grad + trials.begin, grad_t(0));
    if (at < row_length) std::fill(grad + at, grad + row_length, grad_t(0));
  }
  return likelihood.unfinished();
}

// Softmax over "no event" (class 0) and the causes, eight visits side by side. For a visit whose
// class is c, with m the largest logit: -log p_c = (m - x_c) + log(1 + (Σ e^(x - m) - 1)).
// `scratch` has room for eight values of each class.
template <typename T, typename scalar_t, typename grad_t>
EHRSEQ_INLINE void add_softmax_visits(SumOfSoftplus& sum, const scalar_t* logits, grad_t* grad,
                                      int64_t classes, int64_t visits, int64_t target, T scale,
                                      T* scratch) {
  Lanes<T> largest{};
  for (int64_t c = 0; c < classes; ++c) {
    Lanes<T> x{};
    for (int64_t i = 0; i < visits; ++i) x[i] = static_cast<T>(logits[i * classes + c]);
    store(scratch + c * kLanes, x);
    largest = c == 0 ? x : (x > largest ? x : largest);
  }
  const Doubles linear =
      convert<double>(largest) - convert<double>(load(scratch + target * kLanes));
  Doubles total{};
  for (int64_t c = 0; c < classes; ++c) {
    const Lanes<T> odds = exp_nonpositive<T>(load(scratch + c * kLanes) - largest);
    store(scratch + c * kLanes, odds);
    total += convert<double>(odds);
  }
  const Mask<double> counts = lane_numbers<double>() < visits;
  sum.add(counts ? linear : Doubles{}, counts ? total - 1.0 : Doubles{});
  if (grad == nullptr) return;
  const Lanes<T> share = scale / convert<T>(total);
  for (int64_t c = 0; c < classes; ++c) {
    const Lanes<T> slopes = load(scratch + c * kLanes) * share - (c == target ? scale : T(0));
    for (int64_t i = 0; i < visits; ++i) grad[i * classes + c] = static_cast<grad_t>(slopes[i]);
  }
}

// As nll_of_trials, for visits `entry` to `time`, with class 0 at each visit before `time` and
// `target` at it; a negative target leaves that visit out.
template <typename T, typename scalar_t, typename grad_t>
EHRSEQ_INLINE Unfinished nll_of_softmax(const scalar_t* row, grad_t* grad, int64_t row_length,
                                    int64_t classes, int64_t entry, int64_t time, int64_t target,
                                    T scale, T* scratch) {
  SumOfSoftplus sum;
  // Π over the lanes of 1 + excess <= classes^(8 blocks), which a double has to hold.
  const int64_t room_for = static_cast<int64_t>(120 / std::log2(static_cast<double>(classes) + 1));
  int64_t room = room_for;
  const auto add = [&](int64_t visit, int64_t visits, int64_t target_class)
                       __attribute__((always_inline)) {
    if (room-- == 0) {
      sum.flush();
      room = room_for - 1;
    }
    add_softmax_visits<T>(sum, row + visit * classes, grad ? grad + visit * classes : nullptr,
                          classes, visits, target_class, scale, scratch);
  };
  for (int64_t visit = entry; visit < time; visit += kLanes) {
    add(visit, std::min(kLanes, time - visit), 0);
  }
  if (target >= 0) add(time, 1, target);
  if (grad != nullptr) {
    std::fill(grad, grad + entry * classes, grad_t(0));
    std::fill(grad + (time + (target >= 0)) * classes, grad + row_length, grad_t(0));
  }
  return sum.unfinished();
}

// A group of patients on its way from Unfinished to losses.
template <int64_t kPatients>
class Group {
 public:
  EHRSEQ_INLINE void set(int64_t patient, Unfinished unfinished) {
    arguments_[patient] = unfinished.argument;
    rests_[patient] = unfinished.rest;
  }

  template <typename Likelihood>
  EHRSEQ_INLINE void finish(int64_t patients, double* nll) {
    for (int64_t at = 0; at < patients; at += kLanes) {
      const Doubles finished = Likelihood::finish(load(arguments_ + at), load(rests_ + at));
      store_within(nll, at, patients, finished);
    }
  }

 private:
  static_assert(kPatients % kLanes == 0);
  double arguments_[kPatients] = {};
  double rests_[kPatients] = {};
};

}  // namespace ehrseq::survival
