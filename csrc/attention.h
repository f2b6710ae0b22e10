// Causal self-attention over flat batches and over a KV cache.
#pragma once

#include "ferrotune/csrc/ops.h"

namespace ferrotune {

struct AttentionSpec {
  double scale;    // of q k^T
  double softcap;  // c tanh(s / c) on the scores; 0 for none
  int64_t window;  // a query sees the last `window` keys, itself included; 0 for all
};

// q [N, H, D], k and v [N, K, D] -> [N, H*D]. Row i of segment s attends to rows cu_seqlens[s]..=i.
// cu_seqlens starts at 0 and ends at N. No [N, N] mask is built.
Tensor attention(const Tensor& q, const Tensor& k, const Tensor& v, const std::vector<int32_t>& cu_seqlens,
                 const AttentionSpec& spec);

// q [T, H, D] against k and v [K, S, D]: the queries are the last T of S positions. -> [T, H*D]
Tensor attention_cached(const Tensor& q, const Tensor& k, const Tensor& v, const AttentionSpec& spec);

}  // namespace ferrotune
