// What only libtorch_cuda offers, as one struct of function pointers. libferrotune_cuda.so is built apart and loaded after
// libtorch_cuda.so, because the executable links to libtorch_cpu alone; csrc calls it through this table.
// No CUDA header here: csrc includes it too.
#pragma once

#include <ATen/ATen.h>

#include <memory>

// Raised with every change of this file; csrc refuses a library of another number.
#define FERROTUNE_CUDA_ABI 7

namespace ferrotune {

// Work of one stream, recorded once and launched as a whole. All graphs of a process share one memory pool: what a graph
// writes stays valid until a tensor in it is dropped, so keep every tensor that is read after a replay.
class CudaGraph {
 public:
  virtual ~CudaGraph() = default;
  // What is enqueued on the calling thread's current stream from now on is recorded and does not run. The backward of
  // autograd, which runs on threads of its own, is recorded too.
  virtual void begin() = 0;
  virtual void end() = 0;
  // Enqueues the recorded work on the calling thread's current stream.
  virtual void replay() = 0;
};

// A tensor that lies in pinned host memory until it is fetched. Dropped, it gives its place there back.
class Stashed {
 public:
  virtual ~Stashed() = default;
  // The tensor on its device again, once; `ahead` of those that were stashed before it are on their way from then on.
  virtual at::Tensor fetch(int ahead) = 0;
};

// Rows of a batch, x [N, heads, D] or [N, heads], and where each segment starts if their lengths differ: offsets
// [segments + 1] int64, in elements from x's first.
struct AttentionRows {
  at::Tensor x, offsets;
};

// What the operands of a batch share. A graph is built for each value of segments, longest and tokens, so those of packed
// batches are rounded up: a segment may be empty, and no buffer of `tokens` rows is needed.
struct AttentionShape {
  int64_t segments;
  at::Tensor lengths;  // [segments] int32; undefined: each is `longest`, and no offsets are read
  int64_t longest;     // at least any of lengths
  int64_t tokens;      // at least their sum; or 0: the backward's workspace then pads every segment to the longest
  double scale;        // of q k^T
};

// Enqueues a kernel that sets bytes to zero, a multiple of 4. 0, or a cudaError_t.
using ClearMemory = int (*)(void* to, int64_t bytes, void* stream);

struct CudaLibrary {
  // A graph that holds nothing yet. Small memsets in it become launches of `clear`, if there is one.
  std::unique_ptr<CudaGraph> (*graph)(ClearMemory clear);
  // Starts the copy of a contiguous x to the host, beside the calling thread's current stream; x must not be written. Fetched
  // last in, first out, copies hide behind the work between; one stream for stashing and fetching.
  std::shared_ptr<Stashed> (*stash)(const at::Tensor& x);
  // The most that libtorch's allocator takes of the GPU from now on: more is an out-of-memory error. What is above that in its
  // cache is returned.
  void (*limit_memory)(int device, uint64_t bytes);
  // The most that stashed tensors take of the host from now on, in pinned buffers that serve batches of up to `rows` rows.
  void (*limit_stash)(int device, uint64_t bytes, int64_t rows);
  // Causal attention inside each segment by cuDNN, sm_90 or newer, 16-bit: q [N, H, D], k and v [N, K, D] -> out
  // [N, H, D] and its log-sum-exp lse [N, H] f32, in memory [segments, H, longest] without lengths; both written.
  void (*cudnn_attention_forward)(const AttentionShape& shape, const AttentionRows& q, const AttentionRows& k,
                                   const AttentionRows& v, const AttentionRows& out, const AttentionRows& lse);
  // dq, dk and dv are written; where tokens is not 0, the token strides of dq and dk must be those of q and k.
  void (*cudnn_attention_backward)(const AttentionShape& shape, const AttentionRows& dout, const AttentionRows& q,
                                    const AttentionRows& k, const AttentionRows& v, const AttentionRows& out,
                                    const AttentionRows& lse, const AttentionRows& dq, const AttentionRows& dk,
                                    const AttentionRows& dv);
};

}  // namespace ferrotune

// The library exports these and nothing else.
#pragma GCC visibility push(default)
extern "C" {
int ferrotune_cuda_abi(void);
const ferrotune::CudaLibrary* ferrotune_cuda_library(void);
}
#pragma GCC visibility pop
