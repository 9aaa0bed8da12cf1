// Binary cross-entropy of a patient's visits and its gradient, with labels made of a horizon and
// the patient's event time.
//
// Compiled once for each instruction set, hence no include guard: see common/each_isa.h.

#include "fixed_horizon/rows.h"
#include "survival_nll/likelihood.h"
// after those
#include "fixed_horizon/terms.h"

namespace ehrseq::fixed_horizon::EHRSEQ_ISA {

// Only parts of rows are read, which the processor's own prefetcher cannot follow.
constexpr int64_t kRowsAhead = 8;

EHRSEQ_INLINE Doubles load_some(const double* from, int64_t count) {
  if (count >= kLanes<double>) return load(from);
  double some[kLanes<double>] = {};
  for (int64_t i = 0; i < count; ++i) some[i] = from[i];
  return load(some);
}

// Eight visits: labels, weights with those of the label, and which visits count.
struct Eight {
  Doubles label;
  Doubles weight;
  Mask<double> counts;
};

// Numbers of a patient's visits, eight at a time.
class Labels {
 public:
  Labels(const Settings& settings, const Visits& visits)
      : visits_(visits), outcome_(settings, visits.event_time, visits.seen) {}

  // Visits at..at + 8. Of those from the last one on, none counts.
  EHRSEQ_INLINE Eight at(int64_t at) {
    const int64_t left = visits_.count - at;
    const Mask<double> exists = lane_numbers<double>() < broadcast<int64_t>(left);
    Eight eight;
    eight.weight = broadcast(visits_.weight);
    if (visits_.weights != nullptr) {
      const Doubles weights = load_some(visits_.weights + at, left);
      wrong_ |= weights < 0.0;  // a NaN or an infinity is to reach the result
      eight.weight *= weights;
    }
    const Doubles now = load_some(visits_.times + at, left);
    const Doubles end = now + outcome_.horizon;
    wrong_ |= now != now;
    eight.counts = exists & (now < outcome_.time) & (end <= outcome_.observed);
    eight.label = (Doubles)((Mask<double>)broadcast(1.0) & (end >= outcome_.event));
    return eight;
  }

  // Whether no time was NaN and no weight negative, of the visits that were asked for.
  bool possible() const { return !any_lane<double>(wrong_); }

