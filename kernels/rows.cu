// y = x W^T + bias + scale (x A^T) B^T + residual for at most 64 rows of x: the products of decoding.
// Fuses the dequantisation of NF4 weights, the product, both products of LoRA and three sums; plain libtorch writes the
// weights out in 16 bits first and launches seven kernels. Moves: W once, 0.516 bytes an element of NF4 or 2 in 16 bits; x and
// y are small, and x comes from the caches.
//
// W stands on the rows of m16n8k16 products and x on their columns, so one row of x costs what eight do. An NF4 byte is two
// neighbours of a row: a table of 256 pairs in 16 bits, one copy for each lane, gives a register of the product at one access
// without conflicts. The products of a block of 64 are summed by themselves and then multiplied by its scale in f32. (The
// training path rounds map * scale to 16 bits, this one the map: one rounding a weight in both.)
//
// Nine rows of x and more have a kernel of their own on Hopper (rows_groups.cuh), which scales the weights in 16 bits before the product; with NF4 a
// launch before it puts x in the order that it reads (nf4_order.cuh). All layers of
// a decoder are more than their products there (decode_groups.cu).
//
// Work is cut into units, 64 columns of a tile of rows. Up to eight rows of x (rows_strips.cuh, and rows_eight.cuh for 16-bit weights) a
// thread block finishes its tiles by itself, and a row's bits do not depend on the rows beside it; so do blocks of NF4 weights up to 32
// (rows_tiles.cuh). Else (rows_many.cuh) blocks share tiles: each leaves its sums in the workspace, and the last to come adds them in
// the order of the blocks. The products with A are cut into pieces of K.
//
// Measured on H200s, Llama-3.1-8B's four products of a layer with LoRA r 16, us: 64 NF4 and 126 in bf16 for one row, 84 to 88 and 131 for
// 32 (149 and 228 without rows_groups.cuh, and before x was put in order); the bytes of the weights alone take 28 and 109 at 4 TB/s.
#include "rows_eight.cuh"
#include "rows_groups.cuh"
#include "rows_many.cuh"
#include "rows_strips.cuh"
#include "rows_tiles.cuh"

namespace ferrotune {
namespace {

// x [M, K] in NF4's order, four columns a thread.
template <typename T>
__global__ void __launch_bounds__(256) order_kernel(const T* x, int64_t stride, T* ordered, int K) {
  next_may_start();
  inputs_ready();
  const int column = 4 * static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x), row = static_cast<int>(blockIdx.y);
  if (column >= K) return;
  const uint2 pairs = *reinterpret_cast<const uint2*>(x + row * stride + column);
  T* const to = ordered + int64_t{row} * K;
  *reinterpret_cast<unsigned*>(to + in_nf4_order(column)) = pairs.x;
  *reinterpret_cast<unsigned*>(to + in_nf4_order(column + 2)) = pairs.y;
}

// What the workspace holds before x in NF4's order.
int64_t sums_bytes() {
  return kCounterBytes + kZBytes + int64_t{2} * device_attribute(cudaDevAttrMultiProcessorCount) * 128 * kMostColumns * 4;
}

// False where these kernels cannot.
template <typename T, bool kNf4>
bool launch_groups_alone(KernelRows rows, void* stream, int& error) {
  if (kNf4) {
    T* const ordered = reinterpret_cast<T*>(static_cast<char*>(rows.workspace) + sums_bytes());
    const T* const x = static_cast<const T*>(rows.x);
    const int64_t stride = rows.x_stride;
    rows.x = ordered, rows.x_stride = rows.K;
    if (!launch_groups<T, kNf4>(rows, {}, false, stream, error)) return false;
    const int K = static_cast<int>(rows.K);
    error = launch_chained(true, order_kernel<T>, dim3((K / 4 + 255) / 256, static_cast<unsigned>(rows.M)), dim3(256), 0, stream, x, stride, ordered, K);
    if (error != cudaSuccess) return true;
  }
  return launch_groups<T, kNf4>(rows, {}, true, stream, error);
}

template <typename T>
int launch(const KernelRows& rows, void* stream) {
  bool nf4;
  int tiles;
  const Plan plan = plan_of(rows, kTileRows, nf4, tiles);
  bool mixed = false;
  for (int64_t i = 0; i < rows.count; ++i) mixed = mixed || (nf4 && rows.parts[i].w != nullptr);
  if (mixed) {
    // Part by part.
    KernelRows one = rows;
    one.count = 1;
    const auto behind = [](const void* pointer, int64_t bytes) {
      return pointer == nullptr ? nullptr : static_cast<const char*>(pointer) + bytes;
    };
    for (int64_t i = 0, row = 0; i < rows.count; row += rows.parts[i++].rows) {
      one.parts[0] = rows.parts[i];
      one.bias = behind(rows.bias, row * sizeof(T));
      one.residual = behind(rows.residual, row * sizeof(T));
      one.y = static_cast<char*>(rows.y) + row * (rows.y_f32 ? sizeof(float) : sizeof(T));
      const int error = launch<T>(one, stream);
      if (error != cudaSuccess) return error;
    }
    return cudaSuccess;
  }
  if (rows.M <= kEight && !nf4) return launch_eight<T>(plan, tiles, stream);
  int error = cudaSuccess;
  if (rows.M > kEight && (nf4 ? launch_groups_alone<T, true>(rows, stream, error) : launch_groups_alone<T, false>(rows, stream, error))) return error;
  if (nf4 && fits_strips(rows)) return rows.M <= kEight ? launch_strips<T>(plan, stream) : launch_tiles<T>(plan, stream);
  return nf4 ? launch_many<T, true>(rows, stream) : launch_many<T, false>(rows, stream);
}

}  // namespace
}  // namespace ferrotune

