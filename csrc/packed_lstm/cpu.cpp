// The packed LSTM on the CPU: memory, and the order of the phases. Arguments are checked in
// arguments.h; the kernels are in kernels_impl.h; how threads share the work is in team.h.

#include <tuple>

#include "common/operators.h"
#include "packed_lstm/arguments.h"
#include "packed_lstm/schedule.h"

namespace ehrseq::packed_lstm {

namespace {

using ForwardResult = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

template <typename S>
ForwardResult forward(const Tensor& input, const std::vector<int64_t>& batch_sizes,
                      const Tensor& weight_ih, const Tensor& weight_hh,
                      const OptionalTensor& bias_ih, const OptionalTensor& bias_hh,
                      const OptionalTensor& h0, const OptionalTensor& c0, bool reverse,
                      bool training, int64_t kept) {
  const Kernels<S>& run = kernels<S>();
  const Shape shape =
      checked_shape(input, batch_sizes, weight_ih, weight_hh, bias_ih, bias_hh, h0, c0);
  expect_option(kept, kName, "kept", 0, training ? shape.visits : 0);

  const std::vector<Step> steps = steps_of(batch_sizes, reverse);
  const Plan plan = plan_for<S>(shape, steps);
  const int64_t padded = shape.padded_hidden();
  const int64_t projected_from = first_row_of(shape, steps, plan.shared_from);

  Tensor output = scratch<S>(input, {shape.visits, shape.hidden});
  Tensor last_hidden = scratch<S>(input, {shape.patients, shape.hidden});
  Tensor last_cell = scratch<S>(input, {shape.patients, shape.hidden});
  Tensor cells = scratch<Sum<S>>(input, {training ? shape.visits : shape.patients, padded});
  // Where all gates are kept, projections lie where the gates of their row will.
  const bool keeps_all = kept == shape.visits;
  Tensor gates = scratch<Sum<S>>(input, {kept, kGates * padded});
  const Tensor projections =
      scratch<Sum<S>>(input, {keeps_all ? 0 : shape.visits - projected_from, kGates * padded});
  Sum<S>* projected = keeps_all ? data<Sum<S>>(gates) + projected_from * kGates * padded
                                : data<Sum<S>>(projections);

  const int64_t blocks = (shape.hidden + run.lanes - 1) / run.lanes;
  if (training && blocks * run.lanes < padded) {
    torch::stable::zero_(gates);
    torch::stable::zero_(cells);
  }
  const Tensor panels =
      scratch<S>(input, {blocks, (shape.inputs + shape.hidden) * kGates * run.lanes});
  const Tensor bias = scratch<Sum<S>>(input, {blocks * kGates * run.lanes});
  const Tensor from_zeros = scratch<Sum<S>>(input, {blocks * kGates * run.lanes});

  Operands operands;
  const auto operand = [&](const auto& tensor) { return operands.as<S>(tensor); };
  const Weights<S> weights{operand(weight_ih), operand(weight_hh), operand(bias_ih),
                           operand(bias_hh)};
  const Forward<S> layer{shape,
                         steps,
                         reverse,
                         operand(input),
                         operand(h0),
                         operand(c0),
                         data<S>(panels),
                         data<Sum<S>>(bias),
                         data<Sum<S>>(from_zeros),
                         data<S>(output),
                         data<S>(last_hidden),
                         data<S>(last_cell),
                         data<Sum<S>>(gates),
                         kept,
                         data<Sum<S>>(cells),
                         training,
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
      steps, {0, static_cast<int64_t>(steps.size())}, plan, blocks, reverse,
      [&](Times times, int64_t from, int64_t to) { run.scan_patients(layer, times, from, to); },
      [&](int64_t time, int64_t from, int64_t to) { run.scan_units(layer, time, from, to); });

  const ScalarType dtype = input.scalar_type();
  const auto rounded = [&](const Tensor& tensor) { return torch::stable::to(tensor, dtype); };
  if (!training) cells = scratch<Sum<S>>(input, {0});
  return {rounded(output), rounded(last_hidden), rounded(last_cell), gates, cells};
}

using BackwardResult = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

template <typename S>
BackwardResult backward(const OptionalTensor& grad_output, const OptionalTensor& grad_last_hidden,
                        const OptionalTensor& grad_last_cell, const Tensor& input,
                        const std::vector<int64_t>& batch_sizes, const Tensor& weight_ih,
                        const Tensor& weight_hh, const OptionalTensor& bias_ih,
                        const OptionalTensor& bias_hh, const OptionalTensor& h0,
                        const OptionalTensor& c0, const Tensor& output, const Tensor& gates,
                        const Tensor& cells, bool reverse, bool need_input, bool need_weights,
                        bool need_states) {
  const Kernels<S>& run = kernels<S>();
  const Shape shape =
      checked_shape(input, batch_sizes, weight_ih, weight_hh, bias_ih, bias_hh, h0, c0);
  const ScalarType dtype = input.scalar_type();
  const int64_t padded = shape.padded_hidden();
  const std::vector<int64_t> per_visit{shape.visits, shape.hidden};
  const std::vector<int64_t> per_patient{shape.patients, shape.hidden};
  expect_like(output, "output", dtype, per_visit, "[visits, hidden]");
  expect_like(grad_output, "grad_output", dtype, per_visit, "[visits, hidden]");
  expect_like(grad_last_hidden, "grad_h_n", dtype, per_patient, "[patients, hidden]");
  expect_like(grad_last_cell, "grad_c_n", dtype, per_patient, "[patients, hidden]");
  expect_like(gates, "gates", kDtypeOf<Sum<S>>, {kAnySize, kGates * padded},
              "[kept visits, 4 * padded hidden]");
  const int64_t kept = gates.size(0);
  expect_option(kept, kName, "the number of visits in gates", 0, shape.visits);
  const bool recomputes = kept < shape.visits;
  expect_like(cells, "cells", kDtypeOf<Sum<S>>, {shape.visits, padded}, "[visits, padded hidden]");

  const std::vector<Step> steps = steps_of(batch_sizes, reverse);
  const Plan plan = plan_for<S>(shape, steps);
  const int64_t blocks = (shape.hidden + run.lanes - 1) / run.lanes;
  const int64_t input_blocks = (shape.inputs + run.lanes - 1) / run.lanes;
  const int64_t panel = blocks * kGates * run.lanes * run.lanes;

  const int64_t chunk_rows = kChunkBytes / (kGates * padded * static_cast<int64_t>(sizeof(S)));
  const std::vector<Times> chunks = chunks_of(steps, chunk_rows, reverse);
  const auto rows_before = [&](int64_t time) { return first_row_of(shape, steps, time); };
  int64_t chunk_size = 0;
  for (const Times& chunk : chunks) {
    chunk_size = std::max(chunk_size, rows_before(chunk.last) - rows_before(chunk.first));
  }

  const auto wanted = [&](bool need, const std::vector<int64_t>& sizes) {
    return scratch<S>(input, need ? sizes : std::vector<int64_t>{0});
  };
  const Tensor grad_input = wanted(need_input, {shape.visits, shape.inputs});
  const Tensor grad_h0 = wanted(need_states, {shape.patients, shape.hidden});
  const Tensor grad_c0 = wanted(need_states, {shape.patients, shape.hidden});
  const Tensor grad_weight_ih = wanted(need_weights, {kGates * shape.hidden, shape.inputs});
  const Tensor grad_weight_hh = wanted(need_weights, {kGates * shape.hidden, shape.hidden});
  const Tensor grad_bias = wanted(need_weights, {kGates * shape.hidden});

  const Tensor grad_gates = scratch<S>(input, {blocks * kGates, chunk_size, run.lanes});
  const Tensor grad_hidden = scratch<Sum<S>>(input, {shape.patients, padded});
  const Tensor grad_cell = scratch<Sum<S>>(input, {shape.patients, padded});
  const Tensor hidden_panels = scratch<S>(input, {blocks, panel});
  const Tensor input_panels = wanted(need_input, {input_blocks, panel});
  const int64_t width = run.padded_factors(shape);
  const int64_t summed = blocks * kGates * run.lanes;
  Tensor weight_sums = scratch<Sum<S>>(input, {need_weights ? summed * width : 0});
  Tensor bias_sums = scratch<Sum<S>>(input, {need_weights ? summed : 0});
  torch::stable::zero_(weight_sums);
  torch::stable::zero_(bias_sums);
  Tensor zeros = wanted(need_weights, {width});
  torch::stable::zero_(zeros);
  const Tensor factors = wanted(need_weights, {plan.threads, kWeightDepth * width});

  const Tensor chunk_gates =
      scratch<Sum<S>>(input, {recomputes ? chunk_size * kGates * padded : 0});
  const Tensor gate_panels = scratch<S>(
      input, {recomputes ? blocks * (shape.inputs + shape.hidden) * kGates * run.lanes : 0});
  const Tensor packed_bias = scratch<Sum<S>>(input, {recomputes ? blocks * kGates * run.lanes : 0});
  const Tensor from_zeros = scratch<Sum<S>>(input, {recomputes ? blocks * kGates * run.lanes : 0});
  const Tensor states =
      scratch<S>(input, {recomputes ? plan.threads * kRecomputedRows * shape.hidden : 0});

  std::vector<int64_t> row_before, patient;
  if (need_weights || recomputes) {
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
                    reverse,
                    operand(input),
                    operand(h0),
                    operand(c0),
                    operand(output),
                    nullptr,
                    0,
                    operands.as<Sum<S>>(cells),
                    operand(grad_output),
                    operand(grad_last_hidden),
                    operand(grad_last_cell),
                    data<S>(hidden_panels),
                    data<S>(input_panels),
                    {row_before.data(), patient.data()},
                    data<S>(zeros),
                    0,
                    chunk_size,
                    data<S>(grad_gates),
                    data<Sum<S>>(grad_hidden),
                    data<Sum<S>>(grad_cell),
                    data<S>(grad_input),
                    need_states ? data<S>(grad_h0) : nullptr,
                    data<Sum<S>>(weight_sums),
                    data<Sum<S>>(bias_sums),
                    data<S>(grad_weight_ih),
                    data<S>(grad_weight_hh),
                    data<S>(grad_bias)};

  const Weights<S> weights{operand(weight_ih), operand(weight_hh), operand(bias_ih),
                           operand(bias_hh)};
  const Forward<S> again{shape,
                         steps,
                         reverse,
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
  const Sum<S>* kept_gates = operands.as<Sum<S>>(gates);
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
  if (need_input) {
    const S* input_hidden = weights.input_hidden;
    share_out(input_blocks, plan.threads, [&](int64_t from, int64_t to, int64_t) {
      run.pack_column_panels(shape, input_hidden, shape.inputs, from, to, data<S>(input_panels));
    });
  }

  for (const Times& chunk : chunks) {
    const int64_t row = rows_before(chunk.first);
    const int64_t rows = rows_before(chunk.last) - row;
    layer.chunk_row = row;
    layer.gates = kept_gates;
    layer.gates_row = 0;
    if (row + rows > kept) {
      layer.gates = data<Sum<S>>(chunk_gates);
      layer.gates_row = row;
      share_out(rows, plan.threads, [&](int64_t from, int64_t to, int64_t share) {
        run.recompute_gates(again, layer.order, row + from, row + to,
                            data<S>(states) + share * kRecomputedRows * shape.hidden,
                            data<Sum<S>>(chunk_gates) + from * kGates * padded);
      });
    }
    scan(
        steps, chunk, plan, blocks, !reverse,
        [&](Times times, int64_t from, int64_t to) {
          run.scan_patients_back(layer, chunk, times, from, to);
        },
        [&](int64_t time, int64_t from, int64_t to) {
          run.scan_units_back(layer, chunk, time, from, to);
        });
    if (need_states || &chunk != &chunks.back()) {
      share_out(steps[chunk.first].patients, plan.threads, [&](int64_t from, int64_t to, int64_t) {
        run.hand_back_hidden(layer, chunk, from, to);
      });
    }
    if (need_input) {
      share_out(rows, plan.threads, [&](int64_t from, int64_t to, int64_t) {
        run.grad_input(layer, row + from, row + to);
      });
    }
    if (need_weights) {
      share_out(blocks * kGates, plan.threads, [&](int64_t from, int64_t to, int64_t share) {
        run.add_to_weights(layer, row, rows, from, to,
                           data<S>(factors) + share * kWeightDepth * width);
      });
    }
  }
  if (need_weights) run.finish_weights(layer, 0, blocks * kGates);
  if (need_states) {
    for (int64_t p = 0; p < shape.patients; ++p) {
      std::copy_n(data<Sum<S>>(grad_cell) + p * padded, shape.hidden,
                  data<S>(grad_c0) + p * shape.hidden);
    }
  }

  const auto rounded = [&](const Tensor& tensor) { return torch::stable::to(tensor, dtype); };
  return {rounded(grad_input), rounded(grad_weight_ih), rounded(grad_weight_hh),
          rounded(grad_bias),  rounded(grad_h0),        rounded(grad_c0)};
}

// The type that a layer is computed in. 16 bits are widened to float32 at the door and only results
// are rounded, save where the CPU multiplies bfloat16: there the operands of products are bfloat16,
// sums, cells and activations float32. (Such products come in pairs: widths must be even.)
template <typename Result, typename Body>
Result in_type_for(const Tensor& input, const Tensor& weight_hh, const Body& body) {
  const ScalarType dtype = input.scalar_type();
  const bool even = input.size(1) % 2 == 0 && weight_hh.size(-1) % 2 == 0;
  if (dtype == ScalarType::BFloat16 && even && has_bfloat16_kernels()) {
    return body(TypeTag<BFloat16>{});
  }
  std::optional<Result> result;
  dispatch_floating(dtype, "packed_lstm", [&](auto tag) {
    result = body(TypeTag<accumulator_t<typename decltype(tag)::type>>{});
  });
  return *result;
}

// What is looked at before there are kernels to run.
void expect_input(const Tensor& input, const Tensor& weight_hh) {
  expect_dim(input, kName, "input", 2, "[visits, inputs]");
  expect_floating(input, kName, "input");
  expect_dim(weight_hh, kName, "weight_hh", 2, "[4 * hidden, hidden]");
}

ForwardResult packed_lstm_layer(Tensor input, Tensor batch_sizes, Tensor weight_ih,
                                Tensor weight_hh, OptionalTensor bias_ih, OptionalTensor bias_hh,
                                OptionalTensor h0, OptionalTensor c0, bool reverse, bool training,
                                int64_t kept) {
  expect_input(input, weight_hh);
  const auto sizes = checked_batch_sizes(batch_sizes, input.size(0));
  return in_type_for<ForwardResult>(input, weight_hh, [&](auto tag) {
    return forward<typename decltype(tag)::type>(input, sizes, weight_ih, weight_hh, bias_ih,
                                                 bias_hh, h0, c0, reverse, training, kept);
  });
}

BackwardResult packed_lstm_layer_backward(OptionalTensor grad_output, OptionalTensor grad_h_n,
                                          OptionalTensor grad_c_n, Tensor input, Tensor batch_sizes,
                                          Tensor weight_ih, Tensor weight_hh,
                                          OptionalTensor bias_ih, OptionalTensor bias_hh,
                                          OptionalTensor h0, OptionalTensor c0, Tensor output,
                                          Tensor gates, Tensor cells, bool reverse, bool need_input,
                                          bool need_weights, bool need_states) {
  expect_input(input, weight_hh);
  const auto sizes = checked_batch_sizes(batch_sizes, input.size(0));
  return in_type_for<BackwardResult>(input, weight_hh, [&](auto tag) {
    return backward<typename decltype(tag)::type>(
        grad_output, grad_h_n, grad_c_n, input, sizes, weight_ih, weight_hh, bias_ih, bias_hh, h0,
        c0, output, gates, cells, reverse, need_input, need_weights, need_states);
  });
}

}  // namespace

}  // namespace ehrseq::packed_lstm

STABLE_TORCH_LIBRARY_IMPL(ehrseq_fast, CPU, m) {
  m.impl("packed_lstm_layer", EHRSEQ_BOX(&ehrseq::packed_lstm::packed_lstm_layer));
  m.impl("packed_lstm_layer_backward",
         EHRSEQ_BOX(&ehrseq::packed_lstm::packed_lstm_layer_backward));
}
