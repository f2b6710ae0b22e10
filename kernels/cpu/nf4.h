// NF4 weights to floats; the format is in csrc/nf4.h.
#pragma once

#include "vector.h"

namespace ferrotune {
namespace {

// All 16 values of a block fit into one register (two without AVX-512), so an element is a permutation of it.
inline void nf4_block(const uint8_t* packed, int64_t bytes, const float* map, float scale, float* out) {
  float values[16];
  for (int i = 0; i < 16; ++i) values[i] = map[i] * scale;
#if defined(__AVX512F__)
  const __m512 table = load(values);
#else
  const __m256 low = load(values), high = load(values + 8);
#endif
  int64_t i = 0;
  for (; i + 8 <= bytes; i += 8, out += 16) {
    const __m128i pairs = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(packed + i)), mask = _mm_set1_epi8(15);
    const __m128i index = _mm_unpacklo_epi8(_mm_and_si128(_mm_srli_epi16(pairs, 4), mask), _mm_and_si128(pairs, mask));
#if defined(__AVX512F__)
    _mm512_storeu_ps(out, _mm512_permutexvar_ps(_mm512_cvtepu8_epi32(index), table));
#else
    for (int half = 0; half < 2; ++half) {
      const __m256i at = _mm256_cvtepu8_epi32(half == 0 ? index : _mm_srli_si128(index, 8));
      const __m256 below = _mm256_permutevar8x32_ps(low, at), above = _mm256_permutevar8x32_ps(high, at);
      // Bit 3 becomes the sign, by which the blend chooses.
      _mm256_storeu_ps(out + 8 * half, _mm256_blendv_ps(below, above, _mm256_castsi256_ps(_mm256_slli_epi32(at, 28))));
    }
#endif
  }
  for (; i < bytes; ++i, out += 2) {
    out[0] = values[packed[i] >> 4];
    out[1] = values[packed[i] & 15];
  }
}

}  // namespace
}  // namespace ferrotune
