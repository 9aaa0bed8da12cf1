// Sums of logarithms, as logarithms of products: of all lanes together, for a patient whose visits
// are side by side, and of each lane on its own, for patients that are.
//
// No include guard: see common/vector_math.h.

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "common/lanes_of_rows.h"
#include "common/simd.h"

namespace ehrseq::survival::EHRSEQ_ISA {

using namespace ehrseq::EHRSEQ_ISA;  // NOLINT: the lanes of the same instruction set

// +0 in all other lanes. Masks are joined as integers: joined for a choice between lanes, GCC
// splits them bit by bit.
template <typename T>
EHRSEQ_INLINE Lanes<T> only_where(const Mask<T>& mask, const Lanes<T>& lanes) {
  return (Lanes<T>)((Mask<T>)lanes & mask);
}

// log(1 + q) for q in [0, 1]: 2 artanh(s) with s = q / (2 + q), as its series.
EHRSEQ_INLINE Lanes<float> log1p_below_one(const Lanes<float>& q) {
  const Lanes<float> s = q / (q + 2.0f);
  const Lanes<float> z = s * s;
  Lanes<float> series = broadcast(1.0f / 13);
  for (const float coefficient : {1.0f / 11, 1.0f / 9, 1.0f / 7, 1.0f / 5, 1.0f / 3}) {
    series = series * z + coefficient;
  }
  const Lanes<float> twice = s + s;
  return twice + twice * (series * z);
}

EHRSEQ_INLINE Lanes<double> log1p_below_one(const Lanes<double>& q) { return log1p_nonnegative(q); }

template <typename T>
EHRSEQ_INLINE double sum_of_all(const Wide<T>& sums) {
  double sum = 0;
  for (const Doubles& part : sums.part) sum += sum_of_lanes<double>(part);
  return sum;
}

// What is left of a patient's loss once its visits are read: `rest`, and a logarithm of `argument`,
// which is taken for eight patients at a time.
struct Unfinished {
  double argument;
  double rest;
};

constexpr int64_t kFraction = (int64_t{1} << 52) - 1;
constexpr int64_t kOneBits = int64_t{1023} << 52;
constexpr double kLog2 = 0.69314718055994530942;

// Multiplies the mantissa by a number that is not normal, subnormal ones among them; the exponent
// that belongs to it. The logarithm gets a zero or a NaN.
inline int64_t multiply_abnormal(double* mantissa, double factor) {
  if (!(factor > 0 && factor <= DBL_MAX)) {
    *mantissa *= factor;
    return 0;
  }
  int exponent = 0;
  *mantissa *= std::frexp(factor, &exponent);
  return exponent;
}

EHRSEQ_INLINE Doubles part_of(double base, int) { return broadcast(base); }
template <typename T>
EHRSEQ_INLINE Doubles part_of(const Wide<T>& base, int i) {
  return base.part[i];
}

// `base + change`, at least `least`, times each running product, in double precision. A NaN stays.
template <typename T, typename Base>
EHRSEQ_INLINE void multiply_lanes(Wide<T>& running, const Base& base, const Lanes<T>& change,
                                  double least) {
  const Wide<T> wide = widen(change);
  for (int i = 0; i < Wide<T>::kParts; ++i) {
    const Doubles factor = part_of(base, i) + wide.part[i];
    running.part[i] *= factor < least ? broadcast(least) : factor;
  }
}

template <typename T>
EHRSEQ_INLINE Wide<T> ones() {
  Wide<T> wide;
  for (Doubles& part : wide.part) part = broadcast(1.0);
  return wide;
}

// Π of factors in (0, 1], as many running products as T has lanes, over all lanes.
template <typename T>
class Product {
 public:
  Product() { running_ = ones<T>(); }

  template <typename Base>
  EHRSEQ_INLINE void multiply(const Base& base, const Lanes<T>& change, double least) {
    multiply_lanes<T>(running_, base, change, least);
  }

  // Splits the product so far into mantissa and exponent, before it can underflow.
  EHRSEQ_INLINE void flush() {
    add_running();
    // so that the mantissa cannot grow without end
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
    add_running();
    const int64_t held = std::max<int64_t>(exponent_, -1000);
    const int64_t bits = (held + 1023) << 52;
    double power_of_two;
    std::memcpy(&power_of_two, &bits, sizeof power_of_two);
    return {mantissa_ * power_of_two, static_cast<double>(held - exponent_) * kLog2};
  }

