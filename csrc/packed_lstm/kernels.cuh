// One direction of one layer of the packed LSTM on a GPU with clusters (sm_90 and later), float32:
// one launch for all visits, forward or backward. Products of the inputs, and the gradients of
// weights and inputs, are products over all visits around it (cuda.cu). Free of torch headers.
//
// Eight blocks of a cluster hold W_hh in shared memory, each the rows of the four gates of H / 8
// units, and go through the visits of 8 or 16 patients who follow each other in the packed order,
// that is by length. Forward, a block computes the gates of its units from the whole of h, and
// writes its part of the new h into all eight blocks. Backward, it multiplies the gradients of its
// gates by its rows of W_hh, and writes each part of the product into the block of those units,
// which adds up the eight parts in their order. Buffers for what is exchanged alternate, so one
// barrier of the cluster per visit is enough. The cluster ends with its longest patient. Sums have
// one order, and nothing is added atomically: the same bits on every run.
//
// Bounds, by arithmetic; nothing here has been measured. H 256, 16 patients, H100 (132 SMs, 1.7
// GHz), one visit of a block, each way (for the cluster 8.4 MFLOP, 160-208 KB of global memory):
//   products       16 * 128 * 256 = 0.52 M multiply-adds, 128 a cycle: 4,096 cycles, 2.4 us
//   shared memory  a thread of 4 rows and 8 patients reads 24 wavefronts (16 of weights, 8 of h
//                  which are the same for all lanes) in 32 cycles of multiply-adds: 75 %
//   partial sums   4 slices of 8 KB, written and read: 512 cycles, 0.3 us
//   exchange       2 KB to each of 8 blocks, and the barrier: latency, 0.3-0.6 us. Arriving waits
//                  for all that was written before (MEMBAR.ALL.GPU): results are stored after it
//   global memory  forward 8 KB read and 12 KB written, backward 16 and 10: 16 clusters of which
//                  each takes 3.3 us need 0.8-1.0 TB/s of 3.3
//   together       3-3.5 us; with 8 patients 1.8-2.2 us
// That is the bound of exact float32; what tensor cores take is in tensor_kernels.cuh. cuDNN, which
// never uses its persistent kernels for packed input, takes an estimated 4-10 us. Occupancy: one
// block of 8 warps per SM, as W_hh fills shared memory (192 KB of 227 at H 256, 225 at H 288, the
// most that fits); 16 clusters at a time, thus 128 patients in tiles of 8 and 256 in tiles of 16;
// larger batches take several rounds, the longest first.
#pragma once

#include "packed_lstm/layer.cuh"

namespace ehrseq::packed_lstm::cuda {

__global__ void keep_starts(const __grid_constant__ SomeStarts some, int count, int64_t* starts) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < count) starts[i] = some.values[i];
}

