// The negative log-likelihood of one patient and its gradient, from a row of hazards or logits.
//
// No logarithm is taken per visit. A sum of logarithms is the logarithm of a product, and a product
// of doubles has room for hundreds of factors, so each patient costs one: of Π (1-h) for
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
#include <vector>

#include "common/simd.h"
#include "common/vector_math.h"

namespace ehrseq::survival::EHRSEQ_ISA {

using namespace ehrseq::EHRSEQ_ISA;  // NOLINT: the lanes of the same instruction set

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

// Π of factors in (0, 1], as many running products as T has lanes.
template <typename T>
class Product {
 public:
  Product() {
    for (Doubles& part : running_.part) part = broadcast(1.0);
  }

  // By `base + change`, lane by lane, in double precision.
  template <typename Base>
  EHRSEQ_INLINE void multiply(const Base& base, const Lanes<T>& change) {
    const Wide<T> wide = widen(change);
    for (int i = 0; i < Wide<T>::kParts; ++i) running_.part[i] *= part(base, i) + wide.part[i];
  }

  // Splits the product so far into mantissa and exponent, before it can underflow.
  EHRSEQ_INLINE void flush() {
    constexpr int64_t kNotNormal = int64_t{1} << 32;
    Doubles mantissas = broadcast(1.0);
    Mask<double> exponents{};
    for (const Doubles& running : running_.part) {
      const Mask<double> bits = (Mask<double>)running;
      mantissas *= (Doubles)((bits & kFraction) | kOneBits);
      exponents += running >= DBL_MIN ? (bits >> 52) - 1023 : broadcast<int64_t>(kNotNormal);
    }
    const int64_t exponent = sum_of_lanes<int64_t>(exponents);
    if (exponent < kNotNormal / 2) {
      mantissa_ *= product_of_lanes<double>(mantissas);
      exponent_ += exponent;
    } else {  // a zero or a NaN: the logarithm shall see it
      for (const Doubles& running : running_.part) mantissa_ *= product_of_lanes<double>(running);
    }
    for (Doubles& running : running_.part) running = broadcast(1.0);
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

  // -log(Π). As much of the exponent as a double can hold goes back into the argument, so that a
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

  static EHRSEQ_INLINE Doubles part(double base, int) { return broadcast(base); }
  static EHRSEQ_INLINE Doubles part(const Wide<T>& base, int i) { return base.part[i]; }

  Wide<T> running_;
  double mantissa_ = 1;
  int64_t exponent_ = 0;
};

// Σ (linear + log(1 + excess)), with Π (1 + excess) kept as its distance from 1: tiny terms keep
// their digits.
template <typename T>
class SumOfSoftplus {
 public:
  // Π over all lanes of 1 + excess may not pass 2^1000 before a flush.
  static constexpr int64_t kMostBits = 1000 / kLanes<T>;

  EHRSEQ_INLINE void add(const Wide<T>& linear, const Wide<T>& excess) {
    for (int i = 0; i < Wide<T>::kParts; ++i) {
      linear_.part[i] += linear.part[i];
      excess_.part[i] += excess.part[i] * (1.0 + excess_.part[i]);
    }
  }

  EHRSEQ_INLINE void flush() {
    logs_ += std::log1p(excess_of_all());
    excess_ = {};
  }

  EHRSEQ_INLINE Unfinished unfinished() const {
    double rest = logs_;
    for (const Doubles& linear : linear_.part) rest += sum_of_lanes<double>(linear);
    return {excess_of_all(), rest};
  }

 private:
  EHRSEQ_INLINE double excess_of_all() const {
    const auto join = [](const auto& a, const auto& b)
                          __attribute__((always_inline)) { return a + b * (1.0 + a); };
    Doubles lanes = excess_.part[0];
    for (int i = 1; i < Wide<T>::kParts; ++i) lanes = join(lanes, excess_.part[i]);
    return join_lanes<double>(lanes, join);
  }

  Wide<T> linear_{};
  Wide<T> excess_{};
  double logs_ = 0;
};

// One way from a row's values to the likelihood of trials: adds a vector of trials to the sum and
// gives their gradient. In `mixed`, `event` and `counts` mark lanes: which trial is the event, and
// which are trials at all.
template <typename T>
class FromProbabilities {
 public:
  // Before a flush each lane holds at most 32 (16) factors of at least 2^-24 (2^-53), 1 - h being
  // rounded to T, and one more: the event's.
  static constexpr int64_t kBlocksPerFlush = sizeof(T) == 4 ? 32 : 16;

