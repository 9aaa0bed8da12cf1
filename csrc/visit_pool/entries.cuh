// The entries of a code index (one code of one visit each, sorted by code), as the backward pass
// reads them: from an index that was sorted on the device, or from the one that a packed batch has.
// Entries are cut into chunks of equal length, whatever their codes.
#pragma once

#include "visit_pool/index.cuh"

namespace ehrseq::cuda {

constexpr int64_t kShortestChunk = 16;
constexpr int64_t kMostChunks = 4096;

// Depends on the number of entries alone, so that sums do not depend on the GPU.
__host__ __device__ constexpr int64_t chunk_length(int64_t n_entries) {
  int64_t length = kShortestChunk;
  while (length * kMostChunks < n_entries) length *= 2;
  return length;
}

__host__ __device__ constexpr int64_t chunks_of(int64_t n_entries) {
  const int64_t length = chunk_length(n_entries);
  return (n_entries + length - 1) / length;
}

// How many entries an index has: known at launch or, where it was built on the device, only there.
struct EntryCount {
  const int32_t* on_device;
  int64_t known;

  __device__ int64_t get() const { return on_device != nullptr ? *on_device : known; }
};

// A lane's entry, and where segments end among the entries of its group.
struct Entry {
  int32_t visit;
  int32_t code;
  int32_t segment;  // position of the code among the distinct ones, where that is known
  bool repeats;     // the entry before is the same code of the same visit
  unsigned ends;    // bit i: the entry of lane i is the last of its segment
};

struct ChunkCursor {
  int64_t segment;
  bool continues;  // the next entry is of the same segment as the one before it
};

// Whether `code` is among n ascending codes.
__device__ inline bool is_among(const int32_t* codes, int64_t n, int64_t code) {
  int64_t low = 0;
  int64_t high = n;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (codes[middle] < code) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low < n && codes[low] == code;
}

// Sorted on the device (index.cuh), with a code for every entry.
template <typename acc_t>
struct SortedIndex {
  Entries<acc_t> entries;
  const int32_t* count;

  __device__ int64_t size() const { return *count; }

  __device__ ChunkCursor open(int64_t begin, const Lanes&) const {
    return {0, begin > 0 && entries.codes[begin - 1] == entries.codes[begin]};
  }

  // The n entries from `first` on.
  __device__ Entry load(ChunkCursor& cursor, int64_t first, int n, const Lanes& lanes) const {
    const int64_t at = first + lanes.lane;
    const bool is_one = lanes.lane < n;
    Entry entry{0, kNoKey, 0, false, 0};
    bool is_last = false;
    if (is_one) {
      entry.visit = entries.visits[at];
      entry.code = entries.codes[at];
      is_last = at + 1 == size() || entries.codes[at + 1] != entry.code;
      entry.repeats =
          at > 0 && entries.codes[at - 1] == entry.code && entries.visits[at - 1] == entry.visit;
    }
    entry.ends = lanes.vote(is_last);
    cursor.continues = !(entry.ends >> (n - 1) & 1);
    return entry;
  }

  __device__ bool holds(int64_t code) const { return is_among(entries.codes, size(), code); }
};

// Comes with a packed batch; checked before it is used as an address, and traps where it does not
// fit.
struct BatchIndex {
  const int32_t* codes;  // distinct, ascending
  const int32_t* offsets;
  const int32_t* visits;
  int64_t n_codes;
  int64_t n_entries;
  int64_t n_visits;
  int64_t vocabulary;

  __device__ int64_t size() const { return n_entries; }

  // The segment that holds an entry. All lanes search together: a thousand codes take two
  // steps of 32 lanes.
  __device__ int64_t segment_of(int64_t entry, const Lanes& lanes) const {
    int64_t low = 0;
    int64_t high = n_codes;
    while (high - low > 1) {
      const int64_t step = (high - low + lanes.count - 1) >> lanes.log2;
      const int64_t probe = low + (lanes.lane + 1) * step;
      const bool reached = probe < high && offsets[probe] <= entry;
      const int passed = __popc(lanes.vote(reached));
      low += passed * step;
      high = low + step < high ? low + step : high;
    }
    return low;
  }

  __device__ ChunkCursor open(int64_t begin, const Lanes& lanes) const {
    const int64_t segment = segment_of(begin, lanes);
    const int64_t segment_begin = offsets[segment];
    require(segment_begin >= 0 && segment_begin <= begin);
    return {segment, segment_begin < begin};
  }

  __device__ Entry load(ChunkCursor& cursor, int64_t first, int n, const Lanes& lanes) const {
    const unsigned ends =
        lanes.either(end_of_segment(cursor.segment + lanes.lane, first, n, lanes));
    const int64_t at = first + lanes.lane;
    Entry entry{0, kNoKey, 0, false, ends};
    if (lanes.lane < n) {
      const int64_t segment = cursor.segment + __popc(ends & lanes.earlier());
      require(segment < n_codes);
      entry.segment = static_cast<int32_t>(segment);
      entry.code = codes[segment];
      entry.visit = visits[at];
      require(entry.code >= 0 && entry.code < vocabulary);
      require(entry.visit >= 0 && entry.visit < n_visits);
      const bool same_code = lanes.lane > 0 ? !(ends >> (lanes.lane - 1) & 1) : cursor.continues;
      entry.repeats = same_code && visits[at - 1] == entry.visit;
    }
    cursor.segment += __popc(ends);
    cursor.continues = !(ends >> (n - 1) & 1);
    return entry;
  }

  // The bit of the entry that ends a segment, if it is one of the n from `first` on. Segments
  // follow each other, and none is empty.
  __device__ unsigned end_of_segment(int64_t segment, int64_t first, int n,
                                     const Lanes& lanes) const {
    const bool exists = segment < n_codes;
    const int64_t end = exists ? offsets[segment + 1] : n_entries;
    int64_t before = lanes.from((lanes.lane - 1) & (lanes.count - 1), end);
    if (lanes.lane == 0) before = first;
    require(!exists || (end > before && end <= n_entries));
    return exists && end <= first + n ? 1u << (end - 1 - first) : 0u;
  }

  __device__ bool holds(int64_t code) const { return is_among(codes, n_codes, code); }
};

// What an entry's visit is multiplied by; null pointers leave a factor out.
template <typename acc_t>
struct EntryWeights {
  acc_t constant;
  const int32_t* code_offsets;  // 1 / codes of the visit
  const acc_t* of_visits;
  const acc_t* of_entries;

  __device__ __forceinline__ acc_t of(int64_t entry, int32_t visit) const {
    acc_t weight = constant;
    if (code_offsets != nullptr) {
      weight = mean_scale(static_cast<acc_t>(code_offsets[visit + 1] - code_offsets[visit]));
    }
    if (of_visits != nullptr) weight = of_visits[visit];
    if (of_entries != nullptr) weight *= of_entries[entry];
    return weight;
  }
};

}  // namespace ehrseq::cuda
