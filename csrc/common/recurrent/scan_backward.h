// The backward scan and the products that follow it. Included once per instruction set and cell
// (see kernels.h).

template <typename S>
EHRSEQ_INLINE S* sum_gradient(const Backward<S>& layer, int64_t block_and_sum, int64_t row) {
  return layer.grad_sums + (block_and_sum * layer.chunk_size + row - layer.chunk_row) * kLanes<S>;
}

// A weight as the backward pass reads it, with the sum that the products of each gate went to.
template <typename S>
struct Columns {
  const S* panels;
  const int64_t (&of)[kGates];

  EHRSEQ_INLINE int64_t sum_of(int64_t block_and_gate) const {
    if constexpr (kGates == kSums) return block_and_gate;
    return block_and_gate / kGates * kSums + of[block_and_gate % kGates];
  }
};

template <typename S>
Columns<S> columns_of_hidden(const Backward<S>& layer) {
  return {layer.hidden_panels, kOfHidden};
}

// Adds (gradients of the sums of R rows) x (V blocks of columns of a weight). `fetch` is called
// with 0, 1, ... on the way, to fetch a few lines each time of what follows the products.
template <typename S, int R, int V, typename Fetch>
EHRSEQ_INLINE void add_column_products(const Backward<S>& layer, const Columns<S>& weight,
                                       int64_t block, int64_t row, Tile<Sum<S>, R, V>& tile,
                                       const Fetch& fetch) {
  const int height = tile.rows;
  constexpr int64_t L = kLanes<S>;
  constexpr int64_t P = kPack<S>;
  const int64_t panel = column_panel_size<S>(layer.shape);
  const S* columns = weight.panels + block * panel;
  for (int64_t gate = 0; gate < blocks_of<S>(layer.shape.hidden) * kGates; ++gate) {
    const S* ahead = sum_gradient(layer, weight.sum_of(gate + 2), row);
#pragma GCC unroll 8
    for (int r = 0; r < height; ++r) __builtin_prefetch(ahead + r * L);
    fetch(gate);
    add_products(tile, left_rows<S>(sum_gradient(layer, weight.sum_of(gate), row), L),
                 Right<S>{columns, panel, L * P}, L / P);
    columns += L * L;
  }
}

// One visit's gradients, for the units of one block. `grad_hidden` is the gradient of its hidden
// state that comes from the next visit.
template <typename S>
EHRSEQ_INLINE void finish_visit_back(const Backward<S>& layer, const Step& step, int64_t block,
                                     int64_t p, Vector<Sum<S>> grad_hidden) {
  constexpr int64_t L = kLanes<S>;
  const Shape& shape = layer.shape;
  const int64_t row = step.first_row + p;
  const int64_t unit = block * L;
  const int64_t units = units_in<S>(block, shape.hidden);
  const int64_t padded = shape.padded_hidden();
  Sum<S>* carried = layer.grad_carried + p * padded + unit;

  if (layer.grad_output)
    grad_hidden += load_some(layer.grad_output + row * shape.hidden + unit, units);
  Vector<Sum<S>> grad_carried = {};
  if (p < step.staying) {
    grad_carried = load(carried);
  } else {
    const int64_t last = p * shape.hidden + unit;
    if (layer.grad_last_hidden) grad_hidden += load_some(layer.grad_last_hidden + last, units);
    if constexpr (Cell::kHasCellState) {
      if (layer.grad_last_carried) grad_carried = load_some(layer.grad_last_carried + last, units);
    }
  }

  const Gates<S> gates = load_gates<S>(layer.gates.at(row, block), layer.gates.sum_stride);
  Vector<Sum<S>> grad_sums[kSums];
  store(carried, grad_of_sums(layer, step, block, p, gates, grad_hidden, grad_carried, grad_sums));
  for (int64_t sum = 0; sum < kSums; ++sum) {
    S* to = sum_gradient(layer, block * kSums + sum, row);
    store(to, grad_sums[sum]);
    // The products over all lanes follow, and a NaN beyond the units must not reach them (an
    // infinite input times their weights of zero is one).
    if (units < L) std::fill(to + units, to + L, S(0));
  }
}

// Fetches what finish_visit_back reads and writes of one visit and one block.
template <typename S>
EHRSEQ_INLINE void fetch_visit(const Backward<S>& layer, const Step& step, int64_t block,
                               int64_t p) {
  constexpr int64_t L = kLanes<S>;
  constexpr int kSecondLevel = 2;  // the products' factors stream through the first
  const int64_t hidden = layer.shape.hidden;
  const int64_t padded = layer.shape.padded_hidden();
  const int64_t row = step.first_row + p;
  const int64_t before = p < step.continuing ? step.row_before + p : row;
  const int64_t unit = block * L;
  const Sum<S>* gates = layer.gates.at(row, block);
  for (int64_t sum = 0; sum < kSums; ++sum) {
    __builtin_prefetch(gates + sum * layer.gates.sum_stride, 0, kSecondLevel);
    __builtin_prefetch(sum_gradient(layer, block * kSums + sum, row), 1, kSecondLevel);
  }
  if (layer.grad_output) {
    __builtin_prefetch(layer.grad_output + row * hidden + unit, 0, kSecondLevel);
  }
  __builtin_prefetch(layer.grad_carried + p * padded + unit, 1, kSecondLevel);
  if constexpr (Cell::kHasCellState) {
    __builtin_prefetch(layer.carried + row * padded + unit, 0, kSecondLevel);
    __builtin_prefetch(layer.carried + before * padded + unit, 0, kSecondLevel);
  } else {
    __builtin_prefetch(layer.output + before * hidden + unit, 0, kSecondLevel);
  }
}

