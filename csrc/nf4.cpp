#include "ferrotune/csrc/nf4.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>

#include <array>
#include <cmath>
#include <cstring>

#include "ferrotune/csrc/cpu.h"
#include "ferrotune/csrc/kernels.h"
#include "ferrotune/src/ffi.rs.h"

namespace ferrotune {

namespace {

// What we write; what we read may have any block size that bitsandbytes knows.
constexpr int64_t kBlock = 64, kNestedBlock = 256;
// Blocks worth a thread: about 20 us of work.
constexpr int64_t kGrain = 256;

constexpr float kQuantMap[16] = {-1.0f,
                                 -0.6961928009986877f,
                                 -0.5250730514526367f,
                                 -0.39491748809814453f,
                                 -0.28444138169288635f,
                                 -0.18477343022823334f,
                                 -0.09105003625154495f,
                                 0.0f,
                                 0.07958029955625534f,
                                 0.16093020141124725f,
                                 0.24611230194568634f,
                                 0.33791524171829224f,
                                 0.44070982933044434f,
                                 0.5626170039176941f,
                                 0.7229568362236023f,
                                 1.0f};

// An index is the number of midpoints below the scaled element.
constexpr float midpoint(int i) { return (kQuantMap[i] + kQuantMap[i + 1]) / 2; }

// bitsandbytes divides by no less than this.
constexpr float kLeast = 1e-38f;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The largest |x| by its bits, which order non-negative floats: an infinity or a NaN comes out as itself, so that one
// look at absmax finds them.
float largest(const float* x, int64_t count) {
  int32_t bits = 0;
  for (int64_t i = 0; i < count; ++i) {
    int32_t word;
    std::memcpy(&word, x + i, sizeof word);
    bits = std::max(bits, word & 0x7fffffff);
  }
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

template <typename T>
void quantize_loop(const T* x, int64_t n, uint8_t* packed, float* absmax) {
  at::parallel_for(0, ceil_div(n, kBlock), kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      const int64_t first = block * kBlock, count = std::min(kBlock, n - first);
      float values[kBlock] = {};
      for (int64_t i = 0; i < count; ++i) values[i] = static_cast<float>(x[first + i]);
      const float most = largest(values, kBlock);
      if (count == kBlock) {
        absmax[block] = most;
        const float inverse = 1.0f / std::max(most, kLeast);
        for (float& value : values) value *= inverse;
      } else {
        // bitsandbytes treats the short block at the end otherwise: it divides, and stores what it divides by.
        absmax[block] = std::max(most, kLeast);
        for (float& value : values) value /= absmax[block];
      }
      int32_t index[kBlock];
      for (int64_t i = 0; i < kBlock; ++i) {
        int32_t above = 0;
#pragma GCC unroll 15
        for (int t = 0; t < 15; ++t) above += values[i] > midpoint(t);
        index[i] = above;
      }
      for (int64_t i = 0; i < ceil_div(count, 2); ++i) {
        packed[first / 2 + i] = static_cast<uint8_t>(index[2 * i] << 4 | index[2 * i + 1]);
      }
    }
  });
}

// bitsandbytes finds the index of a value y in [-1, 1] by a table of 65536 equal steps: that of the step's own value,
// the number of midpoints below it. Where the map is finer than a step (below 2e-5) that is not always the nearest.
struct NestedIndex {
  std::array<uint8_t, 65536> of_step;

  NestedIndex() {
    const Tensor map = dynamic_map(true);
    const float* values = map.const_data_ptr<float>();
    int index = 0;
    for (int step = 0; step < 65536; ++step) {
      const float value = static_cast<float>(2 * step) / 65535.0f - 1.0f;
      while (index < 255 && value > (values[index] + values[index + 1]) * 0.5f) ++index;
      of_step[step] = static_cast<uint8_t>(index);
    }
  }

  uint8_t operator()(float y) const {
    // 0 times infinity, where the largest is too small to have an inverse, counts as -1.
    const float half = ((y > 1.0f ? 1.0f : y > -1.0f ? y : -1.0f) + 1.0f) * 0.5f;
    // The product and the sum are rounded together, once.
    return of_step[static_cast<int>(static_cast<float>(half * 65535.0 + 0.5)) & 0xffff];
  }
};

// absmax of one block.
struct Absmax {
  const uint8_t* index = nullptr;  // where nested
  const float *plain = nullptr, *nested = nullptr, *map = nullptr;
  float offset = 0;
  int64_t nested_blocksize = 1;

