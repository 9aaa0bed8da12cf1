// The products of a linear layer and of its gradients: memory, chunks and threads. Every sum is cut
// at fixed places and runs in the order of the rows, so that its bits do not depend on the threads.
#pragma once

#include <algorithm>
#include <vector>

#include "common/checks.h"
#include "common/parallel.h"
#include "common/tensors.h"
#include "linear/layer.h"

namespace ehrseq::linear {

template <typename T>
int64_t blocks_of(int64_t count) {
  return (count + kernels<T>().lanes - 1) / kernels<T>().lanes;
}

inline int64_t threads_for(const Shape& shape) {
  // Below about this many multiplications waking a thread costs more than it saves.
  constexpr int64_t kWorthAThread = 1 << 21;
  const int64_t most = shape.rows * shape.inputs * shape.units / kWorthAThread;
  return std::clamp<int64_t>(most, 1, num_threads());
}

// Checks the input and the weight of all operators of the layer and of the hazard head.
inline Shape checked_shape(const char* name, const Tensor& input, const Tensor& weight) {
  expect_dim(input, name, "input", 2, "[rows, inputs]");
  expect_dtype(input, name, "input", {ScalarType::Float, ScalarType::Double});
  expect_dim(weight, name, "weight", 2, "[units, inputs]");
  const Shape shape{input.size(0), input.size(1), weight.size(0)};
  expect_shape(weight, name, "weight", {shape.units, shape.inputs}, "[units, inputs]");
  expect_dtype(weight, name, "weight", {input.scalar_type()});
  return shape;
}

inline void expect_like(const Tensor& tensor, const char* operation, const char* name,
                        const Tensor& input, const std::vector<int64_t>& shape, const char* names) {
  expect_shape(tensor, operation, name, shape, names);
  expect_dtype(tensor, operation, name, {input.scalar_type()});
}

template <typename Body>
void for_dtype(const Tensor& input, const Body& body) {
  if (input.scalar_type() == ScalarType::Double) {
    body(TypeTag<double>{});
  } else {
    body(TypeTag<float>{});
  }
}

// Calls body(layer, from, to, share) for rows [from, to), divided among threads.
template <typename T, typename Body>
void forward_products(const Tensor& like, const Shape& shape, Activation activation, const T* input,
                      const T* weight, const T* bias, const Body& body) {
  const Kernels<T>& run = kernels<T>();
  const int64_t threads = threads_for(shape);
  const int64_t blocks = blocks_of<T>(shape.units);
  const Tensor panels = scratch<T>(like, {blocks, shape.inputs, run.lanes});
  share_out(blocks, threads, [&](int64_t from, int64_t to, int64_t) {
    run.pack_unit_panels(shape, weight, from, to, data<T>(panels));
  });
  const Forward<T> layer{shape, activation, input, data<T>(panels), bias};
  share_out(shape.rows, threads,
            [&](int64_t from, int64_t to, int64_t share) { body(layer, from, to, share); });
}

struct Gradients {
  Tensor input;   // [rows, inputs], or nothing
  Tensor weight;  // [units, inputs], or nothing
  Tensor bias;    // [units], or nothing
};

// gradients(layer, from, to, share) makes those of the units of rows [from, to); also(layer, row,
// rows, from, to) is called for rows of a chunk and blocks of units [from, to) where weights are
// wanted.
template <typename T, typename UnitGradients, typename Also>
Gradients backward_products(const Tensor& like, const Shape& shape, const T* input, const T* weight,
                            bool need_input, bool need_weights, const UnitGradients& gradients,
                            const Also& also) {
  constexpr int64_t kChunkBytes = int64_t{4} << 20;
  const Kernels<T>& run = kernels<T>();
  const int64_t threads = threads_for(shape);
  const int64_t lanes = run.lanes;
  const int64_t blocks = blocks_of<T>(shape.units);
  const int64_t input_blocks = blocks_of<T>(shape.inputs);
  const int64_t width = run.padded_inputs(shape);
  const int64_t unit_bytes = std::max<int64_t>(1, blocks) * lanes * sizeof(T);
  const int64_t chunk_size =
      std::min(std::max(kChunkBytes / unit_bytes / kDepth, int64_t{1}) * kDepth, shape.rows);

  const auto wanted = [&](bool need, const std::vector<int64_t>& sizes) {
    return scratch<T>(like, need ? sizes : std::vector<int64_t>{0});
  };
  const Gradients results{wanted(need_input, {shape.rows, shape.inputs}),
                          wanted(need_weights, {shape.units, shape.inputs}),
                          wanted(need_weights, {shape.units})};
  const Tensor unit_gradients = scratch<T>(like, {blocks, chunk_size, lanes});
  const Tensor panels = wanted(need_input, {input_blocks, blocks * lanes, lanes});
  Tensor weight_sums = wanted(need_weights, {blocks * lanes, width});
  Tensor bias_sums = wanted(need_weights, {blocks * lanes});
  torch::stable::zero_(weight_sums);
  torch::stable::zero_(bias_sums);
  const Tensor factors = wanted(need_weights, {std::min(threads, blocks), kDepth * width});

  Backward<T> layer{shape,
                    input,
                    data<T>(panels),
                    0,
                    chunk_size,
                    data<T>(unit_gradients),
                    data<T>(results.input),
                    data<T>(weight_sums),
                    data<T>(bias_sums)};
  if (need_input) {
    share_out(input_blocks, threads, [&](int64_t from, int64_t to, int64_t) {
      run.pack_input_panels(shape, weight, from, to, data<T>(panels));
    });
  }
  for (int64_t row = 0; row < shape.rows; row += chunk_size) {
    const int64_t rows = std::min(chunk_size, shape.rows - row);
    layer.chunk_row = row;
    share_out(rows, threads, [&](int64_t from, int64_t to, int64_t share) {
      gradients(layer, row + from, row + to, share);
      if (need_input) run.grad_input(layer, row + from, row + to);
    });
    if (!need_weights) continue;
    share_out(blocks, threads, [&](int64_t from, int64_t to, int64_t share) {
      run.add_to_weights(layer, row, rows, from, to, data<T>(factors) + share * kDepth * width);
      also(layer, row, rows, from, to);
    });
  }
  if (need_weights) {
    for (int64_t unit = 0; unit < shape.units; ++unit) {
      std::copy_n(data<T>(weight_sums) + unit * width, shape.inputs,
                  data<T>(results.weight) + unit * shape.inputs);
    }
    std::copy_n(data<T>(bias_sums), shape.units, data<T>(results.bias));
  }
  return results;
}

}  // namespace ehrseq::linear
