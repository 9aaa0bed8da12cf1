// Gradients of both weights and of the bias: (gate gradients)^T x [input, state before the visit],
// summed over visits. Included once per instruction set (see kernels_impl.h).
//
// Visits are taken kWeightDepth at a time; the sums of one such slice are formed in registers and
// then added, in the order of the visits, so that the error of a long sum stays that of a short
// one.

constexpr int64_t kPanelVectors = 4;

template <typename T>
int64_t panels_of_factors(const Shape& shape) {
  return (shape.inputs + shape.hidden + kPanelVectors * kLanes<T> - 1) /
         (kPanelVectors * kLanes<T>);
}

template <typename T>
int64_t padded_factors(const Shape& shape) {
  return panels_of_factors<T>(shape) * kPanelVectors * kLanes<T>;
}

// One row [input, state before] of visit `row`, spread over the panels at depth k.
template <typename T>
void pack_factors(const Backward<T>& layer, int64_t row, int64_t k, T* panels) {
  constexpr int64_t kWidth = kPanelVectors * kLanes<T>;
  const Shape& shape = layer.shape;
  int64_t at = 0;
  const auto append = [&](const T* values, int64_t count) {
    while (count > 0) {
      const int64_t run = std::min(count, kWidth - at % kWidth);
      T* to = panels + (at / kWidth * kWeightDepth + k) * kWidth + at % kWidth;
      if (values) {
        std::memcpy(to, values, run * sizeof(T));
        values += run;
      } else {
        std::memset(to, 0, run * sizeof(T));
      }
      at += run;
      count -= run;
    }
  };
  append(layer.input + row * shape.inputs, shape.inputs);
  const int64_t before = layer.row_before[row];
  if (before >= 0) {
    append(layer.output + before * shape.hidden, shape.hidden);
  } else {
    append(layer.h0 ? layer.h0 + layer.patient[row] * shape.hidden : nullptr, shape.hidden);
  }
  append(nullptr, padded_factors<T>(shape) - at);
}

template <typename T, int R>
void weight_tile(const T* gates, const T* panel, int64_t depth, T* sums, int64_t row_stride) {
  constexpr int64_t L = kLanes<T>;
  Tile<T, R, kPanelVectors> tile;
  clear(tile);
  add_products(tile, Left<T>{gates, 1, L}, Right<T>{panel, L, kPanelVectors * L}, depth);
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < kPanelVectors; ++v) {
      T* sum = sums + r * row_stride + v * L;
      store(sum, load(sum) + tile.sum[r][v]);
    }
  }
}

template <typename T>
void add_weight_slice(const Backward<T>& layer, int64_t gate, int64_t first_row, int64_t depth,
                      const T* panels, T* sums, T* bias) {
  constexpr int64_t L = kLanes<T>;
  const int64_t width = padded_factors<T>(layer.shape);
  const T* gates = gate_gradient(layer, gate, first_row);
  for_row_tiles(0, L, [&](int64_t unit, auto rows) {
    for (int64_t panel = 0; panel < panels_of_factors<T>(layer.shape); ++panel) {
      weight_tile<T, decltype(rows)::value>(
          gates + unit, panels + panel * kWeightDepth * kPanelVectors * L, depth,
          sums + unit * width + panel * kPanelVectors * L, width);
    }
  });
  Vector<T> sum = {};
  for (int64_t k = 0; k < depth; ++k) sum += load(gates + k * L);
  store(bias, load(bias) + sum);
}

template <typename T>
void add_to_weights(const Backward<T>& layer, int64_t row, int64_t rows, int64_t from, int64_t to,
                    T* scratch) {
  constexpr int64_t L = kLanes<T>;
  const int64_t width = padded_factors<T>(layer.shape);
  for (const int64_t last = row + rows; row < last; row += kWeightDepth) {
    const int64_t depth = std::min(kWeightDepth, last - row);
    for (int64_t k = 0; k < depth; ++k) pack_factors(layer, row + k, k, scratch);
    for (int64_t gate = from; gate < to; ++gate) {
      add_weight_slice(layer, gate, row, depth, scratch, layer.weight_sums + gate * L * width,
                       layer.bias_sums + gate * L);
    }
  }
}

template <typename T>
void finish_weights(const Backward<T>& layer, int64_t from, int64_t to) {
  constexpr int64_t L = kLanes<T>;
  const Shape& shape = layer.shape;
  for (int64_t gate = from; gate < to; ++gate) {
    const int64_t block = gate / kGates;
    for (int64_t unit = 0; unit < units_in<T>(block, shape.hidden); ++unit) {
      const int64_t at = gate % kGates * shape.hidden + block * L + unit;
      const T* sum = layer.weight_sums + (gate * L + unit) * padded_factors<T>(shape);
      std::memcpy(layer.grad_input_hidden + at * shape.inputs, sum, shape.inputs * sizeof(T));
      std::memcpy(layer.grad_hidden_hidden + at * shape.hidden, sum + shape.inputs,
                  shape.hidden * sizeof(T));
      layer.grad_bias[at] = layer.bias_sums[gate * L + unit];
    }
  }
}
