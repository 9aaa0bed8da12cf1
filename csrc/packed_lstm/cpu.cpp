// The packed LSTM on the CPU: checks at the door, memory, and the order of the phases. The kernels
// are in kernels_impl.h; how threads share the work is in team.h.

#include <cstdlib>
#include <sstream>
#include <string_view>
#include <tuple>

#ifdef __linux__
#endif

#include "common/operators.h"
#include "common/tensors.h"
#include "packed_lstm/isa.h"
#include "packed_lstm/team.h"

namespace ehrseq::packed_lstm {

namespace {

enum class InstructionSet { baseline, avx2, avx512, avx512_bf16 };

// EHRSEQ_FAST_CPU_CAPABILITY=baseline|avx2|avx512 holds the kernels back, to test those of lesser
// CPUs.
InstructionSet instruction_set() {
#ifdef EHRSEQ_HAS_X86_KERNELS
  const char* asked = std::getenv("EHRSEQ_FAST_CPU_CAPABILITY");
  const std::string_view most = asked ? asked : "";
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                        __builtin_cpu_supports("bmi2");
  const bool has_avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
                          __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512cd");
  if (!has_avx2 || most == "baseline") return InstructionSet::baseline;
  if (!has_avx512 || most == "avx2") return InstructionSet::avx2;
  if (!__builtin_cpu_supports("avx512bf16") || most == "avx512") return InstructionSet::avx512;
  return InstructionSet::avx512_bf16;
#else
  return InstructionSet::baseline;
#endif
}

InstructionSet running() {
  static const InstructionSet known = instruction_set();
  return known;
}

}  // namespace

#ifdef EHRSEQ_HAS_X86_KERNELS
template <>
const Kernels<float>& kernels<float>() {
  if (running() >= InstructionSet::avx512) return avx512::float_kernels();
  if (running() == InstructionSet::avx2) return avx2::float_kernels();
  return baseline::float_kernels();
}

template <>
const Kernels<double>& kernels<double>() {
  if (running() >= InstructionSet::avx512) return avx512::double_kernels();
  if (running() == InstructionSet::avx2) return avx2::double_kernels();
  return baseline::double_kernels();
}

template <>
const Kernels<BFloat16>& kernels<BFloat16>() {
  return avx512_bf16::bfloat16_kernels();
}
#else
template <>
const Kernels<float>& kernels<float>() {
  return baseline::float_kernels();
}

template <>
const Kernels<double>& kernels<double>() {
  return baseline::double_kernels();
}

template <>
const Kernels<BFloat16>& kernels<BFloat16>() {
  throw std::logic_error("packed_lstm: no bfloat16 kernels on this CPU");
}
#endif

bool has_bfloat16_kernels() { return running() == InstructionSet::avx512_bf16; }

namespace {

std::string describe(const Tensor& tensor) {
  std::ostringstream text;
  text << '[';
  for (int64_t i = 0; i < tensor.dim(); ++i) text << (i ? ", " : "") << tensor.size(i);
  text << ']';
  return text.str();
}

void expect_shape(const Tensor& tensor, const char* name, const std::vector<int64_t>& shape,
                  const char* names) {
  if (shape_of(tensor) == shape) return;
  std::ostringstream text;
  text << "packed_lstm: " << name << " must be " << names << " = [";
  for (size_t i = 0; i < shape.size(); ++i) text << (i ? ", " : "") << shape[i];
  text << "], and is " << describe(tensor);
  throw std::invalid_argument(text.str());
}

void expect_shape(const OptionalTensor& tensor, const char* name, const std::vector<int64_t>& shape,
                  const char* names) {
  if (tensor) expect_shape(*tensor, name, shape, names);
}

std::vector<int64_t> checked_batch_sizes(const Tensor& batch_sizes, int64_t visits) {
  if (batch_sizes.dim() != 1 || batch_sizes.scalar_type() != ScalarType::Long ||
      !batch_sizes.is_cpu()) {
    throw std::invalid_argument("packed_lstm: batch_sizes must be 1-D int64 on the CPU");
  }
  const Tensor packed = torch::stable::contiguous(batch_sizes);
  const int64_t* at = static_cast<const int64_t*>(packed.data_ptr());
  const std::vector<int64_t> sizes(at, at + packed.numel());
  if (sizes.empty()) throw std::invalid_argument("packed_lstm: batch_sizes is empty");
  int64_t total = 0;
  for (size_t time = 0; time < sizes.size(); ++time) {
    if (sizes[time] < 1 || (time > 0 && sizes[time] > sizes[time - 1])) {
      std::ostringstream text;
      text << "packed_lstm: batch_sizes must be positive and must not rise, but batch_sizes["
           << time << "] is " << sizes[time];
      if (time > 0) text << " after " << sizes[time - 1];
      throw std::invalid_argument(text.str());
    }
    total += sizes[time];
  }
  if (total != visits) {
    std::ostringstream text;
    text << "packed_lstm: batch_sizes count " << total << " visits, and input has " << visits
         << " rows";
    throw std::invalid_argument(text.str());
  }
  return sizes;
}

std::vector<Step> steps_of(const std::vector<int64_t>& batch_sizes, bool reverse) {
  std::vector<Step> steps;
  steps.reserve(batch_sizes.size());
  int64_t row = 0;
  for (size_t time = 0; time < batch_sizes.size(); ++time) {
    const int64_t patients = batch_sizes[time];
    const int64_t earlier = time > 0 ? batch_sizes[time - 1] : 0;
    const int64_t later = time + 1 < batch_sizes.size() ? batch_sizes[time + 1] : 0;
    const int64_t row_earlier = row - earlier;
    const int64_t row_later = row + patients;
    const int64_t from_earlier = std::min(earlier, patients);
    if (reverse) {
      steps.push_back({row, patients, row_later, later, row_earlier, from_earlier});
    } else {
      steps.push_back({row, patients, row_earlier, from_earlier, row_later, later});
    }
    row += patients;
  }
  return steps;
}

Shape checked_shape(const Tensor& input, const std::vector<int64_t>& batch_sizes,
                    const Tensor& weight_ih, const Tensor& weight_hh, const OptionalTensor& h0,
                    const OptionalTensor& c0) {
  if (weight_hh.dim() != 2) {
    throw std::invalid_argument("packed_lstm: weight_hh must be [4 * hidden, hidden], and is " +
                                describe(weight_hh));
  }
  const Shape shape{input.size(1), weight_hh.size(1), input.size(0), batch_sizes[0]};
  expect_shape(weight_ih, "weight_ih", {kGates * shape.hidden, shape.inputs},
               "[4 * hidden, inputs]");
  expect_shape(weight_hh, "weight_hh", {kGates * shape.hidden, shape.hidden},
               "[4 * hidden, hidden]");
  const std::vector<int64_t> state{shape.patients, shape.hidden};
  expect_shape(h0, "h0", state, "[patients, hidden]");
  expect_shape(c0, "c0", state, "[patients, hidden]");
  return shape;
}

template <typename T>
constexpr ScalarType dtype_of() {
  if (std::is_same_v<T, double>) return ScalarType::Double;
  return std::is_same_v<T, BFloat16> ? ScalarType::BFloat16 : ScalarType::Float;
}

template <typename T>
T* data(const Tensor& tensor) {
  return static_cast<T*>(tensor.data_ptr());
}

// Tensors as the kernels read them: contiguous, in the type that they take. Converted copies live
// as long as this does.
class Operands {
 public:
  template <typename T>
  const T* as(const Tensor& tensor) {
    held_.push_back(torch::stable::contiguous(torch::stable::to(tensor, dtype_of<T>())));
    return data<T>(held_.back());
  }

