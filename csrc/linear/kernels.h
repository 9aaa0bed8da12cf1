// The kernels of linear layers. Included once per instruction set (see common/each_isa.h).

#if EHRSEQ_ISA_LEVEL == 2
#define EHRSEQ_VECTOR_BYTES 64
#define EHRSEQ_TILE_ROWS 6
#elif EHRSEQ_ISA_LEVEL == 1
#define EHRSEQ_VECTOR_BYTES 32
#define EHRSEQ_TILE_ROWS 3
#else
#define EHRSEQ_VECTOR_BYTES 16
#define EHRSEQ_TILE_ROWS 2
#endif

namespace ehrseq::linear::EHRSEQ_ISA {

#include "common/tile.h"
// Order matters: it builds on tile.h.
#include "common/activations.h"

constexpr int64_t kPanelVectors = 4;

template <typename T>
EHRSEQ_INLINE Vector<T> relu(Vector<T> x) {
  return x < Vector<T>{} ? Vector<T>{} : x;  // a NaN passes
}

template <typename T>
EHRSEQ_INLINE Vector<T> activate(Activation activation, Vector<T> x) {
  switch (activation) {
    case Activation::kRelu:
      return relu<T>(x);
    case Activation::kTanh:
      return tanh(x);
    case Activation::kSigmoid:
      return sigmoid(x);
    default:
      return x;
  }
}

// The gradient before the activation, from that after it and from what the activation gave.
template <typename T>
EHRSEQ_INLINE Vector<T> activate_back(Activation activation, Vector<T> grad, Vector<T> out) {
  const T one = 1;
  switch (activation) {
    case Activation::kRelu:
      return out <= Vector<T>{} ? Vector<T>{} : grad;
    case Activation::kTanh:
      return grad * (one - out * out);
    case Activation::kSigmoid:
      return grad * (one - out) * out;
    default:
      return grad;
  }
}

template <typename T>
void pack_unit_panels(const Shape& shape, const T* weight, int64_t from, int64_t to, T* panels) {
  constexpr int64_t L = kLanes<T>;
  for (int64_t block = from; block < to; ++block) {
    pack_rows_as_lanes(weight + block * L * shape.inputs, units_in<T>(block, shape.units),
                       shape.inputs, panels + block * shape.inputs * L, L);
  }
}

template <typename T>
int64_t input_panel_size(const Shape& shape) {
  return blocks_of<T>(shape.units) * kLanes<T> * kLanes<T>;
}

template <typename T>
void pack_input_panels(const Shape& shape, const T* weight, int64_t from, int64_t to, T* panels) {
  constexpr int64_t L = kLanes<T>;
  for (int64_t block = from; block < to; ++block) {
    T* panel = panels + block * input_panel_size<T>(shape);
    for (int64_t unit = 0; unit < blocks_of<T>(shape.units) * L; ++unit, panel += L) {
      Vector<T> row = {};
      if (unit < shape.units) {
        row = load_some(weight + unit * shape.inputs + block * L, units_in<T>(block, shape.inputs));
      }
      store(panel, row);
    }
  }
}

template <typename T, int V, int R>
void layer_tile(const Forward<T>& layer, int64_t block, int64_t row, T* out) {
  constexpr int64_t L = kLanes<T>;
  const Shape& shape = layer.shape;
  Tile<T, R, V> tile;
  for (int v = 0; v < V; ++v) {
    Vector<T> bias = {};
    if (layer.bias) {
      bias = load_some(layer.bias + (block + v) * L, units_in<T>(block + v, shape.units));
    }
    for (int r = 0; r < R; ++r) tile.sum[r][v] = bias;
  }
  add_products(tile, Left<T>{layer.input + row * shape.inputs, shape.inputs, 1},
               Right<T>{layer.unit_panels + block * shape.inputs * L, shape.inputs * L, L},
               shape.inputs);
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < V; ++v) {
      store_some(out + r * shape.units + (block + v) * L,
                 activate<T>(layer.activation, tile.sum[r][v]),
                 units_in<T>(block + v, shape.units));
    }
  }
}

template <typename T>
void layer(const Forward<T>& layer, int64_t from, int64_t to, T* out) {
  for (int64_t first = from; first < to; first += kRowsTogether) {
    for_block_groups(0, blocks_of<T>(layer.shape.units), [&](int64_t block, auto vectors) {
      for_row_tiles(first, std::min(first + kRowsTogether, to), [&](int64_t row, auto rows) {
        layer_tile<T, decltype(vectors)::value, decltype(rows)::value>(
            layer, block, row, out + (row - from) * layer.shape.units);
      });
    });
  }
}

