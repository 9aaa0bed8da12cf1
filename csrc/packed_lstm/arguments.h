// What the operators are called with, checked: everything that the kernels index by.
#pragma once

#include <algorithm>
#include <string>
#include <vector>

#include "common/checks.h"
#include "common/tensors.h"
#include "packed_lstm/kernels.h"

namespace ehrseq::packed_lstm {

constexpr const char* kName = "packed_lstm";

inline void expect_like(const OptionalTensor& tensor, const char* name, ScalarType dtype,
                        const std::vector<int64_t>& shape, const char* names) {
  if (!tensor) return;
  expect_shape(*tensor, kName, name, shape, names);
  expect_dtype(*tensor, kName, name, {dtype});
}

inline std::vector<int64_t> checked_batch_sizes(const Tensor& batch_sizes, int64_t visits) {
  expect_dim(batch_sizes, kName, "batch_sizes", 1, "[times]");
  expect_dtype(batch_sizes, kName, "batch_sizes", {ScalarType::Long});
  if (batch_sizes.numel() < 1) refuse(kName, "batch_sizes", "one number per time", "none");
  const Tensor packed = torch::stable::contiguous(batch_sizes);
  const int64_t* at = static_cast<const int64_t*>(packed.data_ptr());
  const std::vector<int64_t> sizes(at, at + packed.numel());
  int64_t total = 0;
  for (size_t time = 0; time < sizes.size(); ++time) {
    if (sizes[time] < 1 || (time > 0 && sizes[time] > sizes[time - 1])) {
      refuse(kName, "batch_sizes", "positive and must not rise",
             "batch_sizes[" + std::to_string(time) + "] = " + std::to_string(sizes[time]) +
                 (time > 0 ? " after " + std::to_string(sizes[time - 1]) : ""));
    }
    // more than there are say no more, and could overflow
    total = std::min(sizes[time], visits + 1) + std::min(total, visits + 1);
  }
  if (total != visits) {
    refuse(kName, "batch_sizes",
           "the number of visits at each time, " + std::to_string(visits) + " in all",
           total > visits ? "more" : std::to_string(total));
  }
  return sizes;
}

inline std::vector<Step> steps_of(const std::vector<int64_t>& batch_sizes, bool reverse) {
  std::vector<Step> steps;
  steps.reserve(batch_sizes.size());
  int64_t row = 0;
  for (size_t time = 0; time < batch_sizes.size(); ++time) {
    const int64_t patients = batch_sizes[time];
    const int64_t earlier = time > 0 ? batch_sizes[time - 1] : 0;
    const int64_t later = time + 1 < batch_sizes.size() ? batch_sizes[time + 1] : 0;
    const int64_t row_earlier = row - earlier;
    const int64_t row_later = row + patients;
    const int64_t from_earlier = std::min(earlier, patients);
    if (reverse) {
      steps.push_back({row, patients, row_later, later, row_earlier, from_earlier});
    } else {
      steps.push_back({row, patients, row_earlier, from_earlier, row_later, later});
    }
    row += patients;
  }
  return steps;
}

// The operands of both passes. Everything is on the CPU, or these operators would not be called.
inline Shape checked_shape(const Tensor& input, const std::vector<int64_t>& batch_sizes,
                           const Tensor& weight_ih, const Tensor& weight_hh,
                           const OptionalTensor& bias_ih, const OptionalTensor& bias_hh,
                           const OptionalTensor& h0, const OptionalTensor& c0) {
  const ScalarType dtype = input.scalar_type();
  expect_dim(weight_hh, kName, "weight_hh", 2, "[4 * hidden, hidden]");
  const Shape shape{input.size(1), weight_hh.size(1), input.size(0), batch_sizes[0]};
  if (shape.hidden < 1) refuse(kName, "weight_hh", "of at least one hidden unit", "none");
  const int64_t gates = kGates * shape.hidden;
  expect_like(weight_ih, "weight_ih", dtype, {gates, shape.inputs}, "[4 * hidden, inputs]");
  expect_like(weight_hh, "weight_hh", dtype, {gates, shape.hidden}, "[4 * hidden, hidden]");
  expect_like(bias_ih, "bias_ih", dtype, {gates}, "[4 * hidden]");
  expect_like(bias_hh, "bias_hh", dtype, {gates}, "[4 * hidden]");
  const std::vector<int64_t> state{shape.patients, shape.hidden};
  expect_like(h0, "h0", dtype, state, "[patients, hidden]");
  expect_like(c0, "c0", dtype, state, "[patients, hidden]");
  return shape;
}

}  // namespace ehrseq::packed_lstm
