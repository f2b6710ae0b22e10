// The fused ops under torch.ops.ferrotune.*, for PyTorch: torch.ops.load_library("libferrotune_ops.so").
//
// Every op that trains is three: a forward and a backward that run csrc's functions and are opaque to tracing, and the op
// itself, which is an autograd::Function that calls these two through the dispatcher. So torch.compile sees both, and by
// the shapes of the Meta kernels never runs either. Sizes are SymInt there: a dimension may be unknown.
//
// Only what these ops need of csrc is linked (scripts/build_ops): nothing here may use a type of the Rust bridge that has
// functions (rust::Slice, rust::Str), for they are Rust's.
#include <torch/library.h>

#include "ferrotune/csrc/kernels.h"
#include "ferrotune/csrc/linear.h"
#include "ferrotune/csrc/nf4.h"
#include "ferrotune/csrc/ops.h"
#include "ferrotune/src/ffi.rs.h"

namespace ferrotune {
namespace python {

using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;
using OptionalTensor = std::optional<Tensor>;

at::ScalarType sum_type(const Tensor& x) { return x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat; }

// [.., C] as [N, C].
Tensor matrix(const Tensor& x) {
  TORCH_CHECK(x.dim() >= 2, "x has ", x.dim(), " dimensions, expected 2 or more");
  return x.reshape({-1, x.size(-1)});
}

// The same values; `trains` tells csrc whether to compute a gradient. Autograd itself is done above.
Tensor leaf(const Tensor& x, bool trains) { return x.detach().set_requires_grad(trains); }

template <typename Signature>
auto op(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

// ---- RMSNorm

std::tuple<Tensor, Tensor> norm_forward(const Tensor& x, const Tensor& weight, double eps, double offset) {
  const auto [y, rstd] = rms_norm_forward(matrix(x), weight, eps, offset);
  return {y.reshape(x.sizes()).contiguous(), rstd.reshape({-1})};
}

std::tuple<Tensor, Tensor> norm_forward_meta(const Tensor& x, const Tensor& weight, double, double) {
  c10::SymInt rows = 1;
  for (int64_t i = 0; i + 1 < x.dim(); ++i) rows = rows * x.sym_size(i);
  return {at::empty_symint(x.sym_sizes(), x.options()), at::empty_symint({rows}, x.options().dtype(sum_type(x)))};
}

std::tuple<Tensor, Tensor> norm_backward(const Tensor& dy, const Tensor& x, const Tensor& weight, const Tensor& rstd,
                                         double offset, bool need_dw) {
  const auto [dx, dw] =
      rms_norm_backward(matrix(dy), matrix(x), leaf(weight, need_dw), rstd.unsqueeze(1), offset);
  return {dx.reshape(x.sizes()).contiguous(), dw};
}

std::tuple<Tensor, Tensor> norm_backward_meta(const Tensor&, const Tensor& x, const Tensor& weight, const Tensor&,
                                              double, bool need_dw) {
  return {at::empty_symint(x.sym_sizes(), x.options()),
          need_dw ? at::empty_symint(weight.sym_sizes(), weight.options()) : Tensor()};
}

std::tuple<Tensor, Tensor> call_norm_forward(const Tensor& x, const Tensor& weight, double eps, double offset) {
  static const auto f = op<decltype(norm_forward)>("ferrotune::_rms_norm_forward");
  return f.call(x, weight, eps, offset);
}

struct RmsNorm : Function<RmsNorm> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& weight, double eps, double offset) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    const auto [y, rstd] = call_norm_forward(x, weight, eps, offset);
    ctx->save_for_backward({x, weight, rstd});
    ctx->saved_data["offset"] = offset;
    ctx->saved_data["need_dw"] = weight.requires_grad();
    return y;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    static const auto f = op<decltype(norm_backward)>("ferrotune::_rms_norm_backward");
    const variable_list saved = ctx->get_saved_variables();
    const auto [dx, dw] = f.call(grads[0], saved[0], saved[1], saved[2], ctx->saved_data["offset"].toDouble(),
                                 ctx->saved_data["need_dw"].toBool());
    return {dx, dw, Tensor(), Tensor()};
  }
};

