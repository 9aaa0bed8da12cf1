// Weights in the order in which the tiles read them, packed once per call. Included once per
// instruction set (see kernels_impl.h).

template <typename S>
int64_t blocks_of(int64_t units) {
  return (units + kLanes<S> - 1) / kLanes<S>;
}

// How many units of `block` there are; fewer than the lanes in the last one.
template <typename S>
EHRSEQ_INLINE int64_t units_in(int64_t block, int64_t units) {
  return std::min(kLanes<S>, units - block * kLanes<S>);
}

template <typename S>
int64_t gate_panel_size(const Shape& shape) {
  return (shape.inputs + shape.hidden) * kGates * kLanes<S>;
}

// Columns of `weight` [4 * hidden, columns] for the units of one block: [column][gate][L], in
// packs.
template <typename S>
void pack_columns_of_block(const Shape& shape, const S* weight, int64_t columns, int64_t block,
                           S* panel) {
  constexpr int64_t L = kLanes<S>;
  constexpr int64_t P = kPack<S>;
  const int64_t units = units_in<S>(block, shape.hidden);
  for (int64_t gate = 0; gate < kGates; ++gate) {
    const S* rows = weight + (gate * shape.hidden + block * L) * columns;
    for (int64_t k = 0; k < columns; ++k) {
      S* lanes = panel + (k / P * kGates + gate) * L * P + k % P;
      for (int64_t unit = 0; unit < units; ++unit) lanes[unit * P] = rows[unit * columns + k];
      for (int64_t unit = units; unit < L; ++unit) lanes[unit * P] = 0;
    }
  }
}

template <typename S>
void pack_gate_panels(const Shape& shape, const Weights<S>& weights, int64_t from, int64_t to,
                      S* panels, Sum<S>* bias) {
  constexpr int64_t L = kLanes<S>;
  for (int64_t block = from; block < to; ++block) {
    S* panel = panels + block * gate_panel_size<S>(shape);
    pack_columns_of_block(shape, weights.input_hidden, shape.inputs, block, panel);
    pack_columns_of_block(shape, weights.hidden_hidden, shape.hidden, block,
                          panel + shape.inputs * kGates * L);
    for (int64_t gate = 0; gate < kGates; ++gate) {
      for (int64_t unit = 0; unit < L; ++unit) {
        const int64_t at = gate * shape.hidden + block * L + unit;
        Sum<S> sum = 0;
        if (block * L + unit < shape.hidden) {
          if (weights.input_bias) sum += weights.input_bias[at];
          if (weights.hidden_bias) sum += weights.hidden_bias[at];
        }
        bias[(block * kGates + gate) * L + unit] = sum;
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
