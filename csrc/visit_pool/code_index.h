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

// Entries of neighbouring visits, in the order of the batch, as one thread found them. Vectors may
// be longer than what they hold.
template <typename acc_t>
struct FoundEntries {
  int64_t first_visit = 0;  // what held_visits are counted from
  int64_t n_entries = 0;
  int64_t n_held = 0;                // visits that have entries
  std::vector<int32_t> rows;         // of the table: the codes
  std::vector<acc_t> weights;        // nothing where all are 1
  std::vector<int32_t> held_visits;  // ascending
  std::vector<int32_t> offsets;      // of their entries
  std::vector<acc_t> scales;         // of each of them, 1 / max(sum of weights, 1)

  // Calls body(entry, visit, weight) for every entry; the weight is what the gradient of its visit
  // is multiplied by.
  template <typename Body>
  void for_each_entry(bool scaled, bool weighted, const Body& body) const {
    for (int64_t held = 0; held < n_held; ++held) {
      const auto visit = static_cast<int32_t>(first_visit + held_visits[held]);
      const acc_t scale = scaled ? scales[held] : acc_t(1);
      for (int32_t i = offsets[held]; i < offsets[held + 1]; ++i) {
        body(i, visit, weighted ? scale * weights[i] : scale);
      }
    }
  }
};

// Stable counting sort by code: the visits of one code keep the order of the batch, however it was
// divided into parts. Codes equal to `left_out` have no entry. An entry's weight is `scaled` by its
// visit's, and a product with its code's where those are `weighted`.
template <typename acc_t>
WeightedIndex<acc_t> transpose(const std::vector<FoundEntries<acc_t>>& parts, int64_t vocabulary,
                               bool scaled, bool weighted, int64_t left_out) {
  int64_t n_entries = 0;
  for (const auto& part : parts) n_entries += part.n_entries;
  if (n_entries > INT32_MAX) {
    refuse("visit_pool_backward", "real codes of all visits", "at most 2^31-1",
           std::to_string(n_entries));
  }
  const auto n_parts = static_cast<int64_t>(parts.size());
  // how many entries each part has of each code, then the place of the next
  std::vector<std::vector<int32_t>> next(n_parts);
  parallel_for(0, n_parts, 1, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      next[i].assign(vocabulary, 0);
      for (int64_t entry = 0; entry < parts[i].n_entries; ++entry) ++next[i][parts[i].rows[entry]];
    }
  });
  WeightedIndex<acc_t> index;
  index.offsets.push_back(0);
  int32_t place = 0;
  for (int64_t code = 0; code < vocabulary; ++code) {
    const int32_t begin = place;
    for (auto& counts : next) {
      const int32_t count = counts[code];
      counts[code] = place;
      if (code != left_out) place += count;
    }
    if (place == begin) continue;
    index.codes.push_back(static_cast<int32_t>(code));
    index.offsets.push_back(place);
  }
  index.visits.resize(place);
  index.weights.resize(scaled || weighted ? place : 0);
  parallel_for(0, n_parts, 1, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const auto& part = parts[i];
      part.for_each_entry(scaled, weighted, [&](int32_t entry, int32_t visit, acc_t weight) {
        const int32_t code = part.rows[entry];
        if (code == left_out) return;
        const int32_t at = next[i][code]++;
        index.visits[at] = visit;
        if (scaled || weighted) index.weights[at] = weight;
      });
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
