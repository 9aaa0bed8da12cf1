// The host's side of CUDA kernels: device, stream, memory, launches. The same source is compiled
// by nvcc and, for tests without a GPU, by g++ (tests/cuda_on_cpu).
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "common/cuda/device.cuh"
#include "common/dtype_map.h"
#include "common/shapes.h"

// Where the operators are registered; the tests' build for the host names another place.
#ifndef EHRSEQ_CUDA_NAMESPACE
#define EHRSEQ_CUDA_NAMESPACE ehrseq_fast
#define EHRSEQ_CUDA_KEY CUDA
#endif
#define EHRSEQ_LIBRARY_IMPL(space, key, m) STABLE_TORCH_LIBRARY_IMPL(space, key, m)
#define EHRSEQ_CUDA_LIBRARY(m) EHRSEQ_LIBRARY_IMPL(EHRSEQ_CUDA_NAMESPACE, EHRSEQ_CUDA_KEY, m)

namespace ehrseq {

template <>
inline constexpr ScalarType kDtypeOf<__nv_bfloat16> = ScalarType::BFloat16;
template <>
inline constexpr ScalarType kDtypeOf<__half> = ScalarType::Half;

}  // namespace ehrseq

namespace ehrseq::cuda {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  std::string message = std::string(what) + ": CUDA error: " + cudaGetErrorString(error);
  if (error == cudaErrorNoKernelImageForDevice || error == cudaErrorInsufficientDriver ||
      error == cudaErrorUnsupportedPtxVersion) {
    message +=
        ". The kernels were built for other GPUs or a newer driver: install the package again with "
        "this machine's nvcc and TORCH_CUDA_ARCH_LIST, or set EHRSEQ_FAST_BACKEND=triton";
  }
  throw std::runtime_error(message);
}

inline bool is_with(const Tensor& like, const Tensor& tensor) {
  return tensor.get_device_index() == like.get_device_index() && tensor.is_cpu() == like.is_cpu();
}
inline bool is_with(const Tensor& like, const OptionalTensor& tensor) {
  return !tensor.has_value() || is_with(like, *tensor);
}

// The dispatcher requires only one tensor to be on a GPU. A kernel that is given another device's
// address, or the host's, ends the process's use of CUDA.
template <typename... Tensors>
void expect_with(const char* operation, const Tensor& like, const Tensors&... tensors) {
  if (!(is_with(like, tensors) && ...)) {
    throw std::invalid_argument(std::string(operation) +
                                ": tensors: expected all tensors of a call on one device, got some "
                                "on another");
  }
}

// While any thread captures a graph, CUDA refuses what might wait for the device, in all threads,
// and the capture is lost; but for threads that say, as torch's allocator does, that what they do
// is no part of it. The first launch of a kernel loads it.
class MayLoadKernels {
 public:
  MayLoadKernels() { check(cudaThreadExchangeStreamCaptureMode(&other_mode_), "capture mode"); }
  ~MayLoadKernels() { cudaThreadExchangeStreamCaptureMode(&other_mode_); }
  MayLoadKernels(const MayLoadKernels&) = delete;
  MayLoadKernels& operator=(const MayLoadKernels&) = delete;

 private:
  cudaStreamCaptureMode other_mode_ = cudaStreamCaptureModeRelaxed;  // then the thread's own
};

// Makes a tensor's device the current one for as long as it lives, and holds the current stream
// there. Everything an operator does on the GPU goes to that stream. The call's other tensors have
// to be on that device too.
class OnDeviceOf {
 public:
  template <typename... Tensors>
  explicit OnDeviceOf(const char* operation, const Tensor& tensor, const Tensors&... others)
      : device_(tensor.get_device_index()) {
    expect_with(operation, tensor, others...);
    TORCH_ERROR_CODE_CHECK(aoti_torch_create_cuda_guard(device_, &guard_));
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_, &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }
  ~OnDeviceOf() { aoti_torch_delete_cuda_guard(guard_); }
  OnDeviceOf(const OnDeviceOf&) = delete;
  OnDeviceOf& operator=(const OnDeviceOf&) = delete;

  int device() const { return device_; }
  cudaStream_t stream() const { return stream_; }

 private:
  int32_t device_;
  CUDAGuardHandle guard_ = nullptr;
  cudaStream_t stream_ = nullptr;
  MayLoadKernels may_load_kernels_;
};

// From torch's caching allocator, on the device of `like`: uninitialised until a kernel writes it.
inline Tensor empty(const Tensor& like, const std::vector<int64_t>& shape, ScalarType dtype) {
  return torch::stable::new_empty(like, {shape.data(), shape.size()}, dtype);
}

template <typename T>
const T* data_of(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

template <typename T>
T* mutable_data_of(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

// Zeros by a memset, which is cheaper than a launch.
inline void fill_zero(void* memory, int64_t bytes, cudaStream_t stream) {
  if (bytes > 0) check(cudaMemsetAsync(memory, 0, bytes, stream), "memset");
}

inline void fill_zero(const Tensor& tensor, cudaStream_t stream) {
  fill_zero(tensor.mutable_data_ptr(), tensor.numel() * tensor.element_size(), stream);
}

// Blocks for `items` at `per_block` each, along the first dimension of a grid.
inline unsigned blocks_for(int64_t items, int64_t per_block) {
  const int64_t blocks = (items + per_block - 1) / per_block;
  if (blocks > 0x7fffffff) {
    throw std::invalid_argument("launch: grid: expected at most 2^31 - 1 blocks, got " +
                                std::to_string(blocks));
  }
  return static_cast<unsigned>(blocks);
}

// An empty grid is no launch.
template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
            cudaStream_t stream, Arguments&&... arguments) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  check(cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...), "launch");
}

// Calls body(TypeTag<scalar_t>{}) for the kernels' type of `dtype`.
template <typename Body>
void dispatch_floating(ScalarType dtype, const char* operation, Body&& body) {
  dispatch_floating_as<__nv_bfloat16, __half>(dtype, operation, std::forward<Body>(body));
}

}  // namespace ehrseq::cuda
