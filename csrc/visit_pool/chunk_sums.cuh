// Backward, the first of two kernels: sums over the chunks of a code index. Segments inside one
// chunk are written to the gradient of the table; parts of segments that cross chunk boundaries go
// to partial sums, which segment_sums.cuh adds in a fixed order. So every row is written once, and
// has the same bits each time.
#pragma once

#include "visit_pool/entries.cuh"
#include "visit_pool/gradient_rows.cuh"

namespace ehrseq::cuda {

constexpr int kGradientThreads = 128;

// The sums of one chunk, from the continuation at its beginning to the head at its end.
template <typename Source, typename Index>
struct ChunkSum {
  using scalar_t = typename Source::scalar_t;
  using acc_t = typename Source::acc_t;
  static constexpr int kColumns = Source::kColumns;

  const GradientRows<scalar_t>& out;
  const Partials<acc_t>& partials;
  const RowShape& shape;
  int64_t chunk;
  int64_t column;
  bool is_writer;  // the one lane that writes what there is once per chunk
  bool continues;  // the segment began in an earlier chunk
  acc_t sums[kColumns] = {};
  acc_t score = 0;

  __device__ ChunkSum(const GradientRows<scalar_t>& out_, const Partials<acc_t>& partials_,
                      const RowShape& shape_, int64_t chunk_, int64_t column_, bool is_writer_,
                      bool continues_)
      : out(out_),
        partials(partials_),
        shape(shape_),
        chunk(chunk_),
        column(column_),
        is_writer(is_writer_),
        continues(continues_) {
    if (is_writer) {
      partials.head_rows[chunk] = Partials<acc_t>::kNoHead;
      partials.ends_here[chunk] = 0;
    }
  }

  // The segment's last entry has been added.
  __device__ __forceinline__ void close(int32_t code, int32_t segment) {
    if (continues) {
      keep_continuation();
      if (is_writer) partials.ends_here[chunk] = 1;
    } else {
      const int32_t row = out.row_of(code, segment);
      out.write(row, shape, column, sums);
      if (is_writer) {
        out.write_score(row, score);
        out.write_id(row, code);
      }
    }
    continues = false;
    score = 0;
#pragma unroll
    for (int i = 0; i < kColumns; ++i) sums[i] = 0;
  }

  // The chunk ends, and the segment does not.
  __device__ void leave_open(int32_t code, int32_t segment) {
    if (continues) return keep_continuation();
    if (column < shape.row_size) store_columns<kColumns>(partials.head(chunk, shape, column), sums);
    if (is_writer) {
      const int32_t row = out.row_of(code, segment);
      partials.scores[2 * chunk + 1] = score;
      partials.head_rows[chunk] = row;
      out.write_id(row, code);
    }
  }

  __device__ void keep_continuation() const {
    if (column < shape.row_size) {
      store_columns<kColumns>(partials.continuation(chunk, shape, column), sums);
    }
    if (is_writer) partials.scores[2 * chunk] = score;
  }
};

// As many entries as a group has lanes, in shared memory: each lane reads one, and all add them.
template <typename acc_t>
struct StagedEntries {
  acc_t* weights;
  acc_t* scores;
  int32_t* visits;
  int32_t* codes;
  int32_t* segments;

  static constexpr size_t kBytes = kGradientThreads * (2 * sizeof(acc_t) + 3 * sizeof(int32_t));

  __device__ StagedEntries(void* memory, const Lanes& lanes)
      : weights(static_cast<acc_t*>(memory) + lanes.group() * lanes.count),
        scores(weights + kGradientThreads),
        visits(reinterpret_cast<int32_t*>(static_cast<acc_t*>(memory) + 2 * kGradientThreads) +
               lanes.group() * lanes.count),
        codes(visits + kGradientThreads),
        segments(codes + kGradientThreads) {}

  __device__ void put(int lane, const Entry& entry, acc_t weight, acc_t score) const {
    weights[lane] = weight;
    scores[lane] = score;
    visits[lane] = entry.visit;
    codes[lane] = entry.code;
    segments[lane] = entry.segment;
  }
};

// Adds the n entries that are staged, with several rows in flight. Bit i of `ends`: entry i is the
// last of its segment; of `skipped`: it adds nothing.
template <typename Source, typename Sum>
__device__ __forceinline__ void add_entries(Sum& sum, const Source& source,
                                            const StagedEntries<typename Source::acc_t>& staged,
                                            unsigned ends, unsigned skipped, int n) {
  constexpr int kRows = Source::kRowsInFlight;
  const bool has_columns = sum.column < sum.shape.row_size;
#pragma unroll 1
  for (int first = 0; first < n; first += kRows) {
    typename Source::Loaded rows[kRows];
    const auto adds = [&](int i) { return has_columns && first + i < n && !(skipped >> i & 1); };
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      if (adds(i)) {
        rows[i] = source.load(sum.shape.offset(staged.visits[first + i]) + sum.column);
      }
    }
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      if (first + i >= n) break;
      const int32_t code = staged.codes[first + i];
      if (adds(i)) Source::add(sum.sums, rows[i], code, staged.weights[first + i]);
      sum.score += staged.scores[first + i];
      if (ends >> i & 1) sum.close(code, staged.segments[first + i]);
    }
    ends >>= kRows;
    skipped >>= kRows;
  }
}

