// RMSNorm, arXiv:1910.07467.
//   y = x r (w + offset),  r = 1 / sqrt(mean_c(x_c^2) + eps);  offset is 1 for Gemma, whose weights are stored minus one.
// Statistics are taken in f32 for 16-bit inputs.
//
// Backward, with g = dy (w + offset) and xh = x r:
//   dr/dx_c = -r^3 x_c / C, so  dx = r (g - xh mean_c(g xh))  and  dw = sum_n dy xh.
#include "ferrotune/csrc/cpu.h"
#include "ferrotune/csrc/fp8.h"
#include "ferrotune/csrc/kernels.h"
#include "ferrotune/csrc/lora.h"
#include "ferrotune/csrc/ops.h"
#include "ferrotune/csrc/rows.h"

namespace ferrotune {

using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;

namespace {

void rms_check(const Tensor& x, const Tensor& weight) {
  TORCH_CHECK(weight.dim() == 1 && x.dim() >= 2 && x.size(-1) == weight.size(0), "rms_norm: x is ", x.sizes(),
              ", weight is ", weight.sizes(), ", expected [.., C] and [C]");
  TORCH_CHECK(at::isFloatingType(x.scalar_type()) && x.device() == weight.device(), "rms_norm: x is ", x.scalar_type(),
              " on ", x.device(), ", weight is on ", weight.device(), ", expected a float dtype and one device");
}

at::ScalarType rms_accumulate_type(const Tensor& x) {
  return x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

// x as [N, H, C]: a matrix has one head.
Tensor rms_heads(const Tensor& x) {
  if (x.dim() == 3) return x;
  return x.dim() == 2 ? x.unsqueeze(1) : x.reshape({-1, 1, x.size(-1)});
}

// The kernels read a weight of x's dtype or f32.
Tensor rms_kernel_weight(const Tensor& weight, const Tensor& x) {
  const bool known = weight.scalar_type() == x.scalar_type() || weight.scalar_type() == at::kFloat;
  return (known ? weight : weight.to(at::kFloat)).contiguous();
}

// Into y, and returns rstd.
Tensor rms_forward_kernel(const Kernels& kernels, const Tensor& y, int64_t y_stride, const Tensor& x, const Tensor& weight, double eps,
                          double offset, const Fp8Rows* fp8 = nullptr) {
  const Launch launch(x);
  const TokenRows rows(rms_heads(x));
  const int64_t n = rows.x.size(0), h = rows.x.size(1), c = rows.x.size(2);
  const Tensor w = rms_kernel_weight(weight, x);
  const Tensor rstd = at::empty({n, h, 1}, x.options().dtype(at::kFloat));
  check_launch(kernels.rms_norm_forward(rows.x.const_data_ptr(), w.const_data_ptr(), y.mutable_data_ptr(),
                                        rstd.mutable_data_ptr<float>(), n, h, c, rows.stride, y_stride,
                                        static_cast<float>(eps), static_cast<float>(offset), Fp8Rows::to(fp8),
                                        kernel_dtype(x), kernel_dtype(w), launch.stream()),
               "rms_norm_forward");
  return rstd;
}

Tensor rms_backward_kernel(const Kernels& kernels, const Tensor& dy, const Tensor& x, const Tensor& weight,
                           const Tensor& rstd, double offset, const Tensor& residual, int64_t room, const Fp8Rows* fp8) {
  const Launch launch(x);
  const TokenRows rows(rms_heads(x)), around(residual.defined() ? rms_heads(residual) : rows.x);
  const Tensor w = rms_kernel_weight(weight, x);
  const int64_t wide = rows.x.size(1) * rows.x.size(2);
  Tensor dx = room > 0 ? at::empty({x.size(0), wide + room}, x.options()) : at::empty(x.sizes(), x.options());
  if (room > 0) {
    // Not a view in autograd's books, which would keep the whole: the caller then is the only one who holds the memory.
    const at::AutoDispatchBelowADInplaceOrView guard;
    dx = dx.narrow(1, 0, wide);
  }
  check_launch(kernels.rms_norm_backward(dy.const_data_ptr(), rows.x.const_data_ptr(), w.const_data_ptr(),
                                         rstd.const_data_ptr<float>(),
                                         residual.defined() ? around.x.const_data_ptr() : nullptr,
                                         dx.mutable_data_ptr(), rows.x.size(0), rows.x.size(1), rows.x.size(2),
                                         rows.stride, around.stride, wide + room, static_cast<float>(offset),
                                         Fp8Rows::to(fp8), kernel_dtype(x), kernel_dtype(w), launch.stream()),
               "rms_norm_backward");
  return dx;
}

Tensor rms_weight_backward_kernel(const Kernels& kernels, const Tensor& dy, const Tensor& x, const Tensor& rstd) {
  const Launch launch(x);
  const TokenRows rows(rms_heads(x));
  const int64_t n = rows.x.size(0), h = rows.x.size(1), c = rows.x.size(2);
  // Runs of 128 rows fill an H200 at [8192, 4096]; shorter ones only add partial sums.
  const int64_t chunks = std::clamp<int64_t>(n * h / 128, 1, 2048);
  Tensor partial = at::empty({chunks, c}, rstd.options());
  check_launch(kernels.rms_norm_weight_backward(dy.const_data_ptr(), rows.x.const_data_ptr(),
                                                rstd.const_data_ptr<float>(), partial.mutable_data_ptr<float>(), n, h,
                                                c, rows.stride, chunks, kernel_dtype(x), launch.stream()),
               "rms_norm_weight_backward");
  return partial.sum(0);
}

std::tuple<Tensor, Tensor> rms_forward_cpu(const CpuKernels& kernels, const Tensor& x, const Tensor& weight, double eps,
                                           double offset) {
  const TokenRows rows(rms_heads(x));
  const int64_t n = rows.x.size(0), h = rows.x.size(1), c = rows.x.size(2);
  const Tensor w = weight.to(at::kFloat).contiguous();
  Tensor y = at::empty(x.sizes(), x.options()), rstd = at::empty({n, h, 1}, x.options());
  cpu_rows(n, h * c, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; t += h > 1 ? 1 : end - begin) {
      kernels.rms_norm_forward(h > 1 ? h : end - begin, c, rows.x.const_data_ptr<float>() + t * rows.stride,
                               h > 1 ? c : rows.stride, w.const_data_ptr<float>(), eps, offset,
                               y.mutable_data_ptr<float>() + t * h * c, rstd.mutable_data_ptr<float>() + t * h);
    }
  });
  return {y, rstd};
}

// dx and, where it is wanted, dw: a sum over fixed runs of tokens, the same for any number of threads.
std::tuple<Tensor, Tensor> rms_backward_cpu(const CpuKernels& kernels, const Tensor& given, const Tensor& x,
                                            const Tensor& weight, const Tensor& rstd, double offset, bool need_dw) {
  constexpr int64_t kRun = 64;
  const TokenRows rows(rms_heads(x));
  const int64_t n = rows.x.size(0), h = rows.x.size(1), c = rows.x.size(2), runs = (n + kRun - 1) / kRun;
  const Tensor w = weight.contiguous(), dy = given.contiguous();
  Tensor dx = at::empty(x.sizes(), x.options()), dw;
  if (need_dw) dw = at::zeros({runs, c}, x.options());
  cpu_rows(runs, kRun * h * c, [&](int64_t first, int64_t last) {
    for (int64_t run = first; run < last; ++run) {
      const int64_t end = std::min(n, (run + 1) * kRun);
      for (int64_t t = run * kRun; t < end; t += h > 1 ? 1 : kRun) {
        kernels.rms_norm_backward(h > 1 ? h : end - t, c, dy.const_data_ptr<float>() + t * h * c,
                                  rows.x.const_data_ptr<float>() + t * rows.stride, h > 1 ? c : rows.stride,
                                  w.const_data_ptr<float>(), rstd.const_data_ptr<float>() + t * h, offset,
                                  dx.mutable_data_ptr<float>() + t * h * c,
                                  need_dw ? dw.mutable_data_ptr<float>() + run * c : nullptr);
      }
    }
  });
  return {dx, need_dw ? dw.sum(0) : Tensor()};
}

}  // namespace

