// deephit_ranking on a GPU: a warp per patient, a lane for every 32nd visit.
//
// With F the cumulative sum of a patient's softmax (the class "beyond" having the logit 0), and
// a = F / σ the exponents, the pairs of an event of i at time T and of all j at risk after it add
//   Σ_j w_i w_j exp(a_j(T) - a_i(T)) = w_i exp(m(T) - a_i(T)) · Σ_j w_j exp(a_j(T) - m(T)),
// where m(T) is the largest a_j(T): one sum for each time and cause, shared by all its events. The
// first kernel makes these sums of groups of patients, each with a largest exponent of its own; the
// second joins them in the groups' order, and adds up the events; the third writes the gradient,
// for which it computes the exponents again: that costs less than memory for them.
//
// Values of outcomes are checked on the host (checks.py), if at all; whatever they are, no address
// outside the batch is formed from them. An event at a slot that is no visit of the patient has the
// incidence of the last visit, as in the formula of reference.py.
#pragma once

#include <cstdint>

#include "common/cuda/device.cuh"
#include "common/survival/layouts.cuh"
#include "common/survival/outcomes.cuh"
#include "common/survival/sums.cuh"

namespace ehrseq::survival::ranking::cuda {

using namespace ehrseq::survival::cuda;  // NOLINT: what all losses share

constexpr int kWarps = kThreads / kWarp;
constexpr int64_t kFewestOfGroup = 8;
constexpr int64_t kMostGroups = 1024;

struct Settings {
  int64_t patients;
  int64_t group;     // patients whose sums one warp makes
  int64_t groups;    // of all patients
  unsigned slots;    // the most visits that a patient can have
  unsigned classes;  // a visit's values: causes
  bool censored_included;
  double of_incidence;  // in an exponent: 1 / sigma
  double share;         // of a pair in the loss: 1 / patients²

  __device__ int64_t values() const { return int64_t{slots} * classes; }
};

// A patient's softmax: p = e^(x - largest) * share.
template <typename T>
struct Softmax {
  T largest;
  T share;
};

// What the first kernel leaves of each patient for the others.
template <typename T>
struct OfPatients {
  Softmax<T>* softmax;  // null where no gradient is needed
  double* incidence;    // [patients, classes], up to the outcome; null where no gradient is needed
  int* event;           // position of the event among a patient's values; -1 for none
  double* own;          // the exponent at the event, then the derivative by it, times -1
};

// Of each visit and cause: Σ_j w_j exp(exponent of j) over the patients j at risk after it is
// sum · exp(largest). A row for each group of patients.
template <typename T>
struct Later {
  T* largest;
  double* sum;
};

// Of each visit and cause, for the gradient.
template <typename T>
struct Slopes {
  T* largest;    // of all patients
  T* of_events;  // the derivative by the exponent of a later patient is w exp(exponent - largest)
                 // times this
};

// --- over the lanes of a warp ----------------------------------------------------------------

template <typename T>
__device__ T largest_of_lanes(T value) {
  for (int step = kWarp / 2; step > 0; step /= 2) {
    const T other = __shfl_xor_sync(kWholeWarp, value, step);
    value = other > value ? other : value;
  }
  return value;
}

__device__ inline double sum_up_to_lane(double value, unsigned lane) {
  for (unsigned step = 1; step < kWarp; step *= 2) {
    const double other = __shfl_up_sync(kWholeWarp, value, step);
    if (lane >= step) value += other;
  }
  return value;
}

__device__ inline double sum_from_lane(double value, unsigned lane) {
  for (unsigned step = 1; step < kWarp; step *= 2) {
    const double other = __shfl_sync(kWholeWarp, value, (lane + step) % kWarp);
    if (lane + step < kWarp) value += other;
  }
  return value;
}

// Of the same lane in all warps of a block, in the warps' order; for every warp.
template <typename T, typename Join>
__device__ T over_warps(T value, unsigned lane, const Join& join) {
  __shared__ T of_warps[kWarps][kWarp];
  __syncthreads();
  of_warps[threadIdx.x / kWarp][lane] = value;
  __syncthreads();
  T all = of_warps[0][lane];
  for (int warp = 1; warp < kWarps; ++warp) all = join(all, of_warps[warp][lane]);
  return all;
}

// --- one patient -----------------------------------------------------------------------------

template <typename Visits, typename scalar_t>
struct Patient {
  using T = accumulator_t<scalar_t>;

  Visits visits;
  ClampedOutcome outcome;
  const Settings& settings;
  const scalar_t* logits;
  unsigned lane;

