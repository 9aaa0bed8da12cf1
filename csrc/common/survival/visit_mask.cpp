#include "common/survival/visit_mask.h"

#include <algorithm>
#include <stdexcept>

#include "common/survival/columns.h"
#include "common/survival/mask_rows.h"

namespace ehrseq::survival {
namespace {

// The rows' counter for a mask of this dtype.
auto counter_of(ScalarType dtype) -> decltype(&count_visits<BoolMask>) {
  switch (dtype) {
    case ScalarType::Bool:
      return &count_visits<BoolMask>;
    case ScalarType::Byte:
    case ScalarType::Char:
      return &count_visits<Int8Mask>;
    case ScalarType::Short:
      return &count_visits<Int16Mask>;
    case ScalarType::Int:
      return &count_visits<Int32Mask>;
    case ScalarType::Long:
      return &count_visits<Int64Mask>;
    case ScalarType::Half:
      return &count_visits<HalfMask>;
    case ScalarType::BFloat16:
      return &count_visits<BFloat16Mask>;
    case ScalarType::Float:
      return &count_visits<FloatMask>;
    case ScalarType::Double:
      return &count_visits<DoubleMask>;
    default:
      throw std::logic_error("sequence_mask: a dtype that was not checked");
  }
}

}  // namespace

VisitMask::VisitMask(const OptionalTensor& mask, int64_t slots) : slots_(slots) {
  if (!mask.has_value()) return;
  mask_ = mask->stride(1) == 1 ? *mask : made_contiguous(*mask);
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
  const auto* first = static_cast<const char*>(mask_->const_data_ptr()) +
                      begin * mask_->stride(0) * mask_->element_size();
  counter_of(mask_->scalar_type())(first, mask_->stride(0), slots_, end - begin, visits);
}

VisitMask::Fault VisitMask::first_fault(int64_t patient) const {
  Fault fault{slots_, 0};
  dispatch_real(mask_->scalar_type(), [&](auto tag) {
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
