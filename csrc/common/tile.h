// A tile of R rows times V vectors of sums, held in registers, and the one loop of products of the
// package. Included once per instruction set, which the including file names (see
// common/recurrent/kernels.h, linear/kernels.h).
//
// Every sum is one chain over k in rising order, whatever R and V are: so a visit's numbers do not
// depend on which rows share its tile, and hence not on the number of threads.

#include "common/lanes.h"

template <typename T>
using Vector = lanes_t<T, EHRSEQ_VECTOR_BYTES / sizeof(T)>;

// What values stored as S are added up in.
template <typename S>
using Sum = accumulator_t<S>;

template <typename S>
constexpr int64_t kLanes = EHRSEQ_VECTOR_BYTES / sizeof(Sum<S>);

template <typename S>
constexpr bool kIsBFloat16 = std::is_same_v<S, BFloat16>;

// How many products go into a sum at once.
template <typename S>
constexpr int64_t kPack = kIsBFloat16<S> ? 2 : 1;

// How many packs of a left row lie one behind the other.
#ifdef EHRSEQ_BFLOAT16_TILES
template <typename S>
constexpr int64_t kGroup = amx_tiles::kPacks;
using ProductSession = amx_tiles::Session;
#else
template <typename S>
constexpr int64_t kGroup = 1;
struct ProductSession {};
#endif

template <typename S>
EHRSEQ_INLINE Vector<Sum<S>> load(const S* from) {
  return load_lanes<kLanes<S>>(from);
}

template <typename S, typename Value>
EHRSEQ_INLINE void store(S* to, Value value) {
  static_assert(std::is_same_v<Value, Vector<Sum<S>>>);
  store_lanes<kLanes<S>>(to, value);
}

// The first `count` lanes; zeros in the others.
template <typename S>
EHRSEQ_INLINE Vector<Sum<S>> load_some(const S* from, int64_t count) {
  if (count >= kLanes<S>) return load(from);
  S values[kLanes<S>] = {};
  __builtin_memcpy(values, from, count * sizeof(S));
  return load(values);
}

template <typename S, typename Value>
EHRSEQ_INLINE void store_some(S* to, Value value, int64_t count) {
  if (count >= kLanes<S>) return store(to, value);
  S values[kLanes<S>];
  store(values, value);
  __builtin_memcpy(to, values, count * sizeof(S));
}

template <typename T>
EHRSEQ_INLINE Vector<T> splat(T value) {
  return value - Vector<T>{};
}

template <int N>
using Count = std::integral_constant<int, N>;

// How many rows of a tile of N are used. All of them, so that their sums can stay in registers; but
// for tiles in memory, one such kernel serves any number.
#ifdef EHRSEQ_BFLOAT16_TILES
template <int N>
struct Rows {
  static constexpr int value = N;
  int count = N;
  constexpr operator int() const { return count; }
};
#else
template <int N>
using Rows = Count<N>;
#endif

template <typename T, int R, int V>
struct Tile {
  Rows<R> rows = {};
  Vector<T> sum[R][V];
};

template <typename T, int R, int V>
EHRSEQ_INLINE void clear(Tile<T, R, V>& tile) {
  const int height = tile.rows;
#pragma GCC unroll 8
  for (int r = 0; r < height; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) tile.sum[r][v] = Vector<T>{};
  }
}

// Where the tile's R left factors lie: pack k of row r is
// at[r * row_stride + k / kGroup * step + k % kGroup * kPack].
template <typename S>
struct Left {
  const S* at;
  int64_t row_stride;
  int64_t step;
};

// Where the V vectors of right factors lie: vector v of pack k is at[v * vector_stride + k * step].
template <typename S>
struct Right {
  const S* at;
  int64_t vector_stride;
  int64_t step;
};

// One pack of factors in every lane, and a vector of packs.
template <typename S>
using Packs = Vector<std::conditional_t<kIsBFloat16<S>, uint32_t, Sum<S>>>;

template <typename S>
EHRSEQ_INLINE Packs<S> splat_pack(const S* from) {
  if constexpr (kIsBFloat16<S>) {
    uint32_t pair;
    __builtin_memcpy(&pair, from, sizeof(pair));
    return splat(pair);
  } else {
    return splat(*from);
  }
}

template <typename S>
EHRSEQ_INLINE Packs<S> load_packs(const S* from) {
  Packs<S> packs;
  __builtin_memcpy(&packs, from, sizeof(packs));
  return packs;
}

