// pmf_nll on a GPU: a group of lanes per patient. They read the patient's logits once, for the sums
// of two log-sum-exps with running maxima, and, where a gradient is needed, once more.
//
// Of the classes at risk, the outcome is one (an event) or some (a censoring: all that is later,
// and "beyond", whose logit is 0). With d the log-sum-exp of the others minus that of the outcome,
//   -log P(outcome | at risk) = log(1 + e^d),
// and the derivative is sigmoid(d) times the softmax among the others, and minus that among the
// outcome.
//
// Values of outcomes are checked on the host (checks.py), if at all; whatever they are, no address
// outside the batch is formed from them. An event outside the patient's visits counts as "beyond",
// and what the mask leaves out is not at risk, as in the formula of reference.py.
#pragma once

#include <cstdint>

#include "common/cuda/device.cuh"
#include "common/survival/layouts.cuh"
#include "common/survival/outcomes.cuh"
#include "common/survival/sums.cuh"

namespace ehrseq::survival::pmf::cuda {

using namespace ehrseq::survival::cuda;  // NOLINT: what all losses share

struct Settings {
  int64_t patients;
  unsigned slots;    // the most visits that a patient can have
  unsigned classes;  // a visit's values: causes
  bool censored_included;
  bool reduces;  // to one number
  double share;  // of one patient in the result: 1 / patients for the mean, else 1
  int lanes;     // that share a patient: a power of two, at most a warp
};

template <typename scalar_t, typename grad_t>
struct Logits {
  const scalar_t* values;
  grad_t* grad;  // null where none is needed
};

template <typename T>
__device__ constexpr T impossible() {
  return static_cast<T>(-HUGE_VAL);  // the logit of a class that cannot be
}

// A log-sum-exp: Σ e^(x - largest). Where no class can be, the largest is -inf and the sum 0. A NaN
// or an infinite logit makes the sum NaN.
template <typename T>
struct LogSum {
  T largest = impossible<T>();
  T sum = 0;

  __device__ __forceinline__ void add(const T (&x)[kInFlight]) {
    T most = largest;
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) most = x[i] > most ? x[i] : most;  // a NaN: see the sum
    const T base = most == impossible<T>() ? T(0) : most;
    sum *= exp(largest - base);
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) sum += exp(x[i] - base);
    largest = most;
  }
};

// The same bits whichever of the two comes first.
template <typename T>
__device__ LogSum<T> joined(const LogSum<T>& one, const LogSum<T>& another) {
  const bool ordered = one.largest >= another.largest;
  const T largest = ordered ? one.largest : another.largest;
  const T lower = ordered ? another.largest : one.largest;
  const T sum = ordered ? one.sum : another.sum;
  const T of_lower = ordered ? another.sum : one.sum;
  return {largest, sum + of_lower * (lower == largest ? T(1) : exp(lower - largest))};
}

// Of some lanes together; the butterfly leaves the same bits in each of them.
template <typename T>
__device__ LogSum<T> joined_lanes(LogSum<T> part, int lanes) {
  for (int step = lanes / 2; step > 0; step /= 2) {
    const T largest = __shfl_xor_sync(kWholeWarp, part.largest, step);
    const T sum = __shfl_xor_sync(kWholeWarp, part.sum, step);
    part = joined(part, {largest, sum});
  }
  return part;
}

template <typename T>
struct Loss {
  T nll;
  T of_others;  // the derivative by a class is this times e^(x - largest)
  T of_outcome;
};

template <typename T>
__device__ Loss<T> loss_of(const LogSum<T>& others, const LogSum<T>& outcome) {
  if (others.sum == T(0)) {                    // the outcome is certain
    const T none = outcome.sum - outcome.sum;  // 0; a NaN stays one
    return {none, none, none};
  }
  constexpr T kLarge = sizeof(T) == 8 ? 600 : 40;  // e to which is far from infinity
  const T apart = others.largest - outcome.largest;
  const T ratio = others.sum / outcome.sum;
  const T odds = apart > kLarge ? ratio : exp(apart) * ratio;
  const T nll = apart > kLarge ? apart + log(ratio) : log1p(odds);
  T chance = apart > kLarge ? ratio / ratio : odds / (T(1) + odds);  // of the others
  if (outcome.sum == T(0)) chance = T(1);                            // the event cannot be
  return {nll, chance / others.sum, -chance / outcome.sum};
}

