#include "survival_nll/visit_mask.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "survival_nll/columns.h"
#include "survival_nll/rows.h"

namespace ehrseq::survival {
namespace {

template <typename T>
int64_t visits_of(const T* row, int64_t slots) {
  int64_t visits = 0;
  bool malformed = false;
  for (int64_t i = 0; i < slots; ++i) {
    malformed |= (row[i] != T(0)) & (row[i] != T(1));
    visits += row[i] != T(0);
  }
  for (int64_t i = 0; i + 1 < slots; ++i) malformed |= row[i] < row[i + 1];
  return malformed ? kMalformed : visits;
}

template <typename T>
void count(const T* mask, int64_t row_stride, int64_t slots, int64_t begin, int64_t end,
           int64_t* visits) {
  if (sizeof(T) == 1 && slots >= 8) {
    const auto* bytes = reinterpret_cast<const uint8_t*>(mask);
    count_in_bytes(bytes + begin * row_stride, row_stride, slots, end - begin, visits);
  } else {
    for (int64_t i = begin; i < end; ++i)
      visits[i - begin] = visits_of(mask + i * row_stride, slots);
  }
}

}  // namespace

VisitMask::VisitMask(const OptionalTensor& mask, int64_t patients, int64_t slots) : slots_(slots) {
  if (!mask.has_value()) return;
  if (mask->dim() != 2 || mask->sizes()[0] != patients || mask->sizes()[1] != slots) {
    throw std::invalid_argument("sequence_mask: expected shape [B, V] = [" +
                                std::to_string(patients) + ", " + std::to_string(slots) + "]");
  }
  mask_ = mask->stride(1) == 1 ? *mask : torch::stable::contiguous(*mask);
}

void VisitMask::count_visits(int64_t begin, int64_t end, int64_t* visits) const {
  if (!lengths_.empty()) {
    std::copy(lengths_.begin() + begin, lengths_.begin() + end, visits);
    return;
  }
  if (!mask_.has_value()) {
    std::fill(visits, visits + (end - begin), slots_);
    return;
  }
  dispatch_real(mask_->scalar_type(), "sequence_mask", [&](auto tag) {
    using stored_t = typename decltype(tag)::type;
    count(static_cast<const stored_t*>(mask_->const_data_ptr()), mask_->stride(0), slots_, begin,
          end, visits);
  });
}

VisitMask::Fault VisitMask::first_fault(int64_t patient) const {
  Fault fault{slots_, 0};
  dispatch_real(mask_->scalar_type(), "sequence_mask", [&](auto tag) {
    using stored_t = typename decltype(tag)::type;
    const stored_t* row =
        static_cast<const stored_t*>(mask_->const_data_ptr()) + patient * mask_->stride(0);
    double before = 1;
    for (int64_t visit = 0; visit < slots_; ++visit) {
      const double value = static_cast<double>(row[visit]);
      if ((value != 0 && value != 1) || value > before) {
        fault = {visit, value};
        return;
      }
      before = value;
    }
  });
  return fault;
}

}  // namespace ehrseq::survival
