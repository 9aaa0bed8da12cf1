// Kernels that try the shim itself, right and wrong ones; called by tests/test_cuda_on_cpu.py.
#include <cuda_runtime.h>

#include "common/cuda/cluster.cuh"
#include "common/cuda/device.cuh"
#include "common/cuda/mma.cuh"

namespace {

// Each group of lanes names itself alone, as kernels do whose groups may go separate ways.
template <int kLanes>
__global__ void sub_warp_sums(const float* in, float* out) {
  const int at = blockIdx.x * blockDim.x + threadIdx.x;
  const unsigned first = threadIdx.x & 31 & ~(kLanes - 1u);
  const unsigned mask = (0xffffffffu >> (32 - kLanes)) << first;
  float sum = in[at];
  for (int step = kLanes / 2; step > 0; step /= 2) {
    sum += __shfl_xor_sync(mask, sum, step, kLanes);
  }
  if (threadIdx.x % kLanes == 0) out[at / kLanes] = sum;
}

// A tree in shared memory, then one result per block.
__global__ void block_sums(const float* in, float* out) {
  __shared__ float tree[128];
  EHRSEQ_DYNAMIC_SHARED(bytes);
  float* copy = reinterpret_cast<float*>(bytes);
  copy[threadIdx.x] = in[blockIdx.x * 128 + threadIdx.x];
  __syncthreads();
  tree[threadIdx.x] = copy[127 - threadIdx.x];
  for (unsigned width = 64; width > 0; width /= 2) {
    __syncthreads();
    if (threadIdx.x < width) tree[threadIdx.x] += tree[threadIdx.x + width];
  }
  if (threadIdx.x == 0) out[blockIdx.x] = tree[0];
}

__global__ void reads_unwritten_shared_memory(const float*, float* out) {
  __shared__ float never_written[32];
  if (threadIdx.x > 31) never_written[threadIdx.x - 32] = 1;
  EHRSEQ_DYNAMIC_SHARED(bytes);
  out[0] = never_written[threadIdx.x];
  out[1] = reinterpret_cast<float*>(bytes)[threadIdx.x];
}

__global__ void forgets_a_barrier(const float*, float* out) {
  __shared__ float value;
  if (threadIdx.x == 33) value = 1;
  if (threadIdx.x == 0) out[0] = value;
}

__global__ void depends_on_the_order_of_blocks(const float*, float* out) {
  out[0] = static_cast<float>(blockIdx.x);
}

__global__ void waits_for_ever(const float*, float*) {
  if (threadIdx.x == 0) __syncwarp(3u);  // and lane 1 is at the barrier
  __syncthreads();
}

__global__ void returns_before_its_collective(const float*, float*) {
  if (threadIdx.x != 7) __syncwarp();
}

__global__ void shuffles_from_outside_its_mask(const float*, float* out) {
  if (threadIdx.x < 2) out[0] = __shfl_sync(3u, 1.0f, 2);
}

__global__ void traps(const float*, float*) { ehrseq::cuda::require(threadIdx.x != 3); }

__global__ void reads_past_the_end(const float* in, float* out) { out[0] = in[64]; }

__global__ void writes_past_its_shared_memory(const float*, float* out) {
  EHRSEQ_DYNAMIC_SHARED(bytes);
  reinterpret_cast<float*>(bytes)[threadIdx.x == 63 ? 64 : 0] = 1;
}

__global__ void loads_misaligned(const float* in, float* out) {
  const auto pack = ehrseq::cuda::load_pack<ehrseq::cuda::Pack<float, 4>>(in + 1);
  out[0] = pack.values[0];
}

// Each thread hands its number to the next block of its cluster, every block to every other in
// turn.
template <bool kWaits>
__global__ void around_the_cluster(const float* in, float* out) {
  EHRSEQ_DYNAMIC_SHARED(bytes);
  float* held = reinterpret_cast<float*>(bytes);  // two for each thread
  const unsigned blocks = gridDim.x;
  const unsigned threads = blockDim.x;
  const unsigned at = blockIdx.x * threads + threadIdx.x;
  float value = in[at];
  ehrseq::cuda::cluster_sync();
  for (unsigned step = 0; step < blocks; ++step) {
    float* place = held + step % 2 * threads + threadIdx.x;
    *ehrseq::cuda::in_block(place, (ehrseq::cuda::cluster_rank() + 1) % blocks) = value;
    if (kWaits) ehrseq::cuda::cluster_sync();
    value = *place + 1;
  }
  out[at] = value;
  ehrseq::cuda::cluster_sync();
}

__global__ void writes_to_a_block_that_has_not_begun(const float*, float* out) {
  EHRSEQ_DYNAMIC_SHARED(bytes);
  float* held = reinterpret_cast<float*>(bytes);
  *ehrseq::cuda::in_block(held, 1 - ehrseq::cuda::cluster_rank()) = 1;
  ehrseq::cuda::cluster_sync();
  out[blockIdx.x] = *held;
}

__global__ void reads_a_block_that_has_ended(const float*, float* out) {
  EHRSEQ_DYNAMIC_SHARED(bytes);
  float* held = reinterpret_cast<float*>(bytes);
  *held = 1;
  ehrseq::cuda::cluster_sync();
  out[blockIdx.x] = *ehrseq::cuda::in_block(held, 1 - ehrseq::cuda::cluster_rank());
}

__global__ void static_variables_of_a_cluster(const float*, float* out) {
  __shared__ float own;
  own = static_cast<float>(ehrseq::cuda::cluster_rank());
  ehrseq::cuda::cluster_sync();
  out[blockIdx.x] = own;
}

__global__ void waits_for_its_cluster_for_ever(const float*, float*) {
  if (blockIdx.x == 0) __syncthreads();
  if (blockIdx.x == 1 && threadIdx.x > 0) ehrseq::cuda::cluster_sync();
  if (blockIdx.x == 1 && threadIdx.x == 0) __syncthreads();
}

__global__ void maps_what_it_does_not_have(const float*, float*) {
  __shared__ float own;
  *ehrseq::cuda::in_block(&own, 0) = 1;
}

// a [16, K] * b [K, 8] + c [16, 8], one after the other in `in`; the lanes hold them as mma.cuh
// says, or with two registers exchanged.
template <typename scalar_t, bool kExchanged>
__global__ void multiplies_on_tensor_cores(const float* in, float* out) {
  constexpr int kOfWord = 4 / static_cast<int>(sizeof(scalar_t));
  constexpr int kTerms = 8 * kOfWord;
  const int group = static_cast<int>(threadIdx.x) / 4;
  const int in_group = static_cast<int>(threadIdx.x) % 4;
  const float* a = in;
  const float* b = a + 16 * kTerms;
  const float* c = b + kTerms * 8;
  const auto word = [&](const float* from, int stride) {
    scalar_t values[kOfWord];
    for (int i = 0; i < kOfWord; ++i) {
      values[i] = ehrseq::cuda::as_operand<scalar_t>(from[i * stride]);
    }
    unsigned bits;
    std::memcpy(&bits, values, sizeof bits);
    return bits;
  };
  const auto of_a = [&](int row, int at) { return word(a + row * kTerms + at * kOfWord, 1); };
  uint4 words = {of_a(group, in_group), of_a(group + 8, in_group), of_a(group, in_group + 4),
                 of_a(group + 8, in_group + 4)};
  if (kExchanged) words = {words.x, words.z, words.y, words.w};
  const unsigned b0 = word(b + in_group * kOfWord * 8 + group, 8);
  const unsigned b1 = word(b + (in_group + 4) * kOfWord * 8 + group, 8);
  float sum[4];
  for (int i = 0; i < 4; ++i) sum[i] = c[(group + i / 2 * 8) * 8 + 2 * in_group + i % 2];
  ehrseq::cuda::multiply_add<scalar_t>(sum, words, b0, b1);
  for (int i = 0; i < 4; ++i) out[(group + i / 2 * 8) * 8 + 2 * in_group + i % 2] = sum[i];
}

__global__ void multiplies_with_half_a_warp(const float*, float*) {
  float sum[4] = {};
  if (threadIdx.x < 16) ehrseq::cuda::multiply_add<__half>(sum, uint4{}, 0, 0);
}

using Kernel = void (*)(const float*, float*);
constexpr Kernel kKernels[] = {sub_warp_sums<4>,
                               sub_warp_sums<32>,
                               block_sums,
                               reads_unwritten_shared_memory,
                               forgets_a_barrier,
                               depends_on_the_order_of_blocks,
                               waits_for_ever,
                               returns_before_its_collective,
                               shuffles_from_outside_its_mask,
                               traps,
                               reads_past_the_end,
                               writes_past_its_shared_memory,
                               loads_misaligned,
                               around_the_cluster<true>,
                               around_the_cluster<false>,
                               writes_to_a_block_that_has_not_begun,
                               reads_a_block_that_has_ended,
                               static_variables_of_a_cluster,
                               waits_for_its_cluster_for_ever,
                               maps_what_it_does_not_have,
                               multiplies_on_tensor_cores<__nv_bfloat16, false>,
                               multiplies_on_tensor_cores<__half, false>,
                               multiplies_on_tensor_cores<float, false>,
                               multiplies_on_tensor_cores<__nv_bfloat16, true>,
                               multiplies_on_tensor_cores<__half, true>,
                               multiplies_on_tensor_cores<float, true>,
                               multiplies_with_half_a_warp};

}  // namespace

// Returns a cudaError_t.
extern "C" __attribute__((visibility("default"))) int cuda_on_cpu_selftest(
    int kernel, unsigned blocks, unsigned threads, size_t shared_bytes, unsigned cluster,
    const float* in, float* out) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {cluster, 1, 1};
  cudaLaunchConfig_t config{};
  config.attrs = &attribute;
  config.numAttrs = cluster == 0 ? 0 : 1;
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  return static_cast<int>(cudaLaunchKernelEx(&config, kKernels[kernel], in, out));
}
