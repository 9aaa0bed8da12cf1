// Backward: the gradient of the embedding table from a code index.
//
// The entries of the index (one code in one visit, sorted by code) are cut into runs of equal
// length, whatever their codes, so that a code in every visit costs no more than many rare ones. A
// group of lanes sums a run and writes the rows of those codes that lie inside it; what reaches
// over its ends goes to partial sums, which a second kernel adds in a fixed order. Rows of codes
// that no visit holds are written as zeros by blocks of their own. So every row is written once,
// and to the same bits on every run.
#pragma once

#include "visit_pool/index.cuh"
#include "visit_pool/rows.cuh"

namespace ehrseq::cuda {

constexpr int kGradientThreads = 128;
constexpr int kFinishThreads = 1024;
constexpr int64_t kShortestRun = 16;
constexpr int64_t kMostRuns = 4096;
// Runs whose tails a block of the second kernel finishes.
constexpr int kTailsPerBlock = 32;

// The length of a run depends on the number of entries alone.
__host__ __device__ constexpr int64_t run_length(int64_t n_entries) {
  int64_t length = kShortestRun;
  while (length * kMostRuns < n_entries) length *= 2;
  return length;
}

__host__ __device__ constexpr int64_t runs_of(int64_t n_entries) {
  const int64_t length = run_length(n_entries);
  return (n_entries + length - 1) / length;
}

// How many entries an index has: known at launch or, where it was built on the device, only there.
struct EntryCount {
  const int32_t* on_device;
  int64_t known;

  __device__ int64_t get() const { return on_device != nullptr ? *on_device : known; }
};

// ---------------------------------------------------------------------------------------------
// Entries, one for each lane of a group

struct Entry {
  int32_t visit;
  int32_t code;
  int32_t segment;  // place of the code among the distinct ones, where that is known
  bool repeats;     // the entry before is the same code of the same visit
  unsigned ends;    // bit i: entry i is the last of its code
};

struct RunCursor {
  int64_t segment;
  bool continues;  // the next entry has the code of the one before it
};

// Sorted on the device (index.cuh); codes stand beside the visits.
template <typename acc_t>
struct SortedIndex {
  Entries<acc_t> entries;
  const int32_t* count;

  __device__ int64_t size() const { return *count; }

  __device__ RunCursor open(int64_t begin, const Lanes&) const {
    return {0, begin > 0 && entries.codes[begin - 1] == entries.codes[begin]};
  }

  // The n entries from `first` on.
  __device__ Entry load(RunCursor& cursor, int64_t first, int n, const Lanes& lanes) const {
    const int64_t at = first + lanes.lane;
    const bool is_one = lanes.lane < n;
    Entry entry{0, kNoKey, 0, false, 0};
    bool is_last = false;
    if (is_one) {
      entry.visit = entries.visits[at];
      entry.code = entries.codes[at];
      is_last = at + 1 == size() || entries.codes[at + 1] != entry.code;
      entry.repeats =
          at > 0 && entries.codes[at - 1] == entry.code && entries.visits[at - 1] == entry.visit;
    }
    entry.ends = lanes.vote(is_last);
    cursor.continues = !(entry.ends >> (n - 1) & 1);
    return entry;
  }

  __device__ bool holds(int64_t code) const {
    int64_t low = 0;
    int64_t high = size();
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (entries.codes[middle] < code) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    return low < size() && entries.codes[low] == code;
  }
};

// Brought along by a batch, and not to be trusted with an address: what does not fit traps.
struct BatchIndex {
  const int32_t* codes;  // distinct, ascending
  const int32_t* offsets;
  const int32_t* visits;
  int64_t n_codes;
  int64_t n_entries;
  int64_t n_visits;
  int64_t vocabulary;

  __device__ int64_t size() const { return n_entries; }

  // The segment that holds an entry. All lanes look at once, so that a thousand codes take two
  // steps of 32 lanes.
  __device__ int64_t segment_of(int64_t entry, const Lanes& lanes) const {
    int64_t low = 0;
    int64_t high = n_codes;
    while (high - low > 1) {
      const int64_t step = (high - low + lanes.count - 1) >> lanes.log2;
      const int64_t probe = low + (lanes.lane + 1) * step;
      const bool reached = probe < high && offsets[probe] <= entry;
      const int passed = __popc(lanes.vote(reached));
      low += passed * step;
      high = low + step < high ? low + step : high;
    }
    return low;
  }

