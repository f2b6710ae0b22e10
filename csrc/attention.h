// Causal self-attention over flat batches; over cached keys and values: pages.h.
#pragma once

#include "ferrotune/csrc/segments.h"

namespace ferrotune {

struct AttentionSpec {
  double scale;    // of q k^T
  double softcap;  // c tanh(s / c) on the scores; 0 for none
  int64_t window;  // a query sees the last `window` keys, itself included; 0 for all
};

struct Attended {
  Tensor out;  // [N, H*D]
  Tensor lse;  // log sum exp of the scores, in the shape of the path that made it; undefined where that keeps none
};

// q [N, H, D], k and v [N, K, D] -> [N, H*D]. A row attends to the rows of its own segment up to itself. No [N, N] mask is
// built. Takes part in autograd.
Tensor attention(const Tensor& q, const Tensor& k, const Tensor& v, const std::shared_ptr<Segments>& segments,
                 const AttentionSpec& spec);

// The same without autograd.
Attended attention_forward(const Tensor& q, const Tensor& k, const Tensor& v, const Segments& segments,
                           const AttentionSpec& spec);

// Writes dq, dk and dv, whose token strides are free.
void attention_backward(const Tensor& d_out, const Tensor& q, const Tensor& k, const Tensor& v, const Attended& attended,
                        const Segments& segments, const AttentionSpec& spec, const Tensor& dq, const Tensor& dk,
                        const Tensor& dv);

// ---- attention_formula.cpp and attention_fused.cpp: the same, by the formula and by a kernel of the GPU
Attended attention_formula(const Tensor& q, const Tensor& k, const Tensor& v, const Segments& segments,
                           const AttentionSpec& spec);
void attention_formula_backward(const Tensor& d_out, const Tensor& q, const Tensor& k, const Tensor& v,
                                const Attended& attended, const Segments& segments, const AttentionSpec& spec,
                                const Tensor& dq, const Tensor& dk, const Tensor& dv);
Attended attention_fused(const Tensor& q, const Tensor& k, const Tensor& v, const Segments& segments,
                         const AttentionSpec& spec);
void attention_fused_backward(const Tensor& d_out, const Tensor& q, const Tensor& k, const Tensor& v,
                              const Attended& attended, const Segments& segments, const AttentionSpec& spec,
                              const Tensor& dq, const Tensor& dk, const Tensor& dv);

// Without a backward, for one sequence from its start, on a GPU: [T, H*D].
Tensor attention_prompt(const Tensor& q, const Tensor& k, const Tensor& v, const AttentionSpec& spec);

// Without a backward, the last queries of one sequence over its keys: q [T, H, D], k and v [K, S, D], query i at position
// S - T + i -> [T, H*D].
Tensor attend_behind(const Tensor& q, const Tensor& k, const Tensor& v, const AttentionSpec& spec);

}  // namespace ferrotune
