// defines: meet_cluster and its two halves, leave_cluster, of_cluster, launch_clusters: thread blocks that read each other's shared memory, sm_90
// and newer.
#pragma once

#include <cooperative_groups.h>

#include "chain.cuh"

namespace ferrotune {

// All threads of all blocks. What they wrote before arriving can be read after waiting: arriving takes as long as these writes, those to device
// memory included, and what follows it does not count.
__device__ inline void arrive_at_cluster() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#endif
}
__device__ inline void wait_for_cluster() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}
__device__ inline void meet_cluster() {
  arrive_at_cluster();
  wait_for_cluster();
}

// The same where nothing is to be read after it: a block that has used all that it read of others holds on for them.
__device__ inline void leave_cluster() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.relaxed.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
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

// Chained (chain.cuh), `size` blocks beside each other a cluster; before Hopper the ordinary way.
template <typename... Parameters, typename... Arguments>
int launch_clusters(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared, void* stream, int size, const Arguments&... arguments) {
  cudaLaunchAttribute attributes[2] = {};
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim = {static_cast<unsigned>(size), 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = attributes;
  config.numAttrs = device_attribute(cudaDevAttrComputeCapabilityMajor) < 9 ? 0 : size > 1 ? 2 : 1;
  return cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...);
}

}  // namespace ferrotune
