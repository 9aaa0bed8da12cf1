// What a packed batch hands to the CPU's kernels, checked at every call: its codes by visit, and
// its transposed index.
#pragma once

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "common/tensors.h"
#include "visit_pool/arguments.h"
#include "visit_pool/segments.h"

namespace ehrseq {

struct PackedBatch {
  Tensor codes_tensor;
  Tensor offsets_tensor;
  const int32_t* codes;
  const int32_t* offsets;
  int64_t n_visits;

  int64_t visits_worth_a_thread(int64_t row_bytes) const {
    return ehrseq::visits_worth_a_thread(n_visits, n_visits + offsets[n_visits], row_bytes);
  }
};

// Where the codes of each visit begin, checked at every call: a wrong offset would lead out of
// bounds. The offsets of a batch begin at 0 and end at its number of codes.
inline void expect_rising(const int32_t* offsets, int64_t n_visits, int64_t n_codes,
                          const char* operation) {
  bool rising = offsets[0] == 0 && offsets[n_visits] == n_codes;
  for (int64_t visit = 0; visit < n_visits; ++visit) {
    rising &= offsets[visit] <= offsets[visit + 1];
  }
  if (rising) return;
  int64_t at = 0;
  if (offsets[0] == 0) {
    while (at < n_visits && offsets[at] <= offsets[at + 1]) ++at;
    if (at < n_visits) ++at;
  }
  throw std::invalid_argument(std::string(operation) +
                              ": code_offsets: expected to rise from 0 to the " +
                              std::to_string(n_codes) + " codes of the batch, got " +
                              std::to_string(offsets[at]) + " at position " + std::to_string(at));
}

// Codes are checked at every call, too: a wrong one would read outside the table.
inline PackedBatch packed_batch(const Tensor& codes, const Tensor& code_offsets, int64_t vocabulary,
                                const char* operation) {
  expect_on_cpu(operation, codes, code_offsets);
  pooling::expect_packed_codes(codes, code_offsets, operation);
  PackedBatch in{made_contiguous(codes), made_contiguous(code_offsets), nullptr, nullptr,
                 code_offsets.size(0) - 1};
  in.codes = static_cast<const int32_t*>(in.codes_tensor.data_ptr());
  in.offsets = static_cast<const int32_t*>(in.offsets_tensor.data_ptr());
  const int64_t n_codes = codes.size(0);
  expect_rising(in.offsets, in.n_visits, n_codes, operation);
  bool inside = true;
  for (int64_t i = 0; i < n_codes; ++i) inside &= uint32_t(in.codes[i]) < uint64_t(vocabulary);
  if (!inside) {
    int64_t found = 0;
    int64_t first = -1;
    for (int64_t i = 0; i < n_codes; ++i) {
      const bool outside = uint32_t(in.codes[i]) >= uint64_t(vocabulary);
      if (outside && found++ == 0) first = i;
    }
    pooling::refuse_codes_outside(found, vocabulary, in.codes[first],
                                  "[" + std::to_string(first) + "]");
  }
  return in;
}

struct PackedIndex {
  Tensor codes_tensor;
  Tensor offsets_tensor;
  Tensor visits_tensor;
  const int32_t* codes;
  const int32_t* offsets;
  const int32_t* visits;
  int64_t n_codes;
  int64_t n_entries;
};

// What is wrong with an index that is none of a batch, and where.
[[noreturn]] inline void refuse_index(const PackedIndex& in, int64_t n_visits, int64_t vocabulary,
                                      const char* operation) {
  const auto refuse_at = [&](const char* name, const std::string& expected, const int32_t* values,
                             int64_t at) {
    refuse(operation, name, expected,
           std::to_string(values[at]) + " at position " + std::to_string(at));
  };
  const std::string rising =
      "offsets that rise from 0 to the " + std::to_string(in.n_entries) + " entries of the index";
  if (in.offsets[0] != 0) refuse_at("index_offsets", rising, in.offsets, 0);
  for (int64_t i = 0; i < in.n_codes; ++i) {
    if (in.offsets[i] >= in.offsets[i + 1]) refuse_at("index_offsets", rising, in.offsets, i + 1);
    if (uint32_t(in.codes[i]) >= uint64_t(vocabulary) ||
        (i > 0 && in.codes[i - 1] >= in.codes[i])) {
      refuse_at("index_codes",
                "codes that rise within the vocabulary of " + std::to_string(vocabulary), in.codes,
                i);
    }
  }
  if (in.offsets[in.n_codes] != in.n_entries) {
    refuse_at("index_offsets", rising, in.offsets, in.n_codes);
  }
  int64_t at = 0;
  while (uint32_t(in.visits[at]) < uint64_t(n_visits)) ++at;
  refuse(operation, "index_visits", "visits of the batch, 0.." + std::to_string(n_visits - 1),
         std::to_string(in.visits[at]) + " at position " + std::to_string(at));
}

inline PackedIndex packed_index(const Tensor& index_codes, const Tensor& index_offsets,
                                const Tensor& index_visits, int64_t n_visits, int64_t vocabulary,
                                const char* operation) {
  expect_on_cpu(operation, index_codes, index_offsets, index_visits);
  pooling::expect_index(index_codes, index_offsets, index_visits, operation);
  PackedIndex in{made_contiguous(index_codes),
                 made_contiguous(index_offsets),
                 made_contiguous(index_visits),
                 nullptr,
                 nullptr,
                 nullptr,
                 index_codes.size(0),
                 index_visits.size(0)};
  in.codes = static_cast<const int32_t*>(in.codes_tensor.data_ptr());
  in.offsets = static_cast<const int32_t*>(in.offsets_tensor.data_ptr());
  in.visits = static_cast<const int32_t*>(in.visits_tensor.data_ptr());
  bool sound = in.offsets[0] == 0 && in.offsets[in.n_codes] == in.n_entries;
  for (int64_t i = 0; sound && i < in.n_codes; ++i) {
    sound = in.offsets[i] < in.offsets[i + 1] && uint32_t(in.codes[i]) < uint64_t(vocabulary) &&
            (i == 0 || in.codes[i - 1] < in.codes[i]);
  }
  if (sound) {
    for (int64_t i = 0; i < in.n_entries; ++i) {
      sound &= uint32_t(in.visits[i]) < uint64_t(n_visits);
    }
  }
  if (!sound) refuse_index(in, n_visits, vocabulary, operation);
  return in;
}

// The rows of a sparse gradient: the codes of the index, without padding_idx where that is one.
struct SparseRows {
  int64_t padding_segment;
  bool has_padding;
  int64_t count;

  SparseRows(const PackedIndex& index, int64_t padding_idx) {
    const int32_t* end = index.codes + index.n_codes;
    const int32_t* padding = std::lower_bound(index.codes, end, padding_idx);
    has_padding = padding != end && *padding == padding_idx;
    padding_segment = has_padding ? padding - index.codes : index.n_codes;
    count = index.n_codes - has_padding;
  }

  void write_ids(const PackedIndex& index, int64_t* ids) const {
    std::copy(index.codes + padding_segment + has_padding, index.codes + index.n_codes,
              std::copy(index.codes, index.codes + padding_segment, ids));
  }
  // -1 where a segment has none.
  int64_t row_of(int64_t segment) const {
    if (segment == padding_segment) return -1;
    return segment - (segment > padding_segment);
  }
};

}  // namespace ehrseq