  explicit FromProbabilities(double eps)
      : lowest_(static_cast<T>(eps)), highest_(static_cast<T>(1 - eps)) {}

  EHRSEQ_INLINE Lanes<T> survived(const Lanes<T>& h, T scale) {
    const Lanes<T> clamped = clamp(h);
    product_.multiply(1.0, -clamped);
    return inside(h) ? scale / (T(1) - clamped) : Lanes<T>{};
  }

  EHRSEQ_INLINE Lanes<T> mixed(const Lanes<T>& values, T scale, const Mask<T>& event,
                               const Mask<T>& counts) {
    const Lanes<T> h = counts ? values : broadcast(T(0.5));
    const Lanes<T> clamped = clamp(h);
    product_.multiply(widen(event ? Lanes<T>{} : broadcast(T(1))),
                      counts ? (event ? clamped : -clamped) : Lanes<T>{});
    const Lanes<T> slope =
        (event ? broadcast(-scale) : broadcast(scale)) / (event ? clamped : T(1) - clamped);
    return counts & inside(h) ? slope : Lanes<T>{};
  }

  EHRSEQ_INLINE void flush() {
    product_.flush();
    product_.shrink_mantissa();
  }

  EHRSEQ_INLINE Unfinished unfinished() { return product_.unfinished(); }

  static EHRSEQ_INLINE Doubles finish(const Doubles& argument, const Doubles& rest) {
    return rest - log_nonnegative(argument);
  }

 private:
  // Comparisons, not min and max: a NaN at risk has to reach the loss.
  EHRSEQ_INLINE Lanes<T> clamp(const Lanes<T>& h) const {
    const Lanes<T> raised = h < lowest_ ? broadcast(lowest_) : h;
    return raised > highest_ ? broadcast(highest_) : raised;
  }

  EHRSEQ_INLINE Mask<T> inside(const Lanes<T>& h) const { return (h >= lowest_) & (h <= highest_); }

  T lowest_;
  T highest_;
  Product<T> product_;
};

template <typename T>
class FromLogits {
 public:
  static constexpr int64_t kBlocksPerFlush = SumOfSoftplus<T>::kMostBits;  // 1 + excess <= 2

  explicit FromLogits(double /*eps*/) {}

  EHRSEQ_INLINE Lanes<T> survived(const Lanes<T>& x, T scale) {
    const Lanes<T> decay = exp_nonpositive<T>(x > T(0) ? -x : x);
    sum_.add(widen(x > T(0) ? x : Lanes<T>{}), widen(decay));
    return scaled_sigmoid(x, decay, scale);
  }

  EHRSEQ_INLINE Lanes<T> mixed(const Lanes<T>& values, T scale, const Mask<T>& event,
                               const Mask<T>& counts) {
    const Lanes<T> x = counts ? (event ? -values : values) : Lanes<T>{};
    const Lanes<T> decay = exp_nonpositive<T>(x > T(0) ? -x : x);
    sum_.add(widen(x > T(0) ? x : Lanes<T>{}), widen(counts ? decay : Lanes<T>{}));
    const Lanes<T> slope = scaled_sigmoid(x, decay, scale);
    return counts ? (event ? -slope : slope) : Lanes<T>{};
  }

  EHRSEQ_INLINE void flush() { sum_.flush(); }
  EHRSEQ_INLINE Unfinished unfinished() const { return sum_.unfinished(); }

  static EHRSEQ_INLINE Doubles finish(const Doubles& argument, const Doubles& rest) {
    return rest + log1p_nonnegative(argument);
  }

 private:
  // decay = e^-|x|
  static EHRSEQ_INLINE Lanes<T> scaled_sigmoid(const Lanes<T>& x, const Lanes<T>& decay, T scale) {
    return scale * (x > T(0) ? broadcast(T(1)) : decay) / (T(1) + decay);
  }

