// Tensors of outcomes as the columns that a GPU's kernels read (outcomes.cuh).
#pragma once

#include <cstdint>
#include <optional>
#include <stdexcept>

#include "common/cuda/launch.h"
#include "common/survival/arguments.h"
#include "common/survival/outcomes.cuh"

namespace ehrseq::survival::cuda {

using torch::headeronly::ScalarType;

inline Kind kind_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Bool:
      return Kind::kBool;
    case ScalarType::Byte:
      return Kind::kUnsigned;
    case ScalarType::Char:
    case ScalarType::Short:
    case ScalarType::Int:
    case ScalarType::Long:
      return Kind::kSigned;
    case ScalarType::Float:
    case ScalarType::Double:
      return Kind::kFloat;
    case ScalarType::Half:
      return Kind::kHalf;
    case ScalarType::BFloat16:
      return Kind::kBFloat16;
    default:
      throw std::logic_error("kind_of: a dtype that was not checked");
  }
}

inline Numbers numbers_of(const Tensor& tensor, int64_t stride) {
  return {tensor.const_data_ptr(), stride, static_cast<int>(tensor.element_size()),
          kind_of(tensor.scalar_type())};
}

// One number per patient.
inline Numbers column(const OptionalTensor& tensor) {
  return tensor.has_value() ? numbers_of(*tensor, tensor->stride(0)) : Numbers{};
}

inline OutcomeColumns outcomes_of(bool competing, const Tensor& times, const Tensor& types,
                                  const OptionalTensor& entries, const OptionalTensor& weights,
                                  const OptionalTensor& fractions = std::nullopt) {
  return {column(times),   column(types), column(entries),
          column(weights), !competing,    column(fractions)};
}

}  // namespace ehrseq::survival::cuda
