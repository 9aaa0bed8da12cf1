// Forward: codes of a visit -> one row, gather, mask and mean in one pass.
//
// A group of lanes holds a tile of the row in registers and iterates over the codes that its source
// staged, with several rows of the table in flight. Few and long visits are divided among several
// groups of a block, whose sums are added in a fixed order.
#pragma once

#include "visit_pool/rows.cuh"
#include "visit_pool/sources.cuh"

namespace ehrseq::cuda {

constexpr int kGatherThreads = 128;

// Adds `count` staged rows of the table, in order, several at a time: all loads are issued
// before the first is used.
template <typename Pooled, typename Source>
__device__ __forceinline__ void gather_rows(Pooled& pooled, const typename Pooled::scalar_t* table,
                                            const RowShape& shape, const Source& source,
                                            const Staged<typename Pooled::acc_t>& staged,
                                            int count) {
  using Row = typename Pooled::Row;
  constexpr int kRows = Pooled::kRowsInFlight;
#pragma unroll 1
  for (int first = 0; first < count; first += kRows) {
    Bits<Row> rows[kRows];
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      if (first + i < count) {
        rows[i] = load_bits<Row>(table + shape.offset(staged.codes[first + i]));
      }
    }
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      if (first + i < count) {
        pooled.add(rows[i], staged.codes[first + i], source.weight(staged, first + i));
      }
    }
  }
}

// A block's shared memory: staged codes with their weights and, once these have been used, the sums
// of the parts of its visits.
template <typename Pooled>
struct GatherMemory {
  using acc_t = typename Pooled::acc_t;
  static constexpr int kStaged = kGatherThreads * kStagedPerLane;
  static constexpr int kStagedBytes = kStaged * static_cast<int>(sizeof(int32_t) + sizeof(acc_t));
  static constexpr int kStateBytes =
      kGatherThreads * (Pooled::kStateBytes + static_cast<int>(sizeof(acc_t)));

  static constexpr size_t bytes(int parts_log2) {
    return parts_log2 > 0 && kStateBytes > kStagedBytes ? kStateBytes : kStagedBytes;
  }

  __device__ static Staged<acc_t> staged(void* memory, const Lanes& lanes) {
    const int first = lanes.group() * kStagedPerLane * lanes.count;
    auto* weights = static_cast<acc_t*>(memory);
    return {reinterpret_cast<int32_t*>(weights + kStaged) + first, weights + first};
  }
  __device__ static acc_t* totals(void* memory) { return static_cast<acc_t*>(memory); }
  __device__ static void* states(void* memory) {
    return static_cast<acc_t*>(memory) + kGatherThreads;
  }
};

// Adds the results of the visit's other parts to that of the first. By all threads of the block.
template <typename Pooled>
__device__ void combine_parts(Pooled& pooled, typename Pooled::acc_t& total, void* memory,
                              const Lanes& lanes, const Part& part) {
  const int thread = static_cast<int>(threadIdx.x);
  auto* totals = GatherMemory<Pooled>::totals(memory);
  void* states = GatherMemory<Pooled>::states(memory);
  __syncthreads();  // the memory held staged codes
  pooled.template save<kGatherThreads>(states, thread);
  if (lanes.lane == 0) totals[lanes.group()] = total;
  __syncthreads();
  if (part.index == 0) {
#pragma unroll 1
    for (int other = 1; other < part.count(); ++other) {
      pooled.template add_saved<kGatherThreads>(states, thread + other * lanes.count);
      total += totals[lanes.group() + other];
    }
  }
  __syncthreads();  // before codes are staged there again
}

