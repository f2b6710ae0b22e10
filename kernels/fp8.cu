// Rows of activations and gradients in e4m3 (arXiv:2209.05433) with one scale a row, and LoRA's matrices behind weights in it.
// The formats are in csrc/fp8.h: a scale is a power of two, so that it rounds nothing and the CPU's bytes are these.
//   fp8_rows   read x, write its bytes     3 N K bytes of bf16 rows, which stay in registers between absmax and the bytes
//   fp8_lora   read A or B, write 3 bytes an element of it
// A number v of LoRA is two numbers in e4m3, hi = e4m3(v) and lo = e4m3(v - hi): with z and b so split,
//   z b = hi(z) hi(b) + lo(z) hi(b) + hi(z) lo(b) + lo(z) lo(b)
// of which the first three are columns of the product, [hi | lo | hi] times [hi | hi | lo], each `padded` wide. What is left out
// is 2^-8 of z b, about what bf16 rounds off.
#include <cuda_fp8.h>

#include "vector.cuh"

namespace ferrotune {
namespace {

using Bf16 = __nv_bfloat16;

// 16-byte vectors of a row that a thread holds: 4, or 8 of a row over 16,384; rows over 32,768 are read again. Two thread blocks
// a processor, so that one reads while the other waits for its maximum.
constexpr int kWidth = 8, kMostThreads = 512;

// ---- device

__device__ inline float power_of_two(int exponent) { return __int_as_float((exponent + 127) << 23); }

// The least e of -126 .. with m <= 448 * 2^e, 448 = 1.75 * 2^8 being the largest number of e4m3.
__device__ inline int scale_exponent(float m) {
  const int bits = __float_as_int(m), e = (bits >> 23) - 127 - 8 + ((bits & 0x7fffff) > 0x600000);
  return max(e, -126);
}

__device__ inline uint32_t e4m3_pair(float a, float b) {
  return __nv_cvt_float2_to_fp8x2(make_float2(a, b), __NV_SATFINITE, __NV_E4M3);
}

__device__ inline uint32_t e4m3_word(const float (&v)[4]) { return e4m3_pair(v[0], v[1]) | e4m3_pair(v[2], v[3]) << 16; }

__device__ inline float e4m3_value(uint32_t byte) {
  return __half2float(__half(__nv_cvt_fp8_to_halfraw(static_cast<__nv_fp8_storage_t>(byte & 0xff), __NV_E4M3)));
}

struct Split {
  uint32_t hi, lo;
};

__device__ inline Split split(const float (&v)[4]) {
  const uint32_t hi = e4m3_word(v);
  float rest[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) rest[i] = v[i] - e4m3_value(hi >> 8 * i);
  return {hi, e4m3_word(rest)};
}

// Of the threads of a block.
__device__ inline float block_max(float value) {
  __shared__ float warps[32];
#pragma unroll
  for (int step = 16; step > 0; step /= 2) value = fmaxf(value, __shfl_xor_sync(0xffffffff, value, step));
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = value;
  __syncthreads();
  value = threadIdx.x % 32 < blockDim.x / 32 ? warps[threadIdx.x % 32] : 0;
#pragma unroll
  for (int step = 16; step > 0; step /= 2) value = fmaxf(value, __shfl_xor_sync(0xffffffff, value, step));
  return value;
}

// One row a block.
template <int kVectors>
__global__ void __launch_bounds__(kMostThreads, 2)
    fp8_rows_kernel(const Bf16* __restrict__ x, const int8_t* __restrict__ exponents, const Bf16* __restrict__ z,
                    uint8_t* __restrict__ y, float* __restrict__ scale, int64_t K, int64_t x_stride, int64_t R, int64_t z_stride,
                    int64_t y_stride, int64_t padded, float z_factor) {
  const int64_t row = blockIdx.x;
  const Bf16* x_row = x + row * x_stride;
  const int vectors = static_cast<int>(K / kWidth);
  // Times the scales of the columns: exact in bf16.
  const auto scaled = [&](Vector<Bf16, kWidth> a, int c) {
    if (exponents == nullptr) return a;
    const auto e = load<kWidth>(exponents, c);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) a.v[i] = from_float<Bf16>(to_float(a.v[i]) * power_of_two(e.v[i]));
    return a;
  };
  const auto largest = [](float m, const Vector<Bf16, kWidth>& a) {
#pragma unroll
    for (int i = 0; i < kWidth; ++i) m = fmaxf(m, fabsf(to_float(a.v[i])));
    return m;
  };
  Vector<Bf16, kWidth> cached[kVectors];
  float m = 0;
#pragma unroll
  for (int j = 0; j < kVectors; ++j) {
    const int c = threadIdx.x + j * blockDim.x;
    if (c < vectors) cached[j] = load<kWidth>(x_row, c);
  }
#pragma unroll
  for (int j = 0; j < kVectors; ++j) {
    const int c = threadIdx.x + j * blockDim.x;
    if (c >= vectors) continue;
    cached[j] = scaled(cached[j], c);
    keep_packed(cached[j]);
    m = largest(m, cached[j]);
  }
#pragma unroll 1
  for (int c = threadIdx.x + kVectors * blockDim.x; c < vectors; c += blockDim.x) {
    m = largest(m, scaled(load<kWidth>(x_row, c), c));
  }
  const int first = 4 * threadIdx.x;
  float tail[4] = {};
  if (first < padded) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (first + i < R) tail[i] = to_float(z[row * z_stride + first + i]) * z_factor;
      m = fmaxf(m, fabsf(tail[i]));
    }
  }
  m = block_max(m);
  const int e = scale_exponent(m);
  // An infinity would be written as the largest number.
  if (threadIdx.x == 0) scale[row] = m < __int_as_float(0x7f800000) ? power_of_two(e) : __int_as_float(0x7fc00000);
  const float inverse = power_of_two(-e);
  uint8_t* y_row = y + row * y_stride;
  const auto write = [&](int c, const Vector<Bf16, kWidth>& a) {
    float v[2][4];
#pragma unroll
    for (int i = 0; i < kWidth; ++i) v[i / 4][i % 4] = to_float(a.v[i]) * inverse;
    reinterpret_cast<uint2*>(y_row)[c] = make_uint2(e4m3_word(v[0]), e4m3_word(v[1]));
  };
