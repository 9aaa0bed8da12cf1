// A recurrent layer's forward and backward pass on the CPU: memory, and the order of the phases.
// Arguments are checked in arguments.h; the kernels are in kernels.h; how threads share the work is
// in team.h.
#pragma once

#include <algorithm>
#include <optional>
#include <type_traits>
#include <vector>

#include "common/isa.h"
#include "common/recurrent/arguments.h"
#include "common/recurrent/schedule.h"

namespace ehrseq::recurrent {

// Tensors that a cell has no use for are empty.
struct ForwardResult {
  Tensor output, last_hidden, last_cell, gates, cells;
};

struct OutputGradients {
  const OptionalTensor& output;
  const OptionalTensor& last_hidden;
  const OptionalTensor& last_cell;
};

// What the forward pass left; cells where the cell has a state of its own.
struct Saved {
  const Tensor& output;
  const Tensor& gates;
  const OptionalTensor& cells;
};

struct Needs {
  bool input, weights, states;
};

struct BackwardResult {
  Tensor input, weight_ih, weight_hh, bias_ih, bias_hh, h0, c0;
};

template <typename Cell, typename S>
ForwardResult forward(const Arguments& given, const std::vector<int64_t>& batch_sizes,
                      bool training, int64_t kept) {
  constexpr int64_t kGates = Cell::kGates;
  constexpr int64_t kSums = Cell::kSums;
  const Kernels<S>& run = Cell::template kernels<S>();
  const Tensor& input = given.input;
  const Shape shape = checked_shape<Cell>(given, batch_sizes[0]);
  expect_option(kept, Cell::kName, "kept", 0, training ? shape.visits : 0);

  const std::vector<Step> steps = steps_of(batch_sizes, given.reverse);
  const Plan plan = plan_for<Cell, S>(shape, steps);
  const int64_t padded = shape.padded_hidden();
  const int64_t projected_from = first_row_of(shape, steps, plan.shared_from);
  const bool keeps_cells = Cell::kHasCellState && training;

  Tensor output = scratch<S>(input, {shape.visits, shape.hidden});
  Tensor last_hidden = scratch<S>(input, {shape.patients, shape.hidden});
  Tensor last_cell = scratch<S>(input, {Cell::kHasCellState ? shape.patients : 0, shape.hidden});
  Tensor carried = scratch<Sum<S>>(input, {keeps_cells ? shape.visits : shape.patients, padded});
  // Where all gates are kept, projections lie where the gates of their row will.
  const bool keeps_all = kept == shape.visits;
  Tensor gates = scratch<Sum<S>>(input, {kept, kSums * padded});
  const Tensor projections =
      scratch<Sum<S>>(input, {keeps_all ? 0 : shape.visits - projected_from, kSums * padded});
  Sum<S>* projected =
      keeps_all ? data<Sum<S>>(gates) + projected_from * kSums * padded : data<Sum<S>>(projections);

  const int64_t blocks = (shape.hidden + run.lanes - 1) / run.lanes;
  if (training && blocks * run.lanes < padded) {
    torch::stable::zero_(gates);
    if (keeps_cells) torch::stable::zero_(carried);
  }
  const Tensor panels =
      scratch<S>(input, {blocks, (shape.inputs + shape.hidden) * kGates * run.lanes});
  const Tensor bias = scratch<Sum<S>>(input, {blocks * kSums * run.lanes});
  const Tensor from_zeros = scratch<Sum<S>>(input, {blocks * kGates * run.lanes});

  Operands operands;
  const auto operand = [&](const auto& tensor) { return operands.as<S>(tensor); };
  const Weights<S> weights{operand(given.weight_ih), operand(given.weight_hh),
                           operand(given.bias_ih), operand(given.bias_hh)};
  const S* h0 = operand(given.h0);
  const Forward<S> layer{shape,
                         steps,
                         given.reverse,
                         operand(input),
                         h0,
                         Cell::kHasCellState ? operand(given.c0) : h0,
                         data<S>(panels),
                         data<Sum<S>>(bias),
                         data<Sum<S>>(from_zeros),
                         data<S>(output),
                         data<S>(last_hidden),
                         Cell::kHasCellState ? data<S>(last_cell) : nullptr,
                         data<Sum<S>>(gates),
                         kept,
                         data<Sum<S>>(carried),
                         keeps_cells,
                         projected_from,
                         projected};

  share_out(blocks, plan.threads, [&](int64_t from, int64_t to, int64_t) {
    run.pack_gate_panels(shape, weights, from, to, data<S>(panels), data<Sum<S>>(bias),
                         data<Sum<S>>(from_zeros));
  });
  share_out(shape.visits - projected_from, plan.threads, [&](int64_t from, int64_t to, int64_t) {
    run.project_inputs(layer, projected_from + from, projected_from + to);
  });
  scan(
      steps, {0, static_cast<int64_t>(steps.size())}, plan, blocks, given.reverse,
      [&](Times times, int64_t from, int64_t to) { run.scan_patients(layer, times, from, to); },
      [&](int64_t time, int64_t from, int64_t to) { run.scan_units(layer, time, from, to); });

  const ScalarType dtype = input.scalar_type();
  const auto rounded = [&](const Tensor& tensor) { return torch::stable::to(tensor, dtype); };
  return {rounded(output), rounded(last_hidden), rounded(last_cell), gates,
          keeps_cells ? carried : scratch<Sum<S>>(input, {0})};
}

template <typename Cell, typename S>
BackwardResult backward(const Arguments& given, const std::vector<int64_t>& batch_sizes,
                        const OutputGradients& grad, const Saved& saved, const Needs& need) {
  constexpr int64_t kGates = Cell::kGates;
  constexpr int64_t kSums = Cell::kSums;
  constexpr bool kHasCellState = Cell::kHasCellState;
  // The gradients of both biases differ where a gate has two sums.
  constexpr bool kHasTwoBiases = kSums > kGates;
  constexpr const char* kName = Cell::kName;
  const Kernels<S>& run = Cell::template kernels<S>();
  const Tensor& input = given.input;
  const Shape shape = checked_shape<Cell>(given, batch_sizes[0]);
  const ScalarType dtype = input.scalar_type();
  const int64_t padded = shape.padded_hidden();
  const std::vector<int64_t> per_visit{shape.visits, shape.hidden};
  const std::vector<int64_t> per_patient{shape.patients, shape.hidden};
  expect_like(saved.output, kName, "output", dtype, per_visit, "[visits, hidden]");
  expect_like(grad.output, kName, "grad_output", dtype, per_visit, "[visits, hidden]");
  expect_like(grad.last_hidden, kName, "grad_h_n", dtype, per_patient, "[patients, hidden]");
  expect_like(grad.last_cell, kName, "grad_c_n", dtype, per_patient, "[patients, hidden]");
  expect_like(saved.gates, kName, "gates", kDtypeOf<Sum<S>>, {kAnySize, kSums * padded},
              "[kept visits, " + std::to_string(kSums) + " * padded hidden]");
  const int64_t kept = saved.gates.size(0);
  expect_option(kept, kName, "the number of visits in gates", 0, shape.visits);
  const bool recomputes = kept < shape.visits;
  expect_like(saved.cells, kName, "cells", kDtypeOf<Sum<S>>, {shape.visits, padded},
              "[visits, padded hidden]");

  const std::vector<Step> steps = steps_of(batch_sizes, given.reverse);
  const Plan plan = plan_for<Cell, S>(shape, steps);
  const int64_t blocks = (shape.hidden + run.lanes - 1) / run.lanes;
  const int64_t input_blocks = (shape.inputs + run.lanes - 1) / run.lanes;
  const int64_t panel = blocks * kGates * run.lanes * run.lanes;

  const int64_t chunk_rows = kChunkBytes / (kSums * padded * static_cast<int64_t>(sizeof(S)));
  const std::vector<Times> chunks = chunks_of(steps, chunk_rows, given.reverse);
  const auto rows_before = [&](int64_t time) { return first_row_of(shape, steps, time); };
  int64_t chunk_size = 0;
  for (const Times& chunk : chunks) {
    chunk_size = std::max(chunk_size, rows_before(chunk.last) - rows_before(chunk.first));
  }
  // An odd number of lines from one sum to the next: a power of two would put a visit's gradients,
  // which the scan writes together, into the same few sets of each cache.
  chunk_size |= 1;

  const auto wanted = [&](bool is_needed, const std::vector<int64_t>& sizes) {
    return scratch<S>(input, is_needed ? sizes : std::vector<int64_t>{0});
  };
  const Tensor grad_input = wanted(need.input, {shape.visits, shape.inputs});
  const Tensor grad_c0 = wanted(need.states && kHasCellState, {shape.patients, shape.hidden});
  const Tensor grad_weight_ih = wanted(need.weights, {kGates * shape.hidden, shape.inputs});
  const Tensor grad_weight_hh = wanted(need.weights, {kGates * shape.hidden, shape.hidden});
  const Tensor grad_bias_ih = wanted(need.weights, {kGates * shape.hidden});
  const Tensor grad_bias_hh = wanted(need.weights && kHasTwoBiases, {kGates * shape.hidden});
  const Tensor grad_h0 =
      scratch<Sum<S>>(input, need.states ? per_patient : std::vector<int64_t>{0});

  const Tensor grad_sums = scratch<S>(input, {blocks * kSums, chunk_size, run.lanes});
  const Tensor grad_hidden = scratch<Sum<S>>(input, {shape.patients, padded});
  const Tensor grad_carried = scratch<Sum<S>>(input, {shape.patients, padded});
  const Tensor hidden_panels = scratch<S>(input, {blocks, panel});
  const Tensor input_panels = wanted(need.input, {input_blocks, panel});
  const int64_t width = run.padded_factors(shape);
  const int64_t summed = blocks * kSums * run.lanes;
  Tensor weight_sums = scratch<Sum<S>>(input, {need.weights ? summed * width : 0});
  Tensor bias_sums = scratch<Sum<S>>(input, {need.weights ? summed : 0});
  torch::stable::zero_(weight_sums);
  torch::stable::zero_(bias_sums);
  Tensor zeros = wanted(need.weights, {width});
  torch::stable::zero_(zeros);
  const Tensor factors = wanted(need.weights, {plan.threads, kWeightDepth * width});

  // Gates that are computed again lie where the gradients of their sums will, if these are of the
  // same type.
  constexpr bool kInPlace = std::is_same_v<S, Sum<S>>;
  const Tensor chunk_gates = scratch<Sum<S>>(
      input, {recomputes && !kInPlace ? blocks * kSums * chunk_size * run.lanes : 0});
  const Tensor gate_panels = scratch<S>(
      input, {recomputes ? blocks * (shape.inputs + shape.hidden) * kGates * run.lanes : 0});
  const Tensor packed_bias = scratch<Sum<S>>(input, {recomputes ? summed : 0});
  const Tensor from_zeros = scratch<Sum<S>>(input, {recomputes ? blocks * kGates * run.lanes : 0});
  const Tensor states =
      scratch<S>(input, {recomputes ? plan.threads * kRecomputedRows * shape.hidden : 0});

  std::vector<int64_t> row_before, patient;
  if (need.weights || recomputes) {
    row_before.reserve(shape.visits);
    patient.reserve(shape.visits);
    for (const Step& step : steps) {
      for (int64_t p = 0; p < step.patients; ++p) {
        row_before.push_back(p < step.continuing ? step.row_before + p : -1);
        patient.push_back(p);
      }
    }
  }

  Operands operands;
  const auto operand = [&](const auto& tensor) { return operands.as<S>(tensor); };
  Backward<S> layer{shape,
                    steps,
                    given.reverse,
                    operand(input),
                    operand(given.h0),
                    operand(given.c0),
                    operand(saved.output),
                    {},
                    operands.as<Sum<S>>(saved.cells),
                    operand(grad.output),
                    operand(grad.last_hidden),
                    operand(grad.last_cell),
                    data<S>(hidden_panels),
                    data<S>(input_panels),
                    {row_before.data(), patient.data()},
                    data<S>(zeros),
                    0,
                    chunk_size,
                    data<S>(grad_sums),
                    data<Sum<S>>(grad_hidden),
                    data<Sum<S>>(grad_carried),
                    data<S>(grad_input),
                    need.states ? data<Sum<S>>(grad_h0) : nullptr,
                    data<Sum<S>>(weight_sums),
                    data<Sum<S>>(bias_sums),
                    data<S>(grad_weight_ih),
                    data<S>(grad_weight_hh),
                    data<S>(grad_bias_ih),
                    kHasTwoBiases ? data<S>(grad_bias_hh) : nullptr};

  const Weights<S> weights{operand(given.weight_ih), operand(given.weight_hh),
                           operand(given.bias_ih), operand(given.bias_hh)};
  const Forward<S> again{shape,
                         steps,
                         given.reverse,
                         layer.input,
                         layer.h0,
                         nullptr,
                         data<S>(gate_panels),
                         data<Sum<S>>(packed_bias),
                         data<Sum<S>>(from_zeros),
                         const_cast<S*>(layer.output),  // read alone
                         nullptr,
                         nullptr,
                         nullptr,
                         0,
                         nullptr,
                         true,
                         shape.visits,
                         nullptr};
  const Sum<S>* kept_gates = operands.as<Sum<S>>(saved.gates);
  if (recomputes) {
    share_out(blocks, plan.threads, [&](int64_t from, int64_t to, int64_t) {
      run.pack_gate_panels(shape, weights, from, to, data<S>(gate_panels),
                           data<Sum<S>>(packed_bias), data<Sum<S>>(from_zeros));
    });
  }

  const S* hidden_hidden = weights.hidden_hidden;
  share_out(blocks, plan.threads, [&](int64_t from, int64_t to, int64_t) {
    run.pack_column_panels(shape, hidden_hidden, shape.hidden, from, to, data<S>(hidden_panels));
  });
  if (need.input) {
    const S* input_hidden = weights.input_hidden;
    share_out(input_blocks, plan.threads, [&](int64_t from, int64_t to, int64_t) {
      run.pack_column_panels(shape, input_hidden, shape.inputs, from, to, data<S>(input_panels));
    });
  }

  const auto gates_of_chunk = [&]() -> Sum<S>* {
    if constexpr (kInPlace) return data<S>(grad_sums);
    return data<Sum<S>>(chunk_gates);
  };
  for (const Times& chunk : chunks) {
    const int64_t row = rows_before(chunk.first);
    const int64_t rows = rows_before(chunk.last) - row;
    layer.chunk_row = row;
    layer.gates = {kept_gates, 0, kSums * padded, kSums * run.lanes, run.lanes};
    if (row + rows > kept) {
      const int64_t sum_stride = chunk_size * run.lanes;
      Sum<S>* const first = gates_of_chunk();
      const GatesAt<Sum<S>> gates{first, row, run.lanes, kSums * sum_stride, sum_stride};
      // The first rows of one chunk may be among those kept.
      const int64_t held = std::max<int64_t>(0, kept - row);
      for (int64_t i = row; i < row + held; ++i) {
        for (int64_t block = 0; block < blocks; ++block) {
          for (int64_t sum = 0; sum < kSums; ++sum) {
            std::copy_n(layer.gates.at(i, block) + sum * run.lanes, run.lanes,
                        gates.at(i, block) + sum * sum_stride);
          }
        }
      }
      share_out(rows - held, plan.threads, [&](int64_t from, int64_t to, int64_t share) {
        run.recompute_gates(again, layer.order, row + held + from, row + held + to,
                            data<S>(states) + share * kRecomputedRows * shape.hidden, gates);
      });
      layer.gates = {first, row, gates.row_stride, gates.block_stride, sum_stride};
    }
    scan(
        steps, chunk, plan, blocks, !given.reverse,
        [&](Times times, int64_t from, int64_t to) {
          run.scan_patients_back(layer, chunk, times, from, to);
        },
        [&](int64_t time, int64_t from, int64_t to) {
          run.scan_units_back(layer, chunk, time, from, to);
        });
    if (need.states || &chunk != &chunks.back()) {
      share_out(steps[chunk.first].patients, plan.threads, [&](int64_t from, int64_t to, int64_t) {
        run.hand_back_hidden(layer, chunk, from, to);
      });
    }
    if (need.input) {
      share_out(rows, plan.threads, [&](int64_t from, int64_t to, int64_t) {
        run.grad_input(layer, row + from, row + to);
      });
    }
    if (need.weights) {
      share_out(blocks * kSums, plan.threads, [&](int64_t from, int64_t to, int64_t share) {
        run.add_to_weights(layer, row, rows, from, to,
                           data<S>(factors) + share * kWeightDepth * width);
      });
    }
  }
  if (need.weights) run.finish_weights(layer, 0, blocks);
  for (int64_t p = 0; need.states && p < shape.patients; ++p) {
    const Sum<S>* last = data<Sum<S>>(grad_carried) + p * padded;
    if constexpr (kHasCellState) {
      std::copy_n(last, shape.hidden, data<S>(grad_c0) + p * shape.hidden);
    } else {
      Sum<S>* total = data<Sum<S>>(grad_h0) + p * shape.hidden;
      for (int64_t unit = 0; unit < shape.hidden; ++unit) total[unit] += last[unit];
    }
  }

  const auto rounded = [&](const Tensor& tensor) { return torch::stable::to(tensor, dtype); };
  return {rounded(grad_input),   rounded(grad_weight_ih), rounded(grad_weight_hh),
          rounded(grad_bias_ih), rounded(grad_bias_hh),   rounded(grad_h0),
          rounded(grad_c0)};
}

// Calls body with the type that a layer is computed in. 16 bits are widened to float32 and only
// results are rounded, except where the CPU multiplies bfloat16: there the operands of products are
// bfloat16; sums, activations and what is carried are float32. (Such products come in pairs, also
// those of tiles: widths must be even.)
template <typename Cell, typename Body>
auto in_type_for(const Arguments& given, const Body& body) {
  const ScalarType dtype = given.input.scalar_type();
  const bool even = given.input.size(1) % 2 == 0 && given.weight_hh.size(-1) % 2 == 0;
  std::optional<decltype(body(TypeTag<float>{}))> result;
  if (dtype == ScalarType::BFloat16 && even && bfloat16_products() != BFloat16Products::kWidened) {
    result = body(TypeTag<BFloat16>{});
  } else {
    dispatch_floating(dtype, Cell::kName, [&](auto tag) {
      result = body(TypeTag<accumulator_t<typename decltype(tag)::type>>{});
    });
  }
  return *result;
}

template <typename Cell>
ForwardResult layer_forward(const Arguments& given, bool training, int64_t kept) {
  expect_input<Cell>(given);
  const auto sizes = checked_batch_sizes(Cell::kName, given.batch_sizes, given.input.size(0));
  return in_type_for<Cell>(given, [&](auto tag) {
    return forward<Cell, typename decltype(tag)::type>(given, sizes, training, kept);
  });
}

template <typename Cell>
BackwardResult layer_backward(const Arguments& given, const OutputGradients& grad,
                              const Saved& saved, const Needs& need) {
  expect_input<Cell>(given);
  const auto sizes = checked_batch_sizes(Cell::kName, given.batch_sizes, given.input.size(0));
  return in_type_for<Cell>(given, [&](auto tag) {
    return backward<Cell, typename decltype(tag)::type>(given, sizes, grad, saved, need);
  });
}

}  // namespace ehrseq::recurrent
