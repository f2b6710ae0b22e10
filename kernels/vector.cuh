// defines: Vector, load, store, keep_packed, to_float, from_float, aligned16, ceil_div, and the dispatch from KernelDtype to a type.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "kernels.h"

namespace ferrotune {

__device__ inline float to_float(float v) { return v; }
__device__ inline float to_float(__half v) { return __half2float(v); }
__device__ inline float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }

template <typename T>
__device__ inline T from_float(float v);
template <>
__device__ inline float from_float<float>(float v) {
  return v;
}
template <>
__device__ inline __half from_float<__half>(float v) {
  return __float2half_rn(v);
}
template <>
__device__ inline __nv_bfloat16 from_float<__nv_bfloat16>(float v) {
  return __float2bfloat16_rn(v);
}

// kWidth neighbouring elements that move in one access.
template <typename T, int kWidth>
struct alignas(sizeof(T) * kWidth) Vector {
  T v[kWidth];
};

template <int kWidth, typename T>
__device__ inline Vector<T, kWidth> load(const T* base, int64_t vector) {
  return reinterpret_cast<const Vector<T, kWidth>*>(base)[vector];
}

template <int kWidth, typename T>
__device__ inline void store(T* base, int64_t vector, const Vector<T, kWidth>& value) {
  reinterpret_cast<Vector<T, kWidth>*>(base)[vector] = value;
}

// Keeps a 16-byte vector packed in 4 registers up to this point. Left alone, the compiler unpacks bf16 as soon as it is
// loaded, for it is only a shift, and holds 8 registers where 4 would do.
template <typename T, int kWidth>
__device__ inline void keep_packed(Vector<T, kWidth>& value) {
  if constexpr (sizeof(value) == 16) {
    auto* words = reinterpret_cast<unsigned*>(&value);
    asm volatile("" : "+r"(words[0]), "+r"(words[1]), "+r"(words[2]), "+r"(words[3]));
  }
}

// Loads kWidth values of another type than the one the width was chosen for: 16-byte accesses where they fit.
template <int kWidth, typename T>
__device__ inline void load_float(const T* base, int64_t vector, float (&out)[kWidth]) {
  constexpr int kPiece = kWidth * sizeof(T) > 16 ? 16 / sizeof(T) : kWidth;
#pragma unroll
  for (int p = 0; p < kWidth / kPiece; ++p) {
    const auto piece = load<kPiece>(base, vector * (kWidth / kPiece) + p);
#pragma unroll
    for (int i = 0; i < kPiece; ++i) out[p * kPiece + i] = to_float(piece.v[i]);
  }
}

inline bool aligned16(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The launch grid has 31 bits in x; kernels stride over it, so a larger problem only loops.
inline unsigned grid_x(int64_t blocks) {
  constexpr int64_t kMax = 0x7fffffff;
  return static_cast<unsigned>(blocks < kMax ? blocks : kMax);
}

// A vector width as a type, to pass it to a generic lambda.
template <int kValue>
struct Width {
  static constexpr int value = kValue;
};

// Calls body(T{}) with the type of dtype.
template <typename Body>
int with_type(int dtype, Body&& body) {
  switch (dtype) {
    case KERNEL_F32:
      return body(float{});
    case KERNEL_F16:
      return body(__half{});
    case KERNEL_BF16:
      return body(__nv_bfloat16{});
  }
  return cudaErrorInvalidValue;
}

}  // namespace ferrotune
