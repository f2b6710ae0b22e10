// Cross-entropy of a chunk of rows and its gradient with respect to the logits, in the logits' own memory: with logits s
// [N, V] f32, z = cap(s), cap(s) = c tanh(s / c) or s, y the label,
//   loss = logsumexp(z) - z_y      ds = (softmax(z) - onehot(y)) (1 - (z / c)^2)
// Fuses the cap, log-softmax, gather, exponential, one-hot and the rounding to the dtype of the products, some ten
// kernels over [N, V] in plain libtorch. Moves: read s twice, 8 N V bytes, write ds once, N V elements of the products'
// dtype. Tried without gain on an H200: a cluster of eight blocks that holds the row in its shared memory and reads it
// once (1.2 times the time), a part of the row in shared memory and the second reading backwards (the same time), the next
// tile's loads before this tile's stores, and a barrier only where a tile's stores need one (both the same time).
//
// A confident row loses nothing: with lse' the logsumexp of all words but y and d = lse' - z_y,
//   loss = log(1 + e^d)      p_y - 1 = -1 / (1 + e^-d)
// so that neither is the difference of two large numbers.
//
// ds [N, V] lies in the rows of s, 4 V bytes apart, from each row's start. A tile of a row is in registers before any
// thread writes: 16-bit elements [a, b) cover the f32 elements [a/2, b/2), which belong to this tile or to earlier ones.
#include <math_constants.h>

#include "vector.cuh"

namespace ferrotune {
namespace {

// ---- device

constexpr int kThreads = 512;  // two blocks a processor: one works while the other waits at a barrier
constexpr int kWarps = kThreads / 32;
constexpr int kPieces = 4;  // 16-byte loads of a thread in flight

// e^x for x <= 0: off by |x| 2^-24 of itself, which is least where it counts most. expf costs twice the instructions.
__device__ inline float exponential(float x) { return __expf(x); }

// m = max, s = sum of e^(z - m).
struct Sum {
  float m, s;
};

__device__ inline Sum merge(Sum a, Sum b) {
  const float m = fmaxf(a.m, b.m);
  if (m == -CUDART_INF_F) return {m, a.s + b.s};
  return {m, a.s * expf(a.m - m) + b.s * expf(b.m - m)};
}

__device__ inline Sum block_merge(Sum sum) {
  __shared__ Sum warps[kWarps];
#pragma unroll
  for (int lane = 16; lane > 0; lane /= 2) {
    sum = merge(sum, {__shfl_xor_sync(~0u, sum.m, lane), __shfl_xor_sync(~0u, sum.s, lane)});
  }
  __syncthreads();
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = sum;
  __syncthreads();
  sum = threadIdx.x % 32 < kWarps ? warps[threadIdx.x % 32] : Sum{-CUDART_INF_F, 0.0f};
#pragma unroll
  for (int lane = 16; lane > 0; lane /= 2) {
    sum = merge(sum, {__shfl_xor_sync(~0u, sum.m, lane), __shfl_xor_sync(~0u, sum.s, lane)});
  }
  return sum;
}

// Adds kWidth values.
template <int kWidth>
__device__ inline void add(Sum& sum, const float (&z)[kWidth]) {
  float m = sum.m;
#pragma unroll
  for (int i = 0; i < kWidth; ++i) m = fmaxf(m, z[i]);
  if (m > sum.m) {
    sum.s *= expf(sum.m - m);
    sum.m = m;
  }
  if (m == -CUDART_INF_F) return;
#pragma unroll
  for (int i = 0; i < kWidth; ++i) sum.s += exponential(z[i] - m);
}

template <bool kCapped>
__device__ inline float cap(float s, float softcap) {
  return kCapped ? softcap * tanhf(s / softcap) : s;
}

// log(1 + e^d), for large d without overflow.
__device__ inline float softplus(float d) { return fmaxf(d, 0.0f) + log1pf(expf(-fabsf(d))); }

// What the sum over all words but the label, and the label's z, make of a row.
struct Outcome {
  float loss, m, inverse, at_label;  // p = e^(z - m) inverse, but p - 1 at the label

  __device__ Outcome(Sum others, float target) {
    const float d = others.m - target + logf(others.s);
    loss = softplus(d);
    m = fmaxf(others.m, target);
    inverse = 1.0f / (others.s * expf(others.m - m) + expf(target - m));
    at_label = -1.0f / (1.0f + expf(-d));
  }

