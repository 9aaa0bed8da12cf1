// Which of 64 numbers are not 0: bit i of set_of_64(numbers) says it of number i. A NaN is not 0,
// and -0 is.
//
// No include guard: see common/vector_math.h.

#include <cstdint>
#include <cstring>

#include "common/simd.h"

namespace ehrseq::EHRSEQ_ISA {

EHRSEQ_INLINE uint64_t set_of_64(const uint8_t* bytes) {
#if EHRSEQ_ISA_LEVEL == 2
  const __m512i all = _mm512_loadu_si512(bytes);
  return _mm512_test_epi8_mask(all, all);
#elif EHRSEQ_ISA_LEVEL == 1
  uint64_t bits = 0;
  for (int i = 0; i < 2; ++i) {
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(bytes + 32 * i));
    const __m256i empty = _mm256_cmpeq_epi8(half, _mm256_setzero_si256());
    bits |= uint64_t{static_cast<uint32_t>(_mm256_movemask_epi8(empty))} << (32 * i);
  }
  return ~bits;
#else
  constexpr uint64_t kLow = 0x7f7f7f7f7f7f7f7f;
  uint64_t bits = 0;
  for (int i = 0; i < 8; ++i) {
    uint64_t word;
    std::memcpy(&word, bytes + 8 * i, 8);
    if (word == 0) continue;
    const uint64_t ones = ((((word & kLow) + kLow) | word) >> 7) & 0x0101010101010101;
    bits |= (ones * 0x0102040810204080 >> 56) << (8 * i);
  }
  return bits;
#endif
}

#if EHRSEQ_ISA_LEVEL == 0
template <typename mask_t>
EHRSEQ_INLINE uint64_t set_of_64(const mask_t* mask) {
  uint64_t bits = 0;
  for (int i = 0; i < 64; ++i) bits |= uint64_t{!(mask[i] == mask_t(0))} << i;
  return bits;
}
#else
// Bit i says whether number i of one vector is not 0.
EHRSEQ_INLINE uint64_t set_of_vector(const int32_t* mask) {
#if EHRSEQ_ISA_LEVEL == 2
  const __m512i all = _mm512_loadu_si512(mask);
  return _mm512_test_epi32_mask(all, all);
#else
  const __m256i all = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(mask));
  const __m256i empty = _mm256_cmpeq_epi32(all, _mm256_setzero_si256());
  return ~_mm256_movemask_ps(_mm256_castsi256_ps(empty)) & 0xff;
#endif
}

EHRSEQ_INLINE uint64_t set_of_vector(const int64_t* mask) {
#if EHRSEQ_ISA_LEVEL == 2
  const __m512i all = _mm512_loadu_si512(mask);
  return _mm512_test_epi64_mask(all, all);
#else
  const __m256i all = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(mask));
  const __m256i empty = _mm256_cmpeq_epi64(all, _mm256_setzero_si256());
  return ~_mm256_movemask_pd(_mm256_castsi256_pd(empty)) & 0xf;
#endif
}

// Unequal or unordered, as a NaN is not 0.
EHRSEQ_INLINE uint64_t set_of_vector(const float* mask) {
#if EHRSEQ_ISA_LEVEL == 2
  return _mm512_cmp_ps_mask(_mm512_loadu_ps(mask), _mm512_setzero_ps(), _CMP_NEQ_UQ);
#else
  return _mm256_movemask_ps(_mm256_cmp_ps(_mm256_loadu_ps(mask), _mm256_setzero_ps(), _CMP_NEQ_UQ));
#endif
}

EHRSEQ_INLINE uint64_t set_of_vector(const double* mask) {
#if EHRSEQ_ISA_LEVEL == 2
  return _mm512_cmp_pd_mask(_mm512_loadu_pd(mask), _mm512_setzero_pd(), _CMP_NEQ_UQ);
#else
  return _mm256_movemask_pd(_mm256_cmp_pd(_mm256_loadu_pd(mask), _mm256_setzero_pd(), _CMP_NEQ_UQ));
#endif
}

template <typename mask_t>
EHRSEQ_INLINE uint64_t set_of_64(const mask_t* mask) {
  constexpr int kNumbers = (EHRSEQ_ISA_LEVEL == 2 ? 64 : 32) / sizeof(mask_t);
  uint64_t bits = 0;
  for (int i = 0; i < 64; i += kNumbers) bits |= set_of_vector(mask + i) << i;
  return bits;
}
#endif

}  // namespace ehrseq::EHRSEQ_ISA
