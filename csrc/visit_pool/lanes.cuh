// A group of lanes: the part of a warp that works on one visit, or on one chunk of the code index.
#pragma once

#include "common/cuda/device.cuh"

namespace ehrseq::cuda {

// 8, 16 or 32 lanes, chosen at launch by the width of a row. Every collective below is for all
// lanes of the group and for no other, so that the groups of a warp may go separate ways.
struct Lanes {
  int log2;
  int count;
  int lane;
  unsigned members;

  __device__ explicit Lanes(int log2_)
      : log2(log2_),
        count(1 << log2_),
        lane(static_cast<int>(threadIdx.x) & (count - 1)),
        members(count == kWarp ? kWholeWarp : ((1u << count) - 1) << first_in_warp()) {}

  __device__ int first_in_warp() const {
    return static_cast<int>(threadIdx.x) & (kWarp - 1) & ~(count - 1);
  }

  // Which group of its block this is, and how many there are.
  __device__ int group() const { return static_cast<int>(threadIdx.x) >> log2; }
  __device__ int groups() const { return static_cast<int>(blockDim.x) >> log2; }

  // Collectives of a whole warp have their own branch: a mask that is unknown to the compiler costs
  // several instructions each time.
  __device__ bool is_warp() const { return count == kWarp; }

  // Bit i: the vote of lane i.
  __device__ unsigned vote(bool holds) const {
    if (is_warp()) return __ballot_sync(kWholeWarp, holds);
    return __ballot_sync(members, holds) >> first_in_warp();
  }
  // The bits of the lanes before this one.
  __device__ unsigned earlier() const { return (1u << lane) - 1; }

  template <typename T>
  __device__ T from(int source, T value) const {
    if (is_warp()) return __shfl_sync(kWholeWarp, value, source);
    return __shfl_sync(members, value, source, count);
  }
  template <typename T>
  __device__ T across(int step, T value) const {
    if (is_warp()) return __shfl_xor_sync(kWholeWarp, value, step);
    return __shfl_xor_sync(members, value, step, count);
  }

  // Reductions in a fixed order, with the same bits in every lane.
  template <typename T>
  __device__ T sum(T value) const {
    for (int step = count / 2; step > 0; step /= 2) value += across(step, value);
    return value;
  }
  __device__ double largest(double value) const {
    for (int step = count / 2; step > 0; step /= 2) value = fmax(value, across(step, value));
    return value;
  }
  __device__ unsigned either(unsigned bits) const {
    for (int step = count / 2; step > 0; step /= 2) bits |= across(step, bits);
    return bits;
  }

  // Shared memory that a lane wrote before is seen by the others after.
  __device__ void sync() const {
    if (is_warp()) {
      __syncwarp();
    } else {
      __syncwarp(members);
    }
  }
};

}  // namespace ehrseq::cuda
