// The two ops of every decoder layer, and their checkpointed form.
//   attention_block: y = x + post(o(attention(rope(norms(qkv(norm(x)))))))
//   mlp_block:       y = x + post(down(act(gate) * up)),  [gate | up] = gate_up(norm(x))
// Policy::Recompute keeps only x of a block and computes the rest again in the backward.
#include <torch/csrc/autograd/autograd.h>

#include <functional>

#include "ferrotune/csrc/attention.h"
#include "ferrotune/csrc/linear.h"
#include "ferrotune/src/ffi.rs.h"

namespace ferrotune {

using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;

namespace {

struct Norm {
  Tensor weight;  // [C], or undefined for no norm
  double eps, offset;

  explicit Norm(const NormView& view) : weight(view.weight), eps(view.eps), offset(view.offset) {}
  Tensor operator()(const Tensor& x) const { return weight.defined() ? rms_norm(x, weight, eps, offset) : x; }
};

struct AttentionBlock {
  Norm norm, q_norm, k_norm, post_norm;
  Linear qkv, o;
  Tensor cos, sin;
  KvView cache;
  int64_t heads, kv_heads, head_dim;
  AttentionSpec spec;
  std::vector<int32_t> cu_seqlens;

  std::vector<Tensor*> visit() {
    std::vector<Tensor*> tensors{&norm.weight, &q_norm.weight, &k_norm.weight, &post_norm.weight};
    qkv.visit(tensors);
    o.visit(tensors);
    return tensors;
  }

  Tensor operator()(const Tensor& x) const {
    const int64_t n = x.size(0);
    const Tensor projected = linear(norm(x), qkv);
    Tensor q, k, v;
    if (q_norm.weight.defined()) {
      const auto parts = projected.split_with_sizes({heads * head_dim, kv_heads * head_dim, kv_heads * head_dim}, 1);
      q = rope(q_norm(parts[0].view({n, heads, head_dim})), cos, sin);
      k = rope(k_norm(parts[1].view({n, kv_heads, head_dim})), cos, sin);
      v = parts[2].view({n, kv_heads, head_dim});
    } else {
      // Query and key heads stand side by side, so one rotation serves both.
      const auto parts = projected.split_with_sizes({(heads + kv_heads) * head_dim, kv_heads * head_dim}, 1);
      const auto qk = rope(parts[0].view({n, heads + kv_heads, head_dim}), cos, sin).split_with_sizes({heads, kv_heads}, 1);
      q = qk[0];
      k = qk[1];
      v = parts[1].view({n, kv_heads, head_dim});
    }
    Tensor attended;
    if (cache.k.defined()) {
      attended = attention_cached(q, k, v, cache, spec);
    } else {
      attended = attention(q, k, v, cu_seqlens, spec);
    }
    return x + post_norm(linear(attended, o));
  }
};

struct MlpBlock {
  Norm norm, post_norm;
  Linear gate_up, down;
  Activation activation;

  std::vector<Tensor*> visit() {
    std::vector<Tensor*> tensors{&norm.weight, &post_norm.weight};
    gate_up.visit(tensors);
    down.visit(tensors);
    return tensors;
  }

  Tensor operator()(const Tensor& x) const {
    return x + post_norm(linear(swiglu(linear(norm(x), gate_up), activation), down));
  }
};

// Runs a block without recording it; the backward runs it again on the kept input, recording, and differentiates that.
// Dropout masks are functions of a key, so both runs draw the same.
struct Checkpoint : Function<Checkpoint> {
  using Body = std::function<Tensor(const Tensor& x, const variable_list& tensors)>;

  static Tensor forward(AutogradContext* ctx, const Tensor& x, at::TensorList tensors, const Body& body) {
    variable_list saved{x};
    saved.insert(saved.end(), tensors.begin(), tensors.end());
    ctx->save_for_backward(saved);
    ctx->saved_data["body"] = c10::IValue::make_capsule(c10::make_intrusive<Held>(body));
    return body(x, tensors.vec());
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const variable_list saved = ctx->get_saved_variables();
    const auto held = ctx->saved_data["body"].toCapsule();
    const Body& body = static_cast<Held&>(*held).body;
    variable_list fresh, wanted;
    std::vector<size_t> place;
    for (size_t i = 0; i < saved.size(); ++i) {
      const Tensor tensor = saved[i].detach();
      if (saved[i].requires_grad()) {
        tensor.set_requires_grad(true);
        wanted.push_back(tensor);
        place.push_back(i);
      }
      fresh.push_back(tensor);
    }
    variable_list result(saved.size() + 1);  // x, tensors, body
    if (wanted.empty()) return result;
    at::AutoGradMode recording(true);
    const Tensor y = body(fresh[0], variable_list(fresh.begin() + 1, fresh.end()));
    const variable_list found = torch::autograd::grad({y}, wanted, {grads[0]}, std::nullopt, false, true);
    for (size_t i = 0; i < place.size(); ++i) result[place[i]] = found[i];
    return result;
  }

 private:
  struct Held : torch::CustomClassHolder {
    explicit Held(Body b) : body(std::move(b)) {}
    Body body;
  };
};

template <typename Block>
Tensor run(Block block, const Tensor& x, Policy policy) {
  if (policy == Policy::Keep || !at::GradMode::is_enabled()) return block(x);
  variable_list tensors;
  for (const Tensor* tensor : block.visit()) {
    if (tensor->defined()) tensors.push_back(*tensor);
  }
  const Checkpoint::Body body = [block](const Tensor& input, const variable_list& given) {
    Block again = block;
    size_t next = 0;
    for (Tensor* slot : again.visit()) {
      if (slot->defined()) *slot = given[next++];
    }
    return again(input);
  };
  return Checkpoint::apply(x, at::TensorList(tensors), body);
}

}  // namespace

std::unique_ptr<Tensor> attention_block(const Tensor& x, const NormView& norm, const LinearView& qkv,
                                        const LinearView& o, const NormView& post_norm,
                                        const AttentionView& attention, Policy policy) {
  AttentionBlock block{Norm(norm),
                       Norm(attention.q_norm),
                       Norm(attention.k_norm),
                       Norm(post_norm),
                       Linear(qkv),
                       Linear(o),
                       attention.cos,
                       attention.sin,
                       KvView{attention.cache_k, attention.cache_v, attention.past},
                       attention.num_heads,
                       attention.num_kv_heads,
                       attention.head_dim,
                       AttentionSpec{attention.scale, attention.softcap, attention.window},
                       std::vector<int32_t>(attention.cu_seqlens.begin(), attention.cu_seqlens.end())};
  return std::make_unique<Tensor>(run(std::move(block), x, policy));
}

std::unique_ptr<Tensor> mlp_block(const Tensor& x, const NormView& norm, const LinearView& gate_up,
                                  const LinearView& down, const NormView& post_norm, Activation activation,
                                  Policy policy) {
  MlpBlock block{Norm(norm), Norm(post_norm), Linear(gate_up), Linear(down), activation};
  return std::make_unique<Tensor>(run(std::move(block), x, policy));
}

}  // namespace ferrotune
