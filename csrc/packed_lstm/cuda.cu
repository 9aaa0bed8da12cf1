// The packed LSTM's operators on a GPU: a scan over all visits (kernels.cuh for float32,
// tensor_kernels.cuh for 16-bit types and TF32) and, around it, products over all visits by torch.
// Nothing waits for the device. Which calls come here is decided in Python
// (ehrseq_fast/packed_lstm/cuda.py).

#include <algorithm>
#include <array>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

#include "common/cuda/launch.h"
#include "common/operators.h"
#include "common/options.h"
#include "common/recurrent/batch_sizes.h"
#include "packed_lstm/kernels.cuh"
#include "packed_lstm/tensor_kernels.cuh"

namespace ehrseq::packed_lstm::cuda {
namespace {

using namespace ehrseq::cuda;  // NOLINT: what all kernels share
using recurrent::expect_like;

constexpr const char* kName = "packed_lstm";

// The arguments of both operators that are checked alike.
struct Given {
  const Tensor& input;
  const Tensor& batch_sizes;
  const Tensor& weight_ih;
  const Tensor& weight_hh;
  const OptionalTensor& bias_ih;
  const OptionalTensor& bias_hh;
  const OptionalTensor& h0;
  const OptionalTensor& c0;
};

// Returns the batch sizes.
std::vector<int64_t> checked(const Given& given) {
  expect_dim(given.input, kName, "input", 2, "[visits, inputs]");
  const ScalarType dtype = given.input.scalar_type();
  expect_dtype(given.input, kName, "input",
               {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half});
  expect_dim(given.weight_hh, kName, "weight_hh", 2, "[4 * hidden, hidden]");
  if (!given.batch_sizes.is_cpu()) refuse(kName, "batch_sizes", "a tensor on the CPU", "another");
  const int64_t visits = given.input.size(0);
  const auto sizes = recurrent::checked_batch_sizes(kName, given.batch_sizes, visits);
  const int64_t hidden = given.weight_hh.size(1);
  const int64_t most = dtype == ScalarType::Float ? kMostHidden : kMostHiddenIn16Bits;
  if (hidden < kUnitsOf || hidden > most || hidden % kUnitsOf != 0) {
    refuse(kName, "weight_hh",
           "a multiple of " + std::to_string(kUnitsOf) + " of at most " + std::to_string(most) +
               " hidden units",
           std::to_string(hidden));
  }
  constexpr int64_t kMost = int64_t{1} << 30;
  if (sizes[0] > kMost) {
    refuse(kName, "batch_sizes", "at most 2^30 patients", std::to_string(sizes[0]));
  }
  const std::vector<int64_t> state{sizes[0], hidden};
  expect_like(given.weight_ih, kName, "weight_ih", dtype, {4 * hidden, given.input.size(1)},
              "[4 * hidden, inputs]");
  expect_like(given.weight_hh, kName, "weight_hh", dtype, {4 * hidden, hidden},
              "[4 * hidden, hidden]");
  expect_like(given.bias_ih, kName, "bias_ih", dtype, {4 * hidden}, "[4 * hidden]");
  expect_like(given.bias_hh, kName, "bias_hh", dtype, {4 * hidden}, "[4 * hidden]");
  expect_like(given.h0, kName, "h0", dtype, state, "[patients, hidden]");
  expect_like(given.c0, kName, "c0", dtype, state, "[patients, hidden]");
  return sizes;
}

// Contiguous tensors, which live as long as this does.
template <typename scalar_t>
class Operands {
 public:
  const scalar_t* of(const Tensor& tensor) { return as<scalar_t>(tensor); }
  const scalar_t* of(const OptionalTensor& tensor) {
    return tensor.has_value() ? of(*tensor) : nullptr;
  }
  template <typename T>
  const T* as(const Tensor& tensor) {
    held_.push_back(made_contiguous(tensor));
    return data_of<T>(held_.back());
  }