#pragma unroll
  for (int j = 0; j < kVectors; ++j) {
    const int c = threadIdx.x + j * blockDim.x;
    if (c < vectors) write(c, cached[j]);
  }
#pragma unroll 1
  for (int c = threadIdx.x + kVectors * blockDim.x; c < vectors; c += blockDim.x) {
    write(c, scaled(load<kWidth>(x_row, c), c));
  }
  if (first >= padded) return;
#pragma unroll
  for (int i = 0; i < 4; ++i) tail[i] *= inverse;
  const Split s = split(tail);
  auto* words = reinterpret_cast<uint32_t*>(y_row + K);
  words[threadIdx.x] = s.hi;
  words[padded / 4 + threadIdx.x] = s.lo;
  words[padded / 2 + threadIdx.x] = s.hi;
}

// A thread writes four columns of each third, of one row.
__global__ void fp8_lora_kernel(KernelFp8Lora l) {
  constexpr float kLargest = 448;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (row >= l.rows) return;
  const int first = 4 * blockIdx.y;
  const float inverse = l.exponents == nullptr ? 1 : power_of_two(-l.exponents[row]);
  float v[4] = {};
  for (int p = 0; p < l.count; ++p) {
    const KernelFp8Part& part = l.parts[p];
    const int64_t r = row - part.first;
    if (r < 0 || r >= part.rows) continue;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int64_t column = first + i - part.column;
      if (column < 0 || column >= part.R) continue;
      v[i] = part.from[r * part.row_stride + column * part.rank_stride] * part.factor * inverse;
      // Beyond e4m3: not a number, as nothing should train with what it is cut down to.
      if (!(fabsf(v[i]) <= kLargest)) v[i] = __int_as_float(0x7fc00000);
    }
  }
  const Split s = split(v);
  auto* words = reinterpret_cast<uint32_t*>(l.to + row * l.to_stride);
  words[blockIdx.y] = s.hi;
  words[l.padded / 4 + blockIdx.y] = s.hi;
  words[l.padded / 2 + blockIdx.y] = s.lo;
}

}  // namespace
}  // namespace ferrotune

using namespace ferrotune;

// ---- launchers

extern "C" int fp8_rows(const void* x, const int8_t* exponents, const void* z, uint8_t* y, float* scale, int64_t N, int64_t K,
                        int64_t x_stride, int64_t R, int64_t z_stride, int64_t y_stride, int64_t padded, float z_factor,
                        void* stream) {
  if (N == 0) return cudaSuccess;
  int threads = 64;
  while (threads < kMostThreads && threads * 4 * kWidth < K) threads *= 2;
  if (padded > 4 * threads || N > 0x7fffffff) return cudaErrorInvalidValue;
  const auto kernel = threads * 4 * kWidth < K ? fp8_rows_kernel<8> : fp8_rows_kernel<4>;
  kernel<<<static_cast<unsigned>(N), threads, 0, static_cast<cudaStream_t>(stream)>>>(
      static_cast<const Bf16*>(x), exponents, static_cast<const Bf16*>(z), y, scale, K, x_stride, R, z_stride, y_stride, padded,
      z_factor);
  return cudaGetLastError();
}

extern "C" int fp8_lora(const KernelFp8Lora* lora, void* stream) {
  if (lora->rows == 0 || lora->padded == 0) return cudaSuccess;
  const dim3 grid(grid_x(ceil_div(lora->rows, 128)), static_cast<unsigned>(lora->padded / 4));
  fp8_lora_kernel<<<grid, 128, 0, static_cast<cudaStream_t>(stream)>>>(*lora);
  return cudaGetLastError();
}
