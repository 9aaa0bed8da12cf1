// The host's side of the kernels that padded and packed batches share: how wide to load, how to
// share rows and visits out over lanes, and the launches themselves.
#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>
#include <type_traits>
#include <vector>

#include "common/checks.h"
#include "common/cuda/launch.h"
#include "common/options.h"
#include "visit_pool/kernels.cuh"

namespace ehrseq::cuda {

// ---------------------------------------------------------------------------------------------
// Rows over lanes

// What 16-byte (or 8-byte) accesses of rows have to be aligned with: their pointers and their size.
class Alignment {
 public:
  template <typename scalar_t>
  Alignment& rows(const scalar_t* first, int64_t row_size) {
    bits_ |=
        reinterpret_cast<uintptr_t>(first) | static_cast<uintptr_t>(row_size) * sizeof(scalar_t);
    return *this;
  }
  // Moved in parts of 16 bytes whatever the rows' dtype.
  Alignment& winners(const int32_t* first) {
    if (reinterpret_cast<uintptr_t>(first) % 16 != 0) bits_ |= 1;
    return *this;
  }
  bool fits(uintptr_t bytes) const { return bits_ % bytes == 0; }

 private:
  uintptr_t bits_ = 0;
};

// Calls body(std::integral_constant<int, columns that a lane loads at once>{}).
template <typename scalar_t, typename Body>
void dispatch_columns(const Alignment& alignment, const Body& body) {
  constexpr int kSize = sizeof(scalar_t);
  if (alignment.fits(16)) return body(std::integral_constant<int, 16 / kSize>{});
  if constexpr (kSize < 8) {
    if (alignment.fits(8)) return body(std::integral_constant<int, 8 / kSize>{});
  }
  body(std::integral_constant<int, 1>{});
}

struct RowLaunch {
  RowShape shape;
  int lanes;
  unsigned tiles;  // the second dimension of the grid

  RowLaunch(int64_t row_size, int columns) : shape{static_cast<int32_t>(row_size), 3} {
    const int64_t packs = (row_size + columns - 1) / columns;
    while (shape.lanes_log2 < 5 && (int64_t{1} << shape.lanes_log2) < packs) ++shape.lanes_log2;
    lanes = 1 << shape.lanes_log2;
    const int64_t wanted = std::max<int64_t>((packs + lanes - 1) / lanes, 1);
    if (wanted > 65535) {
      refuse("visit_pool", "row size", "at most " + std::to_string(65535 * lanes * columns),
             std::to_string(row_size));
    }
    tiles = static_cast<unsigned>(wanted);
  }
};

// ---------------------------------------------------------------------------------------------
// Visits over groups of lanes

// A grid strides over what goes beyond it.
constexpr int64_t kMostBlocks = 1 << 20;
// Enough groups of lanes to fill a GPU: below it long visits are divided among several.
constexpr int64_t kManyGroups = 8192;

// Parts that a visit of that many codes is cut into, as a power of two; from the shape alone, so
// that sums do not depend on the GPU's size.
inline int parts_log2_for(int64_t n_visits, int64_t codes_per_visit, int64_t codes_per_part,
                          int64_t groups_per_block, int64_t tiles) {
  int log2 = 0;
  while ((int64_t{2} << log2) <= groups_per_block &&
         (codes_per_part << (log2 + 1)) <= codes_per_visit &&
         ((n_visits * tiles) << log2) < kManyGroups) {
    ++log2;
  }
  return log2;
}

inline dim3 grid_over_visits(int64_t n_visits, int64_t visits_per_block, unsigned tiles) {
  const int64_t blocks = (n_visits + visits_per_block - 1) / visits_per_block;
  return dim3(static_cast<unsigned>(std::min(blocks, kMostBlocks)), tiles);
}

// Pools the visits of a source. `codes_per_visit` says how long they are, roughly.
template <typename Pooled, typename Source>
void launch_pool(const Source& source, int64_t n_visits, int64_t codes_per_visit, int64_t row_size,
                 const typename Pooled::scalar_t* table, typename Pooled::scalar_t* out,
                 int32_t* arg_max, cudaStream_t stream) {
  const RowLaunch rows(row_size, Pooled::kColumns);
  const int64_t groups = kGatherThreads / rows.lanes;
  const int parts_log2 =
      parts_log2_for(n_visits, codes_per_visit, Pooled::kRowsInFlight, groups, rows.tiles);
  launch(pool_visits<Pooled, Source>, grid_over_visits(n_visits, groups >> parts_log2, rows.tiles),
         kGatherThreads, GatherMemory<Pooled>::bytes(parts_log2), stream, source, n_visits,
         parts_log2, rows.shape, table, out, arg_max);
}

struct PooledRows {
  Tensor pooled;
  Tensor arg_max;  // empty but in mode max

