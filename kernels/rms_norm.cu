// RMSNorm, arXiv:1910.07467, forward and backward.
//   y = x r (w + offset),   r = 1 / sqrt(mean_c(x_c^2) + eps)
// Fuses the square, the mean, the root and both products, which plain libtorch runs as 5 kernels with f32 temporaries.
// A row stays in registers between its statistics and its output, so each tensor crosses device memory once:
//   forward          read x, write y              2 N C elements (+ 4 N bytes of r)
//   backward, dx     read dy and x, write dx      3 N C elements; one more where the gradient that goes around the norm is
//                                                added in the same pass (plain libtorch: 3 more)
//   backward, dw     read dy and x                2 N C elements, only where the weight trains
// y or dx in e4m3 at once (csrc/fp8.h), for a product that takes it so: N C bytes more, where fp8_rows would read the row again, too.
//
// Backward. With g = dy (w + offset) and xh = x r:
//   dr/dx_c = -r^3 x_c / C
//   dx_c = g_c r + sum_k(g_k x_k) dr/dx_c = r (g_c - xh_c mean_k(g_k xh_k))
//   dw_c = sum over rows of dy_c xh_c
// dw is summed in fixed runs of rows, then over the runs (by the caller): no atomics, the same bits every time.
#include "chain.cuh"
#include "e4m3.cuh"
#include "rms.cuh"

