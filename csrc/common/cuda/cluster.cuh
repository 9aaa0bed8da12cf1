// Clusters: blocks that run at the same time and read and write each other's shared memory. From
// sm_90 on; what uses them is compiled to a trap for older GPUs, on which it is never launched.
#pragma once

#include <cuda_runtime.h>

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define EHRSEQ_HAS_CLUSTERS 1
#else
#define EHRSEQ_HAS_CLUSTERS 0
#endif

#if EHRSEQ_HAS_CLUSTERS

namespace ehrseq::cuda {

__device__ inline unsigned cluster_rank() { return __clusterRelativeBlockRank(); }

// All threads of all blocks meet: what each wrote before it arrived, to whatever memory, all see
// when they have waited. Arriving is what takes time, until those writes are done.
__device__ inline void cluster_arrive() { __cluster_barrier_arrive(); }
__device__ inline void cluster_wait() { __cluster_barrier_wait(); }
__device__ inline void cluster_sync() {
  cluster_arrive();
  cluster_wait();
}

// Where `own`, in this block's dynamic shared memory, is in that of block `rank` of the cluster.
template <typename T>
__device__ T* in_block(T* own, unsigned rank) {
  return static_cast<T*>(__cluster_map_shared_rank(own, rank));
}

}  // namespace ehrseq::cuda

#endif
