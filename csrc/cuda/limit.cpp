// A bound on libtorch's share of a GPU, so that a wrong prediction is this process's error and nobody else's.
#include <c10/core/AllocatorConfig.h>
#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <cuda_runtime_api.h>

#include <algorithm>

#include "library.h"

namespace ferrotune {

void limit_memory(int device, uint64_t bytes) {
  const c10::cuda::CUDAGuard guard(static_cast<c10::DeviceIndex>(device));
  // Segments that grow with their use: fixed ones hold up to 1.2 GiB more than tensors need (QLoRA 8B, everything kept), for
  // which a tight bound has no room. A user's own PYTORCH_ALLOC_CONF stays.
  if (c10::CachingAllocator::getAllocatorSettings().empty()) {
    c10::CachingAllocator::setAllocatorSettings("expandable_segments:True");
  }
  size_t free = 0, total = 0;
  C10_CUDA_CHECK(cudaMemGetInfo(&free, &total));
  const double fraction = std::min(1.0, static_cast<double>(bytes) / static_cast<double>(total));
  c10::cuda::CUDACachingAllocator::setMemoryFraction(fraction, static_cast<c10::DeviceIndex>(device));
}

}  // namespace ferrotune
