// C (+)= alpha A B by register tiles of 8 rows (6 with AVX2) and two vectors of columns: 16 accumulators hide the latency of
// the multiply-adds, each loaded vector of B serves 8 rows, and the elements of A are broadcast from wherever they lie, so A is
// never copied. B is copied into panels of two vectors where its columns are not contiguous (a transposed weight) or its
// width does not divide.
#pragma once

#include "cpu_kernels.h"
#include "vector.h"

namespace ferrotune {
namespace {

constexpr int kPanel = 2 * kLanes;
// As many rows as registers hold: 32 of 16 lanes with AVX-512, 16 of 8 lanes with AVX2.
constexpr int kTileRows = kLanes == 16 ? 8 : 6;
// Depth of a block: a panel of B stays in the first-level cache, the rows of A in the second.
constexpr int64_t kDepth = 256, kBlockRows = 512;

template <int kRows, int kVectors>
inline void tile(int64_t k, float alpha, const float* a, int64_t a_row, int64_t a_col, const float* b, int64_t b_row,
                 float* c, int64_t ldc, bool add) {
  V acc[kRows][kVectors];
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) acc[i][v] = V{};
  }
  for (int64_t p = 0; p < k; ++p) {
    V row[kVectors];
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) row[v] = load(b + p * b_row + v * kLanes);
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      const V x = spread(a[i * a_row + p * a_col]);
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) acc[i][v] += x * row[v];
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) {
      float* to = c + i * ldc + v * kLanes;
      store(to, add ? load(to) + acc[i][v] * alpha : acc[i][v] * alpha);
    }
  }
}

template <int kVectors>
inline void tile_rows(int64_t rows, int64_t k, float alpha, const float* a, int64_t a_row, int64_t a_col, const float* b,
                      int64_t b_row, float* c, int64_t ldc, bool add) {
  switch (rows) {
#define FERROTUNE_TILE(r) \
  case r:                 \
    return tile<r, kVectors>(k, alpha, a, a_row, a_col, b, b_row, c, ldc, add);
    FERROTUNE_TILE(1)
    FERROTUNE_TILE(2)
    FERROTUNE_TILE(3)
    FERROTUNE_TILE(4)
    FERROTUNE_TILE(5)
    FERROTUNE_TILE(6)
#if defined(__AVX512F__)
    FERROTUNE_TILE(7)
    FERROTUNE_TILE(8)
#endif
#undef FERROTUNE_TILE
  }
}

// The n columns of a panel against m rows. A panel that is not whole vectors goes through a tile beside C.
inline void panel(int64_t m, int64_t n, int64_t k, float alpha, CpuMatrix a, const float* b, int64_t b_row, float* c,
                  int64_t ldc, bool add) {
  for (int64_t i = 0; i < m; i += kTileRows) {
    const int64_t rows = m - i < kTileRows ? m - i : kTileRows;
    const float* from = a.data + i * a.row;
    float* to = c + i * ldc;
    if (n == kPanel) {
      tile_rows<2>(rows, k, alpha, from, a.row, a.col, b, b_row, to, ldc, add);
    } else if (n == kLanes) {
      tile_rows<1>(rows, k, alpha, from, a.row, a.col, b, b_row, to, ldc, add);
    } else {
      float beside[kTileRows * kPanel];
      if (n < kLanes) {
        tile_rows<1>(rows, k, alpha, from, a.row, a.col, b, b_row, beside, kPanel, false);
      } else {
        tile_rows<2>(rows, k, alpha, from, a.row, a.col, b, b_row, beside, kPanel, false);
      }
      for (int64_t r = 0; r < rows; ++r) {
        for (int64_t j = 0; j < n; ++j) to[r * ldc + j] = beside[r * kPanel + j] + (add ? to[r * ldc + j] : 0);
      }
    }
  }
}

