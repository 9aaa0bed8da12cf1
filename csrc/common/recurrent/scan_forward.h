// The forward scan. Included once per instruction set and cell (see kernels.h).

template <typename S>
EHRSEQ_INLINE int64_t gates_stride(const Shape& shape) {
  return kSums * shape.padded_hidden();
}

template <typename S>
EHRSEQ_INLINE int64_t block_of_sums(int64_t block) {
  return block * kSums * kLanes<S>;
}

template <typename S>
EHRSEQ_INLINE Sum<S>* projected_row(const Forward<S>& layer, int64_t row) {
  return layer.projected + (row - layer.projected_from) * gates_stride<S>(layer.shape);
}

template <typename S, int R>
EHRSEQ_INLINE void start_from(Tile<Sum<S>, R, kSums>& tile, const Sum<S>* sums,
                              int64_t row_stride) {
  const int height = tile.rows;
#pragma GCC unroll 8
  for (int r = 0; r < height; ++r) {
#pragma GCC unroll 8
    for (int sum = 0; sum < kSums; ++sum) {
      tile.sum[r][sum] = load(sums + r * row_stride + sum * kLanes<S>);
    }
  }
}

// To the sums `of` each gate; the others are left as they are.
template <typename S, int R>
EHRSEQ_INLINE void add_gate_products(Tile<Sum<S>, R, kSums>& tile, const int64_t (&of)[kGates],
                                     const S* rows, int64_t depth, const S* panel) {
  constexpr int64_t kVector = kLanes<S> * kPack<S>;
  add_products_to(tile, of, left_rows(rows, depth), Right<S>{panel, kVector, kGates * kVector},
                  depth / kPack<S>);
}

template <typename S, int R>
EHRSEQ_INLINE void add_input_products(const Forward<S>& layer, int64_t block, int64_t row,
                                      Tile<Sum<S>, R, kSums>& tile) {
  start_from<S, R>(tile, layer.bias + block_of_sums<S>(block), 0);
  add_gate_products<S, R>(tile, kOfInputs, layer.input + row * layer.shape.inputs,
                          layer.shape.inputs,
                          layer.panels + block * gate_panel_size<S>(layer.shape));
}

template <typename S, int R>
EHRSEQ_INLINE void add_from_zeros(const Forward<S>& layer, int64_t block,
                                  Tile<Sum<S>, R, kSums>& tile) {
  const int height = tile.rows;
  const Sum<S>* from_zeros = layer.from_zeros + block * kGates * kLanes<S>;
#pragma GCC unroll 8
  for (int gate = 0; gate < kGates; ++gate) {
    const Vector<Sum<S>> sum = load(from_zeros + gate * kLanes<S>);
#pragma GCC unroll 8
    for (int r = 0; r < height; ++r) tile.sum[r][kOfHidden[gate]] += sum;
  }
}

template <typename S, int R>
void project_tile(const Forward<S>& layer, int64_t block, int64_t row, Rows<R> rows) {
  const int height = rows;
  Tile<Sum<S>, R, kSums> tile{rows};
  add_input_products<S, R>(layer, block, row, tile);
#pragma GCC unroll 8
  for (int r = 0; r < height; ++r) {
    Sum<S>* out = projected_row(layer, row + r) + block_of_sums<S>(block);
#pragma GCC unroll 8
    for (int sum = 0; sum < kSums; ++sum) store(out + sum * kLanes<S>, tile.sum[r][sum]);
  }
}

template <typename S>
void project_inputs(const Forward<S>& layer, int64_t from, int64_t to) {
  for (int64_t block = 0; block < blocks_of<S>(layer.shape.hidden); ++block) {
    for_row_tiles(from, to,
                  [&](int64_t row, auto rows) { project_tile<S>(layer, block, row, rows); });
  }
}

// What is carried into this step of patient p, as far as the units of `block` go.
template <typename S>
EHRSEQ_INLINE Vector<Sum<S>> carried_before(const Forward<S>& layer, const Step& step,
                                            int64_t block, int64_t p) {
  const int64_t unit = block * kLanes<S>;
  if (p < step.continuing) {
    const int64_t row = layer.carried_per_visit ? step.row_before + p : p;
    return load(layer.carried + row * layer.shape.padded_hidden() + unit);
  }
  if (!layer.start) return Vector<Sum<S>>{};
  return load_some(layer.start + p * layer.shape.hidden + unit,
                   units_in<S>(block, layer.shape.hidden));
}

