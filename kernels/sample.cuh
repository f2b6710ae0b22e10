// defines: what the two kernels that draw tokens share: Mass, units_of, keys of floats, larger, scan, Params, run_of.
#pragma once

#include "chain.cuh"
#include "cluster.cuh"

namespace ferrotune {
namespace {

constexpr int kThreads = 1024, kWarps = kThreads / 32, kMostBlocks = 8;

// e^(score - the largest) in units of 2^-40: sums of integers have no order and the result no chance in it.
using Mass = unsigned long long;
__device__ inline Mass units_of(float weight) { return static_cast<Mass>(weight * 0x1p40f); }

// Ordered as the floats are.
__device__ inline unsigned key_of(float v) {
  const unsigned bits = __float_as_uint(v);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
__device__ inline float value_of(unsigned key) { return __uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key); }

// The larger one; NaN where one is.
__device__ inline float larger(float a, float b) {
#if __CUDA_ARCH__ >= 800
  float most;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(most) : "f"(a), "f"(b));
  return most;
#else
  return a > b || isnan(a) ? a : b;
#endif
}

// Sum over the lanes up to and with this one.
__device__ inline Mass scan(Mass value) {
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const Mass lower = __shfl_up_sync(0xffffffff, value, step);
    if (threadIdx.x % 32 >= static_cast<unsigned>(step)) value += lower;
  }
  return value;
}

// Of each row: temperature, top_k, top_p, min_p and the number drawn from [0, 1). Arguments of a launch, as no copy has to come before it.
template <int kRows>
struct Params {
  double of[kRows][5];
};
// Rows of a launch: few start it sooner.
constexpr int kFewParams = 8, kMostParams = 800;

// Of each warp of a team of so many blocks: a run of ids, whole vectors.
__host__ __device__ inline int run_of(int V, int blocks) {
  const int piece = (V + blocks - 1) / blocks;
  return ((piece + kWarps - 1) / kWarps + 3) / 4 * 4;
}

}  // namespace
}  // namespace ferrotune
