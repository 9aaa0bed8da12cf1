// What the losses over time refuse of weights of visits.
#pragma once

#include <cstdint>

#include "common/survival/faults.h"
#include "common/survival/outcomes.h"

namespace ehrseq::survival {

// Throws std::invalid_argument, unless no visit that the loss reads has a negative weight.
// `weight_of(patient, visit)` is that of a visit, `reads_last(outcome)` tells whether the visit of
// the outcome is read. The outcomes have been checked.
template <typename WeightOf, typename ReadsLast>
void refuse_negative(int64_t patients, const OutcomeReader& outcomes, const WeightOf& weight_of,
                     const ReadsLast& reads_last) {
  Faults negative;
  double first = 0;
  for (int64_t patient = 0; patient < patients; ++patient) {
    Outcome outcome;
    outcomes.read(patient, patient + 1, &outcome);
    const int64_t end = outcome.time + (reads_last(outcome) ? 1 : 0);
    for (int64_t visit = outcome.entry; visit < end; ++visit) {
      const auto weight = static_cast<double>(weight_of(patient, visit));
      if (!(weight < 0)) continue;
      if (negative.count() == 0) first = weight;
      negative.add(patient, visit);
    }
  }
  if (negative.count() > 0) negative.refuse("visit_weight must not be negative", short_text(first));
}

}  // namespace ehrseq::survival
