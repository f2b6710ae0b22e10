// Few rows, as decoding works on: products with a matrix, and attention of one query over its cached keys. What comes out
// for a row is the same to the bit whatever other rows stand beside it: each number is one sum in one order, rounded once a
// multiply-add (in so many words: the compiler joins a product and a sum in one loop and not in another). A row alone reads
// every weight once and uses it once, so memory sets its time: 4 bytes for each multiply-add, or 2 of 16 bits. Weights, keys and
// values of 16 bits become f32 in registers, which is exact, and rows of x are f32 in any case.
#pragma once

#include <type_traits>

#include "pointwise.h"

namespace ferrotune {
namespace {

// The sums over the lanes of four vectors, side by side: two steps pair a and b, c and d within each quarter, and then the quarters
// are added up. By masks where gcc 12 warns of the plain ones' undefined operand.
inline V4 sums(V4 a, V4 b, V4 c, V4 d) {
  const V4 ab = _mm_add_ps(_mm_unpacklo_ps(a, b), _mm_unpackhi_ps(a, b)), cd = _mm_add_ps(_mm_unpacklo_ps(c, d), _mm_unpackhi_ps(c, d));
  return _mm_add_ps(_mm_movelh_ps(ab, cd), _mm_movehl_ps(cd, ab));
}
#if defined(__AVX512F__)
inline V4 sums(V a, V b, V c, V d) {
  const auto low = [](__m512d x, __m512d y) { return _mm512_castpd_ps(_mm512_maskz_unpacklo_pd(0xff, x, y)); };
  const auto high = [](__m512d x, __m512d y) { return _mm512_castpd_ps(_mm512_maskz_unpackhi_pd(0xff, x, y)); };
  const auto pairs = [](V x, V y) { return _mm512_castps_pd(_mm512_maskz_unpacklo_ps(0xffff, x, y) + _mm512_maskz_unpackhi_ps(0xffff, x, y)); };
  const __m512d ab = pairs(a, b), cd = pairs(c, d);
  const __m512 quarters = low(ab, cd) + high(ab, cd);
  const auto half = [&](auto which) { return _mm256_castpd_ps(_mm512_maskz_extractf64x4_pd(0xf, _mm512_castps_pd(quarters), which.value)); };
  const __m256 halves = half(std::integral_constant<int, 0>()) + half(std::integral_constant<int, 1>());
  return _mm256_castps256_ps128(halves) + _mm256_extractf128_ps(halves, 1);
}
#else
inline V4 sums(V a, V b, V c, V d) {
  const auto pairs = [](V x, V y) { return _mm256_castps_pd(_mm256_unpacklo_ps(x, y) + _mm256_unpackhi_ps(x, y)); };
  const __m256d ab = pairs(a, b), cd = pairs(c, d);
  const __m256 halves = _mm256_castpd_ps(_mm256_unpacklo_pd(ab, cd)) + _mm256_castpd_ps(_mm256_unpackhi_pd(ab, cd));
  return _mm256_castps256_ps128(halves) + _mm256_extractf128_ps(halves, 1);
}
#endif

// As many rows of x as registers hold sums beside four rows of w.
constexpr int kRows = kLanes == 16 ? 6 : 2;

// kX rows of x against four rows of w: [0, whole) by vectors of T, what is left of n one by one.
template <typename T, int kX, typename W>
inline void dots(const W* w, int64_t w_stride, const float* x, int64_t x_stride, int64_t n, V4* result) {
  constexpr int64_t kWidth = sizeof(T) / 4;
  T acc[kX][4] = {};
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) {
    T rows[4];
    for (int r = 0; r < 4; ++r) rows[r] = load_as<T>(w + r * w_stride + i);
#pragma GCC unroll 6
    for (int m = 0; m < kX; ++m) {
      const T v = load_as<T>(x + m * x_stride + i);
#pragma GCC unroll 4
      for (int r = 0; r < 4; ++r) acc[m][r] = fma(rows[r], v, acc[m][r]);
    }
  }
  // Unrolled, or the sums would be in memory.
#pragma GCC unroll 6
  for (int m = 0; m < kX; ++m) result[m] = sums(acc[m][0], acc[m][1], acc[m][2], acc[m][3]);
  for (; i < n; ++i) {
    V4 rows;
    for (int r = 0; r < 4; ++r) rows[r] = load_as<float>(w + r * w_stride + i);
    for (int m = 0; m < kX; ++m) result[m] = fma(rows, V4{} + x[m * x_stride + i], result[m]);
  }
}

template <int kX, typename W>
inline void dots(const W* w, int64_t w_stride, const float* x, int64_t x_stride, int64_t n, V4* result) {
  n < kLanes ? dots<V4, kX>(w, w_stride, x, x_stride, n, result) : dots<V, kX>(w, w_stride, x, x_stride, n, result);
}

// Fewer than four rows of w, one after the other.
template <int kX, typename W>
inline void dots_some(int64_t rows, const W* w, int64_t w_stride, const float* x, int64_t x_stride, int64_t n,
                      V4* result) {
  for (int64_t r = 0; r < rows; ++r) {
    V4 one[kX];
    dots<kX>(w + r * w_stride, 0, x, x_stride, n, one);
    for (int m = 0; m < kX; ++m) result[m][r] = one[m][0];
  }
}

template <int kX, typename W>
inline void products(int64_t rows, int64_t n, float scale, const W* w, const float* x, int64_t x_stride, float* y,
                     int64_t y_stride, bool add) {
  V4 result[kX] = {};
  rows == 4 ? dots<kX>(w, n, x, x_stride, n, result) : dots_some<kX>(rows, w, n, x, x_stride, n, result);
  for (int m = 0; m < kX; ++m) {
    V4 before{};
    if (add) memcpy(&before, y + m * y_stride, 4 * rows);
    const V4 value = fma(result[m], V4{} + scale, before);
    memcpy(y + m * y_stride, &value, 4 * rows);
  }
}

// The same for the last m rows of x, at most kMost.
template <int kMost, typename... Arguments>
inline void some_products(int64_t m, Arguments... arguments) {
  if (m == kMost) return products<kMost>(arguments...);
  if constexpr (kMost > 1) some_products<kMost - 1>(m, arguments...);
}

// Some rows of w, at most four, against all of x.
template <typename W>
inline void four_rows(int64_t m, int64_t count, int64_t n, float scale, const W* w, const float* x, float* y, int64_t y_stride,
                      bool add) {
  int64_t i = 0;
  for (; i + kRows <= m; i += kRows) products<kRows>(count, n, scale, w, x + i * n, n, y + i * y_stride, y_stride, add);
  some_products<kRows - 1>(m - i, count, n, scale, w, x + i * n, n, y + i * y_stride, y_stride, add);
}

inline void widen(int64_t n, CpuArray from, float* to) {
  typed(from.data, from.type, [&](const auto* p) {
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) store(to + i, load_as<V>(p + i));
    for (; i < n; ++i) to[i] = load_as<float>(p + i);
  });
}

