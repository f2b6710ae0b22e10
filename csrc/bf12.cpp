#include "ferrotune/csrc/bf12.h"

#include "ferrotune/csrc/kernels.h"
#include "ferrotune/src/ffi.rs.h"

namespace ferrotune {

namespace {

constexpr int64_t kLargest = 127, kSmallest = 112;  // exponents of codes 15 and 0

KernelBf12 kernel_bf12(const Bf12& w) {
  return {w.units.const_data_ptr<uint8_t>(), w.scales.const_data_ptr<float>(), w.starts.const_data_ptr<int32_t>(), w.rest.const_data_ptr(), w.rows};
}

}  // namespace

Bf12::Bf12(const Bf12View& v)
    : rows(v.rows), in(v.in_features), units(v.units), scales(v.scales), starts(v.starts), rest(v.rest) {
  const int64_t tiles = (rows + kTileRows - 1) / kTileRows;
  const auto is = [](const Tensor& x, at::ScalarType dtype, at::IntArrayRef sizes) { return x.scalar_type() == dtype && x.sizes() == sizes && x.is_contiguous(); };
  TORCH_CHECK(in > 0 && in % kUnit == 0 && is(units, at::kByte, {tiles, in / kUnit, kUnitBytes}) && is(scales, at::kFloat, {tiles * kTileRows}) &&
                  is(starts, at::kInt, {tiles + 1}) && rest.dim() == 2 && is(rest, at::kInt, {rest.size(0), 2}),
              "bf12: ", rows, " rows of ", in, " with units ", units.sizes(), ", scales ", scales.sizes(), ", starts ", starts.sizes(), ", rest ", rest.sizes());
}

// The next rows of a matrix, a multiple of 16: fills their units [tiles, in / 64, 1536], scales [rows] and numbers of rest [tiles], int64, and
// returns the rest.
std::unique_ptr<Tensor> bf12_pack(const Tensor& weight, const Tensor& units, const Tensor& scales, const Tensor& counts) {
  at::NoGradGuard no_grad;
  const int64_t rows = weight.size(0), in = weight.size(1), tiles = rows / Bf12::kTileRows, columns = in / Bf12::kUnit;
  TORCH_CHECK(weight.scalar_type() == at::kBFloat16 && tiles * Bf12::kTileRows == rows && columns * Bf12::kUnit == in, "bf12: ", weight.sizes(), " ",
              weight.scalar_type(), ", expected bf16 [16 n, 64 m]");
  const Tensor bits = weight.contiguous().view(at::kShort).to(at::kInt).bitwise_and_(0xffff);
  const Tensor exponent = bits.bitwise_right_shift(7).bitwise_and_(0xff);
  const Tensor shift = exponent.amax(1, true).clamp_min_(1).sub_(kLargest), zeros = bits.eq(0).all(1, true);
  Tensor code = exponent.sub(shift).sub_(kSmallest);
  const Tensor no_code = code.lt(0).logical_or_(exponent.eq(0)), rest = no_code.logical_and(zeros.logical_not());
  code.masked_fill_(no_code, 0);
  const Tensor plain = bits.masked_fill(no_code, 0);
  const Tensor low = code.bitwise_and(1).bitwise_left_shift_(7).bitwise_or_(plain.bitwise_and(0x7f)).to(at::kByte);
  const Tensor high = plain.bitwise_right_shift(15).bitwise_left_shift_(3).bitwise_or_(code.bitwise_right_shift(1)).to(at::kByte);
  // [tiles, half, g, units, t, 16] and [tiles, half, g, units, t, i, low or high half, j].
  units.narrow(2, 0, 1024).view({tiles, columns, 2, 8, 4, 16}).copy_(low.view({tiles, 2, 8, columns, 4, 16}).permute({0, 3, 1, 2, 4, 5}));
  const Tensor halves = high.view({tiles, 2, 8, columns, 4, 2, 2, 4});
  const Tensor both = halves.select(6, 0).bitwise_or(halves.select(6, 1).bitwise_left_shift(4));
  units.narrow(2, 1024, 512).view({tiles, columns, 8, 4, 2, 2, 4}).copy_(both.permute({0, 3, 2, 4, 1, 5, 6}));
  scales.copy_(at::exp2(shift.to(at::kFloat)).masked_fill_(zeros, 0).squeeze(1));
  counts.copy_(rest.view({tiles, Bf12::kTileRows * in}).sum(1));
  const Tensor where = rest.nonzero(), row = where.select(1, 0), column = where.select(1, 1);
  const Tensor values = weight.index({row, column}).to(at::kFloat).view(at::kInt);
  const Tensor places = row.bitwise_and(Bf12::kTileRows - 1).to(at::kInt).bitwise_left_shift(28).bitwise_or(column.to(at::kInt));
  return std::make_unique<Tensor>(at::stack({places, values}, 1));
}

void unpack_rows(const Bf12& w, int64_t first, const Tensor& destination) {
  const int64_t count = destination.size(0), first_tile = first / Bf12::kTileRows, columns = w.in / Bf12::kUnit;
  TORCH_CHECK(first % Bf12::kTileRows == 0 && first + count <= w.rows && destination.scalar_type() == at::kBFloat16 && destination.is_contiguous() &&
                  destination.dim() == 2 && destination.size(1) == w.in && destination.device() == w.units.device(),
              "bf12: rows ", first, " .. into ", destination.sizes(), " ", destination.scalar_type(), " of [", w.rows, ", ", w.in, "]");
  if (const Kernels* kernels = kernels_for(destination)) {
    const Launch launch(destination);
    const KernelBf12 weight = kernel_bf12(w);
    return check_launch(kernels->bf12_unpack(&weight, first, count, w.in, destination.mutable_data_ptr(), launch.stream()), "bf12_unpack");
  }
  const int64_t tiles = (count + Bf12::kTileRows - 1) / Bf12::kTileRows, rows = tiles * Bf12::kTileRows;
  const Tensor units = w.units.narrow(0, first_tile, tiles);
  const Tensor low = units.narrow(2, 0, 1024).view({tiles, columns, 2, 8, 4, 16}).permute({0, 2, 3, 1, 4, 5}).reshape({rows, w.in});
  const Tensor both = units.narrow(2, 1024, 512).view({tiles, columns, 8, 4, 2, 2, 4}).permute({0, 4, 2, 1, 3, 5, 6});
  const Tensor high = at::stack({both.bitwise_and(15), both.bitwise_right_shift(4)}, 6).reshape({rows, w.in}).to(at::kInt);
  const Tensor scales = w.scales.narrow(0, first, rows).unsqueeze(1);
  // s as what it adds to an exponent.
  const Tensor shift = scales.view(at::kInt).bitwise_right_shift(23).sub_(kLargest).bitwise_left_shift_(7);
  Tensor bits = high.bitwise_and(7).bitwise_left_shift(8).add_(kSmallest << 7).add_(low).add_(shift);
  bits.bitwise_or_(high.bitwise_right_shift(3).bitwise_left_shift_(15)).masked_fill_(scales.eq(0), 0);
  destination.copy_(bits.to(at::kShort).view(at::kBFloat16).narrow(0, 0, count));
  const Tensor starts = w.starts.to(at::kCPU);
  const auto* const start = starts.const_data_ptr<int32_t>();
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const int64_t begin = start[first_tile + tile], end = start[first_tile + tile + 1];
    if (begin == end) continue;
    const Tensor own = w.rest.narrow(0, begin, end - begin).to(at::kLong), places = own.select(1, 0).bitwise_and(0xffffffff);
    const Tensor row = places.bitwise_right_shift(28).add_(tile * Bf12::kTileRows), values = w.rest.narrow(0, begin, end - begin).select(1, 1).contiguous();
    const Tensor inside = row.lt(count);
    destination.index_put_({row.index({inside}), places.bitwise_and(0xfffffff).index({inside})}, values.view(at::kFloat).to(at::kBFloat16).index({inside}));
  }
}

void bf12_unpack(const Bf12View& view, const Tensor& destination) {
  at::NoGradGuard no_grad;
  unpack_rows(Bf12(view), 0, destination);
}

Tensor bf12_scores(const Tensor& x, const Bf12& w) {
  const int64_t n = x.size(0);
  if (kernels_for(x) == nullptr || n > KERNEL_MOST_BF12_ROWS || x.scalar_type() != at::kBFloat16) return {};
  const Tensor rows = x.stride(1) == 1 && (n == 1 || x.stride(0) % 8 == 0) && reinterpret_cast<uintptr_t>(x.const_data_ptr()) % 16 == 0 ? x : x.clone(at::MemoryFormat::Contiguous);
  const Launch launch(x);
  const KernelBf12 weight = kernel_bf12(w);
  const Tensor y = at::empty({n, w.rows}, x.options().dtype(at::kFloat));
  check_launch(kernels_for(x)->bf12_product(&weight, rows.const_data_ptr(), n, w.in, n == 1 ? w.in : rows.stride(0), y.mutable_data_ptr<float>(), w.rows,
                                            launch.stream()),
               "bf12_product");
  return y;
}

}  // namespace ferrotune