template <typename Source, typename Index>
__device__ __forceinline__ void sum_chunk(const Source& source, const Index& index,
                                          const EntryWeights<typename Source::acc_t>& weights,
                                          const typename Source::acc_t* entry_scores,
                                          const GradientRows<typename Source::scalar_t>& out,
                                          const Partials<typename Source::acc_t>& partials,
                                          const StagedEntries<typename Source::acc_t>& staged,
                                          const RowShape& shape, int64_t chunk,
                                          const Lanes& lanes) {
  using acc_t = typename Source::acc_t;
  const int64_t size = index.size();
  const int64_t length = chunk_length(size);
  const int64_t begin = chunk * length;
  if (begin >= size) return;
  const int64_t end = begin + length < size ? begin + length : size;

  auto cursor = index.open(begin, lanes);
  ChunkSum<Source, Index> sum(out, partials, shape, chunk,
                              shape.first_column<Source::kColumns>(lanes.lane),
                              lanes.lane == 0 && blockIdx.y == 0, cursor.continues);
  for (int64_t first = begin; first < end; first += lanes.count) {
    const int n = end - first < lanes.count ? static_cast<int>(end - first) : lanes.count;
    const Entry entry = index.load(cursor, first, n, lanes);
    const bool is_one = lanes.lane < n;
    const acc_t weight = is_one ? weights.of(first + lanes.lane, entry.visit) : acc_t(0);
    const acc_t score =
        is_one && entry_scores != nullptr ? entry_scores[first + lanes.lane] : acc_t(0);
    staged.put(lanes.lane, entry, weight, score);
    lanes.sync();
    const unsigned skipped = Source::kSkipsRepeats ? lanes.vote(entry.repeats) : 0;
    add_entries(sum, source, staged, entry.ends, skipped, n);
    if (first + n == end && cursor.continues) {
      sum.leave_open(staged.codes[n - 1], staged.segments[n - 1]);
    }
    lanes.sync();  // before other entries are staged there
  }
}

// Zeros for the codes that no visit holds. Each lane searches for one code.
template <int kColumns, typename Index, typename scalar_t>
__device__ void zero_absent_rows(const Index& index, const GradientRows<scalar_t>& out,
                                 const RowShape& shape, int64_t vocabulary, int64_t unit,
                                 const Lanes& lanes) {
  const int64_t first = unit << lanes.log2;
  if (first >= vocabulary) return;
  const int64_t column = shape.first_column<kColumns>(lanes.lane);
  const int64_t mine = first + lanes.lane;
  const bool is_absent = mine < vocabulary && !index.holds(mine);
  if (is_absent && blockIdx.y == 0 && out.scores != nullptr) {
    out.scores[mine] = narrow<scalar_t>(0.0f);
  }
  for (unsigned absent = lanes.vote(is_absent); absent != 0; absent &= absent - 1) {
    const int64_t code = first + __ffs(static_cast<int>(absent)) - 1;
    if (column < shape.row_size) {
      store_zeros<scalar_t, kColumns>(out.rows + (shape.offset(code) + column));
    }
  }
}

// Sums of the entries of a code index, chunk by chunk, and zeros for absent codes.
//   grid    x: chunk_blocks, then blocks for absent codes (none where the gradient is sparse);
//           y: column tiles of lanes * kColumns columns
//   block   kGradientThreads, as groups of 8, 16 or 32 lanes: a group takes one chunk, or as many
//           codes of the vocabulary as it has lanes
//   shared  StagedEntries: one entry per thread (weight, score, visit, code, segment)
//   reads   the index, weights and scores of entries, gradients of visits (mode max: winners, too)
//   writes  rows of `out` (with their scores and ids) of the segments inside a chunk, `partials` of
//           the others
template <typename Source, typename Index>
__global__ void __launch_bounds__(kGradientThreads, 4)
    sum_chunks(Source source, Index index, EntryWeights<typename Source::acc_t> weights,
               const typename Source::acc_t* entry_scores,
               GradientRows<typename Source::scalar_t> out,
               Partials<typename Source::acc_t> partials, RowShape shape, int64_t vocabulary,
               unsigned chunk_blocks) {
  EHRSEQ_DYNAMIC_SHARED(memory);
  const Lanes lanes(shape.lanes_log2);
  const bool sums = blockIdx.x < chunk_blocks;
  const int64_t block = sums ? blockIdx.x : blockIdx.x - chunk_blocks;
  const int64_t unit = block * lanes.groups() + lanes.group();
  if (sums) {
    const StagedEntries<typename Source::acc_t> staged(memory, lanes);
    sum_chunk(source, index, weights, entry_scores, out, partials, staged, shape, unit, lanes);
  } else {
    zero_absent_rows<Source::kColumns>(index, out, shape, vocabulary, unit, lanes);
  }
}

}  // namespace ehrseq::cuda
