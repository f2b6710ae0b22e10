#include "ferrotune/csrc/linear.h"

#include "ferrotune/csrc/row.h"
#include "ferrotune/src/ffi.rs.h"

namespace ferrotune {

using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;

Linear::Linear(const LinearView& view) : weight(view.weight), bias(view.bias) {
  for (const PartView& part : view.parts) {
    parts.push_back({part.rows, part.lora_a, part.lora_b, part.scale, part.dropout, part.dropout_key});
  }
  if (weight.defined()) return;
  part_weights = c10::make_intrusive<PartWeights>();
  for (const PartView& part : view.parts) {
    if (part.dense.defined()) {
      part_weights->parts.emplace_back(part.dense);
      part_weights->in = part.dense.size(1);
    } else {
      part_weights->parts.emplace_back(Nf4(part.nf4));
      part_weights->in = part.nf4.in_features;
    }
    part_weights->rows += part.rows;
  }
}

Tensor PartWeights::joined(at::ScalarType dtype) const {
  const Nf4* first = std::get_if<Nf4>(&parts[0]);
  const Tensor& any = first ? first->packed : std::get<Tensor>(parts[0]);
  Tensor whole = at::empty({rows, in}, any.options().dtype(dtype));
  int64_t row = 0;
  for (const auto& part : parts) {
    if (const Nf4* nf4 = std::get_if<Nf4>(&part)) {
      dequantize_into(*nf4, whole.narrow(0, row, nf4->rows));
      row += nf4->rows;
    } else {
      const Tensor& dense = std::get<Tensor>(part);
      whole.narrow(0, row, dense.size(0)).copy_(dense);
      row += dense.size(0);
    }
  }
  return whole;
}

void Linear::visit(std::vector<Tensor*>& tensors) {
  tensors.push_back(&weight);
  tensors.push_back(&bias);
  for (Lora& part : parts) {
    tensors.push_back(&part.a);
    tensors.push_back(&part.b);
  }
}

namespace {

// The row layout of a Linear without its tensors: what the backward needs beside the saved ones.
struct Layout {
  std::vector<int64_t> row, rows, rank;  // of each part that has LoRA
  std::vector<double> scale;
};

using PartWeightsPtr = c10::intrusive_ptr<PartWeights>;

Tensor dense_weight(const Tensor& weight, const PartWeightsPtr& parts, at::ScalarType dtype) {
  return weight.defined() ? weight.to(dtype) : parts->joined(dtype);
}

// One node where autograd would record 4 to 6 a part.
//
// With s_p the scale, G_p = s_p dY_p B_p [N, R_p] and Z_p = X A_p^T [N, R_p]:
//   dX   = dY W + sum_p G_p A_p
//   dA_p = G_p^T X          dB_p = s_p dY_p^T Z_p
//   dW   = dY^T X           dbias = sum_n dY           (only where they train)
// The A_p lie below each other in one [sum R_p, in] matrix, so X is read once for all parts.
struct LoraLinear : Function<LoraLinear> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const std::optional<Tensor>& joined,
                        const std::optional<Tensor>& bias, at::TensorList a, at::TensorList b, const Layout& layout,
                        const PartWeightsPtr& part_weights) {
    const auto dtype = x.scalar_type();
    const Tensor weight = joined.value_or(Tensor());
    const Tensor w = dense_weight(weight, part_weights, dtype);
    Tensor y = bias.has_value() ? at::addmm(bias->to(dtype), x, w.t()) : at::mm(x, w.t());
    Tensor a_all, z;
    if (!a.empty()) {
      a_all = (a.size() == 1 ? a[0] : at::cat(a, 0)).to(dtype);
      z = at::mm(x, a_all.t());
      int64_t column = 0;
      for (size_t p = 0; p < a.size(); ++p) {
        y.narrow(1, layout.row[p], layout.rows[p])
            .addmm_(z.narrow(1, column, layout.rank[p]), b[p].to(dtype).t(), 1, layout.scale[p]);
        column += layout.rank[p];
      }
    }
    // X is kept only for gradients that need it: those of A, B and W.
    const bool need_x = !a.empty() || (weight.defined() && weight.requires_grad());
    variable_list saved{need_x ? x : Tensor(), weight, a_all, z};
    saved.insert(saved.end(), b.begin(), b.end());
    ctx->save_for_backward(saved);
    if (part_weights) ctx->saved_data["part_weights"] = c10::IValue::make_capsule(part_weights);
    ctx->saved_data["bias"] = bias.has_value();
    ctx->saved_data["row"] = layout.row;
    ctx->saved_data["rows"] = layout.rows;
    ctx->saved_data["rank"] = layout.rank;
    ctx->saved_data["scale"] = layout.scale;
    return y;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const variable_list saved = ctx->get_saved_variables();
    const Tensor &x = saved[0], &weight = saved[1], &a_all = saved[2], &z = saved[3];
    const auto row = ctx->saved_data["row"].toIntVector();
    const auto rows = ctx->saved_data["rows"].toIntVector();
    const auto rank = ctx->saved_data["rank"].toIntVector();
    const auto scale = ctx->saved_data["scale"].toDoubleVector();
    const size_t parts = row.size();
    const Tensor dy = grads[0].contiguous();
    const auto dtype = dy.scalar_type();

    Tensor g;
    if (parts > 0) g = at::empty({dy.size(0), a_all.size(0)}, dy.options());
    variable_list da(parts), db(parts);
    int64_t column = 0;
    for (size_t p = 0; p < parts; ++p) {
      const Tensor& b = saved[4 + p];
      const Tensor dy_p = dy.narrow(1, row[p], rows[p]);
      Tensor g_p = g.narrow(1, column, rank[p]);
      at::addmm_out(g_p, g_p, dy_p, b.to(dtype), 0, scale[p]);
      db[p] = at::mm(dy_p.t(), z.narrow(1, column, rank[p])).mul_(scale[p]).to(b.scalar_type());
      column += rank[p];
    }
    if (parts > 0) {
      const Tensor da_all = at::mm(g.t(), x);
      column = 0;
      for (size_t p = 0; p < parts; ++p) {
        da[p] = da_all.narrow(0, column, rank[p]).to(saved[4 + p].scalar_type());
        column += rank[p];
      }
    }
    Tensor dx, dw, dbias;
    if (ctx->needs_input_grad(0)) {
      PartWeightsPtr part_weights;
      if (!weight.defined()) {
        part_weights = c10::static_intrusive_pointer_cast<PartWeights>(ctx->saved_data["part_weights"].toCapsule());
      }
      dx = at::mm(dy, dense_weight(weight, part_weights, dtype));
      if (parts > 0) dx.addmm_(g, a_all);
    }
    // Absent inputs have no number.
    size_t input = 1;
    if (weight.defined() && ctx->needs_input_grad(input++)) dw = at::mm(dy.t(), x).to(weight.scalar_type());
    const bool has_bias = ctx->saved_data["bias"].toBool();
    if (has_bias && ctx->needs_input_grad(input)) dbias = dy.sum(0);  // autograd rounds it to the bias' dtype

    variable_list result{dx, dw, dbias};
    result.insert(result.end(), da.begin(), da.end());
    result.insert(result.end(), db.begin(), db.end());
    result.resize(result.size() + 2);  // layout, part_weights
    return result;
  }
};

