// One number per patient or per visit, whatever its dtype: times, indicators, weights, labels.
// Shapes and dtypes have been checked (arguments.h).
#pragma once

#include <cstdint>
#include <stdexcept>
#include <type_traits>

#include "common/tensors.h"

namespace ehrseq::survival {

// A bool as torch reads it: any byte but 0 is true.
struct Truth {
  uint8_t byte;

  template <typename T>
  explicit operator T() const {
    return static_cast<T>(byte != 0);
  }
};

// Calls body(TypeTag<T>{}) for the C++ type behind any real dtype that a mask or a label comes in.
template <typename Body>
void dispatch_real(ScalarType dtype, Body&& body) {
  switch (dtype) {
    case ScalarType::Bool:
      return body(TypeTag<Truth>{});
    case ScalarType::Byte:
      return body(TypeTag<uint8_t>{});
    case ScalarType::Char:
      return body(TypeTag<int8_t>{});
    case ScalarType::Short:
      return body(TypeTag<int16_t>{});
    case ScalarType::Int:
      return body(TypeTag<int32_t>{});
    case ScalarType::Long:
      return body(TypeTag<int64_t>{});
    case ScalarType::Float:
      return body(TypeTag<float>{});
    case ScalarType::Double:
      return body(TypeTag<double>{});
    case ScalarType::Half:
      return body(TypeTag<Half>{});
    case ScalarType::BFloat16:
      return body(TypeTag<BFloat16>{});
    default:
      throw std::logic_error("dispatch_real: a dtype that was not checked");
  }
}

class Column {
 public:
  explicit Column(const Tensor& tensor) : Column(tensor, tensor.stride(0)) {}

  // One number per visit, [B, V] or [n_visits], in the order of memory.
  static Column of_visits(const Tensor& tensor) { return Column(made_contiguous(tensor), 1); }

  // The values of patients begin..end, as numbers of type T.
  template <typename T>
  void read(int64_t begin, int64_t end, T* values) const {
    const int64_t stride = stride_;
    dispatch_real(dtype_, [&](auto tag) {
      using stored_t = typename decltype(tag)::type;
      const stored_t* stored = static_cast<const stored_t*>(data_);
      if (stride == 1) {  // known when compiled, so that it is done in vectors
        for (int64_t i = begin; i < end; ++i) values[i - begin] = static_cast<T>(stored[i]);
        return;
      }
      for (int64_t i = begin; i < end; ++i) values[i - begin] = static_cast<T>(stored[i * stride]);
    });
  }

  template <typename T>
  T at(int64_t patient) const {
    T value;
    read(patient, patient + 1, &value);
    return value;
  }

  // body(at) with at(i) value number begin + i as it is stored; what has no arithmetic of its own
  // is a double.
  template <typename Body>
  void typed(int64_t begin, Body&& body) const {
    dispatch_real(dtype_, [&](auto tag) {
      using stored_t = typename decltype(tag)::type;
      using number_t = std::conditional_t<std::is_arithmetic_v<stored_t>, stored_t, double>;
      const stored_t* stored = static_cast<const stored_t*>(data_) + begin * stride_;
      const int64_t stride = stride_;
      if (stride == 1) return body([=](int64_t i) { return static_cast<number_t>(stored[i]); });
      body([=](int64_t i) { return static_cast<number_t>(stored[i * stride]); });
    });
  }

 private:
  Column(const Tensor& tensor, int64_t stride)
      : tensor_(tensor),
        data_(tensor.const_data_ptr()),
        dtype_(tensor.scalar_type()),
        stride_(stride) {}

  Tensor tensor_;
  const void* data_;  // asking the tensor for it at every read would cost more than the read
  ScalarType dtype_;
  int64_t stride_;
};

}  // namespace ehrseq::survival
