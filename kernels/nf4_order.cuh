// defines: in_nf4_order: where a column of x stands for products of 9 rows and more with NF4 weights (rows_groups_kernel.cuh).
//
// A lane of such a product takes two neighbours of a row and the two that follow eight behind them, t = 0 .. 3 of a row 2 t, 2 t + 1, 2 t + 8, 2 t + 9 of
// sixteen columns. Of 128 columns, 64 bytes of W, it is to have 16 bytes that lie together and no lane's but its: columns 32 t .. 32 t + 31, four at
// a time. A sum over columns does not care which stands where, so x is stored that way: column 32 t + 4 s + 2 h + e at 16 s + 8 h + 2 t + e.
#pragma once

#include <cstdint>

namespace ferrotune {

__host__ __device__ constexpr unsigned in_nf4_order(unsigned column) {
  const unsigned t = column >> 5 & 3, s = column >> 2 & 7, h = column >> 1 & 1, e = column & 1;
  return (column & ~127u) | s << 4 | h << 3 | t << 1 | e;
}

}  // namespace ferrotune