Tensor norm(const Tensor& x, const Tensor& weight, double eps, double offset) {
  return std::get<0>(call_norm_forward(x, weight, eps, offset));
}

Tensor norm_autograd(const Tensor& x, const Tensor& weight, double eps, double offset) {
  return RmsNorm::apply(x, weight, eps, offset);
}

// ---- RoPE

Tensor turn(const Tensor& x, const Tensor& cos, const Tensor& sin, bool inverse) {
  const at::NoGradGuard no_grad;
  return inverse ? rotate(x, cos, sin, true) : rope(x, cos, sin);
}

Tensor turn_meta(const Tensor& x, const Tensor&, const Tensor&, bool) {
  return at::empty_symint(x.sym_sizes(), x.options());
}

Tensor call_turn(const Tensor& x, const Tensor& cos, const Tensor& sin, bool inverse) {
  static const auto f = op<decltype(turn)>("ferrotune::rope");
  return f.call(x, cos, sin, inverse);
}

struct Rope : Function<Rope> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& cos, const Tensor& sin, bool inverse) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    ctx->save_for_backward({cos, sin});
    ctx->saved_data["inverse"] = inverse;
    return call_turn(x, cos, sin, inverse);
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const variable_list saved = ctx->get_saved_variables();
    return {call_turn(grads[0], saved[0], saved[1], !ctx->saved_data["inverse"].toBool()), Tensor(), Tensor(), Tensor()};
  }
};

Tensor turn_autograd(const Tensor& x, const Tensor& cos, const Tensor& sin, bool inverse) {
  return Rope::apply(x, cos, sin, inverse);
}

// ---- SwiGLU

Activation activation_of(c10::string_view name) {
  if (name == "silu") return Activation::Silu;
  if (name == "gelu_tanh") return Activation::GeluTanh;
  TORCH_CHECK(name == "gelu", "swiglu: activation is ", name, ", expected silu, gelu_tanh or gelu");
  return Activation::Gelu;
}

Tensor glu(const Tensor& gate_up, c10::string_view activation) {
  const at::NoGradGuard no_grad;
  const Tensor y = swiglu(matrix(gate_up), activation_of(activation));
  std::vector<int64_t> sizes = gate_up.sizes().vec();
  sizes.back() = y.size(1);
  return y.reshape(sizes).contiguous();
}

Tensor glu_meta(const Tensor& gate_up, c10::string_view) {
  c10::SymDimVector sizes(gate_up.sym_sizes().begin(), gate_up.sym_sizes().end());
  sizes.back() = sizes.back() / 2;
  return at::empty_symint(sizes, gate_up.options());
}

Tensor glu_backward(const Tensor& dy, const Tensor& gate_up, c10::string_view activation) {
  const at::NoGradGuard no_grad;
  const Tensor d = swiglu_backward(matrix(dy).contiguous(), matrix(gate_up).contiguous(), activation_of(activation));
  return d.reshape(gate_up.sizes()).contiguous();
}

Tensor glu_backward_meta(const Tensor&, const Tensor& gate_up, c10::string_view) {
  return at::empty_symint(gate_up.sym_sizes(), gate_up.options());
}

struct Swiglu : Function<Swiglu> {
  static Tensor forward(AutogradContext* ctx, const Tensor& gate_up, c10::string_view activation) {
    static const auto f = op<decltype(glu)>("ferrotune::swiglu");
    const at::AutoDispatchBelowADInplaceOrView guard;
    ctx->save_for_backward({gate_up});
    ctx->saved_data["activation"] = std::string(activation);
    return f.call(gate_up, activation);
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    static const auto f = op<decltype(glu_backward)>("ferrotune::_swiglu_backward");
    const std::string activation = ctx->saved_data["activation"].toStringRef();
    return {f.call(grads[0], ctx->get_saved_variables()[0], activation), Tensor()};
  }
};

Tensor glu_autograd(const Tensor& gate_up, c10::string_view activation) { return Swiglu::apply(gate_up, activation); }

