// Weights in the order in which the tiles read them, packed once per call. Included once per
// instruction set (see kernels_impl.h).

template <typename T>
int64_t blocks_of(int64_t units) {
  return (units + kLanes<T> - 1) / kLanes<T>;
}

// How many units of `block` there are; fewer than the lanes in the last one.
template <typename T>
EHRSEQ_INLINE int64_t units_in(int64_t block, int64_t units) {
  return std::min(kLanes<T>, units - block * kLanes<T>);
}

template <typename T>
int64_t gate_panel_size(const Shape& shape) {
  return (shape.inputs + shape.hidden) * kGates * kLanes<T>;
}

// Columns of `weight` [4 * hidden, columns] for the units of one block: [column][gate][L].
template <typename T>
void pack_columns_of_block(const Shape& shape, const T* weight, int64_t columns, int64_t block,
                           T* panel) {
  constexpr int64_t L = kLanes<T>;
  const int64_t units = units_in<T>(block, shape.hidden);
  for (int64_t gate = 0; gate < kGates; ++gate) {
    const T* rows = weight + (gate * shape.hidden + block * L) * columns;
    for (int64_t k = 0; k < columns; ++k) {
      T* lanes = panel + (k * kGates + gate) * L;
      for (int64_t unit = 0; unit < units; ++unit) lanes[unit] = rows[unit * columns + k];
      for (int64_t unit = units; unit < L; ++unit) lanes[unit] = 0;
    }
  }
}

template <typename T>
void pack_gate_panels(const Shape& shape, const Weights<T>& weights, int64_t from, int64_t to,
                      T* panels, T* bias) {
  constexpr int64_t L = kLanes<T>;
  for (int64_t block = from; block < to; ++block) {
    T* panel = panels + block * gate_panel_size<T>(shape);
    pack_columns_of_block(shape, weights.input_hidden, shape.inputs, block, panel);
    pack_columns_of_block(shape, weights.hidden_hidden, shape.hidden, block,
                          panel + shape.inputs * kGates * L);
    for (int64_t gate = 0; gate < kGates; ++gate) {
      for (int64_t unit = 0; unit < L; ++unit) {
        const int64_t at = gate * shape.hidden + block * L + unit;
        T sum = 0;
        if (block * L + unit < shape.hidden) {
          if (weights.input_bias) sum += weights.input_bias[at];
          if (weights.hidden_bias) sum += weights.hidden_bias[at];
        }
        bias[(block * kGates + gate) * L + unit] = sum;
      }
    }
  }
}

template <typename T>
int64_t column_panel_size(const Shape& shape) {
  return blocks_of<T>(shape.hidden) * kGates * kLanes<T> * kLanes<T>;
}

template <typename T>
void pack_column_panels(const Shape& shape, const T* weight, int64_t columns, int64_t from,
                        int64_t to, T* panels) {
  constexpr int64_t L = kLanes<T>;
  for (int64_t block = from; block < to; ++block) {
    T* lanes = panels + block * column_panel_size<T>(shape);
    const int64_t width = units_in<T>(block, columns);
    for (int64_t units = 0; units < blocks_of<T>(shape.hidden); ++units) {
      for (int64_t gate = 0; gate < kGates; ++gate) {
        for (int64_t unit = units * L; unit < (units + 1) * L; ++unit, lanes += L) {
          const T* row = weight + (gate * shape.hidden + unit) * columns + block * L;
          store(lanes, unit < shape.hidden ? load_some(row, width) : Vector<T>{});
        }
      }
    }
  }
}
