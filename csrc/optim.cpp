// Multi-tensor optimizer steps: one pass over all parameters.
#include <torch/csrc/autograd/autograd.h>

#include "ferrotune/csrc/ops.h"
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

}  // namespace

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
  const TensorList steps(p.size(), step.step);
  at::_fused_adamw_(p, g, m, v, {}, steps, step.learning_rate, step.beta1, step.beta2, step.weight_decay, step.epsilon,
                    /*amsgrad=*/false, /*maximize=*/false, step.grad_scale, step.skip);
}

}  // namespace ferrotune
