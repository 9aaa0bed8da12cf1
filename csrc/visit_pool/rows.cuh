// Rows of a table, a lane's share of them at a time, and the two ways of pooling them.
#pragma once

#include "common/cuda/device.cuh"

namespace ehrseq::cuda {

// How rows are divided: lane l of column tile t holds kColumns columns from
// (t * lanes + l) * kColumns on. Tiles are the second dimension of the grid.
struct RowShape {
  int32_t row_size;
  int lanes_log2;

  // Of a row's first column; row times row_size can pass 2^31.
  __device__ __forceinline__ int64_t offset(int64_t row) const { return row * row_size; }
  __device__ __forceinline__ int64_t offset(int32_t row) const {
    return static_cast<int64_t>(row) * row_size;  // one instruction
  }

  template <int kColumns>
  __device__ int64_t first_column(int lane) const {
    return ((static_cast<int64_t>(blockIdx.y) << lanes_log2) + lane) * kColumns;
  }
};

// A lane's share of a row as it was loaded. Kept in this form until it is used: 16-bit columns of
// their own would take a register each.
template <typename Row>
using Bits = typename Word<sizeof(Row)>::type;

template <typename Row, typename scalar_t>
__device__ __forceinline__ Bits<Row> load_bits(const scalar_t* from) {
  return __ldg(reinterpret_cast<const Bits<Row>*>(from));
}

// Two 16-bit columns from the word that holds them.
__device__ __forceinline__ void widen_word(unsigned word, __nv_bfloat16, float* columns) {
  columns[0] = __uint_as_float(word << 16);
  columns[1] = __uint_as_float(word & 0xffff0000u);
}
__device__ __forceinline__ void widen_word(unsigned word, __half, float* columns) {
  __half2 pair;
  std::memcpy(&pair, &word, sizeof pair);
  const float2 wide = __half22float2(pair);
  columns[0] = wide.x;
  columns[1] = wide.y;
}

template <typename Row, typename scalar_t, typename acc_t>
__device__ __forceinline__ void widen_bits(const Bits<Row>& bits, acc_t (&columns)[Row::kValues]) {
  if constexpr (sizeof(scalar_t) == 2 && Row::kValues % 2 == 0) {
    unsigned words[Row::kValues / 2];
    std::memcpy(words, &bits, sizeof words);
#pragma unroll
    for (int i = 0; i < Row::kValues / 2; ++i) {
      widen_word(words[i], scalar_t(), columns + 2 * i);
    }
  } else {
    Row row;
    std::memcpy(&row, &bits, sizeof row);
#pragma unroll
    for (int i = 0; i < Row::kValues; ++i) columns[i] = widen(row.values[i]);
  }
}

// Packs of more than 16 bytes move in several parts.
template <typename T, int kColumns>
constexpr int kPart = kColumns * sizeof(T) <= 16 ? kColumns : 16 / static_cast<int>(sizeof(T));

template <int kColumns, typename T>
__device__ __forceinline__ void load_columns(const T* from, T (&columns)[kColumns]) {
  using Part = Pack<T, kPart<T, kColumns>>;
#pragma unroll
  for (int first = 0; first < kColumns; first += Part::kValues) {
    // Not load_pack: what is read here may have been written by this kernel.
    const Part part = *reinterpret_cast<const Part*>(from + first);
#pragma unroll
    for (int i = 0; i < Part::kValues; ++i) columns[first + i] = part.values[i];
  }
}

template <int kColumns, typename T>
__device__ __forceinline__ void store_columns(T* to, const T (&columns)[kColumns]) {
  using Part = Pack<T, kPart<T, kColumns>>;
#pragma unroll
  for (int first = 0; first < kColumns; first += Part::kValues) {
    Part part;
#pragma unroll
    for (int i = 0; i < Part::kValues; ++i) part.values[i] = columns[first + i];
    store_pack(to + first, part);
  }
}

// Rounded to the table's dtype, in one store.
template <typename scalar_t, int kColumns, typename acc_t>
__device__ __forceinline__ void store_row(scalar_t* to, const acc_t (&sums)[kColumns],
                                          acc_t scale) {
  Pack<scalar_t, kColumns> row;
#pragma unroll
  for (int i = 0; i < kColumns; ++i) row.values[i] = narrow<scalar_t>(sums[i] * scale);
  store_pack(to, row);
}

template <typename scalar_t, int kColumns>
__device__ __forceinline__ void store_zeros(scalar_t* to) {
  Pack<scalar_t, kColumns> row;
#pragma unroll
  for (int i = 0; i < kColumns; ++i) row.values[i] = narrow<scalar_t>(0.0f);
  store_pack(to, row);
}

// Modes mean and sum, and attention.
template <typename scalar_t_, int kColumns_>
struct WeightedSum {
  using scalar_t = scalar_t_;
  using acc_t = accumulator_t<scalar_t>;
  using Row = Pack<scalar_t, kColumns_>;
  static constexpr int kColumns = kColumns_;
  static constexpr int kRowsInFlight = 4;
  static constexpr int kStateBytes = kColumns * sizeof(acc_t);
  // As many blocks on a multiprocessor as its registers allow without spilling: short
  // visits leave few rows in flight to each.
  static constexpr int kBlocks = sizeof(acc_t) == 8 ? 4 : 5;

