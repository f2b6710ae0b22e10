// What only libtorch_cuda offers, as one struct of function pointers. libferrotune_cuda.so is built apart and loaded after
// libtorch_cuda.so, because the executable links to libtorch_cpu alone; csrc calls it through this table.
// No CUDA header here: csrc includes it too.
#pragma once

#include <ATen/ATen.h>

#include <memory>

// Raised with every change of this file; csrc refuses a library of another number.
#define FERROTUNE_CUDA_ABI 1

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

struct CudaLibrary {
  // A graph that holds nothing yet.
  std::unique_ptr<CudaGraph> (*graph)();
};

}  // namespace ferrotune

// The library exports these and nothing else.
#pragma GCC visibility push(default)
extern "C" {
int ferrotune_cuda_abi(void);
const ferrotune::CudaLibrary* ferrotune_cuda_library(void);
}
#pragma GCC visibility pop
