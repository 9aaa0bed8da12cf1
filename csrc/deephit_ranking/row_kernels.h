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

  Wide<T> sums{};
  for (at = at_risk.first; at < at_risk.last; at += kLanes<T>) {
    const Lanes<T> term = exp_nonpositive<T>(load(mass + at) - largest);
    store(mass + at, term);
    const Wide<T> wide = widen(term);
    for (int i = 0; i < Wide<T>::kParts; ++i) sums.part[i] += wide.part[i];
  }
  const double sum = std::exp(-static_cast<double>(largest)) + sum_of_wide<T>(sums);
  const T share = static_cast<T>(1 / sum);
  for (at = at_risk.first; at < at_risk.last; at += kLanes<T>) {
    store(mass + at, load(mass + at) * share);
  }
}

// Sums over visits are made of four at a time: as wide as most processors add doubles at once, and
// few steps from one four to the next.
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

// Cumulative sums times `factor` of the first `visits` visits. With one value per visit up to three
// more are read and written.
template <typename T>
EHRSEQ_INLINE void cumulative_sums(const T* values, int64_t visits, int64_t classes, double factor,
                                   T* sums) {
  if (classes > 1) {
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
// of each result times its weight. With one value per visit `begin` is that of a vector, and up to
// three after the last, which have to be zeros, are read.
template <typename T>
EHRSEQ_INLINE double sums_from_the_end(T* values, const T* weights, int64_t begin, int64_t visits,
                                       int64_t classes) {
  if (classes > 1) {
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

EHRSEQ_INLINE int64_t event_of(const Outcome& outcome, const Settings& settings) {
  return outcome.time * settings.classes + outcome.type - 1;
}

// `memory` has a row of exponents for each patient, and one of mass.
template <typename scalar_t>
void sum_rows(const Settings& settings, const Rows<scalar_t>& rows,
              const Later<accumulator_t<scalar_t>>& later, double* own,
              std::vector<accumulator_t<scalar_t>>& memory) {
  using T = accumulator_t<scalar_t>;
  const int64_t stride = settings.stride();
  memory.resize((rows.patients + 1) * stride);
  T* mass = memory.data() + rows.patients * stride;
  std::fill(later.largest, later.largest + stride, T(0));  // no exponent is below 0
  std::fill(later.sum, later.sum + stride, 0.0);

  for (int64_t i = 0; i < rows.patients; ++i) {
    const Outcome& outcome = rows.outcomes[i];
    T* exponents = memory.data() + i * stride;
    const auto at_risk = at_risk_of<T>(outcome, settings);
    softmax(rows.logits[i], at_risk, mass);
    if (rows.mass[i])
      std::copy(mass + at_risk.begin, mass + at_risk.end, rows.mass[i] + at_risk.begin);
    read_exponents(mass, outcome, settings, exponents);
    own[i] = outcome.type > 0 ? static_cast<double>(exponents[event_of(outcome, settings)]) : 0.0;
    const Range<T> range = later_of<T>(outcome, settings);
    range.fill_around(exponents, T(-HUGE_VAL));
    // A weight of 0 leaves the patient out: beside its exponent all others might vanish.
    if (outcome.weight == 0) continue;
    for (int64_t at = range.first; at < range.last; at += kLanes<T>) {
      const Lanes<T> x = load(exponents + at);
      const Lanes<T> most = load(later.largest + at);
      store(later.largest + at, x > most ? x : most);
    }
  }
  for (int64_t i = 0; i < rows.patients; ++i) {
    const T* exponents = memory.data() + i * stride;
    const T weight = static_cast<T>(rows.outcomes[i].weight);
    const Range<T> range = later_of<T>(rows.outcomes[i], settings);
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
      const Wide<T> own = widen(load(of_groups.largest + group * stride + at));
      const Wide<T> most = widen(load(all.largest + at));
      for (int part = 0; part < Wide<T>::kParts; ++part) {
        const int64_t lane = at + part * kLanes<double>;
        const Doubles sum = load(of_groups.sum + group * stride + lane);
        const Doubles share = exp_nonpositive<double>(own.part[part] - most.part[part]);
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
  for (int64_t i = 0; i < rows.patients; ++i) {
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
