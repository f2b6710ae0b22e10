// Few rows of f32 on the CPU: what decoding works on, token after token, beside weights in f32 or 16 bits. ATen spends 1 to 3 us on a
// call, some 40 calls a layer; on a small model that is nearly all of the time. These go straight to kernels/cpu, with threads only where
// there is work for them, and a row's result is the same to the bit whatever other rows there are.
#pragma once

#include "ferrotune/csrc/linear.h"
#include "ferrotune/kernels/cpu/cpu_kernels.h"

namespace ferrotune {

// Multiply-adds worth another thread: about 10 us of them. Waking it for less does not pay.
constexpr int64_t kRowThreadWork = 1 << 17;

// More rows than these share a copy of the matrix that has another layout (gemm), and their sums another order.
constexpr int64_t kMostRows = 64;

// Whether x [N, ..] is a few contiguous rows of f32 on the CPU, kernels/cpu runs on this one, and no gradient is asked for.
bool is_rows(const Tensor& x);
// Whether a kernel can read `other` beside the rows: contiguous on the CPU, f32 or 16 bits.
bool fits_rows(const Tensor& other);
// From element `offset` of x on, which fits_rows.
CpuArray cpu_array(const Tensor& x, int64_t offset = 0);

// As rms_norm; x [N, C] or [N, H, D].
Tensor rows_rms_norm(const Tensor& x, const Tensor& weight, double eps, double offset);
// As swiglu; gate_up [N, 2F].
Tensor rows_swiglu(const Tensor& gate_up, Activation activation);
// Whether rows_linear can: the weights fit the rows, nothing is dropped.
bool rows_fit_linear(const Tensor& x, const Linear& linear);
// Rows first .. first + m of a batch: x [m, in], y [m, rows].
void rows_linear_into(const Linear& linear, int64_t first, int64_t m, const float* x, float* y);
// As linear; x [N, in].
Tensor rows_linear(const Tensor& x, const Linear& linear);

}  // namespace ferrotune
