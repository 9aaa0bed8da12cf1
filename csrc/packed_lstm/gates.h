// The four gates of one visit, for the units of one block. Included once per instruction set (see
// kernels_impl.h).

template <typename S>
struct Gates {
  Vector<Sum<S>> in, forget, candidate, out;
};

template <typename S>
EHRSEQ_INLINE Gates<S> activate(const Vector<Sum<S>> (&sum)[kGates]) {
  return {sigmoid(sum[0]), sigmoid(sum[1]), tanh(sum[2]), sigmoid(sum[3])};
}

template <typename S>
EHRSEQ_INLINE void store_gates(Sum<S>* to, const Gates<S>& gates) {
  store(to, gates.in);
  store(to + kLanes<S>, gates.forget);
  store(to + 2 * kLanes<S>, gates.candidate);
  store(to + 3 * kLanes<S>, gates.out);
}
