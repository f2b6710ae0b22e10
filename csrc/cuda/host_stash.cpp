// Tensors that lie in pinned host memory between forward and backward.
// One stream carries all copies beside the compute stream, at the rate of the bus (51 GB/s on an H200: 34 MB, a block's
// input of 4096 tokens of 4096, in 0.66 ms). Buffers are kept for the next step: pinning 2 GB takes seconds, and a
// recorded step writes where it wrote when it was recorded.
#include <ATen/cuda/CUDAEvent.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <cuda_runtime_api.h>

#include <deque>
#include <map>
#include <mutex>

#include "library.h"

namespace ferrotune {

namespace {

class Entry;

// Of one device.
struct Stash {
  // Tensors that stay on the device while their copies run: a block stashes up to three at once, and the compute stream
  // would wait for the first of them with less.
  static constexpr size_t kOnDevice = 3;

  std::recursive_mutex mutex;  // the last owner of an entry may let it go inside
  c10::cuda::CUDAStream stream;
  std::multimap<size_t, at::Tensor> free;          // pinned buffers by their bytes
  std::deque<std::weak_ptr<Entry>> on_device;      // the newest last
  std::weak_ptr<Entry> newest;
  uint64_t pinned = 0, most_pinned = UINT64_MAX;   // bytes of all buffers
  int64_t rows = 0;                                // that a buffer serves at least

  explicit Stash(c10::DeviceIndex device) : stream(c10::cuda::getStreamFromPool(true, device)) {}

  static Stash& of(c10::DeviceIndex device) {
    static std::mutex mutex;
    // Never freed: entries may outlive everything else at the end of the process.
    static auto& stashes = *new std::map<c10::DeviceIndex, std::unique_ptr<Stash>>();
    const std::lock_guard lock(mutex);
    auto& stash = stashes[device];
    if (!stash) stash = std::make_unique<Stash>(device);
    return *stash;
  }

  at::Tensor buffer(const at::Tensor& x) {
    // Of the largest batch at once: buffers of ever new sizes would pile up.
    const int64_t wanted = std::max(rows, x.size(0));
    const size_t bytes = x.nbytes() / std::max<int64_t>(1, x.size(0)) * wanted;
    const auto fits = free.lower_bound(bytes);
    if (fits == free.end()) {
      // Powers of two, so that batches of ever new sizes end with at most twice the memory of the largest.
      size_t size = 1;
      while (size < bytes) size *= 2;
      TORCH_CHECK(pinned + size <= most_pinned, "tensors that wait in the host's memory need more than the ", most_pinned,
                  " bytes of --max-host-memory");
      pinned += size;
      return at::empty({static_cast<int64_t>(size)}, at::TensorOptions().dtype(at::kByte).pinned_memory(true));
    }
    const at::Tensor buffer = fits->second;
    free.erase(fits);
    return buffer;
  }

  // What `first` has been given so far is done before what `then` is given next.
  static void order(const c10::cuda::CUDAStream& first, const c10::cuda::CUDAStream& then) {
    at::cuda::CUDAEvent event;
    event.record(first);
    event.block(then);
  }
};

// One stashed tensor: on the device until its copy is done, then in `buffer_`, then on the device again. Every function runs
// under the stash's mutex.
class Entry : public Stashed {
 public:
  Entry(Stash& stash, const at::Tensor& x, const c10::cuda::CUDAStream& compute)
      : stash_(stash), device_tensor_(x), buffer_(stash.buffer(x)), previous_(stash.newest) {
    Stash::order(compute, stash.stream);
    C10_CUDA_CHECK(cudaMemcpyAsync(buffer_.mutable_data_ptr(), x.const_data_ptr(), x.nbytes(), cudaMemcpyDeviceToHost,
                                   stash.stream));
    copied_.record(stash.stream);
  }

  ~Entry() override {
    const std::lock_guard lock(stash_.mutex);
    stash_.free.emplace(buffer_.nbytes(), buffer_);
    // Never fetched, because the backward was given up: memory that is being written must not be used for something else.
    if (device_tensor_.defined() && fetching_) {
      fetched_.block(c10::cuda::getCurrentCUDAStream(stash_.stream.device_index()));
    }
  }

  // The compute stream may reuse the memory once the copy is done.
  void leave_device(const c10::cuda::CUDAStream& compute) {
    copied_.block(compute);
    shape_ = device_tensor_.sizes().vec();
    options_ = device_tensor_.options();
    device_tensor_ = at::Tensor();
  }

  void start(const c10::cuda::CUDAStream& compute) {
    if (device_tensor_.defined()) return;
    device_tensor_ = at::empty(shape_, options_);
    // The new memory may still be in use by what the compute stream was given before.
    Stash::order(compute, stash_.stream);
    C10_CUDA_CHECK(cudaMemcpyAsync(device_tensor_.mutable_data_ptr(), buffer_.const_data_ptr(), device_tensor_.nbytes(),
                                   cudaMemcpyHostToDevice, stash_.stream));
    fetched_.record(stash_.stream);
    fetching_ = true;
  }

  at::Tensor fetch(int ahead) override {
    const std::lock_guard lock(stash_.mutex);
    const auto compute = c10::cuda::getCurrentCUDAStream(stash_.stream.device_index());
    start(compute);
    // Of a tensor that never left, its copy: the stream of the copies must have come back to the compute stream.
    (fetching_ ? fetched_ : copied_).block(compute);
    auto before = previous_.lock();
    for (; before && ahead > 0; --ahead) {
      before->start(compute);
      before = before->previous_.lock();
    }
    return std::move(device_tensor_);
  }

 private:
  Stash& stash_;
  at::Tensor device_tensor_, buffer_;
  std::weak_ptr<Entry> previous_;
  std::vector<int64_t> shape_;
  at::TensorOptions options_;
  at::cuda::CUDAEvent copied_, fetched_;
  bool fetching_ = false;
};

}  // namespace

void limit_stash(int device, uint64_t bytes, int64_t rows) {
  Stash& stash = Stash::of(static_cast<c10::DeviceIndex>(device));
  const std::lock_guard lock(stash.mutex);
  stash.most_pinned = bytes;
  stash.rows = rows;
}

std::shared_ptr<Stashed> stash(const at::Tensor& x) {
  TORCH_CHECK(x.is_cuda() && x.is_contiguous(), "stash: x must be contiguous, on a GPU");
  const c10::cuda::CUDAGuard guard(x.device());
  Stash& stash = Stash::of(x.device().index());
  const auto compute = c10::cuda::getCurrentCUDAStream(x.device().index());
  const std::lock_guard lock(stash.mutex);
  if (stash.on_device.size() >= Stash::kOnDevice) {
    if (const auto oldest = stash.on_device.front().lock()) oldest->leave_device(compute);
    stash.on_device.pop_front();
  }
  const auto entry = std::make_shared<Entry>(stash, x, compute);
  stash.on_device.push_back(entry);
  stash.newest = entry;
  return entry;
}

}  // namespace ferrotune
