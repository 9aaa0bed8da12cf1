// The hazard head on the CPU: a linear layer, ReLU, dropout, a second layer of one unit, a sigmoid;
// the schemas are in operators.py. Its loops are those of linear/kernels.h.
#include <tuple>

#include "common/operators.h"
#include "linear/products.h"

namespace ehrseq::linear {

namespace {

Shape checked_head(const char* name, const Tensor& input, const Tensor& weight, const Tensor& bias,
                   const Tensor& last_weight, const Tensor& last_bias, const OptionalTensor& kept) {
  expect_on_cpu(name, input, weight, bias, last_weight, last_bias, kept);
  const Shape shape = checked_shape(name, input, weight);
  expect_like(bias, name, "bias", input, {shape.units}, "[units]");
  expect_like(last_weight, name, "last_weight", input, {1, shape.units}, "[1, units]");
  expect_like(last_bias, name, "last_bias", input, {1}, "[1]");
  if (kept) {
    expect_shape(*kept, name, "kept", {shape.rows, shape.units}, "[rows, units]");
    expect_dtype(*kept, name, "kept", {ScalarType::Bool});
  }
  return shape;
}

// A bool's bytes as they are: any but 0 says that a unit is kept.
class KeptUnits {
 public:
  explicit KeptUnits(const OptionalTensor& kept) {
    if (kept) held_ = made_contiguous(*kept);
  }

  const uint8_t* bytes() const { return held_ ? data<uint8_t>(*held_) : nullptr; }

 private:
  OptionalTensor held_;
};

std::tuple<Tensor, Tensor> hazard_head(Tensor input, Tensor weight, Tensor bias, Tensor last_weight,
                                       Tensor last_bias, OptionalTensor kept, double scale,
                                       bool training) {
  constexpr const char* kName = "hazard_head";
  const Shape shape = checked_head(kName, input, weight, bias, last_weight, last_bias, kept);
  const Tensor hazards = empty(input, {shape.rows}, input.scalar_type());
  const Tensor hidden = empty(input, {training ? shape.rows : 0, shape.units}, input.scalar_type());
  for_dtype(input, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const Kernels<T>& run = kernels<T>();
    Operands operands;
    const KeptUnits units(kept);
    const Head<T> head{units.bytes(), static_cast<T>(scale), operands.as<T>(last_weight),
                       operands.as<T>(last_bias)};
    const Tensor passing =
        scratch<T>(input, {training ? 0 : threads_for(shape), kRowsTogether, shape.units});
    forward_products<T>(input, shape, Activation::kRelu, operands.as<T>(input),
                        operands.as<T>(weight), operands.as<T>(bias),
                        [&](const Forward<T>& layer, int64_t from, int64_t to, int64_t share) {
                          for (int64_t row = from; row < to; row += kRowsTogether) {
                            const int64_t last = std::min(row + kRowsTogether, to);
                            T* place = training
                                           ? data<T>(hidden) + row * shape.units
                                           : data<T>(passing) + share * kRowsTogether * shape.units;
                            run.layer(layer, row, last, place);
                            run.hazards(shape, head, row, last, place, data<T>(hazards));
                          }
                        });
  });
  return {hazards, hidden};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> hazard_head_backward(
    Tensor grad, Tensor hazards, Tensor hidden, Tensor input, Tensor weight, Tensor bias,
    Tensor last_weight, Tensor last_bias, OptionalTensor kept, double scale, bool need_input,
    bool need_weights) {
  constexpr const char* kName = "hazard_head_backward";
  expect_on_cpu(kName, grad, hazards, hidden);
  const Shape shape = checked_head(kName, input, weight, bias, last_weight, last_bias, kept);
  expect_like(grad, kName, "grad", input, {shape.rows}, "[rows]");
  expect_like(hazards, kName, "hazards", input, {shape.rows}, "[rows]");
  expect_like(hidden, kName, "hidden", input, {shape.rows, shape.units}, "[rows, units]");
  const auto wanted = [&](const std::vector<int64_t>& sizes) {
    return empty(input, need_weights ? sizes : std::vector<int64_t>{0}, input.scalar_type());
  };
  const Tensor grad_last_weight = wanted({1, shape.units});
  const Tensor grad_last_bias = wanted({1});
  std::optional<Gradients> results;
  for_dtype(input, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const Kernels<T>& run = kernels<T>();
    Operands operands;
    const KeptUnits units(kept);
    const Head<T> head{units.bytes(), static_cast<T>(scale), operands.as<T>(last_weight),
                       operands.as<T>(last_bias)};
    const T* hidden_units = operands.as<T>(hidden);
    const Tensor logits = scratch<T>(input, {shape.rows});
    T* logit_gradients = data<T>(logits);
    run.logit_gradients(operands.as<T>(grad), operands.as<T>(hazards), shape.rows, logit_gradients);
    Tensor sums = scratch<T>(input, {blocks_of<T>(shape.units) * run.lanes});
    torch::stable::zero_(sums);
    results = backward_products<T>(
        input, shape, operands.as<T>(input), operands.as<T>(weight), need_input, need_weights,
        [&](const Backward<T>& layer, int64_t from, int64_t to, int64_t) {
          run.head_gradients(layer, head, logit_gradients, hidden_units, from, to);
        },
        [&](const Backward<T>& layer, int64_t row, int64_t rows, int64_t from, int64_t to) {
          run.add_to_last_weight(layer, head, logit_gradients, hidden_units, row, rows, from, to,
                                 data<T>(sums));
        });
    if (need_weights) {
      std::copy_n(data<T>(sums), shape.units, data<T>(grad_last_weight));
      double sum = 0;
      for (int64_t row = 0; row < shape.rows; ++row) sum += logit_gradients[row];
      *data<T>(grad_last_bias) = static_cast<T>(sum);
    }
  });
  return {results->input, results->weight, results->bias, grad_last_weight, grad_last_bias};
}

}  // namespace

}  // namespace ehrseq::linear

STABLE_TORCH_LIBRARY_IMPL(ehrseq_fast, CPU, m) {
  m.impl("hazard_head", EHRSEQ_BOX(&ehrseq::linear::hazard_head));
  m.impl("hazard_head_backward", EHRSEQ_BOX(&ehrseq::linear::hazard_head_backward));
}
