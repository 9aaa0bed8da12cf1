// The losses of some patients and their gradients, each from a row of logits over time.
//
// Of the classes at risk, the outcome is one (an event) or some (a censoring: all that is later,
// and "beyond", whose logit is 0). With d the log-sum-exp of the others minus that of the outcome,
//   -log P(outcome | at risk) = log(1 + e^d),
// which keeps its digits where the outcome is nearly certain, and where it is nearly impossible.
// The derivative is sigmoid(d) times the softmax among the others, and minus that among the
// outcome.
//
// Rows are read for the sums first, whose terms are kept in place of the gradient; then the losses
// are taken, for eight patients at a time; then the terms are scaled. Where the gradient has 16
// bits it has no room for them, and they are computed again.
//
// Compiled once for each instruction set, hence no include guard: see common/each_isa.h.

#include "common/simd.h"
#include "common/vector_math.h"
#include "pmf_nll/rows.h"

namespace ehrseq::survival::pmf::EHRSEQ_ISA {

using namespace ehrseq::EHRSEQ_ISA;  // NOLINT: the lanes of the same instruction set

struct AllCount {};

template <typename T>
EHRSEQ_INLINE Lanes<T> select(AllCount, const Lanes<T>& x, T) {
  return x;
}
template <typename T>
EHRSEQ_INLINE Lanes<T> select(const Mask<T>& counts, const Lanes<T>& x, T otherwise) {
  return counts ? x : broadcast(otherwise);
}

// Some neighbouring values of a row, as whole vectors; where there are fewer values than a vector
// holds, a copy of them that is filled up with classes that cannot be.
template <typename T, typename scalar_t>
class Values {
 public:
  EHRSEQ_INLINE Values(const scalar_t* values, int64_t count) : values_(values), count_(count) {
    if (count == 0 || count >= kLanes<T>) return;
    for (int64_t i = 0; i < kLanes<T>; ++i) {
      copy_[i] = i < count ? values[i] : static_cast<scalar_t>(-HUGE_VALF);
    }
    values_ = copy_;
    count_ = kLanes<T>;
  }
  Values(const Values&) = delete;
  Values& operator=(const Values&) = delete;

  // Calls body(at, x, counts) with each vector x. The lane of `left_out` does not count, nor do,
  // in a last vector that ends where the values do, those that came before.
  template <typename Body>
  EHRSEQ_INLINE void for_each_vector(int64_t left_out, const Body& body) const {
    const auto whole = [&](int64_t at, int64_t end) __attribute__((always_inline)) {
      for (; at < end; at += kLanes<T>) body(at, load(values_ + at), AllCount{});
    };
    const auto part = [&](int64_t at, int64_t first) __attribute__((always_inline)) {
      const Mask<T> numbers = lane_numbers<T>() + static_cast<bits_t<T>>(at);
      body(at, load(values_ + at),
           (numbers >= static_cast<bits_t<T>>(first)) &
               (numbers != static_cast<bits_t<T>>(left_out)));
    };
    const int64_t end = count_ / kLanes<T> * kLanes<T>;
    int64_t at = 0;
    if (left_out >= 0 && left_out < end) {
      const int64_t around = left_out / kLanes<T> * kLanes<T>;
      whole(0, around);
      part(around, around);
      at = around + kLanes<T>;
    }
    whole(at, end);
    if (end < count_) part(count_ - kLanes<T>, end);
  }