  explicit Absmax(const Nf4& w) {
    if (!w.nested()) {
      plain = w.absmax.const_data_ptr<float>();
      return;
    }
    index = w.absmax.const_data_ptr<uint8_t>();
    nested = w.nested_absmax.const_data_ptr<float>();
    map = w.nested_quant_map.const_data_ptr<float>();
    offset = static_cast<float>(w.nested_offset);
    nested_blocksize = w.nested_blocksize;
  }

  float operator()(int64_t block) const {
    if (plain != nullptr) return plain[block];
    return map[index[block]] * nested[block / nested_blocksize] + offset;
  }
};

// The format in libtorch's words, on any device in any dtype.
Tensor formula(const Nf4& w, at::ScalarType dtype) {
  Tensor absmax = w.absmax;
  const int64_t blocks = absmax.size(0), n = w.rows * w.in;
  if (w.nested()) {
    const Tensor nested = w.nested_absmax.repeat_interleave(w.nested_blocksize).slice(0, 0, blocks);
    absmax = w.nested_quant_map.index_select(0, absmax.to(at::kInt)) * nested + w.nested_offset;
  }
  const Tensor index = at::stack({w.packed.bitwise_right_shift(4), w.packed.bitwise_and(15)}, 1).flatten();
  const Tensor values = w.quant_map.index_select(0, index.slice(0, 0, n).to(at::kInt));
  return (values * absmax.repeat_interleave(w.blocksize).slice(0, 0, n)).to(dtype).view({w.rows, w.in});
}

bool is_flat(const Tensor& tensor, at::ScalarType dtype, int64_t size) {
  return tensor.scalar_type() == dtype && tensor.is_contiguous() && tensor.sizes() == at::IntArrayRef{size};
}

bool is_blocksize(int64_t size) { return size >= 32 && size <= 4096 && (size & (size - 1)) == 0; }

}  // namespace

Nf4::Nf4(const Nf4View& v)
    : rows(v.rows),
      in(v.in_features),
      packed(v.packed),
      quant_map(v.quant_map),
      absmax(v.absmax),
      blocksize(v.blocksize),
      nested_absmax(v.nested_absmax),
      nested_quant_map(v.nested_quant_map),
      nested_offset(v.nested_offset),
      nested_blocksize(v.nested_blocksize) {
  TORCH_CHECK(rows > 0 && in > 0, "nf4: the matrix is [", rows, ", ", in, "], expected positive sizes");
  TORCH_CHECK(is_blocksize(blocksize), "nf4: blocksize is ", blocksize, ", expected a power of two of 32 to 4096");
  const int64_t n = rows * in, blocks = ceil_div(n, blocksize);
  TORCH_CHECK(is_flat(packed, at::kByte, ceil_div(n, 2)) && is_flat(quant_map, at::kFloat, 16) &&
                  is_flat(absmax, nested() ? at::kByte : at::kFloat, blocks),
              "nf4: packed is ", packed.sizes(), ", quant_map ", quant_map.sizes(), " and absmax ", absmax.sizes(),
              ", expected [", ceil_div(n, 2), "], [16] and [", blocks, "] for [", rows, ", ", in, "] in blocks of ",
              blocksize);
  if (!nested()) return;
  TORCH_CHECK(is_blocksize(nested_blocksize) &&
                  is_flat(nested_absmax, at::kFloat, ceil_div(blocks, nested_blocksize)) &&
                  is_flat(nested_quant_map, at::kFloat, 256),
              "nf4: nested_absmax is ", nested_absmax.sizes(), " and nested_quant_map ", nested_quant_map.sizes(),
              ", expected [", ceil_div(blocks, nested_blocksize), "] and [256] for ", blocks, " blocks in runs of ",
              nested_blocksize);
}

Nf4 Nf4::some_rows(int64_t first, int64_t count) const {
  TORCH_CHECK(first >= 0 && count > 0 && first + count <= rows && splits_at(first), "nf4: rows ", first, " to ",
              first + count, " of [", rows, ", ", in, "] do not start with a block");
  Nf4 some = *this;
  const int64_t begin = first * in, n = count * in, block = begin / blocksize, blocks = ceil_div(n, blocksize);
  some.rows = count;
  some.packed = packed.narrow(0, begin / 2, ceil_div(n, 2));
  some.absmax = absmax.narrow(0, block, blocks);
  if (nested()) {
    some.nested_absmax = nested_absmax.narrow(0, block / nested_blocksize, ceil_div(blocks, nested_blocksize));
  }
  return some;
}

