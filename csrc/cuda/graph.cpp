#include <ATen/cuda/CUDAGraph.h>

#include "library.h"

namespace ferrotune {

namespace {

class Graph : public CudaGraph {
 public:
  // Thread-local: other threads (a data loader's pinned copies, the driver's own) may go on while this one records.
  void begin() override { graph_.capture_begin(pool(), cudaStreamCaptureModeThreadLocal); }
  void end() override { graph_.capture_end(); }
  void replay() override { graph_.replay(); }

 private:
  static at::cuda::MempoolId_t pool() {
    static const at::cuda::MempoolId_t id = at::cuda::graph_pool_handle();
    return id;
  }

  at::cuda::CUDAGraph graph_;
};

}  // namespace

std::unique_ptr<CudaGraph> graph() { return std::make_unique<Graph>(); }

}  // namespace ferrotune
