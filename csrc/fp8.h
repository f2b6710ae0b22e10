// Frozen weights in e4m3 (sign, 4 bits of exponent, 3 of mantissa, at most 448; arXiv:2209.05433), and products of two such matrices.
//
// Q(X) is X row by row in e4m3 with one scale a row, a power of two that leaves three bits of head room:
//   Q(X)_n = s_n e4m3(X_n / s_n),   s_n = 2^e, the least with 8 max|X_n| <= 448 s_n
// A power of two rounds nothing, and a floating-point format is as exact at any scale (docs/fp8.md has numbers): the scale is known
// from X alone, so that the kernel that writes X writes Q(X), too, while LoRA's Z, which comes later, still fits behind it.
// The weight has one scale and four bits: W = sw W8, sw = 2^e, the least with 16 max|W| <= 448 sw, W8 its bytes:
//   Y  = Q(X) W^T
//   dX = Q(dY) W
// dX is the gradient with that of e4m3 taken as the identity ("straight through"), dY rounded as X is; f32 sums.
// Hopper multiplies two matrices whose inner dimension is the contiguous one, so the bytes are there twice: [rows, in] and [in, rows].
#pragma once

#include "ferrotune/csrc/kernels.h"
#include "ferrotune/csrc/ops.h"

namespace ferrotune {

struct LoraParts;

struct Fp8 {
  Tensor by_rows;    // uint8 [rows, in + room]: e4m3; the room is LoRA's (kernels/fp8.cu)
  Tensor by_columns; // uint8 [in, rows + room], the same transposed
  Tensor scale;      // sw, as often as the longer side is long: f32 [max(rows, in)]

  Fp8() = default;
  explicit Fp8(const Fp8View& view);
  bool defined() const { return by_rows.defined(); }
  int64_t rows() const { return by_rows.size(0); }
  int64_t in() const { return by_columns.size(0); }
  // The matrix [rows, in].
  Tensor dense(at::ScalarType dtype) const;
};

// Q(X) of X [N, K], and behind it room for LoRA.
struct Fp8Rows {
  Tensor bytes;  // uint8 [N, K + room]
  Tensor scale;  // f32 [N]

  bool defined() const { return bytes.defined(); }
  // For a kernel that writes X: where it writes Q(X), too; nowhere if undefined.
  KernelFp8Rows to() const;
  static KernelFp8Rows to(const Fp8Rows* rows) { return rows != nullptr ? rows->to() : KernelFp8Rows{}; }
};

// Q(X) as a kernel writes it, whose X is bf16 like x and [rows of x, columns].
Fp8Rows fp8_rows_like(const Tensor& x, int64_t columns, int64_t room);

// Leaves Q(d) with d, for the block whose gradient d is: that takes it, unless d has been written to since.
void fp8_leave(const Tensor& d, Fp8Rows rows);
Fp8Rows fp8_take(const Tensor& d);

// Columns that LoRA of that rank takes behind each operand.
int64_t fp8_room(int64_t rank);

// Q(X) W^T + bias, and LoRA's update where z is defined, X A^T [N, R]: then there is fp8_room for it behind w. `rows` is Q(X), or
// undefined.
Tensor fp8_forward(const Tensor& x, const Fp8& w, const Tensor& bias, const LoraParts& lora, const Tensor& z, Fp8Rows rows);

// Q(dY) W, and LoRA's G A where g is defined, s dY B [N, R].
Tensor fp8_backward(const Tensor& dy, const Fp8& w, const LoraParts& lora, const Tensor& g, Fp8Rows rows);

}  // namespace ferrotune
