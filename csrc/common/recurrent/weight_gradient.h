// Gradients of both weights and of the biases: (gradients of the sums)^T x [input, state before],
// summed over visits. Included once per instruction set and cell (see kernels.h).
//
// Visits are taken kWeightDepth at a time; the sums of one such slice are formed in registers and
// then added, in the order of the visits, so that the error of a long sum stays that of a short
// one.

constexpr int64_t kPanelVectors = 4;

template <typename S>
int64_t panels_of_factors(const Shape& shape) {
  return (shape.inputs + shape.hidden + kPanelVectors * kLanes<S> - 1) /
         (kPanelVectors * kLanes<S>);
}

template <typename S>
int64_t padded_factors(const Shape& shape) {
  return panels_of_factors<S>(shape) * kPanelVectors * kLanes<S>;
}

// The factors [input, state before] of one pack of visits from `row` on, spread over the panels; of
// visits from `end` on, zeros.
template <typename S>
void pack_factors(const Backward<S>& layer, int64_t row, int64_t end, int64_t pack, S* panels) {
  constexpr int64_t P = kPack<S>;
  constexpr int64_t kWidth = kPanelVectors * kLanes<S>;
  const Shape& shape = layer.shape;
  const S* inputs[P];
  const S* states[P];
  const S* nothing[P];
  for (int64_t i = 0; i < P; ++i) {
    inputs[i] = states[i] = nothing[i] = layer.zeros;
    if (row + i >= end) continue;
    inputs[i] = layer.input + (row + i) * shape.inputs;
    const int64_t before = layer.order.row_before[row + i];
    if (before >= 0) {
      states[i] = layer.output + before * shape.hidden;
    } else if (layer.h0) {
      states[i] = layer.h0 + layer.order.patient[row + i] * shape.hidden;
    }
  }

  int64_t at = 0;
  const auto append = [&](const S* const(&values)[P], int64_t count) {
    for (int64_t taken = 0; taken < count;) {
      const int64_t run = std::min(count - taken, kWidth - at % kWidth);
      S* to = panels + at / kWidth * kWidth * kWeightDepth + (pack * kWidth + at % kWidth) * P;
      if constexpr (P == 1) {
        std::memcpy(to, values[0] + taken, run * sizeof(S));
      } else {
        const S* first = values[0] + taken;
        const S* second = values[1] + taken;
        for (int64_t i = 0; i < run; ++i) {
          to[2 * i] = first[i];
          to[2 * i + 1] = second[i];
        }
      }
      at += run;
      taken += run;
    }
  };
  append(inputs, shape.inputs);
  append(states, shape.hidden);
  append(nothing, padded_factors<S>(shape) - at);
}

template <typename S, int R>
void weight_tile(const S* gradients, const S* panel, int64_t packs, Rows<R> rows, Sum<S>* sums,
                 int64_t row_stride) {
  const int height = rows;
  constexpr int64_t L = kLanes<S>;
  constexpr int64_t P = kPack<S>;
  // The sums of all weights do not fit the second-level cache.
#pragma GCC unroll 8
  for (int r = 0; r < height; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < kPanelVectors; ++v) __builtin_prefetch(sums + r * row_stride + v * L, 1);
  }
  Tile<Sum<S>, R, kPanelVectors> tile{rows};
  clear(tile);
  constexpr int64_t kRow = kGroup<S> * P;
  add_products(tile, Left<S>{gradients, kRow, L * kRow},
               Right<S>{panel, L * P, kPanelVectors * L * P}, packs);
#pragma GCC unroll 8
  for (int r = 0; r < height; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < kPanelVectors; ++v) {
      Sum<S>* sum = sums + r * row_stride + v * L;
      store(sum, load(sum) + tile.sum[r][v]);
    }
  }
}

// Gradients [depth][L] of one sum in packs along the depth: [pack / kGroup][L][pack % kGroup].
template <typename S>
void pack_gradients(const S* gradients, int64_t depth, const S* zeros, S* packs) {
  constexpr int64_t L = kLanes<S>;
  [[maybe_unused]] S* const first_pack = packs;
  for (int64_t k = 0; k < depth; k += 2, packs += 2 * L) {
    const S* first = gradients + k * L;
    const S* second = k + 1 < depth ? first + L : zeros;
    for (int64_t unit = 0; unit < L; ++unit) {
      packs[2 * unit] = first[unit];
      packs[2 * unit + 1] = second[unit];
    }
  }
#ifdef EHRSEQ_BFLOAT16_TILES
  static_assert(kGroup<S> == L);
  for (S* group = first_pack; group < packs; group += kGroup<S> * 2 * L) {
    Vector<uint32_t> square[L] = {};
    const int64_t filled = std::min<int64_t>(sizeof(square), (packs - group) * sizeof(S));
    std::memcpy(square, group, filled);
    transpose<uint32_t, L>(square);
    std::memcpy(group, square, sizeof(square));
  }
#endif
}

