// What the kernels of linear layers compute and on which memory, apart from any instruction set.
//
// L lanes per vector, blocks of L units (outputs) or inputs, the last one filled up with zeros:
//   unit panels     [block of units][input][L]: the weight as the forward pass reads it
//   input panels    [block of inputs][unit, filled up to blocks][L]: as the backward pass reads it
//   unit gradients  [block of units][row of the chunk][L]: the gradient before the activation; both
//                   products over them then read rows of L in a stream
#pragma once

#include <cstdint>

namespace ehrseq::linear {

enum class Activation : int64_t { kNone, kRelu, kTanh, kSigmoid };
constexpr int64_t kLastActivation = 3;

struct Shape {
  int64_t rows;
  int64_t inputs;
  int64_t units;
};

template <typename T>
struct Forward {
  Shape shape;
  Activation activation;
  const T* input;        // [rows, inputs]
  const T* unit_panels;  // see above
  const T* bias;         // [units], or null
};

// What a hazard head does with its hidden units: dropout, a second layer of one unit, a sigmoid.
// `kept` [rows, units] is null without dropout, else zero where a unit is dropped.
template <typename T>
struct Head {
  const uint8_t* kept;
  T scale;
  const T* last_weight;  // [units]
  const T* last_bias;    // [1]
};

// The backward pass processes the rows in chunks, so that the gradients of a chunk's units stay in
// the cache until everything is computed from them. A null pointer is a result that is not needed.
template <typename T>
struct Backward {
  Shape shape;
  const T* input;
  const T* input_panels;
  int64_t chunk_row;
  int64_t chunk_size;
  T* unit_gradients;
  T* grad_input;
  T* weight_sums;  // [units, filled up to blocks][padded inputs]
  T* bias_sums;    // [units, filled up to blocks]
};

template <typename T>
struct Kernels {
  int64_t lanes;

  // Blocks [from, to).
  void (*pack_unit_panels)(const Shape&, const T* weight, int64_t from, int64_t to, T* panels);
  void (*pack_input_panels)(const Shape&, const T* weight, int64_t from, int64_t to, T* panels);

  // Rows [from, to); `out` is the place of the first of them.
  void (*layer)(const Forward<T>&, int64_t from, int64_t to, T* out);
  // From hidden units `hidden` of rows [from, to), again from the first of them on.
  void (*hazards)(const Shape&, const Head<T>&, int64_t from, int64_t to, const T* hidden,
                  T* hazards);

  // Rows [from, to) of the chunk: the gradients of the units from those of what the layer gave, or
  // of a head from those of its logits.
  void (*layer_gradients)(const Backward<T>&, Activation, const T* grad, const T* out, int64_t from,
                          int64_t to);
  void (*head_gradients)(const Backward<T>&, const Head<T>&, const T* logit_gradients,
                         const T* hidden, int64_t from, int64_t to);
  // From the gradients of hazards to those of logits.
  void (*logit_gradients)(const T* grad, const T* hazards, int64_t count, T* out);
  void (*grad_input)(const Backward<T>&, int64_t from, int64_t to);
  // Adds rows [row, row + rows) to the sums of blocks of units [from, to). `scratch` holds
  // kDepth * padded_inputs elements.
  void (*add_to_weights)(const Backward<T>&, int64_t row, int64_t rows, int64_t from, int64_t to,
                         T* scratch);
  void (*add_to_last_weight)(const Backward<T>&, const Head<T>&, const T* logit_gradients,
                             const T* hidden, int64_t row, int64_t rows, int64_t from, int64_t to,
                             T* sums);
  int64_t (*padded_inputs)(const Shape&);
};

// Sums over rows are formed in registers so many rows at a time.
constexpr int64_t kDepth = 256;

// Rows that go through all blocks together: they stay in the second-level cache.
constexpr int64_t kRowsTogether = 96;

// For the running CPU.
template <typename T>
const Kernels<T>& kernels();

}  // namespace ehrseq::linear
