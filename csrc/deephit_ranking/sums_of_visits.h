// Sums of the visits before each visit and after it, for DeepHit's ranking loss.
//
// No include guard: row_kernels.h includes this, once for each instruction set.

#include "common/simd.h"
#include "common/vector_math.h"

namespace ehrseq::survival::ranking::EHRSEQ_ISA {

using namespace ehrseq::EHRSEQ_ISA;  // NOLINT: the lanes of the same instruction set

template <typename T>
EHRSEQ_INLINE int64_t whole_lanes(int64_t count) {
  return (count + kLanes<T> - 1) / kLanes<T> * kLanes<T>;
}

template <typename T>
EHRSEQ_INLINE double sum_of_wide(const Wide<T>& wide) {
  Doubles sum = wide.part[0];
  for (int i = 1; i < Wide<T>::kParts; ++i) sum += wide.part[i];
  return sum_of_lanes<double>(sum);
}

// Sums over visits are made of four at a time in double precision: as wide as most processors add
// doubles at once, and few steps from one four to the next.
using Four = lanes_t<double, 4>;
using Places = lanes_t<int64_t, 4>;

template <typename T>
EHRSEQ_INLINE Four load_four(const T* from) {
  return __builtin_convertvector(load_exactly<4>(from), Four);
}

template <typename T>
EHRSEQ_INLINE void store_four(T* to, const Four& lanes) {
  store_exactly<4>(to, __builtin_convertvector(lanes, lanes_t<T, 4>));
}

// Rows are padded to whole vectors, which may be of two.
template <typename T>
constexpr bool kHasFours = kLanes<T> >= 4;

// Where shuffles of vectors are one instruction, a whole vector at a time in T: parts of one that
// were stored could not be loaded as a vector before they have left the processor's queue.
constexpr bool kHasWideShuffles = EHRSEQ_ISA_LEVEL >= 2;

// Each lane from the one so many places before, or (kPlaces below 0) after; 0 where there is none.
template <int kPlaces, typename T>
EHRSEQ_INLINE Lanes<T> moved(const Lanes<T>& lanes) {
  return __builtin_shuffle(lanes, Lanes<T>{}, lane_numbers<T>() - kPlaces);
}

// Of each lane and all before it, or (kStep = -1) after it.
template <int kStep, typename T>
EHRSEQ_INLINE Lanes<T> sums_of_lanes(const Lanes<T>& lanes) {
  Lanes<T> sums = lanes + moved<kStep, T>(lanes);
  sums += moved<2 * kStep, T>(sums);
  sums += moved<4 * kStep, T>(sums);
  if constexpr (kLanes<T> == 16) sums += moved<8 * kStep, T>(sums);
  return sums;
}

template <int kLane, typename T>
EHRSEQ_INLINE Lanes<T> all_lanes_as(const Lanes<T>& lanes) {
  return __builtin_shuffle(lanes, Mask<T>{} + kLane);
}

template <typename T>
EHRSEQ_INLINE void cumulative_sums_by_vectors(const T* values, int64_t visits, T* sums) {
  Lanes<T> before{};  // the sum of all earlier ones, in every lane
  for (int64_t at = 0; at < visits; at += kLanes<T>) {
    const Lanes<T> own = sums_of_lanes<1, T>(load(values + at));
    store(sums + at, before + own);
    before += all_lanes_as<kLanes<T> - 1, T>(own);
  }
}

template <typename T>
EHRSEQ_INLINE double sums_from_the_end_by_vectors(T* values, const T* weights, int64_t begin,
                                                  int64_t visits) {
  Lanes<T> dots{};
  Lanes<T> after{};  // the sum of all later ones, in every lane
  for (int64_t at = whole_lanes<T>(visits) - kLanes<T>; at >= begin; at -= kLanes<T>) {
    const Lanes<T> own = sums_of_lanes<-1, T>(load(values + at));
    const Lanes<T> sums = after + own;
    store(values + at, sums);
    dots += sums * load(weights + at);
    after += all_lanes_as<0, T>(own);
  }
  return sum_of_wide<T>(widen(dots));
}

// body(count, first cause) with `count` a constant, for all causes by fours: sums that do not wait
// for one another.
template <typename Body>
EHRSEQ_INLINE void for_causes(int64_t classes, const Body& body) {
  int64_t cause = 0;
  for (; cause + 4 <= classes; cause += 4) body(std::integral_constant<int, 4>{}, cause);
  if (classes - cause == 3) body(std::integral_constant<int, 3>{}, cause);
  if (classes - cause == 2) body(std::integral_constant<int, 2>{}, cause);
  if (classes - cause == 1) body(std::integral_constant<int, 1>{}, cause);
}

// Cumulative sums of the first `visits` visits. With one value per visit the whole vectors around
// them are read and written.
template <typename T>
EHRSEQ_INLINE void cumulative_sums(const T* values, int64_t visits, int64_t classes, T* sums) {
  if (classes > 1 || !kHasFours<T>) {
    for_causes(classes, [&](auto count, int64_t cause) __attribute__((always_inline)) {
      constexpr int kCount = decltype(count)::value;
      double sum[kCount] = {};
      for (int64_t at = cause; at < visits * classes; at += classes) {
        for (int c = 0; c < kCount; ++c) {
          sum[c] += static_cast<double>(values[at + c]);
          sums[at + c] = static_cast<T>(sum[c]);
        }
      }
    });
    return;
  }
  if constexpr (kHasWideShuffles) return cumulative_sums_by_vectors(values, visits, sums);
  const Four zeros{};
  Four before{};  // the sum of all earlier ones, in every lane
  for (int64_t at = 0; at < visits; at += 4) {
    const Four x = load_four(values + at);
    const Four twos = x + __builtin_shuffle(x, zeros, Places{4, 0, 1, 2});
    const Four fours = twos + __builtin_shuffle(twos, zeros, Places{4, 5, 0, 1});
    store_four(sums + at, before + fours);
    before += __builtin_shuffle(fours, Places{3, 3, 3, 3});
  }
}

// Each value from position `begin` on becomes the sum of itself and those of later visits; the sum
// of each result times its weight. With one value per visit `begin` is that of a vector, and those
// after the last up to a whole vector, which have to be zeros, are read.
template <typename T>
EHRSEQ_INLINE double sums_from_the_end(T* values, const T* weights, int64_t begin, int64_t visits,
                                       int64_t classes) {
  if (classes > 1 || !kHasFours<T>) {
    double of_all = 0;
    for_causes(classes, [&](auto count, int64_t cause) __attribute__((always_inline)) {
      constexpr int kCount = decltype(count)::value;
      double sum[kCount] = {};
      double dot[kCount] = {};
      for (int64_t at = (visits - 1) * classes + cause; at >= begin; at -= classes) {
        for (int c = 0; c < kCount; ++c) {
          sum[c] += static_cast<double>(values[at + c]);
          values[at + c] = static_cast<T>(sum[c]);
          dot[c] += sum[c] * static_cast<double>(weights[at + c]);
        }
      }
      for (const double of_cause : dot) of_all += of_cause;
    });
    return of_all;
  }
  if constexpr (kHasWideShuffles) {
    return sums_from_the_end_by_vectors(values, weights, begin, visits);
  }
  const Four zeros{};
  Four dots{};
  Four after{};  // the sum of all later ones, in every lane
  for (int64_t at = (visits + 3) / 4 * 4 - 4; at >= begin; at -= 4) {
    const Four x = load_four(values + at);
    const Four twos = x + __builtin_shuffle(x, zeros, Places{1, 2, 3, 4});
    const Four fours = twos + __builtin_shuffle(twos, zeros, Places{2, 3, 4, 5});
    const Four sums = after + fours;
    store_four(values + at, sums);
    dots += sums * load_four(weights + at);
    after += __builtin_shuffle(fours, Places{0, 0, 0, 0});
  }
  return (dots[0] + dots[1]) + (dots[2] + dots[3]);
}

}  // namespace ehrseq::survival::ranking::EHRSEQ_ISA
