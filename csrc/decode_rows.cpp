#include "ferrotune/csrc/decode_rows.h"

#include "ferrotune/csrc/cpu.h"
#include "ferrotune/csrc/rows.h"
#include "ferrotune/src/ffi.rs.h"

namespace ferrotune {

namespace {

// Weights that stay in the caches: 16 MiB.
constexpr int64_t kCachedWeights = 1 << 22;

// What one thread works in.
struct Scratch {
  std::unique_ptr<float[]> normed, projected, attended, gated, product, out, rstd, norm;
  std::vector<float> scores;
};

struct NormOfRows {
  Tensor weight;  // undefined for no norm
  float eps, offset;

  explicit NormOfRows(const NormView& view)
      : weight(view.weight), eps(static_cast<float>(view.eps)), offset(static_cast<float>(view.offset)) {}
  bool fits() const { return !weight.defined() || (fits_rows(weight) && weight.dim() == 1); }
  // y may be x; rows of both stand side by side.
  void apply(int64_t rows, const float* x, float* y, Scratch& s) const {
    const int64_t n = weight.size(0);
    const bool wide = weight.scalar_type() == at::kFloat;
    if (!wide) cpu_kernels()->widen(n, cpu_array(weight), s.norm.get());
    cpu_kernels()->rms_norm_forward(rows, n, x, n, wide ? weight.const_data_ptr<float>() : s.norm.get(), eps, offset, y, s.rstd.get());
  }
};

}  // namespace

struct RowsStack::Layer {
  NormOfRows norm, q_norm, k_norm, post_norm, mlp_norm, mlp_post_norm;
  Linear qkv, o, gate_up, down;
  Tensor cos, sin;
  PagesView view;
  int64_t heads, kv_heads, dim;
  AttentionSpec spec;
  CpuActivation activation;

  int64_t width() const { return (heads + 2 * kv_heads) * dim; }

  // x [m, C] += out, through `post` if there is one.
  static void add(const NormOfRows& post, int64_t m, int64_t c, float* x, Scratch& s) {
    float* const out = s.out.get();
    if (post.weight.defined()) post.apply(m, out, out, s);
    for (int64_t i = 0; i < m * c; ++i) x[i] += out[i];
  }

