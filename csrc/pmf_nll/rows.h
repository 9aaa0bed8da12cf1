// What the CPU kernels of the losses of a probability mass over time compute: some patients that
// are next to one another in memory.
#pragma once

#include <cstdint>

#include "common/dtypes.h"
#include "common/options.h"
#include "common/survival/outcomes.h"
#include "common/survival/saved_grad.h"

namespace ehrseq::survival::pmf {

struct Settings {
  int64_t patients;
  int64_t slots;
  int64_t classes;  // a visit's values: causes
  bool censored_included;
  Reduction reduction;
  double share;  // of one patient in the result: 1 / patients for the mean, else 1
};

template <typename scalar_t>
struct Rows {
  const scalar_t* logits;
  saved_grad_t<scalar_t>* grad;  // zeros; null where no gradient is needed
  const Outcome* outcomes;
  int64_t patients;  // at most OutcomeReader::kAtOnce
};

// Each patient's loss, unweighted, and the gradient of the weighted one.
void rows_nll(const Settings& settings, const Rows<float>& rows, double* nll);
void rows_nll(const Settings& settings, const Rows<double>& rows, double* nll);
void rows_nll(const Settings& settings, const Rows<BFloat16>& rows, double* nll);
void rows_nll(const Settings& settings, const Rows<Half>& rows, double* nll);

}  // namespace ehrseq::survival::pmf
