// DeepHit's ranking loss, row by row of logits over time.
//
// With F the cumulative sum of a patient's softmax (the class "beyond" having the logit 0), and
// a = F / σ the exponents, the pairs of an event of i at time T and of all j at risk after it add
//   Σ_j w_i w_j exp(a_j(T) - a_i(T)) = w_i exp(m(T) - a_i(T)) · Σ_j w_j exp(a_j(T) - m(T)),
// where m(T) is the largest a_j(T): one sum for each time, shared by all its events. The sums are
// made of groups of patients, each with a largest exponent of its own, and joined in the groups'
// order. The gradient computes a again, of a softmax that was kept where its own memory can hold
// it: that costs less than memory for both.
//
// Compiled once for each instruction set, hence no include guard: see common/each_isa.h.

#include "common/simd.h"
#include "common/vector_math.h"
#include "deephit_ranking/rows.h"

namespace ehrseq::survival::ranking::EHRSEQ_ISA {

using namespace ehrseq::EHRSEQ_ISA;  // NOLINT: the lanes of the same instruction set

template <typename T>
EHRSEQ_INLINE int64_t whole_lanes(int64_t count) {
  return (count + kLanes<T> - 1) / kLanes<T> * kLanes<T>;
}

// Positions [begin, end) of a row, and the whole vectors around them.
template <typename T>
struct Range {
  int64_t begin;
  int64_t end;
  int64_t first;  // of the vectors
  int64_t last;

  Range(int64_t from, int64_t to)
      : begin(from), end(to), first(from / kLanes<T> * kLanes<T>), last(whole_lanes<T>(to)) {
    if (begin == end) last = first;
  }

