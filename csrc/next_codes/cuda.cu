// next_codes_bce on a GPU: for each chunk of rows torch's products, and one launch for the loss and
// the derivatives of the logits. Nothing waits for the device.

// Logits of a chunk. The tests' build for the host takes several of a few rows.
#ifdef EHRSEQ_CUDA_NAMESPACE
#define EHRSEQ_LOGITS_AT_ONCE 100
#else
#define EHRSEQ_LOGITS_AT_ONCE (1 << 24)
#endif

#include <algorithm>
#include <tuple>
#include <vector>

#include "common/cuda/launch.h"
#include "common/operators.h"
#include "next_codes/arguments.h"
#include "next_codes/kernels.cuh"

namespace ehrseq::next_codes::cuda {
namespace {

using torch::headeronly::ScalarType;

template <typename T>
Tensor as(const Tensor& tensor) {
  return made_contiguous(torch::stable::to(tensor, kDtypeOf<T>));
}

template <typename T>
OptionalTensor as(const OptionalTensor& tensor) {
  if (!tensor.has_value()) return std::nullopt;
  return as<T>(*tensor);
}

template <typename T>
const T* data_or_null(const OptionalTensor& tensor) {
  return tensor.has_value() ? data_of<T>(*tensor) : nullptr;
}

// A sum over chunks, in their order.
template <typename T>
class ChunkSum {
 public:
  void add(const Tensor& part, cudaStream_t stream) {
    if (!sum_.has_value()) {
      sum_ = part;
      return;
    }
    launch(add_to<T>, dim3(blocks_for(part.numel(), kThreads)), dim3(kThreads), 0, stream,
           mutable_data_of<T>(*sum_), data_of<T>(part), part.numel());
  }

  // Zeros of the shape where nothing was added.
  Tensor sum(const Tensor& like, const std::vector<int64_t>& shape, cudaStream_t stream) const {
    if (sum_.has_value()) return torch::stable::view(*sum_, {shape.data(), shape.size()});
    const Tensor zeros = empty(like, shape, kDtypeOf<T>);
    fill_zero(zeros, stream);
    return zeros;
  }

 private:
  OptionalTensor sum_;
};

struct Needs {
  bool total;
  bool sampled;
  bool states;
  bool weight;
};

template <typename T>
std::tuple<Tensor, Tensor, Tensor, Tensor> losses_and_gradients(
    const OnDeviceOf& device, const Sizes& sizes, Tensor states, const Tensor& weight,
    const Tensor& codes, const Rows<T>& given, const Needs& needs) {
  const std::vector<int64_t> none{0};
  const cudaStream_t stream = device.stream();
  const int64_t step =
      std::max<int64_t>(1, EHRSEQ_LOGITS_AT_ONCE / std::max<int64_t>(1, sizes.classes));
  const Tensor transposed = torch::stable::transpose(weight, 0, 1);
  const Tensor losses = empty(states, {sizes.rows}, kDtypeOf<T>);
  const Tensor grad_states = empty(states, needs.states ? shape_of(states) : none, kDtypeOf<T>);
  Tensor of_states = grad_states;  // which narrow takes
  Rows<T> rows = given;
  rows.losses = mutable_data_of<T>(losses);
  rows.slopes = needs.states || needs.weight;
  const Tensor kept = empty(states, {rows.slopes ? codes.numel() : 0}, kDtypeOf<T>);
  rows.kept = mutable_data_of<T>(kept);
  ChunkSum<T> grad_weight;
  ChunkSum<T> grad_bias;
  for (int64_t begin = 0; begin < sizes.rows; begin += step) {
    const int64_t count = std::min(step, sizes.rows - begin);
    const Tensor chunk = as<T>(torch::stable::narrow(states, 0, begin, count));
    const Tensor logits = made_contiguous(torch::stable::matmul(chunk, transposed));
    rows.logits = mutable_data_of<T>(logits);
    rows.first_row = begin;
    launch(row_losses<T>, dim3(blocks_for(count, 1)), dim3(kThreads), 0, stream, rows);
    if (needs.states) {
      Tensor place = torch::stable::narrow(of_states, 0, begin, count);
      torch::stable::copy_(place, torch::stable::matmul(logits, weight));
    }
    if (needs.weight) {
      const Tensor by_class = torch::stable::transpose(logits, 0, 1);
      grad_weight.add(made_contiguous(torch::stable::matmul(by_class, chunk)), stream);
      const Tensor ones = empty(states, {1, count}, kDtypeOf<T>);
      torch::stable::fill_(ones, 1.0);
      grad_bias.add(made_contiguous(torch::stable::matmul(ones, logits)), stream);
    }
  }
  Tensor loss = losses;
  if (needs.total) {
    loss = empty(states, {}, kDtypeOf<T>);
    launch(total_of<T>, dim3(1), dim3(kThreads), 0, stream, data_of<T>(losses), given.row_scale,
           sizes.rows, mutable_data_of<T>(loss));
  }
  const auto shaped = [&](const ChunkSum<T>& sum, const std::vector<int64_t>& shape) {
    return needs.weight ? sum.sum(states, shape, stream) : empty(states, none, kDtypeOf<T>);
  };
  return {loss, grad_states, shaped(grad_weight, {sizes.classes, sizes.inputs}),
          shaped(grad_bias, {sizes.classes})};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> next_codes_bce(
    const Tensor& states, const Tensor& weight, const OptionalTensor& bias, const Tensor& codes,
    const Tensor& code_offsets, const OptionalTensor& pos_weight,
    const OptionalTensor& class_weight, const OptionalTensor& row_scale, bool total, bool sampled,
    bool need_states, bool need_weight) {
  expect_with(kName, states, weight, bias, codes, code_offsets, pos_weight, class_weight,
              row_scale);
  const Sizes sizes = expect_arguments(states, weight, bias, codes, code_offsets, pos_weight,
                                       class_weight, row_scale);
  const OnDeviceOf device(kName, states);
  const Tensor all_codes = made_contiguous(codes);
  const Tensor offsets = made_contiguous(code_offsets);
  const auto compute = [&](auto tag) {
    using T = typename decltype(tag)::type;
    const OptionalTensor biases = as<T>(bias);
    const OptionalTensor of_positives = as<T>(pos_weight);
    const OptionalTensor of_classes = as<T>(class_weight);
    const OptionalTensor scales = as<T>(row_scale);
    Rows<T> rows{};
    rows.codes = data_of<int32_t>(all_codes);
    rows.code_offsets = data_of<int32_t>(offsets);
    rows.bias = data_or_null<T>(biases);
    rows.pos_weight = data_or_null<T>(of_positives);
    rows.class_weight = data_or_null<T>(of_classes);
    rows.row_scale = data_or_null<T>(scales);
    rows.n_codes = all_codes.numel();
    rows.classes = static_cast<int>(sizes.classes);
    rows.sampled = sampled;
    return losses_and_gradients<T>(device, sizes, states, as<T>(weight), all_codes, rows,
                                   {total, sampled, need_states, need_weight});
  };
  return states.scalar_type() == ScalarType::Double ? compute(TypeTag<double>{})
                                                    : compute(TypeTag<float>{});
}

}  // namespace
}  // namespace ehrseq::next_codes::cuda

EHRSEQ_CUDA_LIBRARY(m) {
  m.impl("next_codes_bce", EHRSEQ_BOX(&ehrseq::next_codes::cuda::next_codes_bce));
}
