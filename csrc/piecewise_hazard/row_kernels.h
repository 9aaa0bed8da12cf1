// The intervals before the last one, of which a patient survived the whole, are a row's; the last
// intervals, of which a fraction was seen, are computed for several patients at a time.
//
// A Total is what the intervals of a row are added to, `Weights` are those of visits, or none.
//
// Compiled once for each instruction set, hence no include guard: see common/each_isa.h.

#include "piecewise_hazard/rows.h"
#include "survival_nll/likelihood.h"

namespace ehrseq::survival::piecewise::EHRSEQ_ISA {

using namespace ehrseq::survival::EHRSEQ_ISA;  // NOLINT: the lanes of the same instruction set

// Of the integral Λ of a rate over one interval: itself, its logarithm, and their slopes.
struct Interval {
  Doubles integral;
  Doubles log;
  Doubles slope;
  Doubles slope_of_log;
};

// Σ Λ
template <typename T>
class Sum {
 public:
  EHRSEQ_INLINE void add(const Wide<T>& integral) {
    for (int i = 0; i < Wide<T>::kParts; ++i) sum_.part[i] += integral.part[i];
  }

  EHRSEQ_INLINE Unfinished unfinished() const { return {0, sum_of_all<T>(sum_)}; }

 private:
  Wide<T> sum_{};
};

// Λ = log(1 + e^x): the loss of a trial that was survived.
template <typename T, template <typename> class Total = SumOfSoftplus>
class Softplus : public FromLogits<T, Total<T>> {
 public:
  Softplus() : FromLogits<T, Total<T>>(0.0) {}

  static EHRSEQ_INLINE Interval interval(const Doubles& x) {
    constexpr double kSmall = -20;  // below, log(Λ) is x - e^x / 2 to the last digit
    const Doubles decay = exp_nonpositive<double>(x > 0.0 ? -x : x);
    const Doubles integral = (x > 0.0 ? x : Doubles{}) + log1p_nonnegative(decay);
    const Doubles slope = (x > 0.0 ? broadcast(1.0) : decay) / (1.0 + decay);
    return {integral, x < kSmall ? x - decay * 0.5 : log_nonnegative(integral), slope,
            x < kSmall ? 1.0 - decay * 0.5 : slope / integral};
  }
};

// Λ = e^x
template <typename T, template <typename> class Total = Sum>
class Exp {
 public:
  EHRSEQ_INLINE int64_t flush_interval() const { return std::numeric_limits<int64_t>::max(); }

  // `scale` is one number or one of each lane, as in likelihood.h.
  template <typename Scale>
  EHRSEQ_INLINE Lanes<T> survived(const Lanes<T>& x, const Scale& scale) {
    const Lanes<T> integral = power<T>(x);
    total_.add(widen(integral));
    return with_sign(scale * integral);
  }

  template <typename Scale>
  EHRSEQ_INLINE Lanes<T> survived_where(const Mask<T>& counts, const Lanes<T>& values,
                                        const Scale& scale) {
    const Lanes<T> integral = only_where<T>(counts, power<T>(counts ? values : Lanes<T>{}));
    total_.add(widen(integral));
    return only_where<T>(counts, with_sign(scale * integral));
  }

  EHRSEQ_INLINE void weigh(const Lanes<T>& weights) { total_.weigh(weights); }
  EHRSEQ_INLINE void flush() {}
  EHRSEQ_INLINE Unfinished unfinished() const { return total_.unfinished(); }

  static EHRSEQ_INLINE Doubles finish(const Doubles& /*argument*/, const Doubles& rest) {
    return rest;
  }

  static EHRSEQ_INLINE Interval interval(const Doubles& x) {
    const Doubles integral = power<double>(x);
    return {integral, x, integral, broadcast(1.0)};
  }

 private:
  // By its root, so that it becomes infinite, or 0, as it should.
  template <typename U>
  static EHRSEQ_INLINE Lanes<U> power(const Lanes<U>& x) {
    constexpr U kInfinite = sizeof(U) == 4 ? 100 : 720;
    const Lanes<U> root = exp_nonpositive<U>((x > kInfinite ? broadcast(kInfinite) : x) * U(0.5));
    return root * root;
  }

  static EHRSEQ_INLINE Lanes<T> with_sign(const Lanes<T>& slope) {
    return slope == T(0) ? broadcast(T(-0.0)) : slope;
  }

  Total<T> total_;
};

// No weights of visits: the scale of a slope is the patient's.
template <typename T>
class NoWeights {
 public:
  static constexpr bool kAreGiven = false;

  explicit NoWeights(const Settings& /*settings*/) {}

