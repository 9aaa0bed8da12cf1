// Vectors of any number of lanes, in the compiler's vector types: their loads and stores, and what
// 16-bit numbers are in them. Everything else that computes with vectors builds on this.
//
// No include guard: included inside the namespace of one instruction set (see common/each_isa.h),
// once for each.

template <typename T, int64_t kCount>
struct LanesOf {
  typedef T type __attribute__((vector_size(kCount * sizeof(T))));
};

template <typename T, int64_t kCount>
using lanes_t = typename LanesOf<T, kCount>::type;

template <int64_t kCount, typename T>
EHRSEQ_INLINE lanes_t<T, kCount> load_exactly(const T* from) {
  lanes_t<T, kCount> lanes;
  __builtin_memcpy(&lanes, from, sizeof lanes);
  return lanes;
}

// ---------------------------------------------------------------------------------------------
// Loads: 16-bit numbers become float exactly

template <int64_t kCount>
EHRSEQ_INLINE lanes_t<uint32_t, kCount> load_words(const void* from) {
  using Words [[maybe_unused]] = lanes_t<uint32_t, kCount>;
#if EHRSEQ_ISA_LEVEL >= 2
  if constexpr (kCount == 16) {
    return (Words)_mm512_cvtepu16_epi32(_mm256_loadu_si256(static_cast<const __m256i*>(from)));
  }
#elif EHRSEQ_ISA_LEVEL == 1
  if constexpr (kCount == 8) {
    return (Words)_mm256_cvtepu16_epi32(_mm_loadu_si128(static_cast<const __m128i*>(from)));
  }
#endif
  lanes_t<uint16_t, kCount> halves;
  __builtin_memcpy(&halves, from, sizeof halves);
  if constexpr (kCount == 4) {
    return Words{halves[0], halves[1], halves[2], halves[3]};
  } else {
    return __builtin_convertvector(halves, Words);
  }
}

template <int64_t kCount>
EHRSEQ_INLINE lanes_t<float, kCount> load_lanes(const float* from) {
  return load_exactly<kCount>(from);
}

template <int64_t kCount>
EHRSEQ_INLINE lanes_t<double, kCount> load_lanes(const double* from) {
  return load_exactly<kCount>(from);
}

template <int64_t kCount>
EHRSEQ_INLINE lanes_t<float, kCount> load_lanes(const BFloat16* from) {
  return (lanes_t<float, kCount>)(load_words<kCount>(from) << 16);
}

template <int64_t kCount>
EHRSEQ_INLINE lanes_t<float, kCount> load_lanes(const Half* from) {
  using Floats = lanes_t<float, kCount>;
  using Words = lanes_t<uint32_t, kCount>;
#if EHRSEQ_ISA_LEVEL >= 2
  if constexpr (kCount == 16) {
    return (Floats)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
  }
#elif EHRSEQ_ISA_LEVEL == 1
  if constexpr (kCount == 8) {
    return (Floats)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  }
#endif
  const Words half = load_words<kCount>(from);
  const Words magnitude = half & 0x7fff;
  // The exponent's bias differs by 112. Subnormal numbers are counted in units of 2^-24: there is
  // no subnormal float on the way, which a processor may have been told to take for zero.
  const Words normal = (magnitude << 13) + (uint32_t{112} << 23);
  const Floats subnormal =
      __builtin_convertvector((lanes_t<int32_t, kCount>)magnitude, Floats) * 0x1p-24f;
  const Words is_subnormal = (Words)(magnitude < 0x400);
  const Words not_finite = (Words)(magnitude >= 0x7c00) & 0x7f800000;
  const Words bits = (is_subnormal & (Words)subnormal) | (~is_subnormal & (normal | not_finite));
  return (Floats)(bits | ((half & 0x8000) << 16));
}

// ---------------------------------------------------------------------------------------------
// Stores: rounded to nearest, ties to even; a NaN stays one

template <int64_t kCount, typename T>
EHRSEQ_INLINE void store_exactly(T* to, const lanes_t<T, kCount>& lanes) {
  __builtin_memcpy(to, &lanes, sizeof lanes);
}

template <int64_t kCount>
EHRSEQ_INLINE void store_words(void* to, const lanes_t<uint32_t, kCount>& words) {
  const auto halves = __builtin_convertvector(words, lanes_t<uint16_t, kCount>);
  __builtin_memcpy(to, &halves, sizeof halves);
}

template <int64_t kCount>
EHRSEQ_INLINE void store_lanes(float* to, const lanes_t<float, kCount>& lanes) {
  store_exactly<kCount>(to, lanes);
}

template <int64_t kCount>
EHRSEQ_INLINE void store_lanes(double* to, const lanes_t<double, kCount>& lanes) {
  store_exactly<kCount>(to, lanes);
}

template <int64_t kCount>
EHRSEQ_INLINE void store_lanes(BFloat16* to, const lanes_t<float, kCount>& lanes) {
  using Words = lanes_t<uint32_t, kCount>;
  const Words bits = (Words)lanes;
  const Words nearest = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const Words is_nan = (Words)(lanes != lanes);
  store_words<kCount>(to, (is_nan & 0x7fc0) | (~is_nan & nearest));
}

template <int64_t kCount>
EHRSEQ_INLINE void store_lanes(Half* to, const lanes_t<float, kCount>& lanes) {
#if EHRSEQ_ISA_LEVEL >= 1
  [[maybe_unused]] constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
#endif
#if EHRSEQ_ISA_LEVEL >= 2
  if constexpr (kCount == 16) {
    const auto halves = _mm512_cvtps_ph((__m512)lanes, kNearest);
    return _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), halves);
  }
#elif EHRSEQ_ISA_LEVEL == 1
  if constexpr (kCount == 8) {
    const auto halves = _mm256_cvtps_ph((__m256)lanes, kNearest);
    return _mm_storeu_si128(reinterpret_cast<__m128i*>(to), halves);
  }
#endif
  using Words = lanes_t<uint32_t, kCount>;
  const Words bits = (Words)lanes;
  const Words magnitude = bits & 0x7fffffff;
  const Words rebiased = magnitude - (uint32_t{112} << 23);
  const Words normal = (rebiased + 0xfff + ((rebiased >> 13) & 1)) >> 13;
  // 0.5 has the place value of the smallest half: adding it rounds to a number of those.
  const Words subnormal = (Words)((lanes_t<float, kCount>)magnitude + 0.5f) - 0x3f000000;
  const Words is_subnormal = (Words)(magnitude < 0x38800000);
  const Words is_infinite = (Words)(magnitude >= 0x477ff000);
  const Words is_nan = (Words)(magnitude > 0x7f800000);
  const Words finite = (is_subnormal & subnormal) | (~is_subnormal & normal);
  const Words half = (is_infinite & 0x7c00) | (~is_infinite & finite) | (is_nan & 0x7e00);
  store_words<kCount>(to, half | ((bits >> 16) & 0x8000));
}