  __device__ RunCursor open(int64_t begin, const Lanes& lanes) const {
    const int64_t segment = segment_of(begin, lanes);
    const int64_t segment_begin = offsets[segment];
    require(segment_begin >= 0 && segment_begin <= begin);
    return {segment, segment_begin < begin};
  }

  __device__ Entry load(RunCursor& cursor, int64_t first, int n, const Lanes& lanes) const {
    const unsigned ends =
        lanes.either(end_of_segment(cursor.segment + lanes.lane, first, n, lanes));
    const int64_t at = first + lanes.lane;
    Entry entry{0, kNoKey, 0, false, ends};
    if (lanes.lane < n) {
      const int64_t segment = cursor.segment + __popc(ends & lanes.earlier());
      require(segment < n_codes);
      entry.segment = static_cast<int32_t>(segment);
      entry.code = codes[segment];
      entry.visit = visits[at];
      require(entry.code >= 0 && entry.code < vocabulary);
      require(entry.visit >= 0 && entry.visit < n_visits);
      const bool same_code = lanes.lane > 0 ? !(ends >> (lanes.lane - 1) & 1) : cursor.continues;
      entry.repeats = same_code && visits[at - 1] == entry.visit;
    }
    cursor.segment += __popc(ends);
    cursor.continues = !(ends >> (n - 1) & 1);
    return entry;
  }

  // The bit of the entry that ends a segment, if it is one of the n from `first` on. Segments
  // follow each other, and none is empty.
  __device__ unsigned end_of_segment(int64_t segment, int64_t first, int n,
                                     const Lanes& lanes) const {
    const bool exists = segment < n_codes;
    const int64_t end = exists ? offsets[segment + 1] : n_entries;
    int64_t before = lanes.from((lanes.lane - 1) & (lanes.count - 1), end);
    if (lanes.lane == 0) before = first;
    require(!exists || (end > before && end <= n_entries));
    return exists && end <= first + n ? 1u << (end - 1 - first) : 0u;
  }

  __device__ bool holds(int64_t code) const {
    int64_t low = 0;
    int64_t high = n_codes;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (codes[middle] < code) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    return low < n_codes && codes[low] == code;
  }
};

// What an entry's visit is multiplied by; null pointers leave a factor out.
template <typename acc_t>
struct EntryWeights {
  acc_t constant;
  const int32_t* code_offsets;  // 1 / codes of the visit
  const acc_t* of_visits;
  const acc_t* of_entries;

  __device__ __forceinline__ acc_t of(int64_t entry, int32_t visit) const {
    acc_t weight = constant;
    if (code_offsets != nullptr) {
      weight = mean_scale(static_cast<acc_t>(code_offsets[visit + 1] - code_offsets[visit]));
    }
    if (of_visits != nullptr) weight = of_visits[visit];
    if (of_entries != nullptr) weight *= of_entries[entry];
    return weight;
  }
};

// ---------------------------------------------------------------------------------------------
// What an entry adds to its code's row

// Modes mean and sum, and attention.
template <typename scalar_t_, int kColumns_>
struct VisitGradients {
  using scalar_t = scalar_t_;
  using acc_t = accumulator_t<scalar_t>;
  using Row = Pack<scalar_t, kColumns_>;
  static constexpr int kColumns = kColumns_;
  static constexpr int kRowsInFlight = 8;
  static constexpr bool kSkipsRepeats = false;

  const scalar_t* grad;
  const int32_t* arg_max;

  struct Loaded {
    Bits<Row> grad;
  };

  __device__ __forceinline__ Loaded load(int64_t at) const { return {load_bits<Row>(grad + at)}; }

  __device__ static __forceinline__ void add(acc_t (&sums)[kColumns], const Loaded& row,
                                             int32_t /*code*/, acc_t weight) {
    acc_t columns[kColumns];
    widen_bits<Row, scalar_t>(row.grad, columns);
#pragma unroll
    for (int i = 0; i < kColumns; ++i) sums[i] += weight * columns[i];
  }
};

// Mode max: the columns that the code won. A code that a visit holds twice wins once.
template <typename scalar_t_, int kColumns_>
struct WonGradients {
  using scalar_t = scalar_t_;
  using acc_t = accumulator_t<scalar_t>;
  using Row = Pack<scalar_t, kColumns_>;
  static constexpr int kColumns = kColumns_;
  static constexpr int kRowsInFlight = 4;
  static constexpr bool kSkipsRepeats = true;