  template <bool kCapped>
  __device__ float ds(float z, bool label, float softcap) const {
    const float dz = label ? at_label : exponential(z - m) * inverse;
    return kCapped ? dz * (1.0f - (z / softcap) * (z / softcap)) : dz;
  }
};

template <typename T, int kWidth, bool kCapped>
__global__ void __launch_bounds__(kThreads, 2)
    cross_entropy_kernel(float* __restrict__ logits, const int64_t* __restrict__ labels, float* __restrict__ losses,
                         int64_t N, int64_t V, float softcap, bool gradient) {
  constexpr int kTile = kThreads * kPieces;  // vectors
  const int64_t vectors = V / kWidth;
  for (int64_t row = blockIdx.x; row < N; row += gridDim.x) {
    float* s = logits + row * V;
    T* ds = reinterpret_cast<T*>(s);
    const int64_t label = labels[row];
    if (label < 0) {
      // No target: no loss, no gradient.
      if (threadIdx.x == 0) losses[row] = 0;
      for (int64_t i = threadIdx.x; gradient && i < V; i += kThreads) ds[i] = from_float<T>(0.0f);
      continue;
    }

    Sum sum{-CUDART_INF_F, 0.0f};
    for (int64_t first = threadIdx.x; first < vectors; first += kTile) {
      Vector<float, kWidth> piece[kPieces];
#pragma unroll
      for (int p = 0; p < kPieces; ++p) {
        if (first + p * kThreads < vectors) piece[p] = load<kWidth>(s, first + p * kThreads);
      }
#pragma unroll
      for (int p = 0; p < kPieces; ++p) {
        const int64_t vector = first + p * kThreads;
        if (vector >= vectors) continue;
        float z[kWidth];
#pragma unroll
        for (int i = 0; i < kWidth; ++i) {
          z[i] = vector * kWidth + i == label ? -CUDART_INF_F : cap<kCapped>(piece[p].v[i], softcap);
        }
        add(sum, z);
      }
    }
    const float target = cap<kCapped>(s[label], softcap);
    sum = block_merge(sum);
    const Outcome outcome(sum, target);
    if (threadIdx.x == 0) losses[row] = outcome.loss;
    if (!gradient) continue;
    for (int64_t base = 0; base < vectors; base += kTile) {
      Vector<float, kWidth> piece[kPieces];
#pragma unroll
      for (int p = 0; p < kPieces; ++p) {
        const int64_t vector = base + threadIdx.x + p * kThreads;
        if (vector < vectors) piece[p] = load<kWidth>(s, vector);
      }
      __syncthreads();
#pragma unroll
      for (int p = 0; p < kPieces; ++p) {
        const int64_t vector = base + threadIdx.x + p * kThreads;
        if (vector >= vectors) continue;
        Vector<T, kWidth> out;
#pragma unroll
        for (int i = 0; i < kWidth; ++i) {
          const float z = cap<kCapped>(piece[p].v[i], softcap);
          out.v[i] = from_float<T>(outcome.ds<kCapped>(z, vector * kWidth + i == label, softcap));
        }
        store<kWidth>(ds, vector, out);
      }
    }
  }
}

}  // namespace
}  // namespace ferrotune

using namespace ferrotune;

extern "C" int cross_entropy(float* logits, const int64_t* labels, float* losses, int64_t N, int64_t V, float softcap,
                             int gradient, int dtype, void* stream) {
  if (N == 0) return cudaSuccess;
  return with_type(dtype, [&](auto t) -> int {
    using T = decltype(t);
    const auto launch = [&](auto width, auto capped) -> int {
      cross_entropy_kernel<T, decltype(width)::value, decltype(capped)::value != 0>
          <<<grid_x(N), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(logits, labels, losses, N, V, softcap,
                                                                          gradient != 0);
      return cudaGetLastError();
    };
    const auto with_width = [&](auto width) -> int {
      return softcap > 0 ? launch(width, Width<1>{}) : launch(width, Width<0>{});
    };
    return V % 4 == 0 && aligned16(logits) ? with_width(Width<4>{}) : with_width(Width<1>{});
  });
}
