// What piecewise_hazard_nll takes, on any device.
#pragma once

#include <cstdint>

#include "common/options.h"
#include "common/survival/arguments.h"

namespace ehrseq::survival::piecewise {

constexpr const char* kName = "piecewise_hazard_nll";

enum class RateLink : int64_t { kSoftplus = 0, kExp = 1 };

inline LogitsShape expect_rates(const Tensor& logits, const Tensor& event_times,
                                const Tensor& event_indicators, const OptionalTensor& sequence_mask,
                                const OptionalTensor& row_starts,
                                const OptionalTensor& unsorted_indices,
                                const OptionalTensor& last_rows, const OptionalTensor& entry_times,
                                const OptionalTensor& sample_weight, const OptionalTensor& fraction,
                                const OptionalTensor& visit_weight, int64_t link,
                                int64_t reduction) {
  const LogitsShape shape =
      expect_logits(kName, false, logits, event_times, event_indicators, sequence_mask, row_starts,
                    unsorted_indices, last_rows, entry_times, sample_weight);
  expect_option(link, kName, "link", 0, static_cast<int64_t>(RateLink::kExp));
  expect_option(reduction, kName, "reduction", 0, static_cast<int64_t>(Reduction::kSum));
  if (fraction.has_value()) {
    expect_shape(*fraction, kName, "fraction", {shape.patients}, "[B]");
    expect_floating(*fraction, kName, "fraction");
  }
  if (visit_weight.has_value()) expect_visit_weight(kName, *visit_weight, logits, shape.packed);
  return shape;
}

}  // namespace ehrseq::survival::piecewise