  const scalar_t* grad;
  const int32_t* arg_max;

  struct Loaded {
    Bits<Row> grad;
    int32_t winners[kColumns];
  };

  __device__ __forceinline__ Loaded load(int64_t at) const {
    Loaded row;
    row.grad = load_bits<Row>(grad + at);
    load_columns<kColumns>(arg_max + at, row.winners);
    return row;
  }

  __device__ static __forceinline__ void add(acc_t (&sums)[kColumns], const Loaded& row,
                                             int32_t code, acc_t /*weight*/) {
    acc_t columns[kColumns];
    widen_bits<Row, scalar_t>(row.grad, columns);
#pragma unroll
    for (int i = 0; i < kColumns; ++i) sums[i] += row.winners[i] == code ? columns[i] : acc_t(0);
  }
};

// ---------------------------------------------------------------------------------------------
// Where sums go

// The rows of the gradient: one for each code of the vocabulary or, sparse, one for each code that
// occurs. With attention each code also has a score, whose gradient is a sum over the same entries.
template <typename scalar_t>
struct GradientRows {
  using acc_t = accumulator_t<scalar_t>;

  scalar_t* rows;
  int64_t* sparse_ids;       // null where dense
  int64_t padding_code;      // gets no gradient; -1 where there is none
  bool padding_is_in_index;  // where sparse: then it has a segment, and no row
  scalar_t* scores;          // null without attention

  __device__ bool is_sparse() const { return sparse_ids != nullptr; }

  // -1 where the code has none.
  __device__ int32_t row_of(int32_t code, int32_t segment) const {
    if (!is_sparse()) return code;
    if (code == padding_code) return -1;
    return segment - (padding_is_in_index && code > padding_code ? 1 : 0);
  }

  template <int kColumns>
  __device__ __forceinline__ void write(int32_t row, const RowShape& shape, int64_t column,
                                        const acc_t (&sums)[kColumns]) const {
    if (row < 0 || column >= shape.row_size) return;
    scalar_t* to = rows + (shape.offset(row) + column);
    if (!is_sparse() && row == padding_code) {
      store_zeros<scalar_t, kColumns>(to);
    } else {
      store_row<scalar_t, kColumns>(to, sums, acc_t(1));
    }
  }

  // By one lane of the first column tile. Attention is never sparse, so that rows are codes.
  __device__ void write_score(int32_t row, acc_t score) const {
    if (scores != nullptr) scores[row] = narrow<scalar_t>(score);
  }
  __device__ void write_id(int32_t row, int32_t code) const {
    if (is_sparse() && row >= 0) sparse_ids[row] = code;
  }
};

// Sums of codes that reach over the ends of a run: the head, of a code that began in an earlier
// run, and the tail, of one that begins here and goes on in the next.
template <typename acc_t>
struct Partials {
  acc_t* rows;           // [runs, 2, row_size]
  acc_t* scores;         // [runs, 2]
  int32_t* tail_rows;    // the gradient row of the tail, kNoTail where there is none
  int32_t* head_closes;  // whether the head's code ends in this run

  static constexpr int32_t kNoTail = -1;

  __device__ acc_t* head(int64_t run, const RowShape& shape, int64_t column) const {
    return rows + (shape.offset(2 * run) + column);
  }
  __device__ acc_t* tail(int64_t run, const RowShape& shape, int64_t column) const {
    return rows + (shape.offset(2 * run + 1) + column);
  }
};

// ---------------------------------------------------------------------------------------------
// The first kernel

// The sums of one run, from the code that reaches into it to the one that reaches out.
template <typename Source, typename Index>
struct RunSum {
  using scalar_t = typename Source::scalar_t;
  using acc_t = typename Source::acc_t;
  static constexpr int kColumns = Source::kColumns;

  const GradientRows<scalar_t>& out;
  const Partials<acc_t>& partials;
  const RowShape& shape;
  int64_t run;
  int64_t column;
  bool is_scribe;  // the one lane that writes what a run has one of
  bool continues;  // the code began in an earlier run
  acc_t sums[kColumns] = {};
  acc_t score = 0;

