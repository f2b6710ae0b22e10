// The gated activation of the MLP, arXiv:2002.05202, forward and backward: with gate_up = [gate | up], [N, 2F],
//   y = act(gate) up,   act = silu, or gelu exactly or by tanh
// Fuses the activation and the product, which plain libtorch runs as 2 kernels forward and 4 backward (one of them a
// copy into the joined gradient). Moves: forward read gate and up, write y, 3 N F elements; backward read dy, gate and
// up, write dgate and dup, 5 N F elements, and 6 where it writes y again.
// For products in e4m3 (csrc/fp8.h) y, or dgate and dup, are written in it at once: a row stays in registers between the largest
// of it and its bytes, N F or 2 N F bytes more, where fp8_rows would read 2 or 4 N F again, too.
//
// Backward, act(gate) computed again rather than kept:
//   dgate = dy up act'(gate)      dup = dy act(gate)
//   silu:      s = 1 / (1 + e^-g), act = g s, act' = s (1 + g (1 - s))
//   gelu:      P = (1 + erf(g / sqrt 2)) / 2, act = g P, act' = P + g e^(-g^2 / 2) / sqrt(2 pi)
//   gelu_tanh: t = tanh(k (g + a g^3)), k = sqrt(2 / pi), a = 0.044715,
//              act = g (1 + t) / 2, act' = (1 + t) / 2 + g (1 - t^2) k (1 + 3 a g^2) / 2
#include "chain.cuh"
#include "e4m3.cuh"

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

// Threads of a row, and rows that a processor works on at a time, so that some read while others wait for their maximum. Turing has
// threads for two.
constexpr int kRowThreads = 512;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
constexpr int kRows = 2;
#else
constexpr int kRows = 3;
#endif

// A vector's place in the shared memory of the row, or where it was written if there is no room for it.
template <int kWidth>
struct Held {
  int vectors;  // with room

  __device__ Vector<Bf16, kWidth>* room() const {
    extern __shared__ __align__(16) unsigned char shared[];
    return reinterpret_cast<Vector<Bf16, kWidth>*>(shared);
  }
  __device__ void put(int c, const Vector<Bf16, kWidth>& a) const {
    if (c < vectors) room()[c] = a;
  }
  __device__ Vector<Bf16, kWidth> get(int c, const Bf16* written) const { return c < vectors ? room()[c] : load<kWidth>(written, c); }
};

// One row a block; y and its e4m3. A thread reads of `held` only what it has put there.
template <int kWidth, int kActivation>
__global__ void __launch_bounds__(kRowThreads, kRows)
    swiglu_forward_fp8_kernel(const Bf16* __restrict__ gate_up, Bf16* y, KernelFp8Rows to, int64_t F, int64_t gate_up_stride,
                              int64_t y_stride, Held<kWidth> held) {
  const int64_t row = blockIdx.x;
  const int vectors = static_cast<int>(F / kWidth);
  const Bf16* gate_row = gate_up + row * gate_up_stride;
  Bf16* y_row = y + row * y_stride;
  uint32_t m = 0;
#pragma unroll 1
  for (int c = threadIdx.x; c < vectors; c += blockDim.x) {
    const auto gate = load<kWidth>(gate_row, c), up = load<kWidth>(gate_row + F, c);
    Vector<Bf16, kWidth> out;
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      out.v[i] = from_float<Bf16>(activate<kActivation>(to_float(gate.v[i])).value * to_float(up.v[i]));
    }
    store<kWidth>(y_row, c, out);
    held.put(c, out);
    m = magnitudes(m, out);
  }
  const RowScale scale(row_largest(m));
  if (threadIdx.x == 0) to.scale[row] = scale.scale;
  uint8_t* to_row = to.bytes + row * to.stride;
  for (int c = threadIdx.x; c < vectors; c += blockDim.x) store_e4m3(to_row, c, held.get(c, y_row), scale.inverse);
}

