// Some patients that are next to one another in memory, as kernels over rows take them.
#pragma once

#include <cstdint>

#include "common/survival/outcomes.h"
#include "common/survival/saved_grad.h"

namespace ehrseq::survival {

template <typename scalar_t>
struct Rows {
  const scalar_t* values;        // hazards or logits, a row for each patient
  saved_grad_t<scalar_t>* grad;  // zeros; null where no gradient is needed
  const Outcome* outcomes;
  int64_t patients;  // at most OutcomeReader::kAtOnce
  // Set to false by a kernel that finds a value which its loss refuses.
  bool* possible = nullptr;
  int64_t first = 0;  // the number of the first of these patients, as the layout counts them
};

}  // namespace ehrseq::survival
