// The transposed index of a padded batch, built on the device: its real slots sorted by code.
//
// A stable radix sort, least significant digit first, over the bits that the vocabulary needs. Each
// pass counts the digits of every tile, sums the counts over tiles, and moves each entry to its
// position. The first pass reads the slots themselves and leaves out padding, so that the others,
// and all that follows, see the real entries alone. Their number is known on the device only: grids
// are sized for every slot, and blocks beyond the count return. One warp has a tile, and
// takes its entries in order; that makes the sort stable, and visits of a code stay in the order of
// the batch.
#pragma once

#include "visit_pool/sources.cuh"

namespace ehrseq::cuda {

constexpr int kSortThreads = 256;
constexpr int kSortWarps = kSortThreads / kWarp;
constexpr int kMostDigitBits = 10;
constexpr int kKeysPerLane = 8;  // loaded together
constexpr int kRoundKeys = kWarp * kKeysPerLane;

constexpr int32_t kNoKey = -1;

// What the sort moves. Weights only where masks are weights; null otherwise.
template <typename acc_t>
struct Entries {
  int32_t* codes;
  int32_t* visits;
  acc_t* weights;
};

// ---------------------------------------------------------------------------------------------
// Where a pass reads its entries: slots of a padded batch, or what the pass before has sorted.

template <typename acc_t_>
struct PaddedKeys {
  using acc_t = acc_t_;
  static constexpr int64_t kTile = 8 * kRoundKeys;  // nearly all slots are empty

  SlotCodes codes;
  Mask mask;
  uint32_t n_slots;
  int64_t slots_in_all;
  int64_t padding_code;  // gets no gradient, and is left out

  __device__ int64_t size() const { return slots_in_all; }

  // Keys of the slots first, first + 32, ...; kNoKey where there is nothing to sort.
  __device__ __forceinline__ void read(int64_t first, int64_t end,
                                       int32_t (&keys)[kKeysPerLane]) const {
    Slot<acc_t> slots[kKeysPerLane];
    mask.read(first, kWarp, slots_left(first, end), slots);
    codes.read(first, 0, kWarp, slots, keys);
#pragma unroll
    for (int i = 0; i < kKeysPerLane; ++i) {
      if (!slots[i].real || keys[i] == padding_code) keys[i] = kNoKey;
    }
  }
  __device__ __forceinline__ int32_t visit(int64_t at) const {
    return static_cast<int32_t>(static_cast<uint32_t>(at) / n_slots);
  }
  __device__ __forceinline__ acc_t weight(int64_t at) const {
    Slot<acc_t> slot[1];
    mask.read(at, 1, 1, slot);
    return slot[0].weight;
  }
};

template <typename acc_t_>
struct SortedKeys {
  using acc_t = acc_t_;
  static constexpr int64_t kTile = 2 * kRoundKeys;

  Entries<acc_t> entries;
  const int32_t* count;

  __device__ int64_t size() const { return *count; }

  __device__ __forceinline__ void read(int64_t first, int64_t end,
                                       int32_t (&keys)[kKeysPerLane]) const {
#pragma unroll
    for (int i = 0; i < kKeysPerLane; ++i) {
      const int64_t at = first + i * kWarp;
      keys[i] = at < end ? entries.codes[at] : kNoKey;
    }
  }
  __device__ __forceinline__ int32_t visit(int64_t at) const { return entries.visits[at]; }
  __device__ __forceinline__ acc_t weight(int64_t at) const { return entries.weights[at]; }
};

// The digit that a pass sorts by.
struct Digit {
  int shift;
  int bits;

  __host__ __device__ int values() const { return 1 << bits; }
  __device__ int of(int32_t key) const { return (key >> shift) & (values() - 1); }
};

// Entries [begin, end) of this warp, none beyond the last tile.
struct SortTile {
  int64_t index;
  int64_t begin;
  int64_t end;