 private:
  std::vector<Tensor> held_;
};

template <typename T>
T* or_null(const Tensor& tensor) {
  return tensor.numel() == 0 ? nullptr : mutable_data_of<T>(tensor);
}

// The first row of each time and, after them, the number of rows.
Tensor starts_of(const std::vector<int64_t>& sizes, const Tensor& like, cudaStream_t stream) {
  const int64_t count = static_cast<int64_t>(sizes.size()) + 1;
  const Tensor starts = empty(like, {count}, ScalarType::Long);
  int64_t start = 0;
  for (int64_t first = 0; first < count; first += kStartsAtOnce) {
    const int64_t some = std::min<int64_t>(kStartsAtOnce, count - first);
    SomeStarts values{};
    for (int64_t i = 0; i < some; ++i) {
      values.values[i] = start;
      if (first + i + 1 < count) start += sizes[first + i];
    }
    launch(keep_starts, dim3(blocks_for(some, kThreads)), dim3(kThreads), 0, stream, values,
           static_cast<int>(some), mutable_data_of<int64_t>(starts) + first);
  }
  return starts;
}

template <typename Layer>
void launch_clusters(void (*kernel)(const Layer), int patients_of_tile, int bytes,
                     cudaStream_t stream, const Layer& layer) {
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes),
        "packed_lstm: shared memory");
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = kBlocks;
  attribute.val.clusterDim.y = 1;
  attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(blocks_for(layer.visits.patients, patients_of_tile) * kBlocks);
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = bytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  check(cudaLaunchKernelEx(&config, kernel, layer), "packed_lstm: launch");
}

// Small tiles as long as all of them run at once.
bool are_few(int patients) { return patients <= 8 * 16; }

template <bool kOnTensorCores, int kPatients, typename scalar_t>
void launch_tile(const Forward<scalar_t>& layer, cudaStream_t stream) {
  const int hidden = layer.visits.hidden;
  if constexpr (kOnTensorCores) {
    const int bytes = TensorTile<scalar_t, kPatients>::forward(hidden).bytes;
    launch_clusters(tensor_scan_forward<scalar_t, kPatients>, kPatients, bytes, stream, layer);
  } else {
    const int bytes = Tile<kPatients>::forward(hidden).bytes();
    launch_clusters(scan_forward<kPatients>, kPatients, bytes, stream, layer);
  }
}
template <bool kOnTensorCores, int kPatients, typename scalar_t>
void launch_tile(const Backward<scalar_t>& layer, cudaStream_t stream) {
  const int hidden = layer.visits.hidden;
  if constexpr (kOnTensorCores) {
    const int bytes = TensorTile<scalar_t, kPatients>::backward(hidden).bytes;
    launch_clusters(tensor_scan_backward<scalar_t, kPatients>, kPatients, bytes, stream, layer);
  } else {
    const int bytes = Tile<kPatients>::backward(hidden).bytes();
    launch_clusters(scan_backward<kPatients>, kPatients, bytes, stream, layer);
  }
}

template <bool kOnTensorCores, typename Layer>
void launch_scan(const Layer& layer, cudaStream_t stream) {
  if (are_few(layer.visits.patients) || layer.visits.hidden > kMostHiddenOf16Patients) {
    launch_tile<kOnTensorCores, 8>(layer, stream);
  } else {
    launch_tile<kOnTensorCores, 16>(layer, stream);
  }
}

Tensor product(const Tensor& a, const Tensor& b) {
  return made_contiguous(torch::stable::matmul(a, b));
}
// In float32, whatever is multiplied: torch.mm with an out_dtype, which it has on GPUs alone.
Tensor product_in_float(const Tensor& a, const Tensor& b) {
  if (a.scalar_type() == ScalarType::Float) return product(a, b);
  std::array<StableIValue, 3> stack{torch::stable::detail::from(a), torch::stable::detail::from(b),
                                    torch::stable::detail::from(ScalarType::Float)};
  TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::mm", "dtype", stack.data(), TORCH_ABI_VERSION));
  return made_contiguous(torch::stable::detail::to<Tensor>(stack[0]));
}
Tensor transposed(const Tensor& matrix) { return torch::stable::transpose(matrix, 0, 1); }

