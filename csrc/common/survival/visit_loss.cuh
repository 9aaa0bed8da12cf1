// What the losses whose terms are visits share on a GPU: weights, and the sum that the mean divides
// by.
#pragma once

#include <cstdint>

#include "common/cuda/device.cuh"
#include "common/survival/layouts.cuh"
#include "common/survival/outcomes.cuh"
#include "common/survival/sums.cuh"

namespace ehrseq::survival::cuda {

struct Shape {
  int64_t patients;
  unsigned slots;  // the most visits that a patient can have
  int lanes;       // that share a patient: a power of two, at most a warp
};

struct VisitWeights {
  Numbers of_visits;    // by row; absent: 1
  Numbers of_patients;  // absent: 1

  __device__ double at(int64_t row, int64_t patient) const {
    const double of_patient = of_patients.data == nullptr ? 1.0 : number_at(of_patients, patient);
    return of_visits.data == nullptr ? of_patient : number_at(of_visits, row) * of_patient;
  }
};

// The sum of the weights of the visits that count; targets.weight(row, visit, patient, counts) is
// that of one visit.
//   grid    x: at most kMostBlocks; kThreads / lanes patients per block (a grid-stride loop)
//   block   kThreads, as groups of shape.lanes lanes, one patient each
//   shared  one sum per warp (static)
//   reads   the mask or row numbers, targets and weights
//   writes  result.nll: one number; result.partials [blocks] and the counter, of several blocks
template <typename Targets, typename Layout>
__global__ void __launch_bounds__(kThreads, 1)
    weigh_visits(const Shape shape, const Layout layout, const Targets targets,
                 const Result<double> result) {
  const unsigned lane = threadIdx.x & (shape.lanes - 1);
  const int64_t groups = kThreads / shape.lanes;
  double sum = 0;
  for (int64_t patient = blockIdx.x * groups + threadIdx.x / shape.lanes; patient < shape.patients;
       patient += gridDim.x * groups) {
    const auto visits = layout.visits_of(patient, shape.slots);
    for (unsigned visit = lane; visit < shape.slots && visits.has(visit); visit += shape.lanes) {
      if (visits.counts(visit)) sum += targets.weight(visits.row(visit), visit, patient);
    }
  }
  finish_sum(result, sum_of_block(sum), 1.0);
}

}  // namespace ehrseq::survival::cuda
