// What the kernels of recurrent layers compute and on which memory, apart from any instruction set
// and from the cell (LSTM or GRU). One direction of one layer at a time; every count below is of
// that.
//
// Rows are visits in the order of PackedSequence: time-major, patients by falling length, so that
// at every time the patients with a visit are the first ones, and "patient p at time t" is the row
// steps[t].first_row + p.
//
// A cell is a struct `Cell` (packed_lstm/cell.h, packed_gru/cell.h):
//   kGates            blocks of `hidden` rows that its weights consist of, in PyTorch's order
//   kSums             sums of products that a visit's gates are computed from, per hidden unit: as
//                     many as gates, or more where a gate takes the products with the inputs and
//                     those with the hidden state apart
//   kOfInputs,        by gate: the sum that its products with the inputs, or with the hidden state,
//   kOfHidden         go to
//   kHasCellState     whether a cell state is carried beside the hidden one
// and, per instruction set, the mathematics of a visit (gates.h). What a cell carries from visit to
// visit apart from the rounded outputs, in full precision, is called `carried`: the cell state of
// the LSTM, the hidden state of the GRU.
//
// Layouts that only the kernels know; L lanes per vector, blocks of L hidden units:
//   gate panels     [block][k][gate][L]: the weights as the forward pass reads them, k running
//                   over the inputs and then the hidden units
//   column panels   [block of columns][block][gate][L][L]: as the backward pass reads them
//   (in bfloat16, both in pairs along what is summed over: [k / 2][gate][L][k % 2] and so on)
//   gates           [row][block][sum][L]: what the backward pass needs, kSums values per unit
//   carried         [row or patient][block][L]
//   sum gradients   [block][sum][row of the chunk][L]: both products over them then read rows of
//                   L in a stream, one along the sums, the other along the rows
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "common/dtypes.h"

namespace ehrseq::recurrent {

// Saved tensors are padded to this many hidden units, whatever the lanes of the running CPU are, so
// that their shapes do not depend on it.
constexpr int64_t kUnitPadding = 16;

inline int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

// The visits of one time. Whether the scan runs forward or in reverse is settled here: "before" and
// "after" are in the order of the scan.
struct Step {
  int64_t first_row;
  int64_t patients;
  int64_t row_before;  // first row of the step before this one
  int64_t continuing;  // patients below this come from there; the others start here
  int64_t row_after;   // first row of the step after this one
  int64_t staying;     // patients below this go on there; the others end here
};

struct Shape {
  int64_t inputs;
  int64_t hidden;
  int64_t visits;
  int64_t patients;

  int64_t padded_hidden() const { return round_up(hidden, kUnitPadding); }
};

// S is the type that inputs, weights and states are stored in; everything that adds up is Sum<S>.
template <typename S>
using Sum = accumulator_t<S>;

template <typename S>
struct Weights {
  const S* input_hidden;   // [gates * hidden, inputs]
  const S* hidden_hidden;  // [gates * hidden, hidden]
  const S* input_bias;     // [gates * hidden], or null
  const S* hidden_bias;
};

// Null pointers: h0 and `start` are zeros.
template <typename S>
struct Forward {
  Shape shape;
  const std::vector<Step>& steps;
  bool reverse;
  const S* input;
  const S* h0;
  const S* start;  // what is carried into a patient's first visit
  const S* panels;
  const Sum<S>* bias;  // [block][sum][L]
  // [block][gate][L]: what a state of zeros adds to the sums. Nothing, or NaN where a weight is not
  // finite.
  const Sum<S>* from_zeros;
  S* output;
  S* last_hidden;
  S* last_carried;  // null where that is the hidden state
  Sum<S>* gates;
  int64_t kept;  // gates of rows below this are kept for the backward pass
  Sum<S>* carried;
  bool carried_per_visit;  // else one row per patient, updated in place
  int64_t projected_from;  // rows from here on have their input products in `projected`
  Sum<S>* projected;       // laid out as gates; the same memory where all gates are kept
};

// Of each visit: the row of the one before it in the scan, -1 where its patient starts, and whose
// it is.
struct Order {
  const int64_t* row_before;
  const int64_t* patient;
};

// Where the gates of visits lie: kept ones row by row as above, those of a chunk that are computed
// again laid out as its sum gradients, which take their place one by one.
template <typename Value>
struct GatesAt {
  Value* first;  // of row `first_row`
  int64_t first_row;
  int64_t row_stride;
  int64_t block_stride;
  int64_t sum_stride;

