// Causal attention of one head group over one segment, by blocks of one panel of queries. The lanes of a vector are
// queries: scores lie transposed, [keys, queries], so that softmax needs no sums across lanes, a head_dim of 8 fills the
// vectors as well as one of 128, and both products are the register tiles of gemm.h.
//   forward:  S^T = scale K Q^T,  P^T = exp(S^T - lse),  O^T = V^T P^T
//   backward: dP^T = V dO^T,  dS^T = P^T (dP^T - delta) with delta = sum_d dO O,
//             dQ^T = scale K^T dS^T,  dK += scale dS^T Q,  dV += P^T dO
// A softcap c turns S into c tanh(S / c) before the softmax, and dS gets the factor 1 - (S / c)^2.
#pragma once

#include "gemm.h"

namespace ferrotune {
namespace {

// The keys that some query of the block sees are low..high.
struct Block {
  int64_t first, queries, low, high;
};

inline Block block_at(const CpuAttention& a, int64_t first) {
  const int64_t left = a.length - first, queries = left < kPanel ? left : kPanel;
  const int64_t low = first - a.window + 1;
  return {first, queries, low > 0 ? low : 0, first + queries};
}

// Scores of a block, [keys, kPanel]: capped, and -inf where a query does not see a key. The lanes past the last query
// hold the scores of a query of zeros that sees every key.
inline void scores(const CpuAttention& a, const Block& block, const float* q, float* q_t, float* s) {
  const int64_t keys = block.high - block.low;
  pack_transposed(a.dim, block.queries, q + block.first * a.q_stride, a.q_stride, q_t);
  panel(keys, kPanel, a.dim, a.scale, CpuMatrix{a.k + block.low * a.k_stride, a.k_stride, 1}, q_t, kPanel, s, kPanel, false);
  if (a.softcap > 0) {
    for (int64_t i = 0; i < keys * kPanel; i += kLanes) store(s + i, tanh(load(s + i) * (1 / a.softcap)) * a.softcap);
  }
  for (int64_t j = block.low; j < block.high; ++j) {
    float* row = s + (j - block.low) * kPanel;
    for (int64_t t = 0; t < j - block.first; ++t) row[t] = -INFINITY;
    const int64_t blind = j + a.window - block.first;
    for (int64_t t = blind > 0 ? blind : 0; t < block.queries; ++t) row[t] = -INFINITY;
  }
}

inline void attention_forward(const CpuAttention& a, float* o, int64_t o_stride, float* scratch) {
  float *q_t = scratch, *o_t = q_t + a.dim * kPanel, *s = o_t + a.dim * kPanel;
  for (int64_t h = 0; h < a.group; ++h) {
    for (int64_t first = 0; first < a.length; first += kPanel) {
      const Block block = block_at(a, first);
      const int64_t keys = block.high - block.low;
      scores(a, block, a.q + h * a.dim, q_t, s);
      V top[2] = {spread(-INFINITY), spread(-INFINITY)}, total[2] = {};
      for (int64_t i = 0; i < keys * kPanel; i += kPanel) {
        top[0] = max(top[0], load(s + i));
        top[1] = max(top[1], load(s + i + kLanes));
      }
      for (int64_t i = 0; i < keys * kPanel; i += kPanel) {
        const V e0 = exp(load(s + i) - top[0]), e1 = exp(load(s + i + kLanes) - top[1]);
        store(s + i, e0);
        store(s + i + kLanes, e1);
        total[0] += e0;
        total[1] += e1;
      }
      panel(a.dim, kPanel, keys, 1, CpuMatrix{a.v + block.low * a.v_stride, 1, a.v_stride}, s, kPanel, o_t, kPanel, false);
      for (int64_t d = 0; d < a.dim; ++d) {
        store(o_t + d * kPanel, load(o_t + d * kPanel) / total[0]);
        store(o_t + d * kPanel + kLanes, load(o_t + d * kPanel + kLanes) / total[1]);
      }
      transpose(a.dim, block.queries, o_t, kPanel, o + first * o_stride + h * a.dim, o_stride);
      for (int64_t t = 0; t < block.queries; ++t) {
        a.lse[h * a.lse_stride + first + t] = top[t / kLanes][t % kLanes] + logf(total[t / kLanes][t % kLanes]);
      }
    }
  }
}

inline void attention_backward(const CpuAttention& a, const float* o, const float* d_o, int64_t o_stride, float* dq,
                               int64_t dq_stride, float* dk, int64_t dk_stride, float* dv, int64_t dv_stride,
                               float* scratch) {
  const int64_t size = a.length * kPanel;
  float *q_t = scratch, *do_t = q_t + a.dim * kPanel, *dq_t = do_t + a.dim * kPanel, *p = dq_t + a.dim * kPanel;
  float* ds = p + size;
  for (int64_t h = 0; h < a.group; ++h) {
    const float *qh = a.q + h * a.dim, *oh = o + h * a.dim, *doh = d_o + h * a.dim;
    for (int64_t first = 0; first < a.length; first += kPanel) {
      const Block block = block_at(a, first);
      const int64_t keys = block.high - block.low;
      scores(a, block, qh, q_t, p);
      pack_transposed(a.dim, block.queries, doh + first * o_stride, o_stride, do_t);
      panel(keys, kPanel, a.dim, 1, CpuMatrix{a.v + block.low * a.v_stride, a.v_stride, 1}, do_t, kPanel, ds, kPanel, false);
      float lse[kPanel] = {}, delta[kPanel] = {};
      for (int64_t t = 0; t < block.queries; ++t) {
        const float *x = oh + (first + t) * o_stride, *y = doh + (first + t) * o_stride;
        for (int64_t d = 0; d < a.dim; ++d) delta[t] += x[d] * y[d];
        lse[t] = a.lse[h * a.lse_stride + first + t];
      }
      for (int64_t i = 0; i < keys * kPanel; i += kPanel) {
        for (int64_t v = 0; v < kPanel; v += kLanes) {
          const V s = load(p + i + v), probability = exp(s - load(lse + v));
          V d = probability * (load(ds + i + v) - load(delta + v));
          if (a.softcap > 0) {
            const V share = max(s, spread(-a.softcap)) * (1 / a.softcap);
            d *= 1.0f - share * share;
          }
          store(p + i + v, probability);
          store(ds + i + v, d);
        }
      }
      panel(a.dim, kPanel, keys, a.scale, CpuMatrix{a.k + block.low * a.k_stride, 1, a.k_stride}, ds, kPanel, dq_t, kPanel,
            false);
      transpose(a.dim, block.queries, dq_t, kPanel, dq + first * dq_stride + h * a.dim, dq_stride);
      gemm(keys, a.dim, block.queries, a.scale, CpuMatrix{ds, kPanel, 1},
           CpuMatrix{qh + first * a.q_stride, a.q_stride, 1}, dk + block.low * dk_stride, dk_stride, true);
      gemm(keys, a.dim, block.queries, 1, CpuMatrix{p, kPanel, 1}, CpuMatrix{doh + first * o_stride, o_stride, 1},
           dv + block.low * dv_stride, dv_stride, true);
    }
  }
}

}  // namespace
}  // namespace ferrotune
