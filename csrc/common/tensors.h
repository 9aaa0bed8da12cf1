// Allocation, and tensors as kernels read them.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <vector>

#include "common/dtypes.h"
#include "common/shapes.h"

namespace ehrseq {

using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Fresh memory costs a page fault per page at its first touch; with large pages, few.
inline void prefer_large_pages(const Tensor& tensor) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kLargePage = uintptr_t{1} << 21;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(tensor.data_ptr());
  const uintptr_t end = begin + tensor.numel() * tensor.element_size();
  const uintptr_t first = (begin + kLargePage - 1) & ~(kLargePage - 1);
  const uintptr_t last = end & ~(kLargePage - 1);
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

inline Tensor empty(const Tensor& like, const std::vector<int64_t>& shape, ScalarType dtype) {
  Tensor tensor = torch::stable::new_empty(like, {shape.data(), shape.size()}, dtype);
  prefer_large_pages(tensor);
  return tensor;
}

template <typename T>
T* data(const Tensor& tensor) {
  return static_cast<T*>(tensor.data_ptr());
}

template <typename T>
Tensor scratch(const Tensor& like, const std::vector<int64_t>& shape) {
  return empty(like, shape, kDtypeOf<T>);
}

// Tensors as kernels read them: contiguous, in the type that they take. Converted copies live as
// long as this does.
class Operands {
 public:
  template <typename T>
  const T* as(const Tensor& tensor) {
    held_.push_back(torch::stable::contiguous(torch::stable::to(tensor, kDtypeOf<T>)));
    return data<T>(held_.back());
  }

  template <typename T>
  const T* as(const OptionalTensor& tensor) {
    return tensor ? as<T>(*tensor) : nullptr;
  }

 private:
  std::vector<Tensor> held_;
};

}  // namespace ehrseq
