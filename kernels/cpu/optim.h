// Runs of an optimizer's elements; the formula stands in csrc/optim.cpp.
#pragma once

#include "cpu_kernels.h"
#include "pointwise.h"

namespace ferrotune {
namespace {

// Moments from those before and the gradient, and the parameter from them. Rounded as libtorch and the GPU's kernel do, on
// which the bytes of 8-bit moments depend: what looks like a sum of products is one by name.
struct AdamWElements {
  V m, v;

  AdamWElements(V m_before, V v_before, V g, const CpuAdamW& c) {
    const V grad = g * c.grad_factor;
    m = fma(grad, spread(c.rest1), m_before * c.beta1);
    v = fma(grad * c.rest2, grad, v_before * c.beta2);
  }
  V parameter(V p, const CpuAdamW& c) const {
    const V root = fma(sqrt(v), spread(c.root_factor), spread(c.epsilon));
    return fma(p, spread(c.decay), m / root * -c.rate);
  }
};

// p, m and v are read and written, g is read: 28 bytes an element, and one division and one root.
inline void adamw(int64_t n, float* p, const float* g, float* m, float* v, const CpuAdamW& c) {
  each_vector(n, [&](int64_t i, auto get, auto put) {
    const AdamWElements next(get(m + i), get(v + i), get(g + i), c);
    put(m + i, next.m);
    put(v + i, next.v);
    put(p + i, next.parameter(get(p + i), c));
  });
}

typedef uint8_t Bytes __attribute__((vector_size(kLanes)));

inline V dequantized(const DynamicMap& map, const uint8_t* index, float absmax) {
  Bytes bytes;
  memcpy(&bytes, index, sizeof bytes);
  return gather(map.values, __builtin_convertvector(bytes, I)) * absmax;
}

// The index of the nearest value to y; kernels/dynamic_map.h has the formula.
inline void quantize(const DynamicMap& map, V y, uint8_t* index) {
  I bits;
  memcpy(&bits, &y, sizeof bits);
  const I negative = bits >> 31;  // -1 or 0
  const I magnitude = (bits & 0x7fffffff) - negative;
  I step = (magnitude - kDynamicFirst) >> 16;
  step = step < 0 ? I{} : step;
  step = step >= kDynamicSteps ? I{} + (kDynamicSteps - 1) : step;
  I i = gather_bytes(map.below, step);
  V a;
  memcpy(&a, &magnitude, sizeof a);
  i -= a > gather(map.magnitudes, i);
  const I down = i < map.zero ? i : I{} + map.zero;
  const Bytes bytes = __builtin_convertvector(negative ? map.zero - down : map.zero + i, Bytes);
  memcpy(index, &bytes, sizeof bytes);
}

// At most 256 elements, which share their absmax.
inline void adamw_8bit(int64_t n, float* p, const float* g, uint8_t* state1, uint8_t* state2, float* absmax1,
                       float* absmax2, const DynamicMaps& maps, const CpuAdamW& c) {
  // The indices of a short block, with zeros behind them.
  uint8_t index1[kDynamicBlock], index2[kDynamicBlock];
  memset(index1, maps.exp_avg.zero, sizeof index1);
  memset(index2, maps.exp_avg_sq.zero, sizeof index2);
  memcpy(index1, state1, n);
  memcpy(index2, state2, n);
  float m[kDynamicBlock], v[kDynamicBlock];
  V m_most{}, v_most{};
  each_vector(n, [&](int64_t i, auto get, auto put) {
    const AdamWElements next(dequantized(maps.exp_avg, index1 + i, *absmax1),
                             dequantized(maps.exp_avg_sq, index2 + i, *absmax2), get(g + i), c);
    store(m + i, next.m);
    store(v + i, next.v);
    m_most = max(m_most, next.m < 0 ? -next.m : next.m);
    v_most = max(v_most, next.v);
    put(p + i, next.parameter(get(p + i), c));
  });
  *absmax1 = largest(m_most);
  *absmax2 = largest(v_most);
  const float inverse1 = 1.0f / (*absmax1 > kLeastAbsmax ? *absmax1 : kLeastAbsmax);
  const float inverse2 = 1.0f / (*absmax2 > kLeastAbsmax ? *absmax2 : kLeastAbsmax);
  for (int64_t i = 0; i < n; i += kLanes) {
    quantize(maps.exp_avg, load(m + i) * inverse1, index1 + i);
    quantize(maps.exp_avg_sq, load(v + i) * inverse2, index2 + i);
  }
  memcpy(state1, index1, n);
  memcpy(state2, index2, n);
}

// In f64, always in the same order.
inline double sum_of_squares(int64_t n, const float* x) {
  typedef double Doubles __attribute__((vector_size(4 * kLanes)));
  typedef float Floats __attribute__((vector_size(2 * kLanes)));
  constexpr int kWidth = kLanes / 2, kSums = 4;
  Doubles sums[kSums] = {};
  int64_t i = 0;
  for (; i + kSums * kWidth <= n; i += kSums * kWidth) {
    for (int s = 0; s < kSums; ++s) {
      Floats values;
      memcpy(&values, x + i + s * kWidth, sizeof values);
      const Doubles wide = __builtin_convertvector(values, Doubles);
      sums[s] += wide * wide;
    }
  }
  const Doubles all = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  double total = 0;
  for (int lane = 0; lane < kWidth; ++lane) total += all[lane];
  for (; i < n; ++i) total += static_cast<double>(x[i]) * x[i];
  return total;
}

}  // namespace
}  // namespace ferrotune
