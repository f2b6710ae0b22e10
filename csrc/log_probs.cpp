// Log-probabilities of given words in chunks of rows: policy and preference losses need one number a token, whose gradient is not
// known before the loss is. Nothing of size V outlives a chunk; the backward computes its scores again, one product more.
//
// With z = cap(h W^T) / T in f32, p = softmax(z), y the label, and g the gradient of logp:
//   logp = z_y - logsumexp(z)      entropy = -sum_v p_v log p_v
//   ds   = g (onehot(y) - p) / T (1 - (cap(s) / c)^2)      dh = ds W      dW = ds^T h
// g / T scales whole rows of ds, so it scales those of dh, and of h for dW: [n, C] numbers and not [n, V].
//
// Where nobody else holds the hidden states, dh is written over them: at 8 x 20,000 tokens of 4096 in 16 bits that is 1.3 GB.
#include "ferrotune/csrc/head.h"
#include "ferrotune/csrc/node.h"
#include "ferrotune/src/ffi.rs.h"

namespace ferrotune {

namespace {

// On a GPU chunks are half of those of the cross-entropy, which goes through the head once less: 125 MiB of scores at 128,256 words.
// 256 rows of 16 bits still take longer in the product (0.38 ms at C = 4096, derived) than the head takes to read (0.26 ms).
constexpr int64_t kSmaller = 2;

// What a forward and its backward work on.
struct LabelledRows {
  Tensor hidden;  // [N, C]
  Head head;
  Tensor rows;    // [n], of hidden; undefined for all
  Tensor labels;  // [n]
  Logits logits;

  // Calls body(start, count, places, h): the hidden states of a chunk, and which rows of all they are (undefined for
  // start .. start + count).
  // `copies`: how many tensors of a chunk's scores the body holds at once; chunks are that much smaller.
  template <typename Body>
  void each_chunk(int64_t copies, const Body& body) const {
    const int64_t n = labels.size(0), most = chunk_rows(hidden, head) / (hidden.is_cuda() ? kSmaller * copies : copies);
    const int64_t step = std::max<int64_t>(1, most);
    for (int64_t start = 0; start < n; start += step) {
      const int64_t count = std::min(step, n - start);
      const Tensor places = rows.defined() ? rows.narrow(0, start, count) : Tensor();
      body(start, count, places, places.defined() ? hidden.index_select(0, places) : hidden.narrow(0, start, count));
    }
  }
};

Tensor entropy_of(const Tensor& scores, Logits logits) {
  const double cap = logits.softcap / logits.temperature;
  Tensor log_p = at::log_softmax(cap > 0 ? scores.div(cap).tanh_().mul_(cap) : scores, 1);
  return log_p.exp().mul_(log_p).sum(1).neg_();
}

struct TokenLogProbs : torch::autograd::Function<TokenLogProbs> {
  // An undefined tensor may not be an argument of a Function.
  using Given = std::optional<Tensor>;

  struct Saved {
    LabelledRows of;
    bool need_dh;
    Given dw_like;  // the weight, where it trains
  };

  static Tensor forward(torch::autograd::AutogradContext* ctx, const Tensor& hidden, Given weight, const LabelledRows& of,
                        Given entropy, bool differentiable) {
    Tensor log_probs = at::zeros({hidden.size(0)}, hidden.options().dtype(accumulate_type(hidden)));
    const auto put = [](Tensor& all, int64_t start, const Tensor& places, const Tensor& part) {
      places.defined() ? all.index_copy_(0, places, part) : all.narrow(0, start, part.size(0)).copy_(part);
    };
    of.each_chunk(entropy ? 3 : 1, [&](int64_t start, int64_t count, const Tensor& places, const Tensor& h) {
      const Tensor scores = scores_of(h, of.head, of.logits.temperature);
      if (entropy) put(*entropy, start, places, entropy_of(scores, of.logits));
      const Chunk chunk = chunk_of(h, scores, of.labels.narrow(0, start, count), of.logits, false);
      put(log_probs, start, places, chunk.losses.neg_());
    });
    if (differentiable) {
      const bool need_dw = weight && weight->requires_grad();
      ctx->saved_data["saved"] = hold(Saved{of, hidden.requires_grad(), need_dw ? weight : std::nullopt});
    }
    return log_probs;
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx, torch::autograd::variable_list grads) {
    TORCH_CHECK(!ctx->saved_data.empty(), "token_log_probs: its gradient was taken already");
    Saved saved = taken<Saved>(ctx->saved_data["saved"]);
    ctx->saved_data.clear();
    LabelledRows& of = saved.of;
    const bool alone = of.hidden.use_count() == 1 && of.hidden.storage().use_count() == 1 && of.hidden.is_contiguous();
    of.hidden = of.hidden.detach();
    Tensor dh, dw;
    if (saved.need_dh) dh = alone ? of.hidden : at::empty_like(of.hidden);
    if (saved.need_dh && of.rows.defined()) {
      Tensor others = at::ones({dh.size(0), 1}, dh.options().dtype(at::kBool));
      dh.masked_fill_(others.index_fill_(0, of.rows, false), 0);
    }
    if (saved.dw_like) dw = at::zeros(saved.dw_like->sizes(), saved.dw_like->options().dtype(accumulate_type(of.hidden)));
    const Tensor g = grads[0].neg().div_(of.logits.temperature).unsqueeze(1);  // of ds = p - onehot
    of.each_chunk(1, [&](int64_t start, int64_t count, const Tensor& places, const Tensor& h) {
      const Tensor scale = places.defined() ? g.index_select(0, places) : g.narrow(0, start, count);
      const Tensor scores = scores_of(h, of.head, of.logits.temperature);
      const Tensor ds = chunk_of(h, scores, of.labels.narrow(0, start, count), of.logits, true).ds;
      if (dw.defined()) add_head_gradient(dw, ds, h.mul(scale).to(h.scalar_type()));
      if (!dh.defined()) return;
      // h is not read again: where it is a part of dh, it is overwritten now.
      const Tensor part = places.defined() ? h : dh.narrow(0, start, count);
      head_gradient_into(part, ds, of.head);
      part.mul_(scale);
      if (places.defined()) dh.index_copy_(0, places, part);
    });
    if (dw.defined()) dw = dw.to(saved.dw_like->scalar_type());
    return {dh, dw, Tensor(), Tensor(), Tensor()};
  }
};

}  // namespace

std::unique_ptr<Tensor> token_log_probs(const Tensor& hidden, const HeadView& view, const Tensor& rows, const Tensor& labels,
                                        double temperature, double softcap, const Tensor& entropy) {
  check_head("token_log_probs", hidden, view, rows, labels);
  TORCH_CHECK(temperature > 0, "token_log_probs: temperature is ", temperature, ", expected more than 0");
  TORCH_CHECK(!entropy.defined() || (entropy.dim() == 1 && entropy.size(0) == hidden.size(0)),
              "token_log_probs: entropy is ", entropy.sizes(), ", expected [", hidden.size(0), "]");
  // The cast is no part of the graph: dW is computed here.
  const Head head = [&] {
    at::NoGradGuard no_grad;
    return Head(view, hidden.scalar_type());
  }();
  const auto given = [](const Tensor& x) { return x.defined() ? std::optional<Tensor>(x) : std::nullopt; };
  const LabelledRows of{hidden, head, rows, labels, {temperature, softcap}};
  return std::make_unique<Tensor>(
      TokenLogProbs::apply(hidden, given(view.weight), of, given(entropy), at::GradMode::is_enabled()));
}

}  // namespace ferrotune
