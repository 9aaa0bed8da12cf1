// One visit of the GRU, for the units of one block. Included once per instruction set (see
// common/recurrent/kernels.h).

template <typename S>
struct Gates {
  Vector<Sum<S>> reset, update, candidate;
  Vector<Sum<S>> from_hidden;  // W_hn h + b_hn
};

template <typename S>
EHRSEQ_INLINE Gates<S> activate(const Vector<Sum<S>> (&sum)[kSums]) {
  const Vector<Sum<S>> reset = sigmoid(sum[0]);
  return {reset, sigmoid(sum[1]), tanh(sum[2] + reset * sum[3]), sum[3]};
}

template <typename S>
EHRSEQ_INLINE void store_gates(Sum<S>* to, int64_t stride, const Gates<S>& gates) {
  store(to, gates.reset);
  store(to + stride, gates.update);
  store(to + 2 * stride, gates.candidate);
  store(to + 3 * stride, gates.from_hidden);
}

template <typename S>
EHRSEQ_INLINE Gates<S> load_gates(const Sum<S>* from, int64_t stride) {
  return {load(from), load(from + stride), load(from + 2 * stride), load(from + 3 * stride)};
}

// h' = (1 - z) n + z h.
template <typename S>
EHRSEQ_INLINE States<S> next_states(const Gates<S>& gates, Vector<Sum<S>> before) {
  const Vector<Sum<S>> hidden = gates.candidate + gates.update * (before - gates.candidate);
  return {hidden, hidden};
}

// The gradients of a visit's sums, from that of its hidden state: as far as it comes through the
// weights of the visit after it, and as far as that visit kept the state. Returns what this visit
// kept of the one before it.
template <typename S>
EHRSEQ_INLINE Vector<Sum<S>> grad_of_sums(const Backward<S>& layer, const Step& step, int64_t block,
                                          int64_t p, const Gates<S>& gates,
                                          Vector<Sum<S>> grad_through_weights,
                                          Vector<Sum<S>> grad_kept,
                                          Vector<Sum<S>> (&grad_sums)[kSums]) {
  const int64_t hidden = layer.shape.hidden;
  const int64_t unit = block * kLanes<S>;
  const int64_t units = units_in<S>(block, hidden);
  Vector<Sum<S>> before = {};
  if (p < step.continuing) {
    before = load_some(layer.output + (step.row_before + p) * hidden + unit, units);
  } else if (layer.h0) {
    before = load_some(layer.h0 + p * hidden + unit, units);
  }

  const Sum<S> one = 1;
  const Vector<Sum<S>> grad = grad_through_weights + grad_kept;
  const Vector<Sum<S>> kept = grad * gates.update;
  // Not grad * (1 - z): of an infinite gradient PyTorch makes NaN here.
  const Vector<Sum<S>> grad_candidate = (grad - kept) * (one - gates.candidate * gates.candidate);
  grad_sums[0] = grad_candidate * gates.from_hidden * gates.reset * (one - gates.reset);
  grad_sums[1] = grad * (before - gates.candidate) * gates.update * (one - gates.update);
  grad_sums[2] = grad_candidate;
  grad_sums[3] = grad_candidate * gates.reset;
  return kept;
}
