// The gated activation of the MLP, arXiv:2002.05202: with gate_up = [gate | up] of shape [N, 2F],
//   y = act(gate) * up,   act = silu (SwiGLU) or gelu (GeGLU, exact or its tanh form).
// Backward: dgate = dy up act'(gate), dup = dy act(gate). act(gate) is recomputed from gate, not kept.
#include "ferrotune/csrc/cpu.h"
#include "ferrotune/csrc/fp8.h"
#include "ferrotune/csrc/kernels.h"
#include "ferrotune/csrc/ops.h"
#include "ferrotune/csrc/rows.h"
#include "ferrotune/src/ffi.rs.h"

namespace ferrotune {

using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;

namespace {

Tensor activate(const Tensor& gate, Activation activation) {
  if (activation == Activation::Silu) return at::silu(gate);
  return at::gelu(gate, activation == Activation::GeluTanh ? "tanh" : "none");
}

Tensor activate_backward(const Tensor& dy, const Tensor& gate, Activation activation) {
  if (activation == Activation::Silu) return at::silu_backward(dy, gate);
  return at::gelu_backward(dy, gate, activation == Activation::GeluTanh ? "tanh" : "none");
}

int kernel_activation(Activation activation) {
  switch (activation) {
    case Activation::Silu:
      return KERNEL_SILU;
    case Activation::GeluTanh:
      return KERNEL_GELU_TANH;
    default:
      return KERNEL_GELU;
  }
}

void swiglu_forward_kernel(const Kernels& kernels, const Tensor& y, const Tensor& gate_up, Activation activation,
                           const Fp8Rows* fp8 = nullptr) {
  const Launch launch(gate_up);
  const TokenRows rows(gate_up.unsqueeze(1));
  check_launch(kernels.swiglu_forward(rows.x.const_data_ptr(), y.mutable_data_ptr(), y.size(0), y.size(1), rows.stride, y.stride(0),
                                      Fp8Rows::to(fp8), kernel_activation(activation), kernel_dtype(gate_up), launch.stream()),
               "swiglu_forward");
}

Tensor swiglu_backward_kernel(const Kernels& kernels, const Tensor& dy, const Tensor& gate_up, Activation activation,
                              bool in_place, int64_t room, const Fp8Rows* fp8) {
  const Launch launch(gate_up);
  const Tensor d = dy.contiguous();
  const TokenRows rows(gate_up.unsqueeze(1));
  const int64_t n = gate_up.size(0), wide = gate_up.size(1);
  const Tensor dgate_up = in_place ? rows.x.squeeze(1)
                                   : at::empty({n, wide + room}, gate_up.options()).narrow(1, 0, wide);
  check_launch(kernels.swiglu_backward(d.const_data_ptr(), rows.x.const_data_ptr(), dgate_up.mutable_data_ptr(),
                                       nullptr, n, wide / 2, wide / 2, rows.stride, in_place ? rows.stride : wide + room,
                                       Fp8Rows::to(fp8), kernel_activation(activation), kernel_dtype(gate_up), launch.stream()),
               "swiglu_backward");
  return dgate_up;
}

// Simple operations an element, the exponential included.
constexpr int64_t kActivationWork = 8;

Tensor swiglu_forward_cpu(const CpuKernels& kernels, const Tensor& given, Activation activation) {
  const Tensor gate_up = given.contiguous();
  const int64_t n = gate_up.size(0), f = gate_up.size(1) / 2;
  Tensor y = at::empty({n, f}, gate_up.options());
  cpu_rows(n, kActivationWork * f, [&](int64_t begin, int64_t end) {
    kernels.swiglu_forward(end - begin, f, gate_up.const_data_ptr<float>() + begin * 2 * f, cpu_activation(activation),
                           y.mutable_data_ptr<float>() + begin * f);
  });
  return y;
}

Tensor swiglu_backward_cpu(const CpuKernels& kernels, const Tensor& dy, const Tensor& given, Activation activation) {
  const Tensor gate_up = given.contiguous(), d = dy.contiguous();
  const int64_t n = d.size(0), f = d.size(1);
  Tensor dgate_up = at::empty(gate_up.sizes(), gate_up.options());
  cpu_rows(n, kActivationWork * f, [&](int64_t begin, int64_t end) {
    kernels.swiglu_backward(end - begin, f, d.const_data_ptr<float>() + begin * f,
                            gate_up.const_data_ptr<float>() + begin * 2 * f, cpu_activation(activation),
                            dgate_up.mutable_data_ptr<float>() + begin * 2 * f);
  });
  return dgate_up;
}

}  // namespace

Tensor swiglu_forward(const Tensor& gate_up, Activation activation, int64_t tail, const Fp8Rows* fp8) {
  if (const Kernels* kernels = kernels_for(gate_up)) {
    const int64_t f = gate_up.size(1) / 2;
    const Tensor y = at::empty({gate_up.size(0), f + tail}, gate_up.options());
    swiglu_forward_kernel(*kernels, y.narrow(1, 0, f), gate_up, activation, fp8);
    return y;
  }
  TORCH_CHECK(tail == 0, "swiglu: only the kernel leaves room in its rows");
  if (const CpuKernels* kernels = cpu_kernels_for(gate_up)) return swiglu_forward_cpu(*kernels, gate_up, activation);
  const int64_t f = gate_up.size(1) / 2;
  return activate(gate_up.narrow(1, 0, f), activation).mul_(gate_up.narrow(1, f, f));
}

Tensor swiglu_backward(const Tensor& dy, const Tensor& gate_up, Activation activation, bool in_place, int64_t room,
                       const Fp8Rows* fp8) {
  if (const Kernels* kernels = kernels_for(gate_up)) {
    return swiglu_backward_kernel(*kernels, dy, gate_up, activation, in_place, room, fp8);
  }
  if (const CpuKernels* kernels = cpu_kernels_for(gate_up)) return swiglu_backward_cpu(*kernels, dy, gate_up, activation);
  const int64_t f = gate_up.size(1) / 2;
  const Tensor gate = gate_up.narrow(1, 0, f), up = gate_up.narrow(1, f, f);
  Tensor d = at::empty(gate_up.sizes(), gate_up.options());
  d.narrow(1, 0, f).copy_(activate_backward(dy * up, gate, activation));
  Tensor dup = d.narrow(1, f, f);
  at::mul_out(dup, dy, activate(gate, activation));
  return d;
}

void swiglu_forward_into(const Tensor& y, const Tensor& gate_up, Activation activation) {
  const Kernels* const kernels = kernels_for(gate_up);
  if (kernels != nullptr && y.stride(1) == 1) {
    swiglu_forward_kernel(*kernels, y, gate_up, activation);
  } else {
    y.copy_(swiglu_forward(gate_up, activation));
  }
}

void swiglu_backward_in_place(const Tensor& dy, const Tensor& gate_up, Activation activation) {
  const Kernels* const kernels = kernels_for(gate_up);
  if (kernels != nullptr && dy.stride(1) == 1 && gate_up.stride(1) == 1) {
    const Launch launch(gate_up);
    void* const y = dy.mutable_data_ptr();
    check_launch(kernels->swiglu_backward(y, gate_up.const_data_ptr(), gate_up.mutable_data_ptr(), y, dy.size(0),
                                          dy.size(1), dy.stride(0), gate_up.stride(0), gate_up.stride(0), {},
                                          kernel_activation(activation), kernel_dtype(gate_up), launch.stream()),
                 "swiglu_backward");
    return;
  }
  const Tensor y = swiglu_forward(gate_up, activation);
  gate_up.copy_(swiglu_backward(dy, gate_up, activation));
  dy.copy_(y);
}

namespace {

struct Swiglu : Function<Swiglu> {
  static Tensor forward(AutogradContext* ctx, const Tensor& gate_up, Activation activation) {
    ctx->save_for_backward({gate_up});
    ctx->saved_data["activation"] = static_cast<int64_t>(activation);
    return swiglu_forward(gate_up, activation);
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const auto activation = static_cast<Activation>(ctx->saved_data["activation"].toInt());
    return {swiglu_backward(grads[0], ctx->get_saved_variables()[0], activation), Tensor()};
  }
};

}  // namespace

Tensor swiglu(const Tensor& gate_up, Activation activation) {
  TORCH_CHECK(gate_up.dim() == 2 && gate_up.size(1) % 2 == 0, "swiglu: gate_up is ", gate_up.sizes(),
              ", expected [N, 2F]");
  TORCH_CHECK(at::isFloatingType(gate_up.scalar_type()), "swiglu: gate_up is ", gate_up.scalar_type(),
              ", expected a float dtype");
  if (is_rows(gate_up)) return rows_swiglu(gate_up, activation);
  return Swiglu::apply(gate_up, activation);
}

std::unique_ptr<Tensor> op_swiglu(const Tensor& gate_up, Activation activation) {
  return std::make_unique<Tensor>(swiglu(gate_up, activation));
}

}  // namespace ferrotune
