#include "ferrotune/csrc/row.h"

#include "ferrotune/csrc/cpu.h"
#include "ferrotune/src/ffi.rs.h"

namespace ferrotune {

namespace {

// Multiply-adds worth another thread: about 10 us of them. Waking it for less does not pay.
constexpr int64_t kRowThreadWork = 1 << 17;

// y_r = scale * w_r . x, added to y where `add`; w [rows, n].
void row_product(const Tensor& w, const float* x, float* y, double scale, bool add) {
  const int64_t rows = w.size(0), n = w.size(1);
  const float* from = w.const_data_ptr<float>();
  const CpuKernels& kernels = *cpu_kernels();
  const auto part = [&](int64_t begin, int64_t end) {
    kernels.row_product(end - begin, n, static_cast<float>(scale), from + begin * n, x, y + begin, add);
  };
  rows * n < 2 * kRowThreadWork ? part(0, rows) : at::parallel_for(0, rows, std::max<int64_t>(1, kRowThreadWork / n), part);
}

// The same for a quantised w: a row at a time, so that the whole matrix never stands in memory.
void row_product(const Nf4& w, const float* x, float* y, bool add) {
  at::parallel_for(0, w.rows, std::max<int64_t>(1, kRowThreadWork / w.in), [&](int64_t begin, int64_t end) {
    std::vector<float> row(w.in);
    for (int64_t r = begin; r < end; ++r) {
      dequantize_run(w, r * w.in, (r + 1) * w.in, row.data());
      cpu_kernels()->row_product(1, w.in, 1, row.data(), x, y + r, add);
    }
  });
}

}  // namespace

bool is_row(const Tensor& x) {
  return x.size(0) == 1 && !at::GradMode::is_enabled() && cpu_kernels_for(x) != nullptr && x.is_contiguous();
}

bool fits_row(const Tensor& other) {
  return other.scalar_type() == at::kFloat && other.is_cpu() && other.is_contiguous();
}

bool row_fits_linear(const Tensor& x, const Linear& l) {
  // Kernels check nothing: what does not fit is ATen's to work out or to refuse.
  const int64_t rows = l.rows(), n = l.in();
  if (l.weight.defined() && !fits_row(l.weight)) return false;
  if (l.part_weights) {
    for (const auto& part : l.part_weights->parts) {
      const Tensor* dense = std::get_if<Tensor>(&part);
      if (dense ? !fits_row(*dense) : !std::get<Nf4>(part).packed.is_cpu()) return false;
    }
  }
  if (l.bias.defined() && !(fits_row(l.bias) && l.bias.sizes() == at::IntArrayRef{rows})) return false;
  int64_t row = 0;
  for (const Lora& part : l.parts) {
    row += part.rows;
    if (!part.a.defined()) continue;
    const bool fits = fits_row(part.a) && fits_row(part.b) && part.dropout == 0 && part.a.dim() == 2 &&
                      part.a.size(1) == n && part.b.sizes() == at::IntArrayRef{part.rows, part.a.size(0)};
    if (!fits) return false;
  }
  return row <= rows;
}

Tensor row_linear(const Tensor& x, const Linear& l) {
  const bool has_bias = l.bias.defined();
  const Tensor result = has_bias ? l.bias.view({1, l.rows()}).clone() : at::empty({1, l.rows()}, x.options());
  const float* in = x.const_data_ptr<float>();
  float* out = result.mutable_data_ptr<float>();
  if (l.weight.defined()) {
    row_product(l.weight, in, out, 1, has_bias);
  } else {
    float* rows = out;
    for (const auto& part : l.part_weights->parts) {
      if (const Nf4* nf4 = std::get_if<Nf4>(&part)) {
        row_product(*nf4, in, rows, has_bias);
        rows += nf4->rows;
      } else {
        const Tensor& dense = std::get<Tensor>(part);
        row_product(dense, in, rows, 1, has_bias);
        rows += dense.size(0);
      }
    }
  }
  for (const Lora& part : l.parts) {
    if (part.a.defined()) {
      std::vector<float> z(part.a.size(0));
      row_product(part.a, in, z.data(), 1, false);
      row_product(part.b, z.data(), out, part.scale, true);
    }
    out += part.rows;
  }
  return result;
}

Tensor row_rms_norm(const Tensor& x, const Tensor& weight, double eps, double offset) {
  Tensor y = at::empty(x.sizes(), x.options());
  const int64_t n = weight.size(0), rows = x.numel() / n;
  c10::SmallVector<float, 128> rstd(rows);
  cpu_kernels()->rms_norm_forward(rows, n, x.const_data_ptr<float>(), n, weight.const_data_ptr<float>(),
                                  static_cast<float>(eps), static_cast<float>(offset), y.mutable_data_ptr<float>(), rstd.data());
  return y;
}

Tensor row_rope(const Tensor& x, const Tensor& cos, const Tensor& sin) {
  Tensor y = at::empty(x.sizes(), x.options());
  cpu_kernels()->rope(1, x.size(1), x.size(2), cos.size(1), x.const_data_ptr<float>(), 0, cos.const_data_ptr<float>(),
                      sin.const_data_ptr<float>(), 1, y.mutable_data_ptr<float>(), 0);
  return y;
}

Tensor row_swiglu(const Tensor& gate_up, Activation activation) {
  const int64_t f = gate_up.size(1) / 2;
  Tensor y = at::empty({1, f}, gate_up.options());
  cpu_kernels()->swiglu_forward(1, f, gate_up.const_data_ptr<float>(), cpu_activation(activation), y.mutable_data_ptr<float>());
  return y;
}

bool row_fits_cache(const Tensor& q, const Tensor& k, const Tensor& v, const KvView& cache) {
  const int64_t kv_heads = k.size(1), dim = q.size(2);
  for (const Tensor* tensor : {&k, &v, &cache.k, &cache.v}) {
    if (tensor->dim() != 3 || !fits_row(*tensor) || tensor->size(2) != dim) return false;
  }
  return k.sizes() == v.sizes() && k.size(0) == 1 && q.size(1) % kv_heads == 0 && cache.k.sizes() == cache.v.sizes() &&
         cache.k.size(0) == kv_heads && cache.past < cache.k.size(1);
}

// Writes k and v behind the cached ones and attends to all that the window shows.
Tensor row_attention(const Tensor& q, const Tensor& k, const Tensor& v, const KvView& cache,
                     const AttentionSpec& spec) {
  const int64_t heads = q.size(1), dim = q.size(2), kv_heads = k.size(1), stride = cache.k.size(1) * dim;
  const int64_t last = cache.past, low = spec.window > 0 ? std::max<int64_t>(0, last + 1 - spec.window) : 0;
  const int64_t keys = last + 1 - low, group = heads / kv_heads;
  Tensor y = at::empty({1, heads * dim}, q.options());
  float *const ks = cache.k.mutable_data_ptr<float>(), *const vs = cache.v.mutable_data_ptr<float>();
  const float *const q_data = q.const_data_ptr<float>(), *const k_data = k.const_data_ptr<float>();
  const float* const v_data = v.const_data_ptr<float>();
  float* const out = y.mutable_data_ptr<float>();
  const auto part = [&](int64_t begin, int64_t end) {
    std::vector<float> scores(keys + 16);
    for (int64_t h = begin; h < end; ++h) {
      std::copy_n(k_data + h * dim, dim, ks + h * stride + last * dim);
      std::copy_n(v_data + h * dim, dim, vs + h * stride + last * dim);
      const int64_t from = h * stride + low * dim, at = h * group * dim;
      cpu_kernels()->row_attention({q_data + at, ks + from, vs + from, keys, dim, group, static_cast<float>(spec.scale),
                                    static_cast<float>(spec.softcap)}, out + at, scores.data());
    }
  };
  const int64_t head_work = 2 * group * keys * dim;
  kv_heads * head_work < 2 * kRowThreadWork
      ? part(0, kv_heads)
      : at::parallel_for(0, kv_heads, std::max<int64_t>(1, kRowThreadWork / head_work), part);
  return y;
}

}  // namespace ferrotune
