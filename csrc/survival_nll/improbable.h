// What is said of hazards that are no probabilities: the first patient at fault, and how many there
// are. ehrseq_fast/survival_nll/checks.py refuses the same in the same words.
#pragma once

#include <cstdint>
#include <cstdio>
#include <stdexcept>
#include <string>

#include "common/survival/outcomes.h"
#include "survival_nll/rows.h"

namespace ehrseq::survival {

// Throws std::invalid_argument, unless all hazards that the loss reads are in [0, 1] or NaN.
// `visit_of(patient, visit)` points to the values of a visit. The outcomes have been checked.
template <typename VisitOf>
void refuse_improbable(const LossSettings& settings, const OutcomeReader& outcomes,
                       const VisitOf& visit_of) {
  int64_t patients = 0;
  std::string first;
  for (int64_t patient = 0; patient < settings.patients; ++patient) {
    Outcome outcome;
    outcomes.read(patient, patient + 1, &outcome);
    bool at_fault = false;
    for (int64_t visit = outcome.entry; visit <= outcome.time && !at_fault; ++visit) {
      const bool survived = visit < outcome.time || settings.censored_included;
      const auto* values = visit_of(patient, visit);
      for (int64_t cause = 1; cause <= settings.classes && !at_fault; ++cause) {
        const auto value = static_cast<double>(values[cause - 1]);
        const bool is_read = survived || cause == outcome.type;
        at_fault = is_read && (value < 0 || value > 1);
        if (!at_fault || patients > 0) continue;
        char text[32];
        std::snprintf(text, sizeof text, "%g", value);
        first = "patient " + std::to_string(patient) + " has " + text + " at visit " +
                std::to_string(visit);
      }
    }
    patients += at_fault;
  }
  if (patients == 0) return;
  throw std::invalid_argument("hazards must be in [0, 1] with from_logits=False: " + first +
                              " (patients at fault: " + std::to_string(patients) + ")");
}

}  // namespace ehrseq::survival
