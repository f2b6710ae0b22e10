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

Attended attention_fused_of_any_length(const Tensor& q, const Tensor& k, const Tensor& v, const Segments& segments,
                                       const AttentionSpec& spec);

// Without a backward, of prompts: as attention_forward, by what does not prepare anything for each new length. [N, H*D]
Tensor attention_of_prompts(const Tensor& q, const Tensor& k, const Tensor& v, const Segments& segments, const AttentionSpec& spec);

// The last queries of several sequences and all their keys, both one sequence after another.
struct KeyedRows {
  std::vector<int64_t> rows, keys;  // of each sequence: T and S
  Tensor cu_rows, cu_keys;          // where they start and the last one ends: int32 [sequences + 1], on the device
  int64_t longest_rows = 0, longest_keys = 0;
};

// Without a backward: q [sum of T, H, D], k and v [sum of S, K, D]; query i of a sequence stands at position S - T + i of it and
// sees the keys up to there -> [sum of T, H*D].
Tensor attention_behind(const Tensor& q, const Tensor& k, const Tensor& v, const KeyedRows& keyed, const AttentionSpec& spec);
// The same by one call of FlashAttention-2; undefined where that cannot.
Tensor flash_behind(const Tensor& q, const Tensor& k, const Tensor& v, const KeyedRows& keyed, const AttentionSpec& spec);

}  // namespace ferrotune
