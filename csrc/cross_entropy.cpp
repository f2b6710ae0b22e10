// lm_head and cross-entropy in one pass over chunks of rows: the logits of a chunk live only while its loss and gradient
// are computed, so memory is O(chunk * V) and not O(N * V). Only rows with a target enter the product.
//
// With z = cap(h W^T) [n, V] in f32, cap(s) = c tanh(s / c) or s, and p = softmax(z):
//   loss = sum_n (logsumexp(z_n) - z_n[label_n])
//   dz   = p - onehot(label),   ds = dz (1 - (z / c)^2),   dh = ds W,   dW = ds^T h
// The forward computes dh and dW for a loss gradient of 1; the backward multiplies them by what it is given.
//
// A head in 4 bits is dequantised in runs of words, once for the scores of a chunk and once for its dh: 1.3 GB of traffic each
// at 128,256 words of 4096, 0.36 ms, beside 1.4 ms of product for 1024 rows (H200, derived). Keeping the runs' maxima and
// sums instead, so that one pass over the words does, would save half of that for a kernel more.
#include "ferrotune/csrc/cpu.h"
#include "ferrotune/csrc/few_rows.h"
#include "ferrotune/csrc/kernels.h"
#include "ferrotune/csrc/nf4.h"
#include "ferrotune/src/ffi.rs.h"

namespace ferrotune {

using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;

namespace {

constexpr int64_t kIgnore = -100;

at::ScalarType accumulate_type(const Tensor& x) { return x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat; }

// The matrix of the head, [V, C].
struct Head {
  // Words of a run that are dequantised at once: 64 MiB at 4096 of 16 bits. Even C gives each run scales of its own.
  static constexpr int64_t kRun = 8192;

  Tensor dense;  // in the dtype of the products, or undefined:
  std::optional<Nf4> nf4;

  Head(const Tensor& weight, at::ScalarType dtype) {
    if (weight.defined()) dense = weight.to(dtype);
  }
  Head(const Tensor& weight, const Nf4View& view, at::ScalarType dtype) : Head(weight, dtype) {
    if (!weight.defined()) nf4 = Nf4(view);
  }

  int64_t words() const { return nf4 ? nf4->rows : dense.size(0); }

