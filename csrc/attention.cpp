// Scaled dot-product attention, arXiv:1706.03762; grouped queries, arXiv:2305.13245.
// f32 on the CPU has kernels of its own and 16 bits there ATen's; the GPU's are chosen in attention_fused.cpp; f64 is the
// formula. Behind a cache, and where ATen's kernel lacks something, queries go in chunks against just the keys they can
// see, so memory is O(chunk * (window + chunk)).
#include "ferrotune/csrc/attention.h"

#include <torch/csrc/autograd/autograd.h>

#include "ferrotune/csrc/cpu.h"
#include "ferrotune/csrc/kernels.h"
#include "ferrotune/csrc/node.h"

namespace ferrotune {

using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;

namespace {

constexpr int64_t kChunk = 256;

// [B, K, S, D] -> [B, H, S, D]: each key/value head serves H / K neighbouring query heads.
Tensor repeat_heads(const Tensor& kv, int64_t heads) {
  const int64_t kv_heads = kv.size(1);
  if (kv_heads == heads) return kv;
  return kv.unsqueeze(2)
      .expand({kv.size(0), kv_heads, heads / kv_heads, kv.size(2), kv.size(3)})
      .reshape({kv.size(0), heads, kv.size(2), kv.size(3)});
}

// One chunk by the formula, with scores capped. Softmax in f32 for 16-bit inputs.
Tensor capped(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& hidden, const AttentionSpec& spec) {
  Tensor scores = at::matmul(q, k.transpose(-2, -1)) * spec.scale;
  scores = at::tanh(scores / spec.softcap) * spec.softcap;
  if (hidden.defined()) scores = scores.masked_fill(hidden, -std::numeric_limits<double>::infinity());
  const auto acc = q.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  return at::matmul(at::softmax(scores, -1, acc).to(v.scalar_type()), v);
}

// True where query `first + i` must not see key `low + j`. [queries, keys]
Tensor hidden_mask(int64_t first, int64_t queries, int64_t low, int64_t keys, int64_t window, at::Device device) {
  const auto options = at::TensorOptions().dtype(at::kLong).device(device);
  const Tensor distance =
      at::arange(first, first + queries, options).unsqueeze(1) - at::arange(low, low + keys, options).unsqueeze(0);
  Tensor hidden = distance.lt(0);
  if (window > 0) hidden = hidden.logical_or_(distance.ge(window));
  return hidden;
}

// q [B, H, T, D], k and v [B, K, S, D]; query i stands at position S - T + i. -> [B, H, T, D]
Tensor attend(const Tensor& q, const Tensor& k, const Tensor& v, const AttentionSpec& spec) {
  const int64_t heads = q.size(1), queries = q.size(2), keys = k.size(2), past = keys - queries;
  const bool windowed = spec.window > 0 && spec.window < keys;
  if (spec.softcap == 0 && past == 0 && !windowed) {
    // ATen's CUDA kernels take grouped heads as they are; the CPU kernel does not.
    const bool grouped = q.is_cuda() && k.size(1) != heads;
    return at::scaled_dot_product_attention(q, grouped ? k : repeat_heads(k, heads), grouped ? v : repeat_heads(v, heads),
                                            {}, 0.0, queries > 1, spec.scale, grouped);
  }
  TensorList chunks;
  for (int64_t start = 0; start < queries; start += kChunk) {
    const int64_t count = std::min(kChunk, queries - start);
    const int64_t high = past + start + count;
    const int64_t low = windowed ? std::max<int64_t>(0, past + start - spec.window + 1) : 0;
    const Tensor qc = q.narrow(2, start, count);
    const Tensor kc = repeat_heads(k.narrow(2, low, high - low), heads);
    const Tensor vc = repeat_heads(v.narrow(2, low, high - low), heads);
    Tensor hidden;
    if (count > 1) hidden = hidden_mask(past + start, count, low, high - low, windowed ? spec.window : 0, q.device());
    if (spec.softcap > 0) {
      chunks.push_back(capped(qc, kc, vc, hidden, spec));
    } else {
      std::optional<Tensor> visible;
      if (hidden.defined()) visible = hidden.logical_not();
      chunks.push_back(at::scaled_dot_product_attention(qc, kc, vc, visible, 0.0, false, spec.scale));
    }
  }
  return chunks.size() == 1 ? chunks[0] : at::cat(chunks, 2);
}

// One query: the heads of a group are the rows of one small product, and no head is repeated. q [1, H, D], k and v [S, K, D]
// -> [H*D].
Tensor attend_one(const Tensor& q, const Tensor& k, const Tensor& v, const AttentionSpec& spec) {
  const int64_t heads = q.size(1), dim = q.size(2), keys = k.size(0), kv_heads = k.size(1);
  const int64_t low = spec.window > 0 ? std::max<int64_t>(0, keys - spec.window) : 0;
  const Tensor ks = k.narrow(0, low, keys - low).transpose(0, 1), vs = v.narrow(0, low, keys - low).transpose(0, 1);
  const auto acc = q.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  // Scores in f32 from the product on, as ATen's kernel for the CPU has them in training; on a GPU from the scale on.
  const auto dtype = q.is_cpu() ? acc : q.scalar_type();
  const Tensor queries = q.reshape({kv_heads, heads / kv_heads, dim}).to(dtype);
  Tensor scores = at::bmm(queries, ks.transpose(1, 2).to(dtype)).to(acc).mul_(spec.scale);
  if (spec.softcap > 0) scores = scores.div_(spec.softcap).tanh_().mul_(spec.softcap);
  return at::bmm(at::softmax(scores, -1, acc).to(v.scalar_type()), vs).view({heads * dim});
}

// f32 on the CPU, by kernels/cpu/attention.h: each segment and key/value head by itself, the scores of 32 queries at a time.
struct CpuAttentionLoops {
  static Attended forward(const Tensor& q, const Tensor& k, const Tensor& v, const Segments& segments,
                          const AttentionSpec& spec) {
    const int64_t n = q.size(0), heads = q.size(1), dim = q.size(2);
    Tensor out = at::empty({n, heads * dim}, q.options()), lse = at::empty({heads, n}, q.options());
    each(q, k, v, lse, segments.cu_seqlens(), spec,
         [&](const CpuKernels& kernels, const CpuAttention& part, int64_t start, int64_t head, float* scratch) {
           kernels.attention_forward(part, out.mutable_data_ptr<float>() + (start * heads + head * part.group) * dim,
                                     heads * dim, scratch);
         });
    return {out, lse};
  }

