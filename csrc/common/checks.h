// Checks of what raw operators are called with. They are public (torch.ops.ehrseq_fast.*) and are
// reached by export and torch.compile, so every operator checks whatever it indexes by. A message
// reads: operator, argument, what was expected, what it got.
//
// Free of CPU and CUDA specifics; used by both. std::invalid_argument becomes a ValueError.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "common/dtype_map.h"
#include "common/shapes.h"

namespace ehrseq {

constexpr int64_t kAnySize = -1;

inline std::string as_text(const std::vector<int64_t>& shape) {
  std::ostringstream text;
  text << '[';
  for (size_t i = 0; i < shape.size(); ++i) {
    text << (i ? ", " : "");
    if (shape[i] == kAnySize) {
      text << '*';
    } else {
      text << shape[i];
    }
  }
  text << ']';
  return text.str();
}

[[noreturn]] inline void refuse(const char* operation, const char* name,
                                const std::string& expected, const std::string& got) {
  throw std::invalid_argument(std::string(operation) + ": " + name + ": expected " + expected +
                              ", got " + got);
}

// "[B, V]" -> "shape [B, V]"; what is no list of dimensions, such as "the shape of grad", stays.
inline std::string in_words(const char* names) {
  return names[0] == '[' ? std::string("shape ") + names : names;
}

// `shape` may hold kAnySize; `names` is the shape in words, such as "[B, V]".
inline void expect_shape(const torch::stable::Tensor& tensor, const char* operation,
                         const char* name, const std::vector<int64_t>& shape, const char* names) {
  bool fits = tensor.dim() == static_cast<int64_t>(shape.size());
  for (size_t i = 0; fits && i < shape.size(); ++i) {
    fits = shape[i] == kAnySize || tensor.size(i) == shape[i];
  }
  if (!fits) {
    refuse(operation, name, in_words(names) + " = " + as_text(shape), as_text(shape_of(tensor)));
  }
}

inline void expect_dim(const torch::stable::Tensor& tensor, const char* operation, const char* name,
                       int64_t dim, const char* names) {
  if (tensor.dim() != dim) {
    refuse(operation, name, in_words(names), as_text(shape_of(tensor)));
  }
}

inline void expect_dtype(const torch::stable::Tensor& tensor, const char* operation,
                         const char* name, std::initializer_list<ScalarType> dtypes) {
  const ScalarType got = tensor.scalar_type();
  if (std::find(dtypes.begin(), dtypes.end(), got) != dtypes.end()) return;
  std::string expected;
  for (const ScalarType dtype : dtypes) {
    expected += (expected.empty() ? "" : " or ") + as_text(dtype);
  }
  refuse(operation, name, expected, as_text(got));
}

inline void expect_floating(const torch::stable::Tensor& tensor, const char* operation,
                            const char* name) {
  expect_dtype(tensor, operation, name,
               {ScalarType::Float, ScalarType::Double, ScalarType::BFloat16, ScalarType::Half});
}

inline void expect_integer(const torch::stable::Tensor& tensor, const char* operation,
                           const char* name) {
  expect_dtype(
      tensor, operation, name,
      {ScalarType::Byte, ScalarType::Char, ScalarType::Short, ScalarType::Int, ScalarType::Long});
}

// An option that operators take as a number (operators.py): one of first..last.
inline void expect_option(int64_t value, const char* operation, const char* name, int64_t first,
                          int64_t last) {
  if (value < first || value > last) {
    refuse(operation, name, std::to_string(first) + ".." + std::to_string(last),
           std::to_string(value));
  }
}

// A CPU kernel takes addresses of the host. The dispatcher passes on calls with one tensor on the
// CPU and another, say, on the meta device.
inline bool is_on_cpu(const torch::stable::Tensor& tensor) { return tensor.is_cpu(); }
inline bool is_on_cpu(const std::optional<torch::stable::Tensor>& tensor) {
  return !tensor.has_value() || tensor->is_cpu();
}

template <typename... Tensors>
void expect_on_cpu(const char* operation, const Tensors&... tensors) {
  if (!(is_on_cpu(tensors) && ...)) {
    throw std::invalid_argument(std::string(operation) +
                                ": tensors: expected all on the CPU, got some on another device");
  }
}

}  // namespace ehrseq
