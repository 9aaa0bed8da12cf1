// What the losses of a horizon accept, on the CPU and on a GPU.
#pragma once

#include <cstdint>
#include <limits>
#include <utility>
#include <vector>

#include "common/options.h"
#include "common/survival/arguments.h"

namespace ehrseq::fixed_horizon {

using namespace ehrseq::survival;  // NOLINT: what all losses accept

// Whether the visits are packed.
inline bool expect_arguments(const Tensor& logits, const Tensor& event_times,
                             const Tensor& event_indicators, const OptionalTensor& sequence_mask,
                             const OptionalTensor& row_starts,
                             const OptionalTensor& unsorted_indices,
                             const OptionalTensor& last_rows, const OptionalTensor& visit_times,
                             const OptionalTensor& visit_weight,
                             const OptionalTensor& sample_weight, double horizon, double pos_weight,
                             int64_t reduction) {
  constexpr const char* kName = "fixed_horizon_bce";
  const bool packed = expect_layout(kName, sequence_mask, row_starts, unsorted_indices, last_rows);
  expect_dim(logits, kName, "logits", packed ? 1 : 2, packed ? "[n_visits]" : "[B, V]");
  expect_floating(logits, kName, "logits");
  expect_option(reduction, kName, "reduction", 0, static_cast<int64_t>(Reduction::kSum));
  if (!(horizon > 0)) refuse(kName, "horizon", "a number above 0", short_text(horizon));
  if (!(pos_weight >= 0 && pos_weight <= std::numeric_limits<double>::max())) {
    refuse(kName, "pos_weight", "a finite weight from 0", short_text(pos_weight));
  }
  const std::vector<int64_t> of_visits = shape_of(logits);
  const char* names = packed ? "[n_visits]" : "[B, V]";
  const int64_t patients = packed ? unsorted_indices->size(0) : logits.size(0);
  expect_shape(event_times, kName, "event_times", {patients}, "[B]");
  expect_real(event_times, kName, "event_times");
  expect_shape(event_indicators, kName, "event_indicators", {patients}, "[B]");
  expect_real(event_indicators, kName, "event_indicators");
  if (visit_times.has_value()) {
    expect_shape(*visit_times, kName, "visit_times", of_visits, names);
    expect_real(*visit_times, kName, "visit_times");
  }
  expect_weights(kName, of_visits, names, patients, visit_weight, sample_weight);
  if (!packed) expect_sequence_mask(kName, sequence_mask, patients, logits.size(1));
  return packed;
}

inline void expect_given_labels(const Tensor& logits, const Tensor& labels, const Tensor& weights) {
  constexpr const char* kName = "masked_bce";
  expect_dim(logits, kName, "logits", 2, "[B, V]");
  expect_floating(logits, kName, "logits");
  for (const auto& [name, tensor] : {std::pair{"labels", labels}, std::pair{"weights", weights}}) {
    expect_shape(tensor, kName, name, shape_of(logits), "the shape of logits");
    expect_real(tensor, kName, name);
  }
}

}  // namespace ehrseq::fixed_horizon
