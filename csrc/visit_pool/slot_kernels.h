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

// bits_of_64(numbers) says which of 64 numbers are looked for; `filler` is none of them.
template <typename T, typename BitsOf64>
EHRSEQ_INLINE int64_t find(const T* numbers, int64_t count, int32_t first, int32_t* positions,
                           T filler, const BitsOf64& bits_of_64) {
  int64_t found = 0;
  int64_t at = 0;
  for (; at + 64 <= count; at += 64) {
    const uint64_t bits = bits_of_64(numbers + at);
    if (bits == 0) continue;
    found += write_positions(bits, first + static_cast<int32_t>(at), positions + found);
  }
  if (at < count) {
    T last[64];
    for (T& number : last) number = filler;
    std::memcpy(last, numbers + at, (count - at) * sizeof(T));
    const uint64_t bits = bits_of_64(last);
    if (bits != 0) {
      found += write_positions(bits, first + static_cast<int32_t>(at), positions + found);
    }
  }
  return found;
}

template <typename mask_t>
int64_t find_set(const mask_t* mask, int64_t count, int32_t first, int32_t* positions) {
  return find(mask, count, first, positions, mask_t(0),
              [](const mask_t* numbers)
                  __attribute__((always_inline)) { return set_of_64(numbers); });
}

template <typename code_t>
int64_t find_others(const code_t* codes, int64_t count, code_t value, int32_t first,
                    int32_t* positions) {
  return find(codes, count, first, positions, value,
              [value](const code_t* numbers) __attribute__((always_inline)) {
                code_t differences[64];
                for (int i = 0; i < 64; ++i) differences[i] = numbers[i] ^ value;
                return set_of_64(differences);
              });
}

}  // namespace ehrseq::pooling::EHRSEQ_ISA