// Where the gradient of a tile's hidden states comes from, apart from the outputs.
enum class FromAfter { nothing, sums_after, handed_back };

template <typename S, int V, int R>
void scan_tile_back(const Backward<S>& layer, const Step& step, int64_t block, int64_t p,
                    Rows<R> rows, FromAfter after) {
  const int height = rows;
  Tile<Sum<S>, R, V> tile{rows};
  clear(tile);
  if (after == FromAfter::sums_after) {
    // inlined by force: GCC drops calls of functions that do nothing but fetch
    const auto fetch = [&](int64_t i) __attribute__((always_inline)) {
      if (i < rows * V) fetch_visit(layer, step, block + i % V, p + i / V);
    };
    add_column_products(layer, columns_of_hidden(layer), block, step.row_after + p, tile, fetch);
  } else if (after == FromAfter::handed_back) {
    const int64_t padded = layer.shape.padded_hidden();
    for (int r = 0; r < height; ++r) {
      for (int v = 0; v < V; ++v) {
        tile.sum[r][v] = load_some(layer.grad_hidden + (p + r) * padded + (block + v) * kLanes<S>,
                                   units_in<S>(block + v, layer.shape.hidden));
      }
    }
  }
  for (int r = 0; r < height; ++r) {
    for (int v = 0; v < V; ++v) {
      finish_visit_back<S>(layer, step, block + v, p + r, tile.sum[r][v]);
    }
  }
}

template <typename S>
void scan_blocks_back(const Backward<S>& layer, Times chunk, int64_t time, int64_t first_block,
                      int64_t last_block, int64_t from, int64_t to) {
  const Step& step = layer.steps[time];
  const bool opens_chunk = time == (layer.reverse ? chunk.first : chunk.last - 1);
  const FromAfter after = opens_chunk ? FromAfter::handed_back : FromAfter::sums_after;
  for_block_groups(first_block, last_block, [&](int64_t block, auto vectors) {
    constexpr int V = decltype(vectors)::value;
    const auto tiles = [&](int64_t first, int64_t last, FromAfter source) {
      for_row_tiles(first, last, [&](int64_t p, auto rows) {
        scan_tile_back<S, V>(layer, step, block, p, rows, source);
      });
    };
    tiles(from, std::min(to, step.staying), after);
    tiles(std::max(from, step.staying), std::min(to, step.patients), FromAfter::nothing);
  });
}

template <typename S>
void scan_patients_back(const Backward<S>& layer, Times chunk, Times times, int64_t from,
                        int64_t to) {
  const int64_t blocks = blocks_of<S>(layer.shape.hidden);
  for (int64_t i = 0; i < times.last - times.first; ++i) {
    const int64_t time = layer.reverse ? times.first + i : times.last - 1 - i;
    scan_blocks_back(layer, chunk, time, 0, blocks, from, to);
  }
}

template <typename S>
void scan_units_back(const Backward<S>& layer, Times chunk, int64_t time, int64_t from,
                     int64_t to) {
  scan_blocks_back(layer, chunk, time, from, to, 0, layer.steps[time].patients);
}

template <typename S, int V, int R, typename Out>
void column_product_tile(const Backward<S>& layer, const Columns<S>& weight, int64_t columns,
                         int64_t block, int64_t row, Rows<R> rows, Out* out, int64_t out_stride) {
  const int height = rows;
  Tile<Sum<S>, R, V> tile{rows};
  clear(tile);
  add_column_products(layer, weight, block, row, tile, [](int64_t) {});
#pragma GCC unroll 8
  for (int r = 0; r < height; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) {
      store_some(out + r * out_stride + (block + v) * kLanes<S>, tile.sum[r][v],
                 units_in<S>(block + v, columns));
    }
  }
}

// out [to - from, columns] = (gradients of the sums of rows [from, to)) x weight.
template <typename S, typename Out>
void column_products(const Backward<S>& layer, const Columns<S>& weight, int64_t columns,
                     int64_t from, int64_t to, Out* out, int64_t out_stride) {
  for_block_groups(0, blocks_of<S>(columns), [&](int64_t block, auto vectors) {
    for_row_tiles(from, to, [&](int64_t row, auto rows) {
      column_product_tile<S, decltype(vectors)::value>(layer, weight, columns, block, row, rows,
                                                       out + (row - from) * out_stride, out_stride);
    });
  });
}

template <typename S>
void grad_input(const Backward<S>& layer, int64_t from, int64_t to) {
  // Few enough rows for the gradients of their sums to stay in the second-level cache.
  constexpr int64_t kRows = 96;
  const int64_t inputs = layer.shape.inputs;
  for (int64_t row = from; row < to; row += kRows) {
    column_products(layer, Columns<S>{layer.input_panels, kOfInputs}, inputs, row,
                    std::min(row + kRows, to), layer.grad_input + row * inputs, inputs);
  }
}

template <typename S>
void hand_back_hidden(const Backward<S>& layer, Times chunk, int64_t from, int64_t to) {
  const Shape& shape = layer.shape;
  const auto products = [&](const Step& step, int64_t first, int64_t last, auto* out,
                            int64_t out_stride) {
    first = std::max(from, first);
    last = std::min(to, last);
    if (first >= last) return;
    column_products(layer, columns_of_hidden(layer), shape.hidden, step.first_row + first,
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
