#include "ferrotune/csrc/row.h"

#include <ATen/Parallel.h>

#include <cmath>

#include "ferrotune/src/ffi.rs.h"

namespace ferrotune {

namespace {

// Multiply-adds worth another thread: about 60 us of them. Waking it for less does not pay.
constexpr int64_t kThreadWork = 1 << 19;

// With independent partial sums: compilers may not reorder one float sum, but turn these into vectors. Head dims may be
// as small as 8, so attention takes fewer of them.
template <int64_t kLanes, typename T>
T row_dot(const T* a, const T* b, int64_t n) {
  T lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int64_t j = 0; j < kLanes; ++j) lanes[j] += a[i + j] * b[i + j];
  }
  for (int64_t j = 0; i < n; ++i, ++j) lanes[j] += a[i] * b[i];
  for (int64_t width = kLanes / 2; width > 0; width /= 2) {
    for (int64_t j = 0; j < width; ++j) lanes[j] += lanes[j + width];
  }
  return lanes[0];
}

// y_r = scale * w_r . x, added to y where `add`; w [rows, n].
template <typename T>
void row_product(const T* w, const T* x, T* y, int64_t rows, int64_t n, T scale, bool add) {
  const int64_t grain = std::max<int64_t>(1, kThreadWork / std::max<int64_t>(n, 1));
  at::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const T value = scale * row_dot<16>(w + r * n, x, n);
      y[r] = add ? y[r] + value : value;
    }
  });
}

// The same for a quantised w: a row at a time, so that the whole matrix never stands in memory.
template <typename T>
void row_product(const Nf4& w, const T* x, T* y, bool add) {
  const int64_t grain = std::max<int64_t>(1, kThreadWork / w.in);
  at::parallel_for(0, w.rows, grain, [&](int64_t begin, int64_t end) {
    std::vector<T> row(w.in);
    for (int64_t r = begin; r < end; ++r) {
      dequantize_run(w, r * w.in, (r + 1) * w.in, row.data());
      const T value = row_dot<16>(row.data(), x, w.in);
      y[r] = add ? y[r] + value : value;
    }
  });
}

template <typename T>
void linear_loop(const Tensor& x, const Linear& l, Tensor& y) {
  const T* in = x.const_data_ptr<T>();
  T* out = y.mutable_data_ptr<T>();
  const int64_t rows = l.rows(), n = l.in();
  const bool has_bias = l.bias.defined();
  if (has_bias) std::copy_n(l.bias.const_data_ptr<T>(), rows, out);
  int64_t row = 0;
  if (l.weight.defined()) {
    row_product(l.weight.const_data_ptr<T>(), in, out, rows, n, T(1), has_bias);
  } else {
    for (const auto& part : l.part_weights->parts) {
      if (const Nf4* nf4 = std::get_if<Nf4>(&part)) {
        row_product(*nf4, in, out + row, has_bias);
        row += nf4->rows;
      } else {
        const Tensor& dense = std::get<Tensor>(part);
        row_product(dense.const_data_ptr<T>(), in, out + row, dense.size(0), n, T(1), has_bias);
        row += dense.size(0);
      }
    }
    row = 0;
  }
  for (const Lora& part : l.parts) {
    if (part.a.defined()) {
      const int64_t rank = part.a.size(0);
      std::vector<T> z(rank);
      row_product(part.a.const_data_ptr<T>(), in, z.data(), rank, n, T(1), false);
      row_product(part.b.const_data_ptr<T>(), z.data(), out + row, part.rows, rank, T(part.scale), true);
    }
    row += part.rows;
  }
}

template <typename T>
void rms_norm_loop(const Tensor& x, const Tensor& weight, double eps, double offset, Tensor& y) {
  const int64_t n = weight.size(0), rows = x.numel() / n;
  const T* w = weight.const_data_ptr<T>();
  for (int64_t r = 0; r < rows; ++r) {
    const T* in = x.const_data_ptr<T>() + r * n;
    T* out = y.mutable_data_ptr<T>() + r * n;
    const T rstd = T(1) / std::sqrt(row_dot<8>(in, in, n) / T(n) + T(eps));
    for (int64_t c = 0; c < n; ++c) out[c] = in[c] * rstd * (w[c] + T(offset));
  }
}