  // x: rows first .. first + m of the batch.
  void run(int64_t first, int64_t m, float* x, Scratch& s) const {
    const CpuKernels& kernels = *cpu_kernels();
    const int64_t c = norm.weight.size(0), half = cos.size(1), before_v = (heads + kv_heads) * dim;
    float *const normed = s.normed.get(), *const projected = s.projected.get();
    norm.apply(m, x, normed, s);
    rows_linear_into(qkv, first, m, normed, projected);
    for (int64_t i = 0; i < m && q_norm.weight.defined(); ++i) {
      float *const q = projected + i * width(), *const k = q + heads * dim;
      q_norm.apply(heads, q, q, s);
      k_norm.apply(kv_heads, k, k, s);
    }
    kernels.rope(m, heads + kv_heads, dim, half, projected, width(), cos.const_data_ptr<float>() + first * half,
                 sin.const_data_ptr<float>() + first * half, 1, projected, width());
    const CpuPages pages(view, heads, kv_heads, dim, spec);
    for (int64_t i = 0; i < m; ++i) {
      const PagedBatch::Sequence& sequence = view.batch->sequences()[first + i];
      const float* const q = projected + i * width();
      pages.write(sequence, sequence.past, q + heads * dim, q + before_v);
      for (int64_t head = 0; head < kv_heads; ++head) {
        pages.attend(sequence, sequence.past, head, q, s.attended.get() + i * heads * dim, s.scores);
      }
    }
    rows_linear_into(o, first, m, s.attended.get(), s.out.get());
    add(post_norm, m, c, x, s);
    mlp_norm.apply(m, x, normed, s);
    rows_linear_into(gate_up, first, m, normed, s.gated.get());
    kernels.swiglu_forward(m, down.in(), s.gated.get(), activation, s.product.get());
    rows_linear_into(down, first, m, s.product.get(), s.out.get());
    add(mlp_post_norm, m, c, x, s);
  }
};

RowsStack::RowsStack(const Tensor& x) : x_(x) {}
RowsStack::~RowsStack() = default;

bool RowsStack::push(const NormView& norm, const LinearView& qkv, const LinearView& o, const NormView& post_norm,
                     const AttentionView& attention, const NormView& mlp_norm, const LinearView& gate_up, const LinearView& down,
                     const NormView& mlp_post_norm, Activation activation) {
  if (!is_rows(x_) || !attention.pages || !attention.pages->all_single() || attention.pages->rows() != x_.size(0)) return false;
  Layer layer{NormOfRows(norm),
              NormOfRows(attention.q_norm),
              NormOfRows(attention.k_norm),
              NormOfRows(post_norm),
              NormOfRows(mlp_norm),
              NormOfRows(mlp_post_norm),
              Linear(qkv),
              Linear(o),
              Linear(gate_up),
              Linear(down),
              attention.cos,
              attention.sin,
              PagesView{attention.pages_k, attention.pages_v, attention.pages},
              attention.num_heads,
              attention.num_kv_heads,
              attention.head_dim,
              AttentionSpec{attention.scale, attention.softcap, attention.window},
              cpu_activation(activation)};
  const int64_t c = x_.size(1), inner = layer.heads * layer.dim;
  for (const NormOfRows* one : {&layer.norm, &layer.q_norm, &layer.k_norm, &layer.post_norm, &layer.mlp_norm, &layer.mlp_post_norm}) {
    if (!one->fits()) return false;
  }
  const auto fits = [&](const Linear& l, int64_t rows, int64_t in) {
    if (!l.weight.defined() || l.rows() != rows || l.in() != in || !rows_fit_linear(x_, l)) return false;
    work_ += rows * in;
    largest_ = std::max(largest_, rows * in);
    return true;
  };
  const auto rope_fits = [&](const Tensor& angles) {
    return fits_rows(angles) && angles.dim() == 2 && angles.size(0) == x_.size(0) && 2 * angles.size(1) <= layer.dim;
  };
  const bool all = layer.norm.weight.defined() && layer.mlp_norm.weight.defined() && fits(layer.qkv, layer.width(), c) &&
                   fits(layer.o, c, inner) && layer.down.weight.defined() && fits(layer.down, c, layer.down.in()) &&
                   fits(layer.gate_up, 2 * layer.down.in(), c) && rope_fits(layer.cos) && rope_fits(layer.sin) &&
                   layer.q_norm.weight.defined() == layer.k_norm.weight.defined();
  if (!all) return false;
  check_pages(layer.view, x_, layer.kv_heads, layer.dim);
  layers_.push_back(std::move(layer));
  return true;
}

Tensor RowsStack::run() const {
  const int64_t n = x_.size(0), c = x_.size(1), threads = at::get_num_threads();
  const bool shared_out = n * largest_ >= 2 * kRowThreadWork;
  if (layers_.empty() || work_ > kCachedWeights || (n < threads && shared_out)) return {};
  int64_t width = 0, inner = 0, f = 0, heads = 1, norm = c;
  for (const Layer& layer : layers_) {
    width = std::max(width, layer.width());
    inner = std::max(inner, layer.heads * layer.dim);
    f = std::max(f, layer.down.in());
    heads = std::max(heads, layer.heads);
    norm = std::max(norm, layer.dim);
  }
  Tensor y = x_.clone();
  const auto part = [&](int64_t begin, int64_t end) {
    const int64_t m = end - begin;
    const auto room = [m](int64_t row) { return std::unique_ptr<float[]>(new float[m * row]); };
    Scratch scratch{room(c), room(width), room(inner), room(2 * f), room(f), room(c), room(heads), std::unique_ptr<float[]>(new float[norm]), {}};
    for (const Layer& layer : layers_) layer.run(begin, m, y.mutable_data_ptr<float>() + begin * c, scratch);
  };
  const int64_t parts = n * work_ < 2 * kRowThreadWork ? 1 : std::min(n, threads);
  parts == 1 ? part(0, n) : at::parallel_for(0, n, (n + parts - 1) / parts, part);
  return y;
}

}  // namespace ferrotune
