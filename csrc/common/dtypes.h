// The four floating-point types of the package, and the type that each one is accumulated in.
#pragma once

#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <stdexcept>
#include <string>

#include "common/scalar_types.h"

namespace ehrseq {

using torch::headeronly::ScalarType;
using BFloat16 = torch::headeronly::BFloat16;
using Half = torch::headeronly::Half;

// Calls body(TypeTag<scalar_t>{}) for the C++ type behind `dtype`.
template <typename Body>
void dispatch_floating(ScalarType dtype, const char* operation, Body&& body) {
  switch (dtype) {
    case ScalarType::Float:
      return body(TypeTag<float>{});
    case ScalarType::Double:
      return body(TypeTag<double>{});
    case ScalarType::BFloat16:
      return body(TypeTag<BFloat16>{});
    case ScalarType::Half:
      return body(TypeTag<Half>{});
    default:
      throw std::invalid_argument(std::string(operation) +
                                  ": expected float32, float64, bfloat16 or float16");
  }
}

template <typename T>
constexpr ScalarType kDtypeOf = ScalarType::Undefined;
template <>
inline constexpr ScalarType kDtypeOf<float> = ScalarType::Float;
template <>
inline constexpr ScalarType kDtypeOf<double> = ScalarType::Double;
template <>
inline constexpr ScalarType kDtypeOf<BFloat16> = ScalarType::BFloat16;

}  // namespace ehrseq