  // Calls body(first word, W of the words from there on in the dtype of x).
  template <typename Body>
  void each_run(const Tensor& x, const Body& body) const {
    if (!nf4) return body(0, dense);
    const int64_t run = nf4->splits_at(kRun) ? kRun : nf4->rows;
    for (int64_t first = 0; first < nf4->rows; first += run) {
      const int64_t count = std::min(run, nf4->rows - first);
      const Tensor w = at::empty({count, nf4->in}, x.options());
      dequantize_into(nf4->some_rows(first, count), w);
      body(first, w);
    }
  }
};

// Rows a chunk: on the CPU f32 logits of at most 64 MiB (they should stay near the caches), on a GPU 512 MiB and 512 rows,
// 1024 where the head must be dequantised for each chunk.
int64_t chunk_rows(const Tensor& hidden, const Head& head) {
  const int64_t row = 4 * head.words();
  if (hidden.is_cuda()) return std::clamp<int64_t>((int64_t{1} << 29) / row, 1, head.nf4 ? 1024 : 512);
  return std::max<int64_t>(16, (int64_t{1} << 26) / row);
}

// h W^T, [n, V], summed and stored in f32 (f64 for f64).
Tensor scores_of(const Tensor& hidden, const Head& head) {
  const Tensor scores = at::empty({hidden.size(0), head.words()}, hidden.options().dtype(accumulate_type(hidden)));
  head.each_run(hidden, [&](int64_t first, const Tensor& w) {
    product_as(scores.narrow(1, first, w.size(0)), hidden, w.t(), 1, false);
  });
  return scores;
}

// dh = ds W.
void gradient_into(const Tensor& dh, const Tensor& ds, const Head& head) {
  if (!head.nf4) return product_into(dh, ds, head.dense, 1, false);
  const Tensor sum = at::empty(dh.sizes(), dh.options().dtype(accumulate_type(dh)));
  head.each_run(dh, [&](int64_t first, const Tensor& w) {
    product_as(sum, ds.narrow(1, first, w.size(0)), w, 1, first > 0);
  });
  dh.copy_(sum);
}

struct Chunk {
  Tensor losses;  // [n]
  Tensor ds;      // [n, V] in the dtype of the products; undefined unless asked for
};

Chunk chunk_formula(const Tensor& scores, const Tensor& labels, double softcap, bool gradient, at::ScalarType dtype) {
  Tensor z = scores;
  if (softcap > 0) z.div_(softcap).tanh_().mul_(softcap);
  const Tensor y = labels.unsqueeze(1);
  // Not z - logsumexp(z): that rounds at the size of the largest logit, and p - 1 of a confident row drowns in it.
  Tensor log_p = at::log_softmax(z, 1);
  Chunk chunk{log_p.gather(1, y).neg_().squeeze(1), Tensor()};
  if (!gradient) return chunk;
  Tensor slope;
  if (softcap > 0) slope = z.div(softcap).square_().neg_().add_(1);
  Tensor dz = log_p.exp_();
  dz.scatter_add_(1, y, at::full({z.size(0), 1}, -1, dz.options()));
  if (slope.defined()) dz.mul_(slope);
  chunk.ds = dz.to(dtype);
  return chunk;
}

// ds replaces scores in its memory: a view of it whose rows are 4 V bytes apart.
Chunk chunk_kernel(const Kernels& kernels, const Tensor& scores, const Tensor& labels, double softcap, bool gradient,
                   const Tensor& hidden) {
  const Launch launch(scores);
  const int64_t n = scores.size(0), vocab = scores.size(1);
  Chunk chunk{at::empty({n}, scores.options()), Tensor()};
  check_launch(kernels.cross_entropy(scores.mutable_data_ptr<float>(), labels.const_data_ptr<int64_t>(),
                                     chunk.losses.mutable_data_ptr<float>(), n, vocab, static_cast<float>(softcap),
                                     gradient, kernel_dtype(hidden), launch.stream()),
               "cross_entropy");
  if (gradient) chunk.ds = scores.view(hidden.scalar_type()).narrow(1, 0, vocab);
  return chunk;
}

// ds replaces scores.
Chunk chunk_cpu(const CpuKernels& kernels, const Tensor& scores, const Tensor& labels, double softcap) {
  const int64_t vocab = scores.size(1);
  const Tensor y = labels.contiguous();
  const Chunk chunk{at::empty({scores.size(0)}, scores.options()), scores};
  cpu_rows(scores.size(0), 8 * vocab, [&](int64_t begin, int64_t end) {
    kernels.cross_entropy(end - begin, vocab, scores.mutable_data_ptr<float>() + begin * vocab,
                          y.const_data_ptr<int64_t>() + begin, static_cast<float>(softcap),
                          chunk.losses.mutable_data_ptr<float>() + begin);
  });
  return chunk;
}

Chunk chunk_of(const Tensor& hidden, const Head& head, const Tensor& labels, double softcap, bool gradient) {
  const Tensor scores = scores_of(hidden, head);
  if (const Kernels* kernels = kernels_for(hidden)) {
    return chunk_kernel(*kernels, scores, labels, softcap, gradient, hidden);
  }
  if (const CpuKernels* kernels = cpu_kernels_for(scores); kernels != nullptr && hidden.scalar_type() == at::kFloat) {
    return chunk_cpu(*kernels, scores, labels, softcap);
  }
  return chunk_formula(scores, labels, softcap, gradient, hidden.scalar_type());
}

// dW += ds^T h, added in dW's own f32 where the products are 16-bit.
void accumulate(Tensor& dw, const Tensor& ds, const Tensor& hidden) {
  if (dw.scalar_type() == hidden.scalar_type()) {
    product_into(dw, ds.t(), hidden, 1, true);
  } else if (hidden.is_cuda()) {
    at::addmm_out(dw, dw, ds.t(), hidden, at::kFloat);
  } else {
    dw.add_(at::mm(ds.t(), hidden));
  }
}

// An undefined tensor may not be an argument of a Function.
using Given = std::optional<Tensor>;

std::optional<Tensor> if_defined(const Tensor& x) { return x.defined() ? std::optional<Tensor>(x) : std::nullopt; }

// The loss, and dh and dw for a gradient of 1 where they are wanted. weight is none where the head is in 4 bits.
std::tuple<Tensor, Tensor, Tensor> loss_and_gradients(const Tensor& hidden, const Given& weight, const Head& head,
                                                      const Given& given, Tensor labels, double softcap, bool need_dh,
                                                      bool need_dw) {
  Tensor rows = given.value_or(Tensor());
  if (!rows.defined() && !kernels_for(hidden)) {
    // The kernel knows rows without a target, the formula does not.
    const Tensor kept = labels.ne(kIgnore).nonzero().squeeze(1);
    if (kept.size(0) < labels.size(0)) {
      rows = kept;
      labels = labels.index_select(0, kept);
    }
  }
  const auto acc = accumulate_type(hidden);
  const int64_t n = labels.size(0), step = chunk_rows(hidden, head);

  Tensor losses = at::empty({n}, hidden.options().dtype(acc));
  Tensor dh, dw;
  if (need_dh) dh = rows.defined() ? at::zeros_like(hidden) : at::empty_like(hidden);
  if (need_dw) dw = at::zeros(weight->sizes(), weight->options().dtype(acc));
  for (int64_t start = 0; start < n; start += step) {
    const int64_t count = std::min(step, n - start);
    Tensor places;
    if (rows.defined()) places = rows.narrow(0, start, count);
    const Tensor h = rows.defined() ? hidden.index_select(0, places) : hidden.narrow(0, start, count);
    const Chunk chunk = chunk_of(h, head, labels.narrow(0, start, count), softcap, need_dh || need_dw);
    losses.narrow(0, start, count).copy_(chunk.losses);
    if (need_dh && rows.defined()) {
      const Tensor part = at::empty(h.sizes(), h.options());
      gradient_into(part, chunk.ds, head);
      dh.index_copy_(0, places, part);
    } else if (need_dh) {
      gradient_into(dh.narrow(0, start, count), chunk.ds, head);
    }
    if (need_dw) accumulate(dw, chunk.ds, h);
  }
  return {losses.sum(), dh, dw};
}

struct LinearCrossEntropy : Function<LinearCrossEntropy> {
  static Tensor forward(AutogradContext* ctx, const Tensor& hidden, Given weight, const Head& head, Given rows,
                        Tensor labels, double softcap) {
    const bool need_dw = weight.has_value() && weight->requires_grad();
    const auto [loss, dh, dw] =
        loss_and_gradients(hidden, weight, head, rows, labels, softcap, hidden.requires_grad(), need_dw);
    ctx->saved_data["dh"] = dh;
    ctx->saved_data["dw"] = dw;
    if (need_dw) ctx->saved_data["weight_type"] = weight->scalar_type();
    return loss;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    TORCH_CHECK(!ctx->saved_data.empty(), "linear_cross_entropy: its gradient was taken already");
    Tensor dh = ctx->saved_data["dh"].toTensor(), dw = ctx->saved_data["dw"].toTensor();
    const auto weight_type = dw.defined() ? ctx->saved_data["weight_type"].toScalarType() : at::kFloat;
    // In place, or a second buffer of the size of the hidden states would be needed: so only once.
    ctx->saved_data.clear();
    // One dimension, so that the product is in f32: a scalar tensor would be rounded to dh's dtype first.
    const Tensor grad = grads[0].reshape({1});
    if (dh.defined()) dh.mul_(grad);
    if (dw.defined()) dw = dw.mul_(grad).to(weight_type);
    return {dh, dw, Tensor(), Tensor(), Tensor(), Tensor()};
  }
};

void check(const Tensor& hidden, const Tensor& weight, const Nf4View& nf4, const Tensor& rows, const Tensor& labels) {
  const int64_t expected = rows.defined() ? rows.size(0) : hidden.size(0);
  const bool dense = weight.defined();
  const int64_t in = dense && weight.dim() == 2 ? weight.size(1) : nf4.in_features;
  TORCH_CHECK(hidden.dim() == 2 && (!dense || weight.dim() == 2) && hidden.size(1) == in && labels.dim() == 1 &&
                  labels.size(0) == expected && labels.scalar_type() == at::kLong,
              "linear_cross_entropy: hidden is ", hidden.sizes(), ", weight is ",
              dense ? weight.sizes().vec() : std::vector<int64_t>{nf4.rows, nf4.in_features}, ", labels is ",
              labels.sizes(), ", expected [N, C], [V, C] and int64 [", expected, "]");
}

}  // namespace

std::unique_ptr<Tensor> linear_cross_entropy(const Tensor& hidden, const Tensor& weight, const Nf4View& nf4,
                                             const Tensor& rows, const Tensor& labels, double softcap) {
  check(hidden, weight, nf4, rows, labels);
  // The cast is no part of the graph: dW is computed here.
  const Head head = [&] {
    at::NoGradGuard no_grad;
    return Head(weight, nf4, hidden.scalar_type());
  }();
  return std::make_unique<Tensor>(
      LinearCrossEntropy::apply(hidden, if_defined(weight), head, if_defined(rows), labels, softcap));
}

std::tuple<Tensor, Tensor, Tensor> linear_cross_entropy_forward(const Tensor& hidden, const Tensor& weight,
                                                                const Tensor& labels, double softcap, bool need_dh,
                                                                bool need_dw) {
  const Tensor none;
  check(hidden, weight, Nf4View{0, 0, none, none, none, 0, none, none, 0, 0}, none, labels);
  at::NoGradGuard no_grad;
  return loss_and_gradients(hidden, weight, Head(weight, hidden.scalar_type()), std::nullopt, labels, softcap, need_dh,
                            need_dw);
}

std::unique_ptr<Tensor> linear_log_probs(const Tensor& hidden, const Tensor& weight, const Nf4View& nf4,
                                         const Tensor& labels, double softcap) {
  check(hidden, weight, nf4, Tensor(), labels);
  at::NoGradGuard no_grad;
  const Head head(weight, nf4, hidden.scalar_type());
  TensorList chunks;
  const int64_t step = chunk_rows(hidden, head);
  for (int64_t start = 0; start < hidden.size(0); start += step) {
    const int64_t count = std::min(step, hidden.size(0) - start);
    const Tensor h = hidden.narrow(0, start, count), y = labels.narrow(0, start, count);
    chunks.push_back(chunk_of(h, head, y, softcap, false).losses.neg_());
  }
  return std::make_unique<Tensor>(chunks.empty() ? at::zeros({0}, hidden.options()) : at::cat(chunks));
}

std::unique_ptr<Tensor> head_scores(const Tensor& hidden, const Tensor& weight, const Nf4View& view) {
  const bool dense = weight.defined();
  const int64_t in = dense ? weight.size(1) : view.in_features;
  if (dense && (at::GradMode::is_enabled() || hidden.is_cpu())) return std::make_unique<Tensor>(linear(hidden, Linear(weight)));
  at::NoGradGuard no_grad;
  TORCH_CHECK(hidden.dim() == 2 && hidden.size(1) == in, "head_scores: hidden is ", hidden.sizes(), ", expected [N, ", in, "]");
  if (Tensor scores = few_rows_scores(hidden, dense ? Linear(weight) : Linear(Nf4(view))); scores.defined()) {
    return std::make_unique<Tensor>(std::move(scores));
  }
  return std::make_unique<Tensor>(scores_of(hidden, Head(weight, view, hidden.scalar_type())));
}

}  // namespace ferrotune
