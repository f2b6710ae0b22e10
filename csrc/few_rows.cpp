#include "ferrotune/csrc/few_rows.h"

#include "ferrotune/csrc/cpu.h"
#include "ferrotune/csrc/kernels.h"

namespace ferrotune {

namespace {

bool is_matrix(const Tensor& x, at::ScalarType dtype) { return x.scalar_type() == dtype && x.dim() == 2 && x.stride(1) == 1; }

// LoRA of a part: its own, or that of a run of rows which is all of them.
bool put_lora(KernelRowsPart& part, const Tensor& a, const Tensor& b, double scale, at::ScalarType dtype) {
  if (part.a != nullptr || a.scalar_type() != b.scalar_type() || !a.is_contiguous() || !b.is_contiguous()) return false;
  part.lora_f32 = a.scalar_type() == at::kFloat;
  if (!part.lora_f32 && a.scalar_type() != dtype) return false;
  part.a = a.const_data_ptr();
  part.b = b.const_data_ptr();
  part.R = a.size(0);
  part.scale = static_cast<float>(scale);
  return true;
}

// The operands without y; nullopt where the kernel cannot. `some`: whether LoRA of single rows is left to the caller.
std::optional<KernelRows> operands(const Tensor& x, const Linear& l, const Tensor& residual, bool& some) {
  const auto dtype = x.scalar_type();
  if (!is_matrix(x, dtype) || (residual.defined() && (residual.scalar_type() != dtype || residual.stride(-1) != 1))) return std::nullopt;
  std::optional<KernelRows> rows = linear_operands(l, x.size(0), dtype, some);
  if (!rows) return std::nullopt;
  rows->K = x.size(1);
  rows->x = x.const_data_ptr();
  rows->x_stride = rows->M == 1 ? rows->K : x.stride(0);
  rows->dtype = kernel_dtype(x);
  if (residual.defined()) {
    rows->residual = residual.const_data_ptr();
    rows->residual_stride = residual.stride(0);
  }
  return rows;
}

// Undefined where the kernel cannot.
Tensor by_kernel(KernelRows& rows, const Tensor& x, int64_t width, bool f32) {
  const Kernels& kernels = *kernels_for(x);
  const Launch launch(x);
  const int64_t bytes = kernels.rows_linear_workspace(&rows);
  if (bytes == 0) return {};
  const Tensor y = at::empty({rows.M, width}, f32 ? x.options().dtype(at::kFloat) : x.options());
  rows.y = y.mutable_data_ptr();
  rows.y_stride = width;
  rows.y_f32 = f32;
  rows.workspace = launch.lasting_zeros("rows_linear", bytes);
  check_launch(kernels.rows_linear(&rows, launch.stream()), "rows_linear");
  return y;
}

}  // namespace

std::optional<KernelRows> linear_operands(const Linear& l, int64_t M, at::ScalarType dtype, bool& some) {
  if (l.fp8.defined() || (l.bias.defined() && (l.bias.scalar_type() != dtype || l.bias.stride(-1) != 1))) return std::nullopt;
  KernelRows rows{};
  if (std::max(l.parts.size(), l.part_weights ? l.part_weights->parts.size() : 0) > std::size(rows.parts)) return std::nullopt;
  rows.count = l.part_weights ? static_cast<int64_t>(l.part_weights->parts.size()) : std::max<int64_t>(1, l.parts.size());
  rows.M = M;
  if (l.bias.defined()) rows.bias = l.bias.const_data_ptr();
  int64_t row = 0;
  for (int64_t p = 0; p < rows.count; ++p) {
    KernelRowsPart& part = rows.parts[p];
    part.rows = l.parts.empty() ? l.rows() : l.parts[p].rows;
    const Nf4* nf4 = l.part_weights ? std::get_if<Nf4>(&l.part_weights->parts[p]) : nullptr;
    if (nf4 != nullptr) {
      part.nf4 = kernel_nf4(*nf4);
    } else {
      const Tensor w = l.part_weights ? std::get<Tensor>(l.part_weights->parts[p]) : l.weight.narrow(0, row, part.rows);
      if (!is_matrix(w, dtype)) return std::nullopt;
      part.w = w.const_data_ptr();
      part.w_stride = w.stride(0);
    }
    row += part.rows;
    if (l.parts.empty()) continue;
    const Lora& lora = l.parts[p];
    if (lora.a.defined() && (lora.dropout > 0 || !put_lora(part, lora.a, lora.b, lora.scale, dtype))) return std::nullopt;
  }
  for (const LoraRows& lora : l.lora_rows) {
    const bool all = lora.first == 0 && lora.rows == M;
    if (!all || !put_lora(rows.parts[lora.part], lora.a, lora.b, lora.scale, dtype)) some = true;
  }
  if (some) {
    for (KernelRowsPart& part : rows.parts) part.a = part.b = nullptr, part.R = 0;
  }
  return rows;
}

bool is_few_rows(const Tensor& x, int64_t rows) {
  return kernels_for(x) != nullptr && x.scalar_type() != at::kFloat && rows <= kFewRows && !at::GradMode::is_enabled();
}

Tensor few_rows_linear(const Tensor& x, const Linear& l, const Tensor& residual) {
  bool some = false;
  if (std::optional<KernelRows> rows = operands(x, l, residual, some)) {
    if (const Tensor y = by_kernel(*rows, x, l.rows(), false); y.defined()) {
      if (some) add_lora_rows(y, x, l);
      return y;
    }
  }
  if (const Tensor y = inference_linear(x, l, residual); y.defined()) return y;
  const Tensor y = linear_forward(x, l, nullptr);
  return residual.defined() ? residual + y : y;
}

Tensor few_rows_scores(const Tensor& x, const Linear& head) {
  if (!is_few_rows(x)) return {};
  bool some = false;
  std::optional<KernelRows> rows = operands(x, head, {}, some);
  return rows ? by_kernel(*rows, x, head.rows(), true) : Tensor();
}

}  // namespace ferrotune
