// What the outcomes, masks and row numbers of the survival losses may be, on the CPU and on a GPU
// alike. Their values are checked by the CPU before it uses them (outcomes.cpp, rank_layout.h) and
// by a GPU's kernels where they would leave memory.
#pragma once

#include <cstdint>
#include <cstdio>
#include <limits>
#include <optional>
#include <string>
#include <vector>

#include "common/checks.h"

namespace ehrseq::survival {

using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Positions within a patient's row are 32 bits wide. `name` is what the operator calls its values.
inline void expect_row_length(const char* operation, int64_t slots, int64_t classes,
                              const char* name = "hazards") {
  if (slots > std::numeric_limits<int32_t>::max() / classes) {
    refuse(operation, name, "at most 2^31 - 1 values per patient",
           std::to_string(slots) + " visits of " + std::to_string(classes));
  }
}

inline void expect_real(const Tensor& tensor, const char* operation, const char* name) {
  expect_dtype(tensor, operation, name,
               {ScalarType::Bool, ScalarType::Byte, ScalarType::Char, ScalarType::Short,
                ScalarType::Int, ScalarType::Long, ScalarType::Float, ScalarType::Double,
                ScalarType::BFloat16, ScalarType::Half});
}

inline const char* name_of_types(bool competing) {
  return competing ? "event_types" : "event_indicators";
}

// One number per patient each.
inline void expect_outcomes(const char* operation, int64_t patients, bool competing,
                            const Tensor& event_times, const Tensor& event_types,
                            const OptionalTensor& entry_times,
                            const OptionalTensor& sample_weight) {
  const char* types_name = name_of_types(competing);
  expect_shape(event_times, operation, "event_times", {patients}, "[B]");
  expect_integer(event_times, operation, "event_times");
  expect_shape(event_types, operation, types_name, {patients}, "[B]");
  if (!competing) {
    expect_real(event_types, operation, types_name);
  } else if (event_types.scalar_type() != ScalarType::Bool) {
    expect_integer(event_types, operation, types_name);
  }
  if (entry_times.has_value()) {
    expect_shape(*entry_times, operation, "entry_times", {patients}, "[B]");
    expect_integer(*entry_times, operation, "entry_times");
  }
  if (sample_weight.has_value()) {
    expect_shape(*sample_weight, operation, "sample_weight", {patients}, "[B]");
    expect_real(*sample_weight, operation, "sample_weight");
  }
}

inline void expect_sequence_mask(const char* operation, const OptionalTensor& mask,
                                 int64_t patients, int64_t slots) {
  if (!mask.has_value()) return;
  expect_shape(*mask, operation, "sequence_mask", {patients, slots}, "[B, V]");
  expect_real(*mask, operation, "sequence_mask");
}

// The row numbers of a packed batch.
inline void expect_row_numbers(const char* operation, const Tensor& row_starts,
                               const Tensor& unsorted_indices, const Tensor& last_rows) {
  expect_dim(row_starts, operation, "row_starts", 1, "[V + 1]");
  expect_dtype(row_starts, operation, "row_starts", {ScalarType::Long});
  const int64_t starts = row_starts.size(0);
  if (starts < 1 || starts - 1 > std::numeric_limits<int32_t>::max()) {
    refuse(operation, "row_starts", "shape [V + 1] with 0 <= V < 2^31",
           as_text(shape_of(row_starts)));
  }
  expect_dim(unsorted_indices, operation, "unsorted_indices", 1, "[B]");
  expect_dtype(unsorted_indices, operation, "unsorted_indices", {ScalarType::Long});
  expect_shape(last_rows, operation, "last_rows", {unsorted_indices.size(0)}, "[B]");
  expect_dtype(last_rows, operation, "last_rows", {ScalarType::Long});
}

// Of logits over time: [B, V] with a mask, or the rows of a packed batch, [n_visits]; with
// competing risks there is one more dimension, of the causes.
struct LogitsShape {
  bool packed;
  int64_t patients;
  int64_t slots;    // the most visits that a patient can have
  int64_t classes;  // a visit's values
};

// Logits over time and all that comes with them. `name` is what the operator calls them.
inline LogitsShape expect_logits(const char* operation, bool competing, const Tensor& logits,
                                 const Tensor& event_times, const Tensor& event_types,
                                 const OptionalTensor& sequence_mask,
                                 const OptionalTensor& row_starts,
                                 const OptionalTensor& unsorted_indices,
                                 const OptionalTensor& last_rows, const OptionalTensor& entry_times,
                                 const OptionalTensor& sample_weight, const char* name = "logits") {
  const bool packed = row_starts.has_value();
  if (packed != unsorted_indices.has_value() || packed != last_rows.has_value()) {
    refuse(operation, "row_starts, unsorted_indices, last_rows", "all or none of them", "some");
  }
  const int64_t dims = (packed ? 1 : 2) + (competing ? 1 : 0);
  expect_dim(
      logits, operation, name, dims,
      packed ? (competing ? "[n_visits, K]" : "[n_visits]") : (competing ? "[B, V, K]" : "[B, V]"));
  expect_floating(logits, operation, name);
  LogitsShape shape{packed, 0, 0, competing ? logits.size(dims - 1) : 1};
  if (shape.classes < 1) refuse(operation, name, "at least one cause", "0 values per visit");
  if (packed) {
    if (sequence_mask.has_value()) {
      refuse(operation, "sequence_mask", "none with a packed batch", "one");
    }
    expect_row_numbers(operation, *row_starts, *unsorted_indices, *last_rows);
    shape.patients = unsorted_indices->size(0);
    shape.slots = row_starts->size(0) - 1;
  } else {
    shape.patients = logits.size(0);
    shape.slots = logits.size(1);
    expect_sequence_mask(operation, sequence_mask, shape.patients, shape.slots);
  }
  expect_row_length(operation, shape.slots, shape.classes, name);
  expect_outcomes(operation, shape.patients, competing, event_times, event_types, entry_times,
                  sample_weight);
  return shape;
}

// One number per visit beside the hazards or logits, of the type that their loss is summed in.
inline void expect_visit_weight(const char* operation, const Tensor& visit_weight,
                                const Tensor& logits, bool packed) {
  std::vector<int64_t> of_visits{logits.size(0)};
  if (!packed) of_visits.push_back(logits.size(1));
  expect_shape(visit_weight, operation, "visit_weight", of_visits,
               packed ? "[n_visits]" : "[B, V]");
  const bool is_double = logits.scalar_type() == ScalarType::Double;
  expect_dtype(visit_weight, operation, "visit_weight",
               {is_double ? ScalarType::Double : ScalarType::Float});
}

inline std::string short_text(double value) {
  if (value != value) return "nan";  // whatever its sign
  char text[32];
  std::snprintf(text, sizeof text, "%g", value);
  return text;
}

inline void expect_weights(const char* operation, const std::vector<int64_t>& of_visits,
                           const char* names, int64_t patients, const OptionalTensor& visit_weight,
                           const OptionalTensor& sample_weight) {
  if (visit_weight.has_value()) {
    expect_shape(*visit_weight, operation, "visit_weight", of_visits, names);
    expect_real(*visit_weight, operation, "visit_weight");
  }
  if (sample_weight.has_value()) {
    expect_shape(*sample_weight, operation, "sample_weight", {patients}, "[B]");
    expect_real(*sample_weight, operation, "sample_weight");
  }
}

// Whether the visits are packed: all of the three row numbers are given then, and no mask.
inline bool expect_layout(const char* operation, const OptionalTensor& sequence_mask,
                          const OptionalTensor& row_starts, const OptionalTensor& unsorted_indices,
                          const OptionalTensor& last_rows) {
  const bool packed = row_starts.has_value();
  if (packed != unsorted_indices.has_value() || packed != last_rows.has_value()) {
    refuse(operation, "row_starts, unsorted_indices, last_rows", "all or none of them", "some");
  }
  if (!packed) return false;
  if (sequence_mask.has_value()) {
    refuse(operation, "sequence_mask", "none with a packed batch", "one");
  }
  expect_row_numbers(operation, *row_starts, *unsorted_indices, *last_rows);
  return true;
}

}  // namespace ehrseq::survival
