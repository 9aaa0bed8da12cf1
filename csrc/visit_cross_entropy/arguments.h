// What visit_cross_entropy accepts, on the CPU and on a GPU.
#pragma once

#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include "common/options.h"
#include "common/survival/arguments.h"

namespace ehrseq::visit_cross_entropy {

using namespace ehrseq::survival;  // NOLINT: what all losses accept

constexpr const char* kName = "visit_cross_entropy";

// Whether the visits are packed.
inline bool expect_arguments(const Tensor& logits, const Tensor& labels,
                             const OptionalTensor& sequence_mask, const OptionalTensor& row_starts,
                             const OptionalTensor& unsorted_indices,
                             const OptionalTensor& last_rows, const OptionalTensor& class_weight,
                             const OptionalTensor& visit_weight,
                             const OptionalTensor& sample_weight, double label_smoothing,
                             int64_t reduction) {
  const bool packed = expect_layout(kName, sequence_mask, row_starts, unsorted_indices, last_rows);
  expect_dim(logits, kName, "logits", packed ? 2 : 3, packed ? "[n_visits, K]" : "[B, V, K]");
  expect_floating(logits, kName, "logits");
  const int64_t classes = logits.size(packed ? 1 : 2);
  if (classes < 1 || classes > std::numeric_limits<int32_t>::max()) {
    refuse(kName, "logits", "1 to 2^31 - 1 classes", std::to_string(classes));
  }
  expect_option(reduction, kName, "reduction", 0, static_cast<int64_t>(Reduction::kSum));
  if (!(label_smoothing >= 0 && label_smoothing <= 1)) {
    refuse(kName, "label_smoothing", "a number in [0, 1]", short_text(label_smoothing));
  }
  std::vector<int64_t> of_visits = shape_of(logits);
  of_visits.pop_back();
  const char* names = packed ? "[n_visits]" : "[B, V]";
  expect_shape(labels, kName, "labels", of_visits, names);
  expect_integer(labels, kName, "labels");
  if (class_weight.has_value()) {
    expect_shape(*class_weight, kName, "class_weight", {classes}, "[K]");
    expect_real(*class_weight, kName, "class_weight");
  }
  const int64_t patients = packed ? unsorted_indices->size(0) : logits.size(0);
  expect_weights(kName, of_visits, names, patients, visit_weight, sample_weight);
  if (!packed) expect_sequence_mask(kName, sequence_mask, patients, logits.size(1));
  return packed;
}

}  // namespace ehrseq::visit_cross_entropy