  EHRSEQ_INLINE void fill_around(T* row, T value) const {
    if (first == last) return;
    std::fill(row + first, row + begin, value);
    std::fill(row + end, row + last, value);
  }
};

// Where the patient can be the later one of a pair.
template <typename T>
EHRSEQ_INLINE Range<T> later_of(const Outcome& outcome, const Settings& settings) {
  const bool survives_time = outcome.type == 0 && settings.censored_included;
  return Range<T>(outcome.entry * settings.classes,
                  (outcome.time + (survives_time ? 1 : 0)) * settings.classes);
}

template <typename T>
EHRSEQ_INLINE T largest_of_lanes(const Lanes<T>& lanes) {
  const Wide<T> wide = widen(lanes);
  const auto larger = [](const auto& a, const auto& b)
                          __attribute__((always_inline)) { return a > b ? a : b; };
  Doubles most = wide.part[0];
  for (int i = 1; i < Wide<T>::kParts; ++i) most = larger(most, wide.part[i]);
  return static_cast<T>(join_lanes<double>(most, larger));
}

template <typename T>
EHRSEQ_INLINE double sum_of_wide(const Wide<T>& wide) {
  double sum = 0;
  for (int i = 0; i < Wide<T>::kParts; ++i) sum += sum_of_lanes<double>(wide.part[i]);
  return sum;
}

// The softmax of the visits at risk and "beyond" in `mass`, zeros before them and up to a whole
// vector after them. A NaN or an infinite logit makes the whole row NaN.
template <typename T, typename scalar_t>
EHRSEQ_INLINE void softmax(const scalar_t* row, const Range<T>& at_risk, T* mass) {
  std::fill(mass, mass + at_risk.first, T(0));
  at_risk.fill_around(mass, -HUGE_VAL);
  Lanes<T> most{};  // the logit of "beyond"; a NaN is left to the sum
  const auto take = [&](int64_t at) __attribute__((always_inline)) {
    const Lanes<T> x = load(row + at);
    store(mass + at, x);
    most = x > most ? x : most;
  };
  int64_t at = at_risk.begin;
  for (; at + kLanes<T> <= at_risk.end; at += kLanes<T>) take(at);
  T largest = 0;
  if (at < at_risk.end && at > at_risk.begin) {
    take(at_risk.end - kLanes<T>);
  } else {
    for (; at < at_risk.end; ++at) {
      mass[at] = static_cast<T>(row[at]);
      largest = mass[at] > largest ? mass[at] : largest;
    }
  }
  largest = std::max(largest, largest_of_lanes<T>(most));

  Lanes<T> sums{};
  for (at = at_risk.first; at < at_risk.last; at += kLanes<T>) {
    const Lanes<T> term = exp_nonpositive<T>(load(mass + at) - largest);
    store(mass + at, term);
    sums += term;
  }
  const Lanes<T> beyond = exp_nonpositive<T>(broadcast(-largest));
  const double sum = static_cast<double>(beyond[0]) + sum_of_wide<T>(widen(sums));
  const T share = static_cast<T>(1 / sum);
  for (at = at_risk.first; at < at_risk.last; at += kLanes<T>) {
    store(mass + at, load(mass + at) * share);
  }
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
EHRSEQ_INLINE void cumulative_sums_by_vectors(const T* values, int64_t visits, double factor,
                                              T* sums) {
  Lanes<T> before{};  // the sum of all earlier ones, in every lane
  for (int64_t at = 0; at < visits; at += kLanes<T>) {
    const Lanes<T> own = sums_of_lanes<1, T>(load(values + at));
    store(sums + at, (before + own) * static_cast<T>(factor));
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

// Cumulative sums times `factor` of the first `visits` visits. With one value per visit the whole
// vectors around them are read and written.
template <typename T>
EHRSEQ_INLINE void cumulative_sums(const T* values, int64_t visits, int64_t classes, double factor,
                                   T* sums) {
  if (classes > 1 || !kHasFours<T>) {
    for_causes(classes, [&](auto count, int64_t cause) __attribute__((always_inline)) {
      constexpr int kCount = decltype(count)::value;
      double sum[kCount] = {};
      for (int64_t at = cause; at < visits * classes; at += classes) {
        for (int c = 0; c < kCount; ++c) {
          sum[c] += static_cast<double>(values[at + c]);
          sums[at + c] = static_cast<T>(sum[c] * factor);
        }
      }
    });
    return;
  }
  if constexpr (kHasWideShuffles) return cumulative_sums_by_vectors(values, visits, factor, sums);
  const Four zeros{};
  Four before{};  // the sum of all earlier ones, in every lane
  for (int64_t at = 0; at < visits; at += 4) {
    const Four x = load_four(values + at);
    const Four twos = x + __builtin_shuffle(x, zeros, Places{4, 0, 1, 2});
    const Four fours = twos + __builtin_shuffle(twos, zeros, Places{4, 5, 0, 1});
    store_four(sums + at, (before + fours) * factor);
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

template <typename T>
EHRSEQ_INLINE Range<T> at_risk_of(const Outcome& outcome, const Settings& settings) {
  return Range<T>(outcome.entry * settings.classes, outcome.visits * settings.classes);
}

// The exponents of a patient up to the visit of the outcome.
template <typename T>
EHRSEQ_INLINE void read_exponents(const T* mass, const Outcome& outcome, const Settings& settings,
                                  T* exponents) {
  cumulative_sums(mass, outcome.time + 1, settings.classes, 1 / settings.sigma, exponents);
}

// w e^(x - largest). With a weight of 0 the exponents may be above the largest: then it is 0, or
// NaN.
template <typename T>
EHRSEQ_INLINE Lanes<T> weighted(const Lanes<T>& x, const Lanes<T>& largest, T weight) {
  return weight == 0 ? x * T(0) : exp_nonpositive<T>(x - largest) * weight;
}

// Rows are read in part, which the processor's own prefetcher cannot follow.
constexpr int64_t kRowsAhead = 4;

template <typename T>
EHRSEQ_INLINE void prefetch(const T* row, const Outcome& outcome, const Settings& settings) {
  const T* end = row + outcome.visits * settings.classes;
  for (row += outcome.entry * settings.classes; row < end; row += 64 / sizeof(T)) {
    __builtin_prefetch(row);
  }
}

// Adds w e^(exponent - largest) of one patient where it is a later one. Around that range the
// exponents are -inf.
template <typename T>
EHRSEQ_INLINE void add_terms(const T* exponents, const Range<T>& range, T weight,
                             const Later<T>& later) {
  for (int64_t at = range.first; at < range.last; at += kLanes<T>) {
    const Lanes<T> x = load(exponents + at);
    const Lanes<T> term = weighted(x, load(later.largest + at), weight);
    const Wide<T> wide = widen(x == T(-HUGE_VAL) ? Lanes<T>{} : term);
    for (int part = 0; part < Wide<T>::kParts; ++part) {
      double* sum = later.sum + at + part * kLanes<double>;
      store(sum, load(sum) + wide.part[part]);
    }
  }
}

// `memory` has a row of mass, and one of exponents for each patient, if they are needed twice.
template <typename scalar_t>
void sum_rows(const Settings& settings, const Rows<scalar_t>& rows,
              const Later<accumulator_t<scalar_t>>& later, double* own,
              std::vector<accumulator_t<scalar_t>>& memory) {
  using T = accumulator_t<scalar_t>;
  const int64_t stride = settings.stride();
  const bool knows_largest = settings.knows_largest();
  memory.resize((1 + (knows_largest ? 1 : rows.patients)) * stride);
  T* mass = memory.data();
  const T least = knows_largest ? static_cast<T>(1 / settings.sigma) : T(0);  // none is below 0
  std::fill(later.largest, later.largest + stride, least);
  std::fill(later.sum, later.sum + stride, 0.0);

  for (int64_t i = 0; i < std::min(kRowsAhead, rows.patients); ++i) {
    prefetch(rows.logits[i], rows.outcomes[i], settings);
  }
  for (int64_t i = 0; i < rows.patients; ++i) {
    const int64_t ahead = i + kRowsAhead;
    if (ahead < rows.patients) prefetch(rows.logits[ahead], rows.outcomes[ahead], settings);
    const Outcome& outcome = rows.outcomes[i];
    T* exponents = mass + (knows_largest ? 1 : i + 1) * stride;
    const auto at_risk = at_risk_of<T>(outcome, settings);
    softmax(rows.logits[i], at_risk, mass);
    if (rows.mass[i])
      std::copy(mass + at_risk.begin, mass + at_risk.end, rows.mass[i] + at_risk.begin);
    read_exponents(mass, outcome, settings, exponents);
    own[i] = outcome.type > 0 ? static_cast<double>(exponents[event_of(outcome, settings)]) : 0.0;
    const Range<T> range = later_of<T>(outcome, settings);
    range.fill_around(exponents, T(-HUGE_VAL));
    if (knows_largest) {
      add_terms(exponents, range, static_cast<T>(outcome.weight), later);
      continue;
    }
    // A weight of 0 leaves the patient out: beside its exponent all others might vanish.
    if (outcome.weight == 0) continue;
    for (int64_t at = range.first; at < range.last; at += kLanes<T>) {
      const Lanes<T> x = load(exponents + at);
      const Lanes<T> most = load(later.largest + at);
      store(later.largest + at, x > most ? x : most);
    }
  }
  for (int64_t i = 0; i < (knows_largest ? 0 : rows.patients); ++i) {
    const Outcome& outcome = rows.outcomes[i];
    add_terms(mass + (i + 1) * stride, later_of<T>(outcome, settings),
              static_cast<T>(outcome.weight), later);
  }
}

inline void exponentiate(double* values, int64_t count) {
  for (int64_t at = 0; at < count; at += kLanes<double>) {
    double some[kLanes<double>] = {};
    const bool is_whole = at + kLanes<double> <= count;
    if (!is_whole) std::copy(values + at, values + count, some);
    const Doubles x = is_whole ? load(values + at) : load(some);
    // By its root: 1 / e^-x would be infinite where e^-x is not normal, before e^x is.
    const Doubles root = exp_nonpositive<double>((x > 0.0 ? -x : x) * 0.5);
    const Doubles raised = x > 0.0 ? 1.0 / root : root;
    store(is_whole ? values + at : some, raised * raised);
    if (!is_whole) std::copy(some, some + (count - at), values + at);
  }
}

template <typename T>
void join_groups(int64_t groups, int64_t stride, const Later<T>& of_groups, const Later<T>& all) {
  std::fill(all.largest, all.largest + stride, T(0));
  std::fill(all.sum, all.sum + stride, 0.0);
  for (int64_t group = 0; group < groups; ++group) {
    for (int64_t at = 0; at < stride; at += kLanes<T>) {
      const Lanes<T> x = load(of_groups.largest + group * stride + at);
      const Lanes<T> most = load(all.largest + at);
      store(all.largest + at, x > most ? x : most);
    }
  }
  for (int64_t group = 0; group < groups; ++group) {
    for (int64_t at = 0; at < stride; at += kLanes<T>) {
      const Lanes<T> of_group = load(of_groups.largest + group * stride + at);
      const Lanes<T> of_all = load(all.largest + at);
      const bool is_same = std::memcmp(&of_group, &of_all, sizeof of_all) == 0;
      const Wide<T> own = widen(of_group);
      const Wide<T> most = widen(of_all);
      for (int part = 0; part < Wide<T>::kParts; ++part) {
        const int64_t lane = at + part * kLanes<double>;
        const Doubles sum = load(of_groups.sum + group * stride + lane);
        const Doubles share =
            is_same ? broadcast(1.0) : exp_nonpositive<double>(own.part[part] - most.part[part]);
        store(all.sum + lane, load(all.sum + lane) + sum * share);
      }
    }
  }
}

// `memory` has two rows.
template <typename scalar_t>
void gradients_of_rows(const Settings& settings, const Rows<scalar_t>& rows,
                       const Slopes<accumulator_t<scalar_t>>& slopes,
                       saved_grad_t<scalar_t>* const* grads,
                       std::vector<accumulator_t<scalar_t>>& memory) {
  using T = accumulator_t<scalar_t>;
  const int64_t stride = settings.stride();
  memory.resize(2 * stride);
  T* mass = memory.data();
  T* slope = mass + stride;
  const auto prefetch_patient = [&](int64_t i) __attribute__((always_inline)) {
    if (i >= rows.patients) return;
    if (rows.mass[i]) return prefetch(rows.mass[i], rows.outcomes[i], settings);
    prefetch(rows.logits[i], rows.outcomes[i], settings);
  };
  for (int64_t i = 0; i < kRowsAhead; ++i) prefetch_patient(i);
  for (int64_t i = 0; i < rows.patients; ++i) {
    prefetch_patient(i + kRowsAhead);
    const Outcome& outcome = rows.outcomes[i];
    const auto at_risk = at_risk_of<T>(outcome, settings);
    if (rows.mass[i]) {
      std::fill(mass, mass + at_risk.begin, T(0));
      std::copy(rows.mass[i] + at_risk.begin, rows.mass[i] + at_risk.end, mass + at_risk.begin);
      std::fill(mass + at_risk.end, mass + at_risk.last, T(0));
    } else {
      softmax(rows.logits[i], at_risk, mass);
    }
    read_exponents(mass, outcome, settings, slope);
    const Range<T> range = later_of<T>(outcome, settings);

    // by the exponents ...
    const T weight = static_cast<T>(outcome.weight);
    for (int64_t at = range.first; at < range.last; at += kLanes<T>) {
      const Lanes<T> term = weighted(load(slope + at), load(slopes.largest + at), weight);
      store(slope + at, term * load(slopes.of_events + at));
    }
    std::fill(slope, slope + range.begin, T(0));
    std::fill(slope + range.end, slope + at_risk.last, T(0));
    if (outcome.type > 0) slope[event_of(outcome, settings)] = static_cast<T>(-slopes.own[i]);
    // ... by the mass, which is part of all later exponents, and by the logits
    const int64_t begin = settings.classes > 1 ? at_risk.begin : at_risk.first;
    const T mean =
        static_cast<T>(sums_from_the_end(slope, mass, begin, outcome.time + 1, settings.classes));
    // As survival_nll_scale reads it: -0 is the derivative of a visit that counts, 0 of none.
    const T zero = outcome.type > 0 || range.begin < range.end ? T(-0.0) : T(0);
    auto* grad = grads[i];
    const auto write = [&](int64_t at) __attribute__((always_inline)) {
      const Lanes<T> value = load(mass + at) * (load(slope + at) - mean);
      store(grad + at, value == T(0) ? broadcast(zero) : value);
    };
    int64_t at = at_risk.begin;
    for (; at + kLanes<T> <= at_risk.end; at += kLanes<T>) write(at);
    if (at < at_risk.end && at > at_risk.begin) {
      write(at_risk.end - kLanes<T>);
      continue;
    }
    for (; at < at_risk.end; ++at) {
      const T value = mass[at] * (slope[at] - mean);
      using grad_t = saved_grad_t<scalar_t>;
      grad[at] = static_cast<grad_t>(value == T(0) ? zero : value);
    }
  }
}

}  // namespace ehrseq::survival::ranking::EHRSEQ_ISA
