// defines: Fills, fill_matrix, EightsToFill: the matrices of KernelFill, a part of what a kernel does or all of it.
#pragma once

#include "chain.cuh"

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

// Whether each eight neighbours of a matrix of 16 bits are eight of `from`, or zero.
template <typename T>
bool fills_by_eights(const KernelFill& m) {
  return fills_by<T, 8>(m) && m.first % 8 == 0 && m.from_columns % 8 == 0;
}

// What one of `threads` fills of such matrices, kAtOnce times eight neighbours at a time. `from` is what no kernel writes, so that ask() may come
// before inputs_ready(); write() may not, as what is filled may have readers under way.
template <typename T>
class EightsToFill {
 public:
  __device__ EightsToFill(const Fills& fills, unsigned thread, unsigned threads) : fills(fills), next(thread), threads(threads) {}

  __device__ void ask() {
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k, next += threads) {
      eights[k] = {};
      unsigned own = next;
      int p = 0;
      for (; p < fills.count; ++p) {
        const unsigned count = static_cast<unsigned>(fills.matrices[p].rows * fills.matrices[p].columns) / 8;
        if (own < count) break;
        own -= count;
      }
      if (p >= fills.count) continue;
      const KernelFill& m = fills.matrices[p];
      const unsigned columns = static_cast<unsigned>(m.columns) / 8, row = own / columns, first = 8 * (own - row * columns);
      eights[k].to = static_cast<T*>(m.to) + row * m.to_stride + first;
      eights[k].scale = m.scale;
      eights[k].f32 = m.from_f32 != 0;
      const int64_t column = static_cast<int64_t>(first) - m.first;
      if (row >= m.from_rows || column < 0 || column >= m.from_columns) continue;
      const char* const from = static_cast<const char*>(m.from) + (row * m.from_columns + column) * (m.from_f32 ? 4 : 2);
      eights[k].low = load_early(from);
      if (m.from_f32) eights[k].high = load_early(from + 16);
    }
  }

  // Whether there was something.
  __device__ bool write() const {
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) {
      if (eights[k].to == nullptr) continue;
      const auto low = reinterpret_cast<const Vector<float, 4>&>(eights[k].low), high = reinterpret_cast<const Vector<float, 4>&>(eights[k].high);
      const auto as_is = reinterpret_cast<const Vector<T, 8>&>(eights[k].low);
      Vector<T, 8> out;
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        out.v[i] = from_float<T>(eights[k].scale * (!eights[k].f32 ? to_float(as_is.v[i]) : i < 4 ? low.v[i] : high.v[i - 4]));
      }
      store<8>(eights[k].to, 0, out);
    }
    return eights[0].to != nullptr;
  }

 private:
  static constexpr int kAtOnce = 4;
  struct Eight {
    T* to;
    float scale;
    bool f32;
    uint4 low, high;
  };
  const Fills& fills;
  unsigned next, threads;
  Eight eights[kAtOnce];
};

}  // namespace ferrotune
