// Tensors that say where patients' visits are, as a GPU's kernels read them (layouts.cuh).
#pragma once

#include <cstdint>

#include "common/cuda/launch.h"
#include "common/survival/layouts.cuh"
#include "common/survival/outcomes_cuda.h"

namespace ehrseq::survival::cuda {

inline PaddedLayout padded_layout(const OptionalTensor& mask) {
  if (!mask.has_value()) return {};
  return {numbers_of(*mask, mask->stride(1)), mask->stride(0)};
}

// The row numbers of a packed batch, as tensors that live while a kernel is launched.
struct RowTensors {
  Tensor starts;
  Tensor ranks;

  RowTensors(const Tensor& row_starts, const Tensor& unsorted_indices)
      : starts(made_contiguous(row_starts)), ranks(made_contiguous(unsorted_indices)) {}

  int64_t slots() const { return starts.numel() - 1; }
  int64_t patients() const { return ranks.numel(); }
  PackedLayout layout(int64_t n_visits) const {
    return {data_of<int64_t>(starts), data_of<int64_t>(ranks), n_visits, patients()};
  }
};

// The weights have been checked, and are contiguous.
template <typename Layout>
WeightedLayout<Layout> weighted(const Layout& layout, const Tensor& weights) {
  return {layout, weights.const_data_ptr()};
}

}  // namespace ehrseq::survival::cuda
