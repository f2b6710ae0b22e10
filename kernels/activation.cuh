// defines: activated: silu, or gelu exactly or by tanh, chosen while the kernel runs.
#pragma once

#include "vector.cuh"

namespace ferrotune {

__device__ __forceinline__ float activated(int activation, float x) {
  switch (activation) {
    case KERNEL_SILU:
      return x / (1 + expf(-x));
    case KERNEL_GELU_TANH:
      return 0.5f * x * (1 + tanhf(0.7978845608028654f * (x + 0.044715f * x * x * x)));
  }
  return 0.5f * x * (1 + erff(x * 0.7071067811865476f));
}

}  // namespace ferrotune
