#include <ATen/cuda/CUDAGeneratorImpl.h>
#include <ATen/cuda/CUDAGraph.h>
#include <c10/cuda/CUDAFunctions.h>

#include "library.h"

namespace ferrotune {

namespace {

class Graph : public CudaGraph {
 public:
  void begin() override {
    device_ = c10::cuda::current_device();
    offset_ = at::cuda::detail::getDefaultCUDAGenerator(device_).get_offset();
    // Thread-local: other threads (a data loader's pinned copies, the driver's own) may go on while this one records.
    graph_.capture_begin(pool(), cudaStreamCaptureModeThreadLocal);
  }

  void end() override {
    try {
      graph_.capture_end();
    } catch (...) {
      leave_capture();
      throw;
    }
  }

  void replay() override { graph_.replay(); }

 private:
  static at::cuda::MempoolId_t pool() {
    static const at::cuda::MempoolId_t id = at::cuda::graph_pool_handle();
    return id;
  }

  // What capture_end leaves undone where the driver ended the capture with an error: the allocator goes on giving memory
  // of the pool, and the generator, which waits for the end, refuses to draw.
  void leave_capture() {
    c10::cuda::CUDACachingAllocator::endAllocateToPool(device_, pool());
    c10::cuda::CUDACachingAllocator::releasePool(device_, pool());
    at::Generator generator = at::cuda::detail::getDefaultCUDAGenerator(device_);
    at::Generator fresh = at::cuda::detail::createCUDAGenerator(device_);
    fresh.set_current_seed(generator.current_seed());
    fresh.set_offset(offset_);
    generator.graphsafe_set_state(fresh.graphsafe_get_state());
  }

  at::cuda::CUDAGraph graph_;
  c10::DeviceIndex device_ = 0;
  uint64_t offset_ = 0;
};

}  // namespace

std::unique_ptr<CudaGraph> graph() { return std::make_unique<Graph>(); }

}  // namespace ferrotune