 private:
  const Visits& visits_;
  Outcome outcome_;
  Mask<double> wrong_{};
};

// A time as it is stored that is about this one.
template <typename stored_t>
EHRSEQ_INLINE stored_t stored_near(double time) {
  if constexpr (std::is_floating_point_v<stored_t>) return static_cast<stored_t>(time);
  constexpr double kLeast = sizeof(stored_t) == 4 ? -0x1p31 : -0x1p63;
  constexpr double kMost = sizeof(stored_t) == 4 ? 0x1p31 - 1 : 0x1p63 - 1024;
  return static_cast<stored_t>(time > kLeast ? std::min(std::ceil(time), kMost) : kLeast);
}

template <typename stored_t>
[[maybe_unused]] EHRSEQ_INLINE int64_t sum_of_counts(const Mask<stored_t>& counts) {
  const int64_t sum = sum_of_lanes<int64_t>((Mask<double>)counts);
  if constexpr (sizeof(stored_t) == 8) return sum;
  return (sum & 0xffffffff) + (sum >> 32);  // two counts in each lane
}

#if EHRSEQ_ISA_LEVEL >= 2
// Lanes in which a < b, or a <= b, as bits.
template <bool kOrEqual, typename stored_t>
EHRSEQ_INLINE uint32_t bits_below(const Lanes<stored_t>& a, const Lanes<stored_t>& b) {
  constexpr int kFloats = kOrEqual ? _CMP_LE_OQ : _CMP_LT_OQ;
  constexpr auto kIntegers = kOrEqual ? _MM_CMPINT_LE : _MM_CMPINT_LT;
  if constexpr (std::is_same_v<stored_t, float>) {
    return _mm512_cmp_ps_mask((__m512)a, (__m512)b, kFloats);
  } else if constexpr (std::is_same_v<stored_t, double>) {
    return _mm512_cmp_pd_mask((__m512d)a, (__m512d)b, kFloats);
  } else if constexpr (sizeof(stored_t) == 4) {
    return _mm512_cmp_epi32_mask((__m512i)a, (__m512i)b, kIntegers);
  } else {
    return _mm512_cmp_epi64_mask((__m512i)a, (__m512i)b, kIntegers);
  }
}
#endif

// How many times are below the two; false unless all are numbers in ascending order.
template <typename stored_t>
EHRSEQ_INLINE bool count_ascending(const stored_t* times, int64_t visits, stored_t last,
                                   stored_t first_within, Range* below) {
  constexpr int64_t kTimes = kLanes<stored_t>;
  int64_t at = 0;
#if EHRSEQ_ISA_LEVEL >= 2
  constexpr uint32_t kAll = (uint32_t{1} << kTimes) - 1;
  const Lanes<stored_t> lasts = broadcast(last);
  const Lanes<stored_t> firsts = broadcast(first_within);
  uint32_t ascends = kAll;
  *below = {0, 0};
  const auto take = [&](const stored_t* from, uint32_t is_new) __attribute__((always_inline)) {
    const Lanes<stored_t> now = load_exactly<kTimes>(from);
    ascends &= bits_below<true, stored_t>(now, load_exactly<kTimes>(from + 1));
    below->end += __builtin_popcount(bits_below<false, stored_t>(now, lasts) & is_new);
    below->first += __builtin_popcount(bits_below<false, stored_t>(now, firsts) & is_new);
  };
  for (; at + kTimes < visits; at += kTimes) take(times + at, kAll);
  if (at > 0) {
    // The last visits once more, whose successors are visits too; the last one has none.
    const int64_t again = visits - 1 - kTimes;
    take(times + again, kAll << (at - again));
  } else {
    stored_t some[kTimes + 1];
    for (int64_t i = 0; i <= kTimes; ++i) some[i] = times[std::min(i, visits - 1)];
    take(some, (uint32_t{1} << (visits - 1)) - 1);
  }
  return ascends == kAll;
#else
  Mask<stored_t> falls{};
  Mask<stored_t> counted{};
  Mask<stored_t> counted_without{};  // of them the visits without the event within the horizon
  const auto look_at = [&](const stored_t* from, const Mask<stored_t>& is_new)
                           __attribute__((always_inline)) {
                             const Lanes<stored_t> now = load_exactly<kTimes>(from);
                             falls |= ~(now <= load_exactly<kTimes>(from + 1));
                             counted -= (now < last) & is_new;
                             counted_without -= (now < first_within) & is_new;
                           };
  for (; at + kTimes < visits; at += kTimes) look_at(times + at, ~Mask<stored_t>{});
  const Mask<stored_t> lanes = lane_numbers<stored_t>();
  if (at > 0) {
    const int64_t again = visits - 1 - kTimes;
    look_at(times + again, lanes >= static_cast<bits_t<stored_t>>(at - again));
  } else {
    stored_t some[kTimes + 1];
    for (int64_t i = 0; i <= kTimes; ++i) some[i] = times[std::min(i, visits - 1)];
    look_at(some, lanes < static_cast<bits_t<stored_t>>(visits - 1));
  }
  *below = {sum_of_counts<stored_t>(counted), sum_of_counts<stored_t>(counted_without)};
  return !any_lane<stored_t>(falls);
#endif
}

// Compared as they are stored, vectors of times tell whether these ascend and about where the range
// ends; where exactly, comparisons in double precision tell.
template <typename stored_t>
Range range_of_times(const Outcome& outcome, const stored_t* times, int64_t visits) {
  if (visits == 0) return {0, 0};
  const stored_t last = stored_near<stored_t>(outcome.last());
  const stored_t first_within = stored_near<stored_t>(outcome.first_within());
  Range guess;
  if (!count_ascending(times, visits, last, first_within, &guess)) return kNoRange;
  return range_near(guess, outcome, visits, [&](int64_t visit) { return times[visit]; });
}

inline double weight_of_visits(const Settings& settings, const Visits& visits, bool* possible) {
  Labels labels(settings, visits);
  Doubles sums{};
  for (int64_t at = 0; at < visits.count; at += kLanes<double>) {
    const Eight eight = labels.at(at);
    sums += eight.counts ? eight.weight : Doubles{};
  }
  *possible &= labels.possible();
  return sum_of_lanes<double>(sums);
}

// A row in vectors of T, of which the last may be in part beyond the visits: what is read there
// means nothing, and what is written there, while it is in the row, finish() makes zeros.
template <typename T, typename scalar_t>
class RowLanes {
 public:
  RowLanes(const Row<scalar_t>& row, int64_t visits) : row_(row), visits_(visits) {}

