#include "ferrotune/csrc/lora.h"

#include "ferrotune/csrc/cpu.h"
#include "ferrotune/csrc/kernels.h"

namespace ferrotune {

LoraPlaces::LoraPlaces(const Linear& l) {
  int64_t row = 0;
  for (const Lora& part : l.parts) {
    if (part.a.defined()) {
      places.push_back({&part, row, rank, part.a.size(0)});
      rank += part.a.size(0);
      drops |= part.dropout > 0;
    }
    row += part.rows;
  }
}

LoraParts::LoraParts(const Linear& l, at::ScalarType dtype) : LoraPlaces(l) {
  TensorList as;
  for (const Place& place : places) as.push_back(place.lora->a);
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

// lora_z's operands; none where the kernel cannot.
std::optional<KernelLoraAdd> z_operands(const Tensor& x, const std::vector<LoraAddend>& addends) {
  const Kernels* kernels = kernels_for(x);
  if (kernels == nullptr || x.scalar_type() == at::kFloat || addends.empty() || addends.size() > kMostParts || x.stride(1) != 1) return std::nullopt;
  KernelLoraAdd lora{};
  lora.count = static_cast<int64_t>(addends.size());
  lora.N = x.size(0);
  lora.K = x.size(1);
  lora.x_stride = lora.N == 1 ? lora.K : x.stride(0);
  lora.x = x.mutable_data_ptr();
  lora.dtype = kernel_dtype(x);
  for (size_t p = 0; p < addends.size(); ++p) {
    const auto& [row, a, b, scale] = addends[p];
    const bool f32 = a.scalar_type() == at::kFloat;
    if (!a.is_contiguous() || !b.is_contiguous() || a.scalar_type() != b.scalar_type() || (!f32 && a.scalar_type() != x.scalar_type())) return std::nullopt;
    lora.parts[p] = {a.const_data_ptr(), b.const_data_ptr(), row, b.size(0), lora.z_stride, a.size(0), static_cast<float>(scale), f32};
    lora.z_stride += a.size(0);
  }
  return kernels->lora_z_fits(&lora) ? std::optional(lora) : std::nullopt;
}

}  // namespace

LoraSum::LoraSum(Tensor given, std::vector<LoraAddend> all) : x(std::move(given)), addends(std::move(all)), operands(z_operands(x, addends)) {
  if (!operands) return;
  const Launch launch(x);
  z = at::empty({operands->N, operands->z_stride}, x.options());
  operands->z = z.mutable_data_ptr();
  check_launch(kernels_for(x)->lora_z(&*operands, nullptr, 0, launch.stream()), "lora_z");
}

bool LoraSum::launched(const Tensor& y) {
  if (!operands || y.stride(1) != 1) return false;
  const Kernels& kernels = *kernels_for(x);
  const Launch launch(x);
  operands->y = y.mutable_data_ptr();
  operands->y_stride = y.stride(0);
  if (!kernels.lora_add_fits(&*operands)) return false;
  check_launch(kernels.lora_add(&*operands, launch.stream()), "lora_add");
  return true;
}

void LoraSum::add_to(const Tensor& y, const Tensor& residual) {
  // The kernel reaches no columns but those that have LoRA.
  int64_t columns = 0;
  for (const LoraAddend& addend : addends) columns += addend.b.size(0);
  const bool all = columns == y.size(1) && residual.defined() && residual.stride(1) == 1;
  if (operands && all) {
    operands->residual = residual.const_data_ptr();
    operands->residual_stride = residual.stride(0);
  }
  if (!(residual.defined() && !all) && launched(y)) return;
  const auto dtype = x.scalar_type();
  for (const auto& [row, a, b, scale] : addends) {
    product_into(y.narrow(1, row, b.size(0)), product(x, a.to(dtype).t()), b.to(dtype).t(), scale, true);
  }
  if (residual.defined()) y.add_(residual);
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

namespace {

// sB of each part in its columns of what stands behind W, zero around it, and behind Z; `bs` keeps copies for as long as they are read.
std::vector<KernelFill> column_fills(const Tensor& behind_x, const Tensor& behind_w, const LoraPlaces& lora, TensorList& bs) {
  std::vector<KernelFill> matrices;
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
  return matrices;
}

}  // namespace

void lora_fill_columns(const Tensor& behind_x, const Tensor& behind_w, const LoraPlaces& lora) {
  TensorList bs;
  fill_all(behind_w, column_fills(behind_x, behind_w, lora, bs));
}

LoraFold::LoraFold(const Tensor& x, const Tensor& behind_x, const Tensor& behind_w, const LoraPlaces& lora) {
  // More rows pay cuBLAS.
  constexpr int64_t kMostRows = 512;
  if (x.size(0) > kMostRows || x.size(0) < 2 || lora.drops || !in_16_byte_rows(behind_x) || !in_16_byte_rows(behind_w)) return;
  std::vector<LoraAddend> addends;
  for (const auto& [part, row, column, rank] : lora.places) addends.push_back({row, part->a, part->b, 1});
  z = z_operands(x, addends);
  if (!z) return;
  fills = column_fills(behind_x, behind_w, lora, bs);
  z->z = behind_x.mutable_data_ptr();
  z->z_stride = behind_x.stride(0);
}

bool lora_fold(const Tensor& x, const LoraFold& fold) {
  if (!fold.z) return false;
  const Launch launch(x);
  check_launch(kernels_for(x)->lora_z(&*fold.z, fold.fills.data(), fold.count(), launch.stream()), "lora_z");
  return true;
}

void lora_fill_rows(const Tensor& below_w, const LoraParts& lora) {
  const Tensor a = lora.a.contiguous();
  fill_all(below_w, {filled(below_w, a, 0, 1)});
}

}  // namespace ferrotune
