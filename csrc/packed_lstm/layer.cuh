// What the scans are launched with (kernels.cuh, tensor_kernels.cuh), and what they share.
#pragma once

#include "packed_lstm/tile.cuh"

namespace ehrseq::packed_lstm::cuda {

// Row numbers travel in a kernel's parameters: no copy from the host's memory, which would have to
// wait, or could not be captured in a graph.
constexpr int kStartsAtOnce = 480;
struct SomeStarts {
  int64_t values[kStartsAtOnce];
};

// Null pointers: no biases, initial states of zeros, cells and gates that are not kept.
template <typename scalar_t>
struct Forward {
  Visits visits;
  const scalar_t* weight;  // [4H, H]
  const scalar_t* input_bias;
  const scalar_t* hidden_bias;
  const scalar_t* h0;
  const scalar_t* c0;
  const float* sums;  // [visits, 4H]: of the inputs
  float* gates;       // may be `sums`
  float* cells;       // [visits, H]
  scalar_t* output;   // [visits, H]
  scalar_t* last_hidden;
  scalar_t* last_cell;
};

// Null pointers: incoming gradients and initial states of zeros, results that are not needed.
template <typename scalar_t>
struct Backward {
  Visits visits;
  const scalar_t* weight;
  const scalar_t* h0;
  const scalar_t* c0;
  const scalar_t* output;
  const float* gates;
  const float* cells;
  const scalar_t* grad_output;
  const scalar_t* grad_last_hidden;
  const scalar_t* grad_last_cell;
  scalar_t* grad_sums;  // [visits, 4H]
  scalar_t* before;     // [visits, H]: the hidden state that each visit began with
  scalar_t* grad_h0;
  scalar_t* grad_c0;
};

#if EHRSEQ_HAS_CLUSTERS

using ehrseq::cuda::widen;

__device__ inline float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

// The row of the visit that the scan has seen before this one; -1 where it begins with this one.
__device__ inline int64_t row_before(const Visits& visits, int time, int64_t patient) {
  if (!visits.reverse) return time > 0 ? visits.starts[time - 1] + patient : -1;
  if (time + 1 == visits.times || patient >= patients_at(visits, time + 1)) return -1;
  return visits.starts[time + 1] + patient;
}

template <typename scalar_t>
__device__ inline float given_or_zero(const scalar_t* from, int64_t at) {
  return from == nullptr ? 0.0f : widen(from[at]);
}

#endif  // EHRSEQ_HAS_CLUSTERS

}  // namespace ehrseq::packed_lstm::cuda
