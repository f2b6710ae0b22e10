// defines: launch_lora: y = bias + residual + scale (x A^T) B^T alone, without the product with W, for 9 to 64 rows of x. Warps of all blocks
// multiply pieces of A and leave their sums in the workspace, then each multiplies tiles of 16 rows of B.
#pragma once

#include "rows.cuh"

namespace ferrotune {
namespace {

constexpr int kLoraWarps = 16, kLoraThreads = 32 * kLoraWarps;

template <typename T>
__global__ void __launch_bounds__(kLoraThreads, 1) lora_alone_kernel(const __grid_constant__ Plan plan) {
  // z [columns of x, all rows of the A of the parts that this block needs], 16 bytes further apart.
  extern __shared__ uint4 dynamic[];
  const KernelRows& p = plan.rows;
  const Workspace workspace{static_cast<char*>(p.workspace)};
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, blocks = static_cast<int>(gridDim.x);
  const int a_tasks = plan.a_blocks * plan.eights, first_task = warp * blocks + static_cast<int>(blockIdx.x);
  next_may_start();
  for (int i = first_task; i < a_tasks; i += kLoraWarps * blocks) prefetch_share_of_a(plan, i % plan.a_blocks);
  inputs_ready();
  for (int i = first_task; i < a_tasks; i += kLoraWarps * blocks) warp_share_of_a<T>(plan, workspace, i % plan.a_blocks, i / plan.a_blocks);

  const int tiles = plan.w_tiles[0] + plan.w_tiles[1] + plan.w_tiles[2];
  const int begin = static_cast<int>(int64_t{blockIdx.x} * tiles / blocks), end = static_cast<int>((int64_t{blockIdx.x} + 1) * tiles / blocks);
  while (load_acquire(workspace.a_ready()) < a_tasks) {}

  T* const z = reinterpret_cast<T*>(dynamic);
  constexpr int kStride = 3 * kMostRank + 8;
  const int of_tile = plan.eights * kEight * kTileRows;
  for (int part = 0, tile = 0, a_tile = 0; part < p.count; tile += plan.w_tiles[part], a_tile += plan.a_tiles[part++]) {
    if (end <= tile || begin >= tile + plan.w_tiles[part]) continue;
    for (int i = threadIdx.x; i < plan.a_tiles[part] * of_tile; i += kLoraThreads) {
      const int own = a_tile + i / of_tile, at = i % of_tile;
      const float* const sums = workspace.a_sums(plan, own, 0, 0) + at;
      float sum = 0;
#pragma unroll 16
      for (int piece = 0; piece < plan.pieces; ++piece) sum += __ldcg(sums + piece * of_tile);
      z[at / kTileRows * kStride + own * kTileRows + at % kTileRows] = from_float<T>(p.parts[part].scale * sum);
    }
  }
  __syncthreads();

  for (int tile = begin + warp; tile < end; tile += kLoraWarps) {
    int part = 0, local = tile, a_tile = 0;
    int64_t out = 0;
    while (local >= plan.w_tiles[part]) {
      local -= plan.w_tiles[part];
      a_tile += plan.a_tiles[part];
      out += p.parts[part++].rows;
    }
    const KernelRowsPart& w = p.parts[part];
    // Column 2 t + i of product q is row 4 t + 2 q + i, so that a lane has four neighbours.
    unsigned b[kMostRank / 16][2][2];
#pragma unroll
    for (int q = 0; q < 2; ++q) {
      const int64_t row = min(int64_t{local} * kTileRows + g / 2 * 4 + 2 * q + g % 2, w.rows - 1) * w.R;
#pragma unroll
      for (int k = 0; k < kMostRank / 8; ++k) {
        const int j = 8 * k + 2 * t;
        unsigned pair = 0;
        if (w.a != nullptr && j < w.R) {
          if (w.lora_f32) {
            const float2 v = __ldg(reinterpret_cast<const float2*>(static_cast<const float*>(w.b) + row + j));
            pair = pack(v.x, v.y, T{});
          } else {
            pair = __ldg(reinterpret_cast<const unsigned*>(static_cast<const T*>(w.b) + row + j));
          }
        }
        b[k / 2][q][k % 2] = pair;
      }
    }
    const int64_t at = out + int64_t{local} * kTileRows + 4 * t;
    const bool inside = int64_t{local} * kTileRows + 4 * t < w.rows;
    for (int above = 0; above < p.M; above += 16) {
      float acc[2][4] = {};
#pragma unroll
      for (int i = 0; i < kMostRank / 16; ++i) {
        if (i >= plan.a_tiles[part]) continue;
        const T* const top = z + (above + g) * kStride + (a_tile + i) * kTileRows + 2 * t;
        const T* const bottom = top + 8 * kStride;
        const auto pair = [](const T* from) { return *reinterpret_cast<const unsigned*>(from); };
        const unsigned a[4] = {pair(top), pair(bottom), pair(top + 8), pair(bottom + 8)};
        multiply(acc[0], a, b[i][0][0], b[i][0][1], T{});
        multiply(acc[1], a, b[i][1][0], b[i][1][1], T{});
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int c = above + g + 8 * half;
        if (!inside || c >= p.M) continue;
        float v[4] = {acc[0][2 * half], acc[0][2 * half + 1], acc[1][2 * half], acc[1][2 * half + 1]};
        const auto add = [&](const void* from, int64_t stride) {
          if (from == nullptr) return;
          const auto four = load<4>(static_cast<const T*>(from) + c * stride + at, 0);
#pragma unroll
          for (int k = 0; k < 4; ++k) v[k] += to_float(four.v[k]);
        };
        add(p.bias, 0);
        add(p.residual, p.residual_stride);
        Vector<T, 4> y;
#pragma unroll
        for (int k = 0; k < 4; ++k) y.v[k] = from_float<T>(v[k]);
        store<4>(static_cast<T*>(p.y) + c * p.y_stride + at, 0, y);
      }
    }
  }
  // The last block leaves the counters as it found them. Nobody waits any more.
  if (threadIdx.x == 0 && atomicAdd(workspace.left(), 1) == blocks - 1) {
    *workspace.a_ready() = 0;
    *workspace.left() = 0;
  }
}

template <typename T>
int launch_lora(const KernelRows& rows, void* stream) {
  bool nf4;
  int tiles, a_tiles = 0;
  Plan plan = plan_of(rows, kTileRows, nf4, tiles);
  for (int64_t i = 0; i < rows.count; ++i) a_tiles += plan.a_tiles[i];
  plan.pieces = plan.blocks / 4 < 1 ? 1 : plan.blocks / 4 < kMostPieces ? plan.blocks / 4 : kMostPieces;
  plan.a_blocks = a_tiles * plan.pieces;
  const int blocks = device_attribute(cudaDevAttrMultiProcessorCount);
  const size_t shared = ceil_div(rows.M, 16) * 16 * (3 * kMostRank + 8) * sizeof(T);
  return launch_with(lora_alone_kernel<T>, dim3(static_cast<unsigned>(blocks)), kLoraThreads, shared, stream, plan);
}

}  // namespace
}  // namespace ferrotune
