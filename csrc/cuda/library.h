// The functions of this folder, declared once for the table in library.cpp.
#pragma once

#include <driver_types.h>

#include "cuda_library.h"

namespace ferrotune {

// ---- graph.cpp
std::unique_ptr<CudaGraph> graph(ClearMemory clear);

// ---- graph_memsets.cpp
// Before the graph is instantiated.
void memsets_to_kernels(cudaGraph_t graph, ClearMemory clear);

// ---- host_stash.cpp
std::shared_ptr<Stashed> stash(const at::Tensor& x);

void limit_stash(int device, uint64_t bytes, int64_t rows);

// ---- limit.cpp
void limit_memory(int device, uint64_t bytes);

// ---- cudnn_attention.cpp
void cudnn_attention_forward(const AttentionShape& shape, const AttentionRows& q, const AttentionRows& k, const AttentionRows& v,
                              const AttentionRows& out, const AttentionRows& lse);
void cudnn_attention_backward(const AttentionShape& shape, const AttentionRows& dout, const AttentionRows& q,
                               const AttentionRows& k, const AttentionRows& v, const AttentionRows& out, const AttentionRows& lse,
                               const AttentionRows& dq, const AttentionRows& dk, const AttentionRows& dv);

}  // namespace ferrotune
