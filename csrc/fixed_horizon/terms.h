// The binary cross-entropy of vectors of visits and its gradient.
//
// With q = e^-|x|, the term is x (1 - y) + max(-x, 0) + log(1 + q), and its derivative q / (1 + q)
// - y or, for x >= 0, (1 - y) - q / (1 + q): exact where the logit is far on the label's side.
//
// No include guard: included for each instruction set after survival_nll/sums.h, as that is.

namespace ehrseq::fixed_horizon::EHRSEQ_ISA {

using namespace ehrseq::survival::EHRSEQ_ISA;  // NOLINT: the lanes of the same instruction set

// The terms of visits with labels y as linear + log(1 + decay), and their derivatives, before
// weights; where a logit does not count it is 0.
template <typename T>
struct Parts {
  Lanes<T> linear;
  Lanes<T> decay;
  Lanes<T> slope;

  EHRSEQ_INLINE Lanes<T> term() const { return linear + log1p_below_one(decay); }
};

template <typename T>
EHRSEQ_INLINE Parts<T> parts_of(const Lanes<T>& x, const Lanes<T>& y) {
  const Mask<T> positive = x >= T(0);
  const Lanes<T> q = exp_nonpositive<T>(positive ? -x : x);
  const Lanes<T> rest = q / (q + T(1));
  return {x * (T(1) - y) + (positive ? Lanes<T>{} : -x), q,
          positive ? (T(1) - y) - rest : rest - y};
}

// As one number each.
template <typename T>
struct Terms {
  Lanes<T> term;
  Lanes<T> slope;
};

template <typename T>
EHRSEQ_INLINE Terms<T> terms_of(const Lanes<T>& x, const Lanes<T>& y) {
  const Parts<T> parts = parts_of<T>(x, y);
  return {parts.term(), parts.slope};
}

// A derivative of 0 that counts is -0: the backward pass tells it from the +0 of what does not
// count (survival_nll/scale_cpu.cpp).
template <typename T>
EHRSEQ_INLINE Lanes<T> marked(const Mask<T>& counts, const Lanes<T>& slope) {
  return counts ? (slope == T(0) ? broadcast(T(-0.0)) : slope) : Lanes<T>{};
}

// Of a label 0 the term is log(1 + e^x), of a label 1 log(1 + e^-x): with the sign of such logits
// turned around, all are softplus(x) = max(x, 0) + log(1 + e^-|x|). Logarithms are summed as one of
// a product, which is kept as its distance from 1: tiny terms keep their digits. Sums of lanes are
// in T, of few visits each.
//
// An infinite logit that has the label 1, or is on the side of the label 0, is infinity times 0 or
// less infinity where terms_of() and PyTorch have it: x * 0 keeps that NaN.
template <typename T>
class SumOfTerms {
 public:
  // Before a flush: each factor is at most 2, the product of all lanes is a double's, a lane's T's.
  static constexpr int64_t kMostVectors =
      std::min<int64_t>(SumOfSoftplus<T>::kMostBits, sizeof(T) == 4 ? 100 : 1000);

  // Of logits with labels 1 in the lanes `within`, the derivatives times `scale`.
  EHRSEQ_INLINE Lanes<T> add(const Lanes<T>& logits, const Mask<T>& within, const Lanes<T>& scale) {
    const auto all = [](const Lanes<T>& decay) __attribute__((always_inline)) { return decay; };
    return add_counted(logits, within, scale, all);
  }
  // Only lanes that count; in the others logits are 0.
  EHRSEQ_INLINE Lanes<T> add(const Lanes<T>& logits, const Mask<T>& within, const Lanes<T>& scale,
                             const Mask<T>& counts) {
    const auto some = [&](const Lanes<T>& decay)
                          __attribute__((always_inline)) { return only_where<T>(counts, decay); };
    return only_where<T>(counts, add_counted(logits, within, scale, some));
  }

  EHRSEQ_INLINE void flush() {
    rest_ += std::log1p(excess_of_all<T>(widen(excess_))) + sum_of_all<T>(widen(linear_));
    linear_ = excess_ = Lanes<T>{};
  }

  EHRSEQ_INLINE Unfinished unfinished() const {
    return {excess_of_all<T>(widen(excess_)), rest_ + sum_of_all<T>(widen(linear_))};
  }

 private:
  template <typename Counted>
  EHRSEQ_INLINE Lanes<T> add_counted(const Lanes<T>& logits, const Mask<T>& within,
                                     const Lanes<T>& scale, const Counted& counted) {
    const Mask<T> sign = (Mask<T>)broadcast(T(-0.0));
    const Mask<T> turned = within ? sign : Mask<T>{};
    const Lanes<T> x = (Lanes<T>)((Mask<T>)logits ^ turned);
    const Lanes<T> nothing = x * T(0);  // or NaN
    linear_ += x > T(0) ? x : nothing;
    linear_ = within ? linear_ + nothing : linear_;
    const Lanes<T> decay = exp_nonpositive<T>((Lanes<T>)((Mask<T>)x | sign));  // e^-|x|
    excess_ += counted(decay) * (T(1) + excess_);
    const Lanes<T> scales = (Lanes<T>)((Mask<T>)scale ^ turned);
    const Lanes<T> slope = scales * (x > T(0) ? broadcast(T(1)) : decay) / (T(1) + decay);
    return slope == T(0) ? broadcast(T(-0.0)) : slope;
  }

  Lanes<T> linear_{};
  Lanes<T> excess_{};
  double rest_ = 0;
};

}  // namespace ehrseq::fixed_horizon::EHRSEQ_ISA
