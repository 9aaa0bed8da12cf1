// What slots.h declares. Compiled once for each instruction set, hence no include guard: see
// common/each_isa.h.

#include "common/set_bits.h"

namespace ehrseq::pooling::EHRSEQ_ISA {

using namespace ehrseq::EHRSEQ_ISA;  // NOLINT: the bits of the same instruction set

// Nearly all slots of a real batch are empty, and a visit's first ones are not: of 64 slots that
// hold any, most hold a few. These are written without asking how many there are.
EHRSEQ_INLINE int64_t write_positions(uint64_t bits, int32_t first, int32_t* positions) {
  constexpr int kAtOnce = 4;
  constexpr uint64_t kLast = uint64_t{1} << 63;  // __builtin_ctzll(0) is not defined
  const int count = __builtin_popcountll(bits);
  for (int i = 0; i < kAtOnce; ++i) {
    positions[i] = first + __builtin_ctzll(bits | kLast);
    bits &= bits - 1;
  }
  for (int i = kAtOnce; i < count; ++i) {
    positions[i] = first + __builtin_ctzll(bits);
    bits &= bits - 1;
  }
  return count;
}

template <typename mask_t>
int64_t find_set(const mask_t* mask, int64_t count, int32_t first, int32_t* positions) {
  int64_t found = 0;
  int64_t at = 0;
  for (; at + 64 <= count; at += 64) {
    const uint64_t bits = set_of_64(mask + at);
    if (bits == 0) continue;
    found += write_positions(bits, first + static_cast<int32_t>(at), positions + found);
  }
  if (at < count) {
    mask_t last[64] = {};
    std::memcpy(last, mask + at, (count - at) * sizeof(mask_t));
    const uint64_t bits = set_of_64(last);
    if (bits != 0) {
      found += write_positions(bits, first + static_cast<int32_t>(at), positions + found);
    }
  }
  return found;
}

}  // namespace ehrseq::pooling::EHRSEQ_ISA
