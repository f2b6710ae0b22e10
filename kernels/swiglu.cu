// The gated activation of the MLP, arXiv:2002.05202, forward and backward: with gate_up = [gate | up], [N, 2F],
//   y = act(gate) up,   act = silu, or gelu exactly or by tanh
// Fuses the activation and the product, which plain libtorch runs as 2 kernels forward and 4 backward (one of them a
// copy into the joined gradient). Moves: forward read gate and up, write y, 3 N F elements; backward read dy, gate and
// up, write dgate and dup, 5 N F elements, and 6 where it writes y again.
//
// Backward, act(gate) computed again rather than kept:
//   dgate = dy up act'(gate)      dup = dy act(gate)
//   silu:      s = 1 / (1 + e^-g), act = g s, act' = s (1 + g (1 - s))
//   gelu:      P = (1 + erf(g / sqrt 2)) / 2, act = g P, act' = P + g e^(-g^2 / 2) / sqrt(2 pi)
//   gelu_tanh: t = tanh(k (g + a g^3)), k = sqrt(2 / pi), a = 0.044715,
//              act = g (1 + t) / 2, act' = (1 + t) / 2 + g (1 - t^2) k (1 + 3 a g^2) / 2
#include "chain.cuh"

namespace ferrotune {
namespace {

// ---- device

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

// A block covers blockDim.x vectors of columns of blockDim.y rows; tiles of one row follow each other in the grid.
struct Place {
  int64_t row, vector;
  bool inside;
};

__device__ inline Place place(int64_t block, int64_t tiles, int64_t N, int64_t vectors) {
  // One division per block, not per element.
  const int64_t band = block / tiles;
  const int64_t row = band * blockDim.y + threadIdx.y;
  const int64_t vector = (block - band * tiles) * blockDim.x + threadIdx.x;
  return {row, vector, row < N && vector < vectors};
}

template <typename T, int kWidth, int kActivation>
__global__ void swiglu_forward_kernel(const T* __restrict__ gate_up, T* __restrict__ y, int64_t N, int64_t F,
                                      int64_t gate_up_stride, int64_t y_stride, int64_t tiles, int64_t blocks) {
  next_may_start();
  inputs_ready();
  for (int64_t block = blockIdx.x; block < blocks; block += gridDim.x) {
    const Place at = place(block, tiles, N, F / kWidth);
    if (!at.inside) continue;
    const T* gate_row = gate_up + at.row * gate_up_stride;
    const auto gate = load<kWidth>(gate_row, at.vector), up = load<kWidth>(gate_row + F, at.vector);
    Vector<T, kWidth> out;
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      out.v[i] = from_float<T>(activate<kActivation>(to_float(gate.v[i])).value * to_float(up.v[i]));
    }
    store<kWidth>(y + at.row * y_stride, at.vector, out);
  }
}

// dgate_up may be gate_up, and y may be dy.
template <typename T, int kWidth, int kActivation, bool kAgain>
__global__ void swiglu_backward_kernel(const T* dy, const T* gate_up, T* dgate_up, T* y, int64_t N, int64_t F,
                                       int64_t dy_stride, int64_t gate_up_stride, int64_t dgate_up_stride, int64_t tiles,
                                       int64_t blocks) {
  for (int64_t block = blockIdx.x; block < blocks; block += gridDim.x) {
    const Place at = place(block, tiles, N, F / kWidth);
    if (!at.inside) continue;
    const T* gate_row = gate_up + at.row * gate_up_stride;
    const auto gate = load<kWidth>(gate_row, at.vector), up = load<kWidth>(gate_row + F, at.vector);
    const auto d = load<kWidth>(dy + at.row * dy_stride, at.vector);
    Vector<T, kWidth> dgate, dup, again;
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      const Activated a = activate<kActivation>(to_float(gate.v[i]));
      const float g = to_float(d.v[i]);
      dgate.v[i] = from_float<T>(g * to_float(up.v[i]) * a.slope);
      dup.v[i] = from_float<T>(g * a.value);
      if constexpr (kAgain) again.v[i] = from_float<T>(a.value * to_float(up.v[i]));
    }
    T* dgate_row = dgate_up + at.row * dgate_up_stride;
    store<kWidth>(dgate_row, at.vector, dgate);
    store<kWidth>(dgate_row + F, at.vector, dup);
    if constexpr (kAgain) store<kWidth>(y + at.row * dy_stride, at.vector, again);
  }
}