namespace ferrotune {
namespace {

// Rows that are longer than the vectors of their threads are read again, from the cache. The backward
// holds two tensors, so half as many of each as kForwardVectors. Measured on an H200 at [8192, 4096] bf16, copy 4.02 TB/s: forward 3.31
// with 2 vectors a thread, 3.66 with 4; backward 3.59 with 2 + 2 and at most 64 registers, 2.17 with 4 + 4 (spills).
constexpr int kBackwardVectors = 2;

// ---- device

// Where token row / H, head row % H starts in a tensor of token stride `stride`.
__device__ inline int64_t row_start(int64_t row, int64_t H, int64_t C, int64_t stride) {
  if (H == 1) return row * stride;
  // A 64-bit division costs as much as the row's arithmetic when C is a head_dim.
  const int64_t token = row >> 32 == 0 ? static_cast<uint32_t>(row) / static_cast<uint32_t>(H) : row / H;
  return token * stride + (row - token * H) * C;
}

// The sum over the blockDim.x threads of a row (a power of two); every thread of the block must call it.
__device__ inline float row_sum(float value) {
  __shared__ float warp_sums[32];
  const int lanes = blockDim.x < 32 ? blockDim.x : 32;
  for (int step = lanes / 2; step > 0; step /= 2) value += __shfl_xor_sync(0xffffffff, value, step);
  if (blockDim.x <= 32) return value;
  const int warps = blockDim.x / 32, first = threadIdx.y * warps;
  __syncthreads();  // the sums of the row before have been read
  if (threadIdx.x % 32 == 0) warp_sums[first + threadIdx.x / 32] = value;
  __syncthreads();
  value = 0;
  for (int w = 0; w < warps; ++w) value += warp_sums[first + w];
  return value;
}

template <typename T, typename W, int kWidth, bool kFp8>
__global__ void __launch_bounds__(kMaxRowThreads, 2)
    rms_norm_forward_kernel(const T* __restrict__ x, const W* __restrict__ weight, T* __restrict__ y, float* __restrict__ rstd,
                            int64_t rows, int64_t H, int64_t C, int64_t x_stride, int64_t y_stride, float eps, float offset, KernelFp8Rows fp8) {
  next_may_start();
  inputs_ready();
  const int vectors = static_cast<int>(C / kWidth);
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * blockDim.y; first < rows;
       first += static_cast<int64_t>(gridDim.x) * blockDim.y) {
    const int64_t row = first + threadIdx.y;
    const bool active = row < rows;
    const T* x_row = x + (active ? row_start(row, H, C, x_stride) : 0);
    Vector<T, kWidth> cached[kForwardVectors];
    float sum = 0;
    if (active) {
#pragma unroll
      for (int j = 0; j < kForwardVectors; ++j) {
        const int c = threadIdx.x + j * blockDim.x;
        if (c < vectors) cached[j] = load<kWidth>(x_row, c);
      }
#pragma unroll
      for (int j = 0; j < kForwardVectors; ++j) {
        if (threadIdx.x + j * blockDim.x < vectors) sum += squares(cached[j]);
      }
#pragma unroll 1
      for (int c = threadIdx.x + kForwardVectors * blockDim.x; c < vectors; c += blockDim.x) {
        sum += squares(load<kWidth>(x_row, c));
      }
    }
    const float r = rsqrtf(row_sum(sum) / static_cast<float>(C) + eps);
    if (!kFp8 && !active) continue;
    if (active && threadIdx.x == 0) rstd[row] = r;
    T* y_row = y + (active ? row_start(row, H, C, y_stride) : 0);
    const auto write = [&](int c, const Vector<T, kWidth>& a) {
      float w[kWidth];
      load_float<kWidth>(weight, c, w);
      const Vector<T, kWidth> out = normed(a, w, r, offset);
      store<kWidth>(y_row, c, out);
      return out;
    };
    if (active) {
#pragma unroll
      for (int j = 0; j < kForwardVectors; ++j) {
        const int c = threadIdx.x + j * blockDim.x;
        if (c >= vectors) continue;
        const Vector<T, kWidth> out = write(c, cached[j]);
        if constexpr (kFp8) cached[j] = out;
      }
#pragma unroll 1
      for (int c = threadIdx.x + kForwardVectors * blockDim.x; c < vectors; c += blockDim.x) write(c, load<kWidth>(x_row, c));
    }
    if constexpr (kFp8) write_e4m3(fp8, row, cached, y_row, vectors, active);
  }
}

template <typename T, typename W, int kWidth, bool kFp8>
__global__ void __launch_bounds__(kMaxRowThreads, 2)
    rms_norm_backward_kernel(const T* __restrict__ dy, const T* __restrict__ x, const W* __restrict__ weight,
                             const float* __restrict__ rstd, const T* __restrict__ residual, T* __restrict__ dx, int64_t rows, int64_t H,
                             int64_t C, int64_t x_stride, int64_t residual_stride, int64_t dx_stride, float offset, KernelFp8Rows fp8) {
  const int vectors = static_cast<int>(C / kWidth);
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * blockDim.y; first < rows;
       first += static_cast<int64_t>(gridDim.x) * blockDim.y) {
    const int64_t row = first + threadIdx.y;
    const bool active = row < rows;
    const T* x_row = x + (active ? row_start(row, H, C, x_stride) : 0);
    const T* dy_row = dy + (active ? row * C : 0);
    const float r = active ? rstd[row] : 0;
    Vector<T, kWidth> x_cached[kBackwardVectors], dy_cached[kBackwardVectors];
    const auto dot = [&](int c, const Vector<T, kWidth>& a, const Vector<T, kWidth>& d) {
      float w[kWidth], sum = 0;
      load_float<kWidth>(weight, c, w);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) sum += to_float(d.v[i]) * (w[i] + offset) * (to_float(a.v[i]) * r);
      return sum;
    };
    float sum = 0;
    if (active) {
#pragma unroll
      for (int j = 0; j < kBackwardVectors; ++j) {
        const int c = threadIdx.x + j * blockDim.x;
        if (c < vectors) {
          x_cached[j] = load<kWidth>(x_row, c);
          dy_cached[j] = load<kWidth>(dy_row, c);
        }
      }
#pragma unroll
      for (int j = 0; j < kBackwardVectors; ++j) {
        const int c = threadIdx.x + j * blockDim.x;
        if (c < vectors) sum += dot(c, x_cached[j], dy_cached[j]);
      }
#pragma unroll 1
      for (int c = threadIdx.x + kBackwardVectors * blockDim.x; c < vectors; c += blockDim.x) {
        sum += dot(c, load<kWidth>(x_row, c), load<kWidth>(dy_row, c));
      }
    }
    const float mean = row_sum(sum) / static_cast<float>(C);
    if (!kFp8 && !active) continue;
    T* dx_row = dx + (active ? row_start(row, H, C, dx_stride) : 0);
    const auto write = [&](int c, const Vector<T, kWidth>& a, const Vector<T, kWidth>& d) {
      float w[kWidth], sums[kWidth];
      load_float<kWidth>(weight, c, w);
      Vector<T, kWidth> out;
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        const float g = to_float(d.v[i]) * (w[i] + offset);
        sums[i] = r * (g - to_float(a.v[i]) * r * mean);
      }
      if (residual != nullptr) {
        const Vector<T, kWidth> around = load<kWidth>(residual + row_start(row, H, C, residual_stride), c);
#pragma unroll
        for (int i = 0; i < kWidth; ++i) sums[i] += to_float(around.v[i]);
      }
#pragma unroll
      for (int i = 0; i < kWidth; ++i) out.v[i] = from_float<T>(sums[i]);
      store<kWidth>(dx_row, c, out);
      return out;
    };
    if (active) {
#pragma unroll
      for (int j = 0; j < kBackwardVectors; ++j) {
        const int c = threadIdx.x + j * blockDim.x;
        if (c >= vectors) continue;
        const Vector<T, kWidth> out = write(c, x_cached[j], dy_cached[j]);
        if constexpr (kFp8) x_cached[j] = out;
      }
#pragma unroll 1
      for (int c = threadIdx.x + kBackwardVectors * blockDim.x; c < vectors; c += blockDim.x) {
        write(c, load<kWidth>(x_row, c), load<kWidth>(dy_row, c));
      }
    }
    if constexpr (kFp8) write_e4m3(fp8, row, x_cached, dx_row, vectors, active);
  }
}

