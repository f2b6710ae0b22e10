// One register of floats as a GCC vector type: arithmetic is element by element, constants spread by themselves.
#pragma once

#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#include "cpu_kernels.h"

namespace ferrotune {
namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#else
constexpr int kLanes = 8;
#endif

typedef float V __attribute__((vector_size(4 * kLanes)));
typedef int32_t I __attribute__((vector_size(4 * kLanes)));
typedef float V4 __attribute__((vector_size(16)));

inline V load(const float* p) {
  V v;
  memcpy(&v, p, sizeof v);
  return v;
}

inline void store(float* p, V v) { memcpy(p, &v, sizeof v); }

inline V spread(float x) { return x - V{}; }

// The first n lanes, zeros in the others.
inline V load_some(const float* p, int64_t n) {
  float lanes[kLanes] = {};
  memcpy(lanes, p, 4 * n);
  return load(lanes);
}

inline void store_some(float* p, V v, int64_t n) {
  float lanes[kLanes];
  store(lanes, v);
  memcpy(p, lanes, 4 * n);
}

// Where a is not a number, so is the result.
inline V max(V a, V b) { return b > a ? b : a; }
inline V min(V a, V b) { return b < a ? b : a; }

inline V4 fma(V4 a, V4 b, V4 c) { return _mm_fmadd_ps(a, b, c); }

// gather: base[index]. gather_bytes reads four bytes at each place. By mask where gcc 12 warns of the plain one's undefined
// operand.
#if defined(__AVX512F__)
inline V sqrt(V v) { return _mm512_maskz_sqrt_ps(0xffff, v); }
inline V fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
inline V gather(const float* base, I index) {
  return _mm512_mask_i32gather_ps(_mm512_setzero_ps(), 0xffff, reinterpret_cast<__m512i>(index), base, 4);
}
inline I gather_bytes(const uint8_t* base, I index) {
  const __m512i at = reinterpret_cast<__m512i>(index);
  return reinterpret_cast<I>(_mm512_mask_i32gather_epi32(_mm512_setzero_si512(), 0xffff, at, base, 1)) & 255;
}
#else
inline V sqrt(V v) { return _mm256_sqrt_ps(v); }
inline V fma(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
inline V gather(const float* base, I index) { return _mm256_i32gather_ps(base, reinterpret_cast<__m256i>(index), 4); }
inline I gather_bytes(const uint8_t* base, I index) {
  return reinterpret_cast<I>(_mm256_i32gather_epi32(reinterpret_cast<const int*>(base), reinterpret_cast<__m256i>(index), 1)) & 255;
}
#endif

// 16-bit floats as they are stored.
struct Bfloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

// A vector of T = V, V4 or float from as many elements at p.
template <typename T>
inline T load_as(const float* p) {
  T v;
  memcpy(&v, p, sizeof v);
  return v;
}
template <typename T>
inline T load_as(const Bfloat16* p) {
  if constexpr (sizeof(T) == 4) {
    const uint32_t bits = static_cast<uint32_t>(p->bits) << 16;
    float v;
    memcpy(&v, &bits, sizeof v);
    return v;
  } else if constexpr (sizeof(T) == 16) {
    return _mm_castsi128_ps(_mm_slli_epi32(_mm_cvtepu16_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))), 16));
  } else {
#if defined(__AVX512F__)
    const __m512i words = _mm512_maskz_cvtepu16_epi32(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    return _mm512_castsi512_ps(_mm512_maskz_slli_epi32(0xffff, words, 16));
#else
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))), 16));
#endif
  }
}
template <typename T>
inline T load_as(const Half* p) {
  if constexpr (sizeof(T) == 4) {
    return _cvtsh_ss(p->bits);
  } else if constexpr (sizeof(T) == 16) {
    return _mm_cvtph_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  } else {
#if defined(__AVX512F__)
    return _mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#else
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#endif
  }
}

// body(typed pointer) for elements of that type.
template <typename Body>
inline void typed(const void* data, CpuType type, const Body& body) {
  switch (type) {
    case CpuType::kBfloat16:
      return body(static_cast<const Bfloat16*>(data));
    case CpuType::kHalf:
      return body(static_cast<const Half*>(data));
    default:
      return body(static_cast<const float*>(data));
  }
}

inline float sum(V v) {
  float lanes[kLanes];
  store(lanes, v);
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  }
  return lanes[0];
}

inline float largest(V v) {
  float lanes[kLanes];
  store(lanes, v);
  for (int i = 1; i < kLanes; ++i) lanes[0] = lanes[i] > lanes[0] ? lanes[i] : lanes[0];
  return lanes[0];
}

#if defined(__AVX512F__)
// e^x to about 1 ulp: x = n ln 2 + r with |r| <= ln(2)/2, e^r by its Taylor polynomial of degree 7 (error 5e-9).
inline V exp(V x) {
  constexpr float kInverseLn2 = 1.44269504088896341f, kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
  // Beyond these the result is 0 and infinite anyway, and n stays small.
  const V clamped = max(min(x, spread(89.0f)), spread(-104.0f));
  const V n = _mm512_maskz_roundscale_ps(0xffff, clamped * kInverseLn2, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const V r = (clamped - n * kLn2High) - n * kLn2Low;
  V p = r * (1.0f / 5040) + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  return _mm512_maskz_scalef_ps(0xffff, p, n);
}
#else
// e^x to about 1 ulp: x = n ln 2 + r with |r| <= ln(2)/2, e^r by its Taylor polynomial of degree 7 (error 5e-9).
// Below -87 the result is flushed to zero, above 88 it is infinite.
inline V exp(V x) {
  constexpr float kInverseLn2 = 1.44269504088896341f, kMagic = 12582912.0f;  // 1.5 * 2^23: adding it rounds
  constexpr float kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
  const V clamped = max(min(x, spread(88.8f)), spread(-87.3f));
  const V shifted = clamped * kInverseLn2 + kMagic;
  const V n = shifted - kMagic;
  const V r = (clamped - n * kLn2High) - n * kLn2Low;
  V p = r * (1.0f / 5040) + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  // n is in the low bits of shifted; 2^n in two factors, as 2^128 is no float.
  I bits;
  memcpy(&bits, &shifted, sizeof bits);
  const I e = bits - 0x4b400000, half = e >> 1;
  const I low = (half + 127) << 23, high = (e - half + 127) << 23;
  V a, b;
  memcpy(&a, &low, sizeof a);
  memcpy(&b, &high, sizeof b);
  return x < spread(-87.3f) ? V{} : p * a * b;
}
#endif

// tanh x = (1 - e) / (1 + e) with e = e^(-2|x|), signed; near 0, where that cancels, by its series.
inline V tanh(V x) {
  const V absolute = x < 0 ? -x : x;
  const V e = exp(absolute * -2.0f);
  const V far = (1.0f - e) / (1.0f + e);
  const V square = x * x;
  const V near = x * (1.0f + square * (-1.0f / 3 + square * (2.0f / 15 + square * (-17.0f / 315 + square * (62.0f / 2835)))));
  const V result = x < 0 ? -far : far;
  return absolute < spread(0.25f) ? near : result;
}

}  // namespace
}  // namespace ferrotune
