// The backward scan and the products that follow it. Included once per instruction set (see
// kernels_impl.h).

template <typename T>
EHRSEQ_INLINE T* gate_gradient(const Backward<T>& layer, int64_t block_and_gate, int64_t row) {
  return layer.grad_gates + (block_and_gate * layer.chunk_size + row - layer.chunk_row) * kLanes<T>;
}

// Adds (gate gradients of R rows) x (V blocks of columns of a weight).
template <typename T, int R, int V>
EHRSEQ_INLINE void add_column_products(const Backward<T>& layer, const T* panels, int64_t block,
                                       int64_t row, Tile<T, R, V>& tile) {
  constexpr int64_t L = kLanes<T>;
  const int64_t panel = column_panel_size<T>(layer.shape);
  const T* columns = panels + block * panel;
  for (int64_t gate = 0; gate < blocks_of<T>(layer.shape.hidden) * kGates; ++gate) {
    const T* ahead = gate_gradient(layer, gate + 2, row);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) __builtin_prefetch(ahead + r * L);
    add_products(tile, Left<T>{gate_gradient(layer, gate, row), L, 1}, Right<T>{columns, panel, L},
                 L);
    columns += L * L;
  }
}

// One visit's gradients, for the units of one block, from `grad_hidden`, what the visit after it
// hands back through h.
template <typename T>
EHRSEQ_INLINE void finish_visit_back(const Backward<T>& layer, const Step& step, int64_t block,
                                     int64_t p, Vector<T> grad_hidden) {
  constexpr int64_t L = kLanes<T>;
  const Shape& shape = layer.shape;
  const int64_t row = step.first_row + p;
  const int64_t unit = block * L;
  const int64_t units = units_in<T>(block, shape.hidden);
  const int64_t padded = shape.padded_hidden();
  T* carried = layer.grad_cell + p * padded + unit;

  if (layer.grad_output)
    grad_hidden += load_some(layer.grad_output + row * shape.hidden + unit, units);
  Vector<T> grad_cell = {};
  if (p < step.staying) {
    grad_cell = load(carried);
  } else {
    const int64_t last = p * shape.hidden + unit;
    if (layer.grad_last_hidden) grad_hidden += load_some(layer.grad_last_hidden + last, units);
    if (layer.grad_last_cell) grad_cell = load_some(layer.grad_last_cell + last, units);
  }

  const T* gates = layer.gates + row * kGates * padded + block * kGates * L;
  const Vector<T> in = load(gates);
  const Vector<T> forget = load(gates + L);
  const Vector<T> candidate = load(gates + 2 * L);
  const Vector<T> out = load(gates + 3 * L);
  const Vector<T> tanh_cell = tanh(load(layer.cells + row * padded + unit));
  Vector<T> before = {};
  if (p < step.continuing) {
    before = load(layer.cells + (step.row_before + p) * padded + unit);
  } else if (layer.c0) {
    before = load_some(layer.c0 + p * shape.hidden + unit, units);
  }

  const T one = 1;
  grad_cell += grad_hidden * out * (one - tanh_cell * tanh_cell);
  const int64_t gate = block * kGates;
  store(gate_gradient(layer, gate, row), grad_cell * candidate * in * (one - in));
  store(gate_gradient(layer, gate + 1, row), grad_cell * before * forget * (one - forget));
  store(gate_gradient(layer, gate + 2, row), grad_cell * in * (one - candidate * candidate));
  store(gate_gradient(layer, gate + 3, row), grad_hidden * tanh_cell * out * (one - out));
  store(carried, grad_cell * forget);
}

// Where the gradient of a tile's hidden states comes from, apart from the outputs.
enum class FromAfter { nothing, gates_after, handed_back };

template <typename T, int V, int R>
void scan_tile_back(const Backward<T>& layer, const Step& step, int64_t block, int64_t p,
                    FromAfter after) {
  Tile<T, R, V> tile;
  clear(tile);
  if (after == FromAfter::gates_after) {
    add_column_products(layer, layer.hidden_panels, block, step.row_after + p, tile);
  } else if (after == FromAfter::handed_back) {
    const int64_t padded = layer.shape.padded_hidden();
    for (int r = 0; r < R; ++r) {
      for (int v = 0; v < V; ++v) {
        tile.sum[r][v] = load(layer.grad_hidden + (p + r) * padded + (block + v) * kLanes<T>);
      }
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < V; ++v) {
      finish_visit_back<T>(layer, step, block + v, p + r, tile.sum[r][v]);
    }
  }
}

