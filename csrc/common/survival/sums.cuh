// The sum of a loss over patients on a GPU, in the launch that computes it.
#pragma once

#include <cstdint>

#include "common/cuda/device.cuh"

namespace ehrseq::survival::cuda {

using namespace ehrseq::cuda;  // NOLINT: what all kernels share

constexpr int kThreads = 256;
constexpr int kMostBlocks = 1024;
constexpr int kInFlight = 4;  // values that a lane loads before it uses the first

// One counter for each stream (sums_cuda.h). Each block of a launch increments it when it is done,
// and the last of them resets it to zero for the next launch on that stream.
constexpr int kTickets = 1024;
static __device__ unsigned stream_tickets[kTickets];

template <typename nll_t>
struct Result {
  nll_t* nll;        // one number, or one per patient
  double* partials;  // one per block; null where the patients are not summed
  unsigned* ticket;  // null for that of the stream
  int stream;
};

// The butterfly leaves the same bits in each of the lanes that are summed.
template <typename T>
__device__ T sum_of_lanes(T value, int lanes) {
  for (int step = lanes / 2; step > 0; step /= 2) {
    value += __shfl_xor_sync(kWholeWarp, value, step);
  }
  return value;
}

// Over a block, in a fixed order; the sum is thread 0's.
__device__ inline double sum_of_block(double value) {
  __shared__ double warps[kThreads / kWarp];
  value = sum_of_lanes(value, kWarp);
  __syncthreads();
  if (threadIdx.x % kWarp == 0) warps[threadIdx.x / kWarp] = value;
  __syncthreads();
  double sum = 0;
  for (const double warp : warps) sum += warp;
  return sum;
}

// The last block to finish adds the blocks' sums in their order: whichever block that is, the same
// bits.
template <typename nll_t>
__device__ void finish_sum(const Result<nll_t>& result, double block_sum, double share) {
  if (gridDim.x == 1) {
    if (threadIdx.x == 0) *result.nll = static_cast<nll_t>(block_sum * share);
    return;
  }
  __shared__ bool is_last;
  if (threadIdx.x == 0) {
    unsigned* ticket = result.ticket ? result.ticket : &stream_tickets[result.stream];
    result.partials[blockIdx.x] = block_sum;
    __threadfence();  // the partial sum is seen before the counter
    is_last = atomicInc(ticket, gridDim.x - 1) == gridDim.x - 1;
  }
  __syncthreads();
  if (!is_last) return;
  __threadfence();
  double sum = 0;
  for (unsigned i = threadIdx.x; i < gridDim.x; i += kThreads) sum += __ldcg(result.partials + i);
  sum = sum_of_block(sum);
  if (threadIdx.x == 0) *result.nll = static_cast<nll_t>(sum * share);
}

}  // namespace ehrseq::survival::cuda