// What dropout multiplies `count` units by.
template <typename T>
EHRSEQ_INLINE Vector<T> dropout_factors(const Head<T>& head, int64_t at, int64_t count) {
  typedef uint8_t Bytes __attribute__((vector_size(EHRSEQ_VECTOR_BYTES / sizeof(T))));
  if (!head.kept) return splat(T(1));
  Bytes bytes = {};
  if (count >= kLanes<T>) {
    std::memcpy(&bytes, head.kept + at, sizeof(bytes));
  } else {
    std::memcpy(&bytes, head.kept + at, count);
  }
  return __builtin_convertvector((Bytes)(bytes != 0) & 1, Vector<T>) * head.scale;
}

template <typename T>
EHRSEQ_INLINE T sum_of_lanes(Vector<T> value) {
  T sum = value[0];
  for (int64_t lane = 1; lane < kLanes<T>; ++lane) sum += value[lane];
  return sum;
}

template <typename T>
void hazards(const Shape& shape, const Head<T>& head, int64_t from, int64_t to, const T* hidden,
             T* out) {
  constexpr int64_t L = kLanes<T>;
  for (int64_t row = from; row < to; row += L) {
    const int64_t rows = std::min(L, to - row);
    T logits[L] = {};
    for (int64_t r = 0; r < rows; ++r, hidden += shape.units) {
      Vector<T> sum = {};
      for (int64_t block = 0; block < blocks_of<T>(shape.units); ++block) {
        const int64_t units = units_in<T>(block, shape.units);
        const Vector<T> factors = dropout_factors(head, (row + r) * shape.units + block * L, units);
        sum += load_some(hidden + block * L, units) * factors *
               load_some(head.last_weight + block * L, units);
      }
      logits[r] = sum_of_lanes<T>(sum) + *head.last_bias;
    }
    store_some(out + row, sigmoid(load(logits)), rows);
  }
}

template <typename T>
EHRSEQ_INLINE T* unit_gradients(const Backward<T>& layer, int64_t block, int64_t row) {
  return layer.unit_gradients + (block * layer.chunk_size + row - layer.chunk_row) * kLanes<T>;
}

template <typename T>
void layer_gradients(const Backward<T>& layer, Activation activation, const T* grad, const T* out,
                     int64_t from, int64_t to) {
  constexpr int64_t L = kLanes<T>;
  for (int64_t row = from; row < to; ++row) {
    for (int64_t block = 0; block < blocks_of<T>(layer.shape.units); ++block) {
      const int64_t at = row * layer.shape.units + block * L;
      const int64_t units = units_in<T>(block, layer.shape.units);
      store(unit_gradients(layer, block, row),
            activate_back<T>(activation, load_some(grad + at, units), load_some(out + at, units)));
    }
  }
}

template <typename T>
void head_gradients(const Backward<T>& layer, const Head<T>& head, const T* logit_gradients,
                    const T* hidden, int64_t from, int64_t to) {
  constexpr int64_t L = kLanes<T>;
  for (int64_t row = from; row < to; ++row) {
    for (int64_t block = 0; block < blocks_of<T>(layer.shape.units); ++block) {
      const int64_t at = row * layer.shape.units + block * L;
      const int64_t units = units_in<T>(block, layer.shape.units);
      const Vector<T> grad = logit_gradients[row] * load_some(head.last_weight + block * L, units) *
                             dropout_factors(head, at, units);
      // Beyond the units the hidden ones are 0, and so are their gradients.
      store(unit_gradients(layer, block, row),
            activate_back<T>(Activation::kRelu, grad, load_some(hidden + at, units)));
    }
  }
}

template <typename T>
void logit_gradients(const T* grad, const T* hazards, int64_t count, T* out) {
  constexpr int64_t L = kLanes<T>;
  for (int64_t at = 0; at < count; at += L) {
    const int64_t taken = std::min(L, count - at);
    store_some(out + at,
               activate_back<T>(Activation::kSigmoid, load_some(grad + at, taken),
                                load_some(hazards + at, taken)),
               taken);
  }
}

template <typename T, int V, int R>
void grad_input_tile(const Backward<T>& layer, int64_t block, int64_t row) {
  constexpr int64_t L = kLanes<T>;
  const Shape& shape = layer.shape;
  const int64_t panel = input_panel_size<T>(shape);
  const T* panels = layer.input_panels + block * panel;
  Tile<T, R, V> tile;
  clear(tile);
  for (int64_t units = 0; units < blocks_of<T>(shape.units); ++units, panels += L * L) {
    add_products(tile, Left<T>{unit_gradients(layer, units, row), L, 1}, Right<T>{panels, panel, L},
                 L);
  }
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < V; ++v) {
      store_some(layer.grad_input + (row + r) * shape.inputs + (block + v) * L, tile.sum[r][v],
                 units_in<T>(block + v, shape.inputs));
    }
  }
}

