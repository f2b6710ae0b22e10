#include "ferrotune/csrc/random.h"

#include <ATen/Context.h>

namespace ferrotune {

std::unique_ptr<Generator> generator(std::int32_t index, std::uint64_t seed) {
  const auto device = index < 0 ? at::Device(at::kCPU)
                                : at::Device(at::kCUDA, static_cast<c10::DeviceIndex>(index));
  // A copy of the device's default one: a CUDA generator is made by libtorch_cuda alone.
  auto own = at::globalContext().defaultGenerator(device).clone();
  own.set_current_seed(seed);
  return std::make_unique<Generator>(std::move(own));
}

void fill_normal(const Generator& generator, const Tensor& x, double std) { x.normal_(0.0, std, generator); }

void fill_uniform(const Generator& generator, const Tensor& x, double low, double high) {
  x.uniform_(low, high, generator);
}

}  // namespace ferrotune