template <typename T>
void rope_loop(const Tensor& x, const float* cos, const float* sin, int64_t half, Tensor& y) {
  const int64_t heads = x.size(1), dim = x.size(2);
  for (int64_t h = 0; h < heads; ++h) {
    const T* in = x.const_data_ptr<T>() + h * dim;
    T* out = y.mutable_data_ptr<T>() + h * dim;
    for (int64_t i = 0; i < half; ++i) {
      out[i] = in[i] * T(cos[i]) - in[i + half] * T(sin[i]);
      out[i + half] = in[i + half] * T(cos[i]) + in[i] * T(sin[i]);
    }
    std::copy(in + 2 * half, in + dim, out + 2 * half);
  }
}

template <typename T>
T activated(T g, Activation activation) {
  if (activation == Activation::Silu) return g / (T(1) + std::exp(-g));
  if (activation == Activation::Gelu) return T(0.5) * g * (T(1) + std::erf(g * T(M_SQRT1_2)));
  const T inner = T(M_SQRT2 * M_2_SQRTPI * 0.5) * (g + T(0.044715) * g * g * g);
  return T(0.5) * g * (T(1) + std::tanh(inner));
}

template <typename T>
void swiglu_loop(const Tensor& gate_up, Activation activation, Tensor& y) {
  const int64_t f = y.size(1);
  const T* gate = gate_up.const_data_ptr<T>();
  T* out = y.mutable_data_ptr<T>();
  for (int64_t i = 0; i < f; ++i) out[i] = activated(gate[i], activation) * gate[f + i];
}

// Writes k and v behind the cached ones and attends to all that the window shows; each head is a softmax over dots and
// a weighted sum of rows.
template <typename T>
void attention_loop(const Tensor& q, const Tensor& k, const Tensor& v, const KvView& cache, const AttentionSpec& spec,
                    Tensor& y) {
  const int64_t heads = q.size(1), dim = q.size(2), kv_heads = k.size(1), stride = cache.k.size(1) * dim;
  const int64_t last = cache.past, low = spec.window > 0 ? std::max<int64_t>(0, last + 1 - spec.window) : 0;
  const int64_t keys = last + 1 - low;
  T* const ks = cache.k.mutable_data_ptr<T>();
  T* const vs = cache.v.mutable_data_ptr<T>();
  for (int64_t h = 0; h < kv_heads; ++h) {
    std::copy_n(k.const_data_ptr<T>() + h * dim, dim, ks + h * stride + last * dim);
    std::copy_n(v.const_data_ptr<T>() + h * dim, dim, vs + h * stride + last * dim);
  }
  const T* const qs = q.const_data_ptr<T>();
  T* const ys = y.mutable_data_ptr<T>();
  const int64_t grain = std::max<int64_t>(1, kThreadWork / (2 * keys * dim));
  at::parallel_for(0, heads, grain, [&](int64_t begin, int64_t end) {
    std::vector<T> weights(keys);
    for (int64_t h = begin; h < end; ++h) {
      const int64_t at = h / (heads / kv_heads) * stride + low * dim;
      T highest = -std::numeric_limits<T>::infinity();
      for (int64_t s = 0; s < keys; ++s) {
        T score = row_dot<8>(qs + h * dim, ks + at + s * dim, dim) * T(spec.scale);
        if (spec.softcap > 0) score = std::tanh(score / T(spec.softcap)) * T(spec.softcap);
        weights[s] = score;
        highest = std::max(highest, score);
      }
      T total = 0;
      T* const out = ys + h * dim;
      std::fill_n(out, dim, T(0));
      for (int64_t s = 0; s < keys; ++s) {
        const T weight = std::exp(weights[s] - highest);
        total += weight;
        const T* row = vs + at + s * dim;
        for (int64_t d = 0; d < dim; ++d) out[d] += weight * row[d];
      }
      for (int64_t d = 0; d < dim; ++d) out[d] /= total;
    }
  });
}