  template <typename Keys>
  __device__ static SortTile of_warp(const Keys& keys) {
    const int64_t index = static_cast<int64_t>(blockIdx.x) * kSortWarps + threadIdx.x / kWarp;
    const int64_t size = keys.size();
    const int64_t begin = index * Keys::kTile;
    return {index, begin, begin + Keys::kTile < size ? begin + Keys::kTile : size};
  }
  __device__ bool empty() const { return begin >= end; }
};

__device__ inline int lane_of_warp() { return static_cast<int>(threadIdx.x) & (kWarp - 1); }
__device__ inline int warp_of_block() { return static_cast<int>(threadIdx.x) / kWarp; }

// The lanes whose digit is this lane's.
__device__ __forceinline__ unsigned lanes_with(int digit, int bits) {
  unsigned peers = kWholeWarp;
  for (int bit = 0; bit < bits; ++bit) {
    const bool is_set = (digit >> bit) & 1;
    const unsigned with_it = __ballot_sync(kWholeWarp, is_set);
    peers &= is_set ? with_it : ~with_it;
  }
  return peers;
}

// The sum of what earlier threads of the block hold; the sum of all is left in `total`.
__device__ inline int32_t sum_before(int32_t value, int32_t& total) {
  __shared__ int32_t of_warps[kSortWarps];
  int32_t inclusive = value;
  for (int step = 1; step < kWarp; step *= 2) {
    const int32_t earlier = __shfl_up_sync(kWholeWarp, inclusive, step);
    if (lane_of_warp() >= step) inclusive += earlier;
  }
  __syncthreads();  // the last call's sums have been read
  if (lane_of_warp() == kWarp - 1) of_warps[warp_of_block()] = inclusive;
  __syncthreads();
  int32_t before = inclusive - value;
  total = 0;
  for (int warp = 0; warp < kSortWarps; ++warp) {
    if (warp < warp_of_block()) before += of_warps[warp];
    total += of_warps[warp];
  }
  return before;
}

// ---------------------------------------------------------------------------------------------
// A pass: count, sum, move

// counts[digit * n_tiles + tile]
template <typename Keys>
__device__ void count_digits(const Keys& keys, Digit digit, int64_t n_tiles, int32_t* counts) {
  EHRSEQ_DYNAMIC_SHARED(memory);
  auto* counters = reinterpret_cast<int32_t*>(memory) + warp_of_block() * digit.values();
  const auto tile = SortTile::of_warp(keys);
  if (tile.empty()) return;
  const int lane = lane_of_warp();
  for (int value = lane; value < digit.values(); value += kWarp) counters[value] = 0;
  __syncwarp();
  for (int64_t first = tile.begin; first < tile.end; first += kRoundKeys) {
    int32_t codes[kKeysPerLane];
    keys.read(first + lane, tile.end, codes);
#pragma unroll
    for (int i = 0; i < kKeysPerLane; ++i) {
      // whole numbers, so that their order does not matter
      if (codes[i] != kNoKey) atomicAdd(&counters[digit.of(codes[i])], 1);
    }
  }
  __syncwarp();
  for (int value = lane; value < digit.values(); value += kWarp) {
    counts[value * n_tiles + tile.index] = counters[value];
  }
}

// 1 / max(sum of the masks, 1) of each visit, which the gradient of a mean is multiplied by.
template <typename acc_t>
__device__ void scale_visits(const Mask& mask, int64_t n_visits, int64_t n_slots, unsigned block,
                             acc_t* scales) {
  const Lanes lanes(5);
  const int64_t visit = static_cast<int64_t>(block) * kSortWarps + warp_of_block();
  if (visit >= n_visits) return;
  const acc_t total = mask.total<acc_t>(visit * n_slots, (visit + 1) * n_slots, lanes);
  if (lanes.lane == 0) scales[visit] = mean_scale(total);
}

// The first pass over a padded batch: counts of its codes' lowest digit, and the scales of visits.
//   grid    x: tile_blocks of kSortWarps tiles, then blocks of kSortWarps visits (mode mean with a
//           mask; else none)
//   block   kSortThreads: a warp per tile of PaddedKeys::kTile slots, or per visit
//   shared  one counter per digit value and warp
//   reads   codes and masks of every slot
//   writes  counts [digit values, n_tiles], scales [n_visits]
template <typename acc_t>
__global__ void __launch_bounds__(kSortThreads)
    count_padded(PaddedKeys<acc_t> keys, Digit digit, int64_t n_tiles, unsigned tile_blocks,
                 int64_t n_visits, int32_t* counts, acc_t* scales) {
  if (blockIdx.x < tile_blocks) {
    count_digits(keys, digit, n_tiles, counts);
  } else {
    scale_visits(keys.mask, n_visits, static_cast<int64_t>(keys.n_slots), blockIdx.x - tile_blocks,
                 scales);
  }
}

// The other passes: counts of the next digit.
//   grid    x: kSortWarps tiles per block, enough for every slot of the batch
//   block   kSortThreads: a warp per tile of SortedKeys::kTile entries
//   shared  one counter per digit value and warp
//   reads   the codes that the pass before has sorted, and their number
//   writes  counts [digit values, n_tiles]
template <typename acc_t>
__global__ void __launch_bounds__(kSortThreads)
    count_sorted(SortedKeys<acc_t> keys, Digit digit, int64_t n_tiles, int32_t* counts) {
  count_digits(keys, digit, n_tiles, counts);
}

// Prefix sums over tiles: from how many entries of a digit value each tile holds to how many the
// tiles before it hold.
//   grid    x: one block per digit value (after count_distinct: one block)
//   block   kSortThreads, a tile per thread at a time
//   shared  one sum per warp (static)
//   reads   counts [digit values, n_tiles]
//   writes  counts, in place; totals [digit values]
template <typename Keys>
__global__ void __launch_bounds__(kSortThreads)
    sum_over_tiles(Keys keys, int64_t n_tiles, int32_t* counts, int32_t* totals) {
  const int64_t in_use = (keys.size() + Keys::kTile - 1) / Keys::kTile;
  int32_t* of_digit = counts + blockIdx.x * n_tiles;
  int32_t before = 0;
  for (int64_t first = 0; first < in_use; first += kSortThreads) {
    const int64_t tile = first + threadIdx.x;
    int32_t total;
    const int32_t in_this_round = sum_before(tile < in_use ? of_digit[tile] : 0, total);
    if (tile < in_use) of_digit[tile] = before + in_this_round;
    before += total;
  }
  if (threadIdx.x == 0) totals[blockIdx.x] = before;
}

// Where the entries of each digit value begin, from how many there are; returns how many there are
// in all.
__device__ inline int32_t sum_over_digits(const int32_t* totals, int values, int32_t* begins) {
  int32_t before = 0;
  for (int first = 0; first < values; first += kSortThreads) {
    const int value = first + static_cast<int>(threadIdx.x);
    int32_t total;
    const int32_t in_this_round = sum_before(value < values ? totals[value] : 0, total);
    if (value < values) begins[value] = before + in_this_round;
    before += total;
  }
  __syncthreads();
  return before;
}

// Moves the entries to their sorted positions. Each warp takes the entries of its tile in order, so
// the sort is stable.
//   grid    x: kSortWarps tiles per block
//   block   kSortThreads: a warp per tile
//   shared  where each digit value begins, and per warp the next position of each value
//   reads   the entries, counts [digit values, n_tiles] (summed over tiles), totals [digit values]
//   writes  out; count: the number of entries (first pass)
template <typename Keys>
__global__ void __launch_bounds__(kSortThreads)
    move_entries(Keys keys, Digit digit, int64_t n_tiles, const int32_t* counts,
                 const int32_t* totals, Entries<typename Keys::acc_t> out, int32_t* count) {
  EHRSEQ_DYNAMIC_SHARED(memory);
  auto* begins = reinterpret_cast<int32_t*>(memory);
  int32_t* next = begins + (warp_of_block() + 1) * digit.values();
  const bool is_first = blockIdx.x == 0;
  if (!is_first && static_cast<int64_t>(blockIdx.x) * kSortWarps * Keys::kTile >= keys.size()) {
    return;
  }
  const int32_t in_all = sum_over_digits(totals, digit.values(), begins);
  if (is_first && threadIdx.x == 0 && count != nullptr) *count = in_all;

  const auto tile = SortTile::of_warp(keys);
  if (tile.empty()) return;
  const int lane = lane_of_warp();
  for (int value = lane; value < digit.values(); value += kWarp) {
    next[value] = begins[value] + counts[value * n_tiles + tile.index];
  }
  __syncwarp();
  for (int64_t first = tile.begin; first < tile.end; first += kRoundKeys) {
    int32_t codes[kKeysPerLane];
    keys.read(first + lane, tile.end, codes);
#pragma unroll
    for (int i = 0; i < kKeysPerLane; ++i) {
      const bool is_real = codes[i] != kNoKey;
      const unsigned real = __ballot_sync(kWholeWarp, is_real);
      if (real == 0) continue;
      const int value = digit.of(codes[i]);
      const unsigned peers = lanes_with(value, digit.bits) & real;
      const unsigned before = peers & ((1u << lane) - 1);
      const int32_t to = is_real ? next[value] + __popc(before) : 0;
      __syncwarp();  // all have read their positions
      if (is_real) {
        if (before == 0) next[value] = to + __popc(peers);
        const int64_t from = first + i * kWarp + lane;
        out.codes[to] = codes[i];
        out.visits[to] = keys.visit(from);
        if (out.weights != nullptr) out.weights[to] = keys.weight(from);
      }
      __syncwarp();  // the positions are updated before the next round
    }
  }
}

// ---------------------------------------------------------------------------------------------
// Sorted entries to the form that packed batches have: distinct codes and where each begins

// A tile counts the codes whose first entry it holds.
template <typename acc_t>
__device__ __forceinline__ bool begins_a_code(const SortedKeys<acc_t>& keys, int64_t at) {
  return at == 0 || keys.entries.codes[at - 1] != keys.entries.codes[at];
}

// How many segments begin in each tile.
//   grid    x: kSortWarps tiles per block
//   block   kSortThreads: a warp per tile of SortedKeys::kTile entries
//   shared  none
//   reads   the sorted codes
//   writes  counts [n_tiles]
template <typename acc_t>
__global__ void __launch_bounds__(kSortThreads)
    count_distinct(SortedKeys<acc_t> keys, int32_t* counts) {
  const auto tile = SortTile::of_warp(keys);
  if (tile.empty()) return;
  int32_t found = 0;
  for (int64_t first = tile.begin; first < tile.end; first += kWarp) {
    const int64_t at = first + lane_of_warp();
    found += __popc(__ballot_sync(kWholeWarp, at < tile.end && begins_a_code(keys, at)));
  }
  if (lane_of_warp() == 0) counts[tile.index] = found;
}

// The distinct codes and where their segments begin.
//   grid    x: kSortWarps tiles per block
//   block   kSortThreads: a warp per tile of SortedKeys::kTile entries
//   shared  none
//   reads   the sorted codes, counts [n_tiles] (summed over tiles), n_distinct
//   writes  index_codes [n_distinct], index_offsets [n_distinct + 1], n_entries
template <typename acc_t>
__global__ void __launch_bounds__(kSortThreads)
    write_index(SortedKeys<acc_t> keys, const int32_t* counts, const int32_t* n_distinct,
                int32_t* index_codes, int32_t* index_offsets, int32_t* n_entries) {
  if (blockIdx.x == 0 && threadIdx.x == 0) {
    *n_entries = static_cast<int32_t>(keys.size());
    index_offsets[*n_distinct] = *n_entries;
  }
  const auto tile = SortTile::of_warp(keys);
  if (tile.empty()) return;
  int32_t next = counts[tile.index];
  for (int64_t first = tile.begin; first < tile.end; first += kWarp) {
    const int64_t at = first + lane_of_warp();
    const bool begins = at < tile.end && begins_a_code(keys, at);
    const unsigned all = __ballot_sync(kWholeWarp, begins);
    if (begins) {
      const int32_t to = next + __popc(all & ((1u << lane_of_warp()) - 1));
      index_codes[to] = keys.entries.codes[at];
      index_offsets[to] = static_cast<int32_t>(at);
    }
    next += __popc(all);
  }
}

}  // namespace ehrseq::cuda