// ---- LoRA

Linear lora_of(const Tensor& weight, const OptionalTensor& bias, const Tensor& a, const Tensor& b, double scale,
               const std::array<bool, 5>& trains) {
  TORCH_CHECK(weight.dim() == 2 && a.dim() == 2 && b.dim() == 2 && a.size(1) == weight.size(1) &&
                  b.size(0) == weight.size(0) && a.size(0) == b.size(1) &&
                  (!bias || (bias->dim() == 1 && bias->size(0) == weight.size(0))),
              "lora_linear: weight is ", weight.sizes(), ", lora_A ", a.sizes(), ", lora_B ", b.sizes(),
              ", expected [rows, in], [R, in], [rows, R], and bias [rows]");
  Linear l;
  l.weight = leaf(weight, trains[1]);
  if (bias) l.bias = leaf(*bias, trains[2]);
  l.parts.push_back({weight.size(0), leaf(a, trains[3]), leaf(b, trains[4]), scale, 0, 0, Tensor()});
  return l;
}

std::tuple<Tensor, Tensor> lora_forward(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                                        const Tensor& a, const Tensor& b, double scale) {
  const at::NoGradGuard no_grad;
  Tensor z;
  const Tensor y = linear_forward(matrix(x), lora_of(weight, bias, a, b, scale, {}), &z);
  std::vector<int64_t> sizes = x.sizes().vec();
  sizes.back() = y.size(1);
  return {y.reshape(sizes).contiguous(), z.contiguous()};
}

std::tuple<Tensor, Tensor> lora_forward_meta(const Tensor& x, const Tensor& weight, const OptionalTensor&,
                                             const Tensor& a, const Tensor&, double) {
  c10::SymDimVector sizes(x.sym_sizes().begin(), x.sym_sizes().end());
  c10::SymInt rows = 1;
  for (int64_t i = 0; i + 1 < x.dim(); ++i) rows = rows * sizes[i];
  sizes.back() = weight.sym_size(0);
  return {at::empty_symint(sizes, x.options()), at::empty_symint({rows, a.sym_size(0)}, x.options())};
}

using FiveTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

// Of x, weight, bias, lora_A and lora_B, where `wanted`.
FiveTensors lora_backward(const Tensor& dy, const Tensor& x, const Tensor& z, const Tensor& weight,
                          const OptionalTensor& bias, const Tensor& a, const Tensor& b, double scale,
                          std::array<bool, 5> wanted) {
  const at::NoGradGuard no_grad;
  Tensor grads[4];
  Tensor dx = linear_backward(matrix(dy).contiguous(), matrix(x), z, lora_of(weight, bias, a, b, scale, wanted), wanted[0], grads);
  if (wanted[0]) dx = dx.reshape(x.sizes()).contiguous();
  const auto given = [&](int i) { return wanted[i + 1] ? grads[i].contiguous() : Tensor(); };
  return {dx, given(0), given(1), given(2), given(3)};
}

FiveTensors lora_backward_meta(const Tensor&, const Tensor& x, const Tensor&, const Tensor& weight,
                               const OptionalTensor& bias, const Tensor& a, const Tensor& b, double,
                               std::array<bool, 5> wanted) {
  const auto like = [&](const Tensor& t, int i) {
    return wanted[i] ? at::empty_symint(t.sym_sizes(), t.options()) : Tensor();
  };
  return {like(x, 0), like(weight, 1), bias ? like(*bias, 2) : Tensor(), like(a, 3), like(b, 4)};
}

std::tuple<Tensor, Tensor> call_lora_forward(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                                             const Tensor& a, const Tensor& b, double scale) {
  static const auto f = op<decltype(lora_forward)>("ferrotune::_lora_linear_forward");
  return f.call(x, weight, bias, a, b, scale);
}

