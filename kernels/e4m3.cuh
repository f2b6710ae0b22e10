// defines: magnitudes, row_largest, RowScale, store_e4m3, write_e4m3, e4m3_word: rows in e4m3 with a power of two a row, as csrc/fp8.h defines them.
// For kernels that write a row in bf16 and its bytes at once: |x| of a row is a maximum of 16-bit integers, two in a register; a NaN
// is larger than infinity, so that neither is overlooked.
#pragma once

#include <cuda_fp8.h>

#include "vector.cuh"

namespace ferrotune {

using Bf16 = __nv_bfloat16;

// A row's largest number is at most 448 / 2^3 after scaling.
constexpr int kHeadRoom = 3;

__device__ inline float power_of_two(int exponent) { return __int_as_float((exponent + 127) << 23); }

// The larger of two pairs of 16-bit integers.
__device__ inline uint32_t larger(uint32_t a, uint32_t b) { return __vmaxu2(a, b); }

// |a| as such pairs, the largest of them and m.
template <int kWidth>
__device__ inline uint32_t magnitudes(uint32_t m, const Vector<Bf16, kWidth>& a) {
  if constexpr (kWidth % 2 == 0) {
    const auto* words = reinterpret_cast<const uint32_t*>(&a);
#pragma unroll
    for (int i = 0; i < kWidth / 2; ++i) m = larger(m, words[i] & 0x7fff7fffu);
    return m;
  } else {
    static_assert(kWidth == 1);
    return larger(m, __bfloat16_as_ushort(a.v[0]) & 0x7fffu);
  }
}

// The scale of a row of which m are the magnitudes: the least power of two with which 2^kHeadRoom of its largest number is at most
// 448 = 1.75 * 2^8, from 2^-126 on; NaN for a row with NaN or infinity, which would be written as the largest number.
struct RowScale {
  float scale, inverse;

  __device__ explicit RowScale(uint32_t m) {
    const uint32_t bits = max(m & 0xffff, m >> 16) << 16;
    const int e = max(static_cast<int>(bits >> 23) - 127 - 8 + ((bits & 0x7fffff) > 0x600000) + kHeadRoom, -126);
    const bool finite = bits < 0x7f800000;
    scale = finite ? power_of_two(e) : __int_as_float(0x7fc00000);
    inverse = finite ? power_of_two(-e) : 0;
  }
};

__device__ inline uint32_t e4m3_pair(float a, float b) {
  return __nv_cvt_float2_to_fp8x2(make_float2(a, b), __NV_SATFINITE, __NV_E4M3);
}

__device__ inline uint32_t e4m3_word(const float (&v)[4]) { return e4m3_pair(v[0], v[1]) | e4m3_pair(v[2], v[3]) << 16; }

__device__ inline float e4m3_value(uint32_t byte) {
  return __half2float(__half(__nv_cvt_fp8_to_halfraw(static_cast<__nv_fp8_storage_t>(byte & 0xff), __NV_E4M3)));
}

// A vector of a row's bytes.
template <int kWidth>
__device__ inline void store_e4m3(uint8_t* row, int64_t vector, const Vector<Bf16, kWidth>& a, float inverse) {
  if constexpr (kWidth % 4 == 0) {
    Vector<uint32_t, kWidth / 4> words;
#pragma unroll
    for (int w = 0; w < kWidth / 4; ++w) {
      float v[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) v[i] = to_float(a.v[4 * w + i]) * inverse;
      words.v[w] = e4m3_word(v);
    }
    store<kWidth / 4>(reinterpret_cast<uint32_t*>(row), vector, words);
  } else {
    static_assert(kWidth == 1);
    row[vector] = static_cast<uint8_t>(e4m3_pair(to_float(a.v[0]) * inverse, 0));
  }
}

// The largest over the blockDim.x threads of a row (a power of two, or whole warps of one row a block); every thread of the block must
// call it.
__device__ inline uint32_t row_largest(uint32_t m) {
  __shared__ uint32_t of_warps[32];
  const int lanes = blockDim.x < 32 ? blockDim.x : 32;
  for (int step = lanes / 2; step > 0; step /= 2) m = larger(m, __shfl_xor_sync(0xffffffff, m, step));
  if (blockDim.x <= 32) return m;
  const int warps = blockDim.x / 32, first = threadIdx.y * warps;
  __syncthreads();  // those of the row before have been read
  if (threadIdx.x % 32 == 0) of_warps[first + threadIdx.x / 32] = m;
  __syncthreads();
  m = 0;
  for (int w = 0; w < warps; ++w) m = larger(m, of_warps[first + w]);
  return m;
}

// A row in e4m3, by the threads that share it: of each the vectors that it holds, and those that it reads again. Every thread of the block
// must call it; one that is not `active` has no row.
template <int kWidth, int kHeld>
__device__ inline void write_e4m3(const KernelFp8Rows& to, int64_t row, const Vector<Bf16, kWidth> (&held)[kHeld], const Bf16* written,
                                  int vectors, bool active) {
  uint32_t m = 0;
  if (active) {
#pragma unroll
    for (int j = 0; j < kHeld; ++j) {
      if (threadIdx.x + j * blockDim.x < vectors) m = magnitudes(m, held[j]);
    }
#pragma unroll 1
    for (int c = threadIdx.x + kHeld * blockDim.x; c < vectors; c += blockDim.x) m = magnitudes(m, load<kWidth>(written, c));
  }
  const RowScale scale(row_largest(m));
  if (!active) return;
  if (threadIdx.x == 0) to.scale[row] = scale.scale;
  uint8_t* to_row = to.bytes + row * to.stride;
#pragma unroll
  for (int j = 0; j < kHeld; ++j) {
    const int c = threadIdx.x + j * blockDim.x;
    if (c < vectors) store_e4m3(to_row, c, held[j], scale.inverse);
  }
#pragma unroll 1
  for (int c = threadIdx.x + kHeld * blockDim.x; c < vectors; c += blockDim.x) {
    store_e4m3(to_row, c, load<kWidth>(written, c), scale.inverse);
  }
}

}  // namespace ferrotune
