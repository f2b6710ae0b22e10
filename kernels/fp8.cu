// Rows of activations and gradients in e4m3 (arXiv:2209.05433) with one scale a row, and LoRA behind both operands of a product in it.
// The formats are in csrc/fp8.h: a scale is a power of two, so that it rounds nothing and the CPU's bytes are these.
//   fp8_rows   read x, write its bytes     3 N K bytes of bf16 rows, which stay in registers between absmax and the bytes; only for
//              rows that no kernel of this library writes: rms_norm.cu and swiglu.cu write theirs in both forms at once
//   fp8_lora   read Z and B, or G and A, write 3 bytes an element of them
// A number v of LoRA is two numbers in e4m3, hi = e4m3(v) and lo = e4m3(v - hi): with z and b so split,
//   z b = hi(z) hi(b) + lo(z) hi(b) + hi(z) lo(b) + lo(z) lo(b)
// of which the first three are columns of the product, [hi | lo | hi] times [hi | hi | lo], each `padded` wide. What is left out
// is 2^-8 of z b, about what bf16 rounds off.
#include "e4m3.cuh"

namespace ferrotune {
namespace {

// 16-byte vectors of a row that a thread holds: 4, or 8 of a row over 16,384; rows over 32,768 are read again. Two thread blocks
// a processor, so that one reads while the other waits for its maximum.
constexpr int kWidth = 8, kMostThreads = 512;

// ---- device

// One row a block.
template <int kVectors>
__global__ void __launch_bounds__(kMostThreads, 2)
    fp8_rows_kernel(const Bf16* __restrict__ x, KernelFp8Rows to, int64_t K, int64_t x_stride) {
  const int64_t row = blockIdx.x;
  const Bf16* x_row = x + row * x_stride;
  const int vectors = static_cast<int>(K / kWidth);
  Vector<Bf16, kWidth> cached[kVectors];
#pragma unroll
  for (int j = 0; j < kVectors; ++j) {
    const int c = threadIdx.x + j * blockDim.x;
    if (c < vectors) cached[j] = load<kWidth>(x_row, c);
  }
  write_e4m3(to, row, cached, x_row, vectors, true);
}

// Columns of each third that a thread writes.
constexpr int kColumns = 16, kLoraThreads = 128;

// v over the scale of its row as hi and lo: [hi | lo | hi], or [hi | hi | lo] where `weight`. Beyond e4m3: not a number, as nothing
// should train with what it is cut down to.
__device__ inline void write_split(const KernelFp8Rows& to, int64_t row, int64_t padded, const float (&v)[kColumns], bool weight) {
  constexpr float kLargest = 448;
  const float inverse = 1 / to.scale[row];
  uint32_t hi[kColumns / 4], lo[kColumns / 4];
#pragma unroll
  for (int w = 0; w < kColumns / 4; ++w) {
    float number[4], rest[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float scaled = v[4 * w + i] * inverse;
      number[i] = fabsf(scaled) <= kLargest ? scaled : __int_as_float(0x7fc00000);
    }
    hi[w] = e4m3_word(number);
#pragma unroll
    for (int i = 0; i < 4; ++i) rest[i] = number[i] - e4m3_value(hi[w] >> 8 * i);
    lo[w] = e4m3_word(rest);
  }
  auto* columns = reinterpret_cast<uint4*>(to.bytes + row * to.stride + blockIdx.y * kColumns);
  const uint4 high = make_uint4(hi[0], hi[1], hi[2], hi[3]), low = make_uint4(lo[0], lo[1], lo[2], lo[3]);
  columns[0] = high;
  columns[padded / 16] = weight ? high : low;
  columns[padded / 8] = weight ? low : high;
}

// A thread writes kColumns columns of each third, of one row: of x in the first blocks, of the weight in those behind.
__global__ void __launch_bounds__(kLoraThreads) fp8_lora_kernel(KernelFp8Lora l, int64_t x_blocks) {
  const int64_t first = blockIdx.y * kColumns;
  float v[kColumns] = {};
  if (blockIdx.x < x_blocks) {
    const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (row >= l.N) return;
    const Bf16* z = static_cast<const Bf16*>(l.z) + row * l.z_stride + first;
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
      if (first + i < l.R) v[i] = to_float(z[i]) * l.z_factor;
    }
    return write_split(l.x, row, l.padded, v, false);
  }
  const int64_t row = (static_cast<int64_t>(blockIdx.x) - x_blocks) * blockDim.x + threadIdx.x;
  if (row >= l.rows) return;
  for (int p = 0; p < l.count; ++p) {
    const KernelFp8Part& part = l.parts[p];
    const int64_t r = row - part.first;
    if (r < 0 || r >= part.rows) continue;
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
      const int64_t column = first + i - part.column;
      if (column >= 0 && column < part.R) v[i] = part.from[r * part.row_stride + column * part.rank_stride] * part.factor;
    }
  }
  write_split(l.weight, row, l.padded, v, true);
}

}  // namespace
}  // namespace ferrotune

using namespace ferrotune;

// ---- launchers

extern "C" int fp8_rows(const void* x, KernelFp8Rows to, int64_t N, int64_t K, int64_t x_stride, void* stream) {
  if (N == 0) return cudaSuccess;
  int threads = 64;
  while (threads < kMostThreads && threads * 4 * kWidth < K) threads *= 2;
  if (N > 0x7fffffff) return cudaErrorInvalidValue;
  const auto kernel = threads * 4 * kWidth < K ? fp8_rows_kernel<8> : fp8_rows_kernel<4>;
  kernel<<<static_cast<unsigned>(N), threads, 0, static_cast<cudaStream_t>(stream)>>>(static_cast<const Bf16*>(x), to, K, x_stride);
  return cudaGetLastError();
}

extern "C" int fp8_lora(const KernelFp8Lora* lora, void* stream) {
  if (lora->padded == 0) return cudaSuccess;
  const int64_t x_blocks = ceil_div(lora->N, kLoraThreads), blocks = x_blocks + ceil_div(lora->rows, kLoraThreads);
  const dim3 grid(grid_x(blocks), static_cast<unsigned>(lora->padded / kColumns));
  fp8_lora_kernel<<<grid, kLoraThreads, 0, static_cast<cudaStream_t>(stream)>>>(*lora, x_blocks);
  return cudaGetLastError();
}