template <typename Loop>
void in_type_of(const Tensor& x, const Loop& loop) {
  x.scalar_type() == at::kDouble ? loop(double()) : loop(float());
}

}  // namespace

bool is_row(const Tensor& x) {
  return x.size(0) == 1 && x.is_cpu() && (x.scalar_type() == at::kFloat || x.scalar_type() == at::kDouble) &&
         !at::GradMode::is_enabled() && x.is_contiguous();
}

bool fits_row(const Tensor& row, const Tensor& other) {
  return other.scalar_type() == row.scalar_type() && other.is_cpu() && other.is_contiguous();
}

bool row_fits_linear(const Tensor& x, const Linear& l) {
  // Loops check nothing: what does not fit is ATen's to work out or to refuse.
  const int64_t rows = l.rows(), n = l.in();
  if (l.weight.defined() && !fits_row(x, l.weight)) return false;
  if (l.part_weights) {
    for (const auto& part : l.part_weights->parts) {
      const Tensor* dense = std::get_if<Tensor>(&part);
      if (dense ? !fits_row(x, *dense) : !std::get<Nf4>(part).packed.is_cpu()) return false;
    }
  }
  if (l.bias.defined() && !(fits_row(x, l.bias) && l.bias.sizes() == at::IntArrayRef{rows})) return false;
  int64_t row = 0;
  for (const Lora& part : l.parts) {
    row += part.rows;
    if (!part.a.defined()) continue;
    const bool fits = fits_row(x, part.a) && fits_row(x, part.b) && part.dropout == 0 && part.a.dim() == 2 &&
                      part.a.size(1) == n && part.b.sizes() == at::IntArrayRef{part.rows, part.a.size(0)};
    if (!fits) return false;
  }
  return row <= rows;
}

Tensor row_linear(const Tensor& x, const Linear& l) {
  Tensor y = at::empty({1, l.rows()}, x.options());
  in_type_of(x, [&](auto t) { linear_loop<decltype(t)>(x, l, y); });
  return y;
}

Tensor row_rms_norm(const Tensor& x, const Tensor& weight, double eps, double offset) {
  Tensor y = at::empty(x.sizes(), x.options());
  in_type_of(x, [&](auto t) { rms_norm_loop<decltype(t)>(x, weight, eps, offset, y); });
  return y;
}

Tensor row_rope(const Tensor& x, const Tensor& cos, const Tensor& sin) {
  Tensor y = at::empty(x.sizes(), x.options());
  in_type_of(x, [&](auto t) {
    rope_loop<decltype(t)>(x, cos.const_data_ptr<float>(), sin.const_data_ptr<float>(), cos.size(1), y);
  });
  return y;
}

Tensor row_swiglu(const Tensor& gate_up, Activation activation) {
  Tensor y = at::empty({1, gate_up.size(1) / 2}, gate_up.options());
  in_type_of(gate_up, [&](auto t) { swiglu_loop<decltype(t)>(gate_up, activation, y); });
  return y;
}

bool row_fits_cache(const Tensor& q, const Tensor& k, const Tensor& v, const KvView& cache) {
  const int64_t kv_heads = k.size(1), dim = q.size(2);
  for (const Tensor* tensor : {&k, &v, &cache.k, &cache.v}) {
    if (tensor->dim() != 3 || !fits_row(q, *tensor) || tensor->size(2) != dim) return false;
  }
  return k.sizes() == v.sizes() && k.size(0) == 1 && q.size(1) % kv_heads == 0 && cache.k.sizes() == cache.v.sizes() &&
         cache.k.size(0) == kv_heads && cache.past < cache.k.size(1);
}

Tensor row_attention(const Tensor& q, const Tensor& k, const Tensor& v, const KvView& cache,
                     const AttentionSpec& spec) {
  Tensor y = at::empty({1, q.size(1) * q.size(2)}, q.options());
  in_type_of(q, [&](auto t) { attention_loop<decltype(t)>(q, k, v, cache, spec, y); });
  return y;
}

}  // namespace ferrotune
