// The gates of visits whose gates the forward pass did not keep. Included once per instruction set
// and cell (see kernels.h).
//
// Once all states are known no visit waits for the one before it, so rows of any time share tiles
// and the weights are read as seldom as in a plain product. The sums run in the order of the
// forward pass, and give its bits.

// The state before each visit of rows [from, to), row after row; zeros where there is none.
template <typename S>
void gather_states(const Forward<S>& layer, const Order& order, int64_t from, int64_t to,
                   S* states) {
  const int64_t hidden = layer.shape.hidden;
  for (int64_t row = from; row < to; ++row, states += hidden) {
    const int64_t before = order.row_before[row];
    if (before >= 0) {
      std::copy_n(layer.output + before * hidden, hidden, states);
    } else if (layer.h0) {
      std::copy_n(layer.h0 + order.patient[row] * hidden, hidden, states);
    } else {
      std::fill_n(states, hidden, S(0));
    }
  }
}

template <typename S, int R>
void gates_tile(const Forward<S>& layer, int64_t block, int64_t row, Rows<R> rows, const S* states,
                const GatesAt<Sum<S>>& gates) {
  const int height = rows;
  const Shape& shape = layer.shape;
  const S* panel = layer.panels + block * gate_panel_size<S>(shape);
  Tile<Sum<S>, R, kSums> tile{rows};
  add_input_products<S, R>(layer, block, row, tile);
  add_gate_products<S, R>(tile, kOfHidden, states, shape.hidden,
                          panel + shape.inputs * kGates * kLanes<S>);
  for (int r = 0; r < height; ++r) {
    store_gates<S>(gates.at(row + r, block), gates.sum_stride, activate<S>(tile.sum[r]));
  }
}

template <typename S>
void recompute_gates(const Forward<S>& layer, const Order& order, int64_t from, int64_t to,
                     S* states, const GatesAt<Sum<S>>& gates) {
  const int64_t hidden = layer.shape.hidden;
  for (int64_t first = from; first < to; first += kRecomputedRows) {
    const int64_t last = std::min(first + kRecomputedRows, to);
    gather_states(layer, order, first, last, states);
    for (int64_t block = 0; block < blocks_of<S>(hidden); ++block) {
      for_row_tiles(first, last, [&](int64_t row, auto rows) {
        gates_tile<S>(layer, block, row, rows, states + (row - first) * hidden, gates);
      });
    }
  }
}
