// The backward scan and the products that follow it. Included once per instruction set (see
// kernels_impl.h).

template <typename T>
EHRSEQ_INLINE T* gate_gradient(const Backward<T>& layer, int64_t block_and_gate, int64_t row) {
  return layer.grad_gates + (block_and_gate * layer.shape.visits + row) * kLanes<T>;
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

template <typename T, int V, int R>
void scan_tile_back(const Backward<T>& layer, const Step& step, int64_t block, int64_t p,
                    bool staying) {
  Tile<T, R, V> tile;
  clear(tile);
  if (staying) {
    add_column_products(layer, layer.hidden_panels, block, step.row_after + p, tile);
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
void scan_blocks_back(const Backward<T>& layer, const Step& step, int64_t first_block,
                      int64_t last_block, int64_t from, int64_t to) {
  for_block_groups(first_block, last_block, [&](int64_t block, auto vectors) {
    constexpr int V = decltype(vectors)::value;
    const auto tiles = [&](int64_t first, int64_t last, bool staying) {
      for_row_tiles(first, last, [&](int64_t p, auto rows) {
        scan_tile_back<T, V, decltype(rows)::value>(layer, step, block, p, staying);
      });
    };
    tiles(from, std::min(to, step.staying), true);
    tiles(std::max(from, step.staying), std::min(to, step.patients), false);
  });
}

template <typename T>
void scan_patients_back(const Backward<T>& layer, int64_t first, int64_t last, int64_t from,
                        int64_t to) {
  for (int64_t i = 0; i < last - first; ++i) {
    const Step& step = layer.steps[layer.reverse ? first + i : last - 1 - i];
    scan_blocks_back(layer, step, 0, blocks_of<T>(layer.shape.hidden), from, to);
  }
}

template <typename T>
void scan_units_back(const Backward<T>& layer, int64_t time, int64_t from, int64_t to) {
  const Step& step = layer.steps[time];
  scan_blocks_back(layer, step, from, to, 0, step.patients);
}

template <typename T, int V, int R>
void column_product_tile(const Backward<T>& layer, const T* panels, int64_t columns, int64_t block,
                         int64_t row, T* out) {
  Tile<T, R, V> tile;
  clear(tile);
  add_column_products(layer, panels, block, row, tile);
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) {
      store_some(out + r * columns + (block + v) * kLanes<T>, tile.sum[r][v],
                 units_in<T>(block + v, columns));
    }
  }
}

// out [to - from, columns] = (gate gradients of rows [from, to)) x weight.
template <typename T>
void column_products(const Backward<T>& layer, const T* panels, int64_t columns, int64_t from,
                     int64_t to, T* out) {
  for_block_groups(0, blocks_of<T>(columns), [&](int64_t block, auto vectors) {
    for_row_tiles(from, to, [&](int64_t row, auto rows) {
      column_product_tile<T, decltype(vectors)::value, decltype(rows)::value>(
          layer, panels, columns, block, row, out + (row - from) * columns);
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
                    layer.grad_input + row * inputs);
  }
}

template <typename T>
void grad_initial_hidden(const Backward<T>& layer, int64_t from, int64_t to) {
  const int64_t hidden = layer.shape.hidden;
  for (const Step& step : layer.steps) {
    const int64_t first = std::max(from, step.continuing);
    const int64_t last = std::min(to, step.patients);
    if (first >= last) continue;
    column_products(layer, layer.hidden_panels, hidden, step.first_row + first,
                    step.first_row + last, layer.grad_h0 + first * hidden);
  }
}