// --- one patient -----------------------------------------------------------------------------

// What is at risk, and what of it is the outcome: the visits from `later` on, or the one value at
// `event`.
struct Roles {
  unsigned entry;
  unsigned later;  // slots for an event
  int64_t event;   // -1 for none
  bool is_event;
};

template <typename Visits>
__device__ Roles roles_of(const Visits& visits, const ClampedOutcome& outcome,
                          const Settings& settings) {
  if (outcome.type == 0) {
    const bool within = outcome.time < settings.slots;
    const unsigned later =
        within && settings.censored_included ? outcome.time + 1 : outcome.survived_to;
    return {outcome.entry, later, -1, false};
  }
  const bool at_risk = outcome.time < settings.slots && outcome.time >= outcome.entry &&
                       outcome.type > 0 && outcome.type <= int64_t{settings.classes} &&
                       visits.has(outcome.time) && visits.counts(outcome.time);
  const int64_t event =
      at_risk ? visits.row(outcome.time) * settings.classes + (outcome.type - 1) : -1;
  return {outcome.entry, settings.slots, event, true};
}

// Where kInFlight of a lane's values are, and the visits that they are of.
struct Places {
  int64_t at[kInFlight];  // -1 past the last
  unsigned visit[kInFlight];

  template <typename Visits>
  __device__ __forceinline__ Places(const Visits& visits, const Settings& settings, unsigned first,
                                    unsigned last) {
    const unsigned classes = settings.classes;
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      const unsigned position = first + i * settings.lanes;
      visit[i] = classes == 1 ? position : position / classes;
      const bool is_slot = position < last && visits.has(visit[i]);
      at[i] = is_slot ? visits.row(visit[i]) * classes + (position - visit[i] * classes) : -1;
    }
  }
};

// This lane's share of the log-sum-exp of visits `begin` to `end`, without the event.
template <typename Visits, typename scalar_t>
__device__ auto log_sum_of(const Visits& visits, const Settings& settings, const scalar_t* logits,
                           unsigned begin, unsigned end, int64_t event, unsigned lane) {
  using T = accumulator_t<scalar_t>;
  const unsigned classes = settings.classes;
  const unsigned last = end * classes;
  LogSum<T> part;
  for (unsigned first = begin * classes + lane; first < last; first += kInFlight * settings.lanes) {
    if (!visits.has(first / classes)) break;  // nor has the patient any later one
    const Places places(visits, settings, first, last);
    T x[kInFlight];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      const int64_t at = places.at[i];
      const bool counts = at >= 0 && at != event && visits.counts(places.visit[i]);
      x[i] = counts ? T(widen(logits[at])) : impossible<T>();
    }
    part.add(x);
  }
  return part;
}

// What a logit's derivative is made of: factor * e^(x - largest).
template <typename T>
struct Slope {
  T factor;
  T largest;
};

// Every value that the patient has a place for. As survival_nll_scale reads it: -0 is the
// derivative of a class that counts, 0 of none, nor of the others where none of them can be.
template <typename Visits, typename scalar_t, typename grad_t, typename T>
__device__ void write_gradient(const Visits& visits, const Settings& settings, const Roles& roles,
                               const Logits<scalar_t, grad_t>& logits, const Slope<T>& others,
                               const Slope<T>& outcome, bool others_count, unsigned lane) {
  const unsigned last = settings.slots * settings.classes;
  for (unsigned first = lane; first < last; first += kInFlight * settings.lanes) {
    if (!visits.has(first / settings.classes)) break;  // nor has the patient any later one
    const Places places(visits, settings, first, last);
    T x[kInFlight];
    bool counts[kInFlight];
    bool is_outcome[kInFlight];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      const int64_t at = places.at[i];
      is_outcome[i] = at == roles.event || places.visit[i] >= roles.later;
      counts[i] = at >= 0 && places.visit[i] >= roles.entry && (is_outcome[i] || others_count) &&
                  visits.counts(places.visit[i]);
      x[i] = counts[i] ? T(widen(logits.values[at])) : T(0);
    }
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      const T factor = is_outcome[i] ? outcome.factor : others.factor;
      const T largest = is_outcome[i] ? outcome.largest : others.largest;
      T slope = counts[i] ? factor * exp(x[i] - largest) : T(0);
      if (counts[i] && slope == T(0)) slope = -T(0);
      if (places.at[i] >= 0) logits.grad[places.at[i]] = narrow<grad_t>(slope);
    }
  }
}

