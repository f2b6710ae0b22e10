// Multi-tensor optimizer steps: one pass over all parameters.
//
// AdamW, arXiv:1711.05101, with g divided by grad_scale and t counted from 1:
//   m = b1 m + (1 - b1) g        v = b2 v + (1 - b2) g^2
//   p = (1 - lr wd) p - lr / (1 - b1^t) m / (sqrt(v / (1 - b2^t)) + eps)
#include <torch/csrc/autograd/autograd.h>

#include <cmath>

#include "ferrotune/csrc/optim.h"
#include "ferrotune/src/ffi.rs.h"

namespace ferrotune {

namespace {

TensorList grads_of(const TensorList& params) {
  TensorList grads;
  for (const Tensor& param : params) {
    if (param.grad().defined()) grads.push_back(param.grad());
  }
  return grads;
}

Tensor grad_norm_cpu(const CpuKernels& kernels, const TensorList& grads) {
  const std::vector<Run> runs = runs_of(grads);
  std::vector<double> squares(runs.size());
  each_run(runs, kPlainGrain, [&](int64_t r, const Run& run) {
    squares[r] = kernels.sum_of_squares(run.count, grads[run.tensor].const_data_ptr<float>() + run.begin);
  });
  double total = 0;
  for (const double square : squares) total += square;
  return at::scalar_tensor(std::sqrt(total), grads[0].options());
}

void adamw_cpu(const CpuKernels& kernels, const TensorList& p, const TensorList& g, const TensorList& m,
               const TensorList& v, const AdamWStep& step) {
  if (step.skip.item<float>() != 0) return;
  const CpuAdamW factors = cpu_factors(step);
  each_run(runs_of(p), kPlainGrain, [&](int64_t, const Run& run) {
    const auto at = [&](const TensorList& list) { return list[run.tensor].mutable_data_ptr<float>() + run.begin; };
    kernels.adamw(run.count, at(p), at(g), at(m), at(v), factors);
  });
}

}  // namespace

std::vector<Run> runs_of(const TensorList& tensors) {
  constexpr int64_t kElements = 4096;
  std::vector<Run> runs;
  for (size_t i = 0; i < tensors.size(); ++i) {
    const int64_t n = tensors[i].numel();
    for (int64_t begin = 0; begin < n; begin += kElements) runs.push_back({i, begin, std::min(kElements, n - begin)});
  }
  return runs;
}

const CpuKernels* cpu_kernels_for_all(const TensorList& tensors) {
  const auto fits = [](const Tensor& x) { return x.is_contiguous() && cpu_kernels_for(x) != nullptr; };
  return std::all_of(tensors.begin(), tensors.end(), fits) ? cpu_kernels() : nullptr;
}

CpuAdamW cpu_factors(const AdamWStep& step) {
  const double t = step.step.item<double>(), lr = step.learning_rate.item<double>();
  return {static_cast<float>(1 / step.grad_scale.item<double>()),
          static_cast<float>(step.beta1),
          static_cast<float>(1 - step.beta1),
          static_cast<float>(step.beta2),
          static_cast<float>(1 - step.beta2),
          static_cast<float>(1 - lr * step.weight_decay),
          static_cast<float>(lr / (1 - std::pow(step.beta1, t))),
          static_cast<float>(1 / std::sqrt(1 - std::pow(step.beta2, t))),
          static_cast<float>(step.epsilon)};
}

std::unique_ptr<TensorList> tensor_list() { return std::make_unique<TensorList>(); }

void push(TensorList& list, const Tensor& tensor) { list.push_back(tensor); }

void backward(const Tensor& y, const Tensor& dy, const TensorList& inputs) {
  torch::autograd::grad({y}, inputs, {dy});
}

std::unique_ptr<Tensor> grad_norm(const TensorList& params) {
  at::NoGradGuard no_grad;
  const TensorList grads = grads_of(params);
  if (grads.empty()) {
    const auto options = params.empty() ? at::TensorOptions() : params[0].options().requires_grad(false);
    return std::make_unique<Tensor>(at::zeros({}, options));
  }
  if (const CpuKernels* kernels = cpu_kernels_for_all(grads)) {
    return std::make_unique<Tensor>(grad_norm_cpu(*kernels, grads));
  }
  return std::make_unique<Tensor>(at::linalg_vector_norm(at::stack(at::_foreach_norm(grads, 2))));
}

void zero_grads(const TensorList& params) {
  at::NoGradGuard no_grad;
  const TensorList grads = grads_of(params);
  if (!grads.empty()) at::_foreach_zero_(grads);
}

void copy_all(const TensorList& to, const TensorList& from) {
  at::NoGradGuard no_grad;
  at::_foreach_copy_(to, from);
}

void drop_grads(const TensorList& params) {
  for (const Tensor& param : params) param.mutable_grad() = Tensor();
}

void adamw_step(const TensorList& params, const TensorList& exp_avg, const TensorList& exp_avg_sq,
                const AdamWStep& step) {
  at::NoGradGuard no_grad;
  TORCH_CHECK(params.size() == exp_avg.size() && params.size() == exp_avg_sq.size(), "adamw_step: ", params.size(),
              " parameters, ", exp_avg.size(), " and ", exp_avg_sq.size(), " moments");
  TensorList p, g, m, v;
  for (size_t i = 0; i < params.size(); ++i) {
    if (!params[i].grad().defined()) continue;
    p.push_back(params[i]);
    g.push_back(params[i].grad());
    m.push_back(exp_avg[i]);
    v.push_back(exp_avg_sq[i]);
  }
  if (p.empty()) return;
  const CpuKernels* kernels = cpu_kernels_for_all(p);
  if (kernels != nullptr && cpu_kernels_for_all(g) && cpu_kernels_for_all(m) && cpu_kernels_for_all(v)) {
    return adamw_cpu(*kernels, p, g, m, v, step);
  }
  const TensorList steps(p.size(), step.step);
  at::_fused_adamw_(p, g, m, v, {}, steps, step.learning_rate, step.beta1, step.beta2, step.weight_decay, step.epsilon,
                    /*amsgrad=*/false, /*maximize=*/false, step.grad_scale, step.skip);
}

}  // namespace ferrotune
