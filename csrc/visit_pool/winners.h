// Mode max's winners: which code, or which slot, each column of a visit's maximum came from.
#pragma once

#include <cstdint>
#include <optional>

#include "common/options.h"
#include "common/shapes.h"

namespace ehrseq {

// Contiguous in mode max, null in the other modes.
class Winners {
 public:
  Winners(const std::optional<torch::stable::Tensor>& arg_max, int64_t mode) {
    if (mode == kMax) tensor_ = contiguous_or_none(arg_max);
  }
  const int32_t* get() const {
    return tensor_.has_value() ? static_cast<const int32_t*>(tensor_->const_data_ptr()) : nullptr;
  }

 private:
  std::optional<torch::stable::Tensor> tensor_;
};

}  // namespace ehrseq
