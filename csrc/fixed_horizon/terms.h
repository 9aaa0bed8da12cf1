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

}  // namespace ehrseq::fixed_horizon::EHRSEQ_ISA
