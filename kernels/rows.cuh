// defines: Plan, Workspace, what the kernels of few rows share: the work they are cut into, pairs of NF4, the products with A.
#pragma once

#include <type_traits>

#include "chain.cuh"
#include "mma.cuh"

namespace ferrotune {
namespace {

constexpr int kBlock = 64, kMostRank = 64, kMostColumns = 64;
// A tile of A, and of W for few rows of x.
constexpr int kTileRows = 16, kEight = 8, kSumStride = kTileRows + 4;

// Rows of A are the input of every other tile's end: many thread blocks share a tile of them, and leave their sums for those who
// need them to add up.
constexpr int kMostPieces = 32;

// What the workspace holds: counters, the products with A, sums of tiles that several thread blocks share.
// Counters end with those of rows_groups_z.cuh, and with z.
constexpr int kZTile = kMostColumns * kTileRows;
constexpr int64_t kGroupZBytes = 256 + int64_t{3} * kMostRank / kTileRows * kZTile * 2, kGroupZAt = 64 * 1024, kCounterBytes = kGroupZAt + kGroupZBytes;
constexpr int64_t kZBytes = int64_t{3} * kMostRank / kTileRows * kMostPieces * kTileRows * kMostColumns * 4;

struct Plan {
  KernelRows rows;
  int a_tiles[3], w_tiles[3], w_blocks[3];  // tiles of a part of A and of W, and the thread blocks of the part
  int pieces, a_blocks, eights;         // pieces of a tile of A, and of all; runs of eight columns of x
  int blocks, units, per;               // units of a tile, of all tiles of W, and of a thread block
  int nested_shift[3];                  // log2 of the sizes of runs of scales
};

struct Workspace {
  char* base;
  __device__ int* a_ready() const { return reinterpret_cast<int*>(base); }
  __device__ int* left() const { return reinterpret_cast<int*>(base) + 1; }
  __device__ int* arrived(int tile) const { return reinterpret_cast<int*>(base) + 2 + tile; }
  // What a piece of a tile of A leaves for eight columns of x, [columns, rows].
  __device__ float* a_sums(const Plan& plan, int tile, int piece, int eight) const {
    return reinterpret_cast<float*>(base + kCounterBytes) + ((int64_t{tile} * plan.pieces + piece) * plan.eights + eight) * (kTileRows * kEight);
  }
  // Of row j of the A whose tiles start at a_tile, and column c.
  __device__ float z(const Plan& plan, int a_tile, int j, int c) const {
    const float* const left = a_sums(plan, a_tile + j / kTileRows, 0, c / kEight) + c % kEight * kTileRows + j % kTileRows;
    float sum = 0;
#pragma unroll 8
    for (int piece = 0; piece < plan.pieces; ++piece) sum += __ldcg(left + piece * plan.eights * (kTileRows * kEight));
    return sum;
  }
  // A thread block may share a tile with those before it, and one with those behind it.
  __device__ float* sums(int block, bool second, int elements) const {
    return reinterpret_cast<float*>(base + kCounterBytes + kZBytes) + (int64_t{2} * block + second) * elements;
  }
};

// A counter: what this warp wrote before is seen by whoever reads the new value.
__device__ inline void add_release(int* counter, int value) {
  asm volatile("fence.acq_rel.gpu; red.relaxed.gpu.global.add.s32 [%0], %1;" ::"l"(counter), "r"(value) : "memory");
}
__device__ inline int load_acquire(const int* counter) {
  int value;
  asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(value) : "l"(counter) : "memory");
  return value;
}

// Sums in fixed point, the same in any order, from 2^-28 to 2^25, above the number of those that are in them.
constexpr int kPieceBits = 10;
constexpr float kFixed = 268435456.0f;
__device__ inline unsigned long long one_in_fixed_point(float value) {
  return (static_cast<unsigned long long>(__float2ll_rn(value * kFixed)) << kPieceBits) + 1;
}
__device__ inline int in_fixed_point(unsigned long long sum) { return static_cast<int>(sum & ((1 << kPieceBits) - 1)); }
__device__ inline float of_fixed_point(unsigned long long sum) { return __ll2float_rn(static_cast<long long>(sum) >> kPieceBits) * (1 / kFixed); }
__device__ inline unsigned long long load_relaxed(const unsigned long long* from) {
  unsigned long long v;
  asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(v) : "l"(from) : "memory");
  return v;
}

__device__ inline uint4 load_once(const uint4* from) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(from));
  return v;
}

// The pairs of all bytes, [256, 32 lanes], by all threads of a block.
template <typename T, int kThreads>
__device__ inline void fill_table(uint4* pairs, const float* quant_map) {
  const float mine = quant_map[threadIdx.x % 16];
#pragma unroll 4
  for (int i = threadIdx.x; i < 256 * 8; i += kThreads) {
    const float even = __shfl_sync(0xffffffff, mine, i >> 7), odd = __shfl_sync(0xffffffff, mine, i >> 3 & 15);
    const unsigned pair = pack(even, odd, T{});
    pairs[i] = make_uint4(pair, pair, pair, pair);
  }
  __syncthreads();
}

