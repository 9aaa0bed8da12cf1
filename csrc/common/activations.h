// Sigmoid and tanh of a vector of float32, to about one or two units in the last place; of float64,
// by the C library. Included once per instruction set, after tile.h.

// 2^n and the polynomial of e^r - 1 for x = n ln 2 + r, |r| <= ln 2 / 2 (Cody and Waite's split of
// ln 2; Taylor's polynomial, whose remainder there is below half a unit in the last place).
struct ExponentParts {
  Vector<float> power;
  Vector<float> exp_minus_one;
};

EHRSEQ_INLINE ExponentParts split_exponent(Vector<float> x) {
  typedef uint32_t Bits __attribute__((vector_size(EHRSEQ_VECTOR_BYTES)));
  // Adding this rounds to an integer, which is then in the low bits of the sum.
  const float round_by = 12582912.0f;
  const Vector<float> shifted = x * 1.44269504f + round_by;
  const Vector<float> n = shifted - round_by;
  const Vector<float> r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  Vector<float> p = r * (1.0f / 5040) + (1.0f / 720);
  p = p * r + (1.0f / 120);
  p = p * r + (1.0f / 24);
  p = p * r + (1.0f / 6);
  p = p * r + 0.5f;
  return {(Vector<float>)(((Bits)shifted + 127u) << 23), p * (r * r) + r};
}

// A NaN passes: it fails both comparisons.
EHRSEQ_INLINE Vector<float> clamp(Vector<float> x, float low, float high) {
  const Vector<float> lows = splat(low);
  const Vector<float> highs = splat(high);
  x = x < lows ? lows : x;
  return x > highs ? highs : x;
}

// Exactly 0 where the result would be no normal number, so that 0 · inf is NaN as elsewhere.
EHRSEQ_INLINE Vector<float> sigmoid(Vector<float> x) {
  const float lowest = -87.33f;
  const ExponentParts e = split_exponent(clamp(-x, -87.0f, -lowest));
  const Vector<float> value = 1.0f / (1.0f + (e.exp_minus_one * e.power + e.power));
  return x < splat(lowest) ? Vector<float>{} : value;
}

// tanh x = (e^2x - 1) / (e^2x + 1), from e^2x - 1 so that small x lose nothing.
EHRSEQ_INLINE Vector<float> tanh(Vector<float> x) {
  const ExponentParts e = split_exponent(clamp(2.0f * x, -20.0f, 20.0f));
  const Vector<float> y = e.exp_minus_one * e.power + (e.power - 1.0f);
  return y / (y + 2.0f);
}

EHRSEQ_INLINE Vector<double> sigmoid(Vector<double> x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = 1.0 / (1.0 + std::exp(-x[i]));
  return x;
}

EHRSEQ_INLINE Vector<double> tanh(Vector<double> x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = std::tanh(x[i]);
  return x;
}
