// A tile of R rows times V vectors of sums, held in registers, and the one product loop of the
// room. Included once per instruction set (see kernels_impl.h).
//
// Every sum is one chain over k in rising order, whatever R and V are: so a visit's numbers do not
// depend on which rows share its tile, and hence not on the number of threads.

template <typename T>
using Vector __attribute__((vector_size(EHRSEQ_VECTOR_BYTES))) = T;

template <typename T>
constexpr int64_t kLanes = EHRSEQ_VECTOR_BYTES / sizeof(T);

template <typename T>
EHRSEQ_INLINE Vector<T> load(const T* from) {
  Vector<T> value;
  __builtin_memcpy(&value, from, sizeof(value));
  return value;
}

template <typename T, typename Value>
EHRSEQ_INLINE void store(T* to, Value value) {
  static_assert(std::is_same_v<Value, Vector<T>>);
  __builtin_memcpy(to, &value, sizeof(value));
}

// The first `count` lanes; zeros in the others.
template <typename T>
EHRSEQ_INLINE Vector<T> load_some(const T* from, int64_t count) {
  if (count >= kLanes<T>) return load(from);
  Vector<T> value = {};
  __builtin_memcpy(&value, from, count * sizeof(T));
  return value;
}

template <typename T, typename Value>
EHRSEQ_INLINE void store_some(T* to, Value value, int64_t count) {
  if (count >= kLanes<T>) return store(to, value);
  __builtin_memcpy(to, &value, count * sizeof(T));
}

template <typename T>
EHRSEQ_INLINE Vector<T> splat(T value) {
  return value - Vector<T>{};
}

template <typename T, int R, int V>
struct Tile {
  Vector<T> sum[R][V];
};

template <typename T, int R, int V>
EHRSEQ_INLINE void clear(Tile<T, R, V>& tile) {
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) tile.sum[r][v] = Vector<T>{};
  }
}

// Where the tile's R left factors lie: element k of row r is at[r * row_stride + k * step].
template <typename T>
struct Left {
  const T* at;
  int64_t row_stride;
  int64_t step;
};

// Where the V vectors of right factors lie: vector v of k is at[v * vector_stride + k * step].
template <typename T>
struct Right {
  const T* at;
  int64_t vector_stride;
  int64_t step;
};

template <typename T, int R, int V>
EHRSEQ_INLINE void add_products(Tile<T, R, V>& tile, Left<T> left, Right<T> right, int64_t depth) {
  for (int64_t k = 0; k < depth; ++k) {
    Vector<T> factor[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) factor[r] = splat(left.at[r * left.row_stride]);
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) {
      const Vector<T> weight = load(right.at + v * right.vector_stride);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) tile.sum[r][v] += factor[r] * weight;
    }
    left.at += left.step;
    right.at += right.step;
  }
}

template <int N>
using Count = std::integral_constant<int, N>;

template <int N = EHRSEQ_TILE_ROWS, typename Body>
EHRSEQ_INLINE void with_row_count(int64_t rows, const Body& body) {
  if constexpr (N > 0) {
    if (rows == N) return body(Count<N>{});
    with_row_count<N - 1>(rows, body);
  }
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
