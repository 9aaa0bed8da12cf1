// Backward of the survival losses on a GPU: the gradient that the forward pass saved, times that of
// the loss.
#pragma once

#include "survival_nll/kernels.cuh"

namespace ehrseq::survival::cuda {

// What is saved as +0 stays so whatever it is multiplied by.
template <typename grad_t, typename saved_t, typename T>
__device__ grad_t scaled(saved_t saved, T factor) {
  const T value = widen(saved);
  const bool counts = value != T(0) || signbit(value);
  return narrow<grad_t>(counts ? value * factor + T(0) : T(0));
}

// The gradient of the loss: one number (stride 0), or one per patient.
template <typename T>
struct LossGradient {
  const T* values;
  int64_t stride;
};

template <typename saved_t, typename grad_t>
struct Scaling {
  const saved_t* saved;
  grad_t* grad;
  int64_t values;
  int64_t row_values;  // of one patient
};

// The saved gradient times that of the loss: padded rows, or one factor for all.
//   grid    x: kThreads * kValues values per block (a grid-stride loop)
//   block   kThreads: a thread takes kValues neighbouring values
//   shared  none
//   reads   task.saved [values], loss.values
//   writes  task.grad [values]
template <int kValues, typename saved_t, typename grad_t>
__global__ void __launch_bounds__(kThreads)
    scale_rows(const Scaling<saved_t, grad_t> task,
               const LossGradient<accumulator_t<saved_t>> loss) {
  const int64_t step = int64_t{gridDim.x} * kThreads * kValues;
  int64_t at = (int64_t{blockIdx.x} * kThreads + threadIdx.x) * kValues;
  for (; at < task.values; at += step) {
    const auto saved = load_pack<Pack<saved_t, kValues>>(task.saved + at);
    Pack<grad_t, kValues> grad;
    int64_t patient = loss.stride == 0 ? 0 : at / task.row_values;
    int64_t next_row = loss.stride == 0 ? task.values : (patient + 1) * task.row_values;
    auto scale = loss.values[patient * loss.stride];
#pragma unroll
    for (int i = 0; i < kValues; ++i) {
      if (at + i == next_row) {
        next_row += task.row_values;
        scale = loss.values[++patient * loss.stride];
      }
      grad.values[i] = scaled<grad_t>(saved.values[i], scale);
    }
    store_pack(task.grad + at, grad);
  }
}

// The saved gradient times that of the loss: packed rows with one factor per patient.
//   grid    x: kThreads / 32 patients per block (a grid-stride loop)
//   block   kThreads: a warp per patient, a lane per visit
//   shared  none
//   reads   task.saved [n_visits, classes], the row numbers, loss.values [patients]
//   writes  task.grad [n_visits, classes]
template <typename saved_t, typename grad_t>
__global__ void __launch_bounds__(kThreads)
    scale_packed(const Scaling<saved_t, grad_t> task, const PackedLayout layout, unsigned slots,
                 int64_t patients, const LossGradient<accumulator_t<saved_t>> loss) {
  const unsigned lane = threadIdx.x % kWarp;
  const auto classes = static_cast<unsigned>(task.row_values);
  const int64_t step = int64_t{gridDim.x} * (kThreads / kWarp);
  int64_t patient = int64_t{blockIdx.x} * (kThreads / kWarp) + threadIdx.x / kWarp;
  for (; patient < patients; patient += step) {
    const auto visits = layout.visits_of(patient, slots);
    const auto scale = loss.values[patient * loss.stride];
    for (unsigned visit = lane; visit < slots && visits.has(visit); visit += kWarp) {
      const int64_t row = visits.row(visit) * classes;
      for (unsigned c = 0; c < classes; ++c) {
        task.grad[row + c] = scaled<grad_t>(task.saved[row + c], scale);
      }
    }
  }
}

}  // namespace ehrseq::survival::cuda
