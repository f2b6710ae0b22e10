// AdamW (csrc/optim.cpp) with its moments in 8 bits, arXiv:2110.02861, in the numbers of bitsandbytes: two bytes an element in
// place of eight. In blocks of 256 elements a moment is
//   x = values[index] absmax,   absmax = max |x| of the block,   index that of the value nearest to x / absmax,
// with the values of a "dynamic" map (kernels/dynamic_map.h), signed for m and unsigned for v.
//
// Bytes depend on how x is rounded, so that is fixed: m = fma(1 - b1, g, b1 m), v = fma((1 - b2) g, g, b2 v), as libtorch's
// vector loops have it, and x (1 / absmax). A value exactly between two belongs to the lower one.
#include <cmath>
#include <cstddef>
#include <cstring>
#include <limits>

#include "ferrotune/csrc/kernels.h"
#include "ferrotune/csrc/optim.h"
#include "ferrotune/src/ffi.rs.h"

namespace ferrotune {

namespace {

float from_bits(int32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

DynamicMap lookup(const Tensor& values) {
  DynamicMap map{};
  const float* const x = values.const_data_ptr<float>();
  std::copy(x, x + 256, map.values);
  while (x[map.zero] != 0) ++map.zero;
  std::fill(std::begin(map.magnitudes), std::end(map.magnitudes), std::numeric_limits<float>::infinity());
  for (int i = map.zero; i < 255; ++i) map.magnitudes[i - map.zero] = (x[i] + x[i + 1]) * 0.5f;
  int below = 0;
  for (int step = 0; step < kDynamicSteps; ++step) {
    const float start = from_bits(step == 0 ? 0 : kDynamicFirst + (step << 16));
    const float end = step + 1 == kDynamicSteps ? std::numeric_limits<float>::infinity()
                                                : from_bits(kDynamicFirst + ((step + 1) << 16));
    while (map.magnitudes[below] < start) ++below;
    map.below[step] = static_cast<uint8_t>(below);
    TORCH_INTERNAL_ASSERT(below == 255 || map.magnitudes[below + 1] >= end);
  }
  return map;
}

// One of the moments of a tensor of n elements.
struct Moment {
  Tensor index;   // uint8 [n]
  Tensor absmax;  // f32 [ceil(n / 256)]
  Tensor values;  // f32 [256]

  Tensor dequantized(at::ScalarType dtype) const {
    const Tensor scale = absmax.repeat_interleave(kDynamicBlock).slice(0, 0, index.size(0));
    return (values.index_select(0, index.to(at::kInt)) * scale).to(dtype);
  }

  // Where skip is 0.
  void assign(const Tensor& x, const Tensor& skip) const {
    const int64_t n = index.size(0), blocks = absmax.size(0);
    const Tensor rows = at::constant_pad_nd(x, {0, blocks * kDynamicBlock - n}).view({blocks, kDynamicBlock});
    const Tensor most = rows.abs().amax(1).to(at::kFloat);
    const Tensor inverse = most.clamp_min(kLeastAbsmax).reciprocal().to(x.scalar_type());
    const Tensor midpoints = (values.slice(0, 1) + values.slice(0, 0, -1)) * 0.5;
    const Tensor nearest = at::bucketize(rows * inverse.unsqueeze(1), midpoints.to(x.scalar_type()), /*out_int32=*/true);
    const Tensor skipped = skip.ne(0);
    index.copy_(at::where(skipped, index, nearest.flatten().slice(0, 0, n).to(at::kByte)));
    absmax.copy_(at::where(skipped, absmax, most));
  }
};

// In libtorch's words, on any device in f32 and f64; nothing waits for the device.
void formula(const Tensor& param, const Tensor& grad, const Moment& exp_avg, const Moment& exp_avg_sq,
             const AdamWStep& step) {
  const auto dtype = param.scalar_type();
  const Tensor t = step.step.to(at::kDouble), lr = step.learning_rate.to(at::kDouble);
  const Tensor p = param.view({-1}), g = grad.reshape({-1}) / step.grad_scale;
  const Tensor m = exp_avg.dequantized(dtype) * step.beta1 + g * (1 - step.beta1);
  const Tensor v = exp_avg_sq.dequantized(dtype) * step.beta2 + g * g * (1 - step.beta2);
  const Tensor correction1 = 1 - at::pow(step.beta1, t), correction2 = 1 - at::pow(step.beta2, t);
  const Tensor root = (v / correction2).sqrt() + step.epsilon;
  const Tensor updated = p * (1 - lr * step.weight_decay) - m / root * (lr / correction1);
  p.copy_(at::where(step.skip.ne(0), p, updated));
  exp_avg.assign(m, step.skip);
  exp_avg_sq.assign(v, step.skip);
}

// What has a gradient.
struct Trained {
  TensorList p, g, state1, state2, absmax1, absmax2;
};

void by_cpu_kernels(const CpuKernels& kernels, const Trained& all, const DynamicMaps& maps, const AdamWStep& step) {
  if (step.skip.item<float>() != 0) return;
  const CpuAdamW factors = cpu_factors(step);
  each_run(runs_of(all.p), k8bitGrain, [&](int64_t, const Run& run) {
    float* const p = all.p[run.tensor].mutable_data_ptr<float>();
    const float* const g = all.g[run.tensor].const_data_ptr<float>();
    uint8_t* const state1 = all.state1[run.tensor].mutable_data_ptr<uint8_t>();
    uint8_t* const state2 = all.state2[run.tensor].mutable_data_ptr<uint8_t>();
    float* const absmax1 = all.absmax1[run.tensor].mutable_data_ptr<float>();
    float* const absmax2 = all.absmax2[run.tensor].mutable_data_ptr<float>();
    for (int64_t i = run.begin; i < run.begin + run.count; i += kDynamicBlock) {
      const int64_t block = i / kDynamicBlock, count = std::min(kDynamicBlock, run.begin + run.count - i);
      kernels.adamw_8bit(count, p + i, g + i, state1 + i, state2 + i, absmax1 + block, absmax2 + block, maps, factors);
    }
  });
}

void by_cuda_kernel(const Kernels& kernels, const Trained& all, const Tensor& maps, const AdamWStep& step) {
  std::vector<KernelAdamW8bit> tensors;
  for (size_t i = 0; i < all.p.size(); ++i) {
    tensors.push_back({all.p[i].mutable_data_ptr<float>(), all.g[i].const_data_ptr<float>(),
                       all.state1[i].mutable_data_ptr<uint8_t>(), all.state2[i].mutable_data_ptr<uint8_t>(),
                       all.absmax1[i].mutable_data_ptr<float>(), all.absmax2[i].mutable_data_ptr<float>(),
                       all.p[i].numel()});
  }
  const Launch launch(all.p[0]);
  check_launch(
      kernels.adamw_8bit(tensors.data(), static_cast<int64_t>(tensors.size()), maps.const_data_ptr(),
                         step.step.const_data_ptr<float>(), step.learning_rate.const_data_ptr<float>(),
                         step.grad_scale.const_data_ptr<float>(), step.skip.const_data_ptr<float>(), step.beta1,
                         step.beta2, step.epsilon, step.weight_decay, launch.stream()),
      "adamw_8bit");
}

}  // namespace

Tensor dynamic_map(bool has_sign) {
  TensorList values{at::zeros({1}), at::ones({1})};
  for (int64_t i = 0; i < 7; ++i) {
    const int64_t steps = int64_t{1} << (has_sign ? i : i + 1);
    const Tensor edges = at::linspace(0.1, 1, steps + 1, at::kFloat);
    const Tensor means = (edges.slice(0, 0, -1) + edges.slice(0, 1)) / 2.0;
    const double power = std::pow(10.0, static_cast<double>(i - 6));
    values.push_back(means * power);
    if (has_sign) values.push_back(means * -power);
  }
  return std::get<0>(at::cat(values).sort());
}

std::unique_ptr<Tensor> adamw_8bit_maps() {
  const DynamicMaps maps{lookup(dynamic_map(true)), lookup(dynamic_map(false))};
  Tensor bytes = at::empty({static_cast<int64_t>(sizeof maps)}, at::kByte);
  std::memcpy(bytes.mutable_data_ptr(), &maps, sizeof maps);
  return std::make_unique<Tensor>(bytes);
}

void adamw_8bit_step(const TensorList& params, const TensorList& state1, const TensorList& state2,
                     const TensorList& absmax1, const TensorList& absmax2, const Tensor& maps, const AdamWStep& step) {
  at::NoGradGuard no_grad;
  const size_t count = params.size();
  TORCH_CHECK(state1.size() == count && state2.size() == count && absmax1.size() == count && absmax2.size() == count,
              "adamw_8bit_step: ", count, " parameters, but not as many states");
  TORCH_CHECK(maps.scalar_type() == at::kByte && maps.numel() == sizeof(DynamicMaps), "adamw_8bit_step: other maps");
  Trained all;
  for (size_t i = 0; i < count; ++i) {
    const Tensor& p = params[i];
    const int64_t n = p.numel(), blocks = (n + kDynamicBlock - 1) / kDynamicBlock;
    const auto flat = [&](const Tensor& x, at::ScalarType dtype, int64_t size) {
      return x.scalar_type() == dtype && x.is_contiguous() && x.sizes() == at::IntArrayRef{size} && x.device() == p.device();
    };
    TORCH_CHECK((p.scalar_type() == at::kFloat || p.scalar_type() == at::kDouble) && p.is_contiguous() &&
                    maps.device() == p.device() && flat(state1[i], at::kByte, n) && flat(state2[i], at::kByte, n) &&
                    flat(absmax1[i], at::kFloat, blocks) && flat(absmax2[i], at::kFloat, blocks),
                "adamw_8bit_step: a parameter is ", p.scalar_type(), " ", p.sizes(), " with states ", state1[i].sizes(),
                ", ", state2[i].sizes(), " and absmax ", absmax1[i].sizes(), ", ", absmax2[i].sizes(),
                "; expected f32 or f64, uint8 [", n, "] and f32 [", blocks, "] on one device");
    if (!p.grad().defined()) continue;
    all.p.push_back(p);
    all.g.push_back(p.grad().contiguous());
    all.state1.push_back(state1[i]);
    all.state2.push_back(state2[i]);
    all.absmax1.push_back(absmax1[i]);
    all.absmax2.push_back(absmax2[i]);
  }
  if (all.p.empty()) return;
  const CpuKernels* const cpu = cpu_kernels_for_all(all.p);
  if (cpu != nullptr && cpu_kernels_for_all(all.g) != nullptr) {
    return by_cpu_kernels(*cpu, all, *static_cast<const DynamicMaps*>(maps.const_data_ptr()), step);
  }
  const auto by_kernel = [](const Tensor& x) { return kernels_for(x) != nullptr && x.scalar_type() == at::kFloat; };
  if (std::all_of(all.p.begin(), all.p.end(), by_kernel) && std::all_of(all.g.begin(), all.g.end(), by_kernel)) {
    return by_cuda_kernel(*kernels_for(all.p[0]), all, maps, step);
  }
  const auto values = [&](size_t map) {
    return maps.narrow(0, static_cast<int64_t>(map + offsetof(DynamicMap, values)), sizeof(DynamicMap::values))
        .view(at::kFloat);
  };
  const Tensor values1 = values(offsetof(DynamicMaps, exp_avg)), values2 = values(offsetof(DynamicMaps, exp_avg_sq));
  for (size_t i = 0; i < all.p.size(); ++i) {
    formula(all.p[i], all.g[i], {all.state1[i], all.absmax1[i], values1}, {all.state2[i], all.absmax2[i], values2}, step);
  }
}

}  // namespace ferrotune