  __device__ RunSum(const GradientRows<scalar_t>& out_, const Partials<acc_t>& partials_,
                    const RowShape& shape_, int64_t run_, int64_t column_, bool is_scribe_,
                    bool continues_)
      : out(out_),
        partials(partials_),
        shape(shape_),
        run(run_),
        column(column_),
        is_scribe(is_scribe_),
        continues(continues_) {
    if (is_scribe) {
      partials.tail_rows[run] = Partials<acc_t>::kNoTail;
      partials.head_closes[run] = 0;
    }
  }

  // The code's last entry has been added.
  __device__ __forceinline__ void close(int32_t code, int32_t segment) {
    if (continues) {
      keep_head();
      if (is_scribe) partials.head_closes[run] = 1;
    } else {
      const int32_t row = out.row_of(code, segment);
      out.write(row, shape, column, sums);
      if (is_scribe) {
        out.write_score(row, score);
        out.write_id(row, code);
      }
    }
    continues = false;
    score = 0;
#pragma unroll
    for (int i = 0; i < kColumns; ++i) sums[i] = 0;
  }

  // The run is over, and the code is not.
  __device__ void leave_open(int32_t code, int32_t segment) {
    if (continues) return keep_head();
    if (column < shape.row_size) store_columns<kColumns>(partials.tail(run, shape, column), sums);
    if (is_scribe) {
      const int32_t row = out.row_of(code, segment);
      partials.scores[2 * run + 1] = score;
      partials.tail_rows[run] = row;
      out.write_id(row, code);
    }
  }