template <int kPatients>
__global__ void __launch_bounds__(kThreads, 1) scan_forward(const Forward<float> layer) {
#if EHRSEQ_HAS_CLUSTERS
  constexpr int kPairs = Pairs<kPatients>::kCount;
  EHRSEQ_DYNAMIC_SHARED(bytes);
  const Visits& visits = layer.visits;
  const Tile<kPatients> tile = Tile<kPatients>::forward(visits.hidden);
  float* weights = reinterpret_cast<float*>(bytes);
  float* exchanged = weights + tile.exchanged;  // [2][patient][H]
  float* partial = weights + tile.partial;      // [slice][patient][gate][unit]
  const int hidden = tile.hidden;
  const int first_patient = static_cast<int>(blockIdx.x / kBlocks) * kPatients;
  const int lane = threadIdx.x % ehrseq::cuda::kWarp;

  for_each_row(tile, layer.weight, [&](int row, const float* from) {
    const int gate = row / tile.units;
    const int unit = row % tile.units;
    for (int column = lane; column < hidden; column += ehrseq::cuda::kWarp) {
      const int at = (gate * tile.quads + column / kQuad) * tile.units + unit;
      weights[at * kQuad + column % kQuad] = from[column];
    }
  });
  // in both, as patients may begin at any time where the scan is in reverse
  for (int i = threadIdx.x; i < kPatients * hidden; i += kThreads) {
    const int64_t patient = first_patient + i / hidden;
    const bool exists = patient < visits.patients;
    const float h = exists ? given_or_zero(layer.h0, patient * hidden + i % hidden) : 0.0f;
    exchanged[i] = exchanged[kPatients * hidden + i] = h;
  }
  const Pairs<kPatients> pairs(tile);
  float cell[kPairs];
  float value[kPairs];
  float bias[kPairs][kGates];
#pragma unroll
  for (int j = 0; j < kPairs; ++j) {
    const Pair& pair = pairs.of[j];
    const bool exists = pair.patient < kPatients && pair.whose < visits.patients;
    const int64_t of_patient = int64_t{pair.whose} * hidden + pair.of_all;
    cell[j] = exists ? given_or_zero(layer.c0, of_patient) : 0.0f;
#pragma unroll
    for (int gate = 0; gate < kGates; ++gate) {
      const int at = gate * hidden + pair.of_all;
      bias[j][gate] = given_or_zero(layer.input_bias, at) + given_or_zero(layer.hidden_bias, at);
    }
  }

  const int times = times_of(visits, first_patient);
  cluster_sync();
  for (int step = 0; step < times; ++step) {
    const int time = visits.reverse ? times - 1 - step : step;
    const int64_t row = visits.starts[time];
    const int patients = present<kPatients>(visits, time);
    const float* h = exchanged + step % 2 * kPatients * hidden;
    float* next = exchanged + (step + 1) % 2 * kPatients * hidden;
    const bool is_last_time = time + 1 == visits.times;
    const int64_t going_on = is_last_time || visits.reverse ? 0 : patients_at(visits, time + 1);

    float sum[kPairs][kGates];
#pragma unroll
    for (int j = 0; j < kPairs; ++j) {
      const Pair& pair = pairs.of[j];
      if (pair.patient >= patients) continue;
#pragma unroll
      for (int gate = 0; gate < kGates; ++gate) {
        const int64_t at = (row + pair.whose) * kGates * hidden + gate * hidden + pair.of_all;
        sum[j][gate] = layer.sums[at] + bias[j][gate];
      }
    }
    multiply(tile, weights, h, patients, partial);
    __syncthreads();
#pragma unroll
    for (int j = 0; j < kPairs; ++j) {
      const Pair& pair = pairs.of[j];
      if (pair.patient >= patients) continue;
#pragma unroll
      for (int gate = 0; gate < kGates; ++gate) {
        float product = 0.0f;
        for (int slice = 0; slice < tile.slices; ++slice) {
          const int of = (slice * kPatients + pair.patient) * kGates + gate;
          product += partial[of * tile.units + pair.unit];
        }
        sum[j][gate] += product;
      }
      const float gates[kGates] = {sigmoid(sum[j][0]), sigmoid(sum[j][1]), tanhf(sum[j][2]),
                                   sigmoid(sum[j][3])};
      cell[j] = gates[1] * cell[j] + gates[0] * gates[2];
      value[j] = gates[3] * tanhf(cell[j]);
      float* place = next + pair.patient * hidden + pair.of_all;
#pragma unroll
      for (int rank = 0; rank < kBlocks; ++rank) *in_block(place, rank) = value[j];
#pragma unroll
      for (int gate = 0; gate < kGates; ++gate) sum[j][gate] = gates[gate];
    }
    cluster_arrive();
    // only now, as arriving waits for all that was written before it
#pragma unroll
    for (int j = 0; j < kPairs; ++j) {
      const Pair& pair = pairs.of[j];
      if (pair.patient >= patients) continue;
      const int64_t at = row + pair.whose;
      layer.output[at * hidden + pair.of_all] = value[j];
      if (layer.cells != nullptr) layer.cells[at * hidden + pair.of_all] = cell[j];
#pragma unroll
      for (int gate = 0; gate < kGates && layer.gates != nullptr; ++gate) {
        layer.gates[(at * kGates + gate) * hidden + pair.of_all] = sum[j][gate];
      }
      if (visits.reverse ? time == 0 : pair.whose >= going_on) {
        const int64_t of_patient = int64_t{pair.whose} * hidden + pair.of_all;
        layer.last_hidden[of_patient] = value[j];
        layer.last_cell[of_patient] = cell[j];
      }
    }
    cluster_wait();
  }
#else
  __trap();
#endif
}