 private:
  EHRSEQ_INLINE void add_running() {
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
    } else {
      for (const Doubles& running : running_.part) {
        for (int64_t i = 0; i < kLanes<double>; ++i) {
          exponent_ += multiply_abnormal(&mantissa_, running[i]);
        }
      }
    }
    running_ = ones<T>();
  }

  Wide<T> running_;
  double mantissa_ = 1;
  int64_t exponent_ = 0;
};

// Π (1 + excess) of all lanes as its distance from 1: tiny terms keep their digits.
template <typename T>
EHRSEQ_INLINE double excess_of_all(const Wide<T>& excess) {
  const auto join = [](const auto& a, const auto& b)
                        __attribute__((always_inline)) { return a + b * (1.0 + a); };
  Doubles lanes = excess.part[0];
  for (int i = 1; i < Wide<T>::kParts; ++i) lanes = join(lanes, excess.part[i]);
  return join_lanes<double>(lanes, join);
}

// Σ (linear + log(1 + excess)), with Π (1 + excess) kept as its distance from 1. Over all lanes.
template <typename T>
class SumOfSoftplus {
 public:
  // Π over all lanes of 1 + excess may not pass 2^1000 before a flush.
  static constexpr int64_t kMostBits = 1000 / kLanes<T>;

  EHRSEQ_INLINE void add(const Lanes<T>& linear, const Lanes<T>& excess) {
    add(widen(linear), widen(excess));
  }

  EHRSEQ_INLINE void add(const Wide<T>& linear, const Wide<T>& excess) {
    for (int i = 0; i < Wide<T>::kParts; ++i) {
      linear_.part[i] += linear.part[i];
      excess_.part[i] += excess.part[i] * (1.0 + excess_.part[i]);
    }
  }

  EHRSEQ_INLINE void flush() {
    logs_ += std::log1p(excess_of_all<T>(excess_));
    excess_ = {};
  }

  EHRSEQ_INLINE Unfinished unfinished() const {
    double rest = logs_;
    for (const Doubles& linear : linear_.part) rest += sum_of_lanes<double>(linear);
    return {excess_of_all<T>(excess_), rest};
  }

 private:
  Wide<T> linear_{};
  Wide<T> excess_{};
  double logs_ = 0;
};

// Σ weight · term, in the place of Product and of SumOfSoftplus: a weight is a power of a product's
// factor, so each logarithm is taken. What counts nothing has the weight 0 and the term 0.
template <typename T>
class WeightedSum {
 public:
  static constexpr int64_t kMostBits = std::numeric_limits<int64_t>::max();  // nothing to flush

  EHRSEQ_INLINE void weigh(const Lanes<T>& weights) { weights_ = widen(weights); }

  template <typename Base>
  EHRSEQ_INLINE void multiply(const Base& base, const Lanes<T>& change, double least) {
    constexpr double kRaise = 0x1p54;  // from below the normal numbers into them
    const Wide<T> wide = widen(change);
    for (int i = 0; i < Wide<T>::kParts; ++i) {
      const Doubles exact = part_of(base, i) + wide.part[i];
      const Doubles factor = exact < least ? broadcast(least) : exact;
      const Mask<double> tiny = factor < DBL_MIN;
      const Doubles log = log_nonnegative(tiny ? factor * kRaise : factor) -
                          (tiny ? broadcast(54 * kLog2) : Doubles{});
      sum_.part[i] -= weights_.part[i] * log;
    }
  }

  // 1 + excess <= 2. Single precision is what e^-|x| has; the sum is in double precision.
  EHRSEQ_INLINE void add(const Lanes<T>& linear, const Lanes<T>& excess) {
    add(widen(linear + log1p_below_one(excess)));
  }

  EHRSEQ_INLINE void add(const Wide<T>& term) {
    for (int i = 0; i < Wide<T>::kParts; ++i) sum_.part[i] += weights_.part[i] * term.part[i];
  }

  EHRSEQ_INLINE void add(const Wide<T>& linear, const Wide<T>& excess) {
    for (int i = 0; i < Wide<T>::kParts; ++i) {
      sum_.part[i] += weights_.part[i] * (linear.part[i] + log1p_nonnegative(excess.part[i]));
    }
  }

