// defines: inputs_ready, next_may_start, load_early, launch_chained: programmatic dependent launch, sm_90 and newer.
// A chained kernel starts while the one before it on the stream still runs. Until inputs_ready() it may touch only what no
// kernel writes (weights); every thread that reads or writes anything else calls it first. Elsewhere, and for kernels that
// are launched the ordinary way, both calls do nothing.
#pragma once

#include "vector.cuh"

namespace ferrotune {

// Waits until all kernels before this one have finished and their writes can be seen.
__device__ inline void inputs_ready() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// The next kernel's blocks may start where there is room.
__device__ inline void next_may_start() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// 16 bytes that no kernel writes, asked for where this stands: loads of its own choice (ld.global.nc, too) the compiler moves behind inputs_ready().
__device__ inline uint4 load_early(const void* from) {
  uint4 v;
  asm volatile("ld.global.v4.b32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(from));
  return v;
}

// Rows of decoding: kernels this short gain by a start before their inputs are ready.
constexpr int64_t kFewRows = 512;

inline int device_attribute(cudaDeviceAttr which) {
  int device = 0, value = 0;
  if (cudaGetDevice(&device) == cudaSuccess) cudaDeviceGetAttribute(&value, which, device);
  return value;
}

// Chained where `few`, else the ordinary way. Only for kernels that call inputs_ready.
template <typename... Parameters, typename... Arguments>
int launch_chained(bool few, void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared, void* stream,
                   Arguments... arguments) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &attribute;
  config.numAttrs = few && device_attribute(cudaDevAttrComputeCapabilityMajor) >= 9 ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...);
}

}  // namespace ferrotune
