// defines: activated: silu, or gelu exactly or by tanh, chosen while the kernel runs; of four with the precision that 16 bits need.
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

__device__ __forceinline__ float4 activated(int activation, const float4& x) {
  if (activation != KERNEL_SILU) {
    return make_float4(activated(activation, x.x), activated(activation, x.y), activated(activation, x.z), activated(activation, x.w));
  }
  const auto silu = [](float v) { return __fdividef(v, 1 + __expf(-v)); };
  return make_float4(silu(x.x), silu(x.y), silu(x.z), silu(x.w));
}

}  // namespace ferrotune
