// A linear layer with an activation on the CPU; the schemas are in operators.py. Its loops are in
// kernels.h, the products of a tile in common/tile.h.
#include <tuple>

#include "common/operators.h"
#include "linear/products.h"

namespace ehrseq::linear {

namespace {

Tensor linear_layer(Tensor input, Tensor weight, OptionalTensor bias, int64_t activation) {
  constexpr const char* kName = "linear_layer";
  expect_on_cpu(kName, input, weight, bias);
  const Shape shape = checked_shape(kName, input, weight);
  if (bias) expect_like(*bias, kName, "bias", input, {shape.units}, "[units]");
  expect_option(activation, kName, "activation", 0, kLastActivation);
  const Tensor out = empty(input, {shape.rows, shape.units}, input.scalar_type());
  for_dtype(input, [&](auto tag) {
    using T = typename decltype(tag)::type;
    Operands operands;
    forward_products<T>(input, shape, static_cast<Activation>(activation), operands.as<T>(input),
                        operands.as<T>(weight), operands.as<T>(bias),
                        [&](const Forward<T>& layer, int64_t from, int64_t to, int64_t) {
                          kernels<T>().layer(layer, from, to, data<T>(out) + from * shape.units);
                        });
  });
  return out;
}

std::tuple<Tensor, Tensor, Tensor> linear_layer_backward(Tensor grad, Tensor input, Tensor weight,
                                                         Tensor out, int64_t activation,
                                                         bool need_input, bool need_weights) {
  constexpr const char* kName = "linear_layer_backward";
  expect_on_cpu(kName, grad, input, weight, out);
  const Shape shape = checked_shape(kName, input, weight);
  expect_like(grad, kName, "grad", input, {shape.rows, shape.units}, "[rows, units]");
  expect_like(out, kName, "out", input, {shape.rows, shape.units}, "[rows, units]");
  expect_option(activation, kName, "activation", 0, kLastActivation);
  std::optional<Gradients> results;
  for_dtype(input, [&](auto tag) {
    using T = typename decltype(tag)::type;
    Operands operands;
    const T* grads = operands.as<T>(grad);
    const T* outs = operands.as<T>(out);
    results = backward_products<T>(
        input, shape, operands.as<T>(input), operands.as<T>(weight), need_input, need_weights,
        [&](const Backward<T>& layer, int64_t from, int64_t to, int64_t) {
          kernels<T>().layer_gradients(layer, static_cast<Activation>(activation), grads, outs,
                                       from, to);
        },
        [](const auto&...) {});
  });
  return {results->input, results->weight, results->bias};
}

}  // namespace

}  // namespace ehrseq::linear

STABLE_TORCH_LIBRARY_IMPL(ehrseq_fast, CPU, m) {
  m.impl("linear_layer", EHRSEQ_BOX(&ehrseq::linear::linear_layer));
  m.impl("linear_layer_backward", EHRSEQ_BOX(&ehrseq::linear::linear_layer_backward));
}
