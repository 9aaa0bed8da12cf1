// fixed_horizon_bce and masked_bce on a GPU: a group of lanes per patient, each of which takes
// every lanes-th visit. For the mean a launch before sums the weights
// (common/survival/visit_loss.cuh).
//
// Values are checked on the host (checks.py), if at all; no address is formed from them. Of an
// unchecked label outside [0, 1] the loss is what the formula gives.
#pragma once

#include <cstdint>

#include "common/survival/visit_loss.cuh"

namespace ehrseq::fixed_horizon::cuda {

using namespace ehrseq::survival::cuda;  // NOLINT: what all losses share

// Of a visit: its label, and its weight without that of the label. What does not count is not read.
struct Target {
  bool counts;
  double label;
  double weight;
};

// Labels made of event times, as in fixed_horizon/reference.py.
struct MadeLabels {
  Numbers event_times;
  Numbers seen;
  Numbers visit_times;  // by row; absent: the visit's number
  VisitWeights weights;
  double horizon;

  __device__ Target at(int64_t row, unsigned visit, int64_t patient) const {
    const double time = number_at(event_times, patient);
    const bool is_event = is_set(seen, patient);
    const double now = visit_times.data == nullptr ? visit : number_at(visit_times, row);
    const double end = now + horizon;
    const bool counts = now < time && (is_event || time >= end);
    if (!counts) return {false, 0, 0};
    return {true, is_event && time <= end ? 1.0 : 0.0, weights.at(row, patient)};
  }

  __device__ double weight(int64_t row, unsigned visit, int64_t patient) const {
    return at(row, visit, patient).weight;
  }

  // What the sum of the terms is multiplied by for the mean.
  __device__ static double share_of(double total) { return total == 0 ? 0.0 : 1 / total; }
};

struct GivenLabels {
  Numbers labels;   // by row, as are
  Numbers weights;  // the weights

  __device__ Target at(int64_t row, unsigned, int64_t) const {
    const double weight = number_at(weights, row);
    if (weight == 0) return {false, 0, 0};
    return {true, number_at(labels, row), weight};
  }

  __device__ double weight(int64_t row, unsigned, int64_t) const { return number_at(weights, row); }

  __device__ static double share_of(double total) { return total < 1 ? 1.0 : 1 / total; }
};

template <typename scalar_t, typename grad_t>
struct Logits {
  const scalar_t* values;
  grad_t* grad;  // null where none is needed
};

// With q = e^-|x|, the term is x (1 - y) + max(-x, 0) + log(1 + q), and its derivative q / (1 + q)
// - y or, for x >= 0, (1 - y) - q / (1 + q): exact where the logit is far on the label's side.
template <typename T>
__device__ T term_of(T x, T y, T* slope) {
  const bool positive = x >= T(0);
  const T q = exp(positive ? -x : x);
  const T rest = q / (T(1) + q);
  *slope = positive ? (T(1) - y) - rest : rest - y;
  return x * (T(1) - y) + (positive ? T(0) : -x) + log1p(q);
}

// Loss and gradient of all visits, and the sum of the losses.
//   grid    x: at most kMostBlocks; kThreads / lanes patients per block (a grid-stride loop)
//   block   kThreads, as groups of shape.lanes lanes, one patient each
//   shared  one sum per warp (static), where terms are summed
//   reads   the mask or row numbers, targets, weights, logits of the visits that count, *total
//   writes  result.nll: one number, or one per row; logits.grad: every value, zeros where nothing
//           counts; result.partials [blocks] and the counter, where several blocks are summed
template <typename Targets, typename Layout, typename scalar_t, typename grad_t>
__global__ void __launch_bounds__(kThreads, 1)
    bce_and_grad(const Shape shape, const Layout layout, const Targets targets, double pos_weight,
                 const double* total, bool reduces, const Logits<scalar_t, grad_t> logits,
                 const Result<accumulator_t<scalar_t>> result) {
  using T = accumulator_t<scalar_t>;
  const double share = total == nullptr ? 1.0 : Targets::share_of(*total);
  const unsigned lane = threadIdx.x & (shape.lanes - 1);
  const int64_t groups = kThreads / shape.lanes;
  double sum = 0;
  for (int64_t patient = blockIdx.x * groups + threadIdx.x / shape.lanes; patient < shape.patients;
       patient += gridDim.x * groups) {
    const auto visits = layout.visits_of(patient, shape.slots);
    for (unsigned visit = lane; visit < shape.slots && visits.has(visit); visit += shape.lanes) {
      const int64_t row = visits.row(visit);
      Target target{false, 0, 0};
      if (visits.counts(visit)) target = targets.at(row, visit, patient);
      double term = 0;
      T slope = 0;
      if (target.counts) {
        const double weight = target.label == 1 ? target.weight * pos_weight : target.weight;
        const T x = static_cast<T>(widen(logits.values[row]));
        term = static_cast<double>(term_of(x, static_cast<T>(target.label), &slope)) * weight;
        slope *= static_cast<T>(weight * share);
        if (slope == T(0)) slope = -T(0);  // as survival_nll_scale reads it: this one counts
      }
      if (logits.grad != nullptr) logits.grad[row] = narrow<grad_t>(slope);
      if (!reduces) result.nll[row] = static_cast<T>(term);
      sum += term;
    }
  }
  if (reduces) finish_sum(result, sum_of_block(sum), share);
}

}  // namespace ehrseq::fixed_horizon::cuda
