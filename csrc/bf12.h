// Matrices of bf16 in 12 bits an element, without loss: the sign, the mantissa, and four bits of an exponent that is counted from the largest
// of its row. Weights are spread so that of a row all but one of some 10,000 have an exponent within 2^15 of the largest; those that have not,
// and zeros, are listed beside it. (The same fact about bf16 weights, with codes of varying length: DFloat11, arXiv:2504.11651.)
//
//   s = 2^(largest exponent of the row - 127)     w = s (-1)^sign 2^(c - 15) (1 + mantissa / 128),  c = 0 .. 15
// 15 - c is how much smaller an exponent is than the largest. Of a row of zeros s is 0. What is no code ("rest") has code 0 and sign and mantissa 0.
//
// Elements lie as m16n8k16 products take them: tiles of 16 rows, units of 64 columns of a tile, 32 lanes with 16 columns of two rows each.
// A unit is 1536 bytes: [2 halves of 8 rows, 8 rows, 4 runs of 16 columns, 16] low bytes of the bf16 with exponent 112 + c (the lowest bit of c
// above the mantissa), then [8 rows, 4 runs, 2 halves, 2, 4] bytes of two halves: sign and the three higher bits of c, the low half of column
// 8 i + j, the high one of column 8 i + 4 + j.
#pragma once

#include "ferrotune/csrc/ops.h"
#include "ferrotune/kernels/kernels.h"

namespace ferrotune {

struct Bf12 {
  static constexpr int64_t kTileRows = 16, kUnit = 64, kUnitBytes = 1536;

  int64_t rows, in;
  Tensor units;   // uint8 [tiles, in / 64, 1536]
  Tensor scales;  // f32 [16 tiles], s
  Tensor starts;  // int32 [tiles + 1]: the rest of tile i is starts[i] .. starts[i + 1]
  Tensor rest;    // int32 [n, 2]: row of the tile << 28 | column, and the bits of the value in f32; by tiles

  // Throws where the sizes do not belong together.
  explicit Bf12(const Bf12View& view);
};

// Rows first .. first + count in bf16 (first a multiple of 16) into `destination` [count, in], contiguous.
void unpack_rows(const Bf12& weight, int64_t first, const Tensor& destination);

// x W^T in f32, x bf16 [N, in], or undefined where no kernel can, or more rows pay the unpacking.
Tensor bf12_scores(const Tensor& x, const Bf12& weight);

}  // namespace ferrotune