  static void backward(const Tensor& d_out, const Tensor& q, const Tensor& k, const Tensor& v, const Attended& attended,
                       const Segments& segments, const AttentionSpec& spec, const Tensor& dq, const Tensor& dk,
                       const Tensor& dv) {
    const int64_t heads = q.size(1), dim = q.size(2);
    const int64_t dq_stride = dq.stride(0), dk_stride = dk.stride(0), dv_stride = dv.stride(0);
    dk.zero_();
    dv.zero_();
    each(q, k, v, attended.lse, segments.cu_seqlens(), spec,
         [&](const CpuKernels& kernels, const CpuAttention& part, int64_t start, int64_t head, float* scratch) {
           const int64_t at = (start * heads + head * part.group) * dim;
           kernels.attention_backward(part, attended.out.const_data_ptr<float>() + at, d_out.const_data_ptr<float>() + at,
                                      heads * dim, dq.mutable_data_ptr<float>() + start * dq_stride + head * part.group * dim,
                                      dq_stride, dk.mutable_data_ptr<float>() + start * dk_stride + head * dim, dk_stride,
                                      dv.mutable_data_ptr<float>() + start * dv_stride + head * dim, dv_stride, scratch);
         });
  }

 private:
  // Calls body for each segment and key/value head. Heads are the outer order: threads then share all lengths alike.
  template <typename Body>
  static void each(const Tensor& given_q, const Tensor& given_k, const Tensor& given_v, const Tensor& lse,
                   const std::vector<int32_t>& cu_seqlens, const AttentionSpec& spec, const Body& body) {
    const CpuKernels& kernels = *cpu_kernels_for(given_q);
    const TokenRows q_rows(given_q), k_rows(given_k), v_rows(given_v);
    const Tensor &q = q_rows.x, &k = k_rows.x, &v = v_rows.x;
    const int64_t q_stride = q_rows.stride, k_stride = k_rows.stride, v_stride = v_rows.stride;
    const int64_t n = q.size(0), heads = q.size(1), kv_heads = k.size(1), dim = q.size(2), group = heads / kv_heads;
    const int64_t segments = static_cast<int64_t>(cu_seqlens.size()) - 1;
    cpu_rows(kv_heads * segments, 2 * n * n / (segments * segments) * group * dim, [&](int64_t begin, int64_t end) {
      std::vector<float> scratch;
      for (int64_t task = begin; task < end; ++task) {
        const int64_t head = task / segments, start = cu_seqlens[task % segments];
        const int64_t length = cu_seqlens[task % segments + 1] - start;
        scratch.resize(std::max<size_t>(scratch.size(), cpu_attention_scratch(length, dim)));
        const CpuAttention part{q.const_data_ptr<float>() + start * q_stride + head * group * dim,
                                k.const_data_ptr<float>() + start * k_stride + head * dim,
                                v.const_data_ptr<float>() + start * v_stride + head * dim,
                                q_stride,
                                k_stride,
                                v_stride,
                                length,
                                dim,
                                group,
                                static_cast<float>(spec.scale),
                                static_cast<float>(spec.softcap),
                                spec.window > 0 ? spec.window : length,
                                lse.mutable_data_ptr<float>() + head * group * n + start,
                                n};
        body(kernels, part, start, head, scratch.data());
      }
    });
  }
};

// [N, H, D] -> [1, H, N, D]
Tensor heads_first(const Tensor& x) { return x.transpose(0, 1).unsqueeze(0); }

bool by_cpu_loops(const Tensor& q, const Tensor& k, const Tensor& v) {
  return cpu_kernels_for(q) != nullptr && cpu_kernels_for(k) != nullptr && cpu_kernels_for(v) != nullptr;
}

// By ATen's ops, which record themselves where autograd is on.
Tensor attention_by_aten(const Tensor& q, const Tensor& k, const Tensor& v, const Segments& segments,
                         const AttentionSpec& spec) {
  const int64_t n = q.size(0), heads = q.size(1), dim = q.size(2), longest = segments.longest();
  if (segments.equal()) {
    const auto batched = [&](const Tensor& x) {
      return x.view({segments.count(), longest, x.size(1), dim}).transpose(1, 2);
    };
    return attend(batched(q), batched(k), batched(v), spec).transpose(1, 2).reshape({n, heads * dim});
  }
  // split_with_sizes and not narrow: its backward is one concatenation.
  const std::vector<int64_t> lengths = segments.lengths();
  const auto qs = q.split_with_sizes(lengths), ks = k.split_with_sizes(lengths), vs = v.split_with_sizes(lengths);
  TensorList rows;
  for (size_t s = 0; s < lengths.size(); ++s) {
    const Tensor y = attend(heads_first(qs[s]), heads_first(ks[s]), heads_first(vs[s]), spec);
    rows.push_back(y.squeeze(0).transpose(0, 1).reshape({lengths[s], heads * dim}));
  }
  return at::cat(rows, 0);
}

bool by_aten(const Tensor& q) { return !q.is_cuda() && q.scalar_type() != at::kDouble; }

// All rows of all samples.
Attended forward_of_samples(const Tensor& q, const Tensor& k, const Tensor& v, const Segments& segments,
                            const AttentionSpec& spec) {
  if (by_cpu_loops(q, k, v)) return CpuAttentionLoops::forward(q, k, v, segments, spec);
  if (by_aten(q)) return {attention_by_aten(q, k, v, segments, spec), Tensor()};
  return attention_fused(q, k, v, segments, spec);
}

void backward_of_samples(const Tensor& d_out, const Tensor& q, const Tensor& k, const Tensor& v, const Attended& attended,
                         const Segments& segments, const AttentionSpec& spec, const Tensor& dq, const Tensor& dk,
                         const Tensor& dv) {
  if (by_cpu_loops(q, k, v)) {
    return CpuAttentionLoops::backward(d_out.contiguous(), q, k, v, attended, segments, spec, dq, dk, dv);
  }
  if (!by_aten(q)) return attention_fused_backward(d_out, q, k, v, attended, segments, spec, dq, dk, dv);
  const at::AutoGradMode recording(true);
  const auto fresh = [](const Tensor& x) { return x.detach().set_requires_grad(true); };
  const variable_list inputs{fresh(q), fresh(k), fresh(v)};
  const Tensor out = attention_by_aten(inputs[0], inputs[1], inputs[2], segments, spec);
  const variable_list found = torch::autograd::grad({out}, inputs, {d_out});
  const at::NoGradGuard writing;
  dq.copy_(found[0]);
  dk.copy_(found[1]);
  dv.copy_(found[2]);
}

}  // namespace

// Rows that samples share are copied for each, so that every kernel serves; the queries of the copies are thrown away. That repeats
// the attention of what is shared, in 2 T^2 H D operations, and nothing else of a layer; a kernel that reads shared keys in place
// would spare the copies as well.
Attended attention_forward(const Tensor& q, const Tensor& k, const Tensor& v, const Segments& segments,
                           const AttentionSpec& spec) {
  TORCH_CHECK(segments.batch_rows() == q.size(0), "attention: cu_seqlens must run from 0 to the ", q.size(0), " rows of q");
  if (!segments.shares()) return forward_of_samples(q, k, v, segments, spec);
  const auto all = [&](const Tensor& x) { return x.index_select(0, segments.places()); };
  const Attended attended = forward_of_samples(all(q), all(k), all(v), segments, spec);
  return {attended.out.index_select(0, segments.firsts()), attended.lse};
}

void attention_backward(const Tensor& d_out, const Tensor& q, const Tensor& k, const Tensor& v, const Attended& attended,
                        const Segments& segments, const AttentionSpec& spec, const Tensor& dq, const Tensor& dk,
                        const Tensor& dv) {
  if (!segments.shares()) return backward_of_samples(d_out, q, k, v, attended, segments, spec, dq, dk, dv);
  const auto all = [&](const Tensor& x) { return x.index_select(0, segments.places()); };
  const Tensor qs = all(q), ks = all(k), vs = all(v), outs = all(attended.out);
  const Tensor dqs = at::empty_like(qs), dks = at::empty_like(ks), dvs = at::empty_like(vs);
  // Nothing comes back to the queries of copies, so nothing goes on from them to q, k or v.
  const Tensor d_outs = at::zeros_like(outs).index_copy_(0, segments.firsts(), d_out);
  backward_of_samples(d_outs, qs, ks, vs, {outs, attended.lse}, segments, spec, dqs, dks, dvs);
  dq.copy_(dqs.index_select(0, segments.firsts()));
  const auto accumulated = q.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  const auto sum = [&](const Tensor& to, const Tensor& parts) {
    const Tensor total = at::zeros(to.sizes(), to.options().dtype(accumulated));
    to.copy_(total.index_add_(0, segments.places(), parts.to(accumulated)));
  };
  sum(dk, dks);
  sum(dv, dvs);
}

namespace {

struct AttentionNode : Function<AttentionNode> {
  using Where = std::pair<std::shared_ptr<Segments>, AttentionSpec>;