// As many vectors side by side as fit a tile, then what is left over singly.
template <typename Body>
EHRSEQ_INLINE void for_block_groups(int64_t from, int64_t to, const Body& body) {
  for (; from + 4 <= to; from += 4) body(from, Count<4>{});
  for (; from < to; ++from) body(from, Count<1>{});
}

template <typename T>
void scan_blocks_back(const Backward<T>& layer, Times chunk, int64_t time, int64_t first_block,
                      int64_t last_block, int64_t from, int64_t to) {
  const Step& step = layer.steps[time];
  const bool opens_chunk = time == (layer.reverse ? chunk.first : chunk.last - 1);
  const FromAfter after = opens_chunk ? FromAfter::handed_back : FromAfter::gates_after;
  for_block_groups(first_block, last_block, [&](int64_t block, auto vectors) {
    constexpr int V = decltype(vectors)::value;
    const auto tiles = [&](int64_t first, int64_t last, FromAfter source) {
      for_row_tiles(first, last, [&](int64_t p, auto rows) {
        scan_tile_back<T, V, decltype(rows)::value>(layer, step, block, p, source);
      });
    };
    tiles(from, std::min(to, step.staying), after);
    tiles(std::max(from, step.staying), std::min(to, step.patients), FromAfter::nothing);
  });
}

template <typename T>
void scan_patients_back(const Backward<T>& layer, Times chunk, Times times, int64_t from,
                        int64_t to) {
  const int64_t blocks = blocks_of<T>(layer.shape.hidden);
  for (int64_t i = 0; i < times.last - times.first; ++i) {
    const int64_t time = layer.reverse ? times.first + i : times.last - 1 - i;
    scan_blocks_back(layer, chunk, time, 0, blocks, from, to);
  }
}

template <typename T>
void scan_units_back(const Backward<T>& layer, Times chunk, int64_t time, int64_t from,
                     int64_t to) {
  scan_blocks_back(layer, chunk, time, from, to, 0, layer.steps[time].patients);
}

template <typename T, int V, int R>
void column_product_tile(const Backward<T>& layer, const T* panels, int64_t columns, int64_t block,
                         int64_t row, T* out, int64_t out_stride) {
  Tile<T, R, V> tile;
  clear(tile);
  add_column_products(layer, panels, block, row, tile);
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) {
      store_some(out + r * out_stride + (block + v) * kLanes<T>, tile.sum[r][v],
                 units_in<T>(block + v, columns));
    }
  }
}

// out [to - from, columns] = (gate gradients of rows [from, to)) x weight.
template <typename T>
void column_products(const Backward<T>& layer, const T* panels, int64_t columns, int64_t from,
                     int64_t to, T* out, int64_t out_stride) {
  for_block_groups(0, blocks_of<T>(columns), [&](int64_t block, auto vectors) {
    for_row_tiles(from, to, [&](int64_t row, auto rows) {
      column_product_tile<T, decltype(vectors)::value, decltype(rows)::value>(
          layer, panels, columns, block, row, out + (row - from) * out_stride, out_stride);
    });
  });
}

template <typename T>
void grad_input(const Backward<T>& layer, int64_t from, int64_t to) {
  // Few enough rows for their gate gradients to stay in the second-level cache.
  constexpr int64_t kRows = 96;
  const int64_t inputs = layer.shape.inputs;
  for (int64_t row = from; row < to; row += kRows) {
    column_products(layer, layer.input_panels, inputs, row, std::min(row + kRows, to),
                    layer.grad_input + row * inputs, inputs);
  }
}

template <typename T>
void hand_back_hidden(const Backward<T>& layer, Times chunk, int64_t from, int64_t to) {
  const Shape& shape = layer.shape;
  const auto products = [&](const Step& step, int64_t first, int64_t last, T* out,
                            int64_t out_stride) {
    first = std::max(from, first);
    last = std::min(to, last);
    if (first >= last) return;
    column_products(layer, layer.hidden_panels, shape.hidden, step.first_row + first,
                    step.first_row + last, out + first * out_stride, out_stride);
  };
  if (layer.grad_h0) {
    for (int64_t time = chunk.first; time < chunk.last; ++time) {
      const Step& step = layer.steps[time];
      products(step, step.continuing, step.patients, layer.grad_h0, shape.hidden);
    }
  }
  const Step& closing = layer.steps[layer.reverse ? chunk.last - 1 : chunk.first];
  products(closing, 0, closing.continuing, layer.grad_hidden, shape.padded_hidden());
}