  void select(int64_t /*patient*/, const Outcome& /*outcome*/) {}
  template <typename Rate>
  EHRSEQ_INLINE T weigh(Rate& /*rate*/, int64_t /*at*/, T scale) {
    return scale;
  }
  template <typename Rate>
  EHRSEQ_INLINE T weigh_where(Rate& /*rate*/, const Mask<T>& /*counts*/, int64_t /*at*/, T scale) {
    return scale;
  }
};

// Weights of visits, of one patient after another.
template <typename T>
class VisitWeights {
 public:
  static constexpr bool kAreGiven = true;

  explicit VisitWeights(const Settings& settings)
      : settings_(settings), all_(static_cast<const T*>(settings.weights)) {
    if (settings.row_starts != nullptr) scratch_.resize(settings.slots);
  }

  // The patient whose intervals before the last one come next.
  void select(int64_t patient, const Outcome& outcome) {
    if (settings_.row_starts == nullptr) {
      row_ = all_ + number(patient, 0);
      return;
    }
    for (int64_t visit = outcome.entry; visit < outcome.time; ++visit) {
      scratch_[visit] = all_[number(patient, visit)];
    }
    row_ = scratch_.data();
  }

  // Gives the weights from `at` on to the rate's sum, and the scales of slopes with them.
  template <typename Rate>
  EHRSEQ_INLINE Lanes<T> weigh(Rate& rate, int64_t at, T scale) {
    return noted(rate, load(row_ + at)) * scale;
  }
  template <typename Rate>
  EHRSEQ_INLINE Lanes<T> weigh_where(Rate& rate, const Mask<T>& counts, int64_t at, T scale) {
    return noted(rate, only_where<T>(counts, load_within<T>(row_, at, settings_.slots))) * scale;
  }

  double of(int64_t patient, int64_t visit) {
    const T weight = all_[number(patient, visit)];
    one_is_negative_ |= weight < T(0);
    return static_cast<double>(weight);
  }

  bool any_negative() const { return one_is_negative_ || !all_set<T>(~negative_); }

 private:
  int64_t number(int64_t patient, int64_t visit) const {
    return settings_.row_starts == nullptr ? patient * settings_.slots + visit
                                           : settings_.row_starts[visit] + patient;
  }

  template <typename Rate>
  EHRSEQ_INLINE Lanes<T> noted(Rate& rate, const Lanes<T>& weights) {
    negative_ |= weights < T(0);
    rate.weigh(weights);
    return weights;
  }

