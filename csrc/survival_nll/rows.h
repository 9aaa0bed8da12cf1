// What the CPU kernels compute: some patients that are next to one another in memory.
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/dtypes.h"
#include "common/options.h"
#include "common/survival/outcomes.h"
#include "common/survival/rows.h"
#include "common/survival/saved_grad.h"

namespace ehrseq::survival {

struct LossSettings {
  int64_t patients;
  int64_t slots;
  int64_t classes;  // a visit's values: causes, and one more for softmax
  Link link;
  bool censored_included;
  double eps;
  Reduction reduction;
  double share;  // of one patient in the result: 1 / patients for the mean, else 1
};

// Each patient's loss, unweighted, and the gradient of the weighted one.
void rows_nll(const LossSettings& settings, const Rows<float>& rows, double* nll);
void rows_nll(const LossSettings& settings, const Rows<double>& rows, double* nll);
void rows_nll(const LossSettings& settings, const Rows<BFloat16>& rows, double* nll);
void rows_nll(const LossSettings& settings, const Rows<Half>& rows, double* nll);

// What is after the last event time of these patients changes nothing.
inline int64_t slots_read(const LossSettings& /*settings*/, const Outcome* outcomes,
                          int64_t count) {
  int64_t slots = 0;
  for (int64_t i = 0; i < count; ++i) slots = std::max(slots, outcomes[i].time + 1);
  return slots;
}

// Patients of neighbouring ranks, in the layout of a packed batch.
template <typename scalar_t>
struct RankRows {
  const scalar_t* hazards;       // of the whole batch, `values` of them
  saved_grad_t<scalar_t>* grad;  // null where no gradient is needed; all of it is written
  int64_t values;
  const int64_t* row_starts;  // [most_visits + 1]
  int64_t most_visits;
  int64_t first;            // of the ranks
  const Outcome* outcomes;  // by rank, from `first` on
  int64_t patients;         // at most OutcomeReader::kAtOnce
  bool* possible;           // set to false where a value is refused
};

// As rows_nll, for any link but softmax.
void ranks_nll(const LossSettings& settings, const RankRows<float>& rows, double* nll);
void ranks_nll(const LossSettings& settings, const RankRows<double>& rows, double* nll);
void ranks_nll(const LossSettings& settings, const RankRows<BFloat16>& rows, double* nll);
void ranks_nll(const LossSettings& settings, const RankRows<Half>& rows, double* nll);

}  // namespace ehrseq::survival
