// lm_head and cross-entropy in one pass over chunks of rows: the logits of a chunk live only while its loss and gradient
// are computed, so memory is O(chunk * V) and not O(N * V). Rows labelled -100 are dropped before the product.
//
// With z = cap(h W^T) [n, V] in f32, cap(s) = c tanh(s / c) or s, and p = softmax(z):
//   loss = sum_n (logsumexp(z_n) - z_n[label_n])
//   dz   = p - onehot(label),   ds = dz (1 - (z / c)^2),   dh = ds W,   dW = ds^T h
#include <numeric>

#include "ferrotune/csrc/cpu.h"
#include "ferrotune/csrc/ops.h"

namespace ferrotune {

using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;

namespace {

constexpr int64_t kIgnore = -100;

// Rows a chunk: f32 logits of at most 64 MiB on the CPU (they should stay near the caches), 1 GiB on a GPU.
int64_t chunk_rows(const Tensor& hidden, int64_t vocab) {
  const int64_t bytes = hidden.is_cuda() ? int64_t{1} << 30 : int64_t{1} << 26;
  return std::max<int64_t>(16, bytes / (4 * vocab));
}

Tensor logits_of(const Tensor& hidden, const Tensor& weight, double softcap) {
  Tensor logits = product(hidden, weight.t());
  if (logits.scalar_type() != at::kDouble) logits = logits.to(at::kFloat);
  if (softcap > 0) logits.div_(softcap).tanh_().mul_(softcap);
  return logits;
}

// z to dz in place; returns the loss, summed over fixed runs of rows, the same for any number of threads.
double cross_entropy_cpu(const CpuKernels& kernels, const Tensor& z, const Tensor& labels, double softcap) {
  constexpr int64_t kRun = 16;
  const int64_t n = z.size(0), v = z.size(1), runs = (n + kRun - 1) / kRun;
  const Tensor y = labels.contiguous();
  std::vector<double> losses(runs);
  cpu_rows(runs, kRun * v * 8, [&](int64_t first, int64_t last) {
    for (int64_t run = first; run < last; ++run) {
      losses[run] = kernels.cross_entropy(std::min(kRun, n - run * kRun), v, z.mutable_data_ptr<float>() + run * kRun * v,
                                          y.const_data_ptr<int64_t>() + run * kRun, static_cast<float>(softcap));
    }
  });
  return std::accumulate(losses.begin(), losses.end(), 0.0);
}

struct LinearCrossEntropy : Function<LinearCrossEntropy> {
  static Tensor forward(AutogradContext* ctx, const Tensor& hidden, const Tensor& weight, const Tensor& labels,
                        double softcap) {
    const Tensor rows = labels.ne(kIgnore).nonzero().squeeze(1);
    const bool all = rows.size(0) == hidden.size(0);
    const Tensor h = all ? hidden : hidden.index_select(0, rows);
    const Tensor y = all ? labels : labels.index_select(0, rows);
    const Tensor w = weight.to(h.scalar_type());
    const auto acc = h.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
    const bool need_dh = hidden.requires_grad(), need_dw = weight.requires_grad();

    Tensor loss = at::zeros({}, h.options().dtype(acc));
    Tensor dh = need_dh ? at::empty_like(h) : Tensor();
    Tensor dw = need_dw ? at::zeros(weight.sizes(), weight.options().dtype(acc)) : Tensor();
    const int64_t step = chunk_rows(h, weight.size(0));
    for (int64_t start = 0; start < h.size(0); start += step) {
      const int64_t count = std::min(step, h.size(0) - start);
      const Tensor hc = h.narrow(0, start, count), yc = y.narrow(0, start, count).unsqueeze(1);
      if (const CpuKernels* kernels = cpu_kernels_for(h)) {
        const Tensor z = product(hc, w.t());
        loss.add_(cross_entropy_cpu(*kernels, z, yc, softcap));
        if (need_dh) product_into(dh.narrow(0, start, count), z, w, 1, false);
        if (need_dw) product_into(dw, z.t(), hc, 1, true);
        continue;
      }
      const Tensor z = logits_of(hc, w, softcap);
      // Not z - logsumexp(z): that rounds at the size of the largest logit, and p - 1 of a confident row drowns in it.
      Tensor log_p = at::log_softmax(z, 1);
      loss.sub_(log_p.gather(1, yc).sum());
      if (!need_dh && !need_dw) continue;
      Tensor slope;
      if (softcap > 0) slope = z.div(softcap).square_().neg_().add_(1);
      Tensor dz = log_p.exp_();
      dz.scatter_add_(1, yc, at::full({count, 1}, -1, dz.options()));
      if (slope.defined()) dz.mul_(slope);
      const Tensor ds = dz.to(h.scalar_type());
      if (need_dh) {
        Tensor dhc = dh.narrow(0, start, count);
        at::mm_out(dhc, ds, w);
      }
      if (need_dw) dw.add_(at::mm(ds.t(), hc));
    }
    ctx->save_for_backward({dh, dw, all ? Tensor() : rows});
    ctx->saved_data["sizes"] = hidden.sizes().vec();
    ctx->saved_data["weight_type"] = weight.scalar_type();
    return loss;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const variable_list saved = ctx->get_saved_variables();
    Tensor dh, dw;
    if (saved[0].defined()) {
      dh = saved[0] * grads[0].to(saved[0].scalar_type());
      if (saved[2].defined()) {
        dh = at::zeros(ctx->saved_data["sizes"].toIntVector(), dh.options()).index_copy_(0, saved[2], dh);
      }
    }
    if (saved[1].defined()) dw = (saved[1] * grads[0]).to(ctx->saved_data["weight_type"].toScalarType());
    return {dh, dw, Tensor(), Tensor()};
  }
};

void check(const Tensor& hidden, const Tensor& weight, const Tensor& labels) {
  TORCH_CHECK(hidden.dim() == 2 && weight.dim() == 2 && hidden.size(1) == weight.size(1) && labels.dim() == 1 &&
                  labels.size(0) == hidden.size(0) && labels.scalar_type() == at::kLong,
              "linear_cross_entropy: hidden is ", hidden.sizes(), ", weight is ", weight.sizes(), ", labels is ",
              labels.sizes(), ", expected [N, C], [V, C] and int64 [N]");
}

}  // namespace

std::unique_ptr<Tensor> linear_cross_entropy(const Tensor& hidden, const Tensor& weight, const Tensor& labels,
                                             double softcap) {
  check(hidden, weight, labels);
  return std::make_unique<Tensor>(LinearCrossEntropy::apply(hidden, weight, labels, softcap));
}

std::unique_ptr<Tensor> linear_log_probs(const Tensor& hidden, const Tensor& weight, const Tensor& labels,
                                         double softcap) {
  check(hidden, weight, labels);
  at::NoGradGuard no_grad;
  const Tensor w = weight.to(hidden.scalar_type());
  TensorList chunks;
  const int64_t step = chunk_rows(hidden, weight.size(0));
  for (int64_t start = 0; start < hidden.size(0); start += step) {
    const int64_t count = std::min(step, hidden.size(0) - start);
    const Tensor z = logits_of(hidden.narrow(0, start, count), w, softcap);
    const Tensor y = labels.narrow(0, start, count).unsqueeze(1);
    chunks.push_back(at::log_softmax(z, 1).gather(1, y).squeeze(1));
  }
  return std::make_unique<Tensor>(chunks.empty() ? at::zeros({0}, hidden.options()) : at::cat(chunks));
}

}  // namespace ferrotune
