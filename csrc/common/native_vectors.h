// Vectors as wide as the instruction set's registers, for loops without operations across lanes:
// there the width changes the speed and no bit of a result.
//
// No include guard: files that common/each_isa.h compiles for several instruction sets include
// this, once for each.

#include <cstdint>
#include <cstring>

#include "common/dtypes.h"
#include "common/simd.h"

namespace ehrseq::EHRSEQ_ISA {

constexpr int64_t kNativeBytes = 16 << EHRSEQ_ISA_LEVEL;

#include "common/lanes.h"

template <typename T>
constexpr int64_t kWidth = kNativeBytes / static_cast<int64_t>(sizeof(T));

template <typename T>
using Native = lanes_t<T, kWidth<T>>;

// What comparisons give: all bits set where true.
template <typename T>
using NativeMask = Native<std::conditional_t<sizeof(T) == 8, int64_t, int32_t>>;

// int32 numbers in lanes as wide as those of T, in memory next to one another.
template <typename T>
using PackedIds = lanes_t<int32_t, kWidth<T>>;

// A product as it is, in no fused multiply-add, which the baseline does not have: so that every
// instruction set gives the same bits.
template <typename T>
EHRSEQ_INLINE T rounded(T product) {
#if EHRSEQ_ISA_LEVEL == 2
  asm("" : "+v"(product));
#elif EHRSEQ_ISA_LEVEL == 1
  asm("" : "+x"(product));
#endif
  return product;
}

// A 16-bit number is float in its lane.
template <typename T>
EHRSEQ_INLINE auto load_native(const T* from) {
  return load_lanes<kWidth<accumulator_t<T>>>(from);
}

template <typename T>
EHRSEQ_INLINE void store_native(T* to, const Native<accumulator_t<T>>& lanes) {
  store_lanes<kWidth<accumulator_t<T>>>(to, lanes);
}

template <typename T>
EHRSEQ_INLINE NativeMask<T> load_ids(const int32_t* from) {
  return __builtin_convertvector(load_exactly<kWidth<T>>(from), NativeMask<T>);
}

template <typename T>
EHRSEQ_INLINE void store_ids(int32_t* to, const NativeMask<T>& lanes) {
  store_exactly<kWidth<T>>(to, __builtin_convertvector(lanes, PackedIds<T>));
}

}  // namespace ehrseq::EHRSEQ_ISA