inline void rows_product(int64_t m, int64_t rows, int64_t n, float scale, CpuArray w, const float* x, float* y,
                         int64_t y_stride, bool add, float* scratch) {
  typed(w.data, w.type, [&](const auto* from) {
    for (int64_t r = 0; r < rows; r += 4) {
      const int64_t count = rows - r < 4 ? rows - r : 4;
      if (m > kRows && w.type != CpuType::kFloat) {
        // Read again for more rows of x: made f32 once.
        widen(count * n, {from + r * n, w.type}, scratch);
        four_rows(m, count, n, scale, scratch, x, y + r, y_stride, add);
      } else {
        four_rows(m, count, n, scale, from + r * n, x, y + r, y_stride, add);
      }
    }
  });
}

// Calls body(row of a pool of pages, index of the key, keys) for each run of seen keys that lie in one page.
template <typename Body>
inline void each_run(const CpuPagedAttention& a, const Body& body) {
  for (int64_t key = a.low; key < a.high;) {
    const int64_t in_page = key % a.page_size, left = a.page_size - in_page;
    const int64_t count = a.high - key < left ? a.high - key : left;
    body((a.pages[key / a.page_size] * a.page_size + in_page) * a.key_stride, key - a.low, count);
    key += count;
  }
}

// out = scale times the sum of weights[s] v_s, in registers: kCount vectors of v at a time, from dim d on. Four sums side by
// side, as one would wait for each of its multiply-adds.
template <typename T, int kCount, typename E>
inline void weighted(const CpuPagedAttention& a, const E* v, const float* weights, int64_t d, float scale, float* out) {
  constexpr int64_t kWidth = sizeof(T) / 4;
  constexpr int kSums = 4;
  T acc[kSums][kCount] = {};
  each_run(a, [&](int64_t at, int64_t first, int64_t count) {
    const E* row = v + at + d;
    const float* weight = weights + first;
    int64_t s = 0;
    for (; s + kSums <= count; s += kSums) {
#pragma GCC unroll 4
      for (int u = 0; u < kSums; ++u, row += a.key_stride) {
        for (int i = 0; i < kCount; ++i) acc[u][i] += load_as<T>(row + i * kWidth) * weight[s + u];
      }
    }
    for (; s < count; ++s, row += a.key_stride) {
      for (int i = 0; i < kCount; ++i) acc[0][i] += load_as<T>(row + i * kWidth) * weight[s];
    }
  });
  for (int i = 0; i < kCount; ++i) {
    const T value = ((acc[0][i] + acc[1][i]) + (acc[2][i] + acc[3][i])) * scale;
    memcpy(out + d + i * kWidth, &value, sizeof value);
  }
}

