// The survival losses on a GPU: a group of lanes per patient, loss and gradient in one pass over
// the patient's visits, and the sum over patients in the same launch.
//
// Values of outcomes are checked on the host (checks.py), if at all; whatever they are, no address
// outside the batch is formed from them. A time outside the patient's visits has no visit of the
// event, and what the mask leaves out has no part in the loss, as in the formula of reference.py.
#pragma once

#include <cstdint>

#include "common/cuda/device.cuh"
#include "common/survival/layouts.cuh"
#include "common/survival/outcomes.cuh"
#include "common/survival/sums.cuh"

namespace ehrseq::survival::cuda {

using namespace ehrseq::cuda;  // NOLINT: what all kernels share

struct KernelSettings {
  int64_t patients;
  unsigned slots;    // the most visits that a patient can have
  unsigned classes;  // a visit's values: causes, and one more for softmax
  bool censored_included;
  bool reduces;  // to one number
  double eps;
  double nll_of_eps;  // -log(eps)
  double share;       // of one patient in the result: 1 / patients for the mean, else 1
  int lanes;          // that share a patient: a power of two, at most a warp
};

// --- one visit's part ------------------------------------------------------------------------

// A Bernoulli trial's part of the loss, and the derivative of that.
template <typename T>
struct Term {
  T nll;
  T slope;
};

// A derivative of 0 that a value has is written as -0, and +0 where no value counts, or where it
// was clamped: infinity times the one is NaN in the backward pass, times the other 0 (scaled
// below).
template <typename T>
__device__ T signed_zero(T x) {
  return x == T(0) ? -T(0) : x;
}

template <typename T>
struct FromProbabilities {
  T lowest;
  T highest;
  T nll_of_eps;
  bool rounds;  // 1 - eps to 1, and maybe eps to 0: the clamp shall hold all the same

  __device__ explicit FromProbabilities(const KernelSettings& settings)
      : lowest(static_cast<T>(settings.eps)),
        highest(static_cast<T>(1 - settings.eps)),
        nll_of_eps(static_cast<T>(settings.nll_of_eps)),
        rounds(settings.eps > 0 && highest == T(1)) {}

  __device__ Term<T> survived(T h) const {
    const T clamped = clamp(h);
    if (rounds && h >= T(1)) return {nll_of_eps, T(0)};
    return {-log1p(-clamped), inside(h) ? T(1) / (T(1) - clamped) : T(0)};
  }
  __device__ Term<T> event(T h) const {
    const T clamped = clamp(h);
    if (rounds && h <= T(0)) return {nll_of_eps, T(0)};
    return {-log(clamped), inside(h) ? T(-1) / clamped : T(0)};
  }
  // The slope of a clamped value is +0 whatever the scale.
  static __device__ T scaled(T slope, T scale) {
    return slope == T(0) ? slope : signed_zero(slope * scale);
  }

 private:
  // Comparisons, not fmin and fmax: a NaN at risk has to reach the loss.
  __device__ T clamp(T h) const {
    const T raised = h < lowest ? lowest : h;
    return raised > highest ? highest : raised;
  }
  __device__ bool inside(T h) const {
    return h >= lowest && h <= highest && !(rounds && (h <= T(0) || h >= T(1)));
  }
};

template <typename T>
struct FromLogits {
  __device__ explicit FromLogits(const KernelSettings&) {}

  // -log(1 - sigmoid(x)) = softplus(x) = max(x, 0) + log(1 + e^-|x|)
  static __device__ Term<T> survived(T x) {
    const T decay = exp(x > 0 ? -x : x);
    return {(x > 0 ? x : T(0)) + log1p(decay), (x > 0 ? T(1) : decay) / (T(1) + decay)};
  }
  __device__ Term<T> event(T x) const {
    const Term<T> mirrored = survived(-x);
    return {mirrored.nll, -mirrored.slope};
  }
  static __device__ T scaled(T slope, T scale) { return signed_zero(slope * scale); }
};

// With h = 1 - exp(-m), m = e^x.
template <typename T>
struct FromCloglog {
  __device__ explicit FromCloglog(const KernelSettings&) {}