// One row for each visit: the sum, mean or maximum of the table's rows that its codes name.
//   grid    x: visits, visits_per_block at a time (a grid-stride loop); y: column tiles of
//           lanes * kColumns columns
//   block   kGatherThreads, as groups of 8, 16 or 32 lanes; 2^parts_log2 neighbouring groups take
//           one visit
//   shared  GatherMemory: kStagedPerLane codes and weights per thread; then, where several groups
//           take one visit, the partial sums of every thread
//   reads   codes and masks (padded) or offsets (packed), weights or scores of codes, rows of the
//           table
//   writes  out [n_visits, row_size]; mode max: arg_max of that shape; attention: the softmax
//           statistics of visits; weights of codes and mode mean: their sums
template <typename Pooled, typename Source>
__global__ void __launch_bounds__(kGatherThreads, Pooled::kBlocks)
    pool_visits(Source source, int64_t n_visits, int parts_log2, RowShape shape,
                const typename Pooled::scalar_t* table, typename Pooled::scalar_t* out,
                int32_t* arg_max) {
  using acc_t = typename Pooled::acc_t;
  EHRSEQ_DYNAMIC_SHARED(memory);
  const Lanes lanes(shape.lanes_log2);
  const auto staged = GatherMemory<Pooled>::staged(memory, lanes);
  const Part part(lanes, parts_log2);
  const int visits_per_block = lanes.groups() >> parts_log2;
  const int64_t column = shape.first_column<Pooled::kColumns>(lanes.lane);
  const bool has_columns = column < shape.row_size;

  for (int64_t block = blockIdx.x; block * visits_per_block < n_visits; block += gridDim.x) {
    const int64_t visit = block * visits_per_block + (lanes.group() >> parts_log2);
    Pooled pooled;
    acc_t total = 0;
    if (visit < n_visits) {
      const int64_t offset = shape.offset(source.first_row(visit)) + column;
      auto cursor = source.open(visit, part, lanes);
      while (cursor.next < cursor.end) {
        const int count = source.stage(cursor, staged, lanes);
        lanes.sync();
        if (has_columns) {
          gather_rows(pooled, table + offset, shape, source, staged, count);
        }
        lanes.sync();  // before other codes are staged there
      }
      total = source.total(cursor, lanes);
    }
    if (parts_log2 > 0) combine_parts(pooled, total, memory, lanes, part);
    if (part.index == 0 && visit < n_visits && lanes.lane == 0 && blockIdx.y == 0) {
      source.keep_total(visit, total);
    }
    if (part.index == 0 && visit < n_visits && has_columns) {
      pooled.write(shape.offset(visit) + column, out, arg_max, source.scale(total));
    }
  }
}

constexpr int kSpreadThreads = 256;

// The gradient of embeddings that already exist: every slot's row is written, padding's as zeros.
//   grid    as that of pool_visits
//   block   kSpreadThreads, as groups of 8, 16 or 32 lanes; 2^parts_log2 neighbouring groups take
//           one visit, each every 2^parts_log2-th slot of it, kSlots at a time
//   shared  none
//   reads   the mask, grad [n_visits, row_size]; mode max: arg_max of that shape
//   writes  out [n_visits, n_slots, row_size]
template <typename scalar_t, int kColumns>
__global__ void __launch_bounds__(kSpreadThreads, 2)
    spread_gradients(Mask mask, int64_t n_visits, int64_t n_slots, int parts_log2, bool mean,
                     RowShape shape, const scalar_t* grad, const int32_t* arg_max, scalar_t* out) {
  using acc_t = accumulator_t<scalar_t>;
  using Row = Pack<scalar_t, kColumns>;
  constexpr int kSlots = 4;
  const Lanes lanes(shape.lanes_log2);
  const Part part(lanes, parts_log2);
  const int visits_per_block = lanes.groups() >> parts_log2;
  const int64_t column = shape.first_column<kColumns>(lanes.lane);
  const bool has_columns = column < shape.row_size;

  for (int64_t block = blockIdx.x; block * visits_per_block < n_visits; block += gridDim.x) {
    const int64_t visit = block * visits_per_block + (lanes.group() >> parts_log2);
    if (visit >= n_visits) return;
    const int64_t base = visit * n_slots;
    const acc_t scale =
        mean ? mean_scale(mask.total<acc_t>(base, base + n_slots, lanes)) : acc_t(1);
    if (!has_columns) continue;

    const Row row = load_pack<Row>(grad + shape.offset(visit) + column);
    int32_t winners[kColumns];
    if (arg_max != nullptr) {
      load_columns<kColumns>(arg_max + shape.offset(visit) + column, winners);
    }
    for (int64_t first = part.index; first < n_slots; first += kSlots * part.count()) {
      Slot<acc_t> slots[kSlots];
      mask.read(base + first, part.count(), slots_left(first, n_slots), slots);
#pragma unroll
      for (int i = 0; i < kSlots; ++i) {
        const int64_t slot = first + i * part.count();
        if (slot >= n_slots) break;
        acc_t values[kColumns];
#pragma unroll
        for (int c = 0; c < kColumns; ++c) {
          const acc_t factor = arg_max == nullptr ? scale * slots[i].weight : acc_t(1);
          const bool flows =
              slots[i].real && (arg_max == nullptr || winners[c] == static_cast<int32_t>(slot));
          values[c] = flows ? factor * widen(row.values[c]) : acc_t(0);
        }
        store_row<scalar_t, kColumns>(out + shape.offset(base + slot) + column, values, acc_t(1));
      }
    }
  }
}

}  // namespace ehrseq::cuda
