// defines: launch_tiles: 9 to 32 rows of x, NF4 weights, where rows_groups.cuh cannot. A warp has one tile of W, or one of the pieces of its columns where a thread block
// has few tiles, and all columns of x. Warps of the same piece share x, which comes in runs of 128 columns through shared memory; W
// comes straight into registers, 64 bytes of a row at a time, after which lanes trade halves so that each has 8 bytes of both blocks.
//
// What bounds it, cycles of a processor's path to shared memory for 16 x 64 weights: 16 accesses to the table of pairs, 8 for the lines
// of W, 4 x 8 for x of 32 rows, 6 for scales and the trade.
#pragma once

#include "rows_stage.cuh"

namespace ferrotune {
namespace {

// A run of x: rows are 16 bytes further apart than they are long, so that two are in different banks.
constexpr int kRunBytes = 256, kXStride = kRunBytes + 16;

__device__ __forceinline__ void meet(int barrier, int threads) { asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory"); }

// NT: eights of columns.
template <typename T, bool kNested, int NT>
__global__ void __launch_bounds__(kStripThreads, 1) tiles_kernel(const __grid_constant__ StripPlan strip_plan) {
#if __CUDA_ARCH__ >= 800
  extern __shared__ uint4 dynamic[];
  constexpr int kColumns = 8 * NT, kSlot = kColumns * kSumStride, kStageBytes = kColumns * kXStride, kAhead = 3;
  Nf4Block<T, kNested> block(strip_plan, reinterpret_cast<char*>(dynamic) - shared_address(dynamic));
  const Plan& plan = block.plan;
  const StripShared& in = block.in;
  const KernelRows& p = block.p;
  const KernelRowsPart& w = *block.w;
  char* const bytes = block.bytes;
  float* const slots = reinterpret_cast<float*>(bytes + in.slots);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, M = static_cast<int>(p.M);
  const int runs = plan.blocks / 2, stages = strip_plan.x_stages, pieces = strip_plan.k_pieces;
  next_may_start();

  for (int tile = block.first_tile; tile < block.last_tile; tile += strip_plan.at_once) {
    block.at(tile);
    const int tiles = block.tiles, rows = block.rows, local = warp % strip_plan.at_once, piece = warp / strip_plan.at_once;
    const bool works = piece < pieces && local < tiles;
    const int from = piece * runs / pieces, to = works ? (piece + 1) * runs / pieces : from;

    // What no kernel writes: maps, W's first runs, scales, B, A.
    if (block.first_time()) block.load_maps();
    const int64_t top_row = min(block.first_row + local * kTileRows + g, w.rows - 1);
    const int64_t bottom_row = min(block.first_row + local * kTileRows + g + 8, w.rows - 1);
    const auto row_of = [&](int64_t row) {
      return reinterpret_cast<const char*>(w.nf4.packed) + row * (p.K / 2) + from * 64 + t * 16;
    };
    const char *top = row_of(top_row), *bottom = row_of(bottom_row);
    uint4 ring[kAhead][2];
    int ahead = to - from;
    const auto fetch = [&](uint4 (&into)[2]) {
      if (--ahead < 0) return;
      into[0] = load_once(reinterpret_cast<const uint4*>(top));
      into[1] = load_once(reinterpret_cast<const uint4*>(bottom));
      top += 64;
      bottom += 64;
    };
#pragma unroll
    for (int i = 0; i < kAhead; ++i) fetch(ring[i]);
    block.fetch_scales_and_b();
    if (block.first_time()) {
      if (warp == kStripWarps) block.prefetch_a();
      block.template store_maps<128>();
      inputs_ready();
    }
    wait_copies<0>();
    __syncthreads();

    if (warp == kStripWarps) {
      if (block.first_time()) block.template multiply_by_a<8>();
    } else if (works) {
      // x, by the warps of this piece.
      const unsigned x_ring = in.x + piece * stages * kStageBytes;
      const auto fetch_x = [&](int run, int stage) {
        if (run < to) {
          for (int i = local * 32 + lane; i < kColumns * (kRunBytes / 16); i += tiles * 32) {
            const int c = i / (kRunBytes / 16), at = i % (kRunBytes / 16);
            if (c < M) {
              copy_16_bytes(x_ring + stage * kStageBytes + c * kXStride + at * 16, static_cast<const T*>(p.x) + c * p.x_stride + run * 128 + at * 8, true);
            }
          }
        }
        commit_copies();
      };
      for (int i = 0; i < stages - 1; ++i) fetch_x(from + i, i);

      const unsigned table = in.table + lane * 4;
      // After the trade, lanes 0 to 3 of a row have the first, third, second and fourth quarter of a block.
      const unsigned x_lane = g * kXStride + (t == 1 ? 2 : t == 2 ? 1 : t) * 32;
      const float* const map = reinterpret_cast<const float*>(bytes + in.map) + g;
      const float* const nested = reinterpret_cast<const float*>(bytes + in.nested);
      const char* const absmax_at = bytes + in.absmax + (local * kTileRows + g) * in.absmax_stride;
      const int64_t first_scale = kNested ? block.first_nested << block.shift : 0;
      const int top_block = static_cast<int>(top_row * plan.blocks - first_scale), bottom_block = static_cast<int>(bottom_row * plan.blocks - first_scale);
      float acc[NT][4] = {};
      int run = from, stage = 0, free_stage = stages - 1;
      const auto step = [&](uint4 (&own)[2]) {
        stages == 2 ? wait_copies<0>() : wait_copies<1>();
        meet(1 + piece, tiles * 32);
        fetch_x(run + stages - 1, free_stage);
        free_stage = free_stage + 1 == stages ? 0 : free_stage + 1;
        const unsigned x_run = x_ring + stage * kStageBytes + x_lane;
        stage = stage + 1 == stages ? 0 : stage + 1;
        unsigned words[2][2][2];  // of top and bottom, of both blocks
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const uint4 v = own[half];
          const bool low = t < 2;
          const unsigned first = __shfl_xor_sync(0xffffffff, low ? v.z : v.x, 2), second = __shfl_xor_sync(0xffffffff, low ? v.w : v.y, 2);
          words[half][0][0] = low ? v.x : first, words[half][0][1] = low ? v.y : second;
          words[half][1][0] = low ? first : v.z, words[half][1][1] = low ? second : v.w;
        }
        fetch(own);
#pragma unroll
        for (int u = 0; u < 2; ++u) {
          float scale[2];
          if constexpr (kNested) {
            const unsigned above = *reinterpret_cast<const unsigned char*>(absmax_at + 2 * run + u);
            const unsigned below = *reinterpret_cast<const unsigned char*>(absmax_at + 2 * run + u + 8 * in.absmax_stride);
            scale[0] = __fadd_rn(__fmul_rn(map[above * kMapCopies], nested[top_block + 2 * run + u >> block.shift]), w.nf4.nested_offset);
            scale[1] = __fadd_rn(__fmul_rn(map[below * kMapCopies], nested[bottom_block + 2 * run + u >> block.shift]), w.nf4.nested_offset);
          } else {
            scale[0] = static_cast<const float*>(w.nf4.absmax)[top_block + 2 * run + u];
            scale[1] = static_cast<const float*>(w.nf4.absmax)[bottom_block + 2 * run + u];
          }
          float sum[NT][4] = {};
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            unsigned above[4], below[4];
            look_up(words[0][u][half], table, above);
            look_up(words[1][u][half], table, below);
            const unsigned a[4] = {above[0], below[0], above[1], below[1]}, b[4] = {above[2], below[2], above[3], below[3]};
#pragma unroll
            for (int n = 0; n < NT; ++n) {
              const uint4 x = load_shared_4(x_run + n * (8 * kXStride) + u * 128 + half * 16);
              multiply(sum[n], a, x.x, x.y, T{});
              multiply(sum[n], b, x.z, x.w, T{});
            }
          }
#pragma unroll
          for (int n = 0; n < NT; ++n) {
            acc[n][0] += scale[0] * sum[n][0];
            acc[n][1] += scale[0] * sum[n][1];
            acc[n][2] += scale[1] * sum[n][2];
            acc[n][3] += scale[1] * sum[n][3];
          }
        }
        ++run;
      };
#pragma unroll 1
      while (run < to) {
#pragma unroll
        for (int i = 0; i < kAhead; ++i) {
          if (run < to) step(ring[i]);
        }
      }
      float* const slot = slots + (local * pieces + piece) * kSlot;
#pragma unroll
      for (int n = 0; n < NT; ++n) put_sums(slot + 8 * n * kSumStride, make_float4(acc[n][0], acc[n][1], acc[n][2], acc[n][3]), kSumStride);
    }
    __syncthreads();
    // The sums of pieces lie where x did.
    if (block.first_time()) block.template sum_pieces<kColumns>(reinterpret_cast<float*>(bytes + in.x));

    for (int i = threadIdx.x; i < rows * M; i += kStripThreads) {
      const int c = i / rows, row = i - c * rows;
      float value = block.added(row, c) + block.lora(row, c);
      const float* const sums = slots + row / kTileRows * pieces * kSlot + c * kSumStride + row % kTileRows;
      for (int k = 0; k < pieces; ++k) value += sums[k * kSlot];
      block.store(row, c, value);
    }
    if (tile + strip_plan.at_once < block.last_tile) __syncthreads();
  }
  block.leave();
#endif
}

template <typename T>
int launch_tiles(const Plan& given, void* stream) {
  StripPlan strip{};
  strip.plan = given;
  const KernelRows& rows = strip.plan.rows;
  const bool nested = rows.parts[0].nf4.nested_absmax != nullptr;
  const int columns = rows.M <= 16 ? 16 : 32, runs = strip.plan.blocks / 2;
  const auto pieces = [&](int tiles) { return kStripWarps / tiles < runs ? kStripWarps / tiles : runs; };
  const int blocks = plan_strips(strip, 2 * kMostPieces / (columns / kEight), kStripWarps, columns * kMostRank * 4,
                                 [&](int tiles) { return tiles * pieces(tiles) * columns * kSumStride * 4; });
  StripShared& at = strip.at;
  at.x = at.table + 256 * 128;
  strip.k_pieces = pieces(strip.at_once);
  const auto with_x = [&] { return at.x + strip.x_stages * strip.k_pieces * columns * kXStride; };
  const int limit = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  strip.x_stages = 3;
  if (with_x() > limit) strip.x_stages = 2;
  while (with_x() > limit && strip.k_pieces > 1) --strip.k_pieces;
  at.all = with_x();
  static_assert(2 * kXStride >= kPieceClasses * kTileRows * 4, "the sums of pieces fit where two stages of x were");
  const auto launch = [&](auto* kernel) { return launch_with(kernel, dim3(static_cast<unsigned>(blocks)), kStripThreads, at.all, stream, strip); };
  if (nested) return columns == 16 ? launch(tiles_kernel<T, true, 2>) : launch(tiles_kernel<T, true, 4>);
  return columns == 16 ? launch(tiles_kernel<T, false, 2>) : launch(tiles_kernel<T, false, 4>);
}

}  // namespace
}  // namespace ferrotune
