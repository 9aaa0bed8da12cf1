#include "survival_nll/visit_mask.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>

#include "common/simd.h"
#include "common/vector_math.h"
#include "survival_nll/columns.h"

namespace ehrseq::survival {
namespace {

EHRSEQ_INLINE uint64_t load_word(const uint8_t* from) {
  uint64_t word;
  std::memcpy(&word, from, sizeof word);
  return word;
}

using Words = Lanes<uint64_t>;

EHRSEQ_INLINE Words load_words(const uint8_t* from) {
  Words words;
  std::memcpy(&words, from, sizeof words);
  return words;
}

EHRSEQ_INLINE uint64_t any_bit(const Words& words) {
  return join_lanes<uint64_t>(words,
                              [](auto a, auto b) __attribute__((always_inline)) { return a | b; });
}

EHRSEQ_INLINE int64_t sum_of_bytes(uint64_t word) {
  constexpr uint64_t kEvenBytes = 0x00ff00ff00ff00ff;
  const uint64_t pairs = (word & kEvenBytes) + ((word >> 8) & kEvenBytes);
  return static_cast<int64_t>((pairs * 0x0001000100010001) >> 48);
}

EHRSEQ_INLINE int64_t sum_of_bytes(const Words& words) {
  constexpr uint64_t kEvenBytes = 0x00ff00ff00ff00ff;
  const Words w = (words & kEvenBytes) + ((words >> 8) & kEvenBytes);
  const uint64_t pairs = sum_of_lanes<uint64_t>(w);
  return static_cast<int64_t>((pairs * 0x0001000100010001) >> 48);
}

template <typename T>
EHRSEQ_INLINE int64_t visits_of(const T* row, int64_t slots) {
  int64_t visits = 0;
  bool malformed = false;
  for (int64_t i = 0; i < slots; ++i) {
    malformed |= (row[i] != T(0)) & (row[i] != T(1));
    visits += row[i] != T(0);
  }
  for (int64_t i = 0; i + 1 < slots; ++i) malformed |= row[i] < row[i + 1];
  return malformed ? kMalformed : visits;
}

// Sixty-four bytes a step, then eight (little-endian). A byte is wrong if it is neither 0 nor 1, or if
// it is 0 and the next one is 1.
EHRSEQ_INLINE int64_t visits_of_bytes(const uint8_t* row, int64_t slots) {
  constexpr uint64_t kOnes = 0x0101010101010101;
  constexpr int64_t kBlock = sizeof(Words);
  constexpr int64_t kMostBlocks = 128;  // so that no byte's sum overflows, the words' included
  if (slots < 8) return visits_of(row, slots);

  int64_t visits = 0;
  int64_t at = 0;
  Words wrong_words{};
  while (at + kBlock < slots) {
    Words sums{};
    const int64_t blocks = std::min((slots - at - 1) / kBlock, kMostBlocks);
    for (int64_t i = 0; i < blocks; ++i, at += kBlock) {
      const Words words = load_words(row + at);
      const Words next = load_words(row + at + 1);
      wrong_words |= (next & ~words) | (words & ~kOnes);
      sums += words;
    }
    visits += sum_of_bytes(sums);
  }
  uint64_t wrong = any_bit(wrong_words);
  uint64_t sum = 0;
  for (; at + 8 < slots; at += 8) {
    const uint64_t word = load_word(row + at);
    const uint64_t next = load_word(row + at + 1);
    wrong |= (next & ~word) | (word & ~kOnes);
    sum += word;
  }
  const uint64_t rest = load_word(row + slots - 8) >> (8 * (8 - (slots - at)));
  wrong |= ((rest >> 8) & ~rest) | (rest & ~kOnes);
  return wrong != 0 ? kMalformed : visits + sum_of_bytes(sum + rest);
}

EHRSEQ_SIMD void count_in_bytes(const uint8_t* mask, int64_t row_stride, int64_t slots,
                                int64_t begin, int64_t end, int64_t* visits) {
  for (int64_t i = begin; i < end; ++i) {
    visits[i - begin] = visits_of_bytes(mask + i * row_stride, slots);
  }
}

template <typename T>
void count(const T* mask, int64_t row_stride, int64_t slots, int64_t begin, int64_t end,
           int64_t* visits) {
  if constexpr (sizeof(T) == 1) {
    count_in_bytes(reinterpret_cast<const uint8_t*>(mask), row_stride, slots, begin, end, visits);
  } else {
    for (int64_t i = begin; i < end; ++i) visits[i - begin] = visits_of(mask + i * row_stride, slots);
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
  if (!mask_.has_value()) {
    std::fill(visits, visits + (end - begin), slots_);
    return;
  }
  dispatch_real(mask_->scalar_type(), "sequence_mask", [&](auto tag) {
    using stored_t = typename decltype(tag)::type;
    count(static_cast<const stored_t*>(mask_->const_data_ptr()), mask_->stride(0), slots_, begin, end,
          visits);
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