  acc_t sums[kColumns] = {};

  __device__ __forceinline__ void add(const Bits<Row>& row, int32_t /*id*/, acc_t weight) {
    acc_t columns[kColumns];
    widen_bits<Row, scalar_t>(row, columns);
#pragma unroll
    for (int i = 0; i < kColumns; ++i) sums[i] += weight * columns[i];
  }

  // Through shared memory, neighbouring threads in neighbouring words.
  template <int kThreads>
  __device__ void save(void* memory, int thread) const {
    auto* saved = static_cast<acc_t*>(memory);
#pragma unroll
    for (int i = 0; i < kColumns; ++i) saved[i * kThreads + thread] = sums[i];
  }
  template <int kThreads>
  __device__ void add_saved(const void* memory, int thread) {
    const auto* saved = static_cast<const acc_t*>(memory);
#pragma unroll
    for (int i = 0; i < kColumns; ++i) sums[i] += saved[i * kThreads + thread];
  }

  __device__ void write(int64_t at, scalar_t* out, int32_t* /*arg_max*/, acc_t scale) const {
    store_row<scalar_t, kColumns>(out + at, sums, scale);
  }
};

// Mode max: the largest value of each column and the row that it came from, the first where several
// are equal. NaN wins, as in torch.
template <typename scalar_t_, int kColumns_>
struct Maximum {
  using scalar_t = scalar_t_;
  using acc_t = accumulator_t<scalar_t>;
  using Row = Pack<scalar_t, kColumns_>;
  static constexpr int kColumns = kColumns_;
  static constexpr int kRowsInFlight = 4;
  static constexpr int kStateBytes = kColumns * (sizeof(acc_t) + sizeof(int32_t));
  static constexpr int kBlocks = sizeof(acc_t) == 8 ? 4 : 5;
  static constexpr int32_t kNone = -1;

  acc_t best[kColumns];
  int32_t winners[kColumns];

  __device__ Maximum() {
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
      best[i] = 0;
      winners[i] = kNone;
    }
  }

  __device__ __forceinline__ void offer(int i, acc_t value, int32_t id) {
    const bool is_nan = value != value && best[i] == best[i];
    const bool wins = winners[i] == kNone || value > best[i] || is_nan;
    best[i] = wins ? value : best[i];
    winners[i] = wins ? id : winners[i];
  }

  __device__ __forceinline__ void add(const Bits<Row>& row, int32_t id, acc_t /*weight*/) {
    acc_t columns[kColumns];
    widen_bits<Row, scalar_t>(row, columns);
#pragma unroll
    for (int i = 0; i < kColumns; ++i) offer(i, columns[i], id);
  }

  template <int kThreads>
  __device__ void save(void* memory, int thread) const {
    auto* values = static_cast<acc_t*>(memory);
    auto* ids = reinterpret_cast<int32_t*>(values + kColumns * kThreads);
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
      values[i * kThreads + thread] = best[i];
      ids[i * kThreads + thread] = winners[i];
    }
  }
  template <int kThreads>
  __device__ void add_saved(const void* memory, int thread) {
    const auto* values = static_cast<const acc_t*>(memory);
    const auto* ids = reinterpret_cast<const int32_t*>(values + kColumns * kThreads);
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
      const int32_t id = ids[i * kThreads + thread];
      if (id != kNone) offer(i, values[i * kThreads + thread], id);
    }
  }

  __device__ void write(int64_t at, scalar_t* out, int32_t* arg_max, acc_t /*scale*/) const {
    store_row<scalar_t, kColumns>(out + at, best, acc_t(1));
    store_columns<kColumns>(arg_max + at, winners);
  }
};

}  // namespace ehrseq::cuda
