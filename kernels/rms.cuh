// defines: squares, normed, row_threads: RMSNorm's row in the order of its sums, for all kernels whose results must be the same bits.
#pragma once

#include "vector.cuh"

namespace ferrotune {

// Threads that share a row of so many vectors, thread t's being t, t + threads, ..: `per_thread` of them, more only beyond kMaxRowThreads.
// Each adds its own up in order, a warp the sums of its lanes l and l ^ 16, then ^ 8 and so on, and the row those of the warps in order.
constexpr int kMaxRowThreads = 512;
__host__ __device__ constexpr int row_threads(int64_t vectors, int per_thread) {
  int threads = 8;
  while (threads < kMaxRowThreads && threads * per_thread < vectors) threads *= 2;
  return threads;
}

// 16-byte vectors of a row that a thread of the forward holds.
constexpr int kForwardVectors = 4;

template <typename T, int kWidth>
__device__ inline float squares(const Vector<T, kWidth>& a) {
  float sum = 0;
#pragma unroll
  for (int i = 0; i < kWidth; ++i) sum += to_float(a.v[i]) * to_float(a.v[i]);
  return sum;
}

template <typename T, int kWidth>
__device__ inline Vector<T, kWidth> normed(const Vector<T, kWidth>& a, const float (&w)[kWidth], float r, float offset) {
  Vector<T, kWidth> out;
#pragma unroll
  for (int i = 0; i < kWidth; ++i) out.v[i] = from_float<T>(to_float(a.v[i]) * r * (w[i] + offset));
  return out;
}

}  // namespace ferrotune