  __device__ Term<T> survived(T x) const {
    const T m = exp(x);
    return {m, m};
  }
  // -log(1 - e^-m), without a loss of digits where m is tiny or large; e^-e^7 is 0.
  __device__ Term<T> event(T x) const {
    const T m = exp(x > T(7) ? T(7) : x);
    const T decay = exp(-m);
    if (x > T(0)) {
      const T excess = decay / (T(1) - decay);
      return {log1p(excess), -m * excess};
    }
    const T ratio = m == T(0) ? T(1) : -expm1(-m) / m;
    return {-x - log(ratio), -decay / ratio};
  }
  static __device__ T scaled(T slope, T scale) { return signed_zero(slope * scale); }
};

// --- one patient -----------------------------------------------------------------------------

template <typename scalar_t, typename grad_t>
struct Hazards {
  const scalar_t* values;
  grad_t* grad;  // null where none is needed
};

// Each of K hazards per visit is a trial of its own: `lane` of `lanes` takes every lanes-th of the
// patient's values, and lane 0 the one trial that is the event. Returns this lane's part of the
// loss.
template <template <typename> class Likelihood, typename Visits, typename scalar_t, typename grad_t>
__device__ accumulator_t<scalar_t> nll_of_trials(const Visits& visits,
                                                 const ClampedOutcome& outcome,
                                                 const KernelSettings& settings,
                                                 const Hazards<scalar_t, grad_t>& hazards,
                                                 unsigned lane) {
  using T = accumulator_t<scalar_t>;
  const Likelihood<T> likelihood(settings);
  const T scale = static_cast<T>(outcome.weight * settings.share);
  const unsigned classes = settings.classes;
  const bool wants_grad = hazards.grad != nullptr;
  const unsigned end = (wants_grad ? settings.slots : outcome.read_to(settings.slots)) * classes;
  const auto is_survived = [&](unsigned visit) {
    return (visit >= outcome.entry && visit < outcome.survived_to) ||
           (settings.censored_included && visit == outcome.time);
  };

  const bool has_event = outcome.time < settings.slots && outcome.type > 0 &&
                         outcome.type <= int64_t{classes} && visits.has(outcome.time) &&
                         visits.counts(outcome.time);
  const unsigned cause = has_event ? static_cast<unsigned>(outcome.type) - 1 : 0;
  const int64_t event_at = has_event ? visits.row(outcome.time) * classes + cause : -1;
  const T event_value = has_event && lane == 0 ? T(widen(hazards.values[event_at])) : T(0);
  const T event_weight = has_event && lane == 0 ? visits.template weight<T>(outcome.time) : T(1);

  T nll = 0;
  for (unsigned begin = lane; begin < end; begin += kInFlight * settings.lanes) {
    if (!visits.has(begin / classes)) break;  // nor has it any later one
    int64_t at[kInFlight];
    T value[kInFlight];
    T weight[kInFlight];
    bool counts[kInFlight];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      const unsigned position = begin + i * settings.lanes;
      const unsigned visit = classes == 1 ? position : position / classes;
      const bool is_slot = position < end && visits.has(visit);
      at[i] = is_slot ? visits.row(visit) * classes + (position - visit * classes) : -1;
      counts[i] = is_slot && at[i] != event_at && is_survived(visit) && visits.counts(visit);
      value[i] = counts[i] ? T(widen(hazards.values[at[i]])) : T(0);
      weight[i] = counts[i] ? visits.template weight<T>(visit) : T(1);
    }
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      T slope = 0;
      if (counts[i]) {
        const Term<T> term = likelihood.survived(value[i]);
        nll += weight[i] * term.nll;
        slope = Likelihood<T>::scaled(term.slope, weight[i] * scale);
      }
      if (wants_grad && at[i] >= 0 && at[i] != event_at) {
        hazards.grad[at[i]] = narrow<grad_t>(slope);
      }
    }
  }
  if (has_event && lane == 0) {
    const Term<T> term = likelihood.event(event_value);
    nll += event_weight * term.nll;
    if (wants_grad) {
      const T slope = Likelihood<T>::scaled(term.slope, event_weight * scale);
      hazards.grad[event_at] = narrow<grad_t>(slope);
    }
  }
  return nll;
}

// A visit whose class is `target`: -log softmax(x)[target]. With m the largest logit that is
// (m - x_target) + log(1 + Σ over the others of e^(x - m)): tiny losses keep their digits.
template <typename scalar_t, typename grad_t>
__device__ accumulator_t<scalar_t> nll_of_class(const scalar_t* logits, grad_t* grad,
                                                unsigned classes, unsigned target,
                                                accumulator_t<scalar_t> scale) {
  using T = accumulator_t<scalar_t>;
  T largest = widen(logits[0]);
  unsigned which = 0;
  for (unsigned c = 1; c < classes; ++c) {
    const T x = widen(logits[c]);
    if (x > largest) {
      largest = x;
      which = c;
    }
  }
  T others = largest - largest;  // 0, or NaN where softmax is not defined
  for (unsigned c = 0; c < classes; ++c) {
    if (c != which) others += exp(T(widen(logits[c])) - largest);
  }
  if (grad != nullptr) {
    const T share = scale / (T(1) + others);
    for (unsigned c = 0; c < classes; ++c) {
      const T p = c == which ? share : exp(T(widen(logits[c])) - largest) * share;
      grad[c] = narrow<grad_t>(signed_zero(p - (c == target ? scale : T(0))));
    }
  }
  return (largest - T(widen(logits[target]))) + log1p(others);
}

