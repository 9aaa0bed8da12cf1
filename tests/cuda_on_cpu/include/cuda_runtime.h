// CUDA's names for g++, so that kernels written for a GPU run on the host, in tests.
//
// One fiber stands for each CUDA thread; the blocks of a grid run one after another, those of a
// cluster together, in an order that changes from launch to launch. Collectives and barriers are
// rendezvous of fibers (see
// ../shim.cpp). What would be undefined on a GPU (a lane named in a mask that never comes, a
// shuffle from a lane outside the mask, a barrier that some threads never reach) is an error here.
// Floating-point atomics are left out on purpose: the package's kernels have none.
#pragma once

#include <math.h>  // and not cmath: kernels call exp and log of floats without std::

#include <cfloat>
#include <climits>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <type_traits>
#include <utility>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __constant__
// Thread-local, for that is a memory range which can be filled with garbage between blocks.
#define __shared__ static thread_local

// Shared memory whose size is given at launch (see common/cuda/device.cuh).
#define EHRSEQ_DYNAMIC_SHARED(name) uint4* name = static_cast<uint4*>(cuda_on_cpu::dynamic_shared())

// The products of a warp on tensor cores (see common/cuda/mma.cuh).
#define EHRSEQ_MMA(shape, types, sum, a, b0, b1) cuda_on_cpu::mma(shape, types, sum, a, b0, b1)
#define EHRSEQ_ROUND_TO_TF32(x, bits) bits = cuda_on_cpu::rounded_to_tf32(x)

// --- vector types, aligned as CUDA's, so that a misaligned access is caught -------------------

#define CUDA_ON_CPU_VECTORS(T, name, a2, a4)                 \
  struct alignas(a2) name##2 { T x, y; };                    \
  struct alignas(a4) name##4 { T x, y, z, w; };              \
  inline name##2 make_##name##2(T x, T y) { return {x, y}; } \
  inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }

CUDA_ON_CPU_VECTORS(int, int, 8, 16)
CUDA_ON_CPU_VECTORS(unsigned, uint, 8, 16)
CUDA_ON_CPU_VECTORS(float, float, 8, 16)
CUDA_ON_CPU_VECTORS(short, short, 4, 8)
CUDA_ON_CPU_VECTORS(unsigned short, ushort, 4, 8)
CUDA_ON_CPU_VECTORS(signed char, char, 2, 4)
CUDA_ON_CPU_VECTORS(unsigned char, uchar, 2, 4)
#undef CUDA_ON_CPU_VECTORS

struct alignas(16) double2 {
  double x, y;
};
struct alignas(16) longlong2 {
  long long x, y;
};
struct alignas(16) ulonglong2 {
  unsigned long long x, y;
};
inline double2 make_double2(double x, double y) { return {x, y}; }
inline longlong2 make_longlong2(long long x, long long y) { return {x, y}; }

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

// --- the runtime -----------------------------------------------------------------------------

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInsufficientDriver = 35,
  cudaErrorNoKernelImageForDevice = 209,
  cudaErrorUnsupportedPtxVersion = 222,
  cudaErrorLaunchFailure = 719,
  cudaErrorStreamCaptureUnsupported = 900
};
struct CUstream_st;
using cudaStream_t = CUstream_st*;
enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone = 0, cudaStreamCaptureStatusActive = 1 };
enum cudaStreamCaptureMode { cudaStreamCaptureModeGlobal = 0, cudaStreamCaptureModeRelaxed = 2 };
enum cudaLaunchAttributeID { cudaLaunchAttributeClusterDimension = 4 };
struct cudaLaunchAttributeValue {
  struct {
    unsigned x, y, z;
  } clusterDim;
};
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  cudaLaunchAttributeValue val;
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
struct cudaLaunchConfig_t {
  dim3 gridDim;
  dim3 blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

const char* cudaGetErrorString(cudaError_t error);
cudaError_t cudaMemsetAsync(void* memory, int value, size_t bytes, cudaStream_t stream);
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status);
cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode);

// Of the fiber that runs.
extern uint3 threadIdx;
extern uint3 blockIdx;
extern dim3 blockDim;
extern dim3 gridDim;

