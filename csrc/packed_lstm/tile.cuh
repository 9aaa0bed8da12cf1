// How a cluster shares out its patients, units and products, and its shared memory.
#pragma once

#include "common/cuda/cluster.cuh"
#include "common/cuda/device.cuh"

namespace ehrseq::packed_lstm::cuda {

constexpr int kBlocks = 8;  // of a cluster
constexpr int kThreads = 256;
constexpr int kGates = 4;  // i, f, g, o
constexpr int kQuad = 4;   // floats that are loaded together
constexpr int kGroup = 8;  // patients for whom a thread multiplies what it has loaded
constexpr int kUnitsOf = kBlocks * kQuad;  // H is a multiple of this
constexpr int kMostHidden = 288;

struct Visits {
  const int64_t* starts;  // [times + 1]: the first row of each time
  int times;
  int patients;
  int hidden;
  bool reverse;
};

constexpr int smaller(int a, int b) { return a < b ? a : b; }

// How a block shares out its work, and its shared memory, in floats from its beginning.
template <int kPatients>
struct Tile {
  static constexpr int kGroups = kPatients / kGroup;
  // of (patient, unit), of a thread
  static constexpr int kPairs = (kPatients * kMostHidden / kBlocks + kThreads - 1) / kThreads;

  int hidden;
  int units;  // of a block
  int quads;
  int slices;  // of the terms of a sum
  int exchanged;
  int partial;
  int grads;
  int end;

  // Forward, a thread multiplies the rows of one unit with a group's h; slices are of h.
  static constexpr Tile forward(int hidden) {
    Tile tile = common(hidden);
    tile.slices = smaller(kThreads / (kGroups * tile.units), tile.quads);
    tile.grads = tile.end = tile.partial + tile.slices * kPatients * kGates * tile.units;
    return tile;
  }
  // Backward, it multiplies four columns with a group's gradients; slices are of rows, by fours.
  static constexpr Tile backward(int hidden) {
    Tile tile = common(hidden);
    tile.slices = smaller(kThreads / (kGroups * tile.quads), tile.units);
    tile.grads = tile.partial + tile.slices * kPatients * hidden;
    tile.end = tile.grads + kGates * tile.units * kPatients;
    return tile;
  }
  constexpr int bytes() const { return end * static_cast<int>(sizeof(float)); }

