// What the operators of the survival losses may be called with, on the CPU and on a GPU alike:
// options, and the shapes and dtypes of hazards and of gradients.
#pragma once

#include <cstdint>
#include <string>

#include "common/checks.h"
#include "common/options.h"
#include "common/survival/arguments.h"

namespace ehrseq::survival {

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