// The loss of a patient, unweighted, in each of its lanes. All lanes of the warp have to come here;
// only those for which `exists` write a gradient.
template <typename Visits, typename scalar_t, typename grad_t>
__device__ accumulator_t<scalar_t> nll_of_patient(const Visits& visits,
                                                  const ClampedOutcome& patient,
                                                  const Settings& settings,
                                                  const Logits<scalar_t, grad_t>& logits,
                                                  unsigned lane, bool exists) {
  using T = accumulator_t<scalar_t>;
  const Roles roles = roles_of(visits, patient, settings);
  const unsigned first_later = roles.later > roles.entry ? roles.later : roles.entry;
  LogSum<T> others =
      log_sum_of(visits, settings, logits.values, roles.entry, roles.later, roles.event, lane);
  LogSum<T> outcome =
      log_sum_of(visits, settings, logits.values, first_later, settings.slots, int64_t{-1}, lane);
  others = joined_lanes(others, settings.lanes);
  outcome = joined_lanes(outcome, settings.lanes);
  const LogSum<T> beyond{T(0), T(1)};
  if (roles.is_event) {
    const T x = roles.event >= 0 ? T(widen(logits.values[roles.event])) : T(0);
    const bool can_be = x != impossible<T>();
    others = joined(others, beyond);
    outcome = {can_be ? x : T(0), can_be ? T(1) + (x - x) : T(0)};
  } else {
    outcome = joined(outcome, beyond);
  }
  const Loss<T> loss = loss_of(others, outcome);
  if (logits.grad != nullptr && exists) {
    const T scale = static_cast<T>(patient.weight * settings.share);
    write_gradient(visits, settings, roles, logits,
                   Slope<T>{loss.of_others * scale, others.largest},
                   Slope<T>{loss.of_outcome * scale, outcome.largest}, others.sum != T(0), lane);
  }
  return loss.nll;
}

// --- all patients ----------------------------------------------------------------------------

// Loss and gradient of all patients, and the sum of the losses.
//   grid    x: at most kMostBlocks; kThreads / lanes patients per block (a grid-stride loop)
//   block   kThreads, as groups of settings.lanes lanes, one patient each; a lane takes every
//           lanes-th value of its patient, kInFlight at a time
//   shared  one sum per warp (static), where patients are summed
//   reads   outcomes, the mask or row numbers, logits at risk (twice where a gradient is needed)
//   writes  result.nll: one number, or [patients]; logits.grad: every value, zeros off risk;
//           result.partials [blocks] and the counter, where several blocks are summed
template <typename Layout, typename scalar_t, typename grad_t>
__global__ void __launch_bounds__(kThreads, 1)
    pmf_nll_and_grad(const Settings settings, const Layout layout, const OutcomeColumns outcomes,
                     const Logits<scalar_t, grad_t> logits,
                     const Result<accumulator_t<scalar_t>> result) {
  using nll_t = accumulator_t<scalar_t>;
  const unsigned lane = threadIdx.x & (settings.lanes - 1);
  const int64_t groups = kThreads / settings.lanes;
  double sum = 0;
  // All lanes of a warp take part in the shuffles, so all make as many iterations; those past the
  // last patient read it once more.
  for (int64_t first = blockIdx.x * groups; first < settings.patients;
       first += gridDim.x * groups) {
    const int64_t own = first + threadIdx.x / settings.lanes;
    const bool exists = own < settings.patients;
    const int64_t patient = exists ? own : settings.patients - 1;
    const ClampedOutcome outcome = outcome_of(patient, outcomes, settings.slots);
    const nll_t nll = nll_of_patient(layout.visits_of(patient, settings.slots), outcome, settings,
                                     logits, lane, exists);
    if (exists && lane == 0) {
      const double weighted = static_cast<double>(nll) * outcome.weight;
      if (!settings.reduces) result.nll[patient] = static_cast<nll_t>(weighted);
      sum += weighted;
    }
  }
  if (settings.reduces) finish_sum(result, sum_of_block(sum), settings.share);
}

}  // namespace ehrseq::survival::pmf::cuda
