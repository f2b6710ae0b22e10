// Runs of an optimizer's elements; the formula stands in csrc/optim.cpp.
#pragma once

#include "cpu_kernels.h"
#include "pointwise.h"

namespace ferrotune {
namespace {

// p, m and v are read and written, g is read: 28 bytes an element, and one division and one root.
inline void adamw(int64_t n, float* p, const float* g, float* m, float* v, const CpuAdamW& c) {
  each_vector(n, [&](int64_t i, auto get, auto put) {
    const V grad = get(g + i) * c.grad_factor;
    const V m_new = get(m + i) * c.beta1 + grad * c.rest1;
    const V v_new = get(v + i) * c.beta2 + grad * grad * c.rest2;
    put(m + i, m_new);
    put(v + i, v_new);
    put(p + i, get(p + i) * c.decay - m_new / (sqrt(v_new) * c.root_factor + c.epsilon) * c.rate);
  });
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
