// The loss of one patient and its gradient, from a row of logits over time.
//
// Of the classes at risk, the outcome is one (an event) or some (a censoring: all that is later,
// and "beyond", whose logit is 0). With d the log-sum-exp of the others minus that of the outcome,
//   -log P(outcome | at risk) = log(1 + e^d),
// which keeps its digits where the outcome is nearly certain, and where it is nearly impossible.
// The derivative is sigmoid(d) times the softmax among the others, and minus that among the
// outcome.
//
// Compiled once for each instruction set, hence no include guard: see common/each_isa.h.

#include "common/simd.h"
#include "common/vector_math.h"
#include "pmf_nll/rows.h"

namespace ehrseq::survival::pmf::EHRSEQ_ISA {

using namespace ehrseq::EHRSEQ_ISA;  // NOLINT: the lanes of the same instruction set

template <typename T>
EHRSEQ_INLINE T counted(T slope) {
  return slope == 0 ? T(-0.0) : slope;
}

// Some of the classes, copied one after another and filled up to whole vectors with classes that
// cannot be; and the largest logit among them, "beyond" included.
template <typename T>
class Classes {
 public:
  explicit Classes(T* memory) : terms_(memory) {}

  template <typename scalar_t>
  EHRSEQ_INLINE void take(const scalar_t* logits, int64_t count) {
    count_ = count;
    int64_t at = 0;
    for (; at + kLanes<T> <= count; at += kLanes<T>) store(terms_ + at, load(logits + at));
    for (; at < count; ++at) terms_[at] = static_cast<T>(logits[at]);
    while (at % kLanes<T> != 0) terms_[at++] = -HUGE_VAL;
    filled_ = at;
  }

  EHRSEQ_INLINE void leave_out(int64_t at) { terms_[at] = -HUGE_VAL; }

  // Terms e^(logit - largest) in place of the logits. A NaN or an infinite logit makes the sum NaN;
  // where no class can be it is 0.
  EHRSEQ_INLINE void sum(bool with_beyond) {
    Lanes<T> most = broadcast(with_beyond ? T(0) : T(-HUGE_VAL));
    for (int64_t at = 0; at < filled_; at += kLanes<T>) {
      const Lanes<T> x = load(terms_ + at);
      most = x > most ? x : most;  // a NaN is left to the sum
    }
    T largest = static_cast<T>(largest_of(widen(most)));
    if (largest == -HUGE_VAL) largest = 0;
    Wide<T> sums{};
    for (int64_t at = 0; at < filled_; at += kLanes<T>) {
      const Lanes<T> term = exp_nonpositive<T>(load(terms_ + at) - largest);
      store(terms_ + at, term);
      const Wide<T> wide = widen(term);
      for (int i = 0; i < Wide<T>::kParts; ++i) sums.part[i] += wide.part[i];
    }
    largest_ = static_cast<double>(largest);
    sum_ = with_beyond ? (largest == 0 ? 1.0 : std::exp(-largest_)) : 0.0;
    for (int i = 0; i < Wide<T>::kParts; ++i) sum_ += sum_of_lanes<double>(sums.part[i]);
  }

  double largest() const { return largest_; }
  double sum() const { return sum_; }

  // As survival_nll_scale reads it: -0 is the derivative of a class that counts, 0 of none.
  template <typename grad_t>
  EHRSEQ_INLINE void write(grad_t* grad, T factor) const {
    int64_t at = 0;
    for (; at + kLanes<T> <= count_; at += kLanes<T>) {
      const Lanes<T> slope = load(terms_ + at) * factor;
      store(grad + at, slope == T(0) ? broadcast(T(-0.0)) : slope);
    }
    for (; at < count_; ++at) grad[at] = static_cast<grad_t>(counted(terms_[at] * factor));
  }

