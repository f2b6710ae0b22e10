// defines: Fills, fill_matrix: the matrices of KernelFill, a part of what a kernel does or all of it.
#pragma once

#include "vector.cuh"

namespace ferrotune {

struct Fills {
  KernelFill matrices[KERNEL_MOST_FILLS];
  int64_t count;
};

template <typename T, int kWidth>
bool fills_by(const KernelFill& m) {
  return m.columns % kWidth == 0 && m.to_stride % kWidth == 0 && aligned16(m.to) && aligned16(m.from) && m.rows * m.columns >> 31 == 0;
}

// Elements first .. first + kWidth of a row; zero outside.
template <typename T, int kWidth>
__device__ inline Vector<T, kWidth> filled_from(const KernelFill& m, unsigned row, int64_t first) {
  Vector<T, kWidth> out{};
  if (row >= m.from_rows || first + kWidth <= 0 || first >= m.from_columns) return out;
  const int64_t at = row * m.from_columns + first;
  float values[kWidth] = {};
  const bool whole = first >= 0 && first + kWidth <= m.from_columns && at % kWidth == 0;
  if (whole && m.from_f32) {
    load_float<kWidth>(static_cast<const float*>(m.from), at / kWidth, values);
  } else if (whole) {
    load_float<kWidth>(static_cast<const T*>(m.from), at / kWidth, values);
  } else {
    for (int j = 0; j < kWidth; ++j) {
      if (first + j < 0 || first + j >= m.from_columns) continue;
      values[j] = m.from_f32 ? static_cast<const float*>(m.from)[at + j] : to_float(static_cast<const T*>(m.from)[at + j]);
    }
  }
#pragma unroll
  for (int j = 0; j < kWidth; ++j) out.v[j] = from_float<T>(m.scale * values[j]);
  return out;
}

// kWidth neighbours at a time, by `threads` of which this one is number `thread`. Several loads are under way before the first store.
template <typename T, int kWidth>
__device__ inline void fill_matrix(const KernelFill& m, unsigned thread, unsigned threads) {
  constexpr int kAtOnce = 4;
  const unsigned vectors = static_cast<unsigned>(m.columns / kWidth), count = static_cast<unsigned>(m.rows) * vectors;
  for (unsigned i = thread; i < count; i += kAtOnce * threads) {
    Vector<T, kWidth> out[kAtOnce];
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) {
      const unsigned own = i + k * threads, row = own / vectors;
      if (own < count) out[k] = filled_from<T, kWidth>(m, row, static_cast<int64_t>(own - row * vectors) * kWidth - m.first);
    }
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) {
      const unsigned own = i + k * threads, row = own / vectors;
      if (own < count) store<kWidth>(static_cast<T*>(m.to) + row * m.to_stride, own - row * vectors, out[k]);
    }
  }
}

}  // namespace ferrotune