// The scores of kX neighbouring heads, which share the keys: head m's at scores + m * scores_stride.
template <int kX, typename E>
inline void paged_scores(const CpuPagedAttention& a, const E* keys, const float* q, float* scores, int64_t scores_stride) {
  each_run(a, [&](int64_t at, int64_t first, int64_t count) {
    for (int64_t s = 0; s < count; s += 4) {
      const int64_t some = count - s < 4 ? count - s : 4;
      const E* k = keys + at + s * a.key_stride;
      V4 four[kX];
      some == 4 ? dots<kX>(k, a.key_stride, q, a.dim, a.dim, four)
                : dots_some<kX>(some, k, a.key_stride, q, a.dim, a.dim, four);
      for (int m = 0; m < kX; ++m) {
        four[m] = four[m] * a.scale;
        memcpy(scores + m * scores_stride + first + s, &four[m], 4 * some);
      }
    }
  });
}

// One head, from its scores to its output.
template <typename E>
inline void paged_output(const CpuPagedAttention& a, const E* v, float* scores, float* out) {
  const int64_t keys = a.high - a.low;
  if (a.softcap > 0) {
    each_vector(keys, [&](int64_t i, auto get, auto put) {
      put(scores + i, tanh(get(scores + i) * (1 / a.softcap)) * a.softcap);
    });
  }
  // Whole vectors from here on: the scores past the last key weigh nothing.
  const int64_t padded = (keys + kLanes - 1) / kLanes * kLanes;
  for (int64_t s = keys; s < padded; ++s) scores[s] = -INFINITY;
  V top = spread(-INFINITY), total{};
  for (int64_t s = 0; s < padded; s += kLanes) top = max(top, load(scores + s));
  const float highest = largest(top);
  for (int64_t s = 0; s < padded; s += kLanes) {
    const V e = exp(load(scores + s) - highest);
    store(scores + s, e);
    total += e;
  }
  const float scale = 1 / sum(total);
  int64_t d = 0;
  for (; d + 4 * kLanes <= a.dim; d += 4 * kLanes) weighted<V, 4>(a, v, scores, d, scale, out);
  for (; d + kLanes <= a.dim; d += kLanes) weighted<V, 1>(a, v, scores, d, scale, out);
  for (; d + 8 <= a.dim; d += 8) weighted<V4, 2>(a, v, scores, d, scale, out);
  for (; d + 4 <= a.dim; d += 4) weighted<V4, 1>(a, v, scores, d, scale, out);
  for (; d < a.dim; ++d) weighted<float, 1>(a, v, scores, d, scale, out);
}

inline void paged_attention(const CpuPagedAttention& a, float* o, float* scores) {
  const int64_t stride = a.high - a.low + kLanes;
  typed(a.k, a.type, [&](const auto* k) {
    const auto* const v = static_cast<decltype(k)>(a.v);
    int64_t h = 0;
    for (; h + 2 <= a.group; h += 2) {
      paged_scores<2>(a, k, a.q + h * a.dim, scores, stride);
      paged_output(a, v, scores, o + h * a.dim);
      paged_output(a, v, scores + stride, o + (h + 1) * a.dim);
    }
    if (h < a.group) {
      paged_scores<1>(a, k, a.q + h * a.dim, scores, stride);
      paged_output(a, v, scores, o + h * a.dim);
    }
  });
}

}  // namespace
}  // namespace ferrotune
