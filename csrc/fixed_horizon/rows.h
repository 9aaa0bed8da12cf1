// What the CPU kernels of fixed_horizon compute: the visits of one patient, next to one another.
#pragma once

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

// What is known of one patient's visits. Labels are made of the times, or given: then in [0, 1],
// and read where the weight is not 0.
struct Visits {
  int64_t count;
  const double* labels;   // null where they are made
  const double* times;    // [count] where labels are made
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

  double horizon;
  double time;
  double observed;
  double event;
};

inline constexpr Range kNoRange{-1, 0};

// The range of the patient's visits that count, at these times; kNoRange unless these are numbers
// in ascending order. Of float, double, int32_t and int64_t.
template <typename stored_t>
Range range_of_times(const Outcome& outcome, const stored_t* times, int64_t visits);

// Where a row of `slots` begins; visits come first, the slots after them are set to 0.
template <typename scalar_t>
struct Row {
  const scalar_t* logits;
  saved_grad_t<scalar_t>* grad;    // null where no gradient is needed
  accumulator_t<scalar_t>* terms;  // null where they are summed
  int64_t slots;
};

// The sum of the weights of the visits that count. *possible becomes false where a time is NaN, a
// weight negative, or a given label outside [0, 1].
double weight_of_visits(const Settings& settings, const Visits& visits, bool* possible);

// The sum of the visits' weighted terms; the gradient of `share` times that.
template <typename scalar_t>
double loss_of_visits(const Settings& settings, const Visits& visits, const Row<scalar_t>& row,
                      bool* possible);
template <typename scalar_t>
double loss_of_range(const Settings& settings, const Range& range, double weight,
                     const Row<scalar_t>& row);

}  // namespace ehrseq::fixed_horizon
