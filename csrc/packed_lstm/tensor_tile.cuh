// How a cluster shares out its patients, units and products on tensor cores, and its shared memory.
//
// A product of a warp is of 16 rows and 8 patients (common/cuda/mma.cuh). The terms of a sum are
// taken by stretches of 64 bytes, 16 for each of the four lanes of a row: the first half of a
// lane's 16 bytes are its operands in one product, the second half in the next. In which order a
// sum takes its terms is the same for both operands, and else free; this one lets a lane load all
// that it needs of a stretch by one instruction.
//
// Weights are in the order in which lanes load them, [16 rows][stretch][product][lane][16 bytes];
// the other operand is [stretch][patient][64 bytes]. Either way a warp loads 512 neighbouring
// bytes, in four wavefronts: no bank conflicts, and no padding.
#pragma once

#include "common/cuda/mma.cuh"
#include "packed_lstm/layer.cuh"

namespace ehrseq::packed_lstm::cuda {

using ehrseq::cuda::kMmaColumns;
using ehrseq::cuda::kMmaRows;
using ehrseq::cuda::kWarp;

constexpr int kWarps = kThreads / kWarp;
constexpr int kGroupUnits = 8;  // of whom a warp computes all four gates: two products of 16 rows
constexpr int kGroupRows = kGates * kGroupUnits;

// The most hidden units, by the size of what is multiplied: what a block's shared memory holds.
constexpr int kMostHiddenIn16Bits = 416;
// From here on tiles have 8 patients, however many there are.
constexpr int kMostHiddenOf16Patients = 384;

template <typename scalar_t, int kPatients>
struct TensorTile {
  static constexpr int kSize = static_cast<int>(sizeof(scalar_t));
  static constexpr int kMost = kSize == 2 ? kMostHiddenIn16Bits : kMostHidden;
  static constexpr int kOfLane = 16 / kSize;  // terms of a stretch
  static constexpr int kOfWord = 4 / kSize;
  static constexpr int kStretch = 4 * kOfLane;
  static constexpr int kColumns = kPatients / kMmaColumns;  // eights of patients
  static constexpr int kMostGroups = (kMost / kBlocks + kGroupUnits - 1) / kGroupUnits;
  // of a group of units and eight patients, of a warp
  static constexpr int kShares = (kMostGroups * kColumns + kWarps - 1) / kWarps;

  int hidden;
  int units;   // of a block
  int groups;  // of them; the last one may have but four
  int rows;    // of the weights in shared memory, and zeros for units that the last group lacks
  // in bytes from the beginning; weights come first
  int exchanged;
  int exchanged_bytes;  // of either buffer
  int grads;
  int bytes;

  // Weights are rows of sums over h. Exchanged: h.
  static constexpr TensorTile forward(int hidden) {
    TensorTile tile = common(hidden);
    tile.exchanged_bytes = kPatients * hidden * kSize;
    tile.grads = tile.bytes = tile.exchanged + 2 * tile.exchanged_bytes;
    return tile;
  }
  // Weights are columns, which are H sums over this block's rows. Exchanged: its part of them, in
  // float32, [block that it is from][eight patients][unit][patient].
  static constexpr TensorTile backward(int hidden) {
    TensorTile tile = common(hidden);
    tile.exchanged_bytes = kPatients * hidden * static_cast<int>(sizeof(float));
    tile.grads = tile.exchanged + 2 * tile.exchanged_bytes;
    tile.bytes = tile.grads + kPatients * tile.rows * kSize;
    return tile;
  }

