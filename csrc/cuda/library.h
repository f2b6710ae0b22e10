// The functions of this folder, declared once for the table in library.cpp.
#pragma once

#include "cuda_library.h"

namespace ferrotune {

// ---- graph.cpp
std::unique_ptr<CudaGraph> graph();

// ---- host_stash.cpp
std::shared_ptr<Stashed> stash(const at::Tensor& x);

// ---- cudnn_attention.cpp
void packed_attention_forward(const PackedShape& shape, const PackedRows& q, const PackedRows& k, const PackedRows& v,
                              const PackedRows& out, const PackedRows& lse);
void packed_attention_backward(const PackedShape& shape, const PackedRows& dout, const PackedRows& q,
                               const PackedRows& k, const PackedRows& v, const PackedRows& out, const PackedRows& lse,
                               const PackedRows& dq, const PackedRows& dk, const PackedRows& dv);

}  // namespace ferrotune
