// Few rows of 16 bits on a GPU: the products of decoding, by kernels/rows.cu.
#pragma once

#include <optional>

#include "ferrotune/csrc/linear.h"
#include "ferrotune/csrc/ops.h"

namespace ferrotune {

// More rows than these pay a product on dequantised weights.
constexpr int64_t kFewRows = 64;

// Whether the products of x go to few_rows_linear: no gradient is asked for, and the rows are few.
bool is_few_rows(const Tensor& x);

// What the rows of a product are made of: rms_norm of x, or swiglu of x [N, 2 K]. The kernel does it on the way in where it can.
struct MadeOf {
  Tensor norm_weight;
  double norm_eps = 0, norm_offset = 0;
  std::optional<Activation> activation = {};

  Tensor made(const Tensor& x) const;
};

// residual + x W^T + bias + LoRA, without autograd; residual [N, rows] may be undefined, and x is what it is made of. What the
// kernel cannot take goes through linear_forward.
Tensor few_rows_linear(const Tensor& x, const Linear& linear, const Tensor& residual = {}, const MadeOf& made_of = {});

// x W^T in f32, or undefined where the kernel cannot.
Tensor few_rows_scores(const Tensor& x, const Linear& head);

}  // namespace ferrotune
