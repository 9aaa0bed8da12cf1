// DeepHit's ranking loss, row by row of logits over time.
//
// With F the cumulative sum of a patient's softmax (the class "beyond" having the logit 0), and
// a = F / σ the exponents, the pairs of an event of i at time T and of all j at risk after it add
//   Σ_j w_i w_j exp(a_j(T) - a_i(T)) = w_i exp(m(T) - a_i(T)) · Σ_j w_j exp(a_j(T) - m(T)),
// where m(T) is the largest a_j(T): one sum for each time, shared by all its events. The sums are
// made of groups of patients, each with a largest exponent of its own, and joined in the groups'
// order. What the gradient can use again of the softmax and of the terms is kept, where there is
// memory for it.
//
// Compiled once for each instruction set, hence no include guard: see common/each_isa.h.

#include "deephit_ranking/rows.h"
#include "deephit_ranking/sums_of_visits.h"

namespace ehrseq::survival::ranking::EHRSEQ_ISA {

using namespace ehrseq::EHRSEQ_ISA;  // NOLINT: the lanes of the same instruction set

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

// Up to here e^x needs no largest logit taken out, nor do sums of it.
constexpr double kMostLogit = 40;

// The softmax of the visits at risk and "beyond" before it is divided by its sum, of which 1 / sum
// is returned: in `mass`, with zeros before them and up to a whole vector after them, and in `kept`
// (unless null), from the whole vector before them on. A NaN or an infinite logit makes the result
// NaN.
template <typename T, typename scalar_t>
EHRSEQ_INLINE double exponentiate_row(const scalar_t* row, const Range<T>& at_risk, T* mass,
                                      T* kept) {
  std::fill(mass, mass + at_risk.first, T(0));
  Lanes<T> most{};  // the logit of "beyond"; a NaN is left to the sum
  const auto sum_of = [&](T shift) __attribute__((always_inline)) {
    Lanes<T> sums{};
    const auto take = [&](int64_t at, const Lanes<T>& read) __attribute__((always_inline)) {
      const Mask<T> lane = lane_numbers<T>() + static_cast<bits_t<T>>(at);
      const bool is_whole = at >= at_risk.begin && at + kLanes<T> <= at_risk.end;
      const Mask<T> outside = (lane < static_cast<bits_t<T>>(at_risk.begin)) |
                              (lane >= static_cast<bits_t<T>>(at_risk.end));
      const Lanes<T> x = is_whole ? read : outside ? broadcast(T(-HUGE_VAL)) : read;
      most = x > most ? x : most;
      const Lanes<T> term = exp_nonpositive<T>(x - shift);
      store(mass + at, term);
      sums += term;
    };
    int64_t at = at_risk.first;
    for (; at + kLanes<T> <= at_risk.end; at += kLanes<T>) take(at, load(row + at));
    if (at < at_risk.end) take(at, load_first(row + at, at_risk.end - at));
    return sum_of_wide<T>(widen(sums));
  };
  double sum = 1 + sum_of(T(0));
  if (any_lane<T>(most > static_cast<T>(kMostLogit))) {
    const T largest = largest_of_lanes<T>(most);
    const Lanes<T> beyond = exp_nonpositive<T>(broadcast(-largest));
    sum = static_cast<double>(beyond[0]) + sum_of(largest);
  }
  if (kept != nullptr) {  // the row's own memory, perhaps
    int64_t at = at_risk.first;
    for (; at + kLanes<T> <= at_risk.end; at += kLanes<T>) store(kept + at, load(mass + at));
    if (at < at_risk.end) store_first(kept + at, at_risk.end - at, load(mass + at));
  }
  return 1 / sum;
}

template <typename T>
EHRSEQ_INLINE Range<T> at_risk_of(const Outcome& outcome, const Settings& settings) {
  return Range<T>(outcome.entry * settings.classes, outcome.visits * settings.classes);
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

// body(at, exponents, which lanes are) for the vectors in which a patient is a later one. Exponents
// are `scale` times the cumulative sums.
template <typename T, typename Body>
EHRSEQ_INLINE void for_exponents(const T* sums, const Range<T>& range, T scale, const Body& body) {
  const Mask<T> begin = broadcast(static_cast<bits_t<T>>(range.begin));
  const Mask<T> end = broadcast(static_cast<bits_t<T>>(range.end));
  for (int64_t at = range.first; at < range.last; at += kLanes<T>) {
    const Mask<T> lane = lane_numbers<T>() + static_cast<bits_t<T>>(at);
    body(at, load(sums + at) * scale, (lane >= begin) & (lane < end));
  }
}

// Adds w e^(exponent - largest) of one patient where it is a later one, and keeps these terms in
// whole vectors in `kept`, unless null.
template <typename T>
EHRSEQ_INLINE void add_terms(const T* sums, const Range<T>& range, T scale, T weight,
                             const Later<T>& later, T* kept) {
  for_exponents(sums, range, scale,
                [&](int64_t at, const Lanes<T>& x, const Mask<T>& inside)
                    __attribute__((always_inline)) {
                      const Lanes<T> term = weighted(x, load(later.largest + at), weight);
                      const Lanes<T> counted = inside ? term : Lanes<T>{};
                      if (kept != nullptr) store(kept + (at - range.first), counted);
                      const Wide<T> wide = widen(counted);
                      for (int part = 0; part < Wide<T>::kParts; ++part) {
                        double* sum = later.sum + at + part * kLanes<double>;
                        store(sum, load(sum) + wide.part[part]);
                      }
                    });
}

// `memory` has a row of mass, and one of cumulative sums for each patient, if they are needed
// twice.
template <typename scalar_t>
void sum_rows(const Settings& settings, const Rows<scalar_t>& rows,
              const Later<accumulator_t<scalar_t>>& later, double* own,
              std::vector<accumulator_t<scalar_t>>& memory) {
  using T = accumulator_t<scalar_t>;
  const int64_t stride = settings.stride();
  const bool knows_largest = settings.knows_largest();
  memory.resize((1 + (knows_largest ? 1 : rows.patients)) * stride);
  T* mass = memory.data();
  T scales[OutcomeReader::kAtOnce];
  // where it is not known, none is below 0
  if (!knows_largest) std::fill(later.largest, later.largest + stride, T(0));
  std::fill(later.sum, later.sum + stride, 0.0);

  for (int64_t i = 0; i < std::min(kRowsAhead, rows.patients); ++i) {
    prefetch(rows.logits[i], rows.outcomes[i], settings);
  }
  for (int64_t i = 0; i < rows.patients; ++i) {
    const int64_t ahead = i + kRowsAhead;
    if (ahead < rows.patients) prefetch(rows.logits[ahead], rows.outcomes[ahead], settings);
    const Outcome& outcome = rows.outcomes[i];
    T* sums = mass + (knows_largest ? 1 : i + 1) * stride;
    const double share =
        exponentiate_row<T>(rows.logits[i], at_risk_of<T>(outcome, settings), mass, rows.mass[i]);
    if (rows.shares != nullptr) rows.shares[i] = share;
    const T scale = scales[i] = settings.scale_of<T>(share);
    cumulative_sums(mass, outcome.time + 1, settings.classes, sums);
    own[i] =
        outcome.type > 0 ? static_cast<double>(sums[event_of(outcome, settings)] * scale) : 0.0;
    const Range<T> range = later_of<T>(outcome, settings);
    if (knows_largest) {
      add_terms(sums, range, scale, static_cast<T>(outcome.weight), later, rows.terms[i]);
      continue;
    }
    // A weight of 0 leaves the patient out: beside its exponent all others might vanish.
    if (outcome.weight == 0) continue;
    for_exponents(sums, range, scale,
                  [&](int64_t at, const Lanes<T>& x, const Mask<T>& inside)
                      __attribute__((always_inline)) {
                        const Lanes<T> most = load(later.largest + at);
                        const Lanes<T> counted = inside ? x : Lanes<T>{};
                        store(later.largest + at, counted > most ? counted : most);
                      });
  }
  for (int64_t i = 0; i < (knows_largest ? 0 : rows.patients); ++i) {
    const Outcome& outcome = rows.outcomes[i];
    add_terms<T>(mass + (i + 1) * stride, later_of<T>(outcome, settings), scales[i],
                 static_cast<T>(outcome.weight), later, nullptr);
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

// The patient's mass, and the derivatives by it up to the visit of the outcome; rows after whose
// end a vector may be read and written.
template <typename T>
struct SlopeRow {
  T* mass;
  T* slope;
  int64_t slope_end = 0;  // from here on all are 0, and are not written
  T mean = 0;             // of the derivatives
};

template <typename scalar_t>
EHRSEQ_INLINE void find_slopes(const Settings& settings, const Rows<scalar_t>& rows,
                               const Slopes<accumulator_t<scalar_t>>& slopes, int64_t i,
                               SlopeRow<accumulator_t<scalar_t>>& found) {
  using T = accumulator_t<scalar_t>;
  const Outcome& outcome = rows.outcomes[i];
  const auto at_risk = at_risk_of<T>(outcome, settings);
  const Range<T> range = later_of<T>(outcome, settings);
  const T* terms = rows.terms[i];
  const T* kept = rows.mass[i];
  T* mass = found.mass;
  T* slope = found.slope;
  double share = 0;
  if (kept != nullptr) {
    share = rows.shares[i];
    const T factor = terms != nullptr ? static_cast<T>(share) : T(1);
    if (at_risk.first > 0) std::fill(mass, mass + at_risk.first, T(0));
    int64_t at = at_risk.first;
    for (; at + kLanes<T> <= at_risk.end; at += kLanes<T>) {
      store(mass + at, load(kept + at) * factor);
    }
    if (at < at_risk.end) store(mass + at, load_first(kept + at, at_risk.end - at) * factor);
  } else {
    share = exponentiate_row<T>(rows.logits[i], at_risk, mass, nullptr);
  }

  // by the exponents ...
  if (terms != nullptr) {
    for_exponents(terms - range.first, range, T(1),
                  [&](int64_t at, const Lanes<T>& term, const Mask<T>& inside)
                      __attribute__((always_inline)) {
                        const Lanes<T> product = term * load(slopes.of_events + at);
                        store(slope + at, inside ? product : Lanes<T>{});
                      });
  } else {
    const T weight = static_cast<T>(outcome.weight);
    cumulative_sums(mass, outcome.time + 1, settings.classes, slope);
    for_exponents(slope, range, settings.scale_of<T>(share),
                  [&](int64_t at, const Lanes<T>& x, const Mask<T>& inside)
                      __attribute__((always_inline)) {
                        const Lanes<T> term = weighted(x, load(slopes.largest + at), weight);
                        const Lanes<T> product = term * load(slopes.of_events + at);
                        store(slope + at, inside ? product : Lanes<T>{});
                      });
    for (int64_t at = at_risk.first; at < at_risk.last; at += kLanes<T>) {
      store(mass + at, load(mass + at) * static_cast<T>(share));
    }
  }
  const bool is_aligned = at_risk.begin == at_risk.first;
  found.slope_end =
      is_aligned ? whole_lanes<T>((outcome.time + 1) * settings.classes) : at_risk.last + kLanes<T>;
  for (int64_t at = range.last; at < found.slope_end; at += kLanes<T>)
    store(slope + at, Lanes<T>{});
  if (outcome.type > 0) slope[event_of(outcome, settings)] = static_cast<T>(-slopes.own[i]);
  // ... by the mass, which is part of all later exponents
  const int64_t begin = settings.classes > 1 ? at_risk.begin : at_risk.first;
  found.mean =
      static_cast<T>(sums_from_the_end(slope, mass, begin, outcome.time + 1, settings.classes));
}

// The derivatives by the logits.
template <typename T, typename grad_t>
EHRSEQ_INLINE void write_row(const Settings& settings, const Outcome& outcome,
                             const SlopeRow<T>& found, grad_t* grad) {
  const auto at_risk = at_risk_of<T>(outcome, settings);
  const Range<T> range = later_of<T>(outcome, settings);
  // As survival_nll_scale reads it: -0 is the derivative of a visit that counts, 0 of none.
  const Lanes<T> zero = broadcast(outcome.type > 0 || range.begin < range.end ? T(-0.0) : T(0));
  const auto value_at = [&](int64_t at) __attribute__((always_inline)) {
    const Lanes<T> slope = at < found.slope_end ? load(found.slope + at) : Lanes<T>{};
    const Lanes<T> value = load(found.mass + at) * (slope - found.mean);
    return value == T(0) ? zero : value;
  };
  int64_t at = at_risk.begin;
  for (; at + kLanes<T> <= at_risk.end; at += kLanes<T>) store(grad + at, value_at(at));
  if (at < at_risk.end) store_first(grad + at, at_risk.end - at, value_at(at));
}

template <typename scalar_t>
void gradients_of_rows(const Settings& settings, const Rows<scalar_t>& rows,
                       const Slopes<accumulator_t<scalar_t>>& slopes,
                       saved_grad_t<scalar_t>* const* grads,
                       std::vector<accumulator_t<scalar_t>>& memory) {
  using T = accumulator_t<scalar_t>;
  const int64_t row = settings.stride() + 2 * kLanes<T>;
  memory.resize(2 * row);
  SlopeRow<T> found{memory.data(), memory.data() + row};
  const auto prefetch_patient = [&](int64_t i) __attribute__((always_inline)) {
    if (i >= rows.patients) return;
    if (rows.mass[i]) return prefetch(rows.mass[i], rows.outcomes[i], settings);
    prefetch(rows.logits[i], rows.outcomes[i], settings);
  };
  for (int64_t i = 0; i < kRowsAhead; ++i) prefetch_patient(i);
  for (int64_t i = 0; i < rows.patients; ++i) {
    prefetch_patient(i + kRowsAhead);
    find_slopes(settings, rows, slopes, i, found);
    write_row(settings, rows.outcomes[i], found, grads[i]);
  }
}

}  // namespace ehrseq::survival::ranking::EHRSEQ_ISA