// to[c * to_ld + r] = from[r * ld + c], 4 x 4 elements at a time in registers.
inline void transpose(int64_t rows, int64_t cols, const float* from, int64_t ld, float* to, int64_t to_ld) {
  typedef int32_t I4 __attribute__((vector_size(16)));
  const int64_t whole = rows & ~int64_t{3}, deep = cols & ~int64_t{3};
  for (int64_t r = 0; r < whole; r += 4) {
    const float* source = from + r * ld;
    for (int64_t c = 0; c < deep; c += 4) {
      V4 r0, r1, r2, r3;
      memcpy(&r0, source + c, 16);
      memcpy(&r1, source + ld + c, 16);
      memcpy(&r2, source + 2 * ld + c, 16);
      memcpy(&r3, source + 3 * ld + c, 16);
      const V4 a = __builtin_shuffle(r0, r1, I4{0, 4, 1, 5}), b = __builtin_shuffle(r0, r1, I4{2, 6, 3, 7});
      const V4 e = __builtin_shuffle(r2, r3, I4{0, 4, 1, 5}), f = __builtin_shuffle(r2, r3, I4{2, 6, 3, 7});
      const V4 c0 = __builtin_shuffle(a, e, I4{0, 1, 4, 5}), c1 = __builtin_shuffle(a, e, I4{2, 3, 6, 7});
      const V4 c2 = __builtin_shuffle(b, f, I4{0, 1, 4, 5}), c3 = __builtin_shuffle(b, f, I4{2, 3, 6, 7});
      float* target = to + c * to_ld + r;
      memcpy(target, &c0, 16);
      memcpy(target + to_ld, &c1, 16);
      memcpy(target + 2 * to_ld, &c2, 16);
      memcpy(target + 3 * to_ld, &c3, 16);
    }
    for (int64_t c = deep; c < cols; ++c) {
      for (int64_t i = 0; i < 4; ++i) to[c * to_ld + r + i] = source[i * ld + c];
    }
  }
  for (int64_t r = whole; r < rows; ++r) {
    for (int64_t c = 0; c < cols; ++c) to[c * to_ld + r] = from[r * ld + c];
  }
}

// to[p * kPanel + j] = from[j * ld + p] for p < k, j < n; zeros up to kPanel.
inline void pack_transposed(int64_t k, int64_t n, const float* from, int64_t ld, float* to) {
  transpose(n, k, from, ld, to, kPanel);
  for (int64_t p = 0; p < k && n < kPanel; ++p) {
    for (int64_t j = n; j < kPanel; ++j) to[p * kPanel + j] = 0;
  }
}

inline void pack_rows(int64_t k, int64_t n, CpuMatrix b, float* to) {
  for (int64_t p = 0; p < k; ++p) {
    for (int64_t j = 0; j < n; ++j) to[p * kPanel + j] = b.data[p * b.row + j * b.col];
    for (int64_t j = n; j < kPanel; ++j) to[p * kPanel + j] = 0;
  }
}

inline void gemm(int64_t m, int64_t n, int64_t k, float alpha, CpuMatrix a, CpuMatrix b, float* c, int64_t ldc, bool add) {
  alignas(64) static thread_local float packed[kDepth * kPanel];
  if (k == 0) {
    for (int64_t i = 0; i < m && !add; ++i) memset(c + i * ldc, 0, 4 * n);
    return;
  }
  // Blocks of equal depth: 172 + 172 and not 256 + 88.
  const int64_t blocks = (k + kDepth - 1) / kDepth, depth = (k + blocks - 1) / blocks;
  for (int64_t i = 0; i < m; i += kBlockRows) {
    const int64_t rows = m - i < kBlockRows ? m - i : kBlockRows;
    for (int64_t p = 0; p < k; p += depth) {
      const int64_t deep = k - p < depth ? k - p : depth;
      const CpuMatrix a_block{a.data + i * a.row + p * a.col, a.row, a.col};
      for (int64_t j = 0; j < n; j += kPanel) {
        const int64_t width = n - j < kPanel ? n - j : kPanel;
        const CpuMatrix b_block{b.data + p * b.row + j * b.col, b.row, b.col};
        const float* from = b_block.data;
        int64_t stride = b.row;
        if (b.col != 1 || width % kLanes != 0) {
          b.row == 1 ? pack_transposed(deep, width, from, b.col, packed) : pack_rows(deep, width, b_block, packed);
          from = packed;
          stride = kPanel;
        }
        panel(rows, width, deep, alpha, a_block, from, stride, c + i * ldc + j, ldc, add || p > 0);
      }
    }
  }
}

}  // namespace
}  // namespace ferrotune