struct LoraLinear : Function<LoraLinear> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                        const Tensor& a, const Tensor& b, double scale) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    const auto [y, z] = call_lora_forward(x, weight, bias, a, b, scale);
    ctx->save_for_backward({x, z, weight, bias.value_or(Tensor()), a, b});
    ctx->saved_data["scale"] = scale;
    ctx->saved_data["wanted"] = c10::List<bool>({x.requires_grad(), weight.requires_grad(), bias && bias->requires_grad(),
                                                 a.requires_grad(), b.requires_grad()});
    return y;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    static const auto f = op<decltype(lora_backward)>("ferrotune::_lora_linear_backward");
    const variable_list s = ctx->get_saved_variables();
    const c10::List<bool> flags = ctx->saved_data["wanted"].toBoolList();
    std::array<bool, 5> wanted;
    for (int i = 0; i < 5; ++i) wanted[i] = flags[i];
    const OptionalTensor bias = s[3].defined() ? OptionalTensor(s[3]) : std::nullopt;
    const auto [dx, dw, dbias, da, db] =
        f.call(grads[0], s[0], s[1], s[2], bias, s[4], s[5], ctx->saved_data["scale"].toDouble(), wanted);
    return {dx, dw, dbias, da, db, Tensor()};
  }
};

Tensor lora(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const Tensor& a, const Tensor& b,
            double scale) {
  return std::get<0>(call_lora_forward(x, weight, bias, a, b, scale));
}

Tensor lora_autograd(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const Tensor& a, const Tensor& b,
                     double scale) {
  return LoraLinear::apply(x, weight, bias, a, b, scale);
}

// ---- head and cross-entropy

using ThreeTensors = std::tuple<Tensor, Tensor, Tensor>;

ThreeTensors loss_forward(const Tensor& hidden, const Tensor& weight, const Tensor& labels, double softcap, bool need_dh,
                          bool need_dw) {
  // The kernels take labels for what they are; on a GPU this does not wait.
  const Tensor known = labels.ge(0).logical_and(labels.lt(weight.size(0))).logical_or(labels.eq(-100));
  at::_assert_async(known.all(), "linear_cross_entropy: a label is no word of the head, and not -100");
  return linear_cross_entropy_forward(hidden.contiguous(), weight.contiguous(), labels.contiguous(), softcap, need_dh,
                                      need_dw);
}

ThreeTensors loss_forward_meta(const Tensor& hidden, const Tensor& weight, const Tensor&, double, bool need_dh,
                               bool need_dw) {
  const auto sum = hidden.options().dtype(sum_type(hidden));
  return {at::empty_symint(c10::SymIntArrayRef{}, sum),
          need_dh ? at::empty_symint(hidden.sym_sizes(), hidden.options()) : Tensor(),
          need_dw ? at::empty_symint(weight.sym_sizes(), sum) : Tensor()};
}

ThreeTensors call_loss_forward(const Tensor& hidden, const Tensor& weight, const Tensor& labels, double softcap,
                               bool need_dh, bool need_dw) {
  static const auto f = op<decltype(loss_forward)>("ferrotune::_linear_cross_entropy_forward");
  return f.call(hidden, weight, labels, softcap, need_dh, need_dw);
}

struct LinearCrossEntropy : Function<LinearCrossEntropy> {
  static Tensor forward(AutogradContext* ctx, const Tensor& hidden, const Tensor& weight, const Tensor& labels,
                        double softcap, bool need_dh, bool need_dw) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    const auto [loss, dh, dw] = call_loss_forward(hidden, weight, labels, softcap, need_dh, need_dw);
    ctx->save_for_backward({dh, dw});
    ctx->saved_data["weight_type"] = weight.scalar_type();
    return loss;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const variable_list saved = ctx->get_saved_variables();
    // One dimension, so that the product is in f32: a scalar tensor would be rounded to dh's dtype first.
    const Tensor grad = grads[0].reshape({1});
    const auto times = [&](const Tensor& d, at::ScalarType type) { return d.defined() ? d.mul(grad).to(type) : d; };
    const auto hidden_type = saved[0].defined() ? saved[0].scalar_type() : at::kFloat;
    return {times(saved[0], hidden_type), times(saved[1], ctx->saved_data["weight_type"].toScalarType()), Tensor(),
            Tensor(), Tensor(), Tensor()};
  }
};

