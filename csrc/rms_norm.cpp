// RMSNorm, arXiv:1910.07467.
//   y = x r (w + offset),  r = 1 / sqrt(mean_c(x_c^2) + eps);  offset is 1 for Gemma, whose weights are stored minus one.
// Statistics are taken in f32 for 16-bit inputs.
//
// Backward, with g = dy (w + offset) and xh = x r:
//   dr/dx_c = -r^3 x_c / C, so  dx = r (g - xh mean_c(g xh))  and  dw = sum_n dy xh.
#include "ferrotune/csrc/ops.h"

namespace ferrotune {

using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;

namespace {

at::ScalarType accumulate_type(const Tensor& x) {
  return x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

struct RmsNorm : Function<RmsNorm> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& weight, double eps, double offset) {
    const auto acc = accumulate_type(x);
    const Tensor xa = x.to(acc);
    const Tensor rstd = xa.square().mean(-1, true).add_(eps).rsqrt_();
    const Tensor scale = offset == 0 ? weight.to(acc) : weight.to(acc).add(offset);
    ctx->save_for_backward({x, weight, rstd});
    ctx->saved_data["offset"] = offset;
    return at::mul(xa, rstd).mul_(scale).to(x.scalar_type());
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const variable_list saved = ctx->get_saved_variables();
    const Tensor &x = saved[0], &weight = saved[1], &rstd = saved[2];
    const double offset = ctx->saved_data["offset"].toDouble();
    const auto acc = accumulate_type(x);
    const Tensor dy = grads[0].to(acc);
    const Tensor xh = x.to(acc) * rstd;
    const Tensor scale = offset == 0 ? weight.to(acc) : weight.to(acc).add(offset);
    Tensor dx, dw;
    if (ctx->needs_input_grad(0)) {
      const Tensor g = dy * scale;
      const Tensor projection = (g * xh).mean(-1, true).neg_();
      dx = at::addcmul(g, xh, projection).mul_(rstd).to(x.scalar_type());
    }
    if (ctx->needs_input_grad(1)) {
      dw = (dy * xh).reshape({-1, weight.size(0)}).sum(0).to(weight.scalar_type());
    }
    return {dx, dw, Tensor(), Tensor()};
  }
};

}  // namespace

Tensor rms_norm(const Tensor& x, const Tensor& weight, double eps, double offset) {
  TORCH_CHECK(weight.dim() == 1 && x.dim() >= 2 && x.size(-1) == weight.size(0), "rms_norm: x is ", x.sizes(),
              ", weight is ", weight.sizes(), ", expected [.., C] and [C]");
  return RmsNorm::apply(x, weight, eps, offset);
}

std::unique_ptr<Tensor> op_rms_norm(const Tensor& x, const Tensor& weight, double eps, double offset) {
  return std::make_unique<Tensor>(rms_norm(x, weight, eps, offset));
}

}  // namespace ferrotune