 private:
  static constexpr Tile common(int hidden) {
    Tile tile{};
    tile.hidden = hidden;
    tile.units = hidden / kBlocks;
    tile.quads = hidden / kQuad;
    tile.exchanged = kGates * tile.units * hidden;
    tile.partial = tile.exchanged + 2 * kPatients * hidden;
    return tile;
  }
};

constexpr int kMostShared = 227 << 10;  // of a block, on GPUs for data centres
static_assert(Tile<16>::forward(kMostHidden).bytes() <= kMostShared);
static_assert(Tile<16>::backward(kMostHidden).bytes() <= kMostShared);
static_assert(Tile<8>::forward(kMostHidden).bytes() <= kMostShared);
static_assert(Tile<8>::backward(kMostHidden).bytes() <= kMostShared);

#if EHRSEQ_HAS_CLUSTERS

using ehrseq::cuda::cluster_arrive;
using ehrseq::cuda::cluster_rank;
using ehrseq::cuda::cluster_sync;
using ehrseq::cuda::cluster_wait;
using ehrseq::cuda::in_block;

// Patients at a time.
__device__ inline int64_t patients_at(const Visits& visits, int time) {
  return visits.starts[time + 1] - visits.starts[time];
}

// The times at which a patient has visits: patients do not become more.
__device__ inline int times_of(const Visits& visits, int patient) {
  int first = 0;
  int last = visits.times;
  while (first < last) {
    const int middle = (first + last) / 2;
    if (patients_at(visits, middle) > patient) {
      first = middle + 1;
    } else {
      last = middle;
    }
  }
  return first;
}

// Adds the products of the rows of one unit with the hidden states of a group of patients, over a
// slice of h. Weights are [gate][quad of h][unit][4].
template <int kPatients>
__device__ inline void multiply(const Tile<kPatients>& tile, const float* weights,
                                const float* hidden, int patients, float* partial) {
  const int items = Tile<kPatients>::kGroups * tile.units;
  const int slice = static_cast<int>(threadIdx.x) / items;
  const int item = static_cast<int>(threadIdx.x) % items;
  const int first = item / tile.units * kGroup;
  const int unit = item % tile.units;
  if (slice >= tile.slices || first >= patients) return;

  float sum[kGates][kGroup] = {};
  const int last_quad = tile.quads * (slice + 1) / tile.slices;
  for (int quad = tile.quads * slice / tile.slices; quad < last_quad; ++quad) {
    float4 w[kGates];
#pragma unroll
    for (int gate = 0; gate < kGates; ++gate) {
      const int at = ((gate * tile.quads + quad) * tile.units + unit) * kQuad;
      w[gate] = *reinterpret_cast<const float4*>(weights + at);
    }
#pragma unroll
    for (int p = 0; p < kGroup; ++p) {
      const int at = (first + p) * tile.hidden + quad * kQuad;
      const float4 h = *reinterpret_cast<const float4*>(hidden + at);
#pragma unroll
      for (int gate = 0; gate < kGates; ++gate) {
        sum[gate][p] += w[gate].x * h.x;
        sum[gate][p] += w[gate].y * h.y;
        sum[gate][p] += w[gate].z * h.z;
        sum[gate][p] += w[gate].w * h.w;
      }
    }
  }
#pragma unroll
  for (int p = 0; p < kGroup; ++p) {
#pragma unroll
    for (int gate = 0; gate < kGates; ++gate) {
      partial[((slice * kPatients + first + p) * kGates + gate) * tile.units + unit] = sum[gate][p];
    }
  }
}

// Adds the products of four columns with the gradients of a group of patients, over a slice of this
// block's rows. Weights are [row][H], gradients [patient][row].
template <int kPatients>
__device__ inline void multiply_back(const Tile<kPatients>& tile, const float* weights,
                                     const float* grads, int patients, float* partial) {
  const int items = Tile<kPatients>::kGroups * tile.quads;
  const int slice = static_cast<int>(threadIdx.x) / items;
  const int item = static_cast<int>(threadIdx.x) % items;
  const int first = item / tile.quads * kGroup;
  const int column = item % tile.quads * kQuad;
  if (slice >= tile.slices || first >= patients) return;

  float4 sum[kGroup] = {};
  const int rows = kGates * tile.units;  // a multiple of 16
  const int last_row = rows / kQuad * (slice + 1) / tile.slices * kQuad;
  for (int row = rows / kQuad * slice / tile.slices * kQuad; row < last_row; row += kQuad) {
    float4 w[kQuad];
#pragma unroll
    for (int q = 0; q < kQuad; ++q) {
      w[q] = *reinterpret_cast<const float4*>(weights + (row + q) * tile.hidden + column);
    }
#pragma unroll
    for (int p = 0; p < kGroup; ++p) {
      const float4 d = *reinterpret_cast<const float4*>(grads + (first + p) * rows + row);
      const float of[kQuad] = {d.x, d.y, d.z, d.w};
#pragma unroll
      for (int q = 0; q < kQuad; ++q) {
        sum[p].x += w[q].x * of[q];
        sum[p].y += w[q].y * of[q];
        sum[p].z += w[q].z * of[q];
        sum[p].w += w[q].w * of[q];
      }
    }
  }
#pragma unroll
  for (int p = 0; p < kGroup; ++p) {
    const int at = (slice * kPatients + first + p) * tile.hidden + column;
    *reinterpret_cast<float4*>(partial + at) = sum[p];
  }
}

// A sum over slices, in their order.
template <int kPatients>
__device__ inline float4 sum_of_slices(const Tile<kPatients>& tile, const float* partial, int at) {
  float4 sum = {0.0f, 0.0f, 0.0f, 0.0f};
  for (int slice = 0; slice < tile.slices; ++slice) {
    const int from = slice * kPatients * tile.hidden + at;
    const float4 part = *reinterpret_cast<const float4*>(partial + from);
    sum.x += part.x;
    sum.y += part.y;
    sum.z += part.z;
    sum.w += part.w;
  }
  return sum;
}

// A patient and a unit of this block, for which a thread keeps what is carried from visit to visit.
struct Pair {
  int patient;  // of the tile
  int unit;     // of this block
  int whose;    // the patient, of all
  int of_all;   // the unit
};

template <int kPatients>
struct Pairs {
  static constexpr int kCount = Tile<kPatients>::kPairs;
  Pair of[kCount];

  __device__ explicit Pairs(const Tile<kPatients>& tile) {
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      const int at = static_cast<int>(threadIdx.x) + j * kThreads;
      of[j].patient = at / tile.units;  // kPatients and more: there is none
      of[j].unit = at % tile.units;
      of[j].whose = static_cast<int>(blockIdx.x / kBlocks) * kPatients + of[j].patient;
      of[j].of_all = static_cast<int>(cluster_rank()) * tile.units + of[j].unit;
    }
  }
};

// Calls body(row, from) for each row of this block's weights, where it is in memory.
template <int kPatients, typename Body>
__device__ inline void for_each_row(const Tile<kPatients>& tile, const float* weight,
                                    const Body& body) {
  const int first_unit = static_cast<int>(cluster_rank()) * tile.units;
  for (int row = threadIdx.x / ehrseq::cuda::kWarp; row < kGates * tile.units;
       row += kThreads / ehrseq::cuda::kWarp) {
    const int gate = row / tile.units;
    const int64_t of_all = int64_t{gate} * tile.hidden + first_unit + row % tile.units;
    body(row, weight + of_all * tile.hidden);
  }
}

// The patients of this tile at a time, of whom there is one at least.
template <int kPatients>
__device__ inline int present(const Visits& visits, int time) {
  const int64_t first = int64_t{blockIdx.x / kBlocks} * kPatients;
  return static_cast<int>(min(patients_at(visits, time) - first, int64_t{kPatients}));
}

#endif  // EHRSEQ_HAS_CLUSTERS

}  // namespace ehrseq::packed_lstm::cuda