// Element i is dropped where hash(key, i) / 2^32 < p: a function of the key alone, so that a recomputed, resumed or
// captured step draws the same mask. The hash is the 32-bit finaliser of MurmurHash3 on the low word of i + key.
Tensor dropout(const Tensor& x, double p, uint64_t key) {
  constexpr int64_t kMask = 0xffffffff;
  Tensor h = at::arange(x.numel(), x.options().dtype(at::kLong));
  h = h.mul_(0x9e3779b1).add_(static_cast<int64_t>(key & kMask)).bitwise_and_(kMask);
  const auto mix = [&](int shift, int64_t factor) {
    h = h.bitwise_xor_(h.bitwise_right_shift(shift)).mul_(factor).bitwise_and_(kMask);
  };
  mix(16, 0x85ebca6b);
  h = h.bitwise_xor_(static_cast<int64_t>(key >> 32));
  mix(13, 0xc2b2ae35);
  h = h.bitwise_xor_(h.bitwise_right_shift(16));
  const Tensor keep = h.ge_(static_cast<int64_t>(p * 4294967296.0)).view(x.sizes()).to(x.scalar_type());
  return x * keep.mul_(1.0 / (1.0 - p));
}

}  // namespace

Tensor linear(const Tensor& x, const Linear& l) {
  TORCH_CHECK(x.dim() == 2 && (l.part_weights || l.weight.dim() == 2) && x.size(1) == l.in(), "linear: x is ",
              x.sizes(), ", weight is [", l.rows(), ", ", l.in(), "], expected [N, in] and [rows, in]");
  if (is_row(x) && row_fits_linear(x, l)) return row_linear(x, l);
  // Autograd takes no undefined tensors, only absent ones.
  std::optional<Tensor> weight, bias;
  if (l.weight.defined()) weight = l.weight;
  if (l.bias.defined()) bias = l.bias;
  Layout layout;
  TensorList a, b;
  int64_t row = 0;
  bool drops = false;
  for (const Lora& part : l.parts) {
    if (part.a.defined()) {
      layout.row.push_back(row);
      layout.rows.push_back(part.rows);
      layout.rank.push_back(part.a.size(0));
      layout.scale.push_back(part.scale);
      a.push_back(part.a);
      b.push_back(part.b);
      drops |= part.dropout > 0;
    }
    row += part.rows;
  }
  if (!drops) {
    return LoraLinear::apply(x, weight, bias, at::TensorList(a), at::TensorList(b), layout, l.part_weights);
  }

  // Dropout gives every part an input of its own: plain ATen.
  Tensor y = LoraLinear::apply(x, weight, bias, at::TensorList(), at::TensorList(), Layout(), l.part_weights);
  TensorList deltas;
  for (const Lora& part : l.parts) {
    if (!part.a.defined()) {
      deltas.push_back(at::zeros({x.size(0), part.rows}, x.options()));
      continue;
    }
    const Tensor input = part.dropout > 0 ? dropout(x, part.dropout, part.key) : x;
    const Tensor z = at::mm(input, part.a.to(x.scalar_type()).t());
    deltas.push_back(at::mm(z, part.b.to(x.scalar_type()).t()) * part.scale);
  }
  return y + at::cat(deltas, 1);
}

std::unique_ptr<Tensor> op_linear(const Tensor& x, const LinearView& view) {
  return std::make_unique<Tensor>(linear(x, Linear(view)));
}

}  // namespace ferrotune