  template <typename T>
  const T* as(const OptionalTensor& tensor) {
    return tensor ? as<T>(*tensor) : nullptr;
  }

 private:
  std::vector<Tensor> held_;
};

template <typename T>
Tensor scratch(const Tensor& like, const std::vector<int64_t>& shape) {
  return empty(like, shape, dtype_of<T>());
}

// Threads, and from which time on they share each step.
struct Plan {
  int64_t threads;
  int64_t shared_from;
};

template <typename S>
Plan plan_for(const Shape& shape, const std::vector<Step>& steps) {
  // Below about this many multiplications waking a thread costs more than it brings.
  constexpr int64_t kWorthAThread = 1 << 20;
  const int64_t work = shape.visits * kGates * shape.hidden * (shape.hidden + shape.inputs);
  const int64_t most = std::max<int64_t>(1, work / kWorthAThread);
  const int64_t threads = std::min(num_threads(), most);
  const int64_t few = kernels<S>().tile_rows * threads;
  int64_t time = static_cast<int64_t>(steps.size());
  while (time > 0 && steps[time - 1].patients < few) --time;
  return {threads, time};
}

int64_t first_row_of(const Shape& shape, const std::vector<Step>& steps, int64_t time) {
  return time < static_cast<int64_t>(steps.size()) ? steps[time].first_row : shape.visits;
}

// A scan of some times, in its order: those before plan.shared_from with the patients apart, the
// rest in step.
template <typename Apart, typename InStep>
void scan(const std::vector<Step>& steps, Times times, const Plan& plan, int64_t blocks,
          bool falling, const Apart& apart, const InStep& in_step) {
  const int64_t split = std::clamp(plan.shared_from, times.first, times.last);
  const auto head = [&] {
    if (times.first == split) return;
    const Times early{times.first, split};
    const auto bounds = groups_of_equal_work(steps, early, plan.threads);
    const int64_t groups = static_cast<int64_t>(bounds.size()) - 1;
    share_out(groups, plan.threads, [&](int64_t first, int64_t last, int64_t) {
      for (int64_t group = first; group < last; ++group) {
        apart(early, bounds[group], bounds[group + 1]);
      }
    });
  };
  const auto tail = [&] {
    const int64_t count = times.last - split;
    const int64_t shares = std::min({plan.threads, blocks, kMostShares});
    if (count == 0) return;
    run_in_step(count, shares, [&](int64_t step, int64_t share) {
      const int64_t time = falling ? times.last - 1 - step : split + step;
      in_step(time, blocks * share / shares, blocks * (share + 1) / shares);
    });
  };
  if (falling) {
    tail();
    head();
  } else {
    head();
    tail();
  }
}

using ForwardResult = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

template <typename S>
ForwardResult forward(const Tensor& input, const std::vector<int64_t>& batch_sizes,
                      const Tensor& weight_ih, const Tensor& weight_hh,
                      const OptionalTensor& bias_ih, const OptionalTensor& bias_hh,
                      const OptionalTensor& h0, const OptionalTensor& c0, bool reverse,
                      bool training, int64_t kept) {
  const Kernels<S>& run = kernels<S>();
  const Shape shape = checked_shape(input, batch_sizes, weight_ih, weight_hh, h0, c0);
  expect_shape(bias_ih, "bias_ih", {kGates * shape.hidden}, "[4 * hidden]");
  expect_shape(bias_hh, "bias_hh", {kGates * shape.hidden}, "[4 * hidden]");

  const std::vector<Step> steps = steps_of(batch_sizes, reverse);
  const Plan plan = plan_for<S>(shape, steps);
  const int64_t padded = shape.padded_hidden();
  const int64_t projected_from = first_row_of(shape, steps, plan.shared_from);

  Tensor output = scratch<S>(input, {shape.visits, shape.hidden});
  Tensor last_hidden = scratch<S>(input, {shape.patients, shape.hidden});
  Tensor last_cell = scratch<S>(input, {shape.patients, shape.hidden});
  Tensor cells = scratch<Sum<S>>(input, {training ? shape.visits : shape.patients, padded});
  if (kept < 0 || kept > (training ? shape.visits : 0)) {
    throw std::invalid_argument("packed_lstm: kept must count visits, and none without training");
  }
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
    run.pack_gate_panels(shape, weights, from, to, data<S>(panels), data<Sum<S>>(bias));
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

// Gate gradients of one chunk of the backward pass (and as much for its gates, where they are
// computed again): a share of a common last-level cache. Sums over visits are cut where chunks are,
// so that this is part of the numbers.
constexpr int64_t kChunkBytes = int64_t{4} << 20;

// The chunks of the backward pass, in its order: consecutive times, as many as fit `rows`, one at
// least.
std::vector<Times> chunks_of(const std::vector<Step>& steps, int64_t rows, bool reverse) {
  std::vector<Times> chunks;
  const int64_t count = static_cast<int64_t>(steps.size());
  int64_t first = 0;
  int64_t filled = 0;
  for (int64_t time = 0; time < count; ++time) {
    if (time > first && filled + steps[time].patients > rows) {
      chunks.push_back({first, time});
      first = time;
      filled = 0;
    }
    filled += steps[time].patients;
  }
  chunks.push_back({first, count});
  if (!reverse) std::reverse(chunks.begin(), chunks.end());
  return chunks;
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
  const Shape shape = checked_shape(input, batch_sizes, weight_ih, weight_hh, h0, c0);
  const int64_t padded = shape.padded_hidden();
  expect_shape(output, "output", {shape.visits, shape.hidden}, "[visits, hidden]");
  expect_shape(grad_output, "grad_output", {shape.visits, shape.hidden}, "[visits, hidden]");
  expect_shape(grad_last_hidden, "grad_h_n", {shape.patients, shape.hidden}, "[patients, hidden]");
  expect_shape(grad_last_cell, "grad_c_n", {shape.patients, shape.hidden}, "[patients, hidden]");
  const int64_t kept = gates.dim() == 2 ? gates.size(0) : 0;
  expect_shape(gates, "gates", {kept, kGates * padded}, "[kept visits, 4 * padded hidden]");
  const bool recomputes = kept < shape.visits;
  expect_shape(cells, "cells", {shape.visits, padded}, "[visits, padded hidden]");

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
                           data<Sum<S>>(packed_bias));
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

  const ScalarType dtype = input.scalar_type();
  const auto rounded = [&](const Tensor& tensor) { return torch::stable::to(tensor, dtype); };
  return {rounded(grad_input), rounded(grad_weight_ih), rounded(grad_weight_hh),
          rounded(grad_bias),  rounded(grad_h0),        rounded(grad_c0)};
}

void expect_one_dtype(const Tensor& input, std::initializer_list<OptionalTensor> others) {
  if (input.dim() != 2) {
    throw std::invalid_argument("packed_lstm: input must be [visits, inputs], and is " +
                                describe(input));
  }
  for (const OptionalTensor& other : others) {
    if (other && other->scalar_type() != input.scalar_type()) {
      throw std::invalid_argument(
          "packed_lstm: input, weights and states must be of one dtype, and are not");
    }
  }
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

ForwardResult packed_lstm_layer(Tensor input, Tensor batch_sizes, Tensor weight_ih,
                                Tensor weight_hh, OptionalTensor bias_ih, OptionalTensor bias_hh,
                                OptionalTensor h0, OptionalTensor c0, bool reverse, bool training,
                                int64_t kept) {
  expect_one_dtype(input, {weight_ih, weight_hh, bias_ih, bias_hh, h0, c0});
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
  expect_one_dtype(input, {weight_ih, weight_hh, bias_ih, bias_hh, h0, c0, output});
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
