// One direction of one layer of the packed LSTM on a GPU with clusters and tensor cores (sm_90 and
// later), in bfloat16 or float16, or in float32 multiplied as TF32: the scan of kernels.cuh with
// other products. Free of torch headers.
//
// Weights and what is multiplied with them (forward h, backward the gradients of the gates' sums)
// are 16-bit or TF32; sums, gates, cells, the gradients that blocks exchange and those of cells are
// float32. Forward, a warp computes all four gates of 8 units for 8 patients (mma.sync with two
// times 16 rows, over the whole of h), and each lane has all that it needs for one unit and two
// patients: no sums of parts, no barrier of the block. The new h goes to the seven other blocks by
// fours of units. Backward, each block multiplies the gradients of its 4H / 8 sums by its rows of
// W_hh, 16 columns of which a warp takes, and writes its part of H sums into the blocks of those
// units, which add up the eight parts in their order. What is exchanged has two buffers, and one
// barrier of the cluster per visit is enough, as in kernels.cuh. All sums have one order.
//
// Loads of operands, the layout of which is in tensor_tile.cuh, are of 16 bytes a lane and 512
// neighbouring bytes a warp, without bank conflicts, padding or ldmatrix. Stores of single values
// of h and of gradients conflict four ways: some 16 cycles a visit.
//
// Bounds, by arithmetic; nothing here has been measured. 16 bits, H 256, 16 patients, H100 (132
// SMs, 1.7 GHz), one visit of a block, each way (for the cluster 8.4 MFLOP, 152 KB of global
// memory):
//   products       16 * 128 * 256 = 0.52 M multiply-adds, 256 mma, 32 a warp, in four chains of 8
//                  forward: 256 cycles at the tensor cores' peak, some 420 as mma.sync, 0.25 us
//   shared memory  forward 64 KB of weights for each 8 patients, and 32 KB of h: 1,280 cycles, 0.75
//                  us, which hides the products; backward weights once and 64 KB of gradients:
//                  1,024 cycles, 0.6 us, and 16 KB that are received, 0.1 us
//   gates          a unit and two patients a thread, some 240 instructions a warp, 0.3 us
//   exchange       forward 1 KB to each of 7 blocks, backward 2 KB of float32 to each of 8, and the
//                  barrier: latency, 0.3-0.6 us
//   global memory  forward 8 KB read and 11 written, backward 14 and 5: 16 clusters of which each
//                  takes 1.5 us need 1.6 TB/s of 3.3
//   together       1.4-1.7 us; with 8 patients 1.0-1.3 us (exact float32: 3-3.5 and 1.8-2.2)
// Occupancy: one block of 8 warps per SM (up to 198 registers a thread), 16 clusters at a time,
// thus 128 patients in tiles of 8 and 256 in tiles of 16.
//
// Shared memory: H * H bytes of weights (units are taken by eights: more where H is no multiple of
// 64), and forward 4 H, backward 9 H bytes for each patient of a tile. Of 227 KB H 256 takes 80 and
// 100, H 384, the most for tiles of 16, 168 and 198, and H 416, in tiles of 8, 195 and 212; H 448
// would take 227.5 backward. TF32 takes twice as much for weights and operands (H 256: 160 and 168
// KB; H 288, the most that is served, as of exact float32: 216 and 226) and twice as many products
// and loads, some 0.75 us more.
#pragma once

#include "packed_lstm/tensor_tile.cuh"

