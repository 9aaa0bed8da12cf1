// The dtype in which the CPU's losses save the gradient for the backward pass.
#pragma once

#include <type_traits>

#include "common/dtypes.h"

namespace ehrseq::survival {

// A float16 gradient that is still to be multiplied by a loss scale would lose its small values.
template <typename scalar_t>
using saved_grad_t = std::conditional_t<std::is_same_v<scalar_t, Half>, float, scalar_t>;

}  // namespace ehrseq::survival
