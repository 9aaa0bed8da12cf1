// What the CPU kernels of the survival losses with weights of visits compute: some patients that
// are next to one another in memory, in the layout of padded rows.
#pragma once

#include <cstdint>

#include "common/dtypes.h"
#include "common/survival/rows.h"
#include "survival_nll/rows.h"

namespace ehrseq::survival {

// The weights of a batch: of patient p at visit t number p * row_length + t, or, of a packed batch,
// of rank p number row_starts[t] + p.
template <typename scalar_t>
struct WeightedSettings : LossSettings {
  const accumulator_t<scalar_t>* weights;
  int64_t row_length;
  const int64_t* row_starts;  // null where rows are padded

  int64_t weight_at(int64_t patient, int64_t visit) const {
    return row_starts == nullptr ? patient * row_length + visit : row_starts[visit] + patient;
  }
};

// As those without weights. A visit that is read and has a negative one is refused.
void rows_nll(const WeightedSettings<float>& settings, const Rows<float>& rows, double* nll);
void rows_nll(const WeightedSettings<double>& settings, const Rows<double>& rows, double* nll);
void rows_nll(const WeightedSettings<BFloat16>& settings, const Rows<BFloat16>& rows, double* nll);
void rows_nll(const WeightedSettings<Half>& settings, const Rows<Half>& rows, double* nll);

}  // namespace ehrseq::survival