using namespace ferrotune;

namespace ferrotune {
namespace {

bool take_groups(const KernelRows& rows, const GroupExtras& extras, bool launches, void* stream, int& error) {
  if (rows.dtype != KERNEL_BF16 || rows.M <= kEight || rows.M > kMostColumns || rows_linear_workspace(&rows) == 0) return false;
  const bool nf4 = rows.parts[0].w == nullptr;
  for (int64_t i = 1; i < rows.count; ++i) {
    if ((rows.parts[i].w == nullptr) != nf4) return false;
  }
  return nf4 ? launch_groups<__nv_bfloat16, true>(rows, extras, launches, stream, error)
             : launch_groups<__nv_bfloat16, false>(rows, extras, launches, stream, error);
}

}  // namespace

bool groups_take(const KernelRows& rows, const GroupExtras& extras) {
  int error = cudaSuccess;
  return take_groups(rows, extras, false, nullptr, error);
}

int launch_groups(const KernelRows& rows, const GroupExtras& extras, void* stream) {
  int error = cudaSuccess;
  return take_groups(rows, extras, true, stream, error) ? error : static_cast<int>(cudaErrorInvalidValue);
}

}  // namespace ferrotune

extern "C" int64_t rows_linear_workspace(const KernelRows* rows) {
  constexpr int64_t kShared = 160 * 1024, kMostTiles = kGroupZAt / 4 - 2;
  bool fits = rows->M <= kMostColumns && rows->K % kBlock == 0 && rows->x_stride % 8 == 0 && aligned16(rows->x) &&
              (rows->dtype == KERNEL_BF16 || rows->dtype == KERNEL_F16);
  int64_t tiles = 0;
  for (int64_t i = 0; i < rows->count; ++i) {
    const KernelRowsPart& part = rows->parts[i];
    tiles += ceil_div(part.rows, 16) + ceil_div(part.R, 16);
    fits = fits && part.R <= kMostRank && (part.a == nullptr || (aligned16(part.a) && aligned16(part.b) && part.R % 8 == 0));
    // Offsets within a tile have 32 bits.
    if (part.w != nullptr) {
      fits = fits && part.w_stride % 8 == 0 && aligned16(part.w) && part.w_stride < (1 << 22);
    } else {
      fits = fits && part.nf4.blocksize == kBlock && aligned16(part.nf4.packed);
    }
  }
  fits = fits && tiles * (rows->K / kBlock) < (int64_t{1} << 31) && ceil_div(tiles, 8) + 6 <= kMostTiles &&
         device_attribute(cudaDevAttrComputeCapabilityMajor) >= 8 &&
         device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin) >= kShared;
  if (!fits) return 0;
  return sums_bytes() + (rows->M > kEight ? rows->M * rows->K * 2 : 0);
}

extern "C" int rows_linear(const KernelRows* rows, void* stream) {
  if (rows->M == 0) return cudaSuccess;
  if (rows->dtype == KERNEL_BF16) return launch<__nv_bfloat16>(*rows, stream);
  return rows->dtype == KERNEL_F16 ? launch<__half>(*rows, stream) : static_cast<int>(cudaErrorInvalidValue);
}
