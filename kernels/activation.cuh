// defines: activate: the gated activations and their slopes, see swiglu.cu.
#pragma once

#include "vector.cuh"

namespace ferrotune {

struct Activated {
  float value, slope;
};

template <int kActivation>
__device__ inline Activated activate(float g) {
  if constexpr (kActivation == KERNEL_SILU) {
    const float s = 1.0f / (1.0f + expf(-g));
    return {g * s, s * (1.0f + g * (1.0f - s))};
  } else if constexpr (kActivation == KERNEL_GELU) {
    constexpr float kInvSqrt2 = 0.70710678118654752f, kInvSqrt2Pi = 0.39894228040143268f;
    const float p = 0.5f * (1.0f + erff(g * kInvSqrt2));
    return {g * p, p + g * kInvSqrt2Pi * expf(-0.5f * g * g)};
  } else {
    constexpr float k = 0.79788456080286536f, a = 0.044715f;
    const float t = tanhf(k * (g + a * g * g * g)), p = 0.5f * (1.0f + t);
    return {g * p, p + 0.5f * g * (1.0f - t * t) * k * (1.0f + 3.0f * a * g * g)};
  }
}

}  // namespace ferrotune