// The pairs of four bytes; `table` is the address of this lane's copy.
__device__ inline void look_up(unsigned bytes, unsigned table, unsigned* out) {
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    asm("ld.shared.u32 %0, [%1];" : "=r"(out[j]) : "r"(table + __byte_perm(bytes, 0, 0x4440 + j) * 128));
  }
}

// x of one unit: elements 16 t .. of column g, or of the last column, which nobody reads.
struct XOfUnit {
  uint4 low, high;
};
template <typename T>
__device__ inline XOfUnit load_x(const T* x) {
  const auto* const from = reinterpret_cast<const uint4*>(x);
  return {from[0], from[1]};
}

// Into two sums by turns, or into one.
template <typename T>
__device__ inline void multiply_pairs(float (&even)[4], float (&odd)[4], const unsigned (&top)[8], const unsigned (&bottom)[8],
                                      const XOfUnit& x) {
  const unsigned a[4] = {top[0], bottom[0], top[1], bottom[1]}, b[4] = {top[2], bottom[2], top[3], bottom[3]};
  const unsigned c[4] = {top[4], bottom[4], top[5], bottom[5]}, d[4] = {top[6], bottom[6], top[7], bottom[7]};
  multiply(even, a, x.low.x, x.low.y, T{});
  multiply(odd, b, x.low.z, x.low.w, T{});
  multiply(even, c, x.high.x, x.high.y, T{});
  multiply(odd, d, x.high.z, x.high.w, T{});
}

__device__ inline uint2 load_shared_2(unsigned address) {
  uint2 v;
  asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(address));
  return v;
}
__device__ inline uint4 load_shared_4(unsigned address) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(address));
  return v;
}

// Sixteen elements of A, in f32 or 16 bits, as a product takes them.
template <typename T>
__device__ __forceinline__ void pairs_of_a(bool f32, const void* from, unsigned (&out)[8]) {
  if (f32) {
    const auto* const v = static_cast<const float4*>(from);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float4 four = v[j];
      out[2 * j] = pack(four.x, four.y, T{});
      out[2 * j + 1] = pack(four.z, four.w, T{});
    }
  } else {
    const auto* const v = static_cast<const uint4*>(from);
    const uint4 a = v[0], b = v[1];
    out[0] = a.x, out[1] = a.y, out[2] = a.z, out[3] = a.w, out[4] = b.x, out[5] = b.y, out[6] = b.z, out[7] = b.w;
  }
}

// The same for a piece of A: few units, all under way at once.
template <typename T>
__device__ __noinline__ float4 piece_of_a(const KernelRowsPart& part, const T* x, int64_t K, int64_t first_row, int from, int count) {
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  const auto row = [&](int r) { return first_row + r < part.R ? first_row + r : part.R - 1; };
  const int64_t above = row(g) * K + from * kBlock + 16 * t, below = row(g + 8) * K + from * kBlock + 16 * t;
  float acc[4] = {}, odd[4] = {};
  x += from * kBlock;
  const auto pairs = [&](int64_t at, unsigned (&out)[8]) {
    part.lora_f32 ? pairs_of_a<T>(true, static_cast<const float*>(part.a) + at, out) : pairs_of_a<T>(false, static_cast<const T*>(part.a) + at, out);
  };
#pragma unroll 2
  for (int unit = 0; unit < count; ++unit) {
    unsigned top[8], bottom[8];
    pairs(above + unit * kBlock, top);
    pairs(below + unit * kBlock, bottom);
    multiply_pairs<T>(acc, odd, top, bottom, load_x(x + unit * kBlock));
  }
  return make_float4(acc[0] + odd[0], acc[1] + odd[1], acc[2] + odd[2], acc[3] + odd[3]);
}

// Rows and columns of C as the product leaves them, into columns of `stride`.
__device__ inline void put_sums(float* sums, const float4& v, int stride) {
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  sums[2 * t * stride + g] = v.x;
  sums[(2 * t + 1) * stride + g] = v.y;
  sums[2 * t * stride + g + 8] = v.z;
  sums[(2 * t + 1) * stride + g + 8] = v.w;
}

constexpr int kWarps = 8;

