// The binary cross-entropies of one visit's logits, and their derivatives.
//
// With e = exp(-|z|): softplus(z) = max(z, 0) + log(1 + e), and sigmoid(z) is 1 / (1 + e) or
// e / (1 + e). log(1 + e) = 2 artanh(s), s = e / (2 + e) <= 1/3: a series that keeps the digits of
// small e, to which most of thousands of classes belong.
//
// Compiled once for each instruction set, hence no include guard: see common/each_isa.h.

#include "common/simd.h"
#include "common/vector_math.h"
#include "next_codes/row.h"

namespace ehrseq::next_codes::EHRSEQ_ISA {

using namespace ehrseq::EHRSEQ_ISA;  // NOLINT: the lanes of the same instruction set

// Lanes of a block of units in linear/kernels.h.
template <typename T>
constexpr int64_t kBlock = (16 << EHRSEQ_ISA_LEVEL) / static_cast<int64_t>(sizeof(T));

// Terms of artanh(s) / s = 1 + s^2/3 + s^4/5 + ...; the first left out is below half a unit in the
// last place.
template <typename T>
constexpr int kTerms = sizeof(T) == 8 ? 17 : 8;

template <typename T>
struct Terms {
  Lanes<T> softplus;
  Lanes<T> sigmoid;
};

template <typename T>
EHRSEQ_INLINE Terms<T> terms_of(const Lanes<T>& z) {
  const Mask<T> positive = z > T(0);
  const Lanes<T> e = exp_nonpositive<T>(positive ? -z : z);  // a NaN stays one
  const Lanes<T> one = e + T(1);
  const Lanes<T> two = e + T(2);
  const Lanes<T> inverse = T(1) / (one * two);
  const Lanes<T> s = e * (inverse * one);
  const Lanes<T> square = s * s;
  Lanes<T> series = broadcast(T(1) / T(2 * kTerms<T> - 1));
  for (int i = kTerms<T> - 2; i >= 0; --i) series = series * square + T(1) / T(2 * i + 1);
  const Lanes<T> log = s * T(2) * series;
  const Lanes<T> of_one = inverse * two;
  // 0 · z is NaN where z is -inf, as in PyTorch: a weight of infinity is not hidden
  return {(positive ? z : z * T(0)) + log, positive ? of_one : e * of_one};
}

// Lanes as blocks; `blocks` is how many of them there are to write.
template <typename T>
EHRSEQ_INLINE void store_blocks(T* to, int64_t stride, int64_t blocks, const Lanes<T>& lanes) {
  constexpr int64_t kParts = kLanes<T> / kBlock<T>;
  lanes_t<T, kBlock<T>> parts[kParts];
  std::memcpy(parts, &lanes, sizeof parts);
  for (int64_t i = 0; i < kParts; ++i) {
    if (i < blocks) std::memcpy(to + i * stride, &parts[i], sizeof parts[i]);
  }
}

template <typename T, bool kSlopes>
class RowSum {
 public:
  explicit RowSum(const Row<T>& row) : row_(row) {}

  EHRSEQ_INLINE void add(int64_t at, const Lanes<T>& z, const Lanes<T>& weight, int64_t blocks) {
    Terms<T> terms = terms_of<T>(z);
    if (row_.class_weight != nullptr) {
      terms.softplus *= weight;
      terms.sigmoid *= weight;
    }
    const Wide<T> wide = widen(terms.softplus);
    for (int i = 0; i < Wide<T>::kParts; ++i) sums_.part[i] += wide.part[i];
    if constexpr (kSlopes) {
      const Lanes<T> slope = terms.sigmoid * row_.scale;
      store_blocks<T>(row_.slopes + at / kBlock<T> * row_.block_stride, row_.block_stride, blocks,
                      slope);
    }
  }

  double sum() const {
    double sum = 0;
    for (int i = 0; i < Wide<T>::kParts; ++i) sum += sum_of_lanes<double>(sums_.part[i]);
    return sum;
  }

 private:
  const Row<T>& row_;
  Wide<T> sums_{};
};

// A class with this logit adds nothing: the positives while the others are summed, and what the
// last vector has beyond the classes.
template <typename T>
constexpr T kNothing = std::numeric_limits<T>::lowest();

template <typename T, bool kSlopes>
EHRSEQ_INLINE double negatives(const Row<T>& row) {
  RowSum<T, kSlopes> sum(row);
  int64_t at = 0;
  for (; at + kLanes<T> <= row.classes; at += kLanes<T>) {
    const Lanes<T> weight = row.class_weight ? load(row.class_weight + at) : Lanes<T>{};
    sum.add(at, load(row.logits + at), weight, kLanes<T> / kBlock<T>);
  }
  if (const int64_t rest = row.classes - at; rest > 0) {
    T logits[kLanes<T>];
    T weights[kLanes<T>] = {};
    for (int64_t i = 0; i < kLanes<T>; ++i) logits[i] = kNothing<T>;
    std::memcpy(logits, row.logits + at, rest * sizeof(T));
    if (row.class_weight) std::memcpy(weights, row.class_weight + at, rest * sizeof(T));
    const int64_t blocks = (rest + kBlock<T> - 1) / kBlock<T>;
    sum.add(at, load(logits), load(weights), blocks);
    if constexpr (kSlopes) {  // 0 times a scale of infinity would be NaN
      T* last = row.slopes + (at / kBlock<T> + blocks - 1) * row.block_stride;
      for (int64_t i = rest - (blocks - 1) * kBlock<T>; i < kBlock<T>; ++i) last[i] = 0;
    }
  }
  return sum.sum();
}

template <typename T, bool kSlopes>
double loss_of(const Row<T>& row) {
  for (int64_t i = 0; i < row.n_positives; ++i) {
    T& logit = row.logits[row.positives[i]];
    row.kept[i] = logit;
    logit = kNothing<T>;
  }
  double loss = negatives<T, kSlopes>(row);
  if (row.sampled) return loss;
  for (int64_t i = 0; i < row.n_positives; ++i) {
    const int64_t code = row.positives[i];
    const double z = row.kept[i];
    double weight = row.class_weight ? row.class_weight[code] : T(1);
    if (row.positive_weight) weight *= row.positive_weight[code];
    const double e = std::exp(z > 0 ? -z : z);
    loss += weight * ((z > 0 ? 0 : -z) + std::log1p(e) + 0 * z);
    if constexpr (kSlopes) {
      const double chance = (z > 0 ? e : 1.0) / (1 + e);  // of the code's absence
      row.slopes[code / kBlock<T> * row.block_stride + code % kBlock<T>] =
          static_cast<T>(weight * chance) * -row.scale;
    }
  }
  return loss;
}

template <typename T>
double row_loss(const Row<T>& row) {
  return row.slopes ? loss_of<T, true>(row) : loss_of<T, false>(row);
}

}  // namespace ehrseq::next_codes::EHRSEQ_ISA
