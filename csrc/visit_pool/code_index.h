// The transpose of a batch: for every code, the visits that hold it. With it the gradient of the
// embedding table is a segmented sum that writes each row once, in a fixed order.
#pragma once

#include <cstdint>
#include <vector>

#include "common/dtypes.h"

namespace ehrseq {

// A code that occurs more often than this is summed in chunks, so that one code in every visit
// costs no more than many rare ones. Fixed, so that no sum depends on the number of threads.
constexpr int32_t kChunkEntries = 256;

template <typename acc_t>
struct WeightedIndex {
  std::vector<int32_t> codes;    // distinct codes, ascending
  std::vector<int32_t> offsets;  // [codes + 1] into the two below
  std::vector<int32_t> visits;
  std::vector<acc_t> weights;
};

// Stable counting sort by code: the visits of one code keep the order of the batch. A list of
// entries has for_each_code(body(code)) and for_each(body(code, visit, weight)); `weight` is what
// the visit's gradient is multiplied by, and is kept where `weighted`. Codes equal to `left_out`
// have no entry.
template <typename acc_t, typename List>
WeightedIndex<acc_t> transpose(const std::vector<List>& lists, int64_t vocabulary, bool weighted,
                               int64_t left_out) {
  std::vector<int32_t> place(vocabulary + 1, 0);
  for (const auto& list : lists) list.for_each_code([&](int32_t code) { ++place[code + 1]; });
  if (left_out >= 0) place[left_out + 1] = 0;
  WeightedIndex<acc_t> index;
  index.offsets.push_back(0);
  for (int64_t code = 0; code < vocabulary; ++code) {
    if (place[code + 1] != 0) {
      index.codes.push_back(static_cast<int32_t>(code));
      index.offsets.push_back(place[code] + place[code + 1]);
    }
    place[code + 1] += place[code];
  }
  index.visits.resize(index.offsets.back());
  index.weights.resize(weighted ? index.offsets.back() : 0);
  for (const auto& list : lists) {
    list.for_each([&](int32_t code, int32_t visit, acc_t weight) {
      if (code == left_out) return;
      const int32_t at = place[code]++;
      index.visits[at] = visit;
      if (weighted) index.weights[at] = weight;
    });
  }
  return index;
}

// At most kChunkEntries neighbouring entries of one segment.
struct Chunk {
  int32_t begin;
  int32_t end;
  int32_t segment;   // position of its code among the distinct codes
  int32_t n_chunks;  // of that segment
};

inline std::vector<Chunk> cut_into_chunks(const int32_t* offsets, int64_t n_segments) {
  std::vector<Chunk> chunks;
  chunks.reserve(n_segments + offsets[n_segments] / kChunkEntries);
  for (int64_t segment = 0; segment < n_segments; ++segment) {
    const int32_t end = offsets[segment + 1];
    const int32_t n_chunks = (end - offsets[segment] + kChunkEntries - 1) / kChunkEntries;
    for (int32_t begin = offsets[segment]; begin < end; begin += kChunkEntries) {
      const int32_t chunk_end = end - begin > kChunkEntries ? begin + kChunkEntries : end;
      chunks.push_back({begin, chunk_end, static_cast<int32_t>(segment), n_chunks});
    }
  }
  return chunks;
}

}  // namespace ehrseq
