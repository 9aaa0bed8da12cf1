// What a packed batch hands to the GPU's kernels: its codes by visit, and its transposed index.
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/cuda/launch.h"
#include "visit_pool/arguments.h"
#include "visit_pool/cuda_launch.h"

namespace ehrseq::cuda {

struct PackedBatch {
  Tensor codes_tensor;
  Tensor offsets_tensor;
  PackedCodes codes;
  int64_t n_visits;

  PackedBatch(const Tensor& codes_, const Tensor& offsets_, int64_t vocabulary,
              const char* operation)
      : codes_tensor(made_contiguous(codes_)),
        offsets_tensor(made_contiguous(offsets_)),
        n_visits(offsets_.numel() - 1) {
    pooling::expect_packed_codes(codes_, offsets_, operation);
    codes = {data_of<int32_t>(codes_tensor), data_of<int32_t>(offsets_tensor), codes_tensor.numel(),
             vocabulary};
  }

  int64_t codes_per_visit() const { return codes.n_codes / std::max<int64_t>(n_visits, 1); }
};

struct PackedIndex {
  Tensor codes_tensor;
  Tensor offsets_tensor;
  Tensor visits_tensor;
  BatchIndex view;

  PackedIndex(const Tensor& codes_, const Tensor& offsets_, const Tensor& visits_, int64_t n_visits,
              int64_t vocabulary, const char* operation)
      : codes_tensor(made_contiguous(codes_)),
        offsets_tensor(made_contiguous(offsets_)),
        visits_tensor(made_contiguous(visits_)) {
    pooling::expect_index(codes_, offsets_, visits_, operation);
    view = {data_of<int32_t>(codes_tensor),
            data_of<int32_t>(offsets_tensor),
            data_of<int32_t>(visits_tensor),
            codes_tensor.numel(),
            visits_tensor.numel(),
            n_visits,
            vocabulary};
  }

  EntryCount count() const { return {nullptr, view.n_entries}; }
};

// Whether the code that gets no gradient, and so no row, is in the index: its size depends on it,
// and the host has to wait for the answer. Without padding_idx it waits for nothing.
inline bool is_in_index(int64_t padding_idx, const Tensor& index_codes) {
  if (padding_idx < 0) return false;
  const auto codes = on_host(index_codes);
  const auto* first = data_of<int32_t>(codes);
  return std::binary_search(first, first + codes.numel(), padding_idx);
}

}  // namespace ehrseq::cuda
