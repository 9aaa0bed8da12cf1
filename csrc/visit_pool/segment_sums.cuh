// Backward, the second of two kernels: adds the partial sums of the segments that cross chunk
// boundaries, in a fixed order.
#pragma once

#include "visit_pool/entries.cuh"
#include "visit_pool/gradient_rows.cuh"

namespace ehrseq::cuda {

constexpr int kFinishThreads = 1024;
// Chunks whose heads a block finishes.
constexpr int kHeadsPerBlock = 32;

// Adds the continuations in every `step`th chunk from `begin` to `end`.
template <typename acc_t, int kColumns>
__device__ __forceinline__ void add_continuations(const Partials<acc_t>& partials,
                                                  const RowShape& shape, int64_t column,
                                                  int64_t begin, int64_t end, int64_t step,
                                                  acc_t (&sums)[kColumns], acc_t& score) {
  constexpr int kRows = kColumns * sizeof(acc_t) > 16 ? 2 : 4;
  for (int64_t first = begin; first < end; first += kRows * step) {
    acc_t parts[kRows][kColumns];
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int64_t chunk = first + i * step;
      if (chunk < end && column < shape.row_size) {
        load_columns<kColumns>(partials.continuation(chunk, shape, column), parts[i]);
      }
    }
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int64_t chunk = first + i * step;
      if (chunk >= end) break;
#pragma unroll
      for (int c = 0; c < kColumns; ++c) sums[c] += parts[i][c];
      score += partials.scores[2 * chunk];
    }
  }
}

// The chunk after the one that holds the tail, among the kHeadsPerBlock chunks from `begin` on; -1
// where the segment goes on beyond them. By a group of lanes.
template <typename acc_t>
__device__ int64_t end_of_short_segment(const Partials<acc_t>& partials, int64_t begin,
                                        int64_t n_chunks, const Lanes& lanes) {
  for (int64_t first = begin; first < begin + kHeadsPerBlock; first += lanes.count) {
    const int64_t chunk = first + lanes.lane;
    const unsigned closes = lanes.vote(chunk < n_chunks && partials.ends_here[chunk] != 0);
    if (closes != 0) return first + __ffs(static_cast<int>(closes));
  }
  return -1;
}

// The same among all chunks, by the whole block.
template <typename acc_t>
__device__ int64_t end_of_long_segment(const Partials<acc_t>& partials, int64_t begin,
                                       int64_t n_chunks) {
  __shared__ int found;
  if (threadIdx.x == 0) found = INT32_MAX;
  __syncthreads();
  for (int64_t chunk = begin + threadIdx.x; chunk < n_chunks; chunk += kFinishThreads) {
    if (partials.ends_here[chunk] != 0) {
      atomicMin(&found, static_cast<int>(chunk) + 1);
      break;
    }
  }
  __syncthreads();
  require(found <= n_chunks);  // the last entry ends its segment
  return found;
}

template <typename scalar_t, int kColumns>
constexpr size_t finish_bytes() {
  return (kColumns + 1) * kFinishThreads * sizeof(accumulator_t<scalar_t>);
}

// The rows of segments that cross chunk boundaries: head plus continuations.
//   grid    x: kHeadsPerBlock chunks per block; y: column tiles of lanes * kColumns columns
//   block   kFinishThreads, as groups of 8, 16 or 32 lanes. A group adds the segment whose head is
//           in its chunk; a segment of more than kHeadsPerBlock chunks is added by all groups, in
//           pairs. Only one such segment can have its head in the chunks of a block
//   shared  finish_bytes: the sums of every thread, for that pairwise addition
//   reads   `partials`
//   writes  rows of `out`, with their scores
template <typename scalar_t, int kColumns>
__global__ void __launch_bounds__(kFinishThreads)
    finish_segments(EntryCount n_entries, Partials<accumulator_t<scalar_t>> partials,
                    GradientRows<scalar_t> out, RowShape shape) {
  using acc_t = accumulator_t<scalar_t>;
  EHRSEQ_DYNAMIC_SHARED(memory);
  auto* saved = reinterpret_cast<acc_t*>(memory);
  acc_t* saved_scores = saved + kColumns * kFinishThreads;
  __shared__ int long_head;
  const Lanes lanes(shape.lanes_log2);
  const int64_t n_chunks = chunks_of(n_entries.get());
  const int64_t chunk = static_cast<int64_t>(blockIdx.x) * kHeadsPerBlock + lanes.group();
  const int64_t column = shape.first_column<kColumns>(lanes.lane);
  const bool is_writer = lanes.lane == 0 && blockIdx.y == 0;
  if (threadIdx.x == 0) long_head = -1;
  __syncthreads();

  const bool has_head = lanes.group() < kHeadsPerBlock && chunk < n_chunks &&
                        partials.head_rows[chunk] != Partials<acc_t>::kNoHead;
  acc_t sums[kColumns] = {};
  acc_t score = 0;
  if (has_head) {
    const int64_t end = end_of_short_segment(partials, chunk + 1, n_chunks, lanes);
    if (end >= 0) {
      if (column < shape.row_size) {
        load_columns<kColumns>(partials.head(chunk, shape, column), sums);
      }
      score = partials.scores[2 * chunk + 1];
      add_continuations(partials, shape, column, chunk + 1, end, 1, sums, score);
      out.write(partials.head_rows[chunk], shape, column, sums);
      if (is_writer) out.write_score(partials.head_rows[chunk], score);
    } else if (lanes.lane == 0) {
      long_head = static_cast<int>(chunk);
    }
  }
  __syncthreads();
  if (long_head < 0) return;

  const int64_t end = end_of_long_segment(partials, static_cast<int64_t>(long_head) + 1, n_chunks);
#pragma unroll
  for (int i = 0; i < kColumns; ++i) sums[i] = 0;
  score = 0;
  add_continuations(partials, shape, column, static_cast<int64_t>(long_head) + 1 + lanes.group(),
                    end, lanes.groups(), sums, score);
  // Pairs of groups, then pairs of pairs: few additions in a row, and little rounding.
  for (int group = lanes.groups() / 2; group > 0; group /= 2) {
    if (lanes.group() >= group && lanes.group() < 2 * group) {
#pragma unroll
      for (int i = 0; i < kColumns; ++i) saved[i * kFinishThreads + threadIdx.x] = sums[i];
      saved_scores[threadIdx.x] = score;
    }
    __syncthreads();
    if (lanes.group() < group) {
      const int thread = static_cast<int>(threadIdx.x) + (group << lanes.log2);
#pragma unroll
      for (int i = 0; i < kColumns; ++i) sums[i] += saved[i * kFinishThreads + thread];
      score += saved_scores[thread];
    }
  }
  if (lanes.group() != 0) return;

  if (column < shape.row_size) {
    acc_t head[kColumns];
    load_columns<kColumns>(partials.head(long_head, shape, column), head);
#pragma unroll
    for (int i = 0; i < kColumns; ++i) sums[i] += head[i];
  }
  score += partials.scores[2 * static_cast<int64_t>(long_head) + 1];
  out.write(partials.head_rows[long_head], shape, column, sums);
  if (is_writer) out.write_score(partials.head_rows[long_head], score);
}

}  // namespace ehrseq::cuda
