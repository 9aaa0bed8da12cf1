// visit_cross_entropy on a GPU: a warp per patient, whose lanes share its visits and their classes.
// For the mean a launch before sums the weights (common/survival/visit_loss.cuh).
//
// With m the largest logit of a visit, s = Σ e^(x - m) and y the label, the term is
// log(s) + (m - x_y). One class has e^(x - m) = 1, so log(s) is log1p of the others' sum, which
// keeps its digits.
//
// Values are checked on the host (op.py), if at all: a label that is no class gives NaN, and no
// address is formed from it.
#pragma once

#include <cstdint>

#include "common/survival/visit_loss.cuh"

namespace ehrseq::visit_cross_entropy::cuda {

using namespace ehrseq::survival::cuda;  // NOLINT: what all losses share

struct Targets {
  Numbers labels;         // by row
  Numbers class_weights;  // absent: 1
  VisitWeights weights;
  int64_t classes;
  int64_t ignore_index;

  __device__ int64_t label(int64_t row) const { return integer_at(labels, row); }
  __device__ bool is_class(int64_t label) const { return label >= 0 && label < classes; }
  __device__ double of_class(int64_t label) const {
    return class_weights.data == nullptr ? 1.0 : number_at(class_weights, label);
  }

  __device__ double weight(int64_t row, unsigned, int64_t patient) const {
    const int64_t own = label(row);
    if (own == ignore_index) return 0;
    return is_class(own) ? weights.at(row, patient) * of_class(own) : HUGE_VAL - HUGE_VAL;
  }
};

template <typename scalar_t, typename grad_t>
struct Logits {
  const scalar_t* values;  // [rows, classes]
  grad_t* grad;            // null where none is needed
};

// What is computed of a visit: its options, and how many lanes share it, a power of two.
struct Settings {
  double smoothing;
  bool reduces;
  int lanes;
};

template <typename T>
struct Largest {
  T value;
  int64_t at;  // the first class that has it; past the last where none is above -inf
};

template <typename T>
__device__ Largest<T> larger(const Largest<T>& one, const Largest<T>& another) {
  if (one.value != another.value) return one.value > another.value ? one : another;
  return one.at <= another.at ? one : another;
}

// The loss of a visit, in each of its lanes; the gradient of `share` times that. All lanes of the
// warp have to come here; of those whose visit does not count, nothing is read.
template <typename scalar_t, typename grad_t>
__device__ double loss_of_visit(const Targets& targets, const Settings& settings,
                                const Logits<scalar_t, grad_t>& logits, int64_t row, int64_t label,
                                double weight, double share, bool counts, unsigned lane) {
  using T = accumulator_t<scalar_t>;
  const int64_t classes = targets.classes;
  const scalar_t* values = logits.values + row * classes;
  const int64_t last = counts ? classes : 0;
  Largest<T> largest{static_cast<T>(-HUGE_VAL), classes};
  for (int64_t c = lane; c < last; c += settings.lanes) {
    const T x = static_cast<T>(widen(values[c]));
    if (x > largest.value) largest = {x, c};  // a NaN is left to the sum
  }
  for (int step = settings.lanes / 2; step > 0; step /= 2) {
    const Largest<T> other{__shfl_xor_sync(kWholeWarp, largest.value, step),
                           __shfl_xor_sync(kWholeWarp, largest.at, step)};
    largest = larger(largest, other);
  }
  const T m = largest.value;
  T rest = 0;         // of the sum, without the largest
  double spread = 0;  // Σ w_c (m - x_c)
  double all_weights = 0;
  for (int64_t c = lane; c < last; c += settings.lanes) {
    const T x = static_cast<T>(widen(values[c]));
    if (c != largest.at) rest += exp(x - m);
    if (settings.smoothing > 0) {
      const double of_class = targets.of_class(c);
      spread += of_class * static_cast<double>(m - x);
      all_weights += of_class;
    }
  }
  rest = sum_of_lanes(rest, settings.lanes);
  if (settings.smoothing > 0) {
    spread = sum_of_lanes(spread, settings.lanes);
    all_weights = sum_of_lanes(all_weights, settings.lanes);
  }
  if (!counts) return 0;
  rest += m - m;  // an infinite one makes the loss NaN, as in PyTorch
  const bool exists = targets.is_class(label);
  const T sum = T(1) + rest;
  const double log_sum = static_cast<double>(log1p(rest));
  double of_label = weight * (1 - settings.smoothing);
  of_label *= exists ? targets.of_class(label) : HUGE_VAL - HUGE_VAL;
  const double of_classes = weight * settings.smoothing / static_cast<double>(classes);
  const T at_label = exists ? static_cast<T>(widen(values[label])) : T(0);
  double loss = of_label * (log_sum + static_cast<double>(m - at_label));
  if (settings.smoothing > 0) loss += of_classes * (all_weights * log_sum + spread);
  if (logits.grad == nullptr) return loss;

  grad_t* grad = logits.grad + row * classes;
  const double inverse = share / static_cast<double>(sum);
  const double ratio = (of_label + of_classes * all_weights) * inverse;
  for (int64_t c = lane; c < classes; c += settings.lanes) {
    const T x = static_cast<T>(widen(values[c]));
    const double term = c == largest.at ? 1.0 : static_cast<double>(exp(x - m));
    double slope = ratio * term;
    if (c == label) {  // without the digits that p - 1 would lose
      const double others = c == largest.at ? static_cast<double>(rest) : sum - term;
      slope = of_classes * all_weights * inverse * term - of_label * inverse * others;
    }
    if (settings.smoothing > 0) slope -= share * of_classes * targets.of_class(c);
    T narrowed = static_cast<T>(slope);
    if (narrowed == T(0)) narrowed = -T(0);  // as survival_nll_scale reads it: this one counts
    grad[c] = narrow<grad_t>(narrowed);
  }
  return loss;
}

// Loss and gradient of all visits, and the sum of the losses.
//   grid    x: at most kMostBlocks; kThreads / kWarp patients per block (a grid-stride loop)
//   block   kThreads, as warps, one patient each; settings.lanes lanes share a visit
//   shared  one sum per warp (static), where terms are summed
//   reads   the mask or row numbers, labels, weights, logits of the visits that count, *total
//   writes  result.nll: one number, or one per row; logits.grad: every value, zeros where nothing
//           counts; result.partials [blocks] and the counter, where several blocks are summed
template <typename Layout, typename scalar_t, typename grad_t>
__global__ void __launch_bounds__(kThreads, 1)
    cross_entropy_and_grad(const Shape shape, const Layout layout, const Targets targets,
                           const Settings settings, const double* total,
                           const Logits<scalar_t, grad_t> logits,
                           const Result<accumulator_t<scalar_t>> result) {
  using T = accumulator_t<scalar_t>;
  const double share = total == nullptr ? 1.0 : 1 / *total;
  const unsigned lane = threadIdx.x & (settings.lanes - 1);
  const unsigned at_once = kWarp / settings.lanes;
  const unsigned own = threadIdx.x % kWarp / settings.lanes;
  double sum = 0;
  // All lanes of a warp take part in the shuffles, so all make as many iterations.
  for (int64_t patient = blockIdx.x * int64_t{kThreads / kWarp} + threadIdx.x / kWarp;
       patient < shape.patients; patient += gridDim.x * int64_t{kThreads / kWarp}) {
    const auto visits = layout.visits_of(patient, shape.slots);
    for (unsigned first = 0; first < shape.slots && visits.has(first); first += at_once) {
      const unsigned visit = first + own;
      const bool exists = visit < shape.slots && visits.has(visit);
      const int64_t row = exists ? visits.row(visit) : 0;
      const int64_t label = exists && visits.counts(visit) ? targets.label(row) : 0;
      const bool counts = exists && visits.counts(visit) && label != targets.ignore_index;
      const double weight = counts ? targets.weights.at(row, patient) : 0;
      const double term =
          loss_of_visit(targets, settings, logits, row, label, weight, share, counts, lane);
      if (exists && !counts && logits.grad != nullptr) {
        for (int64_t c = lane; c < targets.classes; c += settings.lanes) {
          logits.grad[row * targets.classes + c] = narrow<grad_t>(T(0));
        }
      }
      if (exists && lane == 0) {
        if (!settings.reduces) result.nll[row] = static_cast<T>(term);
        sum += term;
      }
    }
  }
  if (settings.reduces) finish_sum(result, sum_of_block(sum), share);
}

}  // namespace ehrseq::visit_cross_entropy::cuda
