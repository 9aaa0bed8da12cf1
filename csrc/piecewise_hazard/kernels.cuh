// piecewise_hazard_nll on a GPU: the kernel of the survival losses (survival_nll/kernels.cuh), with
// the terms of intervals in place of those of trials.
//
// With Λ the integral of the rate over an interval, an interval that was survived adds Λ, and the
// one at the event time f Λ - δ log Λ. It is read where f is not 0 or the event was in it.
#pragma once

#include <cstdint>

#include "common/cuda/device.cuh"
#include "common/survival/layouts.cuh"
#include "common/survival/outcomes.cuh"
#include "common/survival/sums.cuh"
#include "survival_nll/kernels.cuh"

namespace ehrseq::survival::piecewise::cuda {

using namespace ehrseq::survival::cuda;  // NOLINT: what all losses share

// Λ = log(1 + e^x): the loss of a trial that was survived.
template <typename T>
struct Softplus {
  static __device__ Term<T> integral(T x) { return FromLogits<T>::survived(x); }

  static __device__ Term<T> log_integral(T x) {
    if (x < T(-20)) {  // x - e^x / 2 to the last digit, where Λ itself may be 0
      const T half = exp(x) / T(2);
      return {x - half, T(1) - half};
    }
    const Term<T> whole = integral(x);
    return {log(whole.nll), whole.slope / whole.nll};
  }
};

// Λ = e^x
template <typename T>
struct Exp {
  static __device__ Term<T> integral(T x) {
    const T rate = exp(x);
    return {rate, rate};
  }
  static __device__ Term<T> log_integral(T x) { return {x, T(1)}; }
};

template <template <typename> class Rate_>
struct RateModel {};

// --- weights of visits -----------------------------------------------------------------------

// What a visit's term is multiplied by, and its slope. Without weights of visits a slope is scaled
// last, with them its weight is: the product of weight and slope may be too large.
struct NoWeight {
  template <typename T>
  __device__ Term<T> of(const Term<T>& term, T) const {
    return term;
  }
  template <typename T>
  __device__ T scaled(T slope, T scale) const {
    return slope * scale;
  }
};

template <typename T>
struct VisitWeight {
  T weight;

  __device__ Term<T> of(const Term<T>& term, T scale) const {
    return {weight * term.nll, weight * scale * term.slope};
  }
  __device__ T scaled(T slope, T) const { return slope; }
};

template <typename T, typename Visits>
__device__ NoWeight weight_of(const Visits&, unsigned) {
  return {};
}
template <typename T, typename Visits>
__device__ VisitWeight<T> weight_of(const WeightedVisits<Visits>& visits, unsigned visit) {
  return {visits.template weight<T>(visit)};
}

// --- one patient -----------------------------------------------------------------------------

// f Λ - δ log Λ. What is not seen is left out: 0 times an infinite Λ would be NaN. Both are
// weighed, as an infinite weight may make them infinities that cancel.
template <typename Rate, typename T, typename Weight>
__device__ Term<T> last_interval(T x, T fraction, bool is_event, const Weight& weight, T scale) {
  Term<T> term{0, 0};
  if (fraction != T(0)) {
    const Term<T> whole = Rate::integral(x);
    term = weight.of(Term<T>{fraction * whole.nll, fraction * whole.slope}, scale);
  }
  if (is_event) {
    const Term<T> of_log = weight.of(Rate::log_integral(x), scale);
    term = {term.nll - of_log.nll, term.slope - of_log.slope};
  }
  return term;
}

// `lane` of `settings.lanes` takes every lanes-th interval of the patient. Returns this lane's part
// of the loss.
template <template <typename> class Rate, typename Visits, typename scalar_t, typename grad_t>
__device__ accumulator_t<scalar_t> nll_of_patient(RateModel<Rate>, const Visits& visits,
                                                  const ClampedOutcome& outcome,
                                                  const KernelSettings& settings,
                                                  const Hazards<scalar_t, grad_t>& logits,
                                                  unsigned lane) {
  using T = accumulator_t<scalar_t>;
  const T scale = static_cast<T>(outcome.weight * settings.share);
  const T fraction = static_cast<T>(outcome.fraction);
  const bool is_event = outcome.type != 0;
  const bool last_is_read = is_event || fraction != T(0);
  const bool wants_grad = logits.grad != nullptr;
  const unsigned end = wants_grad ? settings.slots : outcome.read_to(settings.slots);

  T nll = 0;
  for (unsigned begin = lane; begin < end; begin += kInFlight * settings.lanes) {
    if (!visits.has(begin)) break;  // nor has it any later one
    int64_t at[kInFlight];
    T x[kInFlight];
    decltype(weight_of<T>(visits, 0)) weight[kInFlight];
    bool counts[kInFlight];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      const unsigned visit = begin + i * settings.lanes;
      const bool is_slot = visit < end && visits.has(visit);
      at[i] = is_slot ? visits.row(visit) : -1;
      const bool is_read = visit == outcome.time
                               ? last_is_read
                               : visit >= outcome.entry && visit < outcome.survived_to;
      counts[i] = is_slot && is_read && visits.counts(visit);
      x[i] = counts[i] ? T(widen(logits.values[at[i]])) : T(0);
      if (counts[i]) weight[i] = weight_of<T>(visits, visit);
    }
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      T slope = 0;
      if (counts[i]) {
        const Term<T> term =
            begin + i * settings.lanes == outcome.time
                ? last_interval<Rate<T>>(x[i], fraction, is_event, weight[i], scale)
                : weight[i].of(Rate<T>::integral(x[i]), scale);
        nll += term.nll;
        slope = signed_zero(weight[i].scaled(term.slope, scale));
      }
      if (wants_grad && at[i] >= 0) logits.grad[at[i]] = narrow<grad_t>(slope);
    }
  }
  return nll;
}

}  // namespace ehrseq::survival::piecewise::cuda
