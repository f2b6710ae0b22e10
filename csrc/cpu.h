// f32 on the CPU: matrix products and row loops by kernels/cpu, split over libtorch's threads.
#pragma once

#include <ATen/Parallel.h>

#include "ferrotune/csrc/ops.h"
#include "ferrotune/kernels/cpu/cpu_kernels.h"

namespace ferrotune {

// The kernels, if they can work on x: f32 on the CPU, of a processor that has what they need. Else nullptr: the ATen
// formula runs.
const CpuKernels* cpu_kernels_for(const Tensor& x);

// a [M, K] times b [K, N], any strides.
Tensor product(const Tensor& a, const Tensor& b);

// c = alpha a b, added to c where `add`. The rows of c may lie apart.
void product_into(const Tensor& c, const Tensor& a, const Tensor& b, double alpha, bool add);

// The same for c of a dtype of its own: on a GPU f32 sums of 16-bit operands are stored as they are.
void product_as(const Tensor& c, const Tensor& a, const Tensor& b, double alpha, bool add);

// Calls body(begin, end) for runs of rows, on several threads if a row is worth `row_work` simple operations.
template <typename Body>
void cpu_rows(int64_t rows, int64_t row_work, const Body& body) {
  constexpr int64_t kThreadWork = 1 << 15;  // about 10 us
  at::parallel_for(0, rows, std::max<int64_t>(1, kThreadWork / std::max<int64_t>(row_work, 1)), body);
}

CpuActivation cpu_activation(Activation activation);

}  // namespace ferrotune