  __device__ bool has(unsigned visit) const { return visit < settings.slots && visits.has(visit); }
  __device__ bool at_risk(unsigned visit) const {
    return visit >= outcome.entry && has(visit) && visits.counts(visit);
  }
  __device__ int64_t at(unsigned visit, unsigned cause) const {
    return visits.row(visit) * settings.classes + cause;
  }
  // -inf, which has no mass, where it is not at risk.
  __device__ T logit(unsigned visit, unsigned cause) const {
    return at_risk(visit) ? T(widen(logits[at(visit, cause)])) : static_cast<T>(-HUGE_VAL);
  }
  __device__ T mass(unsigned visit, unsigned cause, const Softmax<T>& softmax) const {
    return exp(logit(visit, cause) - softmax.largest) * softmax.share;
  }

  // Visits from here on have no part in any exponent that counts.
  __device__ unsigned end() const { return outcome.read_to(settings.slots); }
  __device__ T exponent(double incidence) const {
    return static_cast<T>(incidence * settings.of_incidence);
  }
  __device__ T weight() const { return static_cast<T>(outcome.weight); }

  __device__ bool has_event() const {
    return outcome.time < settings.slots && outcome.type > 0 &&
           outcome.type <= int64_t{settings.classes};
  }
  __device__ bool is_event(unsigned visit, unsigned cause) const {
    return has_event() && visit == outcome.time && cause + 1 == outcome.type;
  }
  // Whether the patient can be the later one of a pair then.
  __device__ bool is_later(unsigned visit) const {
    const bool survives_time = outcome.type == 0 && settings.censored_included;
    return (visit < outcome.survived_to || (visit == outcome.time && survives_time)) &&
           at_risk(visit);
  }