// The rest of one visit, for the units of one block, from its sums.
template <typename S>
EHRSEQ_INLINE void finish_visit(const Forward<S>& layer, const Step& step, int64_t block, int64_t p,
                                const Vector<Sum<S>> (&sum)[kSums]) {
  const Shape& shape = layer.shape;
  const int64_t row = step.first_row + p;
  const int64_t unit = block * kLanes<S>;
  const int64_t units = units_in<S>(block, shape.hidden);

  const Gates<S> gates = activate<S>(sum);
  const States<S> next = next_states<S>(gates, carried_before(layer, step, block, p));

  store(layer.carried + (layer.carried_per_visit ? row : p) * shape.padded_hidden() + unit,
        next.carried);
  store_some(layer.output + row * shape.hidden + unit, next.hidden, units);
  if (row < layer.kept) {
    store_gates<S>(layer.gates + row * gates_stride<S>(shape) + block_of_sums<S>(block), kLanes<S>,
                   gates);
  }
  if (p >= step.staying) {
    store_some(layer.last_hidden + p * shape.hidden + unit, next.hidden, units);
    if constexpr (Cell::kHasCellState) {
      store_some(layer.last_carried + p * shape.hidden + unit, next.carried, units);
    }
  }
}

// `hidden`: the state of the tile's first patient before this step, the others' following it; null
// where they are zeros.
template <typename S, bool Projected, int R>
void scan_tile(const Forward<S>& layer, const Step& step, int64_t block, int64_t p, Rows<R> rows,
               const S* hidden) {
  const int height = rows;
  const Shape& shape = layer.shape;
  const int64_t row = step.first_row + p;
  Tile<Sum<S>, R, kSums> tile{rows};
  if (Projected) {
    start_from<S, R>(tile, projected_row(layer, row) + block_of_sums<S>(block),
                     gates_stride<S>(shape));
  } else {
    add_input_products<S, R>(layer, block, row, tile);
  }
  if (hidden) {
    const S* panel = layer.panels + block * gate_panel_size<S>(shape);
    add_gate_products<S, R>(tile, kOfHidden, hidden, shape.hidden,
                            panel + shape.inputs * kGates * kLanes<S>);
  } else {
    add_from_zeros<S, R>(layer, block, tile);
  }
  for (int r = 0; r < height; ++r) finish_visit<S>(layer, step, block, p + r, tile.sum[r]);
}

template <typename S, bool Projected>
EHRSEQ_INLINE void scan_block(const Forward<S>& layer, const Step& step, int64_t block,
                              int64_t from, int64_t to) {
  const int64_t hidden = layer.shape.hidden;
  const auto tiles = [&](int64_t first, int64_t last, const S* states) {
    for_row_tiles(first, last, [&](int64_t p, auto rows) {
      scan_tile<S, Projected>(layer, step, block, p, rows, states ? states + p * hidden : nullptr);
    });
  };
  tiles(from, std::min(to, step.continuing), layer.output + step.row_before * hidden);
  tiles(std::max(from, step.continuing), std::min(to, step.patients), layer.h0);
}

template <typename S>
void scan_patients(const Forward<S>& layer, Times times, int64_t from, int64_t to) {
  for (int64_t i = 0; i < times.last - times.first; ++i) {
    const Step& step = layer.steps[layer.reverse ? times.last - 1 - i : times.first + i];
    for (int64_t block = 0; block < blocks_of<S>(layer.shape.hidden); ++block) {
      scan_block<S, false>(layer, step, block, from, to);
    }
  }
}

template <typename S>
void scan_units(const Forward<S>& layer, int64_t time, int64_t from, int64_t to) {
  const Step& step = layer.steps[time];
  for (int64_t block = from; block < to; ++block) {
    scan_block<S, true>(layer, step, block, 0, step.patients);
  }
}
