// One row, as decoding works on: products of a matrix with a vector, and attention of one query over its cached keys. Both
// read every weight or key once and use it once, so memory sets their time: 4 bytes for each multiply-add.
#pragma once

#include "pointwise.h"

namespace ferrotune {
namespace {

inline V4 quarters(V v) {
  V4 parts[kLanes / 4];
  memcpy(parts, &v, sizeof v);
  V4 total = parts[0];
  for (int i = 1; i < kLanes / 4; ++i) total += parts[i];
  return total;
}

inline V4 quarters(V4 v) { return v; }

// The sums over the lanes of four vectors.
template <typename T>
inline V4 sums(T a, T b, T c, T d) {
  typedef int32_t I4 __attribute__((vector_size(16)));
  const V4 p = quarters(a), q = quarters(b), r = quarters(c), s = quarters(d);
  const V4 pq = __builtin_shuffle(p, q, I4{0, 4, 1, 5}) + __builtin_shuffle(p, q, I4{2, 6, 3, 7});
  const V4 rs = __builtin_shuffle(r, s, I4{0, 4, 1, 5}) + __builtin_shuffle(r, s, I4{2, 6, 3, 7});
  return __builtin_shuffle(pq, rs, I4{0, 1, 4, 5}) + __builtin_shuffle(pq, rs, I4{2, 3, 6, 7});
}

template <typename T>
inline T load_as(const float* p) {
  T v;
  memcpy(&v, p, sizeof v);
  return v;
}

// Four rows of w against x: [0, whole) by vectors of T, what is left of n one by one.
template <typename T>
inline V4 dots(const float* w, int64_t stride, const float* x, int64_t n) {
  constexpr int64_t kWidth = sizeof(T) / 4;
  T acc[4] = {};
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) {
    const T v = load_as<T>(x + i);
    for (int r = 0; r < 4; ++r) acc[r] += load_as<T>(w + r * stride + i) * v;
  }
  V4 result = sums(acc[0], acc[1], acc[2], acc[3]);
  for (; i < n; ++i) {
    for (int r = 0; r < 4; ++r) result[r] += w[r * stride + i] * x[i];
  }
  return result;
}

inline V4 dots(const float* w, int64_t stride, const float* x, int64_t n) {
  return n < kLanes ? dots<V4>(w, stride, x, n) : dots<V>(w, stride, x, n);
}

// Fewer than four rows, one after the other.
inline V4 dots_some(int64_t rows, const float* w, int64_t stride, const float* x, int64_t n) {
  V4 result{};
  for (int64_t r = 0; r < rows; ++r) result[r] = dots(w + r * stride, 0, x, n)[0];
  return result;
}

inline void row_product(int64_t rows, int64_t n, float scale, const float* w, const float* x, float* y, bool add) {
  for (int64_t r = 0; r < rows; r += 4, w += 4 * n, y += 4) {
    const int64_t count = rows - r < 4 ? rows - r : 4;
    V4 value = (count == 4 ? dots(w, n, x, n) : dots_some(count, w, n, x, n)) * scale;
    V4 before{};
    if (add) memcpy(&before, y, 4 * count);
    value += before;
    memcpy(y, &value, 4 * count);
  }
}

// out = sum of weights[s] rows[s], in registers: kCount vectors of the rows at a time.
template <typename T, int kCount>
inline void weighted(int64_t keys, const float* weights, const float* rows, int64_t dim, float scale, float* out) {
  constexpr int64_t kWidth = sizeof(T) / 4;
  T acc[kCount] = {};
  for (int64_t s = 0; s < keys; ++s, rows += dim) {
    for (int i = 0; i < kCount; ++i) acc[i] += load_as<T>(rows + i * kWidth) * weights[s];
  }
  for (int i = 0; i < kCount; ++i) {
    const T value = acc[i] * scale;
    memcpy(out + i * kWidth, &value, sizeof value);
  }
}

inline void row_attention(const CpuRowAttention& a, float* o, float* scores) {
  for (int64_t h = 0; h < a.group; ++h) {
    const float* q = a.q + h * a.dim;
    float* out = o + h * a.dim;
    int64_t s = 0;
    for (; s + 4 <= a.keys; s += 4) {
      const V4 four = dots(a.k + s * a.dim, a.dim, q, a.dim) * a.scale;
      memcpy(scores + s, &four, sizeof four);
    }
    const V4 rest = dots_some(a.keys - s, a.k + s * a.dim, a.dim, q, a.dim) * a.scale;
    memcpy(scores + s, &rest, 4 * (a.keys - s));
    if (a.softcap > 0) {
      each_vector(a.keys, [&](int64_t i, auto get, auto put) {
        put(scores + i, tanh(get(scores + i) * (1 / a.softcap)) * a.softcap);
      });
    }
    // Whole vectors from here on: the scores past the last key weigh nothing.
    const int64_t padded = (a.keys + kLanes - 1) / kLanes * kLanes;
    for (s = a.keys; s < padded; ++s) scores[s] = -INFINITY;
    V top = spread(-INFINITY), total{};
    for (s = 0; s < padded; s += kLanes) top = max(top, load(scores + s));
    const float highest = largest(top);
    for (s = 0; s < padded; s += kLanes) {
      const V e = exp(load(scores + s) - highest);
      store(scores + s, e);
      total += e;
    }
    const float scale = 1 / sum(total);
    int64_t d = 0;
    for (; d + 4 * kLanes <= a.dim; d += 4 * kLanes) weighted<V, 4>(a.keys, scores, a.v + d, a.dim, scale, out + d);
    for (; d + kLanes <= a.dim; d += kLanes) weighted<V, 1>(a.keys, scores, a.v + d, a.dim, scale, out + d);
    for (; d + 4 <= a.dim; d += 4) weighted<V4, 1>(a.keys, scores, a.v + d, a.dim, scale, out + d);
    for (; d < a.dim; ++d) weighted<float, 1>(a.keys, scores, a.v + d, a.dim, scale, out + d);
  }
}

}  // namespace
}  // namespace ferrotune
