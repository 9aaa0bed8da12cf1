// One number per patient, whatever its dtype: times, indicators, weights.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
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
void dispatch_real(ScalarType dtype, const char* name, Body&& body) {
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
      throw std::invalid_argument(std::string(name) + ": expected a bool, integer or float dtype");
  }
}

class Column {
 public:
  Column(const Tensor& tensor, const char* name, int64_t patients)
      : tensor_(tensor), name_(name), dtype_(tensor.scalar_type()) {
    if (tensor.dim() != 1 || tensor.sizes()[0] != patients) {
      throw std::invalid_argument(std::string(name) +
                                  ": expected shape [B] with B = " + std::to_string(patients));
    }
  }

  // The values of patients begin..end, as numbers of type T.
  template <typename T>
  void read(int64_t begin, int64_t end, T* values) const {
    const int64_t stride = tensor_.stride(0);
    dispatch_real(dtype_, name_, [&](auto tag) {
      using stored_t = typename decltype(tag)::type;
      const stored_t* stored = static_cast<const stored_t*>(tensor_.const_data_ptr());
      for (int64_t i = begin; i < end; ++i) values[i - begin] = static_cast<T>(stored[i * stride]);
    });
  }

  template <typename T>
  T at(int64_t patient) const {
    T value;
    read(patient, patient + 1, &value);
    return value;
  }

 private:
  Tensor tensor_;
  const char* name_;
  ScalarType dtype_;
};

}  // namespace ehrseq::survival
