// Rotary position embedding, arXiv:2104.09864, in the half-split pairing of Hugging Face checkpoints: with R rotated
// dims, dim i (i < R/2) is paired with i + R/2, and dims R..D pass through (partial_rotary_factor).
//   y_i       = x_i cos_i - x_{i+R/2} sin_i
//   y_{i+R/2} = x_{i+R/2} cos_i + x_i sin_i
// A rotation's Jacobian is its inverse transposed, so the backward is the same rotation by the opposite angle.
#include "ferrotune/csrc/cpu.h"
#include "ferrotune/csrc/kernels.h"
#include "ferrotune/csrc/ops.h"

namespace ferrotune {

using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;

namespace {

void rotate_kernel(const Kernels& kernels, const Tensor& x, const Tensor& cos, const Tensor& sin, bool inverse,
                   const TokenRows& y) {
  const Launch launch(x);
  const TokenRows rows(x);
  const Tensor c = cos.to(at::kFloat).contiguous(), s = sin.to(at::kFloat).contiguous();
  check_launch(kernels.rope(rows.x.const_data_ptr(), c.const_data_ptr<float>(), s.const_data_ptr<float>(),
                            y.x.mutable_data_ptr(), x.size(0), x.size(1), x.size(2), 2 * c.size(1), rows.stride, y.stride,
                            inverse, kernel_dtype(x), launch.stream()),
               "rope");
}

void rotate_cpu(const CpuKernels& kernels, const Tensor& x, const Tensor& cos, const Tensor& sin, bool inverse,
                const TokenRows& y) {
  const TokenRows rows(x);
  const int64_t h = x.size(1), d = x.size(2), half = cos.size(1);
  cpu_rows(x.size(0), h * d, [&](int64_t begin, int64_t end) {
    kernels.rope(end - begin, h, d, half, rows.x.const_data_ptr<float>() + begin * rows.stride, rows.stride,
                 cos.const_data_ptr<float>() + begin * half, sin.const_data_ptr<float>() + begin * half,
                 inverse ? -1.0f : 1.0f, y.x.mutable_data_ptr<float>() + begin * y.stride, y.stride);
  });
}

void check_rope(const Tensor& x, const Tensor& cos, const Tensor& sin) {
  TORCH_CHECK(x.dim() == 3 && cos.dim() == 2 && cos.sizes() == sin.sizes() && cos.size(0) == x.size(0) &&
                  2 * cos.size(1) <= x.size(2),
              "rope: x is ", x.sizes(), ", cos is ", cos.sizes(), ", sin is ", sin.sizes(),
              ", expected [N, H, D], [N, R/2], [N, R/2] with R <= D");
  TORCH_CHECK(at::isFloatingType(x.scalar_type()) && x.device() == cos.device() && x.device() == sin.device(),
              "rope: x is ", x.scalar_type(), " on ", x.device(), ", cos is on ", cos.device(), ", sin is on ",
              sin.device(), ", expected a float dtype and one device");
}

}  // namespace

void rotate_into(const Tensor& y, const Tensor& x, const Tensor& cos, const Tensor& sin, bool inverse) {
  check_rope(x, cos, sin);
  if (const TokenRows rows(y); rows.x.is_same(y)) {
    if (const Kernels* kernels = kernels_for(x)) return rotate_kernel(*kernels, x, cos, sin, inverse, rows);
    if (const CpuKernels* kernels = cpu_kernels_for(x); kernels != nullptr && cos.scalar_type() == at::kFloat) {
      return rotate_cpu(*kernels, x, cos.contiguous(), sin.contiguous(), inverse, rows);
    }
  }
  const double sign = inverse ? -1 : 1;
  const int64_t half = cos.size(1), rest = x.size(2) - 2 * half;
  const Tensor c = cos.to(x.scalar_type()).unsqueeze(1), s = sin.to(x.scalar_type()).unsqueeze(1);
  const Tensor x1 = x.narrow(2, 0, half), x2 = x.narrow(2, half, half);
  // Both before either is written: y may be x.
  const Tensor y1 = at::mul(x1, c).addcmul_(x2, s, -sign), y2 = at::mul(x2, c).addcmul_(x1, s, sign);
  y.narrow(2, 0, half).copy_(y1);
  y.narrow(2, half, half).copy_(y2);
  if (rest > 0) y.narrow(2, 2 * half, rest).copy_(x.narrow(2, 2 * half, rest));
}

Tensor rotate(const Tensor& x, const Tensor& cos, const Tensor& sin, bool inverse) {
  Tensor y = at::empty(x.sizes(), x.options());
  rotate_into(y, x, cos, sin, inverse);
  return y;
}

namespace {

struct Rope : Function<Rope> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& cos, const Tensor& sin) {
    ctx->save_for_backward({cos, sin});
    return rotate(x, cos, sin, false);
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const variable_list saved = ctx->get_saved_variables();
    return {rotate(grads[0], saved[0], saved[1], true), Tensor(), Tensor()};
  }
};

}  // namespace

Tensor rope(const Tensor& x, const Tensor& cos, const Tensor& sin) {
  check_rope(x, cos, sin);
  // Inside a block's own node nothing is recorded.
  return at::GradMode::is_enabled() ? Rope::apply(x, cos, sin) : rotate(x, cos, sin, false);
}

std::unique_ptr<Tensor> op_rope(const Tensor& x, const Tensor& cos, const Tensor& sin) {
  return std::make_unique<Tensor>(rope(x, cos, sin));
}

}  // namespace ferrotune