template <typename S>
EHRSEQ_INLINE void multiply_add(Vector<Sum<S>>& sum, Packs<S> factor, Packs<S> weight) {
#ifdef EHRSEQ_BFLOAT16_DOTS
  sum = (Vector<Sum<S>>)_mm512_dpbf16_ps((__m512)sum, (__m512bh)factor, (__m512bh)weight);
#else
  sum += factor * weight;
#endif
}

// A row of left factors that lie one behind the other, and so do the rows.
template <typename S>
EHRSEQ_INLINE Left<S> left_rows(const S* at, int64_t row_stride) {
  return {at, row_stride, kGroup<S> * kPack<S>};
}

#ifdef EHRSEQ_BFLOAT16_TILES

template <int kLeft, int kRight, typename S, int... v>
EHRSEQ_INLINE void multiply_group(const Left<S>& left, const Right<S>& right,
                                  std::integer_sequence<int, v...>) {
  amx_tiles::load<kLeft>(left.at, left.row_stride * sizeof(S));
  const auto multiply = [&](auto vector) {
    constexpr int kVector = decltype(vector)::value;
    amx_tiles::load<kRight>(right.at + kVector * right.vector_stride, right.step * sizeof(S));
    amx_tiles::multiply<kVector, kLeft, kRight>();
  };
  (multiply(std::integral_constant<int, v>{}), ...);
}

// To the vectors `of` the tile; `depth` counts packs.
template <typename S, typename T, int R, int V, int... v>
EHRSEQ_INLINE void add_products(Tile<T, R, V>& tile, const int64_t (&of)[sizeof...(v)],
                                Left<S> left, Right<S> right, int64_t depth,
                                std::integer_sequence<int, v...> vectors) {
  constexpr int64_t kRow = sizeof(tile.sum[0]);
  amx_tiles::set_shapes(tile.rows, depth % amx_tiles::kPacks);
  (amx_tiles::load<v>(&tile.sum[0][of[v]], kRow), ...);
  for (; depth >= amx_tiles::kPacks; depth -= amx_tiles::kPacks) {
    multiply_group<amx_tiles::kLeft, amx_tiles::kRight>(left, right, vectors);
    left.at += left.step;
    right.at += amx_tiles::kPacks * right.step;
  }
  if (depth > 0) multiply_group<amx_tiles::kLeftRest, amx_tiles::kRightRest>(left, right, vectors);
  (amx_tiles::store<v>(&tile.sum[0][of[v]], kRow), ...);
}

template <typename S, typename T, int R, int V, int N>
EHRSEQ_INLINE void add_products_to(Tile<T, R, V>& tile, const int64_t (&of)[N], Left<S> left,
                                   Right<S> right, int64_t depth) {
  add_products(tile, of, left, right, depth, std::make_integer_sequence<int, N>{});
}

template <typename S, typename T, int R, int V>
EHRSEQ_INLINE void add_products(Tile<T, R, V>& tile, Left<S> left, Right<S> right, int64_t depth) {
  constexpr int64_t kInOrder[] = {0, 1, 2, 3};
  int64_t of[V];
  std::copy_n(kInOrder, V, of);
  add_products_to(tile, of, left, right, depth);
}

#else

// `depth` counts packs.
template <typename S, typename T, int R, int V>
EHRSEQ_INLINE void add_products(Tile<T, R, V>& tile, Left<S> left, Right<S> right, int64_t depth) {
  for (int64_t k = 0; k < depth; ++k) {
    Packs<S> factor[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) factor[r] = splat_pack(left.at + r * left.row_stride);
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) {
      const Packs<S> weight = load_packs(right.at + v * right.vector_stride);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) multiply_add<S>(tile.sum[r][v], factor[r], weight);
    }
    left.at += left.step;
    right.at += right.step;
  }
}

// To the vectors `of` the tile.
template <typename S, typename T, int R, int V, int N>
EHRSEQ_INLINE void add_products_to(Tile<T, R, V>& tile, const int64_t (&of)[N], Left<S> left,
                                   Right<S> right, int64_t depth) {
  const int height = tile.rows;
  Tile<T, R, N> part{tile.rows};
#pragma GCC unroll 8
  for (int r = 0; r < height; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < N; ++v) part.sum[r][v] = tile.sum[r][of[v]];
  }
  add_products(part, left, right, depth);
