// Frozen weights in e4m3 (sign, 4 bits of exponent, 3 of mantissa, at most 448; arXiv:2209.05433), and products of two such matrices.
//
// Q(X) is X row by row in e4m3 with one scale a row, the least power of two with which no element exceeds 448:
//   Q(X)_n = s_n e4m3(X_n / s_n),   s_n = 2^e_n
// A power of two rounds nothing, and a floating-point format is as exact at any scale, so nothing is lost against max / 448.
// With the weight W = diag(sw) W8, W8 its bytes:
//   Y  = Q(X) W^T
//   dX = Q(dY diag(sw)) W8
// dX is the gradient with that of e4m3 taken as the identity ("straight through"), dY rounded as X is; f32 sums.
// Hopper multiplies two matrices whose inner dimension is the contiguous one, so the bytes are there twice: [rows, in] and [in, rows].
#pragma once

#include "ferrotune/csrc/ops.h"

namespace ferrotune {

struct LoraParts;

struct Fp8 {
  Tensor by_rows;    // uint8 [rows, in + room]: e4m3; the room is LoRA's (kernels/fp8.cu)
  Tensor by_columns; // uint8 [in, rows + room], the same transposed
  Tensor exponents;  // int8 [rows]: sw = 2^exponents, at least a quarter of the largest, so that B fits behind any row
  Tensor scale;      // sw, f32 [rows]
  Tensor ones;       // f32 [in]

  Fp8() = default;
  explicit Fp8(const Fp8View& view);
  bool defined() const { return by_rows.defined(); }
  int64_t rows() const { return by_rows.size(0); }
  int64_t in() const { return by_columns.size(0); }
  // The matrix [rows, in].
  Tensor dense(at::ScalarType dtype) const;
};

// Whether LoRA rides in the products with w: then the products below add it, given Z = X A^T or G = s dY B [N, R].
bool fp8_folds(const Tensor& x, const Fp8& w, const LoraParts& lora);

// Q(X) W^T + bias. z is undefined where LoRA does not ride.
Tensor fp8_forward(const Tensor& x, const Fp8& w, const Tensor& bias, const LoraParts& lora, const Tensor& z);

// Q(dY diag(sw)) W8.
Tensor fp8_backward(const Tensor& dy, const Fp8& w, const LoraParts& lora, const Tensor& g);

}  // namespace ferrotune