  EHRSEQ_INLINE double total() const { return sum_of_all<T>(sum_); }
  EHRSEQ_INLINE void flush() {}
  EHRSEQ_INLINE Unfinished unfinished() const { return {0, total()}; }

 private:
  Wide<T> weights_{};
  Wide<T> sum_{};
};

// What is left of each lane's loss.
template <typename T>
struct UnfinishedLanes {
  Wide<T> argument;
  Wide<T> rest;
};

// As Product, of each lane on its own.
template <typename T>
class ProductOfLane {
 public:
  ProductOfLane() {
    running_ = ones<T>();
    mantissa_ = ones<T>();
  }

  template <typename Base>
  EHRSEQ_INLINE void multiply(const Base& base, const Lanes<T>& change, double least) {
    multiply_lanes<T>(running_, base, change, least);
  }

  EHRSEQ_INLINE void flush() {
    for (int i = 0; i < Wide<T>::kParts; ++i) {
      const Doubles running = running_.part[i];
      const Doubles product = running * mantissa_.part[i];
      const Mask<double> normal = (running >= DBL_MIN) & (product >= DBL_MIN);
      const int64_t all_normal =
          join_lanes<int64_t>(normal, [](const auto& a, const auto& b)
                                          __attribute__((always_inline)) { return a & b; });
      if (all_normal) {
        const Mask<double> bits = (Mask<double>)product;
        mantissa_.part[i] = (Doubles)((bits & kFraction) | kOneBits);
        exponent_[i] += (bits >> 52) - 1023;
      } else {
        flush_abnormal(i);
      }
    }
    running_ = ones<T>();
  }

  EHRSEQ_INLINE UnfinishedLanes<T> unfinished() {
    flush();
    UnfinishedLanes<T> lanes;
    for (int i = 0; i < Wide<T>::kParts; ++i) {
      const Mask<double> held = exponent_[i] < -1000 ? broadcast<int64_t>(-1000) : exponent_[i];
      lanes.argument.part[i] = mantissa_.part[i] * (Doubles)((held + 1023) << 52);
      lanes.rest.part[i] = __builtin_convertvector(held - exponent_[i], Doubles) * kLog2;
    }
    return lanes;
  }

 private:
  void flush_abnormal(int part) {
    double mantissas[kLanes<double>];
    double running[kLanes<double>];
    int64_t exponents[kLanes<double>];
    std::memcpy(mantissas, &mantissa_.part[part], sizeof mantissas);
    std::memcpy(running, &running_.part[part], sizeof running);
    std::memcpy(exponents, &exponent_[part], sizeof exponents);
    for (int64_t i = 0; i < kLanes<double>; ++i) {
      exponents[i] += multiply_abnormal(&mantissas[i], running[i]);
      exponents[i] += multiply_abnormal(&(running[i] = 1), mantissas[i]);
      mantissas[i] = running[i];
    }
    std::memcpy(&mantissa_.part[part], mantissas, sizeof mantissas);
    std::memcpy(&exponent_[part], exponents, sizeof exponents);
  }

  Wide<T> running_;
  Wide<T> mantissa_;
  Mask<double> exponent_[Wide<T>::kParts] = {};
};

// As SumOfSoftplus, of each lane on its own.
template <typename T>
class SumOfSoftplusOfLane {
 public:
  static constexpr int64_t kMostBits = 1000;

  EHRSEQ_INLINE void add(const Lanes<T>& narrow_linear, const Lanes<T>& narrow_excess) {
    const Wide<T> linear = widen(narrow_linear);
    const Wide<T> excess = widen(narrow_excess);
    for (int i = 0; i < Wide<T>::kParts; ++i) {
      rest_.part[i] += linear.part[i];
      excess_.part[i] += excess.part[i] * (1.0 + excess_.part[i]);
    }
  }

  EHRSEQ_INLINE void flush() {
    for (int i = 0; i < Wide<T>::kParts; ++i) {
      rest_.part[i] += log1p_nonnegative(excess_.part[i]);
    }
    excess_ = {};
  }

  EHRSEQ_INLINE UnfinishedLanes<T> unfinished() const { return {excess_, rest_}; }

 private:
  Wide<T> rest_{};
  Wide<T> excess_{};
};

}  // namespace ehrseq::survival::EHRSEQ_ISA