Tensor loss(const Tensor& hidden, const Tensor& weight, const Tensor& labels, double softcap) {
  return std::get<0>(call_loss_forward(hidden, weight, labels, softcap, false, false));
}

Tensor loss_autograd(const Tensor& hidden, const Tensor& weight, const Tensor& labels, double softcap) {
  const bool records = at::GradMode::is_enabled();
  return LinearCrossEntropy::apply(hidden, weight, labels, softcap, records && hidden.requires_grad(),
                                   records && weight.requires_grad());
}

// ---- NF4

std::tuple<Tensor, Tensor> quantize(const Tensor& x) {
  const auto options = x.options().requires_grad(false);
  const int64_t n = x.numel();
  const Tensor packed = at::empty({(n + 1) / 2}, options.dtype(at::kByte));
  const Tensor absmax = at::empty({(n + 63) / 64}, options.dtype(at::kFloat));
  nf4_quantize(x.contiguous(), packed, absmax);
  return {packed, absmax};
}

std::tuple<Tensor, Tensor> quantize_meta(const Tensor& x) {
  const c10::SymInt n = x.sym_numel();
  return {at::empty_symint({(n + 1) / 2}, x.options().dtype(at::kByte)),
          at::empty_symint({(n + 63) / 64}, x.options().dtype(at::kFloat))};
}

ThreeTensors nest(const Tensor& absmax) {
  const Tensor host = absmax.cpu().contiguous();
  const int64_t blocks = host.size(0);
  const Tensor index = at::empty({blocks}, host.options().dtype(at::kByte));
  const Tensor nested_absmax = at::empty({(blocks + 255) / 256}, host.options());
  const double offset = nf4_nest(host, index, nested_absmax);
  return {index.to(absmax.device()), nested_absmax.to(absmax.device()), at::full({}, offset, absmax.options())};
}

ThreeTensors nest_meta(const Tensor& absmax) {
  const c10::SymInt blocks = absmax.sym_size(0);
  return {at::empty_symint({blocks}, absmax.options().dtype(at::kByte)),
          at::empty_symint({(blocks + 255) / 256}, absmax.options()),
          at::empty_symint(c10::SymIntArrayRef{}, absmax.options())};
}

Tensor dequantize(const Tensor& packed, const Tensor& absmax, c10::SymInt rows, c10::SymInt in, at::ScalarType dtype,
                  int64_t blocksize, const OptionalTensor& nested_absmax, double nested_offset, int64_t nested_blocksize) {
  static const Tensor map = *nf4_quant_map(), nested_map = *nf4_nested_quant_map();
  const Tensor none, flat = packed.reshape({-1}), nested = nested_absmax.value_or(none);
  const Tensor quant_map = map.to(packed.device());
  const Tensor nested_quant_map = nested.defined() ? nested_map.to(packed.device()) : none;
  const int64_t r = rows.expect_int(), c = in.expect_int();
  const Tensor w = at::empty({r, c}, packed.options().dtype(dtype));
  nf4_dequantize(
      Nf4View{r, c, flat, quant_map, absmax, blocksize, nested, nested_quant_map, nested_offset, nested_blocksize}, w);
  return w;
}

Tensor dequantize_meta(const Tensor& packed, const Tensor&, c10::SymInt rows, c10::SymInt in, at::ScalarType dtype, int64_t,
                       const OptionalTensor&, double, int64_t) {
  return at::empty_symint({rows, in}, packed.options().dtype(dtype));
}

void load(c10::string_view path) { load_kernels(std::string(path)); }