  EHRSEQ_INLINE Lanes<T> logits(int64_t at) const {
    if (at + kLanes<T> <= row_.slots) return load(row_.logits + at);
    T some[kLanes<T>] = {};
    for (int64_t i = at; i < visits_; ++i) some[i - at] = static_cast<T>(row_.logits[i]);
    return load(some);
  }

  EHRSEQ_INLINE void set_grad(int64_t at, const Lanes<T>& grad) const {
    if (row_.grad != nullptr) set(row_.grad, at, grad);
  }

  EHRSEQ_INLINE void set_terms(int64_t at, const Lanes<T>& terms) const {
    if (row_.terms != nullptr) set(row_.terms, at, terms);
  }

  bool wants_grad() const { return row_.grad != nullptr; }
  bool wants_terms() const { return row_.terms != nullptr; }

  // Zeros after the visits.
  void finish() const {
    if (row_.grad)
      std::fill(row_.grad + visits_, row_.grad + row_.slots, saved_grad_t<scalar_t>(0));
    if (row_.terms) std::fill(row_.terms + visits_, row_.terms + row_.slots, T(0));
  }

 private:
  template <typename stored_t>
  EHRSEQ_INLINE void set(stored_t* to, int64_t at, const Lanes<T>& lanes) const {
    if (at + kLanes<T> <= row_.slots) return store(to + at, lanes);
    T some[kLanes<T>];
    store(some, lanes);
    for (int64_t i = at; i < visits_; ++i) to[i] = static_cast<stored_t>(some[i - at]);
  }