  __device__ void keep_head() const {
    if (column < shape.row_size) store_columns<kColumns>(partials.head(run, shape, column), sums);
    if (is_scribe) partials.scores[2 * run] = score;
  }
};

// As many entries as a group has lanes, in shared memory: each lane looks one up, all add them.
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

// Adds the n entries that are staged, with several rows in flight. Bit i of `ends`: the code of
// entry i ends there; of `skipped`: it adds nothing.
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
__device__ __forceinline__ void sum_run(const Source& source, const Index& index,
                                        const EntryWeights<typename Source::acc_t>& weights,
                                        const typename Source::acc_t* entry_scores,
                                        const GradientRows<typename Source::scalar_t>& out,
                                        const Partials<typename Source::acc_t>& partials,
                                        const StagedEntries<typename Source::acc_t>& staged,
                                        const RowShape& shape, int64_t run, const Lanes& lanes) {
  using acc_t = typename Source::acc_t;
  const int64_t size = index.size();
  const int64_t length = run_length(size);
  const int64_t begin = run * length;
  if (begin >= size) return;
  const int64_t end = begin + length < size ? begin + length : size;

  auto cursor = index.open(begin, lanes);
  RunSum<Source, Index> sum(out, partials, shape, run,
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

// Zeros for the codes that no visit holds. Each lane looks one code up.
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

template <typename Source, typename Index>
__global__ void __launch_bounds__(kGradientThreads, 4)
    sum_runs(Source source, Index index, EntryWeights<typename Source::acc_t> weights,
             const typename Source::acc_t* entry_scores,
             GradientRows<typename Source::scalar_t> out, Partials<typename Source::acc_t> partials,
             RowShape shape, int64_t vocabulary, unsigned run_blocks) {
  EHRSEQ_DYNAMIC_SHARED(memory);
  const Lanes lanes(shape.lanes_log2);
  const bool sums = blockIdx.x < run_blocks;
  const int64_t block = sums ? blockIdx.x : blockIdx.x - run_blocks;
  const int64_t unit = block * lanes.groups() + lanes.group();
  if (sums) {
    const StagedEntries<typename Source::acc_t> staged(memory, lanes);
    sum_run(source, index, weights, entry_scores, out, partials, staged, shape, unit, lanes);
  } else {
    zero_absent_rows<Source::kColumns>(index, out, shape, vocabulary, unit, lanes);
  }
}

// ---------------------------------------------------------------------------------------------
// The second kernel

// A code that reaches over the ends of runs is the tail of one run and the head of those that
// follow, up to the first in which it closes. A group of lanes adds them up for one tail; a code
// that goes on for more runs than a block has tails is added by all groups of the block. There can
// be only one such code among the tails of a block.
template <typename acc_t, int kColumns>
__device__ __forceinline__ void add_heads(const Partials<acc_t>& partials, const RowShape& shape,
                                          int64_t column, int64_t begin, int64_t end, int64_t step,
                                          acc_t (&sums)[kColumns], acc_t& score) {
  constexpr int kRows = kColumns * sizeof(acc_t) > 16 ? 2 : 4;
  for (int64_t first = begin; first < end; first += kRows * step) {
    acc_t heads[kRows][kColumns];
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int64_t run = first + i * step;
      if (run < end && column < shape.row_size) {
        load_columns<kColumns>(partials.head(run, shape, column), heads[i]);
      }
    }
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int64_t run = first + i * step;
      if (run >= end) break;
#pragma unroll
      for (int c = 0; c < kColumns; ++c) sums[c] += heads[i][c];
      score += partials.scores[2 * run];
    }
  }
}

// The run after the last that a code reaches into, among those from `begin` on that a group looks
// at; -1 where it goes on.
template <typename acc_t>
__device__ int64_t end_of_short_code(const Partials<acc_t>& partials, int64_t begin, int64_t n_runs,
                                     const Lanes& lanes) {
  for (int64_t first = begin; first < begin + kTailsPerBlock; first += lanes.count) {
    const int64_t run = first + lanes.lane;
    const unsigned closes = lanes.vote(run < n_runs && partials.head_closes[run] != 0);
    if (closes != 0) return first + __ffs(static_cast<int>(closes));
  }
  return -1;
}

// The same, looked for by the whole block.
template <typename acc_t>
__device__ int64_t end_of_long_code(const Partials<acc_t>& partials, int64_t begin,
                                    int64_t n_runs) {
  __shared__ int found;
  if (threadIdx.x == 0) found = INT32_MAX;
  __syncthreads();
  for (int64_t run = begin + threadIdx.x; run < n_runs; run += kFinishThreads) {
    if (partials.head_closes[run] != 0) {
      atomicMin(&found, static_cast<int>(run) + 1);
      break;
    }
  }
  __syncthreads();
  require(found <= n_runs);  // the last entry closes its code
  return found;
}

template <typename scalar_t, int kColumns>
constexpr size_t finish_bytes() {
  return (kColumns + 1) * kFinishThreads * sizeof(accumulator_t<scalar_t>);
}

template <typename scalar_t, int kColumns>
__global__ void __launch_bounds__(kFinishThreads)
    finish_codes(EntryCount n_entries, Partials<accumulator_t<scalar_t>> partials,
                 GradientRows<scalar_t> out, RowShape shape) {
  using acc_t = accumulator_t<scalar_t>;
  EHRSEQ_DYNAMIC_SHARED(memory);  // finish_bytes of it
  auto* saved = reinterpret_cast<acc_t*>(memory);
  acc_t* saved_scores = saved + kColumns * kFinishThreads;
  __shared__ int long_tail;
  const Lanes lanes(shape.lanes_log2);
  const int64_t n_runs = runs_of(n_entries.get());
  const int64_t run = static_cast<int64_t>(blockIdx.x) * kTailsPerBlock + lanes.group();
  const int64_t column = shape.first_column<kColumns>(lanes.lane);
  const bool is_scribe = lanes.lane == 0 && blockIdx.y == 0;
  if (threadIdx.x == 0) long_tail = -1;
  __syncthreads();

  const bool has_tail = lanes.group() < kTailsPerBlock && run < n_runs &&
                        partials.tail_rows[run] != Partials<acc_t>::kNoTail;
  acc_t sums[kColumns] = {};
  acc_t score = 0;
  if (has_tail) {
    const int64_t end = end_of_short_code(partials, run + 1, n_runs, lanes);
    if (end >= 0) {
      if (column < shape.row_size) load_columns<kColumns>(partials.tail(run, shape, column), sums);
      score = partials.scores[2 * run + 1];
      add_heads(partials, shape, column, run + 1, end, 1, sums, score);
      out.write(partials.tail_rows[run], shape, column, sums);
      if (is_scribe) out.write_score(partials.tail_rows[run], score);
    } else if (lanes.lane == 0) {
      long_tail = static_cast<int>(run);
    }
  }
  __syncthreads();
  if (long_tail < 0) return;

  const int64_t end = end_of_long_code(partials, static_cast<int64_t>(long_tail) + 1, n_runs);
#pragma unroll
  for (int i = 0; i < kColumns; ++i) sums[i] = 0;
  score = 0;
  add_heads(partials, shape, column, static_cast<int64_t>(long_tail) + 1 + lanes.group(), end,
            lanes.groups(), sums, score);
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
    acc_t tail[kColumns];
    load_columns<kColumns>(partials.tail(long_tail, shape, column), tail);
#pragma unroll
    for (int i = 0; i < kColumns; ++i) sums[i] += tail[i];
  }
  score += partials.scores[2 * static_cast<int64_t>(long_tail) + 1];
  out.write(partials.tail_rows[long_tail], shape, column, sums);
  if (is_scribe) out.write_score(partials.tail_rows[long_tail], score);
}