TORCH_LIBRARY(ferrotune, m) {
  m.def("rms_norm(Tensor x, Tensor weight, float eps=1e-6, float offset=0.0) -> Tensor");
  m.def("_rms_norm_forward(Tensor x, Tensor weight, float eps, float offset) -> (Tensor, Tensor)");
  m.def("_rms_norm_backward(Tensor dy, Tensor x, Tensor weight, Tensor rstd, float offset, bool need_dw) -> (Tensor, Tensor)");
  m.def("rope(Tensor x, Tensor cos, Tensor sin, bool inverse=False) -> Tensor");
  m.def("swiglu(Tensor gate_up, str activation=\"silu\") -> Tensor");
  m.def("_swiglu_backward(Tensor dy, Tensor gate_up, str activation) -> Tensor");
  m.def("lora_linear(Tensor x, Tensor weight, Tensor? bias, Tensor lora_A, Tensor lora_B, float scale) -> Tensor");
  m.def("_lora_linear_forward(Tensor x, Tensor weight, Tensor? bias, Tensor lora_A, Tensor lora_B, float scale) -> (Tensor, Tensor)");
  m.def(
      "_lora_linear_backward(Tensor dy, Tensor x, Tensor z, Tensor weight, Tensor? bias, Tensor lora_A, Tensor lora_B, "
      "float scale, bool[5] wanted) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("linear_cross_entropy(Tensor hidden, Tensor weight, Tensor labels, float softcap=0.0) -> Tensor");
  m.def(
      "_linear_cross_entropy_forward(Tensor hidden, Tensor weight, Tensor labels, float softcap, bool need_dh, "
      "bool need_dw) -> (Tensor, Tensor, Tensor)");
  m.def("nf4_quantize(Tensor x) -> (Tensor packed, Tensor absmax)");
  m.def("nf4_nest(Tensor absmax) -> (Tensor index, Tensor nested_absmax, Tensor nested_offset)");
  m.def(
      "nf4_dequantize(Tensor packed, Tensor absmax, SymInt rows, SymInt in_features, ScalarType dtype, int blocksize=64, "
      "Tensor? nested_absmax=None, float nested_offset=0.0, int nested_blocksize=256) -> Tensor");
  m.def("load_kernels(str path) -> ()", load);
}

void implement(torch::Library& m) {
  m.impl("_rms_norm_forward", norm_forward);
  m.impl("_rms_norm_backward", norm_backward);
  m.impl("rope", turn);
  m.impl("swiglu", glu);
  m.impl("_swiglu_backward", glu_backward);
  m.impl("_lora_linear_forward", lora_forward);
  m.impl("_lora_linear_backward", lora_backward);
  m.impl("_linear_cross_entropy_forward", loss_forward);
  m.impl("nf4_quantize", quantize);
  m.impl("nf4_nest", nest);
  m.impl("nf4_dequantize", dequantize);
}

TORCH_LIBRARY_IMPL(ferrotune, CPU, m) { implement(m); }
TORCH_LIBRARY_IMPL(ferrotune, CUDA, m) { implement(m); }

TORCH_LIBRARY_IMPL(ferrotune, Meta, m) {
  m.impl("_rms_norm_forward", norm_forward_meta);
  m.impl("_rms_norm_backward", norm_backward_meta);
  m.impl("rope", turn_meta);
  m.impl("swiglu", glu_meta);
  m.impl("_swiglu_backward", glu_backward_meta);
  m.impl("_lora_linear_forward", lora_forward_meta);
  m.impl("_lora_linear_backward", lora_backward_meta);
  m.impl("_linear_cross_entropy_forward", loss_forward_meta);
  m.impl("nf4_quantize", quantize_meta);
  m.impl("nf4_nest", nest_meta);
  m.impl("nf4_dequantize", dequantize_meta);
}

// Where nothing is differentiated: the forward alone, on any device.
TORCH_LIBRARY_IMPL(ferrotune, CompositeExplicitAutograd, m) {
  m.impl("rms_norm", norm);
  m.impl("lora_linear", lora);
  m.impl("linear_cross_entropy", loss);
}

TORCH_LIBRARY_IMPL(ferrotune, Autograd, m) {
  m.impl("rms_norm", norm_autograd);
  m.impl("rope", turn_autograd);
  m.impl("swiglu", glu_autograd);
  m.impl("lora_linear", lora_autograd);
  m.impl("linear_cross_entropy", loss_autograd);
}

}  // namespace python
}  // namespace ferrotune
