// Packed rows without a transposition: the visits of neighbouring ranks are side by side at every
// time, so a lane is one patient's series of trials (with competing risks, one cause's).
//
// Compiled once for each instruction set, hence no include guard: see common/each_isa.h.

#include "survival_nll/likelihood.h"
#include "survival_nll/rows.h"

namespace ehrseq::survival::EHRSEQ_ISA {

// What each lane of a vector counts; a lane without a patient counts nothing.
template <typename T>
struct Series {
  bits_t<T> entry[kLanes<T>] = {};
  bits_t<T> survived[kLanes<T>] = {};  // how many visits from the entry on
  bits_t<T> event[kLanes<T>];          // the time of the event, or -1
  T scale[kLanes<T>] = {};
  int64_t last_entry = 0;
  int64_t first_time = std::numeric_limits<int64_t>::max();
  int64_t last_time = -1;
  int64_t events[kLanes<T> + 1];  // their times in order, and one after all

  template <typename scalar_t>
  Series(const LossSettings& settings, const RankRows<scalar_t>& rows, int64_t begin,
         int64_t lanes) {
    int64_t patient = begin / settings.classes;
    int64_t cause = begin % settings.classes;
    std::fill(event, event + kLanes<T>, bits_t<T>(-1));
    int64_t* events_end = events;
    for (int64_t i = 0; i < lanes; ++i) {
      const Outcome& outcome = rows.outcomes[patient];
      entry[i] = static_cast<bits_t<T>>(outcome.entry);
      survived[i] =
          static_cast<bits_t<T>>(outcome.time + settings.censored_included - outcome.entry);
      if (outcome.type == cause + 1) {
        event[i] = static_cast<bits_t<T>>(outcome.time);
        *events_end++ = outcome.time;
      }
      scale[i] = signed_zero(static_cast<T>(outcome.weight * settings.share));
      last_entry = std::max(last_entry, outcome.entry);
      first_time = std::min(first_time, outcome.time);
      last_time = std::max(last_time, outcome.time);
      if (++cause == settings.classes) {
        cause = 0;
        ++patient;
      }
    }
    if (lanes < kLanes<T>) first_time = 0;  // not every lane survives any visit
    std::sort(events, events_end);
    *events_end = std::numeric_limits<int64_t>::max();
  }
};

template <typename T>
using Unsigned = Lanes<std::make_unsigned_t<bits_t<T>>>;

template <typename T>
EHRSEQ_INLINE Mask<T> load_mask(const bits_t<T>* from) {
  Mask<T> mask;
  std::memcpy(&mask, from, sizeof mask);
  return mask;
}

// For all lanes of these patients: every time is on another page, and the processor's own
// prefetcher does not cross pages.
template <typename scalar_t>
EHRSEQ_INLINE void prefetch(const RankRows<scalar_t>& rows, int64_t at, int64_t values) {
  const scalar_t* from = rows.hazards + at;
  const scalar_t* end = from + values;
  for (; from < end; from += 64 / sizeof(scalar_t)) __builtin_prefetch(from);
  __builtin_prefetch(end - 1);
}

// Values begin..begin + lanes of each time's values of these patients, into lane_nll. `inside` is
// as in FromProbabilities::join.
template <typename Likelihood, typename T, typename scalar_t>
EHRSEQ_INLINE void nll_of_lanes(const LossSettings& settings, const RankRows<scalar_t>& rows,
                                int64_t begin, int64_t lanes, double* lane_nll, Mask<T>* inside) {
  constexpr int64_t kTimesAhead = 8;
  const Series<T> series(settings, rows, begin, lanes);
  const Mask<T> entry = load_mask<T>(series.entry);
  const Unsigned<T> survived_visits = (Unsigned<T>)load_mask<T>(series.survived);
  const Mask<T> event_time = load_mask<T>(series.event);
  const Lanes<T> scale = load(series.scale);
  const int64_t classes = settings.classes;
  const int64_t offset = rows.first * classes + begin;
  const bool wants_grad = rows.grad != nullptr;

  Likelihood likelihood(settings.eps);
  const int64_t* next_event = series.events;
  int64_t until_flush = likelihood.flush_interval();
  for (int64_t time = 0; time <= series.last_time; ++time, --until_flush) {
    const int64_t at = rows.row_starts[time] * classes + offset;
    const int64_t present = rows.row_starts[time + 1] * classes - at;  // of this vector and later
    if (begin == 0 && time + kTimesAhead < rows.most_visits) {
      prefetch(rows, rows.row_starts[time + kTimesAhead] * classes + offset,
               rows.patients * classes);
    }
    const Mask<T> now = broadcast<bits_t<T>>(static_cast<bits_t<T>>(time));
    const bool has_event = *next_event == time;
    while (*next_event == time) ++next_event;
    const bool alone = Likelihood::kEventAlone && has_event;
    if (until_flush == 0 || alone) {
      likelihood.flush();
      until_flush = alone ? 1 : likelihood.flush_interval();
    }
    Lanes<T> slopes;
    if (time >= series.last_entry && time < series.first_time) {
      slopes = likelihood.survived(load(rows.hazards + at), scale);
    } else {
      const Lanes<T> values = load_within<T>(rows.hazards, at, rows.values);
      // Visits before the entry are wrapped around to large numbers.
      const Mask<T> survived = (Unsigned<T>)(now - entry) < survived_visits;
      if (has_event) {
        const Mask<T> event = event_time == now;
        slopes = likelihood.mixed(values, scale, event, event | survived);
      } else {
        slopes = likelihood.survived_where(survived, values, scale);
      }
    }
    if (wants_grad) store_within<T>(rows.grad + at, 0, std::min(lanes, present), slopes);
  }
  if (wants_grad) {
    for (int64_t time = series.last_time + 1; time < rows.most_visits; ++time) {
      const int64_t at = rows.row_starts[time] * classes + offset;
      const int64_t present = std::min(lanes, rows.row_starts[time + 1] * classes - at);
      if (present <= 0) break;  // nor is there one at any later time
      store_within<T>(rows.grad + at, 0, present, Lanes<T>{});
    }
  }

  likelihood.join(inside);
  const auto unfinished = likelihood.unfinished();
  for (int i = 0; i < Wide<T>::kParts; ++i) {
    store(lane_nll + begin + i * kLanes<double>,
          Likelihood::finish(unfinished.argument.part[i], unfinished.rest.part[i]));
  }
}

template <typename scalar_t>
bool probabilities_fit(const LossSettings& settings, const RankRows<scalar_t>& rows) {
  bool improbable = false;
  for (int64_t i = 0; i < rows.patients; ++i) {
    const Outcome& outcome = rows.outcomes[i];
    const auto visit = [&](int64_t time) {
      return rows.hazards + (rows.row_starts[time] + rows.first + i) * settings.classes;
    };
    const int64_t survived_end = outcome.time + settings.censored_included;
    for (int64_t time = outcome.entry; time < survived_end; ++time) {
      improbable |= any_improbable(visit(time), settings.classes);
    }
    if (outcome.type > 0) improbable |= any_improbable(visit(outcome.time) + outcome.type - 1, 1);
  }
  return !improbable;
}

template <typename Likelihood, typename T, typename scalar_t>
void nll_of_ranks(const LossSettings& settings, const RankRows<scalar_t>& rows, double* nll) {
  const int64_t classes = settings.classes;
  const int64_t values = rows.patients * classes;
  std::vector<double> lane_nll(values + kLanes<T>);
  Mask<T> inside = ~Mask<T>{};
  for (int64_t begin = 0; begin < values; begin += kLanes<T>) {
    nll_of_lanes<Likelihood, T>(settings, rows, begin, std::min(kLanes<T>, values - begin),
                                lane_nll.data(), &inside);
  }
  if (!all_set<T>(inside)) *rows.possible = probabilities_fit(settings, rows);
  for (int64_t i = 0; i < rows.patients; ++i) {
    nll[i] = 0;
    for (int64_t c = 0; c < classes; ++c) nll[i] += lane_nll[i * classes + c];
  }
}

template <typename scalar_t>
void ranks_nll(const LossSettings& settings, const RankRows<scalar_t>& rows, double* nll) {
  using T = accumulator_t<scalar_t>;
  if (settings.link == Link::kProbabilities) {
    nll_of_ranks<FromProbabilities<T, ProductOfLane<T>>, T>(settings, rows, nll);
  } else if (settings.link == Link::kCloglog) {
    nll_of_ranks<FromCloglog<T, SumOfSoftplusOfLane<T>>, T>(settings, rows, nll);
  } else {
    nll_of_ranks<FromLogits<T, SumOfSoftplusOfLane<T>>, T>(settings, rows, nll);
  }
}

}  // namespace ehrseq::survival::EHRSEQ_ISA
