// Attention by its formula, in any dtype on any device: what the kernels are held to, and the way for what they lack.
//   s = scale q k^T,  z = c tanh(s / c) or s,  p = softmax(z),  out = p v,  lse = logsumexp(z)
// and with delta = sum over D of dout out:
//   p = e^(z - lse)   dv = p^T dout   ds = p (dout v^T - delta) (1 - (z / c)^2)   dq = scale ds k   dk = scale ds^T q
// Queries go in chunks against just the keys they see, so memory is O(chunk * keys) and no [T, T] tensor exists. The heads
// of a group are the rows of one product with their key/value head, and no head is repeated.
#include "ferrotune/csrc/attention.h"

namespace ferrotune {

namespace {

constexpr int64_t kFormulaQueries = 256;

// `count` queries from row `first` of all heads, and the keys [low, first + count) of their segment.
struct QueryChunk {
  int64_t first, count, low, keys, group;
  Tensor hidden;  // [count, keys], true where a query must not see a key

  // [rows, H, D] -> [K, g * count, D]
  Tensor queries(const Tensor& x, int64_t kv_heads) const {
    return x.narrow(0, first, count)
        .unflatten(1, {kv_heads, group})
        .permute({1, 2, 0, 3})
        .reshape({kv_heads, group * count, x.size(2)});
  }
  // The inverse, into the rows of y [rows, H, D].
  void put(const Tensor& x, const Tensor& y) const {
    y.narrow(0, first, count).copy_(x.unflatten(1, {group, count}).permute({2, 0, 1, 3}).flatten(1, 2));
  }
  // [rows, K, D] -> [K, keys, D]
  Tensor seen(const Tensor& x) const { return x.narrow(0, low, keys).transpose(0, 1); }
  // lse [H, rows] -> [K, g * count, 1]
  Tensor statistics(const Tensor& lse, int64_t kv_heads) const {
    return lse.narrow(1, first, count).reshape({kv_heads, group * count, 1});
  }
};

void for_chunks(const Tensor& q, const Tensor& k, const Segments& segments, const AttentionSpec& spec,
                const std::function<void(const QueryChunk&)>& work) {
  const auto options = at::TensorOptions().dtype(at::kLong).device(q.device());
  for (int64_t s = 0; s < segments.count(); ++s) {
    const int64_t start = segments.cu_seqlens()[s], end = segments.cu_seqlens()[s + 1];
    for (int64_t first = start; first < end; first += kFormulaQueries) {
      const int64_t count = std::min(kFormulaQueries, end - first);
      const int64_t low = spec.window > 0 ? std::max(start, first - spec.window + 1) : start;
      const int64_t keys = first + count - low;
      const Tensor distance = at::arange(first, first + count, options).unsqueeze(1) -
                              at::arange(low, low + keys, options).unsqueeze(0);
      Tensor hidden = distance.lt(0);
      if (spec.window > 0) hidden.logical_or_(distance.ge(spec.window));
      work(QueryChunk{first, count, low, keys, q.size(1) / k.size(1), hidden});
    }
  }
}

at::ScalarType sum_type(const Tensor& x) { return x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat; }

// z [K, g * count, keys] in f32 or f64, -inf where hidden. `capped` is what the slope of the cap needs: z before the mask.
Tensor scores(const QueryChunk& chunk, const Tensor& q, const Tensor& k, const AttentionSpec& spec, Tensor* capped) {
  Tensor z = at::bmm(chunk.queries(q, k.size(1)), chunk.seen(k).transpose(1, 2)).to(sum_type(q)).mul_(spec.scale);
  if (spec.softcap > 0) z.div_(spec.softcap).tanh_().mul_(spec.softcap);
  if (capped) *capped = z.clone();
  z.unflatten(1, {chunk.group, chunk.count}).masked_fill_(chunk.hidden, -std::numeric_limits<double>::infinity());
  return z;
}

}  // namespace

Attended attention_formula(const Tensor& q, const Tensor& k, const Tensor& v, const Segments& segments,
                           const AttentionSpec& spec) {
  Tensor out = at::empty(q.sizes(), q.options()), lse = at::empty({q.size(1), q.size(0)}, q.options().dtype(sum_type(q)));
  for_chunks(q, k, segments, spec, [&](const QueryChunk& chunk) {
    const Tensor z = scores(chunk, q, k, spec, nullptr);
    const Tensor sums = at::logsumexp(z, {2}, true);
    const Tensor p = at::exp(z - sums);
    chunk.put(at::bmm(p.to(v.scalar_type()), chunk.seen(v)), out);
    lse.narrow(1, chunk.first, chunk.count).copy_(sums.view({q.size(1), chunk.count}));
  });
  return {out.flatten(1, 2), lse};
}

void attention_formula_backward(const Tensor& d_out, const Tensor& q, const Tensor& k, const Tensor& v,
                                const Attended& attended, const Segments& segments, const AttentionSpec& spec,
                                const Tensor& dq, const Tensor& dk, const Tensor& dv) {
  const auto acc = sum_type(q);
  const Tensor dout = d_out.view(q.sizes()), out = attended.out.view(q.sizes());
  const int64_t kv_heads = k.size(1);
  const Tensor delta = at::sum(dout.to(acc) * out.to(acc), {2}).transpose(0, 1);  // [H, N]
  const Tensor dk_sum = at::zeros(k.sizes(), k.options().dtype(acc));
  const Tensor dv_sum = at::zeros(v.sizes(), v.options().dtype(acc));
  for_chunks(q, k, segments, spec, [&](const QueryChunk& chunk) {
    Tensor capped;
    const Tensor z = scores(chunk, q, k, spec, spec.softcap > 0 ? &capped : nullptr);
    const Tensor p = at::exp(z - chunk.statistics(attended.lse, kv_heads));
    const Tensor dy = chunk.queries(dout, kv_heads), queries = chunk.queries(q, kv_heads);
    const Tensor dp = at::bmm(dy, chunk.seen(v).transpose(1, 2)).to(acc);
    Tensor ds = dp.sub_(chunk.statistics(delta, kv_heads)).mul_(p);
    if (capped.defined()) ds.mul_(capped.div_(spec.softcap).square_().neg_().add_(1));
    ds = ds.mul_(spec.scale).to(q.scalar_type());
    chunk.put(at::bmm(ds, chunk.seen(k)), dq);
    dk_sum.narrow(0, chunk.low, chunk.keys).add_(at::bmm(ds.transpose(1, 2), queries).transpose(0, 1));
    dv_sum.narrow(0, chunk.low, chunk.keys).add_(at::bmm(p.to(v.scalar_type()).transpose(1, 2), dy).transpose(0, 1));
  });
  dk.copy_(dk_sum);
  dv.copy_(dv_sum);
}

}  // namespace ferrotune
