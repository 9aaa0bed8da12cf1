// What the CPU kernels compute: some patients that are next to one another in memory.
#pragma once

#include <cstdint>
#include <type_traits>

#include "common/dtypes.h"
#include "common/options.h"
#include "survival_nll/outcomes.h"

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

// A float16 gradient that is still to be multiplied by a loss scale would lose its small values.
template <typename scalar_t>
using saved_grad_t = std::conditional_t<std::is_same_v<scalar_t, Half>, float, scalar_t>;

template <typename scalar_t>
struct Rows {
  const scalar_t* hazards;
  saved_grad_t<scalar_t>* grad;  // zeros; null where no gradient is needed
  const Outcome* outcomes;
  int64_t patients;  // at most OutcomeReader::kAtOnce
};

// Each patient's loss, unweighted, and the gradient of the weighted one.
void rows_nll(const LossSettings& settings, const Rows<float>& rows, double* nll);
void rows_nll(const LossSettings& settings, const Rows<double>& rows, double* nll);
void rows_nll(const LossSettings& settings, const Rows<BFloat16>& rows, double* nll);
void rows_nll(const LossSettings& settings, const Rows<Half>& rows, double* nll);

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
};

// As rows_nll, for any link but softmax.
void ranks_nll(const LossSettings& settings, const RankRows<float>& rows, double* nll);
void ranks_nll(const LossSettings& settings, const RankRows<double>& rows, double* nll);
void ranks_nll(const LossSettings& settings, const RankRows<BFloat16>& rows, double* nll);
void ranks_nll(const LossSettings& settings, const RankRows<Half>& rows, double* nll);

// A mask's values as integers of their width: a whole number is 1 or 0, a bool is
// 1 whatever its bits if it is not 0, and a float's 0 may have a sign.
template <typename Bits, Bits kOne_, bool kHasSign_ = false, bool kAnyIsOne_ = false>
struct MaskValues {
  using bits = Bits;
  static constexpr Bits kOne = kOne_;
  static constexpr bool kHasSign = kHasSign_;
  static constexpr bool kAnyIsOne = kAnyIsOne_;
};
using BoolMask = MaskValues<uint8_t, 1, false, true>;
using Int8Mask = MaskValues<uint8_t, 1>;
using Int16Mask = MaskValues<uint16_t, 1>;
using Int32Mask = MaskValues<uint32_t, 1>;
using Int64Mask = MaskValues<uint64_t, 1>;
using HalfMask = MaskValues<uint16_t, 0x3c00, true>;
using BFloat16Mask = MaskValues<uint16_t, 0x3f80, true>;
using FloatMask = MaskValues<uint32_t, 0x3f800000, true>;
using DoubleMask = MaskValues<uint64_t, 0x3ff0000000000000, true>;

// How many of `slots` values are visits, for each of `rows` rows; kMalformed as in VisitMask.
template <typename Values>
void count_visits(const void* mask, int64_t row_stride, int64_t slots, int64_t rows,
                  int64_t* visits);

}  // namespace ehrseq::survival
