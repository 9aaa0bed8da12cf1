// The batch sizes of packed rows, checked: kernels index by them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "common/checks.h"

namespace ehrseq::recurrent {

inline void expect_like(const std::optional<torch::stable::Tensor>& tensor, const char* operation,
                        const char* name, ScalarType dtype, const std::vector<int64_t>& shape,
                        const std::string& names) {
  if (!tensor) return;
  expect_shape(*tensor, operation, name, shape, names.c_str());
  expect_dtype(*tensor, operation, name, {dtype});
}

inline std::vector<int64_t> checked_batch_sizes(const char* operation,
                                                const torch::stable::Tensor& batch_sizes,
                                                int64_t visits) {
  expect_dim(batch_sizes, operation, "batch_sizes", 1, "[times]");
  expect_dtype(batch_sizes, operation, "batch_sizes", {ScalarType::Long});
  if (batch_sizes.numel() < 1) refuse(operation, "batch_sizes", "one number per time", "none");
  const torch::stable::Tensor packed = torch::stable::contiguous(batch_sizes);
  const int64_t* at = static_cast<const int64_t*>(packed.data_ptr());
  const std::vector<int64_t> sizes(at, at + packed.numel());
  int64_t total = 0;
  for (size_t time = 0; time < sizes.size(); ++time) {
    if (sizes[time] < 1 || (time > 0 && sizes[time] > sizes[time - 1])) {
      refuse(operation, "batch_sizes", "positive sizes that do not rise",
             "batch_sizes[" + std::to_string(time) + "] = " + std::to_string(sizes[time]) +
                 (time > 0 ? " after " + std::to_string(sizes[time - 1]) : ""));
    }
    // more than there are say no more, and could overflow
    total = std::min(sizes[time], visits + 1) + std::min(total, visits + 1);
  }
  if (total != visits) {
    refuse(operation, "batch_sizes",
           "the number of visits at each time, " + std::to_string(visits) + " in all",
           total > visits ? "more" : std::to_string(total));
  }
  return sizes;
}

}  // namespace ehrseq::recurrent
