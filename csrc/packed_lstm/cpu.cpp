// The packed LSTM's operators on the CPU: one direction of one layer. The loops over visits are in
// common/recurrent/scan_forward.h and scan_backward.h, the gates in gates.h.

#include <tuple>

#include "common/operators.h"
#include "common/recurrent/passes.h"
#include "packed_lstm/cell.h"

namespace ehrseq::packed_lstm {

namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> packed_lstm_layer(
    Tensor input, Tensor batch_sizes, Tensor weight_ih, Tensor weight_hh, OptionalTensor bias_ih,
    OptionalTensor bias_hh, OptionalTensor h0, OptionalTensor c0, bool reverse, bool training,
    int64_t kept, bool /*tf32*/) {
  ForwardResult result = layer_forward<Cell>(
      {input, batch_sizes, weight_ih, weight_hh, bias_ih, bias_hh, h0, c0, reverse}, training,
      kept);
  return {result.output, result.last_hidden, result.last_cell, result.gates, result.cells};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> packed_lstm_layer_backward(
    OptionalTensor grad_output, OptionalTensor grad_h_n, OptionalTensor grad_c_n, Tensor input,
    Tensor batch_sizes, Tensor weight_ih, Tensor weight_hh, OptionalTensor bias_ih,
    OptionalTensor bias_hh, OptionalTensor h0, OptionalTensor c0, Tensor output, Tensor gates,
    Tensor cells, bool reverse, bool need_input, bool need_weights, bool need_states,
    bool /*tf32*/) {
  BackwardResult grad = layer_backward<Cell>(
      {input, batch_sizes, weight_ih, weight_hh, bias_ih, bias_hh, h0, c0, reverse},
      {grad_output, grad_h_n, grad_c_n}, {output, gates, cells},
      {need_input, need_weights, need_states});
  return {grad.input, grad.weight_ih, grad.weight_hh, grad.bias_ih, grad.h0, grad.c0};
}

}  // namespace

}  // namespace ehrseq::packed_lstm

STABLE_TORCH_LIBRARY_IMPL(ehrseq_fast, CPU, m) {
  m.impl("packed_lstm_layer", EHRSEQ_BOX(&ehrseq::packed_lstm::packed_lstm_layer));
  m.impl("packed_lstm_layer_backward",
         EHRSEQ_BOX(&ehrseq::packed_lstm::packed_lstm_layer_backward));
}