namespace ehrseq::packed_lstm::cuda {

template <typename scalar_t, int kPatients>
__global__ void __launch_bounds__(kThreads, 1) tensor_scan_forward(const Forward<scalar_t> layer) {
#if EHRSEQ_HAS_CLUSTERS
  using Tile = TensorTile<scalar_t, kPatients>;
  constexpr int kShares = Tile::kShares;
  constexpr int kTwo = 2;  // patients of a lane
  EHRSEQ_DYNAMIC_SHARED(bytes);
  const Visits& visits = layer.visits;
  const Tile tile = Tile::forward(visits.hidden);
  const int hidden = tile.hidden;
  char* shared = reinterpret_cast<char*>(bytes);
  const auto buffer = [&](int which) {
    return reinterpret_cast<scalar_t*>(shared + tile.exchanged + which * tile.exchanged_bytes);
  };
  const int own = static_cast<int>(cluster_rank());
  const int first_patient = static_cast<int>(blockIdx.x / kBlocks) * kPatients;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;

  for_each_weight<scalar_t>(tile, layer.weight, [&](int row, int column, scalar_t value) {
    // a group is two sixteens: its input and forget gates, its candidates and output gates
    const int gate = row % kGates;
    const int unit = row / kGates;
    const int sixteen = unit / kGroupUnits * 2 + gate / 2;
    const int at = sixteen * kMmaRows + gate % 2 * kGroupUnits + unit % kGroupUnits;
    reinterpret_cast<scalar_t*>(shared)[place_of_weight<Tile>(at, column, hidden)] = value;
  });
  // in both, as patients may begin at any time where the scan is in reverse
  for (int i = threadIdx.x; i < kPatients * hidden; i += kThreads) {
    const int64_t patient = first_patient + i / hidden;
    const bool exists = patient < visits.patients;
    const float h = exists ? given_or_zero(layer.h0, patient * hidden + i % hidden) : 0.0f;
    const int at = place_of_term<kPatients, Tile>(i / hidden, i % hidden);
    buffer(0)[at] = buffer(1)[at] = as_operand<scalar_t>(h);
  }
  Share shares[kShares];
  float cell[kShares][kTwo];
  float value[kShares][kTwo];
  float gates[kShares][kGates][kTwo];
  float bias[kShares][kGates];
#pragma unroll
  for (int j = 0; j < kShares; ++j) {
    const Share share = shares[j] = share_of(tile, j);
    const bool computes = share.exists && share.has_unit;
#pragma unroll
    for (int i = 0; i < kTwo; ++i) {
      const int64_t patient = first_patient + share.patient + i;
      const bool exists = computes && patient < visits.patients;
      cell[j][i] = exists ? given_or_zero(layer.c0, patient * hidden + share.of_all) : 0.0f;
    }
#pragma unroll
    for (int gate = 0; gate < kGates; ++gate) {
      const int at = gate * hidden + share.of_all;
      bias[j][gate] =
          computes ? given_or_zero(layer.input_bias, at) + given_or_zero(layer.hidden_bias, at)
                   : 0.0f;
    }
  }

  const int times = times_of(visits, first_patient);
  cluster_sync();
  for (int step = 0; step < times; ++step) {
    const int time = visits.reverse ? times - 1 - step : step;
    const int64_t row = visits.starts[time] + first_patient;
    const int patients = present<kPatients>(visits, time);
    const uint4* h = reinterpret_cast<const uint4*>(buffer(step % 2));
    scalar_t* next = buffer((step + 1) % 2);
    const bool is_last_time = time + 1 == visits.times;
    const int64_t going_on = is_last_time || visits.reverse ? 0 : patients_at(visits, time + 1);

#pragma unroll
    for (int j = 0; j < kShares; ++j) {
      const Share& share = shares[j];
      if (!share.exists || share.first_patient >= patients) continue;  // as all of its warp
#pragma unroll
      for (int gate = 0; gate < kGates; ++gate) {
#pragma unroll
        for (int i = 0; i < kTwo; ++i) {
          const int64_t at = (row + share.patient + i) * kGates * hidden + gate * hidden;
          const bool exists = share.has_unit && share.patient + i < patients;
          gates[j][gate][i] = exists ? layer.sums[at + share.of_all] + bias[j][gate] : 0.0f;
        }
      }
      float product[2][1][4] = {};
      const int loads = hidden / Tile::kStretch * 2;
      multiply<scalar_t, kPatients>(bytes + share.group * 2 * loads * kWarp, loads,
                                    h + share.first_patient * 4, hidden / Tile::kStretch, product);
#pragma unroll
      for (int i = 0; i < kTwo; ++i) {
        if (!share.has_unit || share.patient + i >= patients) continue;
        const float in = sigmoid(gates[j][0][i] + product[0][0][i]);
        const float forget = sigmoid(gates[j][1][i] + product[0][0][kTwo + i]);
        const float candidate = tanhf(gates[j][2][i] + product[1][0][i]);
        const float out = sigmoid(gates[j][3][i] + product[1][0][kTwo + i]);
        cell[j][i] = forget * cell[j][i] + in * candidate;
        value[j][i] = out * tanhf(cell[j][i]);
        gates[j][0][i] = in;
        gates[j][1][i] = forget;
        gates[j][2][i] = candidate;
        gates[j][3][i] = out;
        const int at = place_of_term<kPatients, Tile>(share.patient + i, share.of_all);
        next[at] = as_operand<scalar_t>(value[j][i]);
      }
      // from here to the other blocks, by fours of units
      __syncwarp();
      using Quad = typename ehrseq::cuda::Word<kQuad * sizeof(scalar_t)>::type;
      const int quads = min(kGroupUnits, tile.units - share.group * kGroupUnits) / kQuad;
      const int first_unit = own * tile.units + share.group * kGroupUnits;
      for (int i = lane; i < (kBlocks - 1) * kMmaColumns * 2; i += kWarp) {
        const int patient = share.first_patient + i / 2 % kMmaColumns;
        if (patient >= patients || i % 2 >= quads) continue;
        const int at = place_of_term<kPatients, Tile>(patient, first_unit + i % 2 * kQuad);
        scalar_t* place = in_block(next + at, (own + 1 + i / (2 * kMmaColumns)) % kBlocks);
        *reinterpret_cast<Quad*>(place) = *reinterpret_cast<const Quad*>(next + at);
      }
    }
    cluster_arrive();
    // only now, as arriving waits for all that was written before it
#pragma unroll
    for (int j = 0; j < kShares; ++j) {
      const Share& share = shares[j];
#pragma unroll
      for (int i = 0; i < kTwo; ++i) {
        if (!share.exists || !share.has_unit || share.patient + i >= patients) continue;
        const int64_t at = row + share.patient + i;
        layer.output[at * hidden + share.of_all] = narrow<scalar_t>(value[j][i]);
        if (layer.cells != nullptr) layer.cells[at * hidden + share.of_all] = cell[j][i];
#pragma unroll
        for (int gate = 0; gate < kGates && layer.gates != nullptr; ++gate) {
          layer.gates[(at * kGates + gate) * hidden + share.of_all] = gates[j][gate][i];
        }
        const int64_t patient = first_patient + share.patient + i;
        if (visits.reverse ? time == 0 : patient >= going_on) {
          const int64_t of_patient = patient * hidden + share.of_all;
          layer.last_hidden[of_patient] = narrow<scalar_t>(value[j][i]);
          layer.last_cell[of_patient] = narrow<scalar_t>(cell[j][i]);
        }
      }
    }
    cluster_wait();
  }
#else
  __trap();
#endif
}

template <typename scalar_t, int kPatients>
__global__ void __launch_bounds__(kThreads, 1)
    tensor_scan_backward(const Backward<scalar_t> layer) {
#if EHRSEQ_HAS_CLUSTERS
  using Tile = TensorTile<scalar_t, kPatients>;
  constexpr int kShares = Tile::kShares;
  constexpr int kColumns = Tile::kColumns;
  constexpr int kTwo = 2;  // patients of a lane
  EHRSEQ_DYNAMIC_SHARED(bytes);
  const Visits& visits = layer.visits;
  const Tile tile = Tile::backward(visits.hidden);
  const int hidden = tile.hidden;
  char* shared = reinterpret_cast<char*>(bytes);
  const auto buffer = [&](int which) {
    return reinterpret_cast<float*>(shared + tile.exchanged + which * tile.exchanged_bytes);
  };
  scalar_t* grads = reinterpret_cast<scalar_t*>(shared + tile.grads);
  const int own = static_cast<int>(cluster_rank());
  const int first_patient = static_cast<int>(blockIdx.x / kBlocks) * kPatients;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;

  for_each_weight<scalar_t>(tile, layer.weight, [&](int row, int column, scalar_t value) {
    reinterpret_cast<scalar_t*>(shared)[place_of_weight<Tile>(column, row, tile.rows)] = value;
  });
  // of patients who do not exist, and of units that the last group lacks
  for (int i = threadIdx.x; i < kPatients * tile.rows; i += kThreads) {
    grads[i] = as_operand<scalar_t>(0.0f);
  }
  Share shares[kShares];
  float grad_cell[kShares][kTwo];
#pragma unroll
  for (int j = 0; j < kShares; ++j) {
    const Share share = shares[j] = share_of(tile, j);
#pragma unroll
    for (int i = 0; i < kTwo; ++i) {
      const int64_t patient = first_patient + share.patient + i;
      const bool exists = share.exists && share.has_unit && patient < visits.patients;
      const int64_t of_patient = patient * hidden + share.of_all;
      grad_cell[j][i] = exists ? given_or_zero(layer.grad_last_cell, of_patient) : 0.0f;
    }
  }
  // where a block's part of the sums of these eight patients and this unit is
  const auto place_of_part = [&](int rank, int column, int unit) {
    return ((rank * kColumns + column) * tile.units + unit) * kMmaColumns;
  };
  // what the blocks have sent for a unit and two patients: the gradients of their hidden states
  // through the weights
  const auto received = [&](int step, const Share& share, float (&sum)[kTwo]) {
    const int column = share.first_patient / kMmaColumns;
#pragma unroll
    for (int rank = 0; rank < kBlocks; ++rank) {
      const float* from = buffer(step % 2) + place_of_part(rank, column, share.unit);
      const float2 part = *reinterpret_cast<const float2*>(from + share.patient % kMmaColumns);
      sum[0] += part.x;
      sum[1] += part.y;
    }
  };
  const auto finish = [&](const Share& share, int i, float grad_hidden, float grad_of_cell) {
    if (layer.grad_h0 == nullptr) return;
    const int64_t of_patient = int64_t{first_patient + share.patient + i} * hidden + share.of_all;
    layer.grad_h0[of_patient] = narrow<scalar_t>(grad_hidden);
    layer.grad_c0[of_patient] = narrow<scalar_t>(grad_of_cell);
  };

  const int times = times_of(visits, first_patient);
  int going_on = 0;  // patients who had a visit in the step before
  cluster_sync();
  for (int step = 0; step < times; ++step) {
    const int time = visits.reverse ? step : times - 1 - step;
    const int64_t row = visits.starts[time] + first_patient;
    const int patients = present<kPatients>(visits, time);
#pragma unroll
    for (int j = 0; j < kShares; ++j) {
      const Share& share = shares[j];
      if (!share.exists || !share.has_unit) continue;
      float through_weights[kTwo] = {};
      if (share.first_patient < going_on) received(step, share, through_weights);
#pragma unroll
      for (int i = 0; i < kTwo; ++i) {
        const int in_tile = share.patient + i;
        if (in_tile >= max(patients, going_on)) continue;
        const int64_t patient = first_patient + in_tile;
        const int64_t of_patient = patient * hidden + share.of_all;
        float grad_hidden = in_tile < going_on ? through_weights[i]
                                               : given_or_zero(layer.grad_last_hidden, of_patient);
        if (in_tile >= patients) {
          finish(share, i, grad_hidden, grad_cell[j][i]);
          continue;
        }
        const int64_t at = (row + in_tile) * hidden + share.of_all;
        const int64_t of_gates = (row + in_tile) * kGates * hidden + share.of_all;
        const float in = layer.gates[of_gates];
        const float forget = layer.gates[of_gates + hidden];
        const float candidate = layer.gates[of_gates + 2 * hidden];
        const float out = layer.gates[of_gates + 3 * hidden];
        const float tanh_cell = tanhf(layer.cells[at]);
        const int64_t before = row_before(visits, time, patient);
        const int64_t from = before * hidden + share.of_all;
        const float cell_before =
            before < 0 ? given_or_zero(layer.c0, of_patient) : layer.cells[from];
        if (layer.before != nullptr) {
          layer.before[at] = before >= 0 ? layer.output[from]
                                         : narrow<scalar_t>(given_or_zero(layer.h0, of_patient));
        }

        grad_hidden += given_or_zero(layer.grad_output, at);
        const float grad = grad_cell[j][i] + grad_hidden * out * (1.0f - tanh_cell * tanh_cell);
        const float of_sums[kGates] = {grad * candidate * in * (1.0f - in),
                                       grad * cell_before * forget * (1.0f - forget),
                                       grad * in * (1.0f - candidate * candidate),
                                       grad_hidden * tanh_cell * out * (1.0f - out)};
        grad_cell[j][i] = grad * forget;
        Pack<scalar_t, kGates> operands;
#pragma unroll
        for (int gate = 0; gate < kGates; ++gate) {
          layer.grad_sums[of_gates + gate * hidden] = narrow<scalar_t>(of_sums[gate]);
          operands.values[gate] = as_operand<scalar_t>(of_sums[gate]);
        }
        const int place = place_of_term<kPatients, Tile>(in_tile, share.unit * kGates);
        store_pack(grads + place, operands);
      }
    }
    going_on = patients;
    if (step + 1 == times && layer.grad_h0 == nullptr) break;  // nothing asks for the rest
    __syncthreads();
    float* next = buffer((step + 1) % 2);
    const int loads = tile.rows / Tile::kStretch * 2;
    for (int sixteen = warp; sixteen < hidden / kMmaRows; sixteen += kWarps) {
      float sum[1][kColumns][4] = {};
      multiply<scalar_t, kPatients>(bytes + sixteen * loads * kWarp, loads,
                                    reinterpret_cast<const uint4*>(grads),
                                    tile.rows / Tile::kStretch, sum);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int of_all = sixteen * kMmaRows + half * 8 + lane / 4;
        const int rank = of_all / tile.units;
#pragma unroll
        for (int column = 0; column < kColumns; ++column) {
          if (column * kMmaColumns >= patients) continue;
          const int part = place_of_part(own, column, of_all % tile.units);
          float* place = in_block(next + part + lane % 4 * 2, rank);
          *reinterpret_cast<float2*>(place) =
              make_float2(sum[0][column][2 * half], sum[0][column][2 * half + 1]);
        }
      }
    }
    cluster_sync();
  }
  if (layer.grad_h0 == nullptr) return;
#pragma unroll
  for (int j = 0; j < kShares; ++j) {
    const Share& share = shares[j];
    if (!share.exists || !share.has_unit || share.first_patient >= going_on) continue;
    float through_weights[kTwo] = {};
    received(times, share, through_weights);
#pragma unroll
    for (int i = 0; i < kTwo; ++i) {
      if (share.patient + i < going_on) finish(share, i, through_weights[i], grad_cell[j][i]);
    }
  }
#else
  __trap();
#endif
}

}  // namespace ehrseq::packed_lstm::cuda
