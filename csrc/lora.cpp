#include "ferrotune/csrc/lora.h"

#include "ferrotune/csrc/cpu.h"
#include "ferrotune/csrc/kernels.h"

namespace ferrotune {

LoraParts::LoraParts(const Linear& l, at::ScalarType dtype) {
  TensorList as;
  int64_t row = 0;
  for (const Lora& part : l.parts) {
    if (part.a.defined()) {
      places.push_back({&part, row, rank, part.a.size(0)});
      as.push_back(part.a);
      rank += part.a.size(0);
      drops |= part.dropout > 0;
    }
    row += part.rows;
  }
  if (as.empty()) return;
  const bool made = l.a_cast.defined() && l.a_cast.scalar_type() == dtype;
  a = made ? l.a_cast : (as.size() == 1 ? as[0] : at::cat(as, 0)).to(dtype);
}

Tensor weight_gradient(const Tensor& a, const Tensor& b, double alpha, at::ScalarType type) {
  const auto dtype = a.scalar_type();
  const bool wide = a.is_cuda() && type == at::kFloat && (dtype == at::kBFloat16 || dtype == at::kHalf);
  Tensor out = at::empty({a.size(0), b.size(1)}, a.options().dtype(wide ? type : dtype));
  if (wide) {
    at::addmm_out(out, out, a, b, type, 0, alpha);
    return out;
  }
  product_into(out, a, b, alpha, false);
  return out.to(type);
}

namespace {

constexpr size_t kMostParts = std::size(KernelLora{}.parts);

bool in_16_byte_rows(const Tensor& x) {
  const int64_t elements = 16 / x.element_size();
  return x.stride(1) == 1 && x.stride(0) % elements == 0 && reinterpret_cast<uintptr_t>(x.const_data_ptr()) % 16 == 0;
}

// Whether the kernel takes these shapes. It was measured for ranks up to 32; beyond, cuBLAS is faster.
bool kernel_takes(const Tensor& dy, const Tensor& z, const LoraParts& lora, const Tensor& g, const std::vector<Tensor>& db) {
  if (kernels_for(dy) == nullptr || dy.scalar_type() == at::kFloat || lora.places.size() > kMostParts) return false;
  if (!in_16_byte_rows(dy) || !in_16_byte_rows(z) || !in_16_byte_rows(g)) return false;
  for (size_t p = 0; p < db.size(); ++p) {
    const LoraParts::Place& place = lora.places[p];
    const bool fits = place.rank <= 32 && place.rank % 8 == 0 && place.row % 8 == 0 && place.lora->rows % 8 == 0;
    if (!fits || !db[p].defined() || db[p].scalar_type() != at::kFloat || !db[p].is_contiguous()) return false;
  }
  return true;
}

// False where this GPU cannot.
bool gradients_by_kernel(const Tensor& dy, const Tensor& z, const LoraParts& lora, const Tensor& g,
                         const std::vector<Tensor>& db) {
  const Kernels& kernels = *kernels_for(dy);
  const Launch launch(dy);
  KernelLora operands{};
  operands.count = static_cast<int64_t>(lora.places.size());
  operands.N = dy.size(0);
  operands.dy_stride = dy.stride(0);
  operands.z_stride = z.stride(0);
  operands.g_stride = g.stride(0);
  operands.zeros = g.size(1) - lora.rank;
  operands.dtype = kernel_dtype(dy);
  std::vector<Tensor> bs;
  for (size_t p = 0; p < lora.places.size(); ++p) {
    const auto& [part, row, column, rank] = lora.places[p];
    bs.push_back(part->b_in(dy.scalar_type()).contiguous());
    operands.parts[p] = {dy.narrow(1, row, part->rows).const_data_ptr(),
                         bs.back().const_data_ptr(),
                         z.narrow(1, column, rank).const_data_ptr(),
                         g.narrow(1, column, rank).mutable_data_ptr(),
                         db[p].mutable_data_ptr<float>(),
                         part->rows,
                         rank,
                         static_cast<float>(part->scale)};
  }
  const int64_t floats = kernels.lora_gradients_workspace(&operands);
  if (floats == 0) return false;
  const Tensor workspace = at::empty({floats}, dy.options().dtype(at::kFloat));
  check_launch(kernels.lora_gradients(&operands, workspace.mutable_data_ptr<float>(), launch.stream()), "lora_gradients");
  return true;
}

// What KernelFill says, of `to` [rows, columns].
KernelFill filled(const Tensor& to, const Tensor& from, int64_t first, double scale) {
  KernelFill matrix{};
  matrix.to = to.mutable_data_ptr();
  matrix.rows = to.size(0);
  matrix.columns = to.size(1);
  matrix.to_stride = to.stride(0);
  if (!from.defined()) return matrix;
  matrix.from = from.const_data_ptr();
  matrix.from_rows = from.size(0);
  matrix.from_columns = from.size(1);
  matrix.first = first;
  matrix.scale = static_cast<float>(scale);
  matrix.from_f32 = from.scalar_type() == at::kFloat && to.scalar_type() != at::kFloat;
  return matrix;
}

void fill_all(const Tensor& like, const std::vector<KernelFill>& matrices) {
  const Launch launch(like);
  check_launch(kernels_for(like)->fill(matrices.data(), static_cast<int64_t>(matrices.size()), kernel_dtype(like), launch.stream()),
               "fill");
}

// Below each other and beside each other, as add_lora says: [rank, in] and [rows, rank] of the columns that y has from the first to the last.
struct Stacked {
  int64_t row, rows;
  Tensor a, b;
};

// None where one launch cannot make them.
std::optional<Stacked> stacked(const Tensor& x, const std::vector<LoraAddend>& addends) {
  if (kernels_for(x) == nullptr || x.scalar_type() == at::kFloat) return std::nullopt;
  const LoraAddend& last = addends.back();
  const int64_t first_row = addends.front().row, rows = last.row + last.b.size(0) - first_row;
  int64_t rank = 0;
  for (const LoraAddend& addend : addends) {
    for (const Tensor* t : {&addend.a, &addend.b}) {
      if (!t->is_contiguous() || (t->scalar_type() != at::kFloat && t->scalar_type() != x.scalar_type())) return std::nullopt;
    }
    rank += addend.a.size(0);
  }
  const Stacked to{first_row, rows, at::empty({rank, x.size(1)}, x.options()), at::empty({rows, rank}, x.options())};
  std::vector<KernelFill> matrices;
  int64_t row = 0, column = 0;
  for (const LoraAddend& addend : addends) {
    const int64_t own_row = addend.row - first_row, own_rank = addend.a.size(0);
    if (own_row > row) matrices.push_back(filled(to.b.narrow(0, row, own_row - row), {}, 0, 0));
    row = own_row + addend.b.size(0);
    matrices.push_back(filled(to.a.narrow(0, column, own_rank), addend.a, 0, 1));
    matrices.push_back(filled(to.b.narrow(0, own_row, addend.b.size(0)), addend.b, column, addend.scale));
    column += own_rank;
  }
  if (matrices.size() > KERNEL_MOST_FILLS) return std::nullopt;
  fill_all(x, matrices);
  return to;
}

}  // namespace

void add_lora(const Tensor& y, const Tensor& x, const std::vector<LoraAddend>& addends) {
  if (addends.empty()) return;
  if (const std::optional<Stacked> all = stacked(x, addends)) {
    product_into(y.narrow(1, all->row, all->rows), product(x, all->a.t()), all->b.t(), 1, true);
    return;
  }
  const auto dtype = x.scalar_type();
  for (const auto& [row, a, b, scale] : addends) {
    product_into(y.narrow(1, row, b.size(0)), product(x, a.to(dtype).t()), b.to(dtype).t(), scale, true);
  }
}

void lora_gradients_into(const Tensor& dy, const Tensor& z, const LoraParts& lora, const Tensor& g,
                         const std::vector<Tensor>& db) {
  if (kernel_takes(dy, z, lora, g, db) && gradients_by_kernel(dy, z, lora, g, db)) return;
  for (size_t p = 0; p < lora.places.size(); ++p) {
    const auto& [part, row, column, rank] = lora.places[p];
    const Tensor dy_p = dy.narrow(1, row, part->rows);
    product_into(g.narrow(1, column, rank), dy_p, part->b_in(dy.scalar_type()), part->scale, false);
    if (db[p].defined()) product_as(db[p], dy_p.t(), z.narrow(1, column, rank), part->scale, false);
  }
  if (g.size(1) > lora.rank) g.narrow(1, lora.rank, g.size(1) - lora.rank).zero_();
}

std::vector<Tensor> lora_gradients(const Tensor& dy, const Tensor& z, const LoraParts& lora, const Tensor& g) {
  std::vector<Tensor> db;
  for (const auto& [part, row, column, rank] : lora.places) {
    db.push_back(part->b.requires_grad() ? at::empty(part->b.sizes(), part->b.options().requires_grad(false)) : Tensor());
  }
  lora_gradients_into(dy, z, lora, g, db);
  return db;
}

void lora_fill_columns(const Tensor& behind_x, const Tensor& behind_w, const LoraParts& lora) {
  std::vector<KernelFill> matrices;
  std::vector<Tensor> bs;
  const int64_t tail = behind_w.size(1);
  matrices.push_back(filled(behind_x.narrow(1, lora.rank, tail - lora.rank), {}, 0, 0));
  int64_t row = 0;
  for (const auto& [part, first_row, column, rank] : lora.places) {
    if (first_row > row) matrices.push_back(filled(behind_w.narrow(0, row, first_row - row), {}, 0, 0));
    bs.push_back(part->b.contiguous());
    matrices.push_back(filled(behind_w.narrow(0, first_row, part->rows), bs.back(), column, part->scale));
    row = first_row + part->rows;
  }
  if (row < behind_w.size(0)) matrices.push_back(filled(behind_w.narrow(0, row, behind_w.size(0) - row), {}, 0, 0));
  fill_all(behind_w, matrices);
}

void lora_fill_rows(const Tensor& below_w, const LoraParts& lora) {
  const Tensor a = lora.a.contiguous();
  fill_all(below_w, {filled(below_w, a, 0, 1)});
}

}  // namespace ferrotune
