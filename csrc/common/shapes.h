// Shapes of tensors, as vectors that can be changed; and optional tensors.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
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

inline int64_t product(const std::vector<int64_t>& shape) {
  int64_t n = 1;
  for (const int64_t size : shape) n *= size;
  return n;
}

// Spares the common case a call of torch's dispatcher, which costs as much as a small kernel.
inline torch::stable::Tensor made_contiguous(const torch::stable::Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

inline std::optional<torch::stable::Tensor> contiguous_or_none(
    const std::optional<torch::stable::Tensor>& tensor) {
  if (!tensor.has_value()) return std::nullopt;
  return made_contiguous(*tensor);
}

}  // namespace ehrseq