namespace cuda_on_cpu {

extern unsigned lane;  // the same thread's, in its warp

void* dynamic_shared();
cudaError_t run_grid(const cudaLaunchConfig_t& config, const void* kernel, void (*body)(void*),
                     void* context);
void ask_for_shared(const void* kernel, size_t bytes);
size_t most_that_can_be_asked_for();

enum class BlockVote { kSync, kCount };

uint64_t shuffle(unsigned mask, uint64_t bits, unsigned source_lane);
unsigned ballot(unsigned mask, bool vote);
void sync_warp(unsigned mask);
void sync_block();
unsigned cluster_rank();
void arrive_at_cluster();
void wait_for_cluster();
void* map_shared_rank(const void* own, unsigned rank);
[[noreturn]] void trap();
// All lanes of the warp meet; the last to come calls this for what each has brought.
void meet_whole_warp(void* mine, void (*together)(void* const* of_lanes));
void mma(const char* shape, const char* types, float (&sum)[4], const uint4& a, unsigned b0,
         unsigned b1);
unsigned rounded_to_tf32(float x);

template <typename T>
T shuffle_value(unsigned mask, T value, unsigned source_lane) {
  static_assert(sizeof(T) <= sizeof(uint64_t) && std::is_trivially_copyable_v<T>);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  bits = shuffle(mask, bits, source_lane);
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline unsigned first_of_group(int width) { return lane & ~(unsigned(width) - 1); }
inline unsigned last_of_group(int width) { return lane | (unsigned(width) - 1); }

}  // namespace cuda_on_cpu

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  struct Call {
    void (*kernel)(Parameters...);
    std::tuple<std::remove_const_t<Parameters>...> copies;
  };
  Call call{kernel, {std::forward<Arguments>(arguments)...}};
  const auto body = [](void* context) {
    const Call& it = *static_cast<Call*>(context);
    std::apply(it.kernel, it.copies);
  };
  return cuda_on_cpu::run_grid(*config, reinterpret_cast<const void*>(kernel), body, &call);
}

template <typename... Parameters>
cudaError_t cudaFuncSetAttribute(void (*kernel)(Parameters...), cudaFuncAttribute, int bytes) {
  if (bytes < 0 || size_t(bytes) > cuda_on_cpu::most_that_can_be_asked_for()) {
    return cudaErrorInvalidValue;
  }
  cuda_on_cpu::ask_for_shared(reinterpret_cast<const void*>(kernel), size_t(bytes));
  return cudaSuccess;
}

// --- in kernels ------------------------------------------------------------------------------

constexpr int warpSize = 32;

template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  const unsigned base = cuda_on_cpu::first_of_group(width);
  return cuda_on_cpu::shuffle_value(mask, value, base + (unsigned(source) & (unsigned(width) - 1)));
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32) {
  const unsigned source = cuda_on_cpu::lane ^ unsigned(lane_mask);
  const bool inside = source <= cuda_on_cpu::last_of_group(width);
  return cuda_on_cpu::shuffle_value(mask, value, inside ? source : cuda_on_cpu::lane);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  const unsigned lane = cuda_on_cpu::lane;
  const bool inside = lane >= cuda_on_cpu::first_of_group(width) + delta;
  return cuda_on_cpu::shuffle_value(mask, value, inside ? lane - delta : lane);
}
inline unsigned __ballot_sync(unsigned mask, int vote) { return cuda_on_cpu::ballot(mask, vote); }
inline void __syncwarp(unsigned mask = 0xffffffffu) { cuda_on_cpu::sync_warp(mask); }
inline void __syncthreads() { cuda_on_cpu::sync_block(); }
inline void __threadfence() {}
inline unsigned __clusterRelativeBlockRank() { return cuda_on_cpu::cluster_rank(); }
inline void __cluster_barrier_arrive() { cuda_on_cpu::arrive_at_cluster(); }
inline void __cluster_barrier_wait() { cuda_on_cpu::wait_for_cluster(); }
inline void* __cluster_map_shared_rank(const void* own, unsigned rank) {
  return cuda_on_cpu::map_shared_rank(own, rank);
}
[[noreturn]] inline void __trap() { cuda_on_cpu::trap(); }

template <typename T>
std::enable_if_t<std::is_integral_v<T>, T> atomicAdd(T* at, std::common_type_t<T> value) {
  const T before = *at;
  *at = T(std::make_unsigned_t<T>(before) + std::make_unsigned_t<T>(value));
  return before;
}
template <typename T>
std::enable_if_t<std::is_integral_v<T>, T> atomicMin(T* at, std::common_type_t<T> value) {
  const T before = *at;
  *at = value < before ? value : before;
  return before;
}
inline unsigned atomicInc(unsigned* at, unsigned last) {
  const unsigned before = *at;
  *at = before >= last ? 0 : before + 1;
  return before;
}

template <typename T>
T __ldg(const T* from) {
  return *from;
}
template <typename T>
T __ldcg(const T* from) {
  return *from;
}

inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __ffs(int bits) { return __builtin_ffs(bits); }

namespace cuda_on_cpu {
template <typename To, typename From>
To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}
}  // namespace cuda_on_cpu

inline float __uint_as_float(unsigned x) { return cuda_on_cpu::bit_cast<float>(x); }

template <typename T>
constexpr std::enable_if_t<std::is_arithmetic_v<T>, T> min(T a, std::common_type_t<T> b) {
  return b < a ? b : a;
}
template <typename T>
constexpr std::enable_if_t<std::is_arithmetic_v<T>, T> max(T a, std::common_type_t<T> b) {
  return a < b ? b : a;
}
