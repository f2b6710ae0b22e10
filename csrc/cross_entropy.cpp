// lm_head and cross-entropy in one pass over chunks of rows: the logits of a chunk live only while its loss and gradient
// are computed, so memory is O(chunk * V) and not O(N * V). Only rows with a target enter the product.
//
//   loss = sum_n (logsumexp(z_n) - z_n[label_n])
// The forward computes dh and dW for a loss gradient of 1; the backward multiplies them by what it is given.
#include "ferrotune/csrc/few_rows.h"
#include "ferrotune/csrc/head.h"
#include "ferrotune/csrc/kernels.h"
#include "ferrotune/src/ffi.rs.h"

namespace ferrotune {

using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;

namespace {

constexpr int64_t kIgnore = -100;

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
    const Tensor scores = scores_of(h, head, 1);
    const Chunk chunk = chunk_of(h, scores, labels.narrow(0, start, count), {1, softcap}, need_dh || need_dw);
    losses.narrow(0, start, count).copy_(chunk.losses);
    if (need_dh && rows.defined()) {
      const Tensor part = at::empty(h.sizes(), h.options());
      head_gradient_into(part, chunk.ds, head);
      dh.index_copy_(0, places, part);
    } else if (need_dh) {
      head_gradient_into(dh.narrow(0, start, count), chunk.ds, head);
    }
    if (need_dw) add_head_gradient(dw, chunk.ds, h);
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

}  // namespace

std::unique_ptr<Tensor> linear_cross_entropy(const Tensor& hidden, const HeadView& view, const Tensor& rows, const Tensor& labels,
                                             double softcap) {
  check_head("linear_cross_entropy", hidden, view, rows, labels);
  // The cast is no part of the graph: dW is computed here.
  const Head head = [&] {
    at::NoGradGuard no_grad;
    return Head(view, hidden.scalar_type());
  }();
  return std::make_unique<Tensor>(
      LinearCrossEntropy::apply(hidden, if_defined(view.weight), head, if_defined(rows), labels, softcap));
}

std::tuple<Tensor, Tensor, Tensor> linear_cross_entropy_forward(const Tensor& hidden, const Tensor& weight,
                                                                const Tensor& labels, double softcap, bool need_dh,
                                                                bool need_dw) {
  const Tensor none;
  TORCH_CHECK(weight.dim() == 2, "linear_cross_entropy: weight is ", weight.sizes(), ", expected [V, C]");
  check_head("linear_cross_entropy", hidden, weight.size(0), weight.size(1), none, labels);
  at::NoGradGuard no_grad;
  return loss_and_gradients(hidden, weight, Head(weight, hidden.scalar_type()), std::nullopt, labels, softcap, need_dh,
                            need_dw);
}

std::unique_ptr<Tensor> head_scores(const Tensor& hidden, const HeadView& view) {
  const Tensor& weight = view.weight;
  if (weight.defined() && (at::GradMode::is_enabled() || hidden.is_cpu())) return std::make_unique<Tensor>(linear(hidden, Linear(weight)));
  at::NoGradGuard no_grad;
  const Head head(view, hidden.scalar_type());
  const int64_t in = head.nf4 ? head.nf4->in : head.bf12 ? head.bf12->in : weight.size(1);
  TORCH_CHECK(hidden.dim() == 2 && hidden.size(1) == in, "head_scores: hidden is ", hidden.sizes(), ", expected [N, ", in, "]");
  Tensor scores = head.bf12 ? bf12_scores(hidden, *head.bf12) : few_rows_scores(hidden, head.nf4 ? Linear(*head.nf4) : Linear(weight));
  return std::make_unique<Tensor>(scores.defined() ? std::move(scores) : scores_of(hidden, head, 1));
}

}  // namespace ferrotune