std::tuple<Tensor, Tensor> rms_norm_forward(const Tensor& x, const Tensor& weight, double eps, double offset,
                                            int64_t tail, const Fp8Rows* fp8) {
  rms_check(x, weight);
  if (const Kernels* kernels = kernels_for(x)) {
    const int64_t heads = x.dim() == 3 ? x.size(1) : 1, y_stride = heads * x.size(-1) + tail;
    const Tensor y = tail > 0 ? at::empty({x.size(0), y_stride}, x.options()) : at::empty(x.sizes(), x.options());
    return {y, rms_forward_kernel(*kernels, y, y_stride, x, weight, eps, offset, fp8)};
  }
  if (const CpuKernels* kernels = cpu_kernels_for(x); kernels != nullptr && weight.scalar_type() != at::kDouble) {
    return rms_forward_cpu(*kernels, x, weight, eps, offset);
  }
  TORCH_CHECK(tail == 0, "rms_norm: only the kernel leaves room in its rows");
  const auto acc = rms_accumulate_type(x);
  const Tensor xa = x.to(acc);
  const Tensor rstd = xa.square().mean(-1, true).add_(eps).rsqrt_();
  const Tensor scale = offset == 0 ? weight.to(acc) : weight.to(acc).add(offset);
  return {at::mul(xa, rstd).mul_(scale).to(x.scalar_type()), rstd};
}