// One row a block; dgate_up, which may be gate_up, and its e4m3.
template <int kWidth, int kActivation>
__global__ void __launch_bounds__(kRowThreads, kRows)
    swiglu_backward_fp8_kernel(const Bf16* __restrict__ dy, const Bf16* gate_up, Bf16* dgate_up, KernelFp8Rows to, int64_t F,
                               int64_t dy_stride, int64_t gate_up_stride, int64_t dgate_up_stride, Held<kWidth> held) {
  const int64_t row = blockIdx.x;
  const int vectors = static_cast<int>(F / kWidth);
  const Bf16 *gate_row = gate_up + row * gate_up_stride, *dy_row = dy + row * dy_stride;
  Bf16* dgate_row = dgate_up + row * dgate_up_stride;
  uint32_t m = 0;
#pragma unroll 1
  for (int c = threadIdx.x; c < vectors; c += blockDim.x) {
    const auto gate = load<kWidth>(gate_row, c), up = load<kWidth>(gate_row + F, c), d = load<kWidth>(dy_row, c);
    Vector<Bf16, kWidth> dgate, dup;
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      const Activated a = activate<kActivation>(to_float(gate.v[i]));
      const float g = to_float(d.v[i]);
      dgate.v[i] = from_float<Bf16>(g * to_float(up.v[i]) * a.slope);
      dup.v[i] = from_float<Bf16>(g * a.value);
    }
    store<kWidth>(dgate_row, c, dgate);
    store<kWidth>(dgate_row + F, c, dup);
    held.put(c, dgate);
    held.put(c + vectors, dup);
    m = magnitudes(magnitudes(m, dgate), dup);
  }
  const RowScale scale(row_largest(m));
  if (threadIdx.x == 0) to.scale[row] = scale.scale;
  uint8_t* to_row = to.bytes + row * to.stride;
  // gate and up stand side by side in both.
  for (int half = 0; half < 2; ++half) {
    for (int c = threadIdx.x; c < vectors; c += blockDim.x) {
      store_e4m3(to_row + half * F, c, held.get(c + half * vectors, dgate_row), scale.inverse);
    }
  }
}

// ---- launchers

// One row of `columns` in bf16 a block, of which shared memory holds what fits kRows times into a processor's; in as few turns of
// its threads as can be, each of about equally many.
template <int kWidth, typename Kernel, typename... Arguments>
int launch_rows(Kernel* kernel, int64_t N, int64_t F, int64_t columns, void* stream, Arguments... arguments) {
  constexpr int64_t kReserved = 1024;  // of each block
  const int64_t room = device_attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor) / kRows - kReserved;
  const int64_t held = std::min(columns / kWidth, room / 16 * (8 / kWidth)), bytes = held * kWidth * 2;
  const int64_t vectors = F / kWidth, turns = ceil_div(vectors, kRowThreads);
  const unsigned threads = static_cast<unsigned>(ceil_div(ceil_div(vectors, turns), 32) * 32);
  const int error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
  if (error != cudaSuccess) return error;
  kernel<<<static_cast<unsigned>(N), threads, bytes, static_cast<cudaStream_t>(stream)>>>(arguments..., Held<kWidth>{static_cast<int>(held)});
  return cudaGetLastError();
}

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
                              int64_t y_stride, KernelFp8Rows fp8, int activation, int dtype, void* stream) {
  if (N == 0 || F == 0) return cudaSuccess;
  if (fp8.bytes != nullptr && (dtype != KERNEL_BF16 || N > 0x7fffffff)) return cudaErrorInvalidValue;
  return with_types(dtype, activation, [&](auto t, auto act) -> int {
    using T = decltype(t);
    const auto launch = [&](auto width) -> int {
      constexpr int kWidth = decltype(width)::value;
      if constexpr (std::is_same_v<T, Bf16>) {
        if (fp8.bytes != nullptr) {
          return launch_rows<kWidth>(swiglu_forward_fp8_kernel<kWidth, decltype(act)::value>, N, F, F, stream,
                                     static_cast<const T*>(gate_up), static_cast<T*>(y), fp8, F, gate_up_stride, y_stride);
        }
      }
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
                               int64_t dy_stride, int64_t gate_up_stride, int64_t dgate_up_stride, KernelFp8Rows fp8,
                               int activation, int dtype, void* stream) {
  if (N == 0 || F == 0) return cudaSuccess;
  if (fp8.bytes != nullptr && (dtype != KERNEL_BF16 || y != nullptr || N > 0x7fffffff)) return cudaErrorInvalidValue;
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
      if constexpr (std::is_same_v<T, Bf16>) {
        if (fp8.bytes != nullptr) {
          return launch_rows<kWidth>(swiglu_backward_fp8_kernel<kWidth, kActivation>, N, F, 2 * F, stream,
                                     static_cast<const T*>(dy), static_cast<const T*>(gate_up), static_cast<T*>(dgate_up), fp8, F,
                                     dy_stride, gate_up_stride, dgate_up_stride);
        }
      }
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
