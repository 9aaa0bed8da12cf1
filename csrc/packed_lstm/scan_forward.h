// The forward scan. Included once per instruction set (see kernels_impl.h).

template <typename T>
EHRSEQ_INLINE int64_t gates_stride(const Shape& shape) {
  return kGates * shape.padded_hidden();
}

template <typename T>
EHRSEQ_INLINE int64_t block_of_gates(int64_t block) {
  return block * kGates * kLanes<T>;
}

template <typename T>
EHRSEQ_INLINE T* projected_row(const Forward<T>& layer, int64_t row) {
  return layer.projected + (row - layer.projected_from) * gates_stride<T>(layer.shape);
}

template <typename T, int R>
EHRSEQ_INLINE void start_from(Tile<T, R, kGates>& tile, const T* gates, int64_t row_stride) {
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int gate = 0; gate < kGates; ++gate) {
      tile.sum[r][gate] = load(gates + r * row_stride + gate * kLanes<T>);
    }
  }
}

template <typename T, int R>
EHRSEQ_INLINE void add_gate_products(Tile<T, R, kGates>& tile, const T* rows, int64_t depth,
                                     const T* panel) {
  add_products(tile, Left<T>{rows, depth, 1}, Right<T>{panel, kLanes<T>, kGates * kLanes<T>},
               depth);
}

template <typename T, int R>
EHRSEQ_INLINE void add_input_products(const Forward<T>& layer, int64_t block, int64_t row,
                                      Tile<T, R, kGates>& tile) {
  start_from<T, R>(tile, layer.bias + block_of_gates<T>(block), 0);
  add_gate_products<T, R>(tile, layer.input + row * layer.shape.inputs, layer.shape.inputs,
                          layer.panels + block * gate_panel_size<T>(layer.shape));
}

template <typename T, int R>
void project_tile(const Forward<T>& layer, int64_t block, int64_t row) {
  Tile<T, R, kGates> tile;
  add_input_products<T, R>(layer, block, row, tile);
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    T* out = projected_row(layer, row + r) + block_of_gates<T>(block);
#pragma GCC unroll 8
    for (int gate = 0; gate < kGates; ++gate) store(out + gate * kLanes<T>, tile.sum[r][gate]);
  }
}

template <typename T>
void project_inputs(const Forward<T>& layer, int64_t from, int64_t to) {
  for (int64_t block = 0; block < blocks_of<T>(layer.shape.hidden); ++block) {
    for_row_tiles(from, to, [&](int64_t row, auto rows) {
      project_tile<T, decltype(rows)::value>(layer, block, row);
    });
  }
}

// The cell of patient p before this step, as far as the units of `block` go.
template <typename T>
EHRSEQ_INLINE Vector<T> cell_before(const Forward<T>& layer, const Step& step, int64_t block,
                                    int64_t p) {
  const int64_t unit = block * kLanes<T>;
  if (p < step.continuing) {
    const int64_t row = layer.cells_per_visit ? step.row_before + p : p;
    return load(layer.cells + row * layer.shape.padded_hidden() + unit);
  }
  if (!layer.c0) return Vector<T>{};
  return load_some(layer.c0 + p * layer.shape.hidden + unit,
                   units_in<T>(block, layer.shape.hidden));
}

// The rest of one visit, for the units of one block, from its four sums:
// c = f c' + i g, h = o tanh c.
template <typename T>
EHRSEQ_INLINE void finish_visit(const Forward<T>& layer, const Step& step, int64_t block, int64_t p,
                                const Vector<T> (&sum)[kGates]) {
  const Shape& shape = layer.shape;
  const int64_t row = step.first_row + p;
  const int64_t unit = block * kLanes<T>;
  const int64_t units = units_in<T>(block, shape.hidden);

  const Vector<T> in = sigmoid(sum[0]);
  const Vector<T> forget = sigmoid(sum[1]);
  const Vector<T> candidate = tanh(sum[2]);
  const Vector<T> out = sigmoid(sum[3]);
  const Vector<T> cell = forget * cell_before(layer, step, block, p) + in * candidate;
  const Vector<T> hidden = out * tanh(cell);

  store(layer.cells + (layer.cells_per_visit ? row : p) * shape.padded_hidden() + unit, cell);
  store_some(layer.output + row * shape.hidden + unit, hidden, units);
  if (layer.gates) {
    T* gates = layer.gates + row * gates_stride<T>(shape) + block_of_gates<T>(block);
    store(gates, in);
    store(gates + kLanes<T>, forget);
    store(gates + 2 * kLanes<T>, candidate);
    store(gates + 3 * kLanes<T>, out);
  }
  if (p >= step.staying) {
    store_some(layer.last_hidden + p * shape.hidden + unit, hidden, units);
    store_some(layer.last_cell + p * shape.hidden + unit, cell, units);
  }
}

// `hidden`: the state of the tile's first patient before this step, the others' following it; null
// where they are zeros.
template <typename T, bool Projected, int R>
void scan_tile(const Forward<T>& layer, const Step& step, int64_t block, int64_t p,
               const T* hidden) {
  const Shape& shape = layer.shape;
  const int64_t row = step.first_row + p;
  Tile<T, R, kGates> tile;
  if (Projected) {
    start_from<T, R>(tile, projected_row(layer, row) + block_of_gates<T>(block),
                     gates_stride<T>(shape));
  } else {
    add_input_products<T, R>(layer, block, row, tile);
  }
  if (hidden) {
    const T* panel = layer.panels + block * gate_panel_size<T>(shape);
    add_gate_products<T, R>(tile, hidden, shape.hidden, panel + shape.inputs * kGates * kLanes<T>);
  }
  for (int r = 0; r < R; ++r) finish_visit<T>(layer, step, block, p + r, tile.sum[r]);
}

template <typename T, bool Projected>
EHRSEQ_INLINE void scan_block(const Forward<T>& layer, const Step& step, int64_t block,
                              int64_t from, int64_t to) {
  const int64_t hidden = layer.shape.hidden;
  const auto tiles = [&](int64_t first, int64_t last, const T* states) {
    for_row_tiles(first, last, [&](int64_t p, auto rows) {
      scan_tile<T, Projected, decltype(rows)::value>(layer, step, block, p,
                                                     states ? states + p * hidden : nullptr);
    });
  };
  tiles(from, std::min(to, step.continuing), layer.output + step.row_before * hidden);
  tiles(std::max(from, step.continuing), std::min(to, step.patients), layer.h0);
}

template <typename T>
void scan_patients(const Forward<T>& layer, Times times, int64_t from, int64_t to) {
  for (int64_t i = 0; i < times.last - times.first; ++i) {
    const Step& step = layer.steps[layer.reverse ? times.last - 1 - i : times.first + i];
    for (int64_t block = 0; block < blocks_of<T>(layer.shape.hidden); ++block) {
      scan_block<T, false>(layer, step, block, from, to);
    }
  }
}

template <typename T>
void scan_units(const Forward<T>& layer, int64_t time, int64_t from, int64_t to) {
  const Step& step = layer.steps[time];
  for (int64_t block = from; block < to; ++block) {
    scan_block<T, true>(layer, step, block, 0, step.patients);
  }
}
