// What the operators of the survival losses may be called with, on the CPU and on a GPU alike:
// options, shapes and dtypes. Values of outcomes and of row numbers are checked by the CPU before
// it uses them (outcomes.cpp, rank_layout.h) and by a GPU's kernels where they would leave memory.
#pragma once

#include <cstdint>
#include <limits>
#include <optional>
#include <string>

#include "common/checks.h"
#include "common/options.h"

namespace ehrseq::survival {

using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline void expect_options(const char* operation, bool competing, int64_t link, double eps,
                           int64_t reduction) {
  const bool is_softmax = link == static_cast<int64_t>(Link::kSoftmax);  // of several classes
  if (link < 0 || link > static_cast<int64_t>(Link::kCloglog) || (is_softmax && !competing)) {
    refuse(operation, "link", competing ? "0..3" : "0, 1 or 3", std::to_string(link));
  }
  expect_option(reduction, operation, "reduction", 0, static_cast<int64_t>(Reduction::kSum));
  if (!(eps >= 0 && eps < 0.5)) refuse(operation, "eps", "[0, 0.5)", std::to_string(eps));
}

inline void expect_hazards(const char* operation, const Tensor& hazards, bool competing) {
  expect_dim(hazards, operation, "hazards", competing ? 3 : 2, competing ? "[B, V, K]" : "[B, V]");
  expect_floating(hazards, operation, "hazards");
}

inline void expect_packed_hazards(const char* operation, const Tensor& hazards) {
  if (hazards.dim() < 1 || hazards.dim() > 2) {
    refuse(operation, "hazards", "shape [n_visits] or [n_visits, K]", as_text(shape_of(hazards)));
  }
  expect_floating(hazards, operation, "hazards");
}

// Softmax has one class more than there are causes.
inline int64_t causes_of(const char* operation, int64_t classes, int64_t link) {
  const int64_t causes = classes - (static_cast<Link>(link) == Link::kSoftmax ? 1 : 0);
  if (causes < 1) {
    refuse(operation, "hazards", "at least one cause",
           std::to_string(classes) + " values per visit");
  }
  return causes;
}

// Positions within a patient's row are 32 bits wide.
inline void expect_row_length(const char* operation, int64_t slots, int64_t classes) {
  if (slots > std::numeric_limits<int32_t>::max() / classes) {
    refuse(operation, "hazards", "at most 2^31 - 1 values per patient",
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

// A saved gradient, and what it is to be multiplied by: one number, or one per patient.
inline void expect_scaling(const char* operation, const Tensor& grad, const Tensor& grad_nll,
                           const OptionalTensor& row_starts, const OptionalTensor& unsorted_indices,
                           const OptionalTensor& last_rows, ScalarType dtype) {
  const ScalarType saved = grad.scalar_type();
  expect_dtype(grad, operation, "grad",
               {ScalarType::Float, ScalarType::Double, ScalarType::BFloat16});
  expect_dtype(grad_nll, operation, "grad_nll",
               {saved == ScalarType::Double ? ScalarType::Double : ScalarType::Float});
  if (dtype != saved && !(dtype == ScalarType::Half && saved == ScalarType::Float)) {
    refuse(operation, "dtype", "that of the hazards whose gradient was saved as " + as_text(saved),
           as_text(dtype));
  }
  if (grad.dim() < 1 || grad.dim() > 3) {
    refuse(operation, "grad", "the shape of hazards", as_text(shape_of(grad)));
  }
  const bool packed = row_starts.has_value();
  if (packed != unsorted_indices.has_value() || packed != last_rows.has_value()) {
    refuse(operation, "row_starts, unsorted_indices, last_rows", "all or none of them", "some");
  }
  if (packed) expect_row_numbers(operation, *row_starts, *unsorted_indices, *last_rows);
  const int64_t patients = packed ? unsorted_indices->size(0) : grad.size(0);
  if (grad_nll.dim() != 0) expect_shape(grad_nll, operation, "grad_nll", {patients}, "[] or [B]");
}

}  // namespace ehrseq::survival