  template <typename Body>
  __device__ void for_each_logit(const Body& body) const {
    for (unsigned visit = lane; visit < settings.slots; visit += kWarp) {
      if (!visits.has(visit)) break;  // nor has it any later one
      for (unsigned cause = 0; cause < settings.classes; ++cause) body(logit(visit, cause));
    }
  }
};

template <typename scalar_t, typename Layout>
__device__ Patient<typename Layout::Visits, scalar_t> patient_at(
    int64_t patient, const Settings& settings, const Layout& layout, const OutcomeColumns& outcomes,
    const scalar_t* logits, unsigned lane) {
  return {layout.visits_of(patient, settings.slots), outcome_of(patient, outcomes, settings.slots),
          settings, logits, lane};
}

// A NaN or an infinite logit makes the whole row NaN, but -inf, which is no mass.
template <typename Patient, typename T = typename Patient::T>
__device__ Softmax<T> softmax_of(const Patient& patient) {
  T largest = 0;  // the logit of "beyond"
  patient.for_each_logit([&](T x) { largest = x > largest ? x : largest; });
  largest = largest_of_lanes(largest);
  double sum = 0;
  patient.for_each_logit([&](T x) { sum += static_cast<double>(exp(x - largest)); });
  sum = sum_of_lanes(sum, kWarp) + exp(-static_cast<double>(largest));
  return {largest, static_cast<T>(1 / sum)};
}

// --- sums over patients ----------------------------------------------------------------------

// One more exponent of a visit and cause. A patient of weight 0 is left out, but for a NaN: beside
// its exponent all others might vanish.
template <typename T>
__device__ void add_later(T x, T weight, T& largest, double& sum) {
  if (weight == T(0)) {
    sum += static_cast<double>(x * T(0));
    return;
  }
  if (x > largest) {
    sum *= static_cast<double>(exp(largest - x));
    largest = x;
  }
  sum += static_cast<double>(exp(x - largest) * weight);
}

// The sums of groups of patients.
//   grid    x: kWarps groups per block
//   block   kThreads: a warp per group takes its patients one after another; a lane has every 32nd
//           visit of each of them, and of the sums
//   shared  none
//   reads   outcomes, the mask or row numbers, logits at risk (three times)
//   writes  later [groups, values], and all of `all`
template <typename Layout, typename scalar_t>
__global__ void __launch_bounds__(kThreads, 1)
    sum_later(const Settings settings, const Layout layout, const OutcomeColumns outcomes,
              const scalar_t* logits, const OfPatients<accumulator_t<scalar_t>> all,
              const Later<accumulator_t<scalar_t>> later) {
  using T = accumulator_t<scalar_t>;
  const unsigned lane = threadIdx.x % kWarp;
  const int64_t group = int64_t{blockIdx.x} * kWarps + threadIdx.x / kWarp;
  if (group >= settings.groups) return;
  T* largest = later.largest + group * settings.values();
  double* sum = later.sum + group * settings.values();
  for (unsigned visit = lane; visit < settings.slots; visit += kWarp) {
    for (unsigned cause = 0; cause < settings.classes; ++cause) {
      largest[visit * settings.classes + cause] = 0;  // no exponent is below
      sum[visit * settings.classes + cause] = 0;
    }
  }

  const int64_t first = group * settings.group;
  const int64_t last = min(first + settings.group, settings.patients);
  for (int64_t number = first; number < last; ++number) {
    const auto patient = patient_at(number, settings, layout, outcomes, logits, lane);
    const Softmax<T> softmax = softmax_of(patient);
    if (lane == 0) {
      if (all.softmax != nullptr) all.softmax[number] = softmax;
      all.event[number] = patient.has_event()
                              ? static_cast<int>(patient.outcome.time * settings.classes +
                                                 static_cast<unsigned>(patient.outcome.type) - 1)
                              : -1;
    }
    const T weight = patient.weight();
    for (unsigned cause = 0; cause < settings.classes; ++cause) {
      double before = 0;  // the incidence until these visits
      for (unsigned begin = 0; begin < patient.end(); begin += kWarp) {
        const unsigned visit = begin + lane;
        const T mass = visit < patient.end() ? patient.mass(visit, cause, softmax) : T(0);
        const double incidence = before + sum_up_to_lane(static_cast<double>(mass), lane);
        before = __shfl_sync(kWholeWarp, incidence, kWarp - 1);
        const T x = patient.exponent(incidence);
        if (patient.is_event(visit, cause)) all.own[number] = static_cast<double>(x);
        if (patient.is_later(visit)) {
          const unsigned at = visit * settings.classes + cause;
          add_later(x, weight, largest[at], sum[at]);
        }
      }
      if (all.incidence != nullptr && lane == 0) {
        all.incidence[number * settings.classes + cause] = before;
      }
    }
  }
}

// The sums of all patients, and the loss.
//   grid    x: at most kMostBlocks; 32 visits and causes per block (a grid-stride loop)
//   block   kThreads: a lane for each of them; a warp takes every kWarps-th group, and every
//           kWarps-th 32 patients
//   shared  one value per thread (static, of T and of double), one sum per warp
//   reads   later [groups, values], events, weights
//   writes  slopes [values]; own [patients]; the loss, result.partials [blocks] and the counter
template <typename T>
__global__ void __launch_bounds__(kThreads, 1)
    join_later(const Settings settings, const OutcomeColumns outcomes, const OfPatients<T> all,
               const Later<T> later, const Slopes<T> slopes, const Result<T> result) {
  const unsigned lane = threadIdx.x % kWarp;
  const int64_t warp = threadIdx.x / kWarp;
  const int64_t values = settings.values();
  const double share_of_slope = settings.share * settings.of_incidence;
  const auto added = [](double a, double b) { return a + b; };
  double loss = 0;
  for (int64_t first = int64_t{blockIdx.x} * kWarp; first < values;
       first += int64_t{gridDim.x} * kWarp) {
    const int64_t position = first + lane;
    const int64_t groups = position < values ? settings.groups : 0;
    T largest = 0;
    for (int64_t group = warp; group < groups; group += kWarps) {
      const T x = later.largest[group * values + position];
      largest = x > largest ? x : largest;
    }
    largest = over_warps(largest, lane, [](T a, T b) { return b > a ? b : a; });
    double of_later = 0;
    for (int64_t group = warp; group < groups; group += kWarps) {
      const int64_t at = group * values + position;
      of_later += later.sum[at] * static_cast<double>(exp(later.largest[at] - largest));
    }
    of_later = over_warps(of_later, lane, added);

    double of_events = 0;
    for (int64_t begin = warp * kWarp; begin < settings.patients; begin += kThreads) {
      const int64_t patient = begin + lane;
      const int64_t event = patient < settings.patients ? all.event[patient] : -1;
      const bool is_here = event >= first && event < first + kWarp;
      unsigned here = __ballot_sync(kWholeWarp, is_here);
      if (here == 0) continue;
      const int place = is_here ? static_cast<int>(event - first) : 0;
      const double base = __shfl_sync(kWholeWarp, static_cast<double>(largest), place);
      const double of_place = __shfl_sync(kWholeWarp, of_later, place);
      double own = 0;
      if (is_here) {
        const double exponent = base - all.own[patient];
        const T weight = outcomes.weights.data == nullptr
                             ? T(1)
                             : static_cast<T>(number_at(outcomes.weights, patient));
        // a weight of 0 leaves the event out, but for a NaN
        own = weight == T(0) ? exponent * 0 : static_cast<double>(weight) * exp(exponent);
        all.own[patient] = own * of_place * share_of_slope;
      }
      for (; here != 0; here &= here - 1) {  // in the patients' order
        const int source = __ffs(static_cast<int>(here)) - 1;
        const double of_source = __shfl_sync(kWholeWarp, own, source);
        if (__shfl_sync(kWholeWarp, place, source) == static_cast<int>(lane)) {
          of_events += of_source;
        }
      }
    }
    of_events = over_warps(of_events, lane, added);
    if (warp == 0 && position < values) {
      loss += of_later * of_events;
      slopes.largest[position] = largest;
      slopes.of_events[position] = static_cast<T>(of_events * share_of_slope);
    }
  }
  finish_sum(result, sum_of_block(loss), settings.share);
}

// --- gradient --------------------------------------------------------------------------------

// Calls body(visit, cause, mass, slope) of this lane's visits below `last`, the latest first: slope
// is the derivative of the loss by the mass.
template <typename Patient, typename T, typename Body>
__device__ void for_each_slope(const Patient& patient, int64_t number, const OfPatients<T>& all,
                               const Slopes<T>& slopes, unsigned last, const Body& body) {
  const Settings& settings = patient.settings;
  const Softmax<T> softmax = all.softmax[number];
  const T weight = patient.weight();
  const auto by_exponent = [&](unsigned visit, unsigned cause, T x) {
    if (patient.is_event(visit, cause)) return static_cast<T>(-all.own[number]);
    if (visit >= patient.end() || !patient.is_later(visit)) return T(0);
    const unsigned at = visit * settings.classes + cause;
    const T term = weight == T(0) ? x * T(0) : exp(x - slopes.largest[at]) * weight;
    return term * slopes.of_events[at];
  };
  for (unsigned cause = 0; cause < settings.classes; ++cause) {
    double until = all.incidence[number * settings.classes + cause];
    double of_later_visits = 0;
    for (unsigned chunk = (last + kWarp - 1) / kWarp; chunk-- > 0;) {
      const unsigned visit = chunk * kWarp + patient.lane;
      const T mass = patient.mass(visit, cause, softmax);
      double slope = 0;
      if (chunk * kWarp < patient.end()) {  // of no lane, or of all
        const double own = visit < patient.end() ? static_cast<double>(mass) : 0.0;
        const double sum = sum_up_to_lane(own, patient.lane);
        until -= __shfl_sync(kWholeWarp, sum, kWarp - 1);
        const T x = patient.exponent(until + sum);
        const double of_visit = static_cast<double>(by_exponent(visit, cause, x));
        slope = of_later_visits + sum_from_lane(of_visit, patient.lane);
        of_later_visits = __shfl_sync(kWholeWarp, slope, 0);
      }
      body(visit, cause, mass, slope);
    }
  }
}

// The gradient of the loss by the logits.
//   grid    x: kWarps patients per block
//   block   kThreads: a warp per patient, a lane for every 32nd visit
//   shared  none
//   reads   outcomes, the mask or row numbers, logits at risk (twice), what the other kernels left
//   writes  grad: every value, zeros off risk
template <typename Layout, typename scalar_t, typename grad_t>
__global__ void __launch_bounds__(kThreads, 1)
    write_gradients(const Settings settings, const Layout layout, const OutcomeColumns outcomes,
                    const scalar_t* logits, const OfPatients<accumulator_t<scalar_t>> all,
                    const Slopes<accumulator_t<scalar_t>> slopes, grad_t* grad) {
  using T = accumulator_t<scalar_t>;
  const unsigned lane = threadIdx.x % kWarp;
  const int64_t number = int64_t{blockIdx.x} * kWarps + threadIdx.x / kWarp;
  if (number >= settings.patients) return;
  const auto patient = patient_at(number, settings, layout, outcomes, logits, lane);
  // Visits that are not at risk have a mass of 0, but make an infinite slope NaN, as in the
  // formula.
  double mean = 0;
  for_each_slope(
      patient, number, all, slopes, patient.end(),
      [&](unsigned, unsigned, T mass, double slope) { mean += static_cast<double>(mass) * slope; });
  mean = sum_of_lanes(mean, kWarp);

  // As survival_nll_scale reads it: -0 is the derivative of a visit that counts, 0 of none.
  const ClampedOutcome& outcome = patient.outcome;
  const bool survives_time = outcome.type == 0 && settings.censored_included;
  const bool counts =
      patient.has_event() || outcome.entry < outcome.survived_to + (survives_time ? 1 : 0);
  const T zero = counts ? -T(0) : T(0);
  for_each_slope(patient, number, all, slopes, settings.slots,
                 [&](unsigned visit, unsigned cause, T mass, double slope) {
                   if (!patient.has(visit)) return;
                   T value = 0;
                   if (patient.at_risk(visit)) {
                     value = static_cast<T>(static_cast<double>(mass) * (slope - mean));
                     if (value == T(0)) value = zero;
                   }
                   grad[patient.at(visit, cause)] = narrow<grad_t>(value);
                 });
}

}  // namespace ehrseq::survival::ranking::cuda
