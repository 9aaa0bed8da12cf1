// Counts the visits in the rows of a mask, compiled for each instruction set (mask_kernels.h).
#pragma once

#include <cstdint>

#include "common/dtypes.h"
#include "common/survival/visit_mask.h"

namespace ehrseq::survival {

// A mask's values as integers of their width: a whole number is 1 or 0, a bool is
// 1 whatever its bits if it is not 0, and a float's 0 may have a sign.
template <typename Bits, Bits kOne_, bool kHasSign_ = false, bool kAnyIsOne_ = false>
struct MaskValues {
  using bits = Bits;
  static constexpr Bits kOne = kOne_;
  static constexpr bool kHasSign = kHasSign_;
  static constexpr bool kAnyIsOne = kAnyIsOne_;
};
using BoolMask = MaskValues<uint8_t, 1, false, true>;
using Int8Mask = MaskValues<uint8_t, 1>;
using Int16Mask = MaskValues<uint16_t, 1>;
using Int32Mask = MaskValues<uint32_t, 1>;
using Int64Mask = MaskValues<uint64_t, 1>;
using HalfMask = MaskValues<uint16_t, 0x3c00, true>;
using BFloat16Mask = MaskValues<uint16_t, 0x3f80, true>;
using FloatMask = MaskValues<uint32_t, 0x3f800000, true>;
using DoubleMask = MaskValues<uint64_t, 0x3ff0000000000000, true>;

// How many of `slots` values are visits, for each of `rows` rows; kMalformed as in VisitMask.
template <typename Values>
void count_visits(const void* mask, int64_t row_stride, int64_t slots, int64_t rows,
                  int64_t* visits);

}  // namespace ehrseq::survival