// Calls body(TypeTag<scalar_t>{}, whether on tensor cores) for a dtype that `checked` has let pass.
template <typename Body>
void dispatch(ScalarType dtype, bool tf32, const Body& body) {
  if (dtype == ScalarType::BFloat16) return body(TypeTag<__nv_bfloat16>{}, std::true_type{});
  if (dtype == ScalarType::Half) return body(TypeTag<__half>{}, std::true_type{});
  if (tf32) return body(TypeTag<float>{}, std::true_type{});
  return body(TypeTag<float>{}, std::false_type{});
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> packed_lstm_layer(
    Tensor input, Tensor batch_sizes, Tensor weight_ih, Tensor weight_hh, OptionalTensor bias_ih,
    OptionalTensor bias_hh, OptionalTensor h0, OptionalTensor c0, bool reverse, bool training,
    int64_t kept, bool tf32) {
  const Given given{input, batch_sizes, weight_ih, weight_hh, bias_ih, bias_hh, h0, c0};
  expect_with(kName, input, weight_ih, weight_hh, bias_ih, bias_hh, h0, c0);
  const std::vector<int64_t> sizes = checked(given);
  const int64_t visits = input.size(0);
  const int64_t hidden = weight_hh.size(1);
  expect_option(kept, kName, "kept", training ? visits : 0, training ? visits : 0);
  const OnDeviceOf device(kName, input);

  const Tensor starts = starts_of(sizes, input, device.stream());
  const Tensor sums = product_in_float(input, transposed(weight_ih));
  const auto of_floats = [&](const std::vector<int64_t>& shape) {
    return empty(input, shape, ScalarType::Float);
  };
  const auto like_input = [&](const std::vector<int64_t>& shape) {
    return empty(input, shape, input.scalar_type());
  };
  const Tensor output = like_input({visits, hidden});
  const Tensor last_hidden = like_input({sizes[0], hidden});
  const Tensor last_cell = like_input({sizes[0], hidden});
  const Tensor cells = training ? of_floats({visits, hidden}) : of_floats({0});
  // the gates take the place of their sums
  const Tensor gates = training ? sums : of_floats({0, 4 * hidden});
  const Visits of_scan{data_of<int64_t>(starts), static_cast<int>(sizes.size()),
                       static_cast<int>(sizes[0]), static_cast<int>(hidden), reverse};
  dispatch(input.scalar_type(), tf32, [&](auto tag, auto on_tensor_cores) {
    using scalar_t = typename decltype(tag)::type;
    Operands<scalar_t> operands;
    launch_scan<decltype(on_tensor_cores)::value>(
        Forward<scalar_t>{of_scan, operands.of(weight_hh), operands.of(bias_ih),
                          operands.of(bias_hh), operands.of(h0), operands.of(c0),
                          data_of<float>(sums), or_null<float>(gates), or_null<float>(cells),
                          mutable_data_of<scalar_t>(output), mutable_data_of<scalar_t>(last_hidden),
                          mutable_data_of<scalar_t>(last_cell)},
        device.stream());
  });
  return {output, last_hidden, last_cell, gates, cells};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> packed_lstm_layer_backward(
    OptionalTensor grad_output, OptionalTensor grad_h_n, OptionalTensor grad_c_n, Tensor input,
    Tensor batch_sizes, Tensor weight_ih, Tensor weight_hh, OptionalTensor bias_ih,
    OptionalTensor bias_hh, OptionalTensor h0, OptionalTensor c0, Tensor output, Tensor gates,
    Tensor cells, bool reverse, bool need_input, bool need_weights, bool need_states, bool tf32) {
  const Given given{input, batch_sizes, weight_ih, weight_hh, bias_ih, bias_hh, h0, c0};
  expect_with(kName, input, weight_ih, weight_hh, bias_ih, bias_hh, h0, c0, grad_output, grad_h_n,
              grad_c_n, output, gates, cells);
  const std::vector<int64_t> sizes = checked(given);
  const int64_t visits = input.size(0);
  const int64_t hidden = weight_hh.size(1);
  const ScalarType dtype = input.scalar_type();
  const std::vector<int64_t> of_visits{visits, hidden};
  const std::vector<int64_t> of_patients{sizes[0], hidden};
  expect_like(grad_output, kName, "grad_output", dtype, of_visits, "[visits, hidden]");
  expect_like(grad_h_n, kName, "grad_h_n", dtype, of_patients, "[patients, hidden]");
  expect_like(grad_c_n, kName, "grad_c_n", dtype, of_patients, "[patients, hidden]");
  expect_like(output, kName, "output", dtype, of_visits, "[visits, hidden]");
  expect_like(gates, kName, "gates", ScalarType::Float, {visits, 4 * hidden},
              "[visits, 4 * hidden]");
  expect_like(cells, kName, "cells", ScalarType::Float, of_visits, "[visits, hidden]");
  const OnDeviceOf device(kName, input);

  const Tensor starts = starts_of(sizes, input, device.stream());
  const auto wanted = [&](bool is_needed, const std::vector<int64_t>& shape) {
    return empty(input, is_needed ? shape : std::vector<int64_t>{0}, dtype);
  };
  const Tensor grad_sums = wanted(true, {visits, 4 * hidden});
  const Tensor before = wanted(need_weights, of_visits);
  const Tensor grad_h0 = wanted(need_states, of_patients);
  const Tensor grad_c0 = wanted(need_states, of_patients);
  const Visits of_scan{data_of<int64_t>(starts), static_cast<int>(sizes.size()),
                       static_cast<int>(sizes[0]), static_cast<int>(hidden), reverse};
  dispatch(dtype, tf32, [&](auto tag, auto on_tensor_cores) {
    using scalar_t = typename decltype(tag)::type;
    Operands<scalar_t> operands;
    launch_scan<decltype(on_tensor_cores)::value>(
        Backward<scalar_t>{of_scan, operands.of(weight_hh), operands.of(h0), operands.of(c0),
                           operands.of(output), operands.template as<float>(gates),
                           operands.template as<float>(cells), operands.of(grad_output),
                           operands.of(grad_h_n), operands.of(grad_c_n),
                           mutable_data_of<scalar_t>(grad_sums), or_null<scalar_t>(before),
                           or_null<scalar_t>(grad_h0), or_null<scalar_t>(grad_c0)},
        device.stream());
  });

  const Tensor none = wanted(false, {});
  const Tensor grad_input = need_input ? product(grad_sums, weight_ih) : none;
  if (!need_weights) {
    const auto empty_one = [&] { return wanted(false, {}); };
    return {grad_input, empty_one(), empty_one(), empty_one(), grad_h0, grad_c0};
  }
  const Tensor by_sum = transposed(grad_sums);
  const Tensor ones = wanted(true, {1, visits});
  Tensor filled = ones;
  torch::stable::fill_(filled, 1.0);
  const std::vector<int64_t> rows{4 * hidden};
  const Tensor of_bias = product(ones, grad_sums);
  return {grad_input,
          product(by_sum, input),
          product(by_sum, before),
          torch::stable::view(of_bias, {rows.data(), rows.size()}),
          grad_h0,
          grad_c0};
}

}  // namespace
}  // namespace ehrseq::packed_lstm::cuda

EHRSEQ_CUDA_LIBRARY(m) {
  m.impl("packed_lstm_layer", EHRSEQ_BOX(&ehrseq::packed_lstm::cuda::packed_lstm_layer));
  m.impl("packed_lstm_layer_backward",
         EHRSEQ_BOX(&ehrseq::packed_lstm::cuda::packed_lstm_layer_backward));
}