  Value* at(int64_t row, int64_t block) const {
    return first + (row - first_row) * row_stride + block * block_stride;
  }
};

// The backward pass processes the visits in chunks of times, so that the gradients of the sums of
// one chunk stay in the cache until everything is computed from them, and those of all visits are
// never in memory at once. A null pointer is an incoming gradient of zero, or a result that is not
// needed.
template <typename S>
struct Backward {
  Shape shape;
  const std::vector<Step>& steps;
  bool reverse;
  const S* input;
  const S* h0;
  const S* start;
  const S* output;
  GatesAt<const Sum<S>> gates;
  const Sum<S>* carried;  // of every visit; null where that is the hidden state
  const S* grad_output;
  const S* grad_last_hidden;
  const S* grad_last_carried;
  const S* hidden_panels;
  const S* input_panels;
  Order order;
  const S* zeros;  // padded_factors of them

  int64_t chunk_row;   // the first row of the chunk
  int64_t chunk_size;  // the number of rows of `grad_sums`
  S* grad_sums;
  // What the scan hands from visit to visit: [patient][padded hidden]. That of the hidden state, as
  // far as it comes through the weights, only from chunk to chunk: within one it stays in
  // registers.
  Sum<S>* grad_hidden;
  Sum<S>* grad_carried;

  S* grad_input;
  Sum<S>* grad_h0;      // [patients, hidden], through the weights alone
  Sum<S>* weight_sums;  // [sum of a block][L][padded inputs + hidden]
  Sum<S>* bias_sums;    // [sum of a block][L]
  S* grad_input_hidden;
  S* grad_hidden_hidden;
  S* grad_input_bias;
  S* grad_hidden_bias;  // null where it equals that of the input
};

// Times [first, last).
struct Times {
  int64_t first;
  int64_t last;
};

template <typename S>
struct Kernels {
  int64_t lanes;
  int64_t tile_rows;

  // Both take blocks [from, to).
  void (*pack_gate_panels)(const Shape&, const Weights<S>&, int64_t from, int64_t to, S* panels,
                           Sum<S>* bias, Sum<S>* from_zeros);
  void (*pack_column_panels)(const Shape&, const S* weight, int64_t columns, int64_t from,
                             int64_t to, S* panels);

  // Input products of rows [from, to), for the steps that have too few visits to share a reading of
  // the weights.
  void (*project_inputs)(const Forward<S>&, int64_t from, int64_t to);
  // Some times, patients [from, to).
  void (*scan_patients)(const Forward<S>&, Times, int64_t from, int64_t to);
  // One time, all patients, hidden blocks [from, to); inputs already projected.
  void (*scan_units)(const Forward<S>&, int64_t time, int64_t from, int64_t to);

  // As above; `chunk` is all its times, [from, to) patients or blocks.
  void (*scan_patients_back)(const Backward<S>&, Times chunk, Times, int64_t from, int64_t to);
  void (*scan_units_back)(const Backward<S>&, Times chunk, int64_t time, int64_t from, int64_t to);
  // To the chunk that is next in the scan, and to h0: patients [from, to).
  void (*hand_back_hidden)(const Backward<S>&, Times chunk, int64_t from, int64_t to);
  // Rows [from, to).
  void (*grad_input)(const Backward<S>&, int64_t from, int64_t to);
  // Adds rows [row, row + rows) to the weight sums of sums [from, to), those of all blocks being
  // counted through. `scratch` holds kWeightDepth * padded_factors elements.
  void (*add_to_weights)(const Backward<S>&, int64_t row, int64_t rows, int64_t from, int64_t to,
                         S* scratch);
  // Blocks [from, to).
  void (*finish_weights)(const Backward<S>&, int64_t from, int64_t to);
  int64_t (*padded_factors)(const Shape&);

  // The gates of rows [from, to), from the states of all visits; `states` holds kRecomputedRows
  // rows of [hidden].
  void (*recompute_gates)(const Forward<S>&, const Order&, int64_t from, int64_t to, S* states,
                          const GatesAt<Sum<S>>& gates);
};

// Rows of `depth` visits are packed at a time for the weight gradients.
constexpr int64_t kWeightDepth = 256;

// Rows whose gates are computed again together: their states and inputs stay in the second-level
// cache beside a block's weights.
constexpr int64_t kRecomputedRows = 96;

}  // namespace ehrseq::recurrent
