// What the CPU kernel of visit_cross_entropy computes: some rows of logits that are next to one
// another.
#pragma once

#include <cstdint>

#include "common/dtypes.h"
#include "common/survival/saved_grad.h"

namespace ehrseq::visit_cross_entropy {

using survival::saved_grad_t;

struct Settings {
  int64_t classes;
  double smoothing;
  double share;           // what the sum of the terms is multiplied by
  const double* weights;  // [K] of the classes; null where none are given
  double sum_of_weights;  // of all classes

  double weight_of(int64_t label) const { return weights ? weights[label] : 1.0; }
};

template <typename scalar_t>
struct Rows {
  const scalar_t* logits;           // [count, K]
  saved_grad_t<scalar_t>* grad;     // [count, K]; null where no gradient is needed
  const int64_t* labels;            // [count], -1 for a row that is left out
  const double* weights;            // [count] of the rows, without those of the classes
  int64_t count;                    // at most survival::kBlockRows
  accumulator_t<scalar_t>* memory;  // values_in_memory(K) of them
  const scalar_t* ahead;            // [count_ahead, K] of the rows that will be asked for next
  int64_t count_ahead;
};

inline int64_t values_in_memory(int64_t classes) {
  constexpr int64_t kMostLanes = 16;
  return 2 * kMostLanes * classes;
}

// The weighted term of each row, and the gradient of `share` times their sum.
void rows_loss(const Settings& settings, const Rows<float>& rows, double* losses);
void rows_loss(const Settings& settings, const Rows<double>& rows, double* losses);
void rows_loss(const Settings& settings, const Rows<BFloat16>& rows, double* losses);
void rows_loss(const Settings& settings, const Rows<Half>& rows, double* losses);

// Writes -1 in place of labels that are ignored. False where another one is no class.
bool mark_ignored(int64_t* labels, int64_t count, int64_t classes, int64_t ignore_index);

}  // namespace ehrseq::visit_cross_entropy