 private:
  const scalar_t* values_;
  int64_t count_;
  scalar_t copy_[kLanes<T>];
};

// A log-sum-exp: Σ e^(x - largest). Where no class can be, the sum is 0.
struct LogSum {
  double largest;
  double sum;
};

template <typename T>
EHRSEQ_INLINE double largest_of(const Lanes<T>& lanes) {
  const auto larger = [](const auto& a, const auto& b)
                          __attribute__((always_inline)) { return a > b ? a : b; };
  const Wide<T> wide = widen(lanes);
  Doubles most = wide.part[0];
  for (int i = 1; i < Wide<T>::kParts; ++i) most = larger(most, wide.part[i]);
  return join_lanes<double>(most, larger);
}

// Of `count` values without the one at `left_out`, the largest being at least `least`. A NaN or an
// infinite logit makes the sum NaN. Where `terms` is given, they are written there.
template <typename T, typename scalar_t>
EHRSEQ_INLINE LogSum log_sum_of(const scalar_t* row, int64_t count, int64_t left_out, T least,
                                T* terms) {
  const Values<T, scalar_t> values(row, count);
  Lanes<T> most = broadcast(least);
  values.for_each_vector(
      left_out, [&](int64_t, const Lanes<T>& x, const auto& counts) __attribute__((always_inline)) {
        const Lanes<T> counted = select<T>(counts, x, -HUGE_VAL);
        most = counted > most ? counted : most;  // a NaN is left to the sum
      });
  T largest = static_cast<T>(largest_of<T>(most));
  if (largest == -HUGE_VAL) largest = 0;
  Wide<T> sums{};
  T copy[kLanes<T>];
  T* to = count < kLanes<T> ? copy : terms;
  values.for_each_vector(left_out, [&](int64_t at, const Lanes<T>& x, const auto& counts)
                                       __attribute__((always_inline)) {
                                         const Lanes<T> term = exp_nonpositive<T>(x - largest);
                                         if (to) store(to + at, term);
                                         const Wide<T> wide = widen(select<T>(counts, term, 0));
                                         for (int i = 0; i < Wide<T>::kParts; ++i)
                                           sums.part[i] += wide.part[i];
                                       });
  if (terms && to == copy) std::copy_n(copy, count, terms);
  double sum = 0;
  for (int i = 0; i < Wide<T>::kParts; ++i) sum += sum_of_lanes<double>(sums.part[i]);
  return {static_cast<double>(largest), sum};
}

// As survival_nll_scale reads it: -0 is the derivative of a class that counts, 0 of none.
template <typename T>
EHRSEQ_INLINE Lanes<T> counted(const Lanes<T>& slope) {
  return slope == T(0) ? broadcast(T(-0.0)) : slope;
}

// factor * e^(x - largest) for each of `count` values.
template <typename T, typename scalar_t, typename grad_t>
EHRSEQ_INLINE void write_slopes(const scalar_t* row, int64_t count, T largest, T factor,
                                grad_t* grad) {
  const Values<T, scalar_t> values(row, count);
  grad_t copy[kLanes<T>];
  grad_t* to = count < kLanes<T> ? copy : grad;
  values.for_each_vector(
      -1, [&](int64_t at, const Lanes<T>& x, const auto&) __attribute__((always_inline)) {
        store(to + at, counted<T>(exp_nonpositive<T>(x - largest) * factor));
      });
  if (to == copy) std::copy_n(copy, count, grad);
}

// The same where the terms are there already.
template <typename T>
EHRSEQ_INLINE void scale_terms(T* terms, int64_t count, T factor) {
  if (count < kLanes<T>) {
    for (int64_t i = 0; i < count; ++i) {
      const T slope = terms[i] * factor;
      terms[i] = slope == 0 ? T(-0.0) : slope;
    }
    return;
  }
  const int64_t last = count - kLanes<T>;
  const Lanes<T> last_terms = load(terms + last);  // some of which the loop overwrites
  for (int64_t at = 0; at <= last; at += kLanes<T>) {
    store(terms + at, counted<T>(load(terms + at) * factor));
  }
  store(terms + last, counted<T>(last_terms * factor));
}

// Which values of a row are the outcome, and which are the others at risk.
struct Roles {
  int64_t begin;
  int64_t later;  // of a censoring: from here on is the outcome
  int64_t end;
  int64_t event;  // -1 for a censoring
};

EHRSEQ_INLINE Roles roles_of(const Outcome& outcome, const Settings& settings) {
  const int64_t begin = outcome.entry * settings.classes;
  const int64_t end = outcome.visits * settings.classes;
  if (outcome.type > 0) {
    return {begin, end, end, outcome.time * settings.classes + outcome.type - 1};
  }
  return {begin, (outcome.time + (settings.censored_included ? 1 : 0)) * settings.classes, end, -1};
}

// What the losses of a group are taken from, and what their derivatives are made of.
struct Group {
  static constexpr int64_t kMost = OutcomeReader::kAtOnce;
  static_assert(kMost % kLanes<double> == 0);

  double is_event[kMost];
  double others[kMost];  // the sum of the log-sum-exp; then what its terms are multiplied by
  double others_largest[kMost];
  double outcome[kMost];
  double outcome_largest[kMost];
  double nll[kMost];
  bool others_count[kMost];

