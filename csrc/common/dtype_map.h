// Torch's dtypes, C++'s types and their names, for the CPU and CUDA alike. Each adds its own 16-bit
// types (dtypes.h, cuda/launch.h).
#pragma once

#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "common/scalar_types.h"

namespace ehrseq {

using torch::headeronly::ScalarType;

template <typename T>
constexpr ScalarType kDtypeOf = ScalarType::Undefined;
template <>
inline constexpr ScalarType kDtypeOf<float> = ScalarType::Float;
template <>
inline constexpr ScalarType kDtypeOf<double> = ScalarType::Double;
template <>
inline constexpr ScalarType kDtypeOf<int32_t> = ScalarType::Int;

inline std::string as_text(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Bool:
      return "bool";
    case ScalarType::Byte:
      return "uint8";
    case ScalarType::Char:
      return "int8";
    case ScalarType::Short:
      return "int16";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Half:
      return "float16";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Float:
      return "float32";
    case ScalarType::Double:
      return "float64";
    default:
      return "another dtype";
  }
}

// Calls body(TypeTag<scalar_t>{}) for the C++ type behind a floating-point dtype.
template <typename bfloat16_t, typename half_t, typename Body>
void dispatch_floating_as(ScalarType dtype, const char* operation, Body&& body) {
  switch (dtype) {
    case ScalarType::Float:
      return body(TypeTag<float>{});
    case ScalarType::Double:
      return body(TypeTag<double>{});
    case ScalarType::BFloat16:
      return body(TypeTag<bfloat16_t>{});
    case ScalarType::Half:
      return body(TypeTag<half_t>{});
    default:
      throw std::invalid_argument(std::string(operation) +
                                  ": expected float32, float64, bfloat16 or float16, got " +
                                  as_text(dtype));
  }
}

}  // namespace ehrseq