 private:
  static EHRSEQ_INLINE double largest_of(const Wide<T>& wide) {
    const auto larger = [](const auto& a, const auto& b)
                            __attribute__((always_inline)) { return a > b ? a : b; };
    Doubles most = wide.part[0];
    for (int i = 1; i < Wide<T>::kParts; ++i) most = larger(most, wide.part[i]);
    return join_lanes<double>(most, larger);
  }

  T* terms_;
  int64_t count_ = 0;
  int64_t filled_ = 0;
  double largest_ = 0;
  double sum_ = 0;
};

struct Loss {
  double nll;
  double of_others;  // the derivative by a class is this times its term
  double of_outcome;
};

// From the largest logits of the others and of the outcome, and the sums of their terms.
EHRSEQ_INLINE Loss loss_of(double apart, double others, double outcome) {
  if (others == 0) {
    const double none = outcome == 0 ? NAN : outcome - outcome;  // 0; a NaN stays one
    return {none, none, none};
  }
  if (apart > 600) {                         // e^apart would be too large
    const double certain = others / others;  // 1; a NaN stays one
    return {apart + std::log(others / outcome), certain / others, -certain / outcome};
  }
  const double odds = (apart == 0 ? 1.0 : std::exp(apart)) * (others / outcome);
  const double chance = outcome == 0 ? 1 : odds / (1 + odds);  // of the others
  return {std::log1p(odds), chance / others, -chance / outcome};
}

// Returns the loss of one patient; where `grad` is given (a row of zeros) writes `scale` times its
// derivative for each class at risk. `memory` holds a row and four
// vectors.
template <typename T, typename scalar_t, typename grad_t>
double nll_of_row(const scalar_t* row, grad_t* grad, const Outcome& outcome,
                  const Settings& settings, T* memory) {
  const int64_t begin = outcome.entry * settings.classes;
  const int64_t time = outcome.time * settings.classes;
  const int64_t end = outcome.visits * settings.classes;
  const double scale = outcome.weight * settings.share;
  Classes<T> others(memory);
  if (outcome.type > 0) {
    const int64_t event = time + outcome.type - 1;
    others.take(row + begin, end - begin);
    others.leave_out(event - begin);
    others.sum(true);
    const double chosen = static_cast<double>(static_cast<T>(row[event]));
    const bool can_be = chosen != -HUGE_VAL;
    const double sum = can_be ? 1 + (chosen - chosen) : 0.0;
    const Loss loss = loss_of(others.largest() - (can_be ? chosen : 0.0), others.sum(), sum);
    if (grad) {
      others.write(grad + begin, static_cast<T>(loss.of_others * scale));
      grad[event] = static_cast<grad_t>(counted(static_cast<T>(loss.of_outcome * sum * scale)));
    }
    return loss.nll;
  }
  const int64_t later = time + (settings.censored_included ? settings.classes : 0);
  others.take(row + begin, later - begin);
  others.sum(false);
  Classes<T> survived(memory + (later - begin + 2 * kLanes<T>) / kLanes<T> * kLanes<T>);
  survived.take(row + later, end - later);
  survived.sum(true);
  const Loss loss = loss_of(others.largest() - survived.largest(), others.sum(), survived.sum());
  if (grad) {
    if (others.sum() != 0) others.write(grad + begin, static_cast<T>(loss.of_others * scale));
    survived.write(grad + later, static_cast<T>(loss.of_outcome * scale));
  }
  return loss.nll;
}

template <typename scalar_t>
void rows_nll(const Settings& settings, const Rows<scalar_t>& rows, double* nll) {
  using T = accumulator_t<scalar_t>;
  const int64_t row_length = settings.slots * settings.classes;
  std::vector<T> memory(row_length + 4 * kLanes<T>);
  for (int64_t i = 0; i < rows.patients; ++i) {
    nll[i] = nll_of_row<T>(rows.values + i * row_length,
                           rows.grad ? rows.grad + i * row_length : nullptr, rows.outcomes[i],
                           settings, memory.data());
  }
}

}  // namespace ehrseq::survival::pmf::EHRSEQ_ISA
