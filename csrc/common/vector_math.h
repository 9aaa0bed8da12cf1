// As many numbers at a time as the instruction set's registers hold, in the compiler's vector
// types: a kernel is written once. Wider ones would give the same bits on every instruction set,
// but GCC takes comparisons and choices between lanes that fit no register apart into scalars and
// branches.
//
// No include guard: files that common/each_isa.h compiles for several instruction sets include
// this, once for each.

#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "common/dtypes.h"
#include "common/simd.h"

namespace ehrseq::EHRSEQ_ISA {

#include "common/lanes.h"

constexpr int64_t kVectorBytes = EHRSEQ_ISA_LEVEL >= 2 ? 64 : 16 << EHRSEQ_ISA_LEVEL;

template <typename T>
constexpr int64_t kLanes = kVectorBytes / static_cast<int64_t>(sizeof(T));

template <typename T>
using Lanes = lanes_t<T, kLanes<T>>;

// The integer of the same width: what comparisons of lanes give (all bits set where true).
template <typename T>
using bits_t = std::conditional_t<sizeof(T) == 8, int64_t, int32_t>;

template <typename T>
using Mask = Lanes<bits_t<T>>;

using Doubles = Lanes<double>;

template <typename T>
EHRSEQ_INLINE Lanes<T> broadcast(T value) {
  return value - Lanes<T>{};  // unlike value + 0, nothing that a compiler has to compute
}

template <typename T>
EHRSEQ_INLINE Mask<T> lane_numbers() {
  if constexpr (kLanes<T> == 16) {
    return Mask<T>{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  } else if constexpr (kLanes<T> == 8) {
    return Mask<T>{0, 1, 2, 3, 4, 5, 6, 7};
  } else if constexpr (kLanes<T> == 4) {
    return Mask<T>{0, 1, 2, 3};
  } else {
    return Mask<T>{0, 1};
  }
}

// Lanes of T as doubles, in as many vectors as it takes.
template <typename T>
struct Wide {
  static constexpr int kParts = kLanes<T> / kLanes<double>;
  Doubles part[kParts];
};

using HalfOfFloats = lanes_t<float, kLanes<double>>;

// GCC 12 converts vectors of AVX-512 by halves, and joins these.
EHRSEQ_INLINE Wide<float> widen(const Lanes<float>& lanes) {
#if EHRSEQ_ISA_LEVEL >= 2
  return {{(Doubles)_mm512_cvtps_pd(_mm512_castps512_ps256((__m512)lanes)),
           (Doubles)_mm512_cvtps_pd(_mm512_extractf32x8_ps((__m512)lanes, 1))}};
#else
  HalfOfFloats halves[2];
  std::memcpy(halves, &lanes, sizeof halves);
  return {
      {__builtin_convertvector(halves[0], Doubles), __builtin_convertvector(halves[1], Doubles)}};
#endif
}

EHRSEQ_INLINE Wide<double> widen(const Lanes<double>& lanes) { return {{lanes}}; }

EHRSEQ_INLINE Lanes<float> narrow(const Wide<float>& wide) {
#if EHRSEQ_ISA_LEVEL >= 2
  return (Lanes<float>)_mm512_insertf32x8(
      _mm512_castps256_ps512(_mm512_cvtpd_ps((__m512d)wide.part[0])),
      _mm512_cvtpd_ps((__m512d)wide.part[1]), 1);
#else
  const HalfOfFloats halves[2] = {__builtin_convertvector(wide.part[0], HalfOfFloats),
                                  __builtin_convertvector(wide.part[1], HalfOfFloats)};
  Lanes<float> lanes;
  std::memcpy(&lanes, halves, sizeof lanes);
  return lanes;
#endif
}

EHRSEQ_INLINE Lanes<double> narrow(const Wide<double>& wide) { return wide.part[0]; }

// A 16-bit number is float in its lane.
template <typename T>
EHRSEQ_INLINE auto load(const T* from) {
  return load_lanes<kLanes<accumulator_t<T>>>(from);
}

template <typename T>
EHRSEQ_INLINE void store(T* to, const Lanes<accumulator_t<T>>& lanes) {
  store_lanes<kLanes<accumulator_t<T>>>(to, lanes);
}

// The first `count` lanes, at most all, and zeros after them: nothing after them is read.
template <typename T>
EHRSEQ_INLINE auto load_first(const T* from, int64_t count) {
  using sum_t = accumulator_t<T>;
#if EHRSEQ_ISA_LEVEL >= 2
  const uint32_t lanes = (uint32_t{1} << count) - 1;
  if constexpr (std::is_same_v<T, float>) {
    return (Lanes<float>)_mm512_maskz_loadu_ps(static_cast<__mmask16>(lanes), from);
  } else if constexpr (std::is_same_v<T, double>) {
    return (Lanes<double>)_mm512_maskz_loadu_pd(static_cast<__mmask8>(lanes), from);
  } else {
    static_assert(sizeof(T) == 2);
    const __m256i words = _mm256_maskz_loadu_epi16(static_cast<__mmask16>(lanes), from);
    T some[kLanes<sum_t>];
    std::memcpy(static_cast<void*>(some), &words, sizeof some);
    return load(some);
  }
#else
  T some[kLanes<sum_t>] = {};
  for (int64_t i = 0; i < count; ++i) some[i] = from[i];
  return load(some);
#endif
}

// Nothing after the first `count` lanes is written.
template <typename T>
EHRSEQ_INLINE void store_first(T* to, int64_t count, const Lanes<accumulator_t<T>>& lanes) {
#if EHRSEQ_ISA_LEVEL >= 2
  const uint32_t mask = (uint32_t{1} << count) - 1;
  if constexpr (std::is_same_v<T, float>) {
    return _mm512_mask_storeu_ps(to, static_cast<__mmask16>(mask), (__m512)lanes);
  } else if constexpr (std::is_same_v<T, double>) {
    return _mm512_mask_storeu_pd(to, static_cast<__mmask8>(mask), (__m512d)lanes);
  } else {
    static_assert(sizeof(T) == 2);
    T some[kLanes<accumulator_t<T>>];
    store(some, lanes);
    __m256i words;
    std::memcpy(&words, static_cast<const void*>(some), sizeof words);
    return _mm256_mask_storeu_epi16(to, static_cast<__mmask16>(mask), words);
  }
#else
  T some[kLanes<accumulator_t<T>>];
  store(some, lanes);
  for (int64_t i = 0; i < count; ++i) to[i] = some[i];
#endif
}

// Joins lane i of the first half with lane i of the other, and the half that this gives likewise: a
// fixed order.
template <typename T, int64_t kCount, typename Join>
EHRSEQ_INLINE T join_halves(const lanes_t<T, kCount>& lanes, Join&& join) {
  if constexpr (kCount == 2) {
    return join(lanes[0], lanes[1]);
  } else {
    lanes_t<T, kCount / 2> halves[2];
    std::memcpy(halves, &lanes, sizeof halves);
    return join_halves<T, kCount / 2>(join(halves[0], halves[1]), join);
  }
}

template <typename T, typename Join>
EHRSEQ_INLINE T join_lanes(const Lanes<T>& lanes, Join&& join) {
  return join_halves<T, kLanes<T>>(lanes, join);
}

template <typename T>
EHRSEQ_INLINE T sum_of_lanes(const Lanes<T>& lanes) {
  return join_lanes<T>(
      lanes, [](const auto& a, const auto& b) __attribute__((always_inline)) { return a + b; });
}

template <typename T>
EHRSEQ_INLINE T product_of_lanes(const Lanes<T>& lanes) {
  return join_lanes<T>(
      lanes, [](const auto& a, const auto& b) __attribute__((always_inline)) { return a * b; });
}

// Whether any lane of a comparison is true.
template <typename T>
EHRSEQ_INLINE bool any_lane(const Mask<T>& lanes) {
#if EHRSEQ_ISA_LEVEL >= 2
  if constexpr (sizeof(T) == 4) return _mm512_movepi32_mask((__m512i)lanes) != 0;
  return _mm512_movepi64_mask((__m512i)lanes) != 0;
#else
  return join_lanes<int64_t>((Mask<double>)lanes,
                             [](const auto& a, const auto& b)
                                 __attribute__((always_inline)) { return a | b; }) != 0;
#endif
}

// exp(r) for |r| <= ln(2)/2 as 1 + r c1 + r^2 c2 + ..., interpolated at Chebyshev nodes: relative
// error 5e-9 for float, 9e-18 for double. Exactly 1 at 0.
template <typename T>
struct ExpTables;

template <>
struct ExpTables<float> {
  static constexpr float kCoefficients[] = {1.0000000108f,   0.50000000135f, 0.16666504937f,
                                            0.041666464602f, 0.00836918438f, 0.00139336858626f};
  static constexpr float kLog2High = 0.693145751953125f;  // 15 bits: n times this is exact
  static constexpr float kLog2Low = 1.42860682031e-6f;
  static constexpr float kLowest = -87.33f;     // below, e^x is no normal number
  static constexpr float kRounder = 0x1.8p23f;  // adding it rounds to an integer
  static constexpr int32_t kExponentBias = 127;
  static constexpr int kExponentShift = 23;
};

template <>
struct ExpTables<double> {
  static constexpr double kCoefficients[] = {1.0,
                                             0.50000000000000056451,
                                             0.16666666666666671008,
                                             0.041666666666572767692,
                                             0.0083333333333261120526,
                                             0.0013888888932619635148,
                                             0.00019841269874901259234,
                                             0.000024801504180837138252,
                                             2.7557255297969644392e-6,
                                             2.7626426376580332797e-7,
                                             2.5105259538448493419e-8};
  static constexpr double kLog2High = 0.6931471805592082;  // 40 bits
  static constexpr double kLog2Low = 7.3710025651677989018e-13;
  static constexpr double kLowest = -708.3;
  static constexpr double kRounder = 0x1.8p52;
  static constexpr int64_t kExponentBias = 1023;
  static constexpr int kExponentShift = 52;
};

// e^x for x <= 0, within about one unit in the last place; 0 where e^x is not a normal number. A
// NaN stays one. As right for x > 0, as long as e^x is far from overflow.
template <typename T>
EHRSEQ_INLINE Lanes<T> exp_nonpositive(const Lanes<T>& exponent_of_e) {
  using Tables = ExpTables<T>;
  constexpr int kDegree = sizeof(Tables::kCoefficients) / sizeof(T);
  const Mask<T> vanishes = exponent_of_e < Tables::kLowest;
  const Lanes<T> x = vanishes ? broadcast(Tables::kLowest) : exponent_of_e;
  const Lanes<T> shifted = x * T(1.4426950408889634074) + Tables::kRounder;
  const Lanes<T> n = shifted - Tables::kRounder;
  const Lanes<T> r = (x - n * Tables::kLog2High) - n * Tables::kLog2Low;
  Lanes<T> series = broadcast(Tables::kCoefficients[kDegree - 1]);
  for (int i = kDegree - 2; i >= 0; --i) series = series * r + Tables::kCoefficients[i];
  series = series * r + T(1);
  const Mask<T> exponent =
      (Mask<T>)shifted - (Mask<T>)broadcast(Tables::kRounder) + Tables::kExponentBias;
  const Lanes<T> power_of_two = (Lanes<T>)(exponent << Tables::kExponentShift);
  return vanishes ? Lanes<T>{} : series * power_of_two;
}

// log(u) for u >= 0, within about one unit in the last place; -inf at 0 and where u is subnormal. A
// NaN or an infinity stays one. With u = 2^e m, m in [1/√2, √2), and s = (m - 1) / (m + 1):
// log(m) = 2s + 2s^3/3 + ..., interpolated in s^2 at Chebyshev nodes, relative error 4e-18.
EHRSEQ_INLINE Doubles log_nonnegative(const Doubles& u) {
  constexpr double kCoefficients[] = {0.66666666666666696969, 0.39999999999899197894,
                                      0.28571428626114518292, 0.22222211112104947364,
                                      0.18182890778026130313, 0.15331666676597174341,
                                      0.14617128399807299883};
  constexpr int64_t kFraction = (int64_t{1} << 52) - 1;
  constexpr int64_t kOne = int64_t{1023} << 52;
  const Mask<double> bits = (Mask<double>)u;
  const Doubles from_one_to_two = (Doubles)((bits & kFraction) | kOne);
  const Mask<double> is_large = from_one_to_two > 1.4142135623730951;
  const Doubles m = is_large ? from_one_to_two * 0.5 : from_one_to_two;
  const Doubles exponent = __builtin_convertvector((bits >> 52) - 1023 - is_large, Doubles);
  const Doubles s = (m - 1.0) / (m + 1.0);
  const Doubles z = s * s;
  Doubles series = broadcast(kCoefficients[6]);
  for (int i = 5; i >= 0; --i) series = series * z + kCoefficients[i];
  const Doubles log = exponent * 0.69314718055994530942 + (s * 2.0 + s * (z * series));
  return u < DBL_MIN ? broadcast(-HUGE_VAL) : (u <= DBL_MAX ? log : u);
}

// log(1 + q) for q >= 0, with the digits of a small q.
EHRSEQ_INLINE Doubles log1p_nonnegative(const Doubles& q) {
  const Doubles u = 1.0 + q;
  return log_nonnegative(u) + (q - (u - 1.0)) / u;
}

}  // namespace ehrseq::EHRSEQ_ISA