// Whether one of a block's sums takes the products with the inputs, or with the hidden state.
EHRSEQ_INLINE constexpr bool takes(int64_t sum, const int64_t (&of)[kGates]) {
  for (const int64_t taking : of) {
    if (taking == sum) return true;
  }
  return false;
}

template <typename S>
void add_weight_slice(const Backward<S>& layer, int64_t sum, int64_t first_row, int64_t depth,
                      const S* panels, Sum<S>* sums, Sum<S>* bias) {
  constexpr int64_t L = kLanes<S>;
  constexpr int64_t P = kPack<S>;
  const int64_t width = padded_factors<S>(layer.shape);
  const int64_t inputs = layer.shape.inputs;
  // The panel in which the inputs end may hold states too.
  const int64_t first_panel = takes(sum % kSums, kOfInputs) ? 0 : inputs / (kPanelVectors * L);
  const int64_t last_panel = takes(sum % kSums, kOfHidden)
                                 ? panels_of_factors<S>(layer.shape)
                                 : (inputs + kPanelVectors * L - 1) / (kPanelVectors * L);
  const S* gradients = sum_gradient(layer, sum, first_row);
  const S* packed = gradients;
  S buffer[P == 1 ? 1 : kWeightDepth * L];
  if constexpr (P == 2) {
    pack_gradients(gradients, depth, layer.zeros, buffer);
    packed = buffer;
  }
  for_row_tiles(0, L, [&](int64_t unit, auto rows) {
    for (int64_t panel = first_panel; panel < last_panel; ++panel) {
      weight_tile<S>(packed + unit * kGroup<S> * P,
                     panels + panel * kWeightDepth * kPanelVectors * L, (depth + P - 1) / P, rows,
                     sums + unit * width + panel * kPanelVectors * L, width);
    }
  });
  Vector<Sum<S>> total = {};
  for (int64_t k = 0; k < depth; ++k) total += load(gradients + k * L);
  store(bias, load(bias) + total);
}

template <typename S>
void add_to_weights(const Backward<S>& layer, int64_t row, int64_t rows, int64_t from, int64_t to,
                    S* scratch) {
  constexpr int64_t L = kLanes<S>;
  const int64_t width = padded_factors<S>(layer.shape);
  for (const int64_t last = row + rows; row < last; row += kWeightDepth) {
    const int64_t depth = std::min(kWeightDepth, last - row);
    for (int64_t k = 0; k < depth; k += kPack<S>) {
      pack_factors(layer, row + k, last, k / kPack<S>, scratch);
    }
    for (int64_t sum = from; sum < to; ++sum) {
      add_weight_slice(layer, sum, row, depth, scratch, layer.weight_sums + sum * L * width,
                       layer.bias_sums + sum * L);
    }
  }
}

template <typename S>
void finish_weights(const Backward<S>& layer, int64_t from, int64_t to) {
  constexpr int64_t L = kLanes<S>;
  const Shape& shape = layer.shape;
  const int64_t width = padded_factors<S>(shape);
  for (int64_t block = from; block < to; ++block) {
    for (int64_t gate = 0; gate < kGates; ++gate) {
      const int64_t of_inputs = (block * kSums + kOfInputs[gate]) * L;
      const int64_t of_hidden = (block * kSums + kOfHidden[gate]) * L;
      for (int64_t unit = 0; unit < units_in<S>(block, shape.hidden); ++unit) {
        const int64_t at = gate * shape.hidden + block * L + unit;
        std::copy_n(layer.weight_sums + (of_inputs + unit) * width, shape.inputs,
                    layer.grad_input_hidden + at * shape.inputs);
        std::copy_n(layer.weight_sums + (of_hidden + unit) * width + shape.inputs, shape.hidden,
                    layer.grad_hidden_hidden + at * shape.hidden);
        layer.grad_input_bias[at] = layer.bias_sums[of_inputs + unit];
        if (layer.grad_hidden_bias) layer.grad_hidden_bias[at] = layer.bias_sums[of_hidden + unit];
      }
    }
  }
}