  Row<scalar_t> row_;
  int64_t visits_;
};

template <typename scalar_t>
double loss_of_visits(const Settings& settings, const Visits& visits, const Row<scalar_t>& row,
                      bool* possible) {
  using T = accumulator_t<scalar_t>;
  constexpr int kParts = Wide<T>::kParts;
  const RowLanes<T, scalar_t> lanes(row, visits.count);
  Labels labels(settings, visits);
  Wide<T> sums{};
  for (int64_t at = 0; at < visits.count; at += kLanes<T>) {
    Wide<T> label;
    Wide<T> weight;
    Mask<double> counts_of[kParts];
    for (int i = 0; i < kParts; ++i) {
      const Eight eight = labels.at(at + i * kLanes<double>);
      counts_of[i] = eight.counts;
      label.part[i] = eight.counts ? eight.label : Doubles{};
      weight.part[i] = eight.counts ? eight.weight : Doubles{};
      if (settings.pos_weight != 1.0) {
        weight.part[i] *= label.part[i] == 1.0 ? broadcast(settings.pos_weight) : broadcast(1.0);
      }
    }
    lanes_t<int64_t, kLanes<T>> wide_counts;
    std::memcpy(&wide_counts, counts_of, sizeof wide_counts);
    const Mask<T> counts = __builtin_convertvector(wide_counts, Mask<T>);
    const Terms<T> terms = terms_of<T>(counts ? lanes.logits(at) : Lanes<T>{}, narrow(label));

    Wide<T> weighted = widen(terms.term);
    for (int i = 0; i < kParts; ++i) {
      const Doubles product = weighted.part[i] * weight.part[i];
      weighted.part[i] = counts_of[i] ? product : Doubles{};
      sums.part[i] += weighted.part[i];
      weight.part[i] *= settings.share;
    }
    lanes.set_grad(at, marked<T>(counts, terms.slope * narrow(weight)));
    if (lanes.wants_terms()) lanes.set_terms(at, narrow(weighted));
  }
  *possible &= labels.possible();
  lanes.finish();
  return sum_of_all<T>(sums);
}

// Each visit's term on its own.
template <typename scalar_t>
EHRSEQ_INLINE double terms_of_range(const Settings& settings, const Range& range, double weight,
                                    const Row<scalar_t>& row) {
  using T = accumulator_t<scalar_t>;
  const RowLanes<T, scalar_t> lanes(row, range.end);
  const bool wants_terms = row.terms != nullptr;
  const T scale = static_cast<T>(weight * settings.share);
  const T pos_weight = static_cast<T>(settings.pos_weight);
  Wide<T> sums{};
  for (int64_t at = 0; at < range.end; at += kLanes<T>) {
    const Mask<T> visit = lane_numbers<T>() + static_cast<bits_t<T>>(at);
    const Mask<T> counts = visit < static_cast<bits_t<T>>(range.end);
    const Mask<T> within = visit >= static_cast<bits_t<T>>(range.first);
    Terms<T> terms = terms_of<T>(lanes.logits(at), within ? broadcast(T(1)) : Lanes<T>{});
    const Lanes<T> factor = within ? broadcast(pos_weight) : broadcast(T(1));
    terms.term *= factor;
    terms.slope *= factor;
    const Lanes<T> term = counts ? terms.term : Lanes<T>{};
    const Wide<T> wide = widen(term);
    for (int i = 0; i < Wide<T>::kParts; ++i) sums.part[i] += wide.part[i];
    lanes.set_grad(at, marked<T>(counts, terms.slope * scale));
    if (wants_terms) lanes.set_terms(at, term * static_cast<T>(weight));
  }
  lanes.finish();
  return sum_of_all<T>(sums) * weight;
}

// The sum of the terms, and the gradient, if any is wanted: zeros after the range.
template <typename T, typename scalar_t>
EHRSEQ_INLINE Unfinished sum_of_range(const Settings& settings, const Range& range, double weight,
                                      const Row<scalar_t>& row) {
  SumOfTerms<T> sum;
  const bool wants_grad = row.grad != nullptr;
  const Lanes<T> scale = broadcast(signed_zero(static_cast<T>(weight * settings.share)));
  const Mask<T> first = broadcast(static_cast<bits_t<T>>(range.first));
  Mask<T> visit = lane_numbers<T>();
  int64_t until_flush = sum.kMostVectors;
  int64_t at = 0;
  for (; at + kLanes<T> <= range.end; at += kLanes<T>, --until_flush) {
    if (until_flush == 0) {
      sum.flush();
      until_flush = sum.kMostVectors;
    }
    const Lanes<T> slopes = sum.add(load(row.logits + at), visit >= first, scale);
    if (wants_grad) store(row.grad + at, slopes);
    visit += static_cast<bits_t<T>>(kLanes<T>);
  }
  if (at < range.end) {
    if (until_flush == 0) sum.flush();
    const Mask<T> counts = visit < static_cast<bits_t<T>>(range.end);
    const Lanes<T> slopes =
        sum.add(load_first(row.logits + at, range.end - at), visit >= first, scale, counts);
    if (wants_grad) store_within<T>(row.grad, at, row.slots, slopes);
    at += kLanes<T>;
  }
  if (wants_grad && at < row.slots) {
    std::fill(row.grad + at, row.grad + row.slots, saved_grad_t<scalar_t>(0));
  }
  return sum.unfinished();
}

template <typename scalar_t>
void losses_of_ranges(const Settings& settings, const Ranges& ranges, const Row<scalar_t>& first,
                      double* losses) {
  using T = accumulator_t<scalar_t>;
  const auto prefetch = [&](int64_t i) __attribute__((always_inline)) {
    if (i >= ranges.patients) return;
    constexpr int64_t kLine = 64 / sizeof(scalar_t);
    const scalar_t* row = first.logits + i * first.slots;
    const int64_t visits = ranges.of_patients[i].end;
    for (int64_t at = 0; at < visits; at += kLine) __builtin_prefetch(row + at);
  };
  for (int64_t i = 0; i < kRowsAhead; ++i) prefetch(i);
  if (settings.pos_weight != 1.0 || first.terms != nullptr) {
    for (int64_t i = 0; i < ranges.patients; ++i) {
      prefetch(i + kRowsAhead);
      losses[i] =
          terms_of_range(settings, ranges.of_patients[i], ranges.weights[i], first.after(i));
    }
  } else {
    Group<survival::kGroupPatients> group;
    for (int64_t i = 0; i < ranges.patients; ++i) {
      prefetch(i + kRowsAhead);
      group.set(
          i, sum_of_range<T>(settings, ranges.of_patients[i], ranges.weights[i], first.after(i)));
    }
    group.template finish<FromLogits<T>>(ranges.patients, losses);
    for (int64_t i = 0; i < ranges.patients; ++i) losses[i] *= ranges.weights[i];
  }
  for (int64_t i = 0; i < ranges.patients; ++i) {
    if (ranges.of_patients[i].end == 0) losses[i] = 0;  // whatever the weight
  }
}

}  // namespace ehrseq::fixed_horizon::EHRSEQ_ISA
