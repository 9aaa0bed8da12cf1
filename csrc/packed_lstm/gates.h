// One visit of the LSTM, for the units of one block. Included once per instruction set (see
// common/recurrent/kernels.h).

template <typename S>
struct Gates {
  Vector<Sum<S>> in, forget, candidate, out;
};

template <typename S>
EHRSEQ_INLINE Gates<S> activate(const Vector<Sum<S>> (&sum)[kSums]) {
  return {sigmoid(sum[0]), sigmoid(sum[1]), tanh(sum[2]), sigmoid(sum[3])};
}

template <typename S>
EHRSEQ_INLINE void store_gates(Sum<S>* to, int64_t stride, const Gates<S>& gates) {
  store(to, gates.in);
  store(to + stride, gates.forget);
  store(to + 2 * stride, gates.candidate);
  store(to + 3 * stride, gates.out);
}

template <typename S>
EHRSEQ_INLINE Gates<S> load_gates(const Sum<S>* from, int64_t stride) {
  return {load(from), load(from + stride), load(from + 2 * stride), load(from + 3 * stride)};
}

// c = f c' + i g, h = o tanh c.
template <typename S>
EHRSEQ_INLINE States<S> next_states(const Gates<S>& gates, Vector<Sum<S>> cell_before) {
  const Vector<Sum<S>> cell = gates.forget * cell_before + gates.in * gates.candidate;
  return {cell, gates.out * tanh(cell)};
}

// The gradients of a visit's sums, from those of its hidden and cell state; returns that of the
// cell state before it.
template <typename S>
EHRSEQ_INLINE Vector<Sum<S>> grad_of_sums(const Backward<S>& layer, const Step& step, int64_t block,
                                          int64_t p, const Gates<S>& gates,
                                          Vector<Sum<S>> grad_hidden, Vector<Sum<S>> grad_cell,
                                          Vector<Sum<S>> (&grad_sums)[kSums]) {
  const Shape& shape = layer.shape;
  const int64_t unit = block * kLanes<S>;
  const int64_t padded = shape.padded_hidden();
  const Vector<Sum<S>> tanh_cell = tanh(load(layer.carried + (step.first_row + p) * padded + unit));
  Vector<Sum<S>> before = {};
  if (p < step.continuing) {
    before = load(layer.carried + (step.row_before + p) * padded + unit);
  } else if (layer.start) {
    before = load_some(layer.start + p * shape.hidden + unit, units_in<S>(block, shape.hidden));
  }

  const Sum<S> one = 1;
  grad_cell += grad_hidden * gates.out * (one - tanh_cell * tanh_cell);
  grad_sums[0] = grad_cell * gates.candidate * gates.in * (one - gates.in);
  grad_sums[1] = grad_cell * before * gates.forget * (one - gates.forget);
  grad_sums[2] = grad_cell * gates.in * (one - gates.candidate * gates.candidate);
  grad_sums[3] = grad_hidden * tanh_cell * gates.out * (one - gates.out);
  return grad_cell * gates.forget;
}