  PooledRows(const Tensor& like, const std::vector<int64_t>& shape, int64_t mode)
      : pooled(empty(like, shape, like.scalar_type())),
        arg_max(empty(like, mode == kMax ? shape : std::vector<int64_t>{0}, ScalarType::Int)) {}
};

// Modes mean, sum and max.
template <typename scalar_t, typename Source>
void pool_in_mode(int64_t mode, const Source& source, int64_t n_visits, int64_t codes_per_visit,
                  const Tensor& table, const PooledRows& out, cudaStream_t stream) {
  const int64_t row_size = table.size(table.dim() - 1);
  const auto* rows = data_of<scalar_t>(table);
  auto* pooled = mutable_data_of<scalar_t>(out.pooled);
  auto* arg_max = mode == kMax ? mutable_data_of<int32_t>(out.arg_max) : nullptr;
  const auto alignment = Alignment().rows(rows, row_size).rows(pooled, row_size).winners(arg_max);
  dispatch_columns<scalar_t>(alignment, [&](auto columns) {
    if (mode == kMax) {
      launch_pool<Maximum<scalar_t, columns()>>(source, n_visits, codes_per_visit, row_size, rows,
                                                pooled, arg_max, stream);
    } else {
      launch_pool<WeightedSum<scalar_t, columns()>>(source, n_visits, codes_per_visit, row_size,
                                                    rows, pooled, arg_max, stream);
    }
  });
}

// ---------------------------------------------------------------------------------------------
// Scratch memory

// Several arrays from one allocation. They live as long as this does, and for kernels that were
// launched before: the caching allocator reuses memory in the order of the stream.
class Scratch {
 public:
  // Where an array of n begins, once allocate() has been called.
  template <typename T>
  int64_t reserve(int64_t n) {
    const int64_t at = bytes_;
    bytes_ += (n * static_cast<int64_t>(sizeof(T)) + 255) / 256 * 256;
    return at;
  }
  void allocate(const Tensor& like) { memory_ = empty(like, {bytes_}, ScalarType::Byte); }
  template <typename T>
  T* at(int64_t offset) const {
    return reinterpret_cast<T*>(mutable_data_of<unsigned char>(*memory_) + offset);
  }

 private:
  int64_t bytes_ = 0;
  std::optional<Tensor> memory_;
};

// ---------------------------------------------------------------------------------------------
// Gradients

// Two launches: sums of chunks (and zeros for absent codes), then the segments that cross chunk
// boundaries. The grid is sized for `most_entries`: how many there are may be known to the device
// alone.
template <typename Source, typename Index>
void launch_gradients(const Source& source, const Index& index, const EntryCount& n_entries,
                      int64_t most_entries, const EntryWeights<typename Source::acc_t>& weights,
                      const typename Source::acc_t* entry_scores,
                      const GradientRows<typename Source::scalar_t>& out, int64_t vocabulary,
                      int64_t row_size, const Tensor& like, cudaStream_t stream) {
  using scalar_t = typename Source::scalar_t;
  using acc_t = typename Source::acc_t;
  constexpr int kColumns = Source::kColumns;
  const RowLaunch rows(row_size, kColumns);
  const int64_t groups = kGradientThreads / rows.lanes;
  // fewer entries can be cut into more chunks, as these are shorter then, but never into more than
  // kMostChunks
  const int64_t chunks =
      std::min((most_entries + kShortestChunk - 1) / kShortestChunk, kMostChunks);

  Scratch scratch;
  const auto partial_rows = scratch.reserve<acc_t>(2 * chunks * row_size);
  const auto partial_scores = scratch.reserve<acc_t>(2 * chunks);
  const auto head_rows = scratch.reserve<int32_t>(chunks);
  const auto ends_here = scratch.reserve<int32_t>(chunks);
  scratch.allocate(like);
  const Partials<acc_t> partials{scratch.at<acc_t>(partial_rows), scratch.at<acc_t>(partial_scores),
                                 scratch.at<int32_t>(head_rows), scratch.at<int32_t>(ends_here)};

  const unsigned chunk_blocks = blocks_for(chunks, groups);
  const int64_t zero_units = out.sparse_ids == nullptr ? blocks_for(vocabulary, rows.lanes) : 0;
  const unsigned zero_blocks = blocks_for(zero_units, groups);
  launch(sum_chunks<Source, Index>, dim3(chunk_blocks + zero_blocks, rows.tiles), kGradientThreads,
         StagedEntries<acc_t>::kBytes, stream, source, index, weights, entry_scores, out, partials,
         rows.shape, vocabulary, chunk_blocks);
  launch(finish_segments<scalar_t, kColumns>, dim3(blocks_for(chunks, kHeadsPerBlock), rows.tiles),
         kFinishThreads, finish_bytes<scalar_t, kColumns>(), stream, n_entries, partials, out,
         rows.shape);
}

template <typename scalar_t, typename Index>
void gradients_in_mode(int64_t mode, const scalar_t* grad, const int32_t* arg_max,
                       const Index& index, const EntryCount& n_entries, int64_t most_entries,
                       const EntryWeights<accumulator_t<scalar_t>>& weights,
                       const GradientRows<scalar_t>& out, int64_t vocabulary, int64_t row_size,
                       const Tensor& like, cudaStream_t stream) {
  const auto alignment = Alignment().rows(grad, row_size).rows(out.rows, row_size).winners(arg_max);
  dispatch_columns<scalar_t>(alignment, [&](auto columns) {
    const auto launch_for = [&](const auto& source) {
      launch_gradients(source, index, n_entries, most_entries, weights, nullptr, out, vocabulary,
                       row_size, like, stream);
    };
    if (mode == kMax) {
      launch_for(WonGradients<scalar_t, columns()>{grad, arg_max});
    } else {
      launch_for(VisitGradients<scalar_t, columns()>{grad});
    }
  });
}

// Waits for the stream. Only for the number of rows of a sparse gradient, which is a tensor's size.
inline Tensor on_host(const Tensor& tensor) {
  return torch::stable::to(tensor, torch::stable::Device(torch::headeronly::DeviceType::CPU));
}

}  // namespace ehrseq::cuda
