// lm_head and cross-entropy in one pass over chunks of rows: the logits of a chunk live only while its loss and gradient
// are computed, so memory is O(chunk * V) and not O(N * V). Only rows with a target enter the product.
//
// With z = cap(h W^T) [n, V] in f32, cap(s) = c tanh(s / c) or s, and p = softmax(z):
//   loss = sum_n (logsumexp(z_n) - z_n[label_n])
//   dz   = p - onehot(label),   ds = dz (1 - (z / c)^2),   dh = ds W,   dW = ds^T h
// The forward computes dh and dW for a loss gradient of 1; the backward multiplies them by what it is given.
#include "ferrotune/csrc/cpu.h"
#include "ferrotune/csrc/kernels.h"
#include "ferrotune/csrc/ops.h"

namespace ferrotune {

using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;

namespace {

constexpr int64_t kIgnore = -100;

// Rows a chunk: on the CPU f32 logits of at most 64 MiB (they should stay near the caches), on a GPU 1024, or what 1 GiB
// holds: with 128,256 words the logits take 501 MiB, and both products still run at the rate of large ones.
int64_t chunk_rows(const Tensor& hidden, int64_t vocab) {
  if (hidden.is_cuda()) return std::clamp<int64_t>((int64_t{1} << 30) / (4 * vocab), 1, 1024);
  return std::max<int64_t>(16, (int64_t{1} << 26) / (4 * vocab));
}

// h W^T, [n, V], summed and stored in f32 (f64 for f64).
Tensor scores_of(const Tensor& hidden, const Tensor& weight) {
  const auto dtype = hidden.scalar_type();
  if (dtype == at::kDouble || dtype == at::kFloat) return product(hidden, weight.t());
  if (hidden.is_cuda()) return at::mm(hidden, weight.t(), at::kFloat);
  return at::mm(hidden, weight.t()).to(at::kFloat);
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

Chunk chunk_of(const Tensor& hidden, const Tensor& weight, const Tensor& labels, double softcap, bool gradient) {
  const Tensor scores = scores_of(hidden, weight);
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

struct LinearCrossEntropy : Function<LinearCrossEntropy> {
  // An undefined tensor may not be an argument of a Function.
  using Rows = std::optional<Tensor>;

  static Tensor forward(AutogradContext* ctx, const Tensor& hidden, const Tensor& weight, Rows given, Tensor labels,
                        double softcap) {
    Tensor rows = given.value_or(Tensor());
    if (!rows.defined() && !kernels_for(hidden)) {
      // The kernel knows rows without a target, the formula does not.
      const Tensor kept = labels.ne(kIgnore).nonzero().squeeze(1);
      if (kept.size(0) < labels.size(0)) {
        rows = kept;
        labels = labels.index_select(0, kept);
      }
    }
    const Tensor w = weight.to(hidden.scalar_type());
    const auto acc = hidden.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
    const bool need_dh = hidden.requires_grad(), need_dw = weight.requires_grad();
    const int64_t n = labels.size(0), step = chunk_rows(hidden, weight.size(0));

    Tensor losses = at::empty({n}, hidden.options().dtype(acc));
    Tensor dh, dw;
    if (need_dh) dh = rows.defined() ? at::zeros_like(hidden) : at::empty_like(hidden);
    if (need_dw) dw = at::zeros(weight.sizes(), weight.options().dtype(acc));
    for (int64_t start = 0; start < n; start += step) {
      const int64_t count = std::min(step, n - start);
      Tensor places;
      if (rows.defined()) places = rows.narrow(0, start, count);
      const Tensor h = rows.defined() ? hidden.index_select(0, places) : hidden.narrow(0, start, count);
      const Chunk chunk = chunk_of(h, w, labels.narrow(0, start, count), softcap, need_dh || need_dw);
      losses.narrow(0, start, count).copy_(chunk.losses);
      if (need_dh && rows.defined()) {
        dh.index_copy_(0, places, product(chunk.ds, w));
      } else if (need_dh) {
        Tensor part = dh.narrow(0, start, count);
        product_into(part, chunk.ds, w, 1, false);
      }
      if (need_dw) accumulate(dw, chunk.ds, h);
    }
    ctx->saved_data["dh"] = dh;
    ctx->saved_data["dw"] = dw;
    ctx->saved_data["weight_type"] = weight.scalar_type();
    return losses.sum();
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    TORCH_CHECK(!ctx->saved_data.empty(), "linear_cross_entropy: its gradient was taken already");
    Tensor dh = ctx->saved_data["dh"].toTensor(), dw = ctx->saved_data["dw"].toTensor();
    const auto weight_type = ctx->saved_data["weight_type"].toScalarType();
    // In place, or a second buffer of the size of the hidden states would be needed: so only once.
    ctx->saved_data.clear();
    // One dimension, so that the product is in f32: a scalar tensor would be rounded to dh's dtype first.
    const Tensor grad = grads[0].reshape({1});
    if (dh.defined()) dh.mul_(grad);
    if (dw.defined()) dw = dw.mul_(grad).to(weight_type);
    return {dh, dw, Tensor(), Tensor(), Tensor()};
  }
};

void check(const Tensor& hidden, const Tensor& weight, const Tensor& rows, const Tensor& labels) {
  const int64_t expected = rows.defined() ? rows.size(0) : hidden.size(0);
  TORCH_CHECK(hidden.dim() == 2 && weight.dim() == 2 && hidden.size(1) == weight.size(1) && labels.dim() == 1 &&
                  labels.size(0) == expected && labels.scalar_type() == at::kLong,
              "linear_cross_entropy: hidden is ", hidden.sizes(), ", weight is ", weight.sizes(), ", labels is ",
              labels.sizes(), ", expected [N, C], [V, C] and int64 [", expected, "]");
}

}  // namespace

std::unique_ptr<Tensor> linear_cross_entropy(const Tensor& hidden, const Tensor& weight, const Tensor& rows,
                                             const Tensor& labels, double softcap) {
  check(hidden, weight, rows, labels);
  const auto some = rows.defined() ? std::optional<Tensor>(rows) : std::nullopt;
  return std::make_unique<Tensor>(LinearCrossEntropy::apply(hidden, weight, some, labels, softcap));
}

std::unique_ptr<Tensor> linear_log_probs(const Tensor& hidden, const Tensor& weight, const Tensor& labels,
                                         double softcap) {
  check(hidden, weight, Tensor(), labels);
  at::NoGradGuard no_grad;
  const Tensor w = weight.to(hidden.scalar_type());
  TensorList chunks;
  const int64_t step = chunk_rows(hidden, weight.size(0));
  for (int64_t start = 0; start < hidden.size(0); start += step) {
    const int64_t count = std::min(step, hidden.size(0) - start);
    const Tensor h = hidden.narrow(0, start, count), y = labels.narrow(0, start, count);
    chunks.push_back(chunk_of(h, w, y, softcap, false).losses.neg_());
  }
  return std::make_unique<Tensor>(chunks.empty() ? at::zeros({0}, hidden.options()) : at::cat(chunks));
}

}  // namespace ferrotune