  const Settings& settings_;
  const T* all_;
  const T* row_ = nullptr;
  std::vector<T> scratch_;
  Mask<T> negative_{};
  bool one_is_negative_ = false;
};

template <typename scalar_t>
accumulator_t<scalar_t> grad_scale(const Outcome& outcome, const Settings& settings) {
  return signed_zero(static_cast<accumulator_t<scalar_t>>(outcome.weight * settings.share));
}

template <typename scalar_t>
EHRSEQ_INLINE void prefetch(const Settings& settings, const Rows<scalar_t>& rows, int64_t patient) {
  if (patient >= rows.patients) return;
  const Outcome& outcome = rows.outcomes[patient];
  const scalar_t* row = rows.values + patient * settings.slots;
  const scalar_t* end = row + outcome.time + 1;
  for (row += outcome.entry; row < end; row += 64 / sizeof(scalar_t)) __builtin_prefetch(row);
}

// The intervals from `entry` to `time` of a row, unfinished.
template <typename Rate, typename T, typename scalar_t, typename grad_t, typename Weights>
EHRSEQ_INLINE Unfinished nll_before(const scalar_t* row, grad_t* grad, int64_t row_length,
                                    int64_t entry, int64_t time, T scale, Weights& weights) {
  Rate rate;
  int64_t at = entry;
  int64_t until_flush = rate.flush_interval();
  while (at + kLanes<T> <= time) {
    if (until_flush == 0) {
      rate.flush();
      until_flush = rate.flush_interval();
    }
    const int64_t blocks = std::min(until_flush, (time - at) / kLanes<T>);
    for (int64_t i = 0; i < blocks; ++i, at += kLanes<T>) {
      const auto scales = weights.weigh(rate, at, scale);
      const Lanes<T> slopes = rate.survived(load(row + at), scales);
      if (grad) store(grad + at, slopes);
    }
    until_flush -= blocks;
  }
  if (at < time) {
    if (until_flush == 0) rate.flush();
    const Mask<T> counts = lane_numbers<T>() < static_cast<bits_t<T>>(time - at);
    const auto scales = weights.weigh_where(rate, counts, at, scale);
    const Lanes<T> slopes =
        rate.survived_where(counts, load_within<T>(row, at, row_length), scales);
    if (grad) store_within<T>(grad, at, row_length, slopes);
  }
  return rate.unfinished();
}

// What T cannot hold is infinite, so that 0 times it is NaN.
template <typename T>
EHRSEQ_INLINE Doubles as_held_by(const Doubles& positive) {
  constexpr double kLargest = std::numeric_limits<T>::max();
  return positive > kLargest ? broadcast(HUGE_VAL) : positive;
}

// f Λ - δ log Λ of each patient's last interval, which is read where one of them counts. Both are
// weighed, as an infinite weight may make them infinities that cancel.
template <typename Rate, typename Weights, typename scalar_t>
EHRSEQ_INLINE void add_last_intervals(const Settings& settings, const Rows<scalar_t>& rows,
                                      Weights& weights, double* nll) {
  using T = accumulator_t<scalar_t>;
  constexpr int64_t kPatients = OutcomeReader::kAtOnce;
  static_assert(kPatients % kLanes<double> == 0);
  double x[kPatients] = {};
  double seen[kPatients] = {};
  double events[kPatients] = {};
  double of_visits[kPatients] = {};
  double slopes[kPatients];
  for (int64_t i = 0; i < rows.patients; ++i) {
    const Outcome& outcome = rows.outcomes[i];
    seen[i] = outcome.fraction;
    events[i] = static_cast<double>(outcome.type);
    if (!reads_last(outcome)) continue;
    x[i] = static_cast<double>(static_cast<T>(rows.values[i * settings.slots + outcome.time]));
    if constexpr (Weights::kAreGiven) of_visits[i] = weights.of(rows.first + i, outcome.time);
  }
  for (int64_t at = 0; at < rows.patients; at += kLanes<double>) {
    Interval last = Rate::interval(load(x + at));
    if constexpr (Weights::kAreGiven) {
      last.integral = as_held_by<T>(last.integral);
      last.slope = as_held_by<T>(last.slope);
    }
    const Doubles fraction = load(seen + at);
    const auto weighed = [&](const Doubles& value) __attribute__((always_inline)) {
      if constexpr (Weights::kAreGiven) {
        return value * load(of_visits + at);
      } else {
        return value;
      }
    };
    const Mask<double> partly = fraction != 0.0;
    const Mask<double> event = load(events + at) != 0.0;
    const Doubles terms = only_where<double>(partly, weighed(fraction * last.integral)) -
                          only_where<double>(event, weighed(last.log));
    store(slopes + at, only_where<double>(partly, weighed(fraction * last.slope)) -
                           only_where<double>(event, weighed(last.slope_of_log)));
    const int64_t count = std::min(kLanes<double>, rows.patients - at);
    for (int64_t i = 0; i < count; ++i) nll[at + i] += terms[i];
  }
  if (rows.grad == nullptr) return;
  for (int64_t i = 0; i < rows.patients; ++i) {
    const Outcome& outcome = rows.outcomes[i];
    if (!reads_last(outcome)) continue;
    const T scale = grad_scale<scalar_t>(outcome, settings);
    const T slope = Weights::kAreGiven ? static_cast<T>(slopes[i] * static_cast<double>(scale))
                                       : static_cast<T>(slopes[i]) * scale;
    rows.grad[i * settings.slots + outcome.time] =
        static_cast<saved_grad_t<scalar_t>>(slope == T(0) ? T(-0.0) : slope);
  }
}

template <typename Rate, typename Weights, typename scalar_t>
void rows_of_rate(const Settings& settings, const Rows<scalar_t>& rows, double* nll) {
  constexpr int64_t kRowsAhead = 8;
  Weights weights(settings);
  Group<OutcomeReader::kAtOnce> group;
  for (int64_t i = 0; i < kRowsAhead; ++i) prefetch(settings, rows, i);
  for (int64_t i = 0; i < rows.patients; ++i) {
    prefetch(settings, rows, i + kRowsAhead);
    const Outcome& outcome = rows.outcomes[i];
    const int64_t offset = i * settings.slots;
    weights.select(rows.first + i, outcome);
    group.set(i, nll_before<Rate>(rows.values + offset, rows.grad ? rows.grad + offset : nullptr,
                                  settings.slots, outcome.entry, outcome.time,
                                  grad_scale<scalar_t>(outcome, settings), weights));
  }
  group.template finish<Rate>(rows.patients, nll);
  add_last_intervals<Rate>(settings, rows, weights, nll);
  if constexpr (Weights::kAreGiven) *rows.possible = !weights.any_negative();
}

template <typename scalar_t>
void rows_nll(const Settings& settings, const Rows<scalar_t>& rows, double* nll) {
  using T = accumulator_t<scalar_t>;
  const bool is_exp = settings.link == RateLink::kExp;
  if (settings.weights != nullptr) {
    return is_exp ? rows_of_rate<Exp<T, WeightedSum>, VisitWeights<T>>(settings, rows, nll)
                  : rows_of_rate<Softplus<T, WeightedSum>, VisitWeights<T>>(settings, rows, nll);
  }
  return is_exp ? rows_of_rate<Exp<T>, NoWeights<T>>(settings, rows, nll)
                : rows_of_rate<Softplus<T>, NoWeights<T>>(settings, rows, nll);
}

}  // namespace ehrseq::survival::piecewise::EHRSEQ_ISA
