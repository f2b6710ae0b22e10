// Random numbers from a generator of one's own: what else draws in the process changes nothing.
#pragma once

#include <ATen/core/Generator.h>

#include <cstdint>
#include <memory>

#include "ferrotune/csrc/ops.h"

namespace ferrotune {

using Generator = at::Generator;
// libtorch's generator for the GPU `index`, or for the CPU where it is negative, started at `seed`: the numbers that
// torch.manual_seed(seed) gives there.
std::unique_ptr<Generator> generator(std::int32_t index, std::uint64_t seed);
// x ~ N(0, std^2), in place; x is on the generator's device.
void fill_normal(const Generator& generator, const Tensor& x, double std);
// x ~ U(low, high), in place.
void fill_uniform(const Generator& generator, const Tensor& x, double low, double high);

}  // namespace ferrotune
