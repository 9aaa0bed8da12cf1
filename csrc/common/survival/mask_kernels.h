// The visits in the rows of a mask.
//
// Compiled once for each instruction set, hence no include guard: see common/each_isa.h.

#include "common/simd.h"
#include "common/survival/mask_rows.h"
#include "common/vector_math.h"

namespace ehrseq::survival::EHRSEQ_ISA {

using namespace ehrseq::EHRSEQ_ISA;  // NOLINT: the lanes of the same instruction set

template <typename Values>
using MaskLanes = lanes_t<typename Values::bits, kLanes<typename Values::bits>>;

template <typename Values>
EHRSEQ_INLINE MaskLanes<Values> load_mask_lanes(const typename Values::bits* from) {
  MaskLanes<Values> lanes;
  std::memcpy(&lanes, from, sizeof lanes);
  return lanes;
}

// All bits set where a value is a 1.
template <typename Values>
EHRSEQ_INLINE MaskLanes<Values> are_ones(const MaskLanes<Values>& lanes) {
  if constexpr (Values::kAnyIsOne) return (MaskLanes<Values>)(lanes != 0);
  return (MaskLanes<Values>)(lanes == Values::kOne);
}

// Some bit set where a value is neither 0 nor 1.
template <typename Values>
EHRSEQ_INLINE MaskLanes<Values> others(const MaskLanes<Values>& lanes,
                                       const MaskLanes<Values>& ones) {
  if constexpr (Values::kAnyIsOne) return MaskLanes<Values>{};
  return (Values::kHasSign ? lanes << 1 : lanes) & ~ones;
}

EHRSEQ_INLINE uint64_t any_bit(const Lanes<uint64_t>& words) {
  return join_lanes<uint64_t>(
      words, [](const auto& a, const auto& b) __attribute__((always_inline)) { return a | b; });
}

template <typename Bits, typename VectorType>
EHRSEQ_INLINE int64_t sum_of_counts(const VectorType& counts) {
  constexpr uint64_t kEvenBytes = 0x00ff00ff00ff00ff;
  constexpr uint64_t kEvenPairs = 0x0000ffff0000ffff;
  Lanes<uint64_t> words = (Lanes<uint64_t>)counts;
  if constexpr (sizeof(Bits) == 1) words = (words & kEvenBytes) + ((words >> 8) & kEvenBytes);
  if constexpr (sizeof(Bits) <= 2) words = (words & kEvenPairs) + ((words >> 16) & kEvenPairs);
  if constexpr (sizeof(Bits) <= 4) words = (words & 0xffffffff) + (words >> 32);
  return static_cast<int64_t>(sum_of_lanes<uint64_t>(words));
}

// Loaded from position n on: all bits set in the last n lanes.
template <typename Bits>
struct LateLanes {
  Bits lanes[2 * kLanes<Bits>] = {};
  constexpr LateLanes() {
    for (int64_t i = kLanes<Bits>; i < 2 * kLanes<Bits>; ++i) {
      lanes[i] = static_cast<Bits>(~Bits{0});
    }
  }
};
template <typename Bits>
constexpr LateLanes<Bits> kLateLanes;

#if EHRSEQ_ISA_LEVEL >= 2
// As visits_of_row, of bytes, whose comparisons fill a word: a bit for each.
template <typename Values>
EHRSEQ_INLINE int64_t visits_of_bytes(const uint8_t* row, int64_t slots) {
  uint64_t wrong = 0;
  uint64_t after = ~uint64_t{0};  // no bit set once there was a 0
  int64_t visits = 0;
  for (int64_t at = 0; at < slots; at += 64) {
    const uint64_t exists = slots - at >= 64 ? ~uint64_t{0} : (uint64_t{1} << (slots - at)) - 1;
    const __m512i values = _mm512_maskz_loadu_epi8(exists, row + at);
    const uint64_t others = _mm512_test_epi8_mask(values, values);
    const uint64_t ones =
        Values::kAnyIsOne ? others : _mm512_cmpeq_epi8_mask(values, _mm512_set1_epi8(Values::kOne));
    wrong |= (others & ~ones) | (ones & (ones + 1)) | (ones & ~after);
    after = ones == ~uint64_t{0} ? after : 0;
    visits += __builtin_popcountll(ones);
  }
  return wrong != 0 ? kMalformed : visits;
}
#endif

// One vector a step. A row is malformed where a value is neither 0 nor 1, or where a 0 is
// followed by a 1.
template <typename Values>
EHRSEQ_INLINE int64_t visits_of_row(const typename Values::bits* row, int64_t slots) {
  using bits = typename Values::bits;
  using Lanes_ = MaskLanes<Values>;
#if EHRSEQ_ISA_LEVEL >= 2
  if constexpr (sizeof(bits) == 1) return visits_of_bytes<Values>(row, slots);
#endif
  constexpr int64_t kBlock = sizeof(Lanes_) / sizeof(bits);
  constexpr int64_t kMostBlocks = 255;  // so that no byte's count overflows

  Lanes_ wrong{};
  int64_t visits = 0;
  int64_t at = 0;
  while (at + kBlock < slots) {
    Lanes_ counts{};
    const int64_t blocks = std::min((slots - at - 1) / kBlock, kMostBlocks);
    for (int64_t i = 0; i < blocks; ++i, at += kBlock) {
      const Lanes_ values = load_mask_lanes<Values>(row + at);
      const Lanes_ ones = are_ones<Values>(values);
      const Lanes_ next = are_ones<Values>(load_mask_lanes<Values>(row + at + 1));
      wrong |= others<Values>(values, ones) | (next & ~ones);
      counts -= ones;
    }
    visits += sum_of_counts<bits>(counts);
  }

  // The rest of the row, at most one block of it: with the values before it, which are not counted
  // again, or in short rows with zeros after it.
  Lanes_ before;
  Lanes_ values;
  if (at > 0) {
    before = load_mask_lanes<Values>(row + slots - kBlock - 1);
    values = load_mask_lanes<Values>(row + slots - kBlock);
  } else {
    bits rest[kBlock + 1] = {};
    std::memcpy(rest + 1, row, slots * sizeof(bits));
    rest[0] = Values::kOne;
    before = load_mask_lanes<Values>(rest);
    values = load_mask_lanes<Values>(rest + 1);
  }
  const Lanes_ ones = are_ones<Values>(values);
  wrong |= others<Values>(values, ones) | (ones & ~are_ones<Values>(before));
  Lanes_ is_new = ones;
  if (at > 0) is_new &= load_mask_lanes<Values>(kLateLanes<bits>.lanes + (slots - at));
  visits += sum_of_counts<bits>(-is_new);
  return any_bit((Lanes<uint64_t>)wrong) != 0 ? kMalformed : visits;
}

template <typename Values>
void count_in_rows(const void* mask, int64_t row_stride, int64_t slots, int64_t rows,
                   int64_t* visits) {
  const auto* values = static_cast<const typename Values::bits*>(mask);
  for (int64_t i = 0; i < rows; ++i) {
    visits[i] = visits_of_row<Values>(values + i * row_stride, slots);
  }
}

}  // namespace ehrseq::survival::EHRSEQ_ISA
