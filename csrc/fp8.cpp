#include "ferrotune/csrc/fp8.h"

#include "ferrotune/csrc/cpu.h"
#include "ferrotune/csrc/kernels.h"
#include "ferrotune/csrc/lora.h"
#include "ferrotune/src/ffi.rs.h"

namespace ferrotune {

namespace {

constexpr auto kE4m3 = at::kFloat8_e4m3fn;

// What LoRA's two factors are multiplied by and divided by, so that both are in the range of e4m3: B up to eight times the
// largest weight of its row, A up to 3.5. Beyond, the result is NaN.
constexpr double kForwardFactor = 8, kBackwardFactor = 1.0 / 128;

// 2^e, f32, for e of -126 .. 127; a power function may round.
Tensor power_of_two(const Tensor& e) { return e.to(at::kInt).add(127).mul_(1 << 23).view(at::kFloat); }

// The least e of -126 .. with absmax <= 448 * 2^e, int32. frexp: absmax = f 2^k, f of [0.5, 1).
Tensor scale_exponent(const Tensor& absmax) {
  const auto [f, k] = at::frexp(absmax);
  const Tensor e = k.to(at::kInt).sub(9).add(f.gt(0.875)).masked_fill(absmax.eq(0), -126);
  return e.clamp(-126, 120);
}

// X [N, K + tail] in e4m3 as bytes, and the scales [N].
struct Rows {
  Tensor bytes, scale;