constexpr int kTileVectors = 32, kTileRows = 8;

// One block sums one run of rows for kTileVectors vectors of columns: kTileRows rows at a time, then those among
// themselves.
template <typename T, int kWidth>
__global__ void rms_norm_weight_backward_kernel(const T* __restrict__ dy, const T* __restrict__ x,
                                                const float* __restrict__ rstd, float* __restrict__ partial,
                                                int64_t rows, int64_t H, int64_t C, int64_t x_stride, int64_t run) {
  __shared__ float sums[kTileRows][kTileVectors][kWidth];
  const int64_t c = static_cast<int64_t>(blockIdx.x) * kTileVectors + threadIdx.x;
  const bool active = c < C / kWidth;
  const int64_t begin = blockIdx.y * run, end = begin + run < rows ? begin + run : rows;
  float sum[kWidth] = {};
  if (active) {
#pragma unroll 4
    for (int64_t row = begin + threadIdx.y; row < end; row += kTileRows) {
      const auto a = load<kWidth>(x + row_start(row, H, C, x_stride), c);
      const auto d = load<kWidth>(dy + row * C, c);
      const float r = rstd[row];
#pragma unroll
      for (int i = 0; i < kWidth; ++i) sum[i] += to_float(d.v[i]) * (to_float(a.v[i]) * r);
    }
  }
#pragma unroll
  for (int i = 0; i < kWidth; ++i) sums[threadIdx.y][threadIdx.x][i] = sum[i];
  __syncthreads();
  if (threadIdx.y != 0 || !active) return;
#pragma unroll
  for (int i = 0; i < kWidth; ++i) {
    float total = 0;
    for (int y = 0; y < kTileRows; ++y) total += sums[y][threadIdx.x][i];
    partial[blockIdx.y * C + c * kWidth + i] = total;
  }
}

// ---- launchers

// Short rows (a head_dim) share a block.
dim3 row_block(int64_t vectors, int per_thread) {
  const int threads = row_threads(vectors, per_thread);
  return dim3(threads, threads < 256 ? 256 / threads : 1);
}

template <typename T>
bool vectorises(int64_t C, int64_t x_stride, std::initializer_list<const void*> tensors) {
  constexpr int kWidth = 16 / sizeof(T);
  bool fits = C % kWidth == 0 && x_stride % kWidth == 0;
  for (const void* tensor : tensors) fits = fits && aligned16(tensor);
  return fits;
}

// Calls body(T, W) for x and weight types.
template <typename Body>
int with_types(int dtype, int weight_dtype, Body&& body) {
  return with_type(dtype, [&](auto t) -> int {
    using T = decltype(t);
    if (weight_dtype == KERNEL_F32) return body(T{}, float{});
    if (weight_dtype == dtype) return body(T{}, T{});
    return cudaErrorInvalidValue;
  });
}

}  // namespace
}  // namespace ferrotune

using namespace ferrotune;