  static Tensor forward(AutogradContext* ctx, const Tensor& q, const Tensor& k, const Tensor& v,
                        const std::shared_ptr<Segments>& segments, const AttentionSpec& spec) {
    const Attended attended = attention_forward(q, k, v, *segments, spec);
    ctx->save_for_backward({q, k, v, attended.out, attended.lse});
    ctx->saved_data["where"] = hold(Where(segments, spec));
    return attended.out;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const variable_list saved = ctx->get_saved_variables();
    const auto [segments, spec] = held<Where>(ctx->saved_data["where"]);
    variable_list result(5);
    for (int i = 0; i < 3; ++i) result[i] = at::empty(saved[i].sizes(), saved[i].options());
    attention_backward(grads[0], saved[0], saved[1], saved[2], {saved[3], saved[4]}, *segments, spec, result[0], result[1],
                       result[2]);
    return result;
  }
};

}  // namespace

Tensor attention(const Tensor& q, const Tensor& k, const Tensor& v, const std::shared_ptr<Segments>& segments,
                 const AttentionSpec& spec) {
  return AttentionNode::apply(q, k, v, segments, spec);
}

Tensor attention_of_prompts(const Tensor& q, const Tensor& k, const Tensor& v, const Segments& segments,
                            const AttentionSpec& spec) {
  if (by_aten(q)) return attention_by_aten(q, k, v, segments, spec);
  return attention_fused_of_any_length(q, k, v, segments, spec).out;
}

Tensor attention_behind(const Tensor& q, const Tensor& k, const Tensor& v, const KeyedRows& keyed, const AttentionSpec& spec) {
  if (const Tensor out = flash_behind(q, k, v, keyed, spec); out.defined()) return out;
  const int64_t width = q.size(1) * q.size(2);
  const Tensor out = at::empty({q.size(0), width}, q.options());
  int64_t row = 0, key = 0;
  for (size_t i = 0; i < keyed.rows.size(); ++i) {
    const int64_t rows = keyed.rows[i], keys = keyed.keys[i];
    const Tensor own_q = q.narrow(0, row, rows), own_k = k.narrow(0, key, keys), own_v = v.narrow(0, key, keys);
    if (rows == 1) {
      out[row].copy_(attend_one(own_q, own_k, own_v, spec));
    } else {
      const Tensor y = attend(heads_first(own_q), heads_first(own_k), heads_first(own_v), spec);
      out.narrow(0, row, rows).copy_(y.squeeze(0).transpose(0, 1).reshape({rows, width}));
    }
    row += rows;
    key += keys;
  }
  return out;
}

std::unique_ptr<Tensor> op_attention(const Tensor& q, const Tensor& k, const Tensor& v,
                                     std::shared_ptr<Segments> segments, double scale, double softcap,
                                     std::int64_t window) {
  return std::make_unique<Tensor>(attention(q, k, v, segments, AttentionSpec{scale, softcap, window}));
}

}  // namespace ferrotune
