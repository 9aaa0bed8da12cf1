// The intervals before the last one, of which a patient survived the whole, are a row's; the last
// intervals, of which a fraction was seen, are computed for several patients at a time.
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

// Λ = log(1 + e^x): the loss of a trial that was survived.
template <typename T>
class Softplus : public FromLogits<T> {
 public:
  Softplus() : FromLogits<T>(0.0) {}

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
template <typename T>
class Exp {
 public:
  EHRSEQ_INLINE int64_t flush_interval() const { return std::numeric_limits<int64_t>::max(); }

  EHRSEQ_INLINE Lanes<T> survived(const Lanes<T>& x, T scale) {
    const Lanes<T> integral = power<T>(x);
    add(integral);
    return with_sign(scale * integral);
  }

  EHRSEQ_INLINE Lanes<T> survived_where(const Mask<T>& counts, const Lanes<T>& values, T scale) {
    const Lanes<T> integral = only_where<T>(counts, power<T>(counts ? values : Lanes<T>{}));
    add(integral);
    return only_where<T>(counts, with_sign(scale * integral));
  }

  EHRSEQ_INLINE void flush() {}

  EHRSEQ_INLINE Unfinished unfinished() const {
    double sum = 0;
    for (const Doubles& part : sum_.part) sum += sum_of_lanes<double>(part);
    return {0, sum};
  }

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

  EHRSEQ_INLINE void add(const Lanes<T>& integral) {
    const Wide<T> wide = widen(integral);
    for (int i = 0; i < Wide<T>::kParts; ++i) sum_.part[i] += wide.part[i];
  }

  Wide<T> sum_{};
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
template <typename Rate, typename T, typename scalar_t, typename grad_t>
EHRSEQ_INLINE Unfinished nll_before(const scalar_t* row, grad_t* grad, int64_t row_length,
                                    int64_t entry, int64_t time, T scale) {
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
      const Lanes<T> slopes = rate.survived(load(row + at), scale);
      if (grad) store(grad + at, slopes);
    }
    until_flush -= blocks;
  }
  if (at < time) {
    if (until_flush == 0) rate.flush();
    const Mask<T> counts = lane_numbers<T>() < static_cast<bits_t<T>>(time - at);
    const Lanes<T> slopes = rate.survived_where(counts, load_within<T>(row, at, row_length), scale);
    if (grad) store_within<T>(grad, at, row_length, slopes);
  }
  return rate.unfinished();
}

// f Λ - δ log Λ of each patient's last interval, which is read where one of them counts.
template <typename Rate, typename scalar_t>
EHRSEQ_INLINE void add_last_intervals(const Settings& settings, const Rows<scalar_t>& rows,
                                      double* nll) {
  using T = accumulator_t<scalar_t>;
  constexpr int64_t kPatients = OutcomeReader::kAtOnce;
  static_assert(kPatients % kLanes<double> == 0);
  double x[kPatients] = {};
  double seen[kPatients] = {};
  double events[kPatients] = {};
  double slopes[kPatients];
  const auto is_read = [](const Outcome& outcome) {
    return outcome.type != 0 || outcome.fraction != 0;
  };
  for (int64_t i = 0; i < rows.patients; ++i) {
    const Outcome& outcome = rows.outcomes[i];
    seen[i] = outcome.fraction;
    events[i] = static_cast<double>(outcome.type);
    if (is_read(outcome)) {
      x[i] = static_cast<double>(static_cast<T>(rows.values[i * settings.slots + outcome.time]));
    }
  }
  for (int64_t at = 0; at < rows.patients; at += kLanes<double>) {
    const Interval last = Rate::interval(load(x + at));
    const Doubles fraction = load(seen + at);
    const Mask<double> partly = fraction != 0.0;
    const Mask<double> event = load(events + at) != 0.0;
    const Doubles terms =
        only_where<double>(partly, fraction * last.integral) - only_where<double>(event, last.log);
    store(slopes + at, only_where<double>(partly, fraction * last.slope) -
                           only_where<double>(event, last.slope_of_log));
    const int64_t count = std::min(kLanes<double>, rows.patients - at);
    for (int64_t i = 0; i < count; ++i) nll[at + i] += terms[i];
  }
  if (rows.grad == nullptr) return;
  for (int64_t i = 0; i < rows.patients; ++i) {
    const Outcome& outcome = rows.outcomes[i];
    if (!is_read(outcome)) continue;
    const T slope = static_cast<T>(slopes[i]) * grad_scale<scalar_t>(outcome, settings);
    rows.grad[i * settings.slots + outcome.time] =
        static_cast<saved_grad_t<scalar_t>>(slope == T(0) ? T(-0.0) : slope);
  }
}

template <typename Rate, typename scalar_t>
void rows_of_rate(const Settings& settings, const Rows<scalar_t>& rows, double* nll) {
  constexpr int64_t kRowsAhead = 8;
  Group<OutcomeReader::kAtOnce> group;
  for (int64_t i = 0; i < kRowsAhead; ++i) prefetch(settings, rows, i);
  for (int64_t i = 0; i < rows.patients; ++i) {
    prefetch(settings, rows, i + kRowsAhead);
    const int64_t offset = i * settings.slots;
    group.set(i, nll_before<Rate>(rows.values + offset, rows.grad ? rows.grad + offset : nullptr,
                                  settings.slots, rows.outcomes[i].entry, rows.outcomes[i].time,
                                  grad_scale<scalar_t>(rows.outcomes[i], settings)));
  }
  group.template finish<Rate>(rows.patients, nll);
  add_last_intervals<Rate>(settings, rows, nll);
}

template <typename scalar_t>
void rows_nll(const Settings& settings, const Rows<scalar_t>& rows, double* nll) {
  using T = accumulator_t<scalar_t>;
  if (settings.link == RateLink::kExp) return rows_of_rate<Exp<T>>(settings, rows, nll);
  rows_of_rate<Softplus<T>>(settings, rows, nll);
}

}  // namespace ehrseq::survival::piecewise::EHRSEQ_ISA
