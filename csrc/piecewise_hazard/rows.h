// What the CPU kernels of the loss of piecewise-constant rates compute: some patients that are next
// to one another in memory.
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/dtypes.h"
#include "common/options.h"
#include "common/survival/outcomes.h"
#include "common/survival/rows.h"
#include "piecewise_hazard/arguments.h"

namespace ehrseq::survival::piecewise {

struct Settings {
  int64_t patients;
  int64_t slots;
  int64_t classes;  // a visit's values: 1
  RateLink link;
  Reduction reduction;
  double share;  // of one patient in the result: 1 / patients for the mean, else 1
  // Of visits, in the dtype of the loss; null where none are given. Visit t of patient p has number
  // p * slots + t, or, of a packed batch, where p is a rank, row_starts[t] + p.
  const void* weights = nullptr;
  const int64_t* row_starts = nullptr;
};

// Whether the logit of the last interval, and its weight, have a part in the loss.
inline bool reads_last(const Outcome& outcome) {
  return outcome.type != 0 || outcome.fraction != 0;
}

// What is after the last event time of these patients changes nothing.
inline int64_t slots_read(const Settings& /*settings*/, const Outcome* outcomes, int64_t count) {
  int64_t slots = 0;
  for (int64_t i = 0; i < count; ++i) slots = std::max(slots, outcomes[i].time + 1);
  return slots;
}

// Each patient's loss, without the weight of the patient, and the gradient of that with it. A visit
// that is read and has a negative weight is refused.
void rows_nll(const Settings& settings, const Rows<float>& rows, double* nll);
void rows_nll(const Settings& settings, const Rows<double>& rows, double* nll);
void rows_nll(const Settings& settings, const Rows<BFloat16>& rows, double* nll);
void rows_nll(const Settings& settings, const Rows<Half>& rows, double* nll);

}  // namespace ehrseq::survival::piecewise