  // The matrix without its tail.
  Tensor value(int64_t columns, at::ScalarType dtype) const {
    return bytes.narrow(1, 0, columns).view(kE4m3).to(dtype).mul_(scale.unsqueeze(1).to(dtype));
  }
};

Tensor bytes_of(const Tensor& x, const Tensor& exponents) {
  return (x * power_of_two(exponents.neg()).unsqueeze(1)).to(at::kFloat).to(kE4m3).view(at::kByte);
}

// The definition: of x diag(2^exponents), where there are any.
Rows rows_by_formula(const Tensor& given, const Tensor& exponents) {
  const Tensor x = exponents.defined() ? given * power_of_two(exponents).to(given.scalar_type()) : given;
  const Tensor exact = x.scalar_type() == at::kDouble ? x : x.to(at::kFloat), absmax = exact.abs().amax(1);
  const Tensor e = scale_exponent(absmax);
  return {bytes_of(exact, e), power_of_two(e).masked_fill(absmax.isfinite().logical_not(), NAN)};
}

int64_t padded(int64_t rank) { return (rank + 15) / 16 * 16; }

// The same by the kernel, with z behind it.
Rows rows_by_kernel(const Kernels& kernels, const Tensor& given, const Tensor& exponents, const Tensor& z, double z_factor) {
  const bool in_place = given.stride(1) == 1 && given.stride(0) % 8 == 0 && reinterpret_cast<uintptr_t>(given.const_data_ptr()) % 16 == 0;
  const Tensor x = in_place ? given : given.clone(at::MemoryFormat::Contiguous);
  const Launch launch(x);
  const int64_t n = x.size(0), k = x.size(1), rank = z.defined() ? z.size(1) : 0, wide = k + 3 * padded(rank);
  const Rows rows{at::empty({n, wide}, x.options().dtype(at::kByte)), at::empty({n}, x.options().dtype(at::kFloat))};
  TORCH_CHECK(!z.defined() || z.stride(1) == 1, "fp8: columns of z lie apart");
  check_launch(kernels.fp8_rows(x.const_data_ptr(), exponents.defined() ? exponents.const_data_ptr<int8_t>() : nullptr,
                                z.defined() ? z.const_data_ptr() : nullptr, rows.bytes.mutable_data_ptr<uint8_t>(),
                                rows.scale.mutable_data_ptr<float>(), n, k, x.stride(0), rank, z.defined() ? z.stride(0) : 0, wide,
                                padded(rank), static_cast<float>(z_factor), launch.stream()),
               "fp8_rows");
  return rows;
}

Rows quantized(const Tensor& x, const Tensor& exponents, const Tensor& z = {}, double z_factor = 1) {
  const Kernels* const kernels = kernels_for(x);
  if (kernels != nullptr && x.scalar_type() == at::kBFloat16) return rows_by_kernel(*kernels, x, exponents, z, z_factor);
  return rows_by_formula(x, exponents);
}

// Bytes of rows [N, K] times columns [M, K], in bf16.
Tensor scaled_product(const Rows& rows, const Tensor& columns, const Tensor& scale, const Tensor& bias) {
  const std::optional<Tensor> added = bias.defined() ? std::optional(bias.to(at::kBFloat16)) : std::nullopt;
  // Fast accumulation, in the precision of the tensor cores: 0.21 in place of 0.17 % off, bf16's rounding included, for 10 % of the
  // time (H200, K = 4096).
  return at::_scaled_mm(rows.bytes.view(kE4m3), columns.view(kE4m3).t(), rows.scale.unsqueeze(1), scale.unsqueeze(0), added, {},
                        at::kBFloat16, true);
}

// Writes LoRA behind a weight, `to` [rows, 3 padded].
void put_behind(const Tensor& to, const Tensor& exponents, KernelFp8Lora operands, const Kernels& kernels) {
  operands.to = to.mutable_data_ptr<uint8_t>();
  operands.exponents = exponents.defined() ? exponents.const_data_ptr<int8_t>() : nullptr;
  operands.rows = to.size(0);
  operands.to_stride = to.stride(0);
  operands.padded = to.size(1) / 3;
  const Launch launch(to);
  check_launch(kernels.fp8_lora(&operands, launch.stream()), "fp8_lora");
}

}  // namespace

Fp8::Fp8(const Fp8View& view)
    : by_rows(view.by_rows), by_columns(view.by_columns), exponents(view.exponents), scale(view.scale), ones(view.ones) {}

Tensor Fp8::dense(at::ScalarType dtype) const { return Rows{by_rows, scale}.value(in(), dtype); }

bool fp8_folds(const Tensor& x, const Fp8& w, const LoraParts& lora) {
  if (kernels_for(x) == nullptr || x.scalar_type() != at::kBFloat16 || lora.drops) return false;
  const int64_t room = w.by_rows.size(1) - w.in();
  return !lora.places.empty() && lora.places.size() <= std::size(KernelFp8Lora{}.parts) && 3 * padded(lora.rank) <= room;
}

Tensor fp8_forward(const Tensor& x, const Fp8& w, const Tensor& bias, const LoraParts& lora, const Tensor& z) {
  const int64_t in = w.in(), tail = z.defined() ? 3 * padded(lora.rank) : 0;
  const Rows rows = quantized(x, {}, z, kForwardFactor);
  if (!x.is_cuda()) {
    const Tensor y = product(rows.value(in, x.scalar_type()), w.dense(x.scalar_type()).t());
    return bias.defined() ? y.add_(bias) : y;
  }
  if (tail > 0) {
    KernelFp8Lora operands{};
    std::vector<Tensor> bs;
    for (const auto& [part, row, column, rank] : lora.places) {
      bs.push_back(part->b.to(at::kFloat).contiguous());
      operands.parts[operands.count++] = {bs.back().const_data_ptr<float>(), row, part->rows, column, rank, rank, 1,
                                          static_cast<float>(part->scale / kForwardFactor)};
    }
    put_behind(w.by_rows.narrow(1, in, tail), w.exponents, operands, *kernels_for(x));
  }
  return scaled_product(rows, w.by_rows.narrow(1, 0, in + tail), w.scale, bias);
}

Tensor fp8_backward(const Tensor& dy, const Fp8& w, const LoraParts& lora, const Tensor& g) {
  const int64_t rows = w.rows(), tail = g.defined() ? 3 * padded(lora.rank) : 0;
  const Rows quantized_dy = quantized(dy, w.exponents, g, kBackwardFactor);
  if (!dy.is_cuda()) {
    const Tensor bytes = w.by_rows.narrow(1, 0, w.in()).view(kE4m3).to(dy.scalar_type());
    return product(quantized_dy.value(rows, dy.scalar_type()), bytes);
  }
  if (tail > 0) {
    KernelFp8Lora operands{};
    std::vector<Tensor> as;
    for (const auto& [part, row, column, rank] : lora.places) {
      as.push_back(part->a.to(at::kFloat).contiguous());
      operands.parts[operands.count++] = {as.back().const_data_ptr<float>(), 0, w.in(), column, rank, 1, w.in(),
                                          static_cast<float>(1 / kBackwardFactor)};
    }
    put_behind(w.by_columns.narrow(1, rows, tail), {}, operands, *kernels_for(dy));
  }
  return scaled_product(quantized_dy, w.by_columns.narrow(1, 0, rows + tail), w.ones, {});
}

void fp8_quantize(const Tensor& weight, const Fp8View& view) {
  const Fp8 to(view);
  TORCH_CHECK(weight.dim() == 2 && weight.size(0) == to.rows() && weight.size(1) == to.in(), "fp8: the weight is ", weight.sizes(),
              ", expected [", to.rows(), ", ", to.in(), "]");
  const Tensor exact = weight.scalar_type() == at::kDouble ? weight : weight.to(at::kFloat), absmax = exact.abs().amax(1);
  TORCH_CHECK(absmax.isfinite().all().item<bool>(), "NaN or infinite values");
  const Tensor own = scale_exponent(absmax), e = own.maximum(own.max().sub(2));
  const Tensor bytes = bytes_of(exact, e);
  to.by_rows.narrow(1, 0, to.in()).copy_(bytes);
  to.by_columns.narrow(1, 0, to.rows()).copy_(bytes.t());
  to.exponents.copy_(e);
  to.scale.copy_(power_of_two(e));
  to.ones.fill_(1);
}

void fp8_dequantize(const Fp8View& view, const Tensor& destination) {
  destination.copy_(Fp8(view).dense(destination.scalar_type()));
}

}  // namespace ferrotune
