// The four floating-point types of the package, as types of the CPU kernels.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <utility>

#include "common/dtype_map.h"

namespace ehrseq {

using BFloat16 = torch::headeronly::BFloat16;
using Half = torch::headeronly::Half;

template <>
inline constexpr ScalarType kDtypeOf<BFloat16> = ScalarType::BFloat16;

template <typename Body>
void dispatch_floating(ScalarType dtype, const char* operation, Body&& body) {
  dispatch_floating_as<BFloat16, Half>(dtype, operation, std::forward<Body>(body));
}

}  // namespace ehrseq
