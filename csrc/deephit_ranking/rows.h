// What the CPU kernels of DeepHit's ranking loss compute for some patients; see row_kernels.h.
#pragma once

#include <cstdint>
#include <vector>

#include "common/dtypes.h"
#include "common/survival/outcomes.h"
#include "common/survival/saved_grad.h"

namespace ehrseq::survival::ranking {

struct Settings {
  int64_t patients;
  int64_t slots;
  int64_t classes;  // a visit's values: causes
  bool censored_included;
  double sigma;

  // Whether e^(exponent - 1 / sigma) keeps its digits for all exponents, which are 0 to 1 / sigma:
  // then that is the largest of every visit.
  bool knows_largest() const { return sigma >= 1.0 / 30; }

  template <typename T>
  T largest() const {
    return static_cast<T>(1 / sigma);
  }

  // What a patient's cumulative sums are multiplied by to be exponents.
  template <typename T>
  T scale_of(double share) const {
    return static_cast<T>(share * (1 / sigma));
  }

  // A row of working memory, which is whole vectors.
  int64_t stride() const {
    constexpr int64_t kMostLanes = 16;
    return (slots * classes + kMostLanes - 1) / kMostLanes * kMostLanes;
  }
};

// The position of a patient's event in a row.
inline int64_t event_of(const Outcome& outcome, const Settings& settings) {
  return outcome.time * settings.classes + outcome.type - 1;
}

// At most OutcomeReader::kAtOnce patients.
template <typename scalar_t>
struct Rows {
  const scalar_t* logits[OutcomeReader::kAtOnce];  // of each patient's visits
  const Outcome* outcomes;
  int64_t patients;
  // Where sum_later keeps for write_gradients what that has to compute again where it is null: the
  // softmax of each one's visits at risk before it is multiplied by `shares`, and, where the
  // largest exponents are known, the patient's terms as a later one, in at most room_for_terms().
  accumulator_t<scalar_t>* mass[OutcomeReader::kAtOnce] = {};
  double* shares = nullptr;
  accumulator_t<scalar_t>* terms[OutcomeReader::kAtOnce] = {};
};

inline int64_t room_for_terms(const Outcome& outcome, const Settings& settings) {
  constexpr int64_t kMostLanes = 16;
  const int64_t values = (outcome.time + 1 - outcome.entry) * settings.classes;
  return (values / kMostLanes + 2) * kMostLanes;
}

// Of each visit and cause (`stride` values): Σ_j w_j exp(exponent of j) over the patients j at risk
// after it is sum · exp(largest).
template <typename T>
struct Later {
  T* largest;
  double* sum;
};

// What the gradient needs beside the rows.
template <typename T>
struct Slopes {
  const T* largest;    // of all patients
  const T* of_events;  // the derivative by the exponents of later patients is w exp(exponent -
                       // largest) times this
  const double* own;   // minus the derivative by the exponent at the patient's own event
};

#define EHRSEQ_RANKING_ROWS(scalar_t)                                                  \
  /* The sums of these patients alone, and each one's exponent at its own event.  */   \
  /* Known largest exponents are given.                                             */ \
  void sum_later(const Settings& settings, const Rows<scalar_t>& rows,                 \
                 const Later<accumulator_t<scalar_t>>& later, double* own,             \
                 std::vector<accumulator_t<scalar_t>>& memory);                        \
  /* grads[i] gets the gradient of patient i at the visits at risk. */                 \
  void write_gradients(const Settings& settings, const Rows<scalar_t>& rows,           \
                       const Slopes<accumulator_t<scalar_t>>& slopes,                  \
                       saved_grad_t<scalar_t>* const* grads,                           \
                       std::vector<accumulator_t<scalar_t>>& memory);

EHRSEQ_RANKING_ROWS(float)
EHRSEQ_RANKING_ROWS(double)
EHRSEQ_RANKING_ROWS(BFloat16)
EHRSEQ_RANKING_ROWS(Half)

#undef EHRSEQ_RANKING_ROWS

// e to the power of each.
void exponentiate(double* values, int64_t count);

// Sums of several groups of patients, one after another, into those of all, in their order.
void join_later(int64_t groups, int64_t stride, const Later<float>& of_groups,
                const Later<float>& all);
void join_later(int64_t groups, int64_t stride, const Later<double>& of_groups,
                const Later<double>& all);

}  // namespace ehrseq::survival::ranking
