#include "ferrotune/csrc/rows.h"

#include "ferrotune/csrc/cpu.h"
#include "ferrotune/src/ffi.rs.h"

namespace ferrotune {

namespace {

// y[i, r] = scale * w_r . x_i, added to y where `add`; w [rows, n], rows of y y_stride apart.
void rows_product(const Tensor& w, int64_t m, const float* x, float* y, int64_t y_stride, double scale, bool add) {
  const int64_t rows = w.size(0), n = w.size(1);
  const CpuKernels& kernels = *cpu_kernels();
  const auto part = [&](int64_t begin, int64_t end) {
    const std::unique_ptr<float[]> scratch(w.scalar_type() == at::kFloat ? nullptr : new float[4 * n]);
    kernels.rows_product(m, end - begin, n, static_cast<float>(scale), cpu_array(w, begin * n), x, y + begin, y_stride, add, scratch.get());
  };
  m * rows * n < 2 * kRowThreadWork
      ? part(0, rows)
      : at::parallel_for(0, rows, std::max<int64_t>(4, kRowThreadWork / (m * n)), part);
}

// The same for a quantised w: a row at a time, so that the whole matrix never stands in memory.
void rows_product(const Nf4& w, int64_t m, const float* x, float* y, int64_t y_stride, bool add) {
  at::parallel_for(0, w.rows, std::max<int64_t>(1, kRowThreadWork / (m * w.in)), [&](int64_t begin, int64_t end) {
    std::vector<float> row(w.in);
    for (int64_t r = begin; r < end; ++r) {
      dequantize_run(w, r * w.in, (r + 1) * w.in, row.data());
      cpu_kernels()->rows_product(m, 1, w.in, 1, {row.data(), CpuType::kFloat}, x, y + r, y_stride, add, nullptr);
    }
  });
}

bool fits_lora(const Tensor& a, const Tensor& b, int64_t rows, int64_t in) {
  return fits_rows(a) && fits_rows(b) && a.dim() == 2 && a.size(1) == in && b.sizes() == at::IntArrayRef{rows, a.size(0)};
}

// y += scale x A^T B^T; x [m, in], y [m, rows].
void add_lora(const Tensor& a, const Tensor& b, double scale, int64_t m, const float* x, float* y, int64_t y_stride) {
  const int64_t rank = a.size(0);
  std::vector<float> z(m * rank);
  rows_product(a, m, x, z.data(), rank, 1, false);
  rows_product(b, m, z.data(), y, y_stride, scale, true);
}

}  // namespace

bool is_rows(const Tensor& x) {
  return x.size(0) <= kMostRows && x.size(0) > 0 && !at::GradMode::is_enabled() && cpu_kernels_for(x) != nullptr &&
         x.is_contiguous();
}

bool fits_rows(const Tensor& other) {
  const auto type = other.scalar_type();
  return (type == at::kFloat || type == at::kBFloat16 || type == at::kHalf) && other.is_cpu() && other.is_contiguous();
}

CpuArray cpu_array(const Tensor& x, int64_t offset) {
  const auto type = x.scalar_type();
  return {static_cast<const char*>(x.const_data_ptr()) + offset * x.element_size(),
          type == at::kBFloat16 ? CpuType::kBfloat16 : type == at::kHalf ? CpuType::kHalf : CpuType::kFloat};
}

bool rows_fit_linear(const Tensor& x, const Linear& l) {
  // Kernels check nothing: what does not fit is ATen's to work out or to refuse.
  const int64_t rows = l.rows(), n = l.in();
  if (l.fp8.defined() || (l.weight.defined() && !fits_rows(l.weight))) return false;
  if (l.part_weights) {
    for (const auto& part : l.part_weights->parts) {
      const Tensor* dense = std::get_if<Tensor>(&part);
      if (dense ? !fits_rows(*dense) : !std::get<Nf4>(part).packed.is_cpu()) return false;
    }
  }
  if (l.bias.defined() && !(fits_rows(l.bias) && l.bias.sizes() == at::IntArrayRef{rows})) return false;
  int64_t row = 0;
  for (const Lora& part : l.parts) {
    row += part.rows;
    if (part.a.defined() && (part.dropout > 0 || !fits_lora(part.a, part.b, part.rows, n))) return false;
  }
  for (const LoraRows& lora : l.lora_rows) {
    if (!fits_lora(lora.a, lora.b, l.parts[lora.part].rows, n)) return false;
  }
  return row <= rows;
}

void rows_linear_into(const Linear& l, int64_t first, int64_t m, const float* x, float* y) {
  const bool has_bias = l.bias.defined();
  const int64_t rows = l.rows(), in = l.in();
  for (int64_t i = 0; i < m && has_bias; ++i) cpu_kernels()->widen(rows, cpu_array(l.bias), y + i * rows);
  if (l.weight.defined()) {
    rows_product(l.weight, m, x, y, rows, 1, has_bias);
  } else {
    float* part_y = y;
    for (const auto& part : l.part_weights->parts) {
      if (const Nf4* nf4 = std::get_if<Nf4>(&part)) {
        rows_product(*nf4, m, x, part_y, rows, has_bias);
        part_y += nf4->rows;
      } else {
        const Tensor& dense = std::get<Tensor>(part);
        rows_product(dense, m, x, part_y, rows, 1, has_bias);
        part_y += dense.size(0);
      }
    }
  }
  int64_t row = 0;
  for (const Lora& part : l.parts) {
    if (part.a.defined()) add_lora(part.a, part.b, part.scale, m, x, y + row, rows);
    row += part.rows;
  }
  for (const LoraRows& lora : l.lora_rows) {
    const int64_t begin = std::max(lora.first - first, int64_t{0}), end = std::min(lora.first + lora.rows - first, m);
    if (begin >= end) continue;
    add_lora(lora.a, lora.b, lora.scale, end - begin, x + begin * in, y + begin * rows + l.first_row(lora.part), rows);
  }
}

Tensor rows_linear(const Tensor& x, const Linear& l) {
  Tensor y = at::empty({x.size(0), l.rows()}, x.options());
  rows_linear_into(l, 0, x.size(0), x.const_data_ptr<float>(), y.mutable_data_ptr<float>());
  return y;
}

Tensor rows_rms_norm(const Tensor& x, const Tensor& weight, double eps, double offset) {
  Tensor y = at::empty(x.sizes(), x.options());
  const int64_t n = weight.size(0), rows = x.numel() / n;
  c10::SmallVector<float, 128> rstd(rows);
  const Tensor w = weight.to(at::kFloat);
  cpu_kernels()->rms_norm_forward(rows, n, x.const_data_ptr<float>(), n, w.const_data_ptr<float>(),
                                  static_cast<float>(eps), static_cast<float>(offset), y.mutable_data_ptr<float>(), rstd.data());
  return y;
}

Tensor rows_swiglu(const Tensor& gate_up, Activation activation) {
  const int64_t n = gate_up.size(0), f = gate_up.size(1) / 2;
  Tensor y = at::empty({n, f}, gate_up.options());
  const auto part = [&](int64_t begin, int64_t end) {
    cpu_kernels()->swiglu_forward(end - begin, f, gate_up.const_data_ptr<float>() + begin * 2 * f, cpu_activation(activation),
                                  y.mutable_data_ptr<float>() + begin * f);
  };
  constexpr int64_t kElement = 16;  // multiply-adds that the exponential is worth
  n * f * kElement < 2 * kRowThreadWork
      ? part(0, n)
      : at::parallel_for(0, n, std::max<int64_t>(1, kRowThreadWork / (f * kElement)), part);
  return y;
}

}  // namespace ferrotune
