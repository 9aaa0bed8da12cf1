// What the CPU kernels of fixed_horizon compute: the visits of one patient, next to one another.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "common/dtypes.h"
#include "common/survival/saved_grad.h"

namespace ehrseq::fixed_horizon {

using survival::saved_grad_t;

struct Settings {
  double horizon;
  double pos_weight;
  double share;  // what the sum of the terms is multiplied by
};

// The visits of one patient that count, where they are the first ones and those with label 1 the
// last of them: visits 0..end, of which those from `first` on have the label 1.
struct Range {
  int64_t end;
  int64_t first;
};

// What is known of one patient's visits.
struct Visits {
  int64_t count;
  const double* times;    // [count]
  const double* weights;  // null: ones
  double event_time;
  bool seen;  // the event; else the censoring
  double weight;
};

// As in fixed_horizon/reference.py, of a visit at the time `now`.
struct Outcome {
  Outcome(const Settings& settings, double event_time, bool seen)
      : horizon(settings.horizon),
        time(event_time),
        // a censored patient has to be observed to the end of the horizon
        observed(seen ? std::numeric_limits<double>::infinity() : event_time),
        event(seen ? event_time : std::numeric_limits<double>::quiet_NaN()) {}

  bool counts(double now) const { return now < time && now + horizon <= observed; }
  bool within(double now) const { return now + horizon >= event; }

  // About the time from which on visits do not count, and that from which on they have the event
  // within the horizon: a NaN where none has.
  double last() const { return std::min(time, observed - horizon); }
  double first_within() const { return event - horizon; }

  double horizon;
  double time;
  double observed;
  double event;
};

inline constexpr Range kNoRange{-1, 0};

// The range of ascending times, found from a guess, which ties and rounding may put off.
// `time_of(visit)` is the time of one of the `visits`.
template <typename TimeOf>
Range range_near(const Range& guess, const Outcome& outcome, int64_t visits,
                 const TimeOf& time_of) {
  const auto first_not = [&](int64_t at, int64_t end, const auto& holds) {
    at = std::min(at, end);
    while (at < end && holds(static_cast<double>(time_of(at)))) ++at;
    while (at > 0 && !holds(static_cast<double>(time_of(at - 1)))) --at;
    return at;
  };
  const int64_t end = first_not(guess.end, visits, [&](double now) { return outcome.counts(now); });
  if (std::isnan(outcome.event)) return {end, end};
  return {end, first_not(guess.first, end, [&](double now) { return !outcome.within(now); })};
}

// The range of the patient's visits that count, at these times; kNoRange unless these are numbers
// in ascending order. Of float, double, int32_t and int64_t.
template <typename stored_t>
Range range_of_times(const Outcome& outcome, const stored_t* times, int64_t visits);

// Where a row of `slots` begins; visits come first, the slots after them are set to 0. The rows of
// a group follow one another.
template <typename scalar_t>
struct Row {
  const scalar_t* logits;
  saved_grad_t<scalar_t>* grad;    // null where no gradient is needed
  accumulator_t<scalar_t>* terms;  // null where they are summed
  int64_t slots;

  Row after(int64_t rows) const {
    const int64_t at = rows * slots;
    return {logits + at, grad ? grad + at : nullptr, terms ? terms + at : nullptr, slots};
  }
};

// Patients whose visits that count are ranges.
struct Ranges {
  const Range* of_patients;
  const double* weights;
  int64_t patients;  // at most survival::kGroupPatients
};

// The sum of the weights of the visits that count. *possible becomes false where a time is NaN or
// a weight negative.
double weight_of_visits(const Settings& settings, const Visits& visits, bool* possible);

// The sum of the visits' weighted terms; the gradient of `share` times that.
template <typename scalar_t>
double loss_of_visits(const Settings& settings, const Visits& visits, const Row<scalar_t>& row,
                      bool* possible);
// Those of each patient, from the row of the first one on.
template <typename scalar_t>
void losses_of_ranges(const Settings& settings, const Ranges& ranges, const Row<scalar_t>& first,
                      double* losses);

}  // namespace ehrseq::fixed_horizon