template <typename T>
void dequantize_run(const Nf4& w, int64_t begin, int64_t end, T* out) {
  const uint8_t* packed = w.packed.const_data_ptr<uint8_t>();
  const float* map = w.quant_map.const_data_ptr<float>();
  const Absmax absmax(w);
  for (int64_t i = begin; i < end;) {
    const int64_t block = i / w.blocksize, stop = std::min(end, (block + 1) * w.blocksize);
    const float scale = absmax(block);
    if constexpr (std::is_same_v<T, float>) {
      if (const CpuKernels* kernels = cpu_kernels(); kernels != nullptr && i % 2 == 0 && stop % 2 == 0) {
        kernels->nf4_block(packed + i / 2, (stop - i) / 2, map, scale, out);
        out += stop - i;
        i = stop;
        continue;
      }
    }
    // A block has only 16 different values.
    T values[16];
    for (int v = 0; v < 16; ++v) values[v] = static_cast<T>(map[v] * scale);
    if (i % 2 == 1) *out++ = values[packed[i++ / 2] & 15];
    for (; i + 1 < stop; i += 2) {
      const uint8_t byte = packed[i / 2];
      *out++ = values[byte >> 4];
      *out++ = values[byte & 15];
    }
    if (i < stop) *out++ = values[packed[i++ / 2] >> 4];
  }
}

KernelNf4 kernel_nf4(const Nf4& w) {
  const auto floats = [&](const Tensor& x) { return w.nested() ? x.const_data_ptr<float>() : nullptr; };
  return {w.packed.const_data_ptr<uint8_t>(), w.quant_map.const_data_ptr<float>(), w.absmax.const_data_ptr(),
          floats(w.nested_absmax), floats(w.nested_quant_map), nullptr, w.rows, w.blocksize, w.nested_blocksize,
          static_cast<float>(w.nested_offset)};
}

namespace {

// By one launch, the matrices below each other in destination.
void dequantize_rows(const std::vector<const Nf4*>& weights, const Tensor& destination) {
  const Launch launch(destination);
  std::vector<KernelNf4> matrices;
  int64_t row = 0;
  for (const Nf4* w : weights) {
    matrices.push_back(kernel_nf4(*w));
    matrices.back().y = destination.narrow(0, row, w->rows).mutable_data_ptr();
    row += w->rows;
  }
  const int64_t in = weights[0]->in;
  check_launch(kernels_for(destination)->nf4_dequantize(
                   matrices.data(), static_cast<int64_t>(matrices.size()), in,
                   destination.size(0) == 1 ? in : destination.stride(0), kernel_dtype(destination), launch.stream()),
               "nf4_dequantize");
}

}  // namespace

void dequantize_into(const Nf4& w, const Tensor& destination) {
  TORCH_CHECK(destination.sizes() == at::IntArrayRef({w.rows, w.in}) && destination.is_floating_point() &&
                  destination.device() == w.packed.device(),
              "nf4: the destination is ", destination.sizes(), " ", destination.scalar_type(), " on ",
              destination.device(), ", expected [", w.rows, ", ", w.in, "] of a float dtype on ", w.packed.device());
  const bool in_rows = destination.stride(1) == 1 || w.in == 1;
  if (destination.is_cpu() && in_rows) {
    AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, destination.scalar_type(), "dequantize", [&] {
      scalar_t* out = destination.mutable_data_ptr<scalar_t>();
      const int64_t stride = destination.stride(0), grain = ceil_div(kGrain * kBlock, w.in);
      at::parallel_for(0, w.rows, grain, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) dequantize_run(w, row * w.in, (row + 1) * w.in, out + row * stride);
      });
    });
    return;
  }
  if (kernels_for(destination) == nullptr || !in_rows) {
    destination.copy_(formula(w, destination.scalar_type()));
    return;
  }
  dequantize_rows({&w}, destination);
}

void dequantize_into(const std::vector<const Nf4*>& weights, const Tensor& destination) {
  constexpr size_t kMost = 3;  // of a launch
  if (kernels_for(destination) != nullptr && destination.stride(1) == 1 && weights.size() <= kMost) {
    dequantize_rows(weights, destination);
    return;
  }
  int64_t row = 0;
  for (const Nf4* w : weights) {
    dequantize_into(*w, destination.narrow(0, row, w->rows));
    row += w->rows;
  }
}

