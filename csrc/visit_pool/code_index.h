// The transpose of a batch: for every code, the visits that hold it. With it the gradient of the
// embedding table is a segmented sum that writes each row once, in a fixed order.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "common/checks.h"
#include "common/dtypes.h"
#include "common/parallel.h"

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

// Entries of neighbouring visits, in the order of the batch, as one thread found them. `next` has
// an element for each code: how many entries it has here.
template <typename acc_t>
struct FoundEntries {
  std::vector<int32_t> codes;
  std::vector<int32_t> visits;
  std::vector<acc_t> weights;  // what the visit's gradient is multiplied by; empty where all are 1
  std::vector<int32_t> next;
};

// Stable counting sort by code: the visits of one code keep the order of the batch, however it was
// divided. Codes equal to `left_out` have no entry. `found` is used up.
template <typename acc_t>
WeightedIndex<acc_t> transpose(std::vector<FoundEntries<acc_t>>& found, int64_t vocabulary,
                               bool weighted, int64_t left_out) {
  size_t n_entries = 0;
  for (const auto& part : found) n_entries += part.codes.size();
  if (n_entries > INT32_MAX) {
    refuse("visit_pool_backward", "real codes of all visits", "at most 2^31-1",
           std::to_string(n_entries));
  }
  WeightedIndex<acc_t> index;
  index.offsets.push_back(0);
  int32_t place = 0;
  for (int64_t code = 0; code < vocabulary; ++code) {
    const int32_t begin = place;
    for (auto& part : found) {
      const int32_t count = part.next[code];
      part.next[code] = place;
      if (code != left_out) place += count;
    }
    if (place == begin) continue;
    index.codes.push_back(static_cast<int32_t>(code));
    index.offsets.push_back(place);
  }
  index.visits.resize(place);
  index.weights.resize(weighted ? place : 0);
  const auto n_parts = static_cast<int64_t>(found.size());
  parallel_for(0, n_parts, 1, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      auto& part = found[i];
      for (size_t entry = 0; entry < part.codes.size(); ++entry) {
        const int32_t code = part.codes[entry];
        if (code == left_out) continue;
        const int32_t at = part.next[code]++;
        index.visits[at] = part.visits[entry];
        if (weighted) index.weights[at] = part.weights[entry];
      }
    }
  });
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
