// The kernels' side of the operators: some patients, next to one another in memory.
#pragma once

#include <cstdint>
#include <type_traits>

#include "common/dtypes.h"
#include "survival_nll/outcomes.h"

namespace ehrseq::survival {

enum class Link : int64_t { kProbabilities = 0, kSigmoid = 1, kSoftmax = 2 };
enum class Reduction : int64_t { kNone = 0, kMean = 1, kSum = 2 };

struct Settings {
  int64_t patients;
  int64_t slots;
  int64_t classes;  // a visit's values: causes, and one more for softmax
  Link link;
  bool censored_included;
  double eps;
  Reduction reduction;
  double share;  // of one patient in the result: 1 / patients for the mean, else 1
};

// A float16 gradient that is still to be multiplied by a loss scale would lose its small values.
template <typename scalar_t>
using saved_grad_t = std::conditional_t<std::is_same_v<scalar_t, Half>, float, scalar_t>;

template <typename scalar_t>
struct Rows {
  const scalar_t* hazards;
  saved_grad_t<scalar_t>* grad;  // zeros; null where no gradient is needed
  const Outcome* outcomes;
  int64_t patients;  // at most Outcomes::kAtOnce
};

// Each patient's loss, unweighted, and the gradient of the weighted one.
void rows_nll(const Settings& settings, const Rows<float>& rows, double* nll);
void rows_nll(const Settings& settings, const Rows<double>& rows, double* nll);
void rows_nll(const Settings& settings, const Rows<BFloat16>& rows, double* nll);
void rows_nll(const Settings& settings, const Rows<Half>& rows, double* nll);

// How many of `slots` bytes are visits, for each of `rows` rows; kMalformed as in VisitMask.
void count_in_bytes(const uint8_t* mask, int64_t row_stride, int64_t slots, int64_t rows,
                    int64_t* visits);

}  // namespace ehrseq::survival