#pragma GCC unroll 8
  for (int r = 0; r < height; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < N; ++v) tile.sum[r][of[v]] = part.sum[r][v];
  }
}

#endif

template <int N = EHRSEQ_TILE_ROWS, typename Body>
EHRSEQ_INLINE void with_row_count(int64_t rows, const Body& body) {
#ifdef EHRSEQ_BFLOAT16_TILES
  if (rows > 0) body(Rows<N>{static_cast<int>(rows)});
#else
  if constexpr (N > 0) {
    if (rows == N) return body(Rows<N>{});
    with_row_count<N - 1>(rows, body);
  }
#endif
}

// Cuts [from, to) into tiles of nearly equal height: a tile of one row costs almost as much as a
// full one where the weights have to come from the second-level cache.
template <typename Body>
EHRSEQ_INLINE void for_row_tiles(int64_t from, int64_t to, const Body& body) {
  const int64_t rows = to - from;
  if (rows <= 0) return;
  const int64_t tiles = (rows + EHRSEQ_TILE_ROWS - 1) / EHRSEQ_TILE_ROWS;
  const int64_t height = rows / tiles;
  const int64_t higher = rows % tiles;
  const int64_t split = from + higher * (height + 1);
  with_row_count(height + 1, [&](auto count) {
    for (int64_t row = from; row < split; row += count) body(row, count);
  });
  with_row_count(height, [&](auto count) {
    for (int64_t row = split; row < to; row += count) body(row, count);
  });
}

// As many vectors side by side as fit a tile, then what is left over singly.
template <typename Body>
EHRSEQ_INLINE void for_block_groups(int64_t from, int64_t to, const Body& body) {
  for (; from + 4 <= to; from += 4) body(from, Count<4>{});
  for (; from < to; ++from) body(from, Count<1>{});
}

template <typename S>
int64_t blocks_of(int64_t units) {
  return (units + kLanes<S> - 1) / kLanes<S>;
}

// How many units of `block` there are; fewer than the lanes in the last one.
template <typename S>
EHRSEQ_INLINE int64_t units_in(int64_t block, int64_t units) {
  return std::min(kLanes<S>, units - block * kLanes<S>);
}

// A pack as one word, to be moved about.
template <typename S>
using Word = std::conditional_t<sizeof(S) == 8, uint64_t, uint32_t>;

// Transposes a square of words by swapping ever larger blocks across its diagonal.
template <typename W, int64_t L>
EHRSEQ_INLINE void transpose(Vector<W> (&rows)[L]) {
#pragma GCC unroll 8
  for (int64_t side = 1; side < L; side *= 2) {
    Vector<W> upper = {}, lower = {};
#pragma GCC unroll 16
    for (int64_t i = 0; i < L; ++i) {
      upper[i] = i & side ? L + i - side : i;
      lower[i] = i & side ? L + i : i + side;
    }
#pragma GCC unroll 16
    for (int64_t i = 0; i < L; ++i) {
      if (i & side) continue;
      const Vector<W> above = rows[i];
      rows[i] = __builtin_shuffle(above, rows[i + side], upper);
      rows[i + side] = __builtin_shuffle(above, rows[i + side], lower);
    }
  }
}

// Rows [units, columns], at most L of them, with the units in the lanes: pack k of all units at
// to + k * step, zeros beyond the units.
template <typename S>
void pack_rows_as_lanes(const S* rows, int64_t units, int64_t columns, S* to, int64_t step) {
  constexpr int64_t L = kLanes<S>;
  constexpr int64_t P = kPack<S>;
  static_assert(sizeof(Word<S>) == P * sizeof(S));
  for (int64_t k = 0; k < columns; k += L * P) {
    const int64_t taken = std::min(L * P, columns - k);
    Vector<Word<S>> square[L];
    for (int64_t unit = 0; unit < L; ++unit) {
      const S* row = rows + unit * columns + k;
      square[unit] = Vector<Word<S>>{};
      if (unit >= units) continue;
      if (taken == L * P) {
        std::memcpy(&square[unit], row, sizeof(square[unit]));
      } else {
        std::memcpy(&square[unit], row, taken * sizeof(S));
      }
    }
    transpose<Word<S>, L>(square);
    for (int64_t pack = 0; pack < taken / P; ++pack) {
      std::memcpy(to + (k / P + pack) * step, &square[pack], sizeof(square[pack]));
    }
  }
}