std::unique_ptr<Tensor> nf4_quant_map() {
  return std::make_unique<Tensor>(at::tensor(at::ArrayRef<float>(kQuantMap), at::kFloat));
}

std::unique_ptr<Tensor> nf4_nested_quant_map() { return std::make_unique<Tensor>(dynamic_map(true)); }

void nf4_quantize(const Tensor& x, const Tensor& packed, const Tensor& absmax) {
  const int64_t n = x.numel(), blocks = ceil_div(n, kBlock);
  TORCH_CHECK(x.is_contiguous() && is_flat(packed, at::kByte, ceil_div(n, 2)) && is_flat(absmax, at::kFloat, blocks) &&
                  packed.device() == x.device() && absmax.device() == x.device(),
              "nf4_quantize: ", n, " elements into packed ", packed.sizes(), " and absmax ", absmax.sizes(),
              ", expected [", ceil_div(n, 2), "] and [", blocks, "] on ", x.device());
  if (const Kernels* kernels = kernels_for(x)) {
    const Launch launch(x);
    check_launch(kernels->nf4_quantize(x.const_data_ptr(), packed.mutable_data_ptr<uint8_t>(),
                                       absmax.mutable_data_ptr<float>(), n, kernel_dtype(x), launch.stream()),
                 "nf4_quantize");
    return;
  }
  if (!x.is_cpu()) {
    const Tensor host_packed = at::empty(packed.sizes(), at::kByte), host_absmax = at::empty(absmax.sizes(), at::kFloat);
    nf4_quantize(x.cpu(), host_packed, host_absmax);
    packed.copy_(host_packed);
    absmax.copy_(host_absmax);
    return;
  }
  AT_DISPATCH_SWITCH(x.scalar_type(), "nf4_quantize",
                     AT_DISPATCH_CASE(at::kFloat, [&] {
                       quantize_loop(x.const_data_ptr<float>(), n, packed.mutable_data_ptr<uint8_t>(),
                                     absmax.mutable_data_ptr<float>());
                     }) AT_DISPATCH_CASE(at::kHalf, [&] {
                       quantize_loop(x.const_data_ptr<at::Half>(), n, packed.mutable_data_ptr<uint8_t>(),
                                     absmax.mutable_data_ptr<float>());
                     }) AT_DISPATCH_CASE(at::kBFloat16, [&] {
                       quantize_loop(x.const_data_ptr<at::BFloat16>(), n, packed.mutable_data_ptr<uint8_t>(),
                                     absmax.mutable_data_ptr<float>());
                     }));
}

// The mean's rounding decides bytes, so it is libtorch's on the CPU, as bitsandbytes takes it, whatever the device.
double nf4_nest(const Tensor& absmax, const Tensor& index, const Tensor& nested_absmax) {
  const int64_t blocks = absmax.size(0), runs = ceil_div(blocks, kNestedBlock);
  TORCH_CHECK(absmax.is_cpu() && is_flat(absmax, at::kFloat, blocks) && is_flat(index, at::kByte, blocks) &&
                  is_flat(nested_absmax, at::kFloat, runs) && index.is_cpu() && nested_absmax.is_cpu(),
              "nf4_nest: absmax is ", absmax.sizes(), ", index ", index.sizes(), " and nested_absmax ",
              nested_absmax.sizes(), ", expected [blocks], [blocks] and [ceil(blocks / ", kNestedBlock, ")] on the CPU");
  static const NestedIndex nested_index;
  const float offset = absmax.mean().item<float>();
  const float* in = absmax.const_data_ptr<float>();
  uint8_t* out = index.mutable_data_ptr<uint8_t>();
  float* most = nested_absmax.mutable_data_ptr<float>();
  at::parallel_for(0, runs, 32, [&](int64_t begin, int64_t end) {
    for (int64_t run = begin; run < end; ++run) {
      const int64_t first = run * kNestedBlock, last = std::min(blocks, first + kNestedBlock);
      float values[kNestedBlock];
      for (int64_t i = first; i < last; ++i) values[i - first] = in[i] - offset;
      most[run] = largest(values, last - first);
      const float inverse = 1.0f / most[run];
      for (int64_t i = first; i < last; ++i) {
        out[i] = most[run] == 0 ? 0 : nested_index(values[i - first] * inverse);
      }
    }
  });
  return offset;
}

void nf4_dequantize(const Nf4View& view, const Tensor& destination) { dequantize_into(Nf4(view), destination); }

}  // namespace ferrotune