// K + 1 classes per visit, of which 0 is no event; a lane takes every lanes-th visit.
template <typename Visits, typename scalar_t, typename grad_t>
__device__ accumulator_t<scalar_t> nll_of_classes(const Visits& visits,
                                                  const ClampedOutcome& outcome,
                                                  const KernelSettings& settings,
                                                  const Hazards<scalar_t, grad_t>& hazards,
                                                  unsigned lane) {
  using T = accumulator_t<scalar_t>;
  const T scale = static_cast<T>(outcome.weight * settings.share);
  const unsigned classes = settings.classes;
  const bool time_counts = outcome.type == 0 ? settings.censored_included
                                             : outcome.type > 0 && outcome.type < int64_t{classes};
  const unsigned end = hazards.grad != nullptr ? settings.slots : outcome.read_to(settings.slots);

  T nll = 0;
  for (unsigned visit = lane; visit < end; visit += settings.lanes) {
    if (!visits.has(visit)) break;  // nor has it any later one
    const int64_t at = visits.row(visit) * classes;
    grad_t* grad = hazards.grad != nullptr ? hazards.grad + at : nullptr;
    const bool survived = visit >= outcome.entry && visit < outcome.survived_to;
    if ((survived || (visit == outcome.time && time_counts)) && visits.counts(visit)) {
      const unsigned target = survived ? 0 : static_cast<unsigned>(outcome.type);
      const T weight = visits.template weight<T>(visit);
      nll += weight * nll_of_class(hazards.values + at, grad, classes, target, weight * scale);
    } else if (grad != nullptr) {
      for (unsigned c = 0; c < classes; ++c) grad[c] = narrow<grad_t>(T(0));
    }
  }
  return nll;
}

// --- all patients ----------------------------------------------------------------------------

// What the values of a visit are: logits of classes, or trials of a Likelihood.
struct SoftmaxModel {};
template <template <typename> class Likelihood_>
struct BernoulliModel {};

template <template <typename> class Likelihood, typename... Arguments>
__device__ auto nll_of_patient(BernoulliModel<Likelihood>, const Arguments&... arguments) {
  return nll_of_trials<Likelihood>(arguments...);
}
template <typename... Arguments>
__device__ auto nll_of_patient(SoftmaxModel, const Arguments&... arguments) {
  return nll_of_classes(arguments...);
}

// Loss and gradient of all patients, and the sum of the losses.
//   grid    x: at most kMostBlocks; kThreads / lanes patients per block (a grid-stride loop)
//   block   kThreads, as groups of settings.lanes lanes, one patient each; a lane takes every
//           lanes-th value of its patient, kInFlight at a time (softmax: every lanes-th visit)
//   shared  one sum per warp (static), where patients are summed
//   reads   outcomes, the mask or row numbers, hazards at risk and the weights of their visits
//   writes  result.nll: one number, or [patients]; hazards.grad: every value, zeros off risk;
//           result.partials [blocks] and the counter, where several blocks are summed
template <typename Model, typename Layout, typename scalar_t, typename grad_t>
__global__ void __launch_bounds__(kThreads, 1)
    nll_and_grad(const KernelSettings settings, const Layout layout, const OutcomeColumns outcomes,
                 const Hazards<scalar_t, grad_t> hazards,
                 const Result<accumulator_t<scalar_t>> result) {
  using nll_t = accumulator_t<scalar_t>;
  const unsigned lane = threadIdx.x & (settings.lanes - 1);
  const int64_t groups = kThreads / settings.lanes;
  double sum = 0;
  // All lanes of a warp take part in the shuffles, so all make as many iterations.
  for (int64_t first = blockIdx.x * groups; first < settings.patients;
       first += gridDim.x * groups) {
    const int64_t patient = first + threadIdx.x / settings.lanes;
    const bool exists = patient < settings.patients;
    nll_t nll = 0;
    double weight = 0;
    if (exists) {
      const ClampedOutcome outcome = outcome_of(patient, outcomes, settings.slots);
      weight = outcome.weight;
      nll = nll_of_patient(Model{}, layout.visits_of(patient, settings.slots), outcome, settings,
                           hazards, lane);
    }
    nll = sum_of_lanes(nll, settings.lanes);
    if (exists && lane == 0) {
      const double weighted = static_cast<double>(nll) * weight;
      if (!settings.reduces) result.nll[patient] = static_cast<nll_t>(weighted);
      sum += weighted;
    }
  }
  if (settings.reduces) finish_sum(result, sum_of_block(sum), settings.share);
}

}  // namespace ehrseq::survival::cuda
