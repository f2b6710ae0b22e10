#include <ATen/core/CachingHostAllocator.h>
#include <ATen/cuda/CUDAGeneratorImpl.h>
#include <ATen/cuda/CUDAGraph.h>
#include <c10/cuda/CUDAFunctions.h>

#include <mutex>

#include "library.h"

namespace ferrotune {

namespace {

// The memory of all graphs. A pool whose last graph is gone is given up by the allocators: the next graph starts another.
struct Pool {
  const at::cuda::MempoolId_t id = at::cuda::graph_pool_handle();

  static std::shared_ptr<Pool> common() {
    static std::mutex mutex;
    static std::weak_ptr<Pool> known;
    const std::lock_guard lock(mutex);
    std::shared_ptr<Pool> pool = known.lock();
    if (!pool) known = pool = std::make_shared<Pool>();
    return pool;
  }
};

class Graph : public CudaGraph {
 public:
  explicit Graph(ClearMemory clear) : clear_(clear) {}

  void begin() override {
    device_ = c10::cuda::current_device();
    offset_ = at::cuda::detail::getDefaultCUDAGenerator(device_).get_offset();
    // Thread-local: other threads (a data loader's pinned copies, the driver's own) may go on while this one records.
    graph_.capture_begin(pool_->id, cudaStreamCaptureModeThreadLocal);
  }

  void end() override {
    try {
      graph_.capture_end();
      if (clear_ != nullptr) memsets_to_kernels(graph_.raw_cuda_graph(), clear_);
      graph_.instantiate();
    } catch (...) {
      leave_capture();
      throw;
    }
  }

  void replay() override { graph_.replay(); }

 private:
  // What capture_end leaves undone where the driver ended the capture with an error: the allocators go on giving memory
  // of the pool, and the generator, which waits for the end, refuses to draw.
  void leave_capture() {
    auto* const host = at::getHostAllocator(at::kCUDA);
    const auto attempt = [](const auto& undo) {
      try {
        undo();
      } catch (const c10::Error&) {
        // It had been done.
      }
    };
    attempt([&] { c10::cuda::CUDACachingAllocator::endAllocateToPool(device_, pool_->id); });
    attempt([&] { host->end_allocate_to_pool(pool_->id); });
    attempt([&] { c10::cuda::CUDACachingAllocator::releasePool(device_, pool_->id); });
    attempt([&] { host->release_pool(pool_->id); });
    at::Generator generator = at::cuda::detail::getDefaultCUDAGenerator(device_);
    at::Generator fresh = at::cuda::detail::createCUDAGenerator(device_);
    fresh.set_current_seed(generator.current_seed());
    fresh.set_offset(offset_);
    generator.graphsafe_set_state(fresh.graphsafe_get_state());
  }

  // Before the graph, which returns its memory to the pool.
  std::shared_ptr<Pool> pool_ = Pool::common();
  at::cuda::CUDAGraph graph_{/*keep_graph=*/true};  // capture_end leaves it to be changed
  ClearMemory clear_;
  c10::DeviceIndex device_ = 0;
  uint64_t offset_ = 0;
};

}  // namespace

std::unique_ptr<CudaGraph> graph(ClearMemory clear) { return std::make_unique<Graph>(clear); }

}  // namespace ferrotune