// A piece of a tile of A times eight columns of x, by the warps of a thread block.
template <typename T>
__device__ inline void share_of_a(const Plan& plan, const Workspace& workspace, float (&sums)[kWarps][kEight * kSumStride], int block,
                                  int eight) {
  const KernelRows& p = plan.rows;
  const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  int tile = block / plan.pieces, part = 0;
  while (tile >= plan.a_tiles[part]) tile -= plan.a_tiles[part++];
  const int piece = block % plan.pieces, each = (plan.blocks + plan.pieces - 1) / plan.pieces, begin = min(piece * each, plan.blocks);
  const int end = min(begin + each, plan.blocks), share = (end - begin + kWarps - 1) / kWarps, from = min(begin + warp * share, end);
  const T* const x = static_cast<const T*>(p.x) + min(kEight * eight + g, static_cast<int>(p.M) - 1) * p.x_stride + 16 * t;
  put_sums(sums[warp], piece_of_a<T>(p.parts[part], x, p.K, int64_t{tile} * kTileRows, from, min(share, end - from)), kSumStride);
  __syncthreads();
  const int row = threadIdx.x % kTileRows, column = threadIdx.x / kTileRows;
  if (column >= kEight) return;
  float value = 0;
#pragma unroll
  for (int k = 0; k < kWarps; ++k) value += sums[k][column * kSumStride + row];
  __stcg(workspace.a_sums(plan, block / plan.pieces, piece, eight) + column * kTileRows + row, value);
}

// A piece of a tile of A for one warp.
struct WarpShare {
  int part, tile, from, to;  // units
};
__device__ inline WarpShare warp_share(const Plan& plan, int task) {
  const int piece = task % plan.pieces;
  WarpShare share{0, task / plan.pieces, piece * plan.blocks / plan.pieces, (piece + 1) * plan.blocks / plan.pieces};
  while (share.tile >= plan.a_tiles[share.part]) share.tile -= plan.a_tiles[share.part++];
  return share;
}

// Into the second-level cache, by one warp: half the lanes each a row's even lines, the others the odd ones.
__device__ inline void prefetch_share_of_a(const Plan& plan, int task) {
  const WarpShare share = warp_share(plan, task);
  const KernelRowsPart& part = plan.rows.parts[share.part];
  const int64_t element = part.lora_f32 ? 4 : 2, row = int64_t{share.tile} * kTileRows + threadIdx.x % 16;
  if (row >= part.R) return;
  const char* const from = static_cast<const char*>(part.a) + (row * plan.rows.K + share.from * kBlock) * element;
  for (int64_t i = threadIdx.x % 32 / 16 * 128; i < (share.to - share.from) * kBlock * element; i += 256) {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(from + i));
  }
}

// A piece of A times eight columns of x by one warp, which then says that it is there.
template <typename T>
__device__ inline void warp_share_of_a(const Plan& plan, const Workspace& workspace, int task, int eight) {
  const KernelRows& p = plan.rows;
  const int lane = threadIdx.x % 32;
  const WarpShare share = warp_share(plan, task);
  const T* const x = static_cast<const T*>(p.x) + min(kEight * eight + lane / 4, static_cast<int>(p.M) - 1) * p.x_stride + 16 * (lane % 4);
  put_sums(workspace.a_sums(plan, task / plan.pieces, task % plan.pieces, eight),
           piece_of_a<T>(p.parts[share.part], x, p.K, int64_t{share.tile} * kTileRows, share.from, share.to - share.from), kTileRows);
  __syncwarp();
  if (lane == 0) add_release(workspace.a_ready(), 1);
}

// nf4: whether any part is.
inline Plan plan_of(const KernelRows& rows, int tile_rows, bool& nf4, int& tiles) {
  Plan plan{};
  plan.rows = rows;
  plan.blocks = static_cast<int>(rows.K / kBlock);
  int a_tiles = 0;
  nf4 = false;
  tiles = 0;
  for (int64_t i = 0; i < rows.count; ++i) {
    const KernelRowsPart& part = rows.parts[i];
    nf4 = nf4 || part.w == nullptr;
    while (part.nf4.nested_blocksize >> (plan.nested_shift[i] + 1) > 0) ++plan.nested_shift[i];
    plan.a_tiles[i] = part.a == nullptr ? 0 : static_cast<int>(ceil_div(part.R, kTileRows));
    plan.w_tiles[i] = static_cast<int>(ceil_div(part.rows, tile_rows));
    a_tiles += plan.a_tiles[i];
    tiles += plan.w_tiles[i];
  }
  plan.pieces = static_cast<int>(ceil_div(plan.blocks, 16));
  plan.eights = static_cast<int>(ceil_div(rows.M, kEight));
  if (plan.pieces > kMostPieces) plan.pieces = kMostPieces;
  plan.a_blocks = a_tiles * plan.pieces;
  return plan;
}

template <typename Kernel, typename AnyPlan>
int launch_with(Kernel* kernel, dim3 blocks, int threads, size_t shared, void* stream, const AnyPlan& plan) {
  const int error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
  if (error != cudaSuccess) return error;
  return launch_chained(true, kernel, blocks, dim3(threads), shared, stream, plan);
}

}  // namespace
}  // namespace ferrotune