  // Of eight patients from `first` on.
  EHRSEQ_INLINE void take_losses(int64_t first);
};

EHRSEQ_INLINE void Group::take_losses(int64_t first) {
  constexpr double kLarge = 600;  // e^600 is far from infinity
  const Doubles base = load(others_largest + first);
  const Doubles outcome_base = load(outcome_largest + first);
  const Mask<double> event = load(is_event + first) != 0.0;
  const Doubles beyond = exp_nonpositive<double>(-(event ? base : outcome_base));
  const Doubles of_others = load(others + first) + (event ? beyond : Doubles{});
  const Doubles of_outcome = load(outcome + first) + (event ? Doubles{} : beyond);

  const Doubles apart = base - outcome_base;
  const Mask<double> is_large = apart > kLarge;
  const Doubles held = is_large ? broadcast(kLarge) : apart;
  const Doubles decay = exp_nonpositive<double>(held > 0.0 ? -held : held);
  const Doubles ratio = of_others / of_outcome;
  const Doubles odds = (held > 0.0 ? 1.0 / decay : decay) * ratio;
  Doubles losses = is_large ? apart + log_nonnegative(ratio) : log1p_nonnegative(odds);
  Doubles chance = is_large ? ratio / ratio : odds / (1.0 + odds);  // of the others
  const Mask<double> impossible = of_outcome == 0.0;
  losses = impossible ? of_others * HUGE_VAL : losses;
  chance = impossible ? broadcast(1.0) : chance;
  const Mask<double> certain = of_others == 0.0;
  const Doubles none = of_outcome - of_outcome;  // 0; a NaN stays one
  store(nll + first, certain ? none : losses);
  store(others + first, certain ? none : chance / of_others);
  store(outcome + first, certain ? none : -chance / of_outcome);
  for (int64_t i = 0; i < kLanes<double>; ++i) others_count[first + i] = !certain[i];
}

// The next rows' visits are prefetched while this row is computed: what is past a patient's visits
// is not read, which the processor's own prefetcher cannot follow.
constexpr int64_t kRowsAhead = 8;

template <typename scalar_t>
EHRSEQ_INLINE void prefetch(const Settings& settings, const Rows<scalar_t>& rows, int64_t patient) {
  if (patient >= rows.patients) return;
  const Roles roles = roles_of(rows.outcomes[patient], settings);
  const scalar_t* row = rows.values + patient * settings.slots * settings.classes;
  for (int64_t at = roles.begin; at < roles.end; at += 64 / sizeof(scalar_t)) {
    __builtin_prefetch(row + at);
  }
}

template <typename scalar_t>
void rows_nll(const Settings& settings, const Rows<scalar_t>& rows, double* nll) {
  using T = accumulator_t<scalar_t>;
  using grad_t = saved_grad_t<scalar_t>;
  constexpr bool kKeepsTerms = std::is_same_v<grad_t, T>;  // in place of the gradient
  const int64_t row_length = settings.slots * settings.classes;
  const auto terms_at = [&](int64_t at) -> T* {
    if constexpr (kKeepsTerms) return rows.grad ? rows.grad + at : nullptr;
    return nullptr;
  };
  Group group{};
  for (int64_t i = 0; i < kRowsAhead; ++i) prefetch(settings, rows, i);
  for (int64_t i = 0; i < rows.patients; ++i) {
    prefetch(settings, rows, i + kRowsAhead);
    const int64_t start = i * row_length;
    const scalar_t* row = rows.values + start;
    const Roles roles = roles_of(rows.outcomes[i], settings);
    const bool is_event = roles.event >= 0;
    group.is_event[i] = is_event;
    const LogSum others = log_sum_of<T>(row + roles.begin, roles.later - roles.begin,
                                        is_event ? roles.event - roles.begin : -1,
                                        T(is_event ? 0 : -HUGE_VAL), terms_at(start + roles.begin));
    LogSum outcome{};
    if (is_event) {
      const double x = static_cast<double>(static_cast<T>(row[roles.event]));
      if (x != -HUGE_VAL) outcome = {x, 1 + (x - x)};
    } else {
      outcome = log_sum_of<T>(row + roles.later, roles.end - roles.later, -1, T(0),
                              terms_at(start + roles.later));
    }
    group.others_largest[i] = others.largest;
    group.others[i] = others.sum;
    group.outcome_largest[i] = outcome.largest;
    group.outcome[i] = outcome.sum;
  }
  for (int64_t i = 0; i < rows.patients; i += kLanes<double>) group.take_losses(i);
  std::copy_n(group.nll, rows.patients, nll);
  if (!rows.grad) return;
  for (int64_t i = 0; i < rows.patients; ++i) {
    const scalar_t* row = rows.values + i * row_length;
    grad_t* grad = rows.grad + i * row_length;
    const Roles roles = roles_of(rows.outcomes[i], settings);
    const double scale = rows.outcomes[i].weight * settings.share;
    const auto write = [&](int64_t begin, int64_t end, double largest, double factor)
                           __attribute__((always_inline)) {
                             if constexpr (kKeepsTerms) {
                               scale_terms(grad + begin, end - begin, static_cast<T>(factor));
                             } else {
                               write_slopes(row + begin, end - begin, static_cast<T>(largest),
                                            static_cast<T>(factor), grad + begin);
                             }
                           };
    if (group.others_count[i]) {
      write(roles.begin, roles.later, group.others_largest[i], group.others[i] * scale);
    }
    const double factor = group.outcome[i] * scale;
    if (roles.event >= 0) {
      const bool can_be = static_cast<T>(row[roles.event]) != -HUGE_VAL;
      const T slope = static_cast<T>(can_be ? factor : factor * 0);
      grad[roles.event] = static_cast<grad_t>(slope == 0 ? T(-0.0) : slope);
    } else {
      write(roles.later, roles.end, group.outcome_largest[i], factor);
    }
  }
}

}  // namespace ehrseq::survival::pmf::EHRSEQ_ISA
