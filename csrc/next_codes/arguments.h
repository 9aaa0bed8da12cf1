// Checks of the arguments of next_codes_bce, for the CPU and CUDA alike.
#pragma once

#include <cstdint>
#include <limits>
#include <optional>
#include <string>

#include "common/checks.h"

namespace ehrseq::next_codes {

constexpr const char* kName = "next_codes_bce";

struct Sizes {
  int64_t rows;
  int64_t inputs;
  int64_t classes;
};

inline void expect_numbers(const std::optional<torch::stable::Tensor>& tensor, const char* name,
                           int64_t size, const char* shape) {
  if (!tensor.has_value()) return;
  expect_shape(*tensor, kName, name, {size}, shape);
  expect_floating(*tensor, kName, name);
}

inline Sizes expect_arguments(const torch::stable::Tensor& states,
                              const torch::stable::Tensor& weight,
                              const std::optional<torch::stable::Tensor>& bias,
                              const torch::stable::Tensor& codes,
                              const torch::stable::Tensor& code_offsets,
                              const std::optional<torch::stable::Tensor>& pos_weight,
                              const std::optional<torch::stable::Tensor>& class_weight,
                              const std::optional<torch::stable::Tensor>& row_scale) {
  expect_dim(states, kName, "states", 2, "[n_visits, H]");
  expect_floating(states, kName, "states");
  expect_dim(weight, kName, "weight", 2, "[K, H]");
  const Sizes sizes{states.size(0), states.size(1), weight.size(0)};
  expect_shape(weight, kName, "weight", {sizes.classes, sizes.inputs}, "[K, H]");
  expect_floating(weight, kName, "weight");
  if ((states.scalar_type() == ScalarType::Double) !=
      (weight.scalar_type() == ScalarType::Double)) {
    refuse(kName, "weight", "float64 where states are, and only there",
           as_text(weight.scalar_type()));
  }
  if (sizes.classes >= std::numeric_limits<int32_t>::max()) {
    refuse(kName, "weight", "fewer than 2^31 - 1 codes", std::to_string(sizes.classes));
  }
  expect_numbers(bias, "bias", sizes.classes, "[K]");
  expect_numbers(pos_weight, "pos_weight", sizes.classes, "[K]");
  expect_numbers(class_weight, "class_weight", sizes.classes, "[K]");
  expect_numbers(row_scale, "row_scale", sizes.rows, "[n_visits]");
  expect_dim(codes, kName, "codes", 1, "[n_codes]");
  expect_dtype(codes, kName, "codes", {ScalarType::Int});
  expect_shape(code_offsets, kName, "code_offsets", {sizes.rows + 1}, "[n_visits + 1]");
  expect_dtype(code_offsets, kName, "code_offsets", {ScalarType::Int});
  return sizes;
}

}  // namespace ehrseq::next_codes
