// Shapes of tensors, as vectors that can be changed.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <vector>

namespace ehrseq {

inline std::vector<int64_t> shape_of(const torch::stable::Tensor& tensor) {
  const auto sizes = tensor.sizes();
  return {sizes.begin(), sizes.end()};
}

// The shape without its last `dropped` dimensions.
inline std::vector<int64_t> leading_shape(const torch::stable::Tensor& tensor, int64_t dropped) {
  auto shape = shape_of(tensor);
  shape.resize(shape.size() - dropped);
  return shape;
}

}  // namespace ehrseq