  SumOfSoftplus<T> sum_;
};

// One vector from `at` on; what lies past the end of the row is read as 0 and never written.
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
// `scale` times the derivative for each trial. Values that are no trial change nothing.
template <typename Likelihood, typename T, typename scalar_t, typename grad_t>
EHRSEQ_INLINE Unfinished nll_of_trials(double eps, const scalar_t* row, grad_t* grad,
                                       int64_t row_length, const Trials& trials, T scale) {
  Likelihood likelihood(eps);
  constexpr int64_t kRoom = Likelihood::kBlocksPerFlush;
  const bool wants_grad = grad != nullptr;
  const int64_t end = trials.end();
  int64_t at = trials.begin;
  int64_t room = kRoom;

  while (at + kLanes<T> <= trials.certain_end) {
    if (room == 0) {
      likelihood.flush();
      room = kRoom;
    }
    const int64_t blocks = std::min(room, (trials.certain_end - at) / kLanes<T>);
    for (int64_t i = 0; i < blocks; ++i, at += kLanes<T>) {
      const Lanes<T> slopes = likelihood.survived(load(row + at), scale);
      if (wants_grad) store(grad + at, slopes);
    }
    room -= blocks;
  }

  for (; at < end; at += kLanes<T>, --room) {
    if (room == 0) {
      likelihood.flush();
      room = kRoom;
    }
    const Mask<T> position = lane_numbers<T>();
    const Mask<T> event = position == static_cast<bits_t<T>>(trials.event - at);
    const Mask<T> survived = position < static_cast<bits_t<T>>(trials.survived_end - at);
    const Lanes<T> slopes =
        likelihood.mixed(load_within<T>(row, at, row_length), scale, event, event | survived);
    if (wants_grad) store_within<T>(grad, at, row_length, slopes);
  }

  return likelihood.unfinished();
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
        scratch_(classes * kLanes<T>) {}

  // As nll_of_trials, for the visits from `entry` to `time`: class 0 at each before `time`,
  // `target` at it; a negative target leaves that visit out.
  template <typename scalar_t, typename grad_t>
  EHRSEQ_INLINE Unfinished nll_of_visits(const scalar_t* row, grad_t* grad, int64_t entry,
                                         int64_t time, int64_t target, T scale) {
    SumOfSoftplus<T> sum;
    int64_t room = blocks_per_flush_;
    for (int64_t visit = entry; visit < time; visit += kLanes<T>, --room) {
      if (room == 0) {
        sum.flush();
        room = blocks_per_flush_;
      }
      add(sum, row, grad, visit, std::min(kLanes<T>, time - visit), 0, scale);
    }
    if (target >= 0) {
      if (room == 0) sum.flush();
      add(sum, row, grad, time, 1, target, scale);
    }
    return sum.unfinished();
  }

 private:
  // Visits side by side in the lanes, the classes one after another in the scratch.
  template <typename scalar_t, typename grad_t>
  EHRSEQ_INLINE void add(SumOfSoftplus<T>& sum, const scalar_t* row, grad_t* grad, int64_t visit,
                         int64_t visits, int64_t target, T scale) {
    const scalar_t* logits = row + visit * classes_;
    std::fill(scratch_.begin(), scratch_.end(), T(0));
    for (int64_t i = 0; i < visits; ++i) {
      for (int64_t c = 0; c < classes_; ++c) {
        scratch_[c * kLanes<T> + i] = static_cast<T>(logits[i * classes_ + c]);
      }
    }

    Lanes<T> largest = lanes_of(0);
    for (int64_t c = 1; c < classes_; ++c) {
      largest = lanes_of(c) > largest ? lanes_of(c) : largest;
    }
    Wide<T> linear = widen(largest);
    Wide<T> excess{};
    const Wide<T> chosen = widen(lanes_of(target));
    const Wide<T> counts =
        widen(lane_numbers<T>() < static_cast<bits_t<T>>(visits) ? broadcast(T(1)) : Lanes<T>{});
    for (int i = 0; i < Wide<T>::kParts; ++i) linear.part[i] -= chosen.part[i];
    for (int64_t c = 0; c < classes_; ++c) {
      const Lanes<T> odds = exp_nonpositive<T>(lanes_of(c) - largest);
      store(&scratch_[c * kLanes<T>], odds);
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
      store(&scratch_[c * kLanes<T>], lanes_of(c) * share - (c == target ? scale : T(0)));
    }
    for (int64_t i = 0; i < visits; ++i) {
      for (int64_t c = 0; c < classes_; ++c) {
        grad[(visit + i) * classes_ + c] = static_cast<grad_t>(scratch_[c * kLanes<T> + i]);
      }
    }
  }

  EHRSEQ_INLINE Lanes<T> lanes_of(int64_t c) const { return load(&scratch_[c * kLanes<T>]); }

  int64_t classes_;
  int64_t blocks_per_flush_;
  std::vector<T> scratch_;
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