bool rms_norm_fold(const Tensor& y, const Tensor& x, const Tensor& weight, double eps, double offset, Tensor* rstd, const LoraFold& fold) {
  rms_check(x, weight);
  const Kernels& kernels = *kernels_for(x);
  const TokenRows rows(rms_heads(x));
  const Tensor w = rms_kernel_weight(weight, x);
  // That launch may read the weight before a copy made here is written.
  const bool folds = fold.z && w.is_same(weight) && kernels.rms_norm_z_fits(&*fold.z, rows.x.const_data_ptr(), w.const_data_ptr(), rows.stride);
  Tensor r;
  if (folds) {
    const Launch launch(x);
    r = at::empty({x.size(0), 1, 1}, x.options().dtype(at::kFloat));
    check_launch(kernels.rms_norm_z(&*fold.z, fold.fills.data(), fold.count(), rows.x.const_data_ptr(), w.const_data_ptr(),
                                    r.mutable_data_ptr<float>(), rows.stride, static_cast<float>(eps), static_cast<float>(offset),
                                    kernel_dtype(w), launch.stream()),
                 "rms_norm_z");
  } else {
    r = rms_forward_kernel(kernels, y, y.stride(0), x, weight, eps, offset);
  }
  if (rstd != nullptr) *rstd = r;
  return folds;
}

std::tuple<Tensor, Tensor> rms_norm_backward(const Tensor& grad, const Tensor& x, const Tensor& weight, const Tensor& rstd,
                                             double offset, const Tensor& residual, int64_t room, const Fp8Rows* fp8) {
  const bool need_dw = weight.requires_grad();
  Tensor dx, dw;
  if (const Kernels* kernels = kernels_for(x)) {
    const Tensor dy = grad.contiguous();
    dx = rms_backward_kernel(*kernels, dy, x, weight, rstd, offset, residual, room, fp8);
    if (need_dw) dw = rms_weight_backward_kernel(*kernels, dy, x, rstd).to(weight.scalar_type());
    return {dx, dw};
  }
  if (const CpuKernels* kernels = cpu_kernels_for(x); kernels != nullptr && weight.scalar_type() == at::kFloat) {
    std::tie(dx, dw) = rms_backward_cpu(*kernels, grad, x, weight, rstd, offset, need_dw);
    if (residual.defined()) dx.add_(residual);
    return {dx, dw};
  }
  const auto acc = rms_accumulate_type(x);
  const Tensor dy = grad.to(acc), xh = x.to(acc) * rstd;
  const Tensor g = dy * (offset == 0 ? weight.to(acc) : weight.to(acc).add(offset));
  dx = at::addcmul(g, xh, (g * xh).mean(-1, true).neg_()).mul_(rstd).to(x.scalar_type());
  if (residual.defined()) dx.add_(residual);
  if (need_dw) dw = (dy * xh).reshape({-1, weight.size(0)}).sum(0).to(weight.scalar_type());
  return {dx, dw};
}

namespace {

struct RmsNorm : Function<RmsNorm> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& weight, double eps, double offset) {
    const auto [y, rstd] = rms_norm_forward(x, weight, eps, offset);
    ctx->save_for_backward({x, weight, rstd});
    ctx->saved_data["offset"] = offset;
    return y;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const variable_list saved = ctx->get_saved_variables();
    const auto [dx, dw] = rms_norm_backward(grads[0], saved[0], saved[1], saved[2], ctx->saved_data["offset"].toDouble());
    return {dx, dw, Tensor(), Tensor()};
  }
};

}  // namespace

Tensor rms_norm(const Tensor& x, const Tensor& weight, double eps, double offset) {
  if (is_rows(x) && fits_rows(weight) && weight.dim() == 1 && x.size(-1) == weight.size(0)) {
    return rows_rms_norm(x, weight, eps, offset);
  }
  return RmsNorm::apply(x, weight, eps, offset);
}

std::unique_ptr<Tensor> op_rms_norm(const Tensor& x, const Tensor& weight, double eps, double offset) {
  return std::make_unique<Tensor>(rms_norm(x, weight, eps, offset));
}

}  // namespace ferrotune
