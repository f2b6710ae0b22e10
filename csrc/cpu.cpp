#include "ferrotune/csrc/cpu.h"

#include "ferrotune/src/ffi.rs.h"

namespace ferrotune {

namespace {

// Multiply-adds worth a thread: about 5 us of them.
constexpr int64_t kProductWork = 1 << 18;

CpuMatrix matrix(const Tensor& x) { return {x.const_data_ptr<float>(), x.stride(0), x.stride(1)}; }

void split_gemm(const CpuKernels& kernels, const Tensor& c, const Tensor& a, const Tensor& b, double alpha, bool add) {
  const int64_t m = a.size(0), n = b.size(1), k = a.size(1);
  const CpuMatrix left = matrix(a), right = matrix(b);
  const int64_t ldc = m > 1 ? c.stride(0) : n;
  float* const out = c.mutable_data_ptr<float>();
  const auto part = [&](int64_t row, int64_t rows, int64_t column, int64_t columns) {
    kernels.gemm(rows, columns, k, static_cast<float>(alpha), {left.data + row * left.row, left.row, left.col},
                 {right.data + column * right.col, right.row, right.col}, out + row * ldc + column, ldc, add);
  };
  // A transposed b is copied into panels: by columns, so that no two threads copy the same ones. Else by rows, which
  // reads b in whole.
  const int64_t threads = at::get_num_threads();
  const bool by_columns = right.col != 1 ? n >= threads * kernels.tile_columns : m < threads * kernels.tile_rows;
  const int64_t unit = by_columns ? kernels.tile_columns : kernels.tile_rows, size = by_columns ? n : m;
  const int64_t unit_work = std::max<int64_t>(1, unit * k * (by_columns ? m : n));
  at::parallel_for(0, (size + unit - 1) / unit, std::max<int64_t>(1, kProductWork / unit_work),
                   [&](int64_t begin, int64_t end) {
                     const int64_t first = begin * unit, count = std::min(size, end * unit) - first;
                     by_columns ? part(0, m, first, count) : part(first, count, 0, n);
                   });
}

}  // namespace

bool has_cpu_kernels() { return cpu_kernels() != nullptr; }

const CpuKernels* cpu_kernels_for(const Tensor& x) {
  return x.is_cpu() && x.scalar_type() == at::kFloat ? cpu_kernels() : nullptr;
}

Tensor product(const Tensor& a, const Tensor& b) {
  const CpuKernels* kernels = cpu_kernels_for(a);
  if (kernels == nullptr || cpu_kernels_for(b) == nullptr) return at::mm(a, b);
  TORCH_CHECK(a.dim() == 2 && b.dim() == 2 && a.size(1) == b.size(0), "product: ", a.sizes(), " times ", b.sizes());
  Tensor c = at::empty({a.size(0), b.size(1)}, a.options());
  split_gemm(*kernels, c, a, b, 1, false);
  return c;
}

void product_into(const Tensor& c, const Tensor& a, const Tensor& b, double alpha, bool add) {
  const CpuKernels* kernels = cpu_kernels_for(a);
  if (kernels == nullptr || cpu_kernels_for(b) == nullptr || cpu_kernels_for(c) == nullptr || c.stride(1) != 1) {
    Tensor out = c;
    at::addmm_out(out, c, a, b, add ? 1 : 0, alpha);
    return;
  }
  TORCH_CHECK(a.dim() == 2 && b.dim() == 2 && a.size(1) == b.size(0) && c.size(0) == a.size(0) && c.size(1) == b.size(1),
              "product: ", a.sizes(), " times ", b.sizes(), " into ", c.sizes());
  split_gemm(*kernels, c, a, b, alpha, add);
}

void product_as(const Tensor& c, const Tensor& a, const Tensor& b, double alpha, bool add) {
  if (c.scalar_type() == a.scalar_type()) return product_into(c, a, b, alpha, add);
  if (a.is_cuda()) {
    Tensor out = c;
    at::addmm_out(out, out, a, b, c.scalar_type(), add ? 1 : 0, alpha);
    return;
  }
  const Tensor sum = at::mm(a, b).to(c.scalar_type());
  add ? c.add_(sum, alpha) : c.copy_(at::mul(sum, alpha));
}

CpuActivation cpu_activation(Activation activation) {
  switch (activation) {
    case Activation::Silu:
      return CpuActivation::kSilu;
    case Activation::GeluTanh:
      return CpuActivation::kGeluTanh;
    default:
      return CpuActivation::kGelu;
  }
}

}  // namespace ferrotune