template <int kPatients>
__global__ void __launch_bounds__(kThreads, 1) scan_backward(const Backward<float> layer) {
#if EHRSEQ_HAS_CLUSTERS
  constexpr int kPairs = Pairs<kPatients>::kCount;
  EHRSEQ_DYNAMIC_SHARED(bytes);
  const Visits& visits = layer.visits;
  const Tile<kPatients> tile = Tile<kPatients>::backward(visits.hidden);
  float* weights = reinterpret_cast<float*>(bytes);
  float* exchanged = weights + tile.exchanged;  // [2][block that it is from][patient][unit]
  float* partial = weights + tile.partial;      // [slice][patient][H]
  float* grads = weights + tile.grads;          // [patient][gate][unit]
  const int hidden = tile.hidden;
  const int own = static_cast<int>(cluster_rank());
  const int first_patient = static_cast<int>(blockIdx.x / kBlocks) * kPatients;
  const int lane = threadIdx.x % ehrseq::cuda::kWarp;

  for_each_row(tile, layer.weight, [&](int row, const float* from) {
    for (int column = lane; column < hidden; column += ehrseq::cuda::kWarp) {
      weights[row * hidden + column] = from[column];
    }
  });
  const Pairs<kPatients> pairs(tile);
  float grad_cell[kPairs];
#pragma unroll
  for (int j = 0; j < kPairs; ++j) {
    const Pair& pair = pairs.of[j];
    const bool exists = pair.patient < kPatients && pair.whose < visits.patients;
    const int64_t of_patient = int64_t{pair.whose} * hidden + pair.of_all;
    grad_cell[j] = exists ? given_or_zero(layer.grad_last_cell, of_patient) : 0.0f;
  }
  // what the blocks have sent for a pair: the gradient of its hidden state through the weights
  const auto received = [&](int step, const Pair& pair) {
    const float* from = exchanged + step % 2 * kPatients * hidden;
    float sum = 0.0f;
#pragma unroll
    for (int rank = 0; rank < kBlocks; ++rank) {
      sum += from[(rank * kPatients + pair.patient) * tile.units + pair.unit];
    }
    return sum;
  };
  const auto finish = [&](const Pair& pair, float grad_hidden, float grad_of_cell) {
    if (layer.grad_h0 == nullptr) return;
    const int64_t of_patient = int64_t{pair.whose} * hidden + pair.of_all;
    layer.grad_h0[of_patient] = grad_hidden;
    layer.grad_c0[of_patient] = grad_of_cell;
  };

  const int times = times_of(visits, first_patient);
  int going_on = 0;  // patients who had a visit in the step before
  cluster_sync();
  for (int step = 0; step < times; ++step) {
    const int time = visits.reverse ? step : times - 1 - step;
    const int64_t row = visits.starts[time];
    const int patients = present<kPatients>(visits, time);
#pragma unroll
    for (int j = 0; j < kPairs; ++j) {
      const Pair& pair = pairs.of[j];
      if (pair.patient >= max(patients, going_on)) continue;
      const int64_t of_patient = int64_t{pair.whose} * hidden + pair.of_all;
      float grad_hidden = pair.patient < going_on
                              ? received(step, pair)
                              : given_or_zero(layer.grad_last_hidden, of_patient);
      if (pair.patient >= patients) {
        finish(pair, grad_hidden, grad_cell[j]);
        continue;
      }
      const int64_t at = (row + pair.whose) * hidden + pair.of_all;
      const float* gates = layer.gates + (row + pair.whose) * kGates * hidden + pair.of_all;
      const float in = gates[0];
      const float forget = gates[hidden];
      const float candidate = gates[2 * hidden];
      const float out = gates[3 * hidden];
      const float tanh_cell = tanhf(layer.cells[at]);
      const int64_t before = row_before(visits, time, pair.whose);
      const int64_t from = before * hidden + pair.of_all;
      const float cell_before =
          before < 0 ? given_or_zero(layer.c0, of_patient) : layer.cells[from];
      if (layer.before != nullptr) {
        layer.before[at] = before < 0 ? given_or_zero(layer.h0, of_patient) : layer.output[from];
      }

      grad_hidden += given_or_zero(layer.grad_output, at);
      const float grad = grad_cell[j] + grad_hidden * out * (1.0f - tanh_cell * tanh_cell);
      const float of_sums[kGates] = {
          grad * candidate * in * (1.0f - in), grad * cell_before * forget * (1.0f - forget),
          grad * in * (1.0f - candidate * candidate), grad_hidden * tanh_cell * out * (1.0f - out)};
      grad_cell[j] = grad * forget;
      float* grad_sums = layer.grad_sums + (row + pair.whose) * kGates * hidden + pair.of_all;
#pragma unroll
      for (int gate = 0; gate < kGates; ++gate) {
        grad_sums[gate * hidden] = of_sums[gate];
        grads[(pair.patient * kGates + gate) * tile.units + pair.unit] = of_sums[gate];
      }
    }
    going_on = patients;
    if (step + 1 == times && layer.grad_h0 == nullptr) break;  // nothing asks for the rest
    __syncthreads();
    multiply_back(tile, weights, grads, patients, partial);
    __syncthreads();
    float* next = exchanged + (step + 1) % 2 * kPatients * hidden;
    for (int i = threadIdx.x; i < patients * tile.quads; i += kThreads) {
      const int patient = i / tile.quads;
      const int column = i % tile.quads * kQuad;  // all four are of one block
      const int at = (own * kPatients + patient) * tile.units + column % tile.units;
      float* place = in_block(next + at, column / tile.units);
      *reinterpret_cast<float4*>(place) = sum_of_slices(tile, partial, i * kQuad);
    }
    cluster_sync();
  }
  if (layer.grad_h0 == nullptr) return;
#pragma unroll
  for (int j = 0; j < kPairs; ++j) {
    const Pair& pair = pairs.of[j];
    if (pair.patient < going_on) finish(pair, received(times, pair), grad_cell[j]);
  }
#else
  __trap();
#endif
}

}  // namespace ehrseq::packed_lstm::cuda
