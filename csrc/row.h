// One row of f32 on the CPU: what decoding works on, token after token. ATen spends 1 to 3 us on a call, some 40 calls a
// layer; on a small model that is nearly all of the time. These go straight to kernels/cpu, with threads only where there is
// work for them.
#pragma once

#include "ferrotune/csrc/attention.h"
#include "ferrotune/csrc/linear.h"

namespace ferrotune {

// Whether x [1, ..] is one contiguous row of f32 on the CPU, kernels/cpu runs on this one, and no gradient is asked for.
bool is_row(const Tensor& x);
// Whether a kernel can read `other` beside the row: contiguous f32 on the CPU.
bool fits_row(const Tensor& other);

// As rms_norm; x [1, C] or [1, H, D].
Tensor row_rms_norm(const Tensor& x, const Tensor& weight, double eps, double offset);
// As rope; x [1, H, D], cos and sin f32.
Tensor row_rope(const Tensor& x, const Tensor& cos, const Tensor& sin);
// As swiglu; gate_up [1, 2F].
Tensor row_swiglu(const Tensor& gate_up, Activation activation);
// Whether row_linear can: the weights fit the row, nothing is dropped.
bool row_fits_linear(const Tensor& x, const Linear& linear);
// As linear; x [1, in].
Tensor row_linear(const Tensor& x, const Linear& linear);
// Whether row_attention can: one query, and a cache of its own heads with room for it.
bool row_fits_cache(const Tensor& q, const Tensor& k, const Tensor& v, const KvView& cache);
// As attention_cached, for one query: q [1, H, D], k and v [1, K, D].
Tensor row_attention(const Tensor& q, const Tensor& k, const Tensor& v, const KvView& cache, const AttentionSpec& spec);

}  // namespace ferrotune
