// Few rows of 16 bits on a GPU: the products of decoding, by kernels/rows.cu.
#pragma once

#include "ferrotune/csrc/kernels.h"
#include "ferrotune/csrc/linear.h"

namespace ferrotune {

// More rows than these pay a product on dequantised weights.
constexpr int64_t kFewRows = 64;

// Whether the products of `rows` rows like x go to few_rows_linear: no gradient is asked for, and the rows are few.
bool is_few_rows(const Tensor& x, int64_t rows);
inline bool is_few_rows(const Tensor& x) { return is_few_rows(x, x.size(0)); }

// Parts and bias of l for M rows in `dtype`, without x and y; nullopt where no kernel can take it. `some`: whether LoRA of single rows is
// left to the caller.
std::optional<KernelRows> linear_operands(const Linear& l, int64_t M, at::ScalarType dtype, bool& some);

// residual + x W^T + bias + LoRA, without autograd; residual [N, rows] may be undefined. What the kernel cannot take goes
// through inference_linear or linear_forward.
Tensor few_rows_linear(const Tensor& x, const Linear& linear, const Tensor& residual = {});

// x W^T in f32, or undefined where the kernel cannot.
Tensor few_rows_scores(const Tensor& x, const Linear& head);

}  // namespace ferrotune
