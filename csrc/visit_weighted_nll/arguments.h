// What visit_weighted_nll takes, on any device.
#pragma once

#include <cstdint>

#include "common/survival/arguments.h"
#include "survival_nll/arguments.h"

namespace ehrseq::survival {

constexpr const char* kVisitWeightedNll = "visit_weighted_nll";

inline LogitsShape expect_visit_weighted(
    bool competing, const Tensor& hazards, const Tensor& event_times, const Tensor& event_types,
    const OptionalTensor& sequence_mask, const OptionalTensor& row_starts,
    const OptionalTensor& unsorted_indices, const OptionalTensor& last_rows,
    const OptionalTensor& entry_times, const OptionalTensor& sample_weight,
    const Tensor& visit_weight, int64_t link, double eps, int64_t reduction) {
  constexpr const char* kName = kVisitWeightedNll;
  const LogitsShape shape =
      expect_logits(kName, competing, hazards, event_times, event_types, sequence_mask, row_starts,
                    unsorted_indices, last_rows, entry_times, sample_weight, "hazards");
  expect_options(kName, competing, link, eps, reduction);
  causes_of(kName, shape.classes, link);
  expect_visit_weight(kName, visit_weight, hazards, shape.packed);
  return shape;
}

}  // namespace ehrseq::survival
