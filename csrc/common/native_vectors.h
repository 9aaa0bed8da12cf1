// Vectors as wide as the instruction set's registers, for loops without operations across lanes:
// there the width changes the speed and no bit of a result. (vector_math.h has 64 bytes everywhere,
// which a lesser processor keeps in memory.)
//
// No include guard: files that common/each_isa.h compiles for several instruction sets include
// this, once for each.

#include <cstdint>
#include <cstring>

#include "common/dtypes.h"
#include "common/simd.h"

namespace ehrseq::EHRSEQ_ISA {

constexpr int64_t kNativeBytes = 16 << EHRSEQ_ISA_LEVEL;

template <typename T, int64_t kCount>
struct NativeOf {
  typedef T type __attribute__((vector_size(kCount * sizeof(T))));
};

template <typename T>
constexpr int64_t kWidth = kNativeBytes / static_cast<int64_t>(sizeof(T));

template <typename T>
using Native = typename NativeOf<T, kWidth<T>>::type;

// What comparisons give: all bits set where true.
template <typename T>
using NativeMask = Native<std::conditional_t<sizeof(T) == 8, int64_t, int32_t>>;

// int32 numbers in lanes as wide as those of T, in memory next to one another.
template <typename T>
using PackedIds = typename NativeOf<int32_t, kWidth<T>>::type;

using NativeWords = Native<uint32_t>;

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

// ---------------------------------------------------------------------------------------------
// Loads: 16-bit numbers become float exactly

EHRSEQ_INLINE Native<float> load_native(const float* from) {
  Native<float> lanes;
  std::memcpy(&lanes, from, sizeof lanes);
  return lanes;
}

EHRSEQ_INLINE Native<double> load_native(const double* from) {
  Native<double> lanes;
  std::memcpy(&lanes, from, sizeof lanes);
  return lanes;
}

EHRSEQ_INLINE NativeWords load_words(const void* from) {
#if EHRSEQ_ISA_LEVEL == 2
  return (NativeWords)_mm512_cvtepu16_epi32(_mm256_loadu_si256(static_cast<const __m256i*>(from)));
#elif EHRSEQ_ISA_LEVEL == 1
  return (NativeWords)_mm256_cvtepu16_epi32(_mm_loadu_si128(static_cast<const __m128i*>(from)));
#else
  uint16_t halves[kWidth<uint32_t>];
  std::memcpy(halves, from, sizeof halves);
  return NativeWords{halves[0], halves[1], halves[2], halves[3]};
#endif
}

EHRSEQ_INLINE Native<float> load_native(const BFloat16* from) {
  return (Native<float>)(load_words(from) << 16);
}

EHRSEQ_INLINE Native<float> load_native(const Half* from) {
#if EHRSEQ_ISA_LEVEL == 2
  return (Native<float>)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
#elif EHRSEQ_ISA_LEVEL == 1
  return (Native<float>)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#else
  const NativeWords half = load_words(from);
  const NativeWords magnitude = half & 0x7fff;
  // As in vector_math.h: no subnormal float on the way.
  const NativeWords normal = (magnitude << 13) + (uint32_t{112} << 23);
  const auto subnormal =
      __builtin_convertvector((NativeMask<float>)magnitude, Native<float>) * 0x1p-24f;
  const NativeWords is_subnormal = (NativeWords)(magnitude < 0x400);
  const NativeWords not_finite = (NativeWords)(magnitude >= 0x7c00) & 0x7f800000;
  const NativeWords bits =
      (is_subnormal & (NativeWords)subnormal) | (~is_subnormal & (normal | not_finite));
  return (Native<float>)(bits | ((half & 0x8000) << 16));
#endif
}

template <typename T>
EHRSEQ_INLINE NativeMask<T> load_ids(const int32_t* from) {
  PackedIds<T> ids;
  std::memcpy(&ids, from, sizeof ids);
  return __builtin_convertvector(ids, NativeMask<T>);
}

// ---------------------------------------------------------------------------------------------
// Stores: rounded to nearest, ties to even; a NaN stays one

EHRSEQ_INLINE void store_native(float* to, const Native<float>& lanes) {
  std::memcpy(to, &lanes, sizeof lanes);
}

EHRSEQ_INLINE void store_native(double* to, const Native<double>& lanes) {
  std::memcpy(to, &lanes, sizeof lanes);
}

EHRSEQ_INLINE void store_words(void* to, const NativeWords& words) {
  const auto halves =
      __builtin_convertvector(words, typename NativeOf<uint16_t, kWidth<uint32_t>>::type);
  std::memcpy(to, &halves, sizeof halves);
}

EHRSEQ_INLINE void store_native(BFloat16* to, const Native<float>& lanes) {
  const NativeWords bits = (NativeWords)lanes;
  const NativeWords nearest = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const NativeWords is_nan = (NativeWords)(lanes != lanes);
  store_words(to, (is_nan & 0x7fc0) | (~is_nan & nearest));
}

EHRSEQ_INLINE void store_native(Half* to, const Native<float>& lanes) {
#if EHRSEQ_ISA_LEVEL == 2
  constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtps_ph((__m512)lanes, kNearest));
#elif EHRSEQ_ISA_LEVEL == 1
  constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph((__m256)lanes, kNearest));
#else
  const NativeWords bits = (NativeWords)lanes;
  const NativeWords magnitude = bits & 0x7fffffff;
  const NativeWords rebiased = magnitude - (uint32_t{112} << 23);
  const NativeWords normal = (rebiased + 0xfff + ((rebiased >> 13) & 1)) >> 13;
  // 0.5 has the place value of the smallest half: adding it rounds to a number of those.
  const NativeWords subnormal = (NativeWords)((Native<float>)magnitude + 0.5f) - 0x3f000000;
  const NativeWords is_subnormal = (NativeWords)(magnitude < 0x38800000);
  const NativeWords is_infinite = (NativeWords)(magnitude >= 0x477ff000);
  const NativeWords is_nan = (NativeWords)(magnitude > 0x7f800000);
  const NativeWords finite = (is_subnormal & subnormal) | (~is_subnormal & normal);
  const NativeWords half = (is_infinite & 0x7c00) | (~is_infinite & finite) | (is_nan & 0x7e00);
  store_words(to, half | ((bits >> 16) & 0x8000));
#endif
}

template <typename T>
EHRSEQ_INLINE void store_ids(int32_t* to, const NativeMask<T>& lanes) {
  const auto ids = __builtin_convertvector(lanes, PackedIds<T>);
  std::memcpy(to, &ids, sizeof ids);
}

}  // namespace ehrseq::EHRSEQ_ISA