 private:
  static constexpr TensorTile common(int hidden) {
    TensorTile tile{};
    tile.hidden = hidden;
    tile.units = hidden / kBlocks;
    tile.groups = (tile.units + kGroupUnits - 1) / kGroupUnits;
    tile.rows = tile.groups * kGroupRows;
    tile.exchanged = tile.rows * hidden * kSize;
    return tile;
  }
};

// Whether all sizes fit that are served.
template <typename scalar_t, int kPatients>
constexpr bool fits(int most) {
  for (int hidden = kUnitsOf; hidden <= most; hidden += kUnitsOf) {
    if (TensorTile<scalar_t, kPatients>::forward(hidden).bytes > kMostShared) return false;
    if (TensorTile<scalar_t, kPatients>::backward(hidden).bytes > kMostShared) return false;
  }
  return true;
}
static_assert(fits<__half, 8>(kMostHiddenIn16Bits) && fits<__half, 16>(kMostHiddenOf16Patients));
static_assert(fits<float, 16>(kMostHidden));

#if EHRSEQ_HAS_CLUSTERS

using ehrseq::cuda::as_operand;
using ehrseq::cuda::multiply_add;
using ehrseq::cuda::narrow;
using ehrseq::cuda::Pack;
using ehrseq::cuda::store_pack;

// Where a weight is: its row of 16 by 16, and which term of a sum of `terms` it belongs to.
template <typename Tile>
__device__ inline int place_of_weight(int row, int term, int terms) {
  const int of_lane = term % Tile::kOfLane;
  const int word = of_lane / Tile::kOfWord;
  const int lane = row % 8 * 4 + term % Tile::kStretch / Tile::kOfLane;
  const int load = (row / kMmaRows * (terms / Tile::kStretch) + term / Tile::kStretch) * 2;
  const int register_of = word % 2 * 2 + row % kMmaRows / 8;
  return ((load + word / 2) * kWarp + lane) * Tile::kOfLane + register_of * Tile::kOfWord +
         of_lane % Tile::kOfWord;
}

// Where the other operand is.
template <int kPatients, typename Tile>
__device__ inline int place_of_term(int patient, int term) {
  return (term / Tile::kStretch * kPatients + patient) * Tile::kStretch + term % Tile::kStretch;
}

// Adds products of kRows sixteens of rows with kColumns eights of patients, over all stretches.
// `weights` and `terms` begin with the first of either, `rows` of weights being that many loads of
// a warp.
template <typename scalar_t, int kPatients, int kRows, int kColumns>
__device__ __forceinline__ void multiply(const uint4* weights, int loads_of_rows,
                                         const uint4* terms, int stretches,
                                         float (&sum)[kRows][kColumns][4]) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  float second[kRows][kColumns][4] = {};  // of the second products: half as long a chain of sums
#pragma unroll 2
  for (int stretch = 0; stretch < stretches; ++stretch) {
    uint4 term[kColumns];
#pragma unroll
    for (int column = 0; column < kColumns; ++column) {
      term[column] = terms[stretch * kPatients * 4 + column * kWarp + lane];
    }
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      const uint4* from = weights + (row * loads_of_rows + 2 * stretch) * kWarp + lane;
      const uint4 of_first = from[0];
      const uint4 of_second = from[kWarp];
#pragma unroll
      for (int column = 0; column < kColumns; ++column) {
        multiply_add<scalar_t>(sum[row][column], of_first, term[column].x, term[column].y);
        multiply_add<scalar_t>(second[row][column], of_second, term[column].z, term[column].w);
      }
    }
  }
#pragma unroll
  for (int row = 0; row < kRows; ++row) {
#pragma unroll
    for (int column = 0; column < kColumns; ++column) {
#pragma unroll
      for (int i = 0; i < 4; ++i) sum[row][column][i] += second[row][column][i];
    }
  }
}

// What a warp computes of a visit: a group of units, for eight patients. A lane has one unit, and
// two patients who follow each other: what its sums of a product are of.
struct Share {
  bool exists;
  int group;
  int first_patient;  // of the eight, of the tile
  int patient;        // the first of the two, of the tile
  int unit;           // of this block
  bool has_unit;      // the last group may lack it
  int of_all;         // the unit
};

template <typename Tile>
__device__ inline Share share_of(const Tile& tile, int j) {
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int at = warp + j * kWarps;
  Share share;
  share.group = at / Tile::kColumns;
  share.exists = share.group < tile.groups;
  share.first_patient = at % Tile::kColumns * kMmaColumns;
  share.patient = share.first_patient + lane % 4 * 2;
  share.unit = share.group * kGroupUnits + lane / 4;
  share.has_unit = share.unit < tile.units;
  share.of_all = static_cast<int>(cluster_rank()) * tile.units + share.unit;
  return share;
}

// Calls body(row, column, value) for all of this block's weights, row being [unit][gate]; the rows
// of units that the last group lacks are zeros.
template <typename scalar_t, typename Tile, typename Body>
__device__ inline void for_each_weight(const Tile& tile, const scalar_t* weight, const Body& body) {
  const int first_unit = static_cast<int>(cluster_rank()) * tile.units;
  for (int row = static_cast<int>(threadIdx.x) / kWarp; row < tile.rows; row += kWarps) {
    const int unit = row / kGates;
    const int64_t of_all = int64_t{row % kGates} * tile.hidden + first_unit + unit;
    for (int column = threadIdx.x % kWarp; column < tile.hidden; column += kWarp) {
      const bool exists = unit < tile.units;
      const float value = exists ? widen(weight[of_all * tile.hidden + column]) : 0.0f;
      body(row, column, as_operand<scalar_t>(value));
    }
  }
}

#endif  // EHRSEQ_HAS_CLUSTERS

}  // namespace ehrseq::packed_lstm::cuda
