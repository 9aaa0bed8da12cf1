// The transpose of a batch: for every code, the visits that hold it. With it the gradient of the
// embedding table is a segmented sum that writes each row once, in a fixed order.
#pragma once

#include <cstdint>
#include <vector>

#include "common/dtypes.h"

namespace ehrseq {

// A code that occurs more often than this is summed in pieces, so that one code in every visit
// costs no more than many rare ones. Fixed, so that no sum depends on the number of threads.
constexpr int32_t kPieceEntries = 256;

// One code in one visit. `weight` is what the visit's gradient is multiplied by.
template <typename acc_t>
struct Occurrence {
  int32_t code;
  int32_t visit;
  acc_t weight;
};

template <typename acc_t>
struct CodeIndex {
  std::vector<int32_t> codes;    // distinct codes, ascending
  std::vector<int32_t> offsets;  // [codes + 1] into the two below
  std::vector<int32_t> visits;
  std::vector<acc_t> weights;
};

// Stable counting sort by code: the visits of one code keep the order of the batch.
template <typename acc_t>
CodeIndex<acc_t> transpose(const std::vector<std::vector<Occurrence<acc_t>>>& tiles,
                           int64_t vocabulary) {
  std::vector<int32_t> place(vocabulary + 1, 0);
  for (const auto& tile : tiles) {
    for (const auto& occurrence : tile) ++place[occurrence.code + 1];
  }
  CodeIndex<acc_t> index;
  index.offsets.push_back(0);
  for (int64_t code = 0; code < vocabulary; ++code) {
    if (place[code + 1] != 0) {
      index.codes.push_back(static_cast<int32_t>(code));
      index.offsets.push_back(place[code] + place[code + 1]);
    }
    place[code + 1] += place[code];
  }
  index.visits.resize(index.offsets.back());
  index.weights.resize(index.offsets.back());
  for (const auto& tile : tiles) {
    for (const auto& occurrence : tile) {
      const int32_t at = place[occurrence.code]++;
      index.visits[at] = occurrence.visit;
      index.weights[at] = occurrence.weight;
    }
  }
  return index;
}

// A run of at most kPieceEntries entries of one code.
struct Piece {
  int32_t begin;
  int32_t end;
  int32_t segment;   // position of its code among the distinct codes
  int32_t n_pieces;  // of that code
};

inline std::vector<Piece> cut_into_pieces(const int32_t* offsets, int64_t n_segments) {
  std::vector<Piece> pieces;
  pieces.reserve(n_segments + offsets[n_segments] / kPieceEntries);
  for (int64_t segment = 0; segment < n_segments; ++segment) {
    const int32_t end = offsets[segment + 1];
    const int32_t n_pieces = (end - offsets[segment] + kPieceEntries - 1) / kPieceEntries;
    for (int32_t begin = offsets[segment]; begin < end; begin += kPieceEntries) {
      const int32_t piece_end = end - begin > kPieceEntries ? begin + kPieceEntries : end;
      pieces.push_back({begin, piece_end, static_cast<int32_t>(segment), n_pieces});
    }
  }
  return pieces;
}

}  // namespace ehrseq