extern "C" int rms_norm_forward(const void* x, const void* weight, void* y, float* rstd, int64_t N, int64_t H,
                                int64_t C, int64_t x_stride, int64_t y_stride, float eps, float offset, KernelFp8Rows fp8,
                                int dtype, int weight_dtype, void* stream) {
  const int64_t rows = N * H;
  if (rows == 0 || C == 0) return cudaSuccess;
  if (fp8.bytes != nullptr && (dtype != KERNEL_BF16 || H != 1)) return cudaErrorInvalidValue;
  return with_types(dtype, weight_dtype, [&](auto t, auto w) -> int {
    using T = decltype(t);
    using W = decltype(w);
    const auto launch = [&](auto width) -> int {
      constexpr int kWidth = decltype(width)::value;
      const dim3 block = row_block(C / kWidth, kForwardVectors);
      const auto run = [&](auto* kernel) -> int {
        return launch_chained(N <= kFewRows, kernel, dim3(grid_x(ceil_div(rows, block.y))), block, 0, stream, static_cast<const T*>(x),
                              static_cast<const W*>(weight), static_cast<T*>(y), rstd, rows, H, C, x_stride, y_stride, eps, offset, fp8);
      };
      if constexpr (std::is_same_v<T, Bf16>) {
        if (fp8.bytes != nullptr) return run(rms_norm_forward_kernel<T, W, kWidth, true>);
      }
      return run(rms_norm_forward_kernel<T, W, kWidth, false>);
    };
    if (vectorises<T>(C, x_stride, {x, weight, y}) && y_stride % (16 / sizeof(T)) == 0) return launch(Width<16 / sizeof(T)>{});
    return launch(Width<1>{});
  });
}

extern "C" int rms_norm_backward(const void* dy, const void* x, const void* weight, const float* rstd,
                                 const void* residual, void* dx, int64_t N, int64_t H, int64_t C, int64_t x_stride,
                                 int64_t residual_stride, int64_t dx_stride, float offset, KernelFp8Rows fp8, int dtype,
                                 int weight_dtype, void* stream) {
  const int64_t rows = N * H;
  if (rows == 0 || C == 0) return cudaSuccess;
  if (fp8.bytes != nullptr && (dtype != KERNEL_BF16 || H != 1)) return cudaErrorInvalidValue;
  return with_types(dtype, weight_dtype, [&](auto t, auto w) -> int {
    using T = decltype(t);
    using W = decltype(w);
    const auto launch = [&](auto width) -> int {
      constexpr int kWidth = decltype(width)::value;
      const dim3 block = row_block(C / kWidth, kBackwardVectors);
      const auto run = [&](auto* kernel) -> int {
        kernel<<<grid_x(ceil_div(rows, block.y)), block, 0, static_cast<cudaStream_t>(stream)>>>(
            static_cast<const T*>(dy), static_cast<const T*>(x), static_cast<const W*>(weight), rstd, static_cast<const T*>(residual),
            static_cast<T*>(dx), rows, H, C, x_stride, residual_stride, dx_stride, offset, fp8);
        return cudaGetLastError();
      };
      if constexpr (std::is_same_v<T, Bf16>) {
        if (fp8.bytes != nullptr) return run(rms_norm_backward_kernel<T, W, kWidth, true>);
      }
      return run(rms_norm_backward_kernel<T, W, kWidth, false>);
    };
    constexpr int kWidth = 16 / sizeof(T);
    const bool strided = residual_stride % kWidth == 0 && dx_stride % kWidth == 0;
    if (strided && vectorises<T>(C, x_stride, {dy, x, weight, residual, dx})) return launch(Width<kWidth>{});
    return launch(Width<1>{});
  });
}

extern "C" int rms_norm_weight_backward(const void* dy, const void* x, const float* rstd, float* partial, int64_t N,
                                        int64_t H, int64_t C, int64_t x_stride, int64_t chunks, int dtype,
                                        void* stream) {
  const int64_t rows = N * H;
  if (C == 0 || chunks == 0) return cudaSuccess;
  return with_type(dtype, [&](auto t) -> int {
    using T = decltype(t);
    const auto launch = [&](auto width) -> int {
      constexpr int kWidth = decltype(width)::value;
      const dim3 grid(grid_x(ceil_div(C / kWidth, kTileVectors)), static_cast<unsigned>(chunks));
      rms_norm_weight_backward_kernel<T, kWidth>
          <<<grid, dim3(kTileVectors, kTileRows), 0, static_cast<cudaStream_t>(stream)>>>(
              static_cast<const T*>(dy), static_cast<const T*>(x), rstd, partial, rows, H, C, x_stride,
              ceil_div(rows, chunks));
      return cudaGetLastError();
    };
    if (vectorises<T>(C, x_stride, {dy, x})) return launch(Width<16 / sizeof(T)>{});
    return launch(Width<1>{});
  });
}
