// defines: meet_cluster, of_cluster: thread blocks that read each other's shared memory, sm_90 and newer.
#pragma once

#include <cooperative_groups.h>

#include "vector.cuh"

namespace ferrotune {

// All threads of all blocks. What they wrote before can be read after it.
__device__ inline void meet_cluster() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}

// What `mine` is in the shared memory of one of `blocks`.
template <typename T>
__device__ inline const T& of_cluster(const T* mine, int block, int blocks) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  if (blocks > 1) return *cooperative_groups::this_cluster().map_shared_rank(mine, block);
#endif
  return *mine;
}

}  // namespace ferrotune
