// Weights in the order in which the tiles read them, packed once per call. Included once per
// instruction set and cell (see kernels.h).

template <typename S>
int64_t gate_panel_size(const Shape& shape) {
  return (shape.inputs + shape.hidden) * kGates * kLanes<S>;
}

// Columns of `weight` [gates * hidden, columns] for the units of one block: [column][gate][L], in
// packs.
template <typename S>
void pack_columns_of_block(const Shape& shape, const S* weight, int64_t columns, int64_t block,
                           S* panel) {
  constexpr int64_t L = kLanes<S>;
  constexpr int64_t P = kPack<S>;
  for (int64_t gate = 0; gate < kGates; ++gate) {
    pack_rows_as_lanes(weight + (gate * shape.hidden + block * L) * columns,
                       units_in<S>(block, shape.hidden), columns, panel + gate * L * P,
                       kGates * L * P);
  }
}

// See Forward::from_zeros; `panel` is that of the hidden units of one block.
template <typename S>
void add_up_zeros(const S* panel, int64_t hidden, Sum<S>* sums) {
  constexpr int64_t kVector = kLanes<S> * kPack<S>;
  const S zeros[kGroup<S> * kPack<S>] = {};
  Tile<Sum<S>, 1, kGates> tile;
  clear(tile);
  add_products(tile, Left<S>{zeros, 0, 0}, Right<S>{panel, kVector, kGates * kVector},
               hidden / kPack<S>);
  for (int gate = 0; gate < kGates; ++gate) store(sums + gate * kLanes<S>, tile.sum[0][gate]);
}

template <typename S>
void pack_gate_panels(const Shape& shape, const Weights<S>& weights, int64_t from, int64_t to,
                      S* panels, Sum<S>* bias, Sum<S>* from_zeros) {
  constexpr int64_t L = kLanes<S>;
  for (int64_t block = from; block < to; ++block) {
    S* panel = panels + block * gate_panel_size<S>(shape);
    pack_columns_of_block(shape, weights.input_hidden, shape.inputs, block, panel);
    pack_columns_of_block(shape, weights.hidden_hidden, shape.hidden, block,
                          panel + shape.inputs * kGates * L);
    add_up_zeros(panel + shape.inputs * kGates * L, shape.hidden, from_zeros + block * kGates * L);
    Sum<S>* sums = bias + block * kSums * L;
    std::fill_n(sums, kSums * L, Sum<S>(0));
    for (int64_t gate = 0; gate < kGates; ++gate) {
      for (int64_t unit = 0; unit < units_in<S>(block, shape.hidden); ++unit) {
        const int64_t at = gate * shape.hidden + block * L + unit;
        if (weights.input_bias) sums[kOfInputs[gate] * L + unit] += weights.input_bias[at];
        if (weights.hidden_bias) sums[kOfHidden[gate] * L + unit] += weights.hidden_bias[at];
      }
    }
  }
}

template <typename S>
int64_t column_panel_size(const Shape& shape) {
  return blocks_of<S>(shape.hidden) * kGates * kLanes<S> * kLanes<S>;
}

template <typename S>
void pack_column_panels(const Shape& shape, const S* weight, int64_t columns, int64_t from,
                        int64_t to, S* panels) {
  constexpr int64_t L = kLanes<S>;
  constexpr int64_t P = kPack<S>;
  for (int64_t block = from; block < to; ++block) {
    S* lanes = panels + block * column_panel_size<S>(shape);
    const int64_t width = units_in<S>(block, columns);
    for (int64_t units = 0; units < blocks_of<S>(shape.hidden); ++units) {
      for (int64_t gate = 0; gate < kGates; ++gate) {
        for (int64_t unit = units * L; unit < (units + 1) * L; ++unit) {
          const S* row = weight + (gate * shape.hidden + unit) * columns + block * L;
          const int64_t filled = unit < shape.hidden ? width : 0;
          S* packs = lanes + unit % P;
          for (int64_t lane = 0; lane < filled; ++lane) packs[lane * P] = row[lane];
          for (int64_t lane = filled; lane < L; ++lane) packs[lane * P] = 0;
          if (unit % P == P - 1) lanes += L * P;
        }
      }
    }
  }
}