template <typename T>
void grad_input(const Backward<T>& layer, int64_t from, int64_t to) {
  for (int64_t first = from; first < to; first += kRowsTogether) {
    for_block_groups(0, blocks_of<T>(layer.shape.inputs), [&](int64_t block, auto vectors) {
      for_row_tiles(first, std::min(first + kRowsTogether, to), [&](int64_t row, auto rows) {
        grad_input_tile<T, decltype(vectors)::value, decltype(rows)::value>(layer, block, row);
      });
    });
  }
}

template <typename T>
int64_t panels_of_inputs(const Shape& shape) {
  return (blocks_of<T>(shape.inputs) + kPanelVectors - 1) / kPanelVectors;
}

template <typename T>
int64_t padded_inputs(const Shape& shape) {
  return panels_of_inputs<T>(shape) * kPanelVectors * kLanes<T>;
}

template <typename T, int R>
void weight_tile(const T* gradients, const T* panel, int64_t depth, T* sums, int64_t row_stride) {
  constexpr int64_t L = kLanes<T>;
  Tile<T, R, kPanelVectors> tile;
  clear(tile);
  add_products(tile, Left<T>{gradients, 1, L}, Right<T>{panel, L, kPanelVectors * L}, depth);
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < kPanelVectors; ++v) {
      T* sum = sums + r * row_stride + v * L;
      store(sum, load(sum) + tile.sum[r][v]);
    }
  }
}

template <typename T>
void add_to_weights(const Backward<T>& layer, int64_t row, int64_t rows, int64_t from, int64_t to,
                    T* scratch) {
  constexpr int64_t L = kLanes<T>;
  constexpr int64_t kWidth = kPanelVectors * L;
  const int64_t inputs = layer.shape.inputs;
  const int64_t width = padded_inputs<T>(layer.shape);
  for (const int64_t last = row + rows; row < last; row += kDepth) {
    const int64_t depth = std::min(kDepth, last - row);
    for (int64_t k = 0; k < depth; ++k) {
      for (int64_t at = 0; at < width; at += kWidth) {
        T* to_panel = scratch + at * kDepth + k * kWidth;
        const int64_t taken = std::min(kWidth, inputs - at);
        std::memcpy(to_panel, layer.input + (row + k) * inputs + at, taken * sizeof(T));
        std::fill(to_panel + taken, to_panel + kWidth, T(0));
      }
    }
    for (int64_t block = from; block < to; ++block) {
      const T* gradients = unit_gradients(layer, block, row);
      T* sums = layer.weight_sums + block * L * width;
      for_row_tiles(0, L, [&](int64_t unit, auto units) {
        for (int64_t at = 0; at < width; at += kWidth) {
          weight_tile<T, decltype(units)::value>(gradients + unit, scratch + at * kDepth, depth,
                                                 sums + unit * width + at, width);
        }
      });
      Vector<T> sum = {};
      for (int64_t k = 0; k < depth; ++k) sum += load(gradients + k * L);
      store(layer.bias_sums + block * L, load(layer.bias_sums + block * L) + sum);
    }
  }
}

template <typename T>
void add_to_last_weight(const Backward<T>& layer, const Head<T>& head, const T* logit_gradients,
                        const T* hidden, int64_t row, int64_t rows, int64_t from, int64_t to,
                        T* sums) {
  constexpr int64_t L = kLanes<T>;
  for (const int64_t last = row + rows; row < last; row += kDepth) {
    const int64_t end = std::min(row + kDepth, last);
    for (int64_t block = from; block < to; ++block) {
      const int64_t units = units_in<T>(block, layer.shape.units);
      Vector<T> sum = {};
      for (int64_t k = row; k < end; ++k) {
        const int64_t at = k * layer.shape.units + block * L;
        sum +=
            logit_gradients[k] * (load_some(hidden + at, units) * dropout_factors(head, at, units));
      }
      store(sums + block * L, load(sums + block * L) + sum);
    }
  }
}

template <typename T>
Kernels<T> table() {
  return {kLanes<T>,     pack_unit_panels<T>, pack_input_panels<T>,  layer<T>,
          hazards<T>,    layer_gradients<T>,  head_gradients<T>,     logit_gradients<T>,
          grad_input<T>, add_to_weights<T>,   add_to_last_weight<T>, padded_inputs<T>};
}

inline const Kernels<float>& float_kernels() {
  static const Kernels<float> kernels = table<float>();
  return kernels;
}

inline const Kernels<double>& double_kernels() {
  static const Kernels<double> kernels = table<double>();
  return kernels;
}

}  // namespace ehrseq::linear::EHRSEQ_ISA

#undef EHRSEQ_VECTOR_BYTES
#undef EHRSEQ_TILE_ROWS
