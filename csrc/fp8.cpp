#include "ferrotune/csrc/fp8.h"

#include "ferrotune/csrc/cpu.h"
#include "ferrotune/csrc/lora.h"
#include "ferrotune/src/ffi.rs.h"

namespace ferrotune {

namespace {

constexpr auto kE4m3 = at::kFloat8_e4m3fn;

// Bits of head room of a row, and of a weight.
constexpr int kHeadRoom = 3, kWeightHeadRoom = 4;

// What Z and G are multiplied by, and B and A divided by, so that both are in the range of e4m3: Z and G up to 32 times the largest
// number of their row, B and A up to four times the largest weight. Beyond, the result is NaN.
constexpr double kFactor = 0.25;

// 2^e, f32, for e of -126 .. 127; a power function may round.
Tensor power_of_two(const Tensor& e) { return e.to(at::kInt).add(127).mul_(1 << 23).view(at::kFloat); }

// The least e of -126 .. with 2^room absmax <= 448 * 2^e, int32. frexp: absmax = f 2^k, f of [0.5, 1).
Tensor scale_exponent(const Tensor& absmax, int room) {
  const auto [f, k] = at::frexp(absmax);
  const Tensor e = k.to(at::kInt).add(room - 9).add(f.gt(0.875)).masked_fill(absmax.eq(0), -126);
  return e.clamp(-126, 126);
}

Tensor bytes_of(const Tensor& x, const Tensor& exponents) {
  return (x * power_of_two(exponents.neg())).to(at::kFloat).to(kE4m3).view(at::kByte);
}

Tensor value_of(const Tensor& bytes, const Tensor& scale, at::ScalarType dtype) {
  return bytes.view(kE4m3).to(dtype).mul_(scale.unsqueeze(1).to(dtype));
}

int64_t padded(int64_t rank) { return (rank + 15) / 16 * 16; }

// The definition.
Fp8Rows rows_by_formula(const Tensor& x) {
  const Tensor exact = x.scalar_type() == at::kDouble ? x : x.to(at::kFloat), absmax = exact.abs().amax(1);
  const Tensor e = scale_exponent(absmax, kHeadRoom);
  return {bytes_of(exact, e.unsqueeze(1)), power_of_two(e).masked_fill(absmax.isfinite().logical_not(), NAN)};
}

Fp8Rows rows_by_kernel(const Kernels& kernels, const Tensor& given, int64_t room) {
  const bool in_place = given.stride(1) == 1 && given.stride(0) % 8 == 0 && reinterpret_cast<uintptr_t>(given.const_data_ptr()) % 16 == 0;
  const Tensor x = in_place ? given : given.clone(at::MemoryFormat::Contiguous);
  const Launch launch(x);
  Fp8Rows rows = fp8_rows_like(x, x.size(1), room);
  check_launch(kernels.fp8_rows(x.const_data_ptr(), rows.to(), x.size(0), x.size(1), x.stride(0), launch.stream()), "fp8_rows");
  return rows;
}

Fp8Rows quantized(const Tensor& x, int64_t room) {
  const Kernels* const kernels = kernels_for(x);
  if (kernels != nullptr && x.scalar_type() == at::kBFloat16) return rows_by_kernel(*kernels, x, room);
  return rows_by_formula(x);
}

KernelFp8Rows behind(const Tensor& bytes, int64_t columns, const Tensor& scale) {
  return {bytes.mutable_data_ptr<uint8_t>() + columns, scale.mutable_data_ptr<float>(), bytes.stride(0)};
}

// rows [N, columns + tail] times weight [M, columns + tail], in bf16. `operands` has LoRA's parts and their count; `first` is Z or G
// [N, R], or undefined where nothing stands behind.
Tensor scaled_product(const Fp8Rows& rows, const Tensor& weight, const Fp8& w, int64_t columns, const Tensor& bias, KernelFp8Lora operands,
                      const Tensor& first) {
  const int64_t m = weight.size(0), wide = columns + (first.defined() ? fp8_room(first.size(1)) : 0);
  if (first.defined()) {
    TORCH_CHECK(first.stride(1) == 1, "fp8: columns of LoRA's first product lie apart");
    operands.x = behind(rows.bytes, columns, rows.scale);
    operands.weight = behind(weight, columns, w.scale);
    operands.z = first.const_data_ptr();
    operands.z_stride = first.stride(0);
    operands.z_factor = static_cast<float>(kFactor);
    operands.N = first.size(0);
    operands.R = first.size(1);
    operands.rows = m;
    operands.padded = padded(first.size(1));
    const Launch launch(first);
    check_launch(kernels_for(first)->fp8_lora(&operands, launch.stream()), "fp8_lora");
  }
  const std::optional<Tensor> added = bias.defined() ? std::optional(bias.to(at::kBFloat16)) : std::nullopt;
  // Fast accumulation, in the precision of the tensor cores: 0.21 in place of 0.17 % off, bf16's rounding included, for 10 % of the
  // time (H200, K = 4096).
  return at::_scaled_mm(rows.bytes.narrow(1, 0, wide).view(kE4m3), weight.narrow(1, 0, wide).view(kE4m3).t(), rows.scale.unsqueeze(1),
                        w.scale.narrow(0, 0, m).unsqueeze(0), added, {}, at::kBFloat16, true);
}

// Q(d), and at which version of d.
struct Left : c10::BackendMeta {
  Left(Fp8Rows rows, uint32_t version) : rows(std::move(rows)), version(version) {}
  Fp8Rows rows;
  uint32_t version;
};

}  // namespace

Fp8::Fp8(const Fp8View& view) : by_rows(view.by_rows), by_columns(view.by_columns), scale(view.scale) {}

Tensor Fp8::dense(at::ScalarType dtype) const { return value_of(by_rows.narrow(1, 0, in()), scale.narrow(0, 0, rows()), dtype); }

KernelFp8Rows Fp8Rows::to() const { return defined() ? behind(bytes, 0, scale) : KernelFp8Rows{}; }

int64_t fp8_room(int64_t rank) { return 3 * padded(rank); }

Fp8Rows fp8_rows_like(const Tensor& x, int64_t columns, int64_t room) {
  const int64_t n = x.size(0);
  return {at::empty({n, columns + room}, x.options().dtype(at::kByte)), at::empty({n}, x.options().dtype(at::kFloat))};
}

void fp8_leave(const Tensor& d, Fp8Rows rows) {
  d.unsafeGetTensorImpl()->set_backend_meta(c10::make_intrusive<Left>(std::move(rows), d._version()));
}

Fp8Rows fp8_take(const Tensor& d) {
  auto* const left = dynamic_cast<Left*>(d.unsafeGetTensorImpl()->get_backend_meta());
  if (left == nullptr) return {};
  Fp8Rows rows = left->version == d._version() ? left->rows : Fp8Rows{};
  d.unsafeGetTensorImpl()->set_backend_meta(nullptr);
  return rows;
}

Tensor fp8_forward(const Tensor& x, const Fp8& w, const Tensor& bias, const LoraParts& lora, const Tensor& z, Fp8Rows rows) {
  const int64_t in = w.in();
  if (!rows.defined()) rows = quantized(x, z.defined() ? fp8_room(lora.rank) : 0);
  if (!x.is_cuda()) {
    const Tensor y = product(value_of(rows.bytes, rows.scale, x.scalar_type()), w.dense(x.scalar_type()).t());
    return bias.defined() ? y.add_(bias) : y;
  }
  KernelFp8Lora operands{};
  std::vector<Tensor> bs;
  for (const auto& [part, row, column, rank] : lora.places) {
    if (!z.defined()) break;
    bs.push_back(part->b.to(at::kFloat).contiguous());
    operands.parts[operands.count++] = {bs.back().const_data_ptr<float>(), row, part->rows, column, rank, rank, 1,
                                        static_cast<float>(part->scale / kFactor)};
  }
  return scaled_product(rows, w.by_rows, w, in, bias, operands, z);
}

Tensor fp8_backward(const Tensor& dy, const Fp8& w, const LoraParts& lora, const Tensor& g, Fp8Rows rows) {
  if (!rows.defined()) rows = quantized(dy, g.defined() ? fp8_room(lora.rank) : 0);
  if (!dy.is_cuda()) return product(value_of(rows.bytes, rows.scale, dy.scalar_type()), w.dense(dy.scalar_type()));
  KernelFp8Lora operands{};
  std::vector<Tensor> as;
  for (const auto& [part, row, column, rank] : lora.places) {
    if (!g.defined()) break;
    as.push_back(part->a.to(at::kFloat).contiguous());
    operands.parts[operands.count++] = {as.back().const_data_ptr<float>(), 0, w.in(), column, rank, 1, w.in(),
                                        static_cast<float>(1 / kFactor)};
  }
  return scaled_product(rows, w.by_columns, w, w.rows(), {}, operands, g);
}

void fp8_quantize(const Tensor& weight, const Fp8View& view) {
  const Fp8 to(view);
  TORCH_CHECK(weight.dim() == 2 && weight.size(0) == to.rows() && weight.size(1) == to.in(), "fp8: the weight is ", weight.sizes(),
              ", expected [", to.rows(), ", ", to.in(), "]");
  const auto wide = weight.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  const auto [least, largest] = at::aminmax(weight);
  const Tensor absmax = at::maximum(least.neg(), largest).to(wide);
  TORCH_CHECK(absmax.isfinite().item<bool>(), "NaN or infinite values");
  const Tensor e = scale_exponent(absmax, kWeightHeadRoom);
  to.scale.copy_(power_of_two(e).expand_as(to.scale));
  // In runs of rows: what is in f32 meanwhile would be twice the weight, and leave holes of that size in the allocator's memory.
  constexpr int64_t kElements = 1 << 24;
  const int64_t run = std::max<int64_t>(1, kElements / to.in());
  for (int64_t first = 0; first < to.rows(); first += run) {
    const int64_t count = std::min(run, to.rows() - first);
    const Tensor bytes = bytes_of(weight.narrow(0, first, count).to(wide), e);
    to.by_rows.narrow(0, first, count).narrow(1, 0, to.in()).copy_(bytes);
    to.by_columns.narrow(1, first, count).copy_(bytes.t());
  }
}

void fp8_dequantize(const Fp8View& view, const Tensor& destination) {
  destination.copy_(Fp8(view).dense(destination.scalar_type()));
}

}  // namespace ferrotune
