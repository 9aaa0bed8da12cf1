// Short names for what kernels do with tensors at their door.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <vector>

#include "common/dtypes.h"

namespace ehrseq {

using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline Tensor empty(const Tensor& like, const std::vector<int64_t>& shape, ScalarType dtype) {
  return torch::stable::new_empty(like, {shape.data(), shape.size()}, dtype);
}

inline std::vector<int64_t> shape_of(const Tensor& tensor) {
  const auto sizes = tensor.sizes();
  return {sizes.begin(), sizes.end()};
}

// The shape without its last `dropped` dimensions.
inline std::vector<int64_t> leading_shape(const Tensor& tensor, int64_t dropped) {
  auto shape = shape_of(tensor);
  shape.resize(shape.size() - dropped);
  return shape;
}

}  // namespace ehrseq