// ---- launchers

// Calls body(T{}, Width<kActivation>{}).
template <typename Body>
int with_types(int dtype, int activation, Body&& body) {
  return with_type(dtype, [&](auto t) -> int {
    switch (activation) {
      case KERNEL_SILU:
        return body(t, Width<KERNEL_SILU>{});
      case KERNEL_GELU_TANH:
        return body(t, Width<KERNEL_GELU_TANH>{});
      case KERNEL_GELU:
        return body(t, Width<KERNEL_GELU>{});
    }
    return cudaErrorInvalidValue;
  });
}

struct Launch {
  dim3 block;
  int64_t tiles, blocks;

  Launch(int64_t N, int64_t vectors) {
    unsigned threads = 32;
    while (threads < 256 && threads < vectors) threads *= 2;
    block = dim3(threads, 256 / threads);
    tiles = ceil_div(vectors, threads);
    blocks = tiles * ceil_div(N, block.y);
  }
};

}  // namespace
}  // namespace ferrotune

using namespace ferrotune;

extern "C" int swiglu_forward(const void* gate_up, void* y, int64_t N, int64_t F, int64_t gate_up_stride,
                              int64_t y_stride, int activation, int dtype, void* stream) {
  if (N == 0 || F == 0) return cudaSuccess;
  return with_types(dtype, activation, [&](auto t, auto act) -> int {
    using T = decltype(t);
    const auto launch = [&](auto width) -> int {
      constexpr int kWidth = decltype(width)::value;
      const Launch l(N, F / kWidth);
      return launch_chained(N <= kFewRows, swiglu_forward_kernel<T, kWidth, decltype(act)::value>, dim3(grid_x(l.blocks)), l.block, 0,
                            stream, static_cast<const T*>(gate_up), static_cast<T*>(y), N, F, gate_up_stride, y_stride, l.tiles,
                            l.blocks);
    };
    constexpr int kWidth = 16 / sizeof(T);
    const bool fits = F % kWidth == 0 && gate_up_stride % kWidth == 0 && y_stride % kWidth == 0 && aligned16(gate_up) &&
                      aligned16(y);
    return fits ? launch(Width<kWidth>{}) : launch(Width<1>{});
  });
}

extern "C" int swiglu_backward(const void* dy, const void* gate_up, void* dgate_up, void* y, int64_t N, int64_t F,
                               int64_t dy_stride, int64_t gate_up_stride, int64_t dgate_up_stride, int activation,
                               int dtype, void* stream) {
  if (N == 0 || F == 0) return cudaSuccess;
  return with_types(dtype, activation, [&](auto t, auto act) -> int {
    using T = decltype(t);
    const auto launch = [&](auto width) -> int {
      constexpr int kWidth = decltype(width)::value;
      const Launch l(N, F / kWidth);
      const auto run = [&](auto* kernel) -> int {
        kernel<<<grid_x(l.blocks), l.block, 0, static_cast<cudaStream_t>(stream)>>>(
            static_cast<const T*>(dy), static_cast<const T*>(gate_up), static_cast<T*>(dgate_up), static_cast<T*>(y), N,
            F, dy_stride, gate_up_stride, dgate_up_stride, l.tiles, l.blocks);
        return cudaGetLastError();
      };
      constexpr int kActivation = decltype(act)::value;
      return y == nullptr ? run(swiglu_backward_kernel<T, kWidth, kActivation, false>)
                          : run(swiglu_backward_kernel<T, kWidth, kActivation, true>);
    };
    constexpr int kWidth = 16 / sizeof(T);
    const bool fits = F % kWidth == 0 && dy_stride % kWidth == 0 && gate_up_stride % kWidth == 0 &&
                      dgate_up_stride % kWidth == 0 && aligned16(dy) && aligned16(gate_up) && aligned16(dgate_up) &&
                      aligned16(y);
    return fits ? launch(Width<kWidth>{}) : launch(Width<1>{});
  });
}
