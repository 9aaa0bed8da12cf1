// What the CPU kernels of the losses of a probability mass over time compute: some patients that
// are next to one another in memory.
#pragma once

#include <cstdint>

#include "common/dtypes.h"
#include "common/options.h"
#include "common/survival/outcomes.h"
#include "common/survival/rows.h"

namespace ehrseq::survival::pmf {

struct Settings {
  int64_t patients;
  int64_t slots;
  int64_t classes;  // a visit's values: causes
  bool censored_included;
  Reduction reduction;
  double share;  // of one patient in the result: 1 / patients for the mean, else 1
};

// All of a patient's visits are classes.
inline int64_t slots_read(const Settings& /*settings*/, const Outcome* outcomes,
                          int64_t /*count*/) {
  return outcomes[0].visits;  // the first ranks have the most
}

// Each patient's loss, unweighted, and the gradient of the weighted one.
void rows_nll(const Settings& settings, const Rows<float>& rows, double* nll);
void rows_nll(const Settings& settings, const Rows<double>& rows, double* nll);
void rows_nll(const Settings& settings, const Rows<BFloat16>& rows, double* nll);
void rows_nll(const Settings& settings, const Rows<Half>& rows, double* nll);

}  // namespace ehrseq::survival::pmf