// ---------------------------------------------------------------------------------------------
// Attention

// For every entry its attention a, and a (g . (table[code] - o)), which the gradient of the code's
// score is a sum of; g and o are the visit's gradient and output. The difference is taken first:
// summed apart, its two halves are large and cancel. All columns are seen by one group of lanes.
template <typename scalar_t, int kColumns>
__global__ void __launch_bounds__(kGradientThreads, 4)
    weigh_entries(BatchIndex index, const scalar_t* grad, const scalar_t* table,
                  const scalar_t* pooled, const scalar_t* scores, Normalisers normalisers,
                  RowShape shape, accumulator_t<scalar_t>* attention,
                  accumulator_t<scalar_t>* score_terms) {
  using acc_t = accumulator_t<scalar_t>;
  using Row = Pack<scalar_t, kColumns>;
  constexpr int kEntries = 2;
  const Lanes lanes(shape.lanes_log2);
  const int64_t first = (static_cast<int64_t>(blockIdx.x) * lanes.groups() + lanes.group())
                        << lanes.log2;
  if (first >= index.size()) return;
  const int64_t left = index.size() - first;
  const int n = left < lanes.count ? static_cast<int>(left) : lanes.count;
  auto cursor = index.open(first, lanes);
  const Entry entry = index.load(cursor, first, n, lanes);
  acc_t weight = 0;
  if (lanes.lane < n) {
    weight = attention_of<acc_t>(scores[entry.code], normalisers.of(entry.visit));
  }

  acc_t mine = 0;
  for (int i = 0; i < n; i += kEntries) {
    acc_t products[kEntries] = {};
    int64_t visit_rows[kEntries];
    int64_t code_rows[kEntries];
#pragma unroll
    for (int e = 0; e < kEntries; ++e) {
      const int source = i + e < n ? i + e : i;  // the last one again, whose sum is not used
      visit_rows[e] = shape.offset(lanes.from(source, entry.visit));
      code_rows[e] = shape.offset(lanes.from(source, entry.code));
    }
    for (int64_t column = lanes.lane * kColumns; column < shape.row_size;
         column += kColumns * lanes.count) {
      Bits<Row> g[kEntries];
      Bits<Row> w[kEntries];
      Bits<Row> o[kEntries];
#pragma unroll
      for (int e = 0; e < kEntries; ++e) {
        g[e] = load_bits<Row>(grad + visit_rows[e] + column);
        w[e] = load_bits<Row>(table + code_rows[e] + column);
        o[e] = load_bits<Row>(pooled + visit_rows[e] + column);
      }
#pragma unroll
      for (int e = 0; e < kEntries; ++e) {
        acc_t wide_g[kColumns];
        acc_t wide_w[kColumns];
        acc_t wide_o[kColumns];
        widen_bits<Row, scalar_t>(g[e], wide_g);
        widen_bits<Row, scalar_t>(w[e], wide_w);
        widen_bits<Row, scalar_t>(o[e], wide_o);
#pragma unroll
        for (int c = 0; c < kColumns; ++c) products[e] += wide_g[c] * (wide_w[c] - wide_o[c]);
      }
    }
#pragma unroll
    for (int e = 0; e < kEntries; ++e) {
      const acc_t product = lanes.sum(products[e]);
      if (lanes.lane == i + e) mine = weight * product;
    }
  }
  if (lanes.lane < n) {
    attention[first + lanes.lane] = weight;
    score_terms[first + lanes.lane] = mine;
  }
}

}  // namespace ehrseq::cuda
