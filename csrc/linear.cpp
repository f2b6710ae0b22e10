#include "ferrotune/csrc/linear.h"

#include "ferrotune/csrc/cpu.h"
#include "ferrotune/csrc/few_rows.h"
#include "ferrotune/csrc/lora.h"
#include "ferrotune/csrc/node.h"
#include "ferrotune/csrc/rows.h"
#include "ferrotune/src/ffi.rs.h"

namespace ferrotune {

using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;

Linear::Linear(const LinearView& view) : weight(view.weight), fp8(view.fp8), bias(view.bias), a_cast(view.a_cast) {
  for (const PartView& part : view.parts) {
    parts.push_back({part.rows, part.lora_a, part.lora_b, part.scale, part.dropout, part.dropout_key,
                     part.b_cast});
  }
  for (const LoraRowsView& lora : view.lora_rows) {
    TORCH_CHECK(lora.part >= 0 && lora.part < static_cast<int64_t>(parts.size()), "linear: LoRA on part ", lora.part, " of ",
                parts.size());
    lora_rows.push_back({lora.first, lora.rows, lora.part, lora.lora_a, lora.lora_b, lora.scale});
  }
  if (weight.defined() || fp8.defined()) return;
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

Linear::Linear(const Nf4& matrix) : part_weights(c10::make_intrusive<PartWeights>()) {
  part_weights->parts.emplace_back(matrix);
  part_weights->rows = matrix.rows;
  part_weights->in = matrix.in;
}

Tensor PartWeights::joined(at::ScalarType dtype, int64_t tail, int64_t below) const {
  const Nf4* first = std::get_if<Nf4>(&parts[0]);
  const Tensor& any = first ? first->packed : std::get<Tensor>(parts[0]);
  const Tensor wide = at::empty({rows + below, in + tail}, any.options().dtype(dtype)), whole = wide.narrow(1, 0, in);
  std::vector<const Nf4*> together;
  for (const auto& part : parts) {
    if (const Nf4* nf4 = std::get_if<Nf4>(&part)) together.push_back(nf4);
  }
  if (together.size() == parts.size()) {
    dequantize_into(together, whole.narrow(0, 0, rows));
    return wide;
  }
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
  return wide;
}

int64_t Linear::first_row(int64_t part) const {
  int64_t row = 0;
  for (int64_t p = 0; p < part; ++p) row += parts[p].rows;
  return row;
}

void Linear::visit(std::vector<Tensor*>& tensors) {
  tensors.push_back(&weight);
  tensors.push_back(&bias);
  for (Lora& part : parts) {
    tensors.push_back(&part.a);
    tensors.push_back(&part.b);
  }
}

void Linear::dequantize(at::ScalarType dtype, int64_t tail) {
  if (!part_weights) return;
  weight = part_weights->joined(dtype, tail, tail).narrow(0, 0, rows()).narrow(1, 0, part_weights->in);
  part_weights.reset();
}

bool Linear::needs_input() const {
  return (weight.defined() && weight.requires_grad()) || std::any_of(parts.begin(), parts.end(), [](const Lora& part) { return part.a.defined(); });
}

namespace {

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

Tensor dropped(const Tensor& x, const Lora& part) {
  return part.dropout > 0 ? dropout(x, part.dropout, part.key) : x;
}

// f32 on the CPU with more rows than the sides of W: the products with W + sum_p s_p B_p A_p [rows, in] take the place of
// those with W, and Y += Z B^T and dX += G A fall away, which saves N (rows + in) R multiply-adds for 2 rows in R more (once
// in the forward, once in the backward). Not in 16 bits, where the sum would round the update off.
bool merging_pays(const Tensor& rows, const Tensor& w, const LoraParts& lora) {
  return !lora.places.empty() && !lora.drops && cpu_kernels_for(rows) != nullptr && cpu_kernels_for(w) != nullptr &&
         2 * w.size(0) * w.size(1) < rows.size(0) * (w.size(0) + w.size(1));
}

// Z = [dropout(X) A_p^T], [N, rank]; undefined without LoRA.
Tensor lora_z(const Tensor& x, const LoraParts& lora) {
  if (lora.places.empty()) return {};
  if (!lora.drops) return product(x, lora.a.t());
  Tensor z = at::empty({x.size(0), lora.rank}, x.options());
  for (const auto& [part, row, column, rank] : lora.places) {
    product_into(z.narrow(1, column, rank), dropped(x, *part), lora.a.narrow(0, column, rank).t(), 1, false);
  }
  return z;
}

Tensor merged(const Tensor& w, const LoraParts& lora) {
  const Tensor sum = at::empty(w.sizes(), w.options()).copy_(w);
  for (const auto& [part, row, column, rank] : lora.places) {
    product_into(sum.narrow(0, row, part->rows), part->b, lora.a.narrow(0, column, rank), part->scale, true);
  }
  return sum;
}

// Columns behind the operands of a product in e4m3 for LoRA; 0 where it does not ride in it.
int64_t fp8_tail(const Tensor& x, const Linear& l) {
  if (kernels_for(x) == nullptr || x.scalar_type() != at::kBFloat16) return 0;
  int64_t rank = 0, count = 0;
  for (const Lora& part : l.parts) {
    if (part.dropout > 0) return 0;
    if (!part.a.defined()) continue;
    rank += part.a.size(0);
    ++count;
  }
  const int64_t tail = fp8_room(rank), room = l.fp8.by_rows.size(1) - l.fp8.in();
  return count <= static_cast<int64_t>(std::size(KernelFp8Lora{}.parts)) && tail <= room ? tail : 0;
}

}  // namespace

Fp8Rows linear_fp8_rows(const Tensor& like, const Linear& l, int64_t columns) {
  if (!l.fp8.defined() || kernels_for(like) == nullptr || like.scalar_type() != at::kBFloat16) return {};
  return fp8_rows_like(like, columns, fp8_tail(like, l));
}

Tensor linear_forward(const Tensor& x, const Linear& l, Tensor* z_out, Fp8Rows rows) {
  TORCH_CHECK(x.dim() == 2 && (!l.weight.defined() || l.weight.dim() == 2) && x.size(1) == l.in(), "linear: x is ", x.sizes(),
              ", weight is [", l.rows(), ", ", l.in(), "], expected [N, in] and [rows, in]");
  if (z_out == nullptr && is_rows(x) && rows_fit_linear(x, l)) return rows_linear(x, l);
  const auto dtype = x.scalar_type();
  if (z_out == nullptr) {
    if (const Tensor y = inference_linear(x, l); y.defined()) return y;
  }
  const LoraParts lora(l, dtype);
  Tensor y, z;
  bool has_lora = false;  // y, already
  if (l.fp8.defined()) {
    z = lora_z(x, lora);
    has_lora = fp8_tail(x, l) > 0;
    y = fp8_forward(x, l.fp8, l.bias, lora, has_lora ? z : Tensor(), std::move(rows));
  } else {
    Tensor w = l.dense(dtype);
    has_lora = merging_pays(x, w, lora);
    if (z_out != nullptr || !has_lora) z = lora_z(x, lora);
    if (has_lora) w = merged(w, lora);
    y = cpu_kernels_for(x) == nullptr && l.bias.defined() ? at::addmm(l.bias.to(dtype), x, w.t()) : product(x, w.t());
    if (cpu_kernels_for(x) != nullptr && l.bias.defined()) y.add_(l.bias);
  }
  for (const auto& [part, row, column, rank] : lora.places) {
    if (has_lora) break;
    product_into(y.narrow(1, row, part->rows), z.narrow(1, column, rank), part->b_in(dtype).t(), part->scale, true);
  }
  add_lora_rows(y, x, l);
  if (z_out != nullptr) *z_out = z;
  return y;
}

namespace {

// What LoRA adds to rows first .. first + rows.
struct RowsSum {
  int64_t first, rows;
  LoraSum sum;

  void add_to(const Tensor& y, const Tensor& residual = {}) { sum.add_to(y.narrow(0, first, rows), residual); }
};

// Of lora_rows, those of one adapter together, which stand beside each other.
void push_row_sums(std::vector<RowsSum>& sums, const Tensor& x, const Linear& l) {
  for (auto lora = l.lora_rows.begin(); lora != l.lora_rows.end();) {
    const int64_t first = lora->first, rows = lora->rows;
    std::vector<LoraAddend> addends;
    for (; lora != l.lora_rows.end() && lora->first == first && lora->rows == rows; ++lora) {
      addends.push_back({l.first_row(lora->part), lora->a, lora->b, lora->scale});
    }
    sums.push_back({first, rows, LoraSum(x.narrow(0, first, rows), std::move(addends))});
  }
}

}  // namespace

void add_lora_rows(const Tensor& y, const Tensor& x, const Linear& l) {
  std::vector<RowsSum> sums;
  push_row_sums(sums, x, l);
  for (RowsSum& some : sums) some.add_to(y);
}

Tensor inference_linear(const Tensor& x, const Linear& l, const Tensor& residual) {
  const auto dtype = x.scalar_type();
  const LoraPlaces own(l);
  if (kernels_for(x) == nullptr || dtype == at::kFloat || l.fp8.defined() || own.drops) return {};
  std::vector<RowsSum> sums;
  if (!own.places.empty()) {
    std::vector<LoraAddend> addends;
    for (const auto& [part, row, column, rank] : own.places) addends.push_back({row, part->a, part->b, part->scale});
    sums.push_back({0, x.size(0), LoraSum(x, std::move(addends))});
  }
  push_row_sums(sums, x, l);
  const Tensor w = l.dense(dtype), y = l.bias.defined() ? at::addmm(l.bias.to(dtype), x, w.t()) : product(x, w.t());
  const bool one = sums.size() == 1 && sums[0].rows == x.size(0);
  for (RowsSum& some : sums) some.add_to(y, one ? residual : Tensor());
  return residual.defined() && !one ? residual + y : y;
}

int64_t linear_tail(const Tensor& x, const Linear& l) {
  constexpr int64_t kMultiple = 64;  // what the kernels of cuBLAS take of the inner dimension at once
  if (kernels_for(x) == nullptr || x.scalar_type() == at::kFloat || l.fp8.defined()) return 0;
  int64_t rank = 0;
  for (const Lora& part : l.parts) {
    if (part.dropout > 0) return 0;
    if (!part.a.defined()) continue;
    if (part.b.scalar_type() != at::kFloat && part.b.scalar_type() != x.scalar_type()) return 0;
    rank += part.a.size(0);
  }
  const int64_t tail = (rank + kMultiple - 1) / kMultiple * kMultiple;
  const bool room = l.part_weights || (!l.weight.requires_grad() && l.weight.scalar_type() == x.scalar_type() &&
                                       l.weight.stride(0) >= l.in() + tail);
  return room ? tail : 0;
}

namespace {

// [W | scale B] for x in rows [N, in + tail], whose tail is written, and before it x by `make`.
Tensor weight_with_tail(const Tensor& x, const Linear& l, Tensor* z_out, const MakeInput& make) {
  const auto dtype = x.scalar_type();
  const int64_t in = l.in(), tail = x.size(1) - in;
  const LoraPlaces lora(l);
  const Tensor z = x.narrow(1, in, lora.rank);
  const Tensor w = l.part_weights ? l.part_weights->joined(dtype, tail)
                                  : l.weight.as_strided({l.rows(), in + tail}, {l.weight.stride(0), 1});
  const Tensor own = x.narrow(1, 0, in);
  const LoraFold fold(own, x.narrow(1, in, tail), w.narrow(1, in, tail), lora);
  const bool made_folded = make && make(fold);
  if (!made_folded && !lora_fold(own, fold)) {
    product_into(z, own, LoraParts(l, dtype).a.t(), 1, false);
    lora_fill_columns(x.narrow(1, in, tail), w.narrow(1, in, tail), lora);
  }
  if (z_out != nullptr) *z_out = z;
  return w;
}

}  // namespace

Tensor linear_with_tail(const Tensor& x, const Linear& l, Tensor* z_out, int64_t room, const MakeInput& make) {
  const Tensor w = weight_with_tail(x, l, z_out, make);
  Tensor y = at::empty({x.size(0), l.rows() + room}, x.options()).narrow(1, 0, l.rows());
  return l.bias.defined() ? at::addmm_out(y, l.bias.to(x.scalar_type()), x, w.t()) : at::mm_out(y, x, w.t());
}

bool linear_adds(const Tensor& x, const Linear& l) {
  return kernels_for(x) != nullptr && x.scalar_type() != at::kFloat && !l.fp8.defined() && !l.bias.defined() && l.lora_rows.empty() &&
         (LoraPlaces(l).places.empty() || linear_tail(x, l) > 0);
}

Tensor linear_onto(const Tensor& y, const Tensor& x, const Linear& l) {
  const Tensor w = x.size(1) > l.in() ? weight_with_tail(x, l, nullptr, {}) : l.dense(x.scalar_type());
  return y.addmm_(x, w.t());
}

Tensor linear_z(const Tensor& x, const Linear& l) { return lora_z(x, LoraParts(l, x.scalar_type())); }

int64_t linear_gradient_tail(const Tensor& dy, const Linear& l) {
  const int64_t tail = linear_tail(dy, l);
  if (l.part_weights || tail == 0) return tail;
  const int64_t row_bytes = l.weight.stride(0) * l.weight.element_size();
  const int64_t rows = static_cast<int64_t>(l.weight.storage().nbytes()) / row_bytes;
  return l.weight.storage_offset() == 0 && rows >= l.rows() + tail ? tail : 0;
}

// With s_p the scale, G_p = s_p dY_p B_p [N, R_p], Z_p = X_p A_p^T [N, R_p] and X_p = dropout(X), a linear map:
//   dX   = dY W + sum_p dropout(G_p A_p)
//   dA_p = G_p^T X_p        dB_p = s_p dY_p^T Z_p
//   dW   = dY^T X           dbias = sum_n dY           (only where they train)
Tensor linear_backward(const Tensor& given, Tensor x, const Tensor& z, const Linear& l, bool need_dx, Tensor* grads,
                       int64_t tail, Fp8Rows dy_rows) {
  const Tensor dy = given.stride(1) == 1 ? given : given.contiguous();
  const auto dtype = dy.scalar_type();
  const LoraParts lora(l, dtype);
  const int64_t n = dy.size(0), rows = l.rows();
  Tensor* const lora_grads = grads + 2;
  Tensor wide, g;  // [dY | G]
  if (!lora.places.empty()) {
    if (tail > 0) wide = dy.as_strided({n, rows + tail}, {dy.stride(0), 1});
    const Tensor room = tail > 0 ? wide.narrow(1, rows, tail) : at::empty({n, lora.rank}, dy.options());
    const std::vector<Tensor> db = lora_gradients(dy, z, lora, room);
    for (size_t p = 0; p < db.size(); ++p) lora_grads[2 * (lora.places[p].lora - l.parts.data()) + 1] = db[p];
    g = room.narrow(1, 0, lora.rank);
  }
  Tensor da;
  if (!lora.places.empty() && !lora.drops) da = weight_gradient(g.t(), x, 1, lora.places[0].lora->a.scalar_type());
  for (const auto& [part, row, column, rank] : lora.places) {
    if (!part->a.requires_grad()) continue;
    lora_grads[2 * (part - l.parts.data())] =
        lora.drops ? weight_gradient(g.narrow(1, column, rank).t(), dropped(x, *part), 1, part->a.scalar_type())
                   : da.narrow(0, column, rank);
  }
  if (l.weight.defined() && l.weight.requires_grad()) grads[0] = weight_gradient(dy.t(), x, 1, l.weight.scalar_type());
  if (l.bias.defined() && l.bias.requires_grad()) grads[1] = dy.sum(0).to(l.bias.scalar_type());
  if (!need_dx) return {};
  x = Tensor();

  if (wide.defined()) {
    const Tensor w = l.part_weights ? l.part_weights->joined(dtype, 0, tail)
                                    : l.weight.as_strided({rows + tail, l.in()}, {l.weight.stride(0), 1});
    lora_fill_rows(w.narrow(0, rows, tail), lora);
    return at::mm(wide, w);
  }
  Tensor dx;
  if (l.fp8.defined()) {
    const int64_t room = fp8_tail(dy, l);
    // Made by a block that did not know this one.
    if (dy_rows.defined() && dy_rows.bytes.size(1) < rows + room) dy_rows = {};
    dx = fp8_backward(dy, l.fp8, lora, room > 0 ? g : Tensor(), std::move(dy_rows));
    if (room > 0) return dx;
  } else {
    const Tensor w = l.dense(dtype);
    if (merging_pays(dy, w, lora)) return product(dy, merged(w, lora));
    dx = product(dy, w);
  }
  if (lora.drops) {
    for (const auto& [part, row, column, rank] : lora.places) {
      dx.add_(dropped(product(g.narrow(1, column, rank), part->a.to(dtype)), *part));
    }
  } else if (!lora.places.empty()) {
    product_into(dx, g, lora.a, 1, true);
  }
  return dx;
}

namespace {

struct LinearNode : Function<LinearNode> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, at::TensorList, const Linear& l) {
    Tensor z;
    const Tensor y = linear_forward(x, l, &z);
    ctx->save_for_backward({l.needs_input() ? x : Tensor(), z});
    ctx->saved_data["linear"] = hold(l);
    return y;
  }

  static variable_list backward(AutogradContext* ctx, variable_list dy) {
    const variable_list saved = ctx->get_saved_variables();
    Linear l = held<Linear>(ctx->saved_data["linear"]);
    std::vector<Tensor*> weights;
    l.visit(weights);
    std::vector<Tensor> grads(weights.size());
    variable_list result{linear_backward(dy[0], saved[0], saved[1], l, ctx->needs_input_grad(0), grads.data())};
    for (size_t i = 0; i < weights.size(); ++i) {
      if (weights[i]->defined()) result.push_back(grads[i]);
    }
    result.emplace_back();  // l
    return result;
  }
};

}  // namespace

Tensor linear(const Tensor& x, const Linear& given) {
  if (!at::GradMode::is_enabled()) return is_few_rows(x) ? few_rows_linear(x, given) : linear_forward(x, given, nullptr);
  Linear l = given;
  std::vector<Tensor*> weights;
  l.visit(weights);
  TensorList inputs;
  for (const Tensor* weight : weights) {
    if (weight->defined()) inputs.push_back(*weight);
  }
  return LinearNode::apply(x, at::TensorList(inputs), given);
}

std::unique_ptr<Tensor> op_linear(const Tensor& x, const LinearView& view) {
  return std::make_unique<Tensor>(linear(x, Linear(view)));
}

}  // namespace ferrotune
