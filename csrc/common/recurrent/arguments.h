// What the operators are called with, checked: everything that the kernels index by.
#pragma once

#include <algorithm>
#include <string>
#include <vector>

#include "common/checks.h"
#include "common/recurrent/batch_sizes.h"
#include "common/recurrent/layer.h"
#include "common/tensors.h"

namespace ehrseq::recurrent {

// What both passes of a layer are called with; c0 where the cell has one.
struct Arguments {
  const Tensor& input;
  const Tensor& batch_sizes;
  const Tensor& weight_ih;
  const Tensor& weight_hh;
  const OptionalTensor& bias_ih;
  const OptionalTensor& bias_hh;
  const OptionalTensor& h0;
  const OptionalTensor& c0;
  bool reverse;
};

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

// What is looked at before there are kernels to run.
template <typename Cell>
void expect_input(const Arguments& given) {
  expect_dim(given.input, Cell::kName, "input", 2, "[visits, inputs]");
  expect_floating(given.input, Cell::kName, "input");
  const std::string names = "[" + std::to_string(Cell::kGates) + " * hidden, hidden]";
  expect_dim(given.weight_hh, Cell::kName, "weight_hh", 2, names.c_str());
}

// Everything is on the CPU, or these operators would not be called.
template <typename Cell>
Shape checked_shape(const Arguments& given, int64_t patients) {
  constexpr const char* kName = Cell::kName;
  const ScalarType dtype = given.input.scalar_type();
  const Shape shape{given.input.size(1), given.weight_hh.size(1), given.input.size(0), patients};
  if (shape.hidden < 1) refuse(kName, "weight_hh", "at least one hidden unit", "none");
  const int64_t rows = Cell::kGates * shape.hidden;
  const std::string names = "[" + std::to_string(Cell::kGates) + " * hidden";
  expect_like(given.weight_ih, kName, "weight_ih", dtype, {rows, shape.inputs},
              names + ", inputs]");
  expect_like(given.weight_hh, kName, "weight_hh", dtype, {rows, shape.hidden},
              names + ", hidden]");
  expect_like(given.bias_ih, kName, "bias_ih", dtype, {rows}, names + "]");
  expect_like(given.bias_hh, kName, "bias_hh", dtype, {rows}, names + "]");
  const std::vector<int64_t> state{shape.patients, shape.hidden};
  expect_like(given.h0, kName, "h0", dtype, state, "[patients, hidden]");
  expect_like(given.c0, kName, "c0", dtype, state, "[patients, hidden]");
  return shape;
}

}  // namespace ehrseq::recurrent
