// Allocation, and tensors as kernels read them.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/shim_utils.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
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

// As empty(), for kernels that take no longer than a call of torch's dispatcher, which looks
// new_empty up by its name: this one is allocated without it. (So it is not filled under
// torch.use_deterministic_algorithms: all of it has to be written.)
inline Tensor allocated(const Tensor& like, const std::vector<int64_t>& shape, ScalarType dtype) {
  std::vector<int64_t> strides(shape.size());
  int64_t stride = 1;
  for (size_t i = shape.size(); i-- > 0; stride *= std::max<int64_t>(1, shape[i])) {
    strides[i] = stride;
  }
  int32_t device_type = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  const auto number_of_dtype =
      torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(shape.size()), shape.data(),
                                                  strides.data(), number_of_dtype, device_type,
                                                  like.get_device_index(), &handle));
  Tensor tensor(handle);
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
    const bool converts = tensor.scalar_type() != kDtypeOf<T>;
    held_.push_back(made_contiguous(converts ? torch::stable::to(tensor, kDtypeOf<T>) : tensor));
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
