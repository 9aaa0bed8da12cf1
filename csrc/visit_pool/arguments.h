// What the operators of visit pooling may be called with, on the CPU and on a GPU alike: the
// shapes, dtypes and numbers that kernels index by. Values in memory (codes, offsets, an index) are
// checked by the CPU before it uses them and by a GPU's kernels while they do.
#pragma once

#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "common/checks.h"
#include "common/options.h"

namespace ehrseq::pooling {

using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Rows of the table and visits have 32-bit numbers.
inline void expect_countable(int64_t count, const char* operation, const char* name) {
  if (count < 0 || count > INT32_MAX) {
    refuse(operation, name, "0..2^31-1", std::to_string(count));
  }
}

inline void expect_mode(int64_t mode, const char* operation) {
  expect_option(mode, operation, "mode", kMean, kMax);
}

inline void expect_table(const Tensor& weight, const char* operation) {
  expect_dim(weight, operation, "weight", 2, "[K, E]");
  expect_floating(weight, operation, "weight");
  expect_countable(weight.size(0), operation, "weight.size(0)");
}

inline void expect_padding(int64_t padding_idx, int64_t vocabulary, const char* operation) {
  expect_countable(vocabulary, operation, "vocabulary");
  if (padding_idx < -1 || padding_idx >= vocabulary) {
    throw std::out_of_range(
        std::string(operation) + ": padding_idx: expected -1 (none) or one of " +
        std::to_string(vocabulary) + " codes, got " + std::to_string(padding_idx));
  }
}

[[noreturn]] inline void refuse_codes_outside(int64_t found, int64_t vocabulary, int64_t code,
                                              const std::string& place) {
  throw std::out_of_range("Found " + std::to_string(found) +
                          " codes outside the vocabulary: expected 0 <= code < " +
                          std::to_string(vocabulary) + ". The first is " + std::to_string(code) +
                          ": codes" + place + ".");
}

inline void expect_mask(const OptionalTensor& mask, const std::vector<int64_t>& shape,
                        const char* operation) {
  if (!mask.has_value()) return;
  expect_shape(*mask, operation, "mask", shape, "[..., C]");
  expect_dtype(*mask, operation, "mask",
               {ScalarType::Bool, ScalarType::Byte, ScalarType::Int, ScalarType::Long,
                ScalarType::Float, ScalarType::Double});
}

inline void expect_padded_codes(const Tensor& codes, const OptionalTensor& mask,
                                const char* operation) {
  if (codes.dim() < 1) refuse(operation, "codes", "shape [..., C]", "[]");
  expect_dtype(codes, operation, "codes", {ScalarType::Int, ScalarType::Long});
  expect_mask(mask, shape_of(codes), operation);
  expect_countable(product(leading_shape(codes, 1)), operation, "visits");
  expect_countable(codes.size(codes.dim() - 1), operation, "slots per visit");
}

// The gradient of what was pooled, and in mode max the winners, which are of the same shape.
inline void expect_gradient(const Tensor& grad, const std::vector<int64_t>& visits,
                            const OptionalTensor& arg_max, int64_t mode, const char* operation) {
  expect_mode(mode, operation);
  expect_floating(grad, operation, "grad");
  auto shape = visits;
  shape.push_back(kAnySize);
  expect_shape(grad, operation, "grad", shape, "[..., E]");
  if (mode != kMax) return;
  if (!arg_max.has_value()) refuse(operation, "arg_max", "a tensor in mode max", "None");
  expect_dtype(*arg_max, operation, "arg_max", {ScalarType::Int});
  expect_shape(*arg_max, operation, "arg_max", shape_of(grad), "the shape of grad");
}

inline void expect_int32_row(const Tensor& tensor, const char* operation, const char* name,
                             int64_t size) {
  expect_dtype(tensor, operation, name, {ScalarType::Int});
  expect_shape(tensor, operation, name, {size}, "[n]");
}

inline void expect_packed_codes(const Tensor& codes, const Tensor& code_offsets,
                                const char* operation) {
  expect_int32_row(codes, operation, "codes", kAnySize);
  expect_int32_row(code_offsets, operation, "code_offsets", kAnySize);
  if (code_offsets.size(0) < 1) {
    refuse(operation, "code_offsets", "shape [n_visits + 1]", "[0]");
  }
  expect_countable(codes.size(0), operation, "codes.size(0)");
}

// Dtypes and sizes of the transposed index; its values are checked elsewhere.
inline void expect_index(const Tensor& index_codes, const Tensor& index_offsets,
                         const Tensor& index_visits, const char* operation) {
  expect_int32_row(index_codes, operation, "index_codes", kAnySize);
  expect_int32_row(index_offsets, operation, "index_offsets", index_codes.size(0) + 1);
  expect_int32_row(index_visits, operation, "index_visits", kAnySize);
  expect_countable(index_visits.size(0), operation, "index_visits.size(0)");
}

inline void expect_scores(const Tensor& scores, const Tensor& weight, const char* operation) {
  expect_shape(scores, operation, "scores", {weight.size(0)}, "[K]");
  expect_dtype(scores, operation, "scores", {weight.scalar_type()});
}

// Weights per code, which modes mean and sum take, in the dtype that sums have.
inline void expect_weighted_mode(int64_t mode, const char* operation) {
  expect_option(mode, operation, "mode", kMean, kSum);
}

inline ScalarType sum_dtype(const Tensor& weight) {
  return weight.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline void expect_code_weights(const Tensor& code_weights, const Tensor& codes, ScalarType dtype,
                                const char* operation) {
  expect_shape(code_weights, operation, "code_weights", shape_of(codes), "[n_codes]");
  expect_dtype(code_weights, operation, "code_weights", {dtype});
}

// The sums of the weights of each visit, which the mean is divided by.
inline void expect_totals(const OptionalTensor& totals, int64_t n_visits, ScalarType dtype,
                          int64_t mode, const char* operation) {
  if (mode != kMean) return;
  if (!totals.has_value()) refuse(operation, "totals", "a tensor in mode mean", "None");
  expect_shape(*totals, operation, "totals", {n_visits}, "[n_visits]");
  expect_dtype(*totals, operation, "totals", {dtype});
}

// Of the weights: the gradient of what was pooled, and in mode mean what was pooled.
inline void expect_weights_gradient(const Tensor& grad, const OptionalTensor& pooled,
                                    const OptionalTensor& totals, int64_t n_visits,
                                    const Tensor& weight, int64_t mode, const char* operation) {
  expect_weighted_mode(mode, operation);
  expect_shape(grad, operation, "grad", {n_visits, weight.size(1)}, "[n_visits, E]");
  expect_dtype(grad, operation, "grad", {weight.scalar_type()});
  expect_totals(totals, n_visits, sum_dtype(weight), mode, operation);
  if (mode != kMean) return;
  if (!pooled.has_value()) refuse(operation, "pooled", "a tensor in mode mean", "None");
  expect_shape(*pooled, operation, "pooled", shape_of(grad), "the shape of grad");
  expect_dtype(*pooled, operation, "pooled", {weight.scalar_type()});
}

inline void expect_attention_gradient(const Tensor& grad, const Tensor& pooled,
                                      const Tensor& highest, const Tensor& inverse,
                                      const Tensor& weight, const char* operation) {
  expect_shape(grad, operation, "grad", {kAnySize, weight.size(1)}, "[n_visits, E]");
  expect_shape(pooled, operation, "pooled", shape_of(grad), "the shape of grad");
  expect_shape(highest, operation, "highest", {grad.size(0)}, "[n_visits]");
  expect_shape(inverse, operation, "inverse", {grad.size(0)}, "[n_visits]");
  expect_dtype(grad, operation, "grad", {weight.scalar_type()});
  expect_dtype(pooled, operation, "pooled", {weight.scalar_type()});
  expect_dtype(highest, operation, "highest", {ScalarType::Double});
  expect_dtype(inverse, operation, "inverse", {ScalarType::Double});
}

}  // namespace ehrseq::pooling
