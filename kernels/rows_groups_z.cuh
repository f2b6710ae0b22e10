// defines: multiply_by_a, make_z, fetch_z, leave_z: z = s x A^T of rows_groups_kernel.cuh, in two ways.
//
// Where a thread block has few units, two of its warps multiply x by A as both pass by: z of its columns. Where it has many, a few thread blocks make z for
// all others, who would else each read A and multiply x by it again; short products would wait for it, as z passes through memory (8B, NF4, 32 rows, r 16,
// a layer with z of qkv and o by others, too: 100.1 us where it was 93.6). A cluster of them has some tiles of A, its blocks
// share the columns, and sums meet in shared memory.
#pragma once

#include "rows_group_task.cuh"

namespace ferrotune {
namespace {

// Columns that a warp multiplies by a tile of A, so many at once; more turns than kMostZTurns would be waited for.
constexpr int kZChunk = 32, kZWarpsOfBlock = kGroupThreads / 32, kMostZTurns = 4;
template <int N>
constexpr int chunks_at_once = N <= 32 ? 2 : 1;
// Between two looks at whether z is there.
constexpr int kPollNanoseconds = 50;

#ifdef FERROTUNE_HOPPER

// Columns `step` of a tile of A as a product takes them: 16 step .. of the stage's, beside x in NF4's order 32 t + 4 step .. of lane t. place_in_a: where a
// lane's row g and first columns lie.
template <bool kNf4>
__device__ __forceinline__ unsigned place_in_a(int box_bytes, bool f32) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  // As load_matrices wants it: rows of four 8x8 matrices.
  if (!kNf4 && !f32) return lane % 16 * 128 + (lane / 16 ^ lane % 8) * 16;
  if (!kNf4) return g * 128 + (t / 2 ^ g) * 16 + t % 2 * 8;
  return g * 128 + (f32 ? t * box_bytes + g * 16 : t / 2 * box_bytes + (t % 2 * 4 ^ g) * 16);
}
template <typename T, bool kNf4>
__device__ __forceinline__ void load_rows_of_a(unsigned (&rows)[4], unsigned at, int box_bytes, bool f32, int step) {
  if (!kNf4 && !f32) {
    load_matrices(rows, at ^ 32 * step);
    return;
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const unsigned row = at + half * (8 * 128);
    if (kNf4 && !f32) {
      const uint2 own = load_shared_2((row ^ step / 2 * 16) + step % 2 * 8);
      rows[half] = own.x, rows[2 + half] = own.y;
    } else if (kNf4) {
      const uint4 own = load_shared_4(row ^ step * 16);
      rows[half] = pack_words<T>(own.x, own.y), rows[2 + half] = pack_words<T>(own.z, own.w);
    } else {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const uint2 own = load_shared_2((row ^ (4 * (step % 2) + 2 * j) * 16) + step / 2 * box_bytes);
        rows[2 * j + half] = pack_words<T>(own.x, own.y);
      }
    }
  }
}

// z = scale x A^T of a task's columns, which come with those of W and x. A warp has kTiles tiles of A, each kZWarps further; where A has but one,
// each warp has every second block of 64 columns, and z is the sum of two.
template <typename T, bool kNf4, int N, int kTiles, bool kShared>
__device__ __forceinline__ void multiply_tiles_of_a(const GroupTask<T, kNf4, N>& task, StageOf& stage, unsigned z_phase) {
  using Stage = GroupStage<N, kNf4>;
  const int number = threadIdx.x / 32 - kGroupWarps - 1, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, stages = task.group.stages;
  const KernelRowsPart& part = *task.w;
  const int rank = static_cast<int>(part.R), tile_bytes = kTileRows * 128, box_bytes = task.a_box_bytes();
  const bool f32 = part.lora_f32 != 0;
  // Of x rows of two eights for four 8x8 matrices; columns 16 k further are at this xor 32 k.
  const unsigned of_a = place_in_a<kNf4>(box_bytes, f32), of_x = (lane % 8 + lane / 16 * 8) * 128 + (lane / 8 % 2 ^ lane % 8) * 16;
  float acc[kTiles][N / 8][4] = {};
#pragma unroll 1
  for (int unit = task.from; unit < task.to; ++unit) {
    wait_phase(stage.full(), stage.phase);
    if (unit > task.from && lane == 0) stage.leave_last(stages);
#pragma unroll 1
    for (int block = 0; block < Stage::kBlocks; ++block) {
      if (kShared && (unit * Stage::kBlocks + block) % kZWarps != number) continue;
      const unsigned a = stage.memory + task.group.a_at + stage.stage * task.group.a_bytes;
      const unsigned x = stage.memory + kStagesAt + stage.stage * Stage::kXBytes + block * (N * 128) + of_x;
#pragma unroll(kTiles == 1 ? kBlock / 16 : 1)
      for (int k = 0; k < kBlock / 16; ++k) {
        unsigned rows[kTiles][4], columns[N / 16][4];
#pragma unroll
        for (int i = 0; i < kTiles; ++i) {
          const unsigned tile = a + (kShared ? 0 : min((number + i * kZWarps) * tile_bytes, box_bytes - tile_bytes));
          load_rows_of_a<T, kNf4>(rows[i], tile + of_a, box_bytes, f32, block * (kBlock / 16) + k);
        }
#pragma unroll
        for (int n = 0; n < N / 16; ++n) load_matrices(columns[n], (x + n * 2048) ^ 32 * k);
#pragma unroll
        for (int i = 0; i < kTiles; ++i) {
#pragma unroll
          for (int n = 0; n < N / 8; ++n) multiply(acc[i][n], rows[i], columns[n / 2][n % 2 * 2], columns[n / 2][n % 2 * 2 + 1], T{});
        }
      }
    }
    stage.next(stages);
    __syncwarp();
  }
  if (lane == 0) stage.leave_last(stages);
  // z of the task before is read no more.
  wait_phase(stage.memory + kZEmptyAt, z_phase ^ 1);
#pragma unroll
  for (int i = 0; i < kTiles; ++i) {
#pragma unroll
    for (int n = 0; n < N / 8; ++n) {
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const int own = (kShared ? 0 : number + i * kZWarps) * kTileRows + g + k / 2 * 8, column = 8 * n + 2 * t + k % 2;
        const int j = own + (kShared ? number * kTileRows : 0);
        const float z = own < rank ? part.scale * acc[i][n][k] : 0;
        *reinterpret_cast<T*>(task.bytes + kZAt + column * 128 + (j / 8 ^ column % 8) * 16 + j % 8 * 2) = from_float<T>(z);
      }
    }
  }
  make_visible();
  __syncwarp();
  if (lane == 0) arrive(stage.memory + kZFullAt);
}

template <typename T, bool kNf4, int N>
__device__ __forceinline__ void multiply_by_a(const GroupTask<T, kNf4, N>& task, StageOf& stage, unsigned& z_phase) {
  if (!task.adds_lora()) {
    for (int unit = task.from; unit < task.to; ++unit) {
      wait_phase(stage.full(), stage.phase);
      if (threadIdx.x % 32 == 0) arrive(stage.empty());
      stage.next(task.group.stages);
    }
    return;
  }
  if (task.shares_a()) {
    multiply_tiles_of_a<T, kNf4, N, 1, true>(task, stage, z_phase);
  } else if (task.w->R <= kZWarps * kTileRows) {
    multiply_tiles_of_a<T, kNf4, N, 1, false>(task, stage, z_phase);
  } else {
    multiply_tiles_of_a<T, kNf4, N, 2, false>(task, stage, z_phase);
  }
  z_phase ^= 1;
}

// By all threads of block `block` of group.z_blocks. A warp has a tile of A, which it shares with others, and chunks of 32 columns of x.
template <typename T, bool kNf4, int N>
__device__ __forceinline__ void make_z(const GroupPlan& group, int block) {
  constexpr int kWarps = kZWarpsOfBlock, kChunk = kZChunk, kAtOnce = chunks_at_once<N>;
  const KernelRows& p = group.plan.rows;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, M = static_cast<int>(p.M), K = static_cast<int>(p.K);
  const int blocks = group.pieces, rank = block % blocks, clusters = group.z_blocks / blocks, first_tile = block / blocks;
  const int chunks = K / kChunk, from = rank * chunks / blocks, to = (rank + 1) * chunks / blocks;
  int all_tiles = 0;
  for (int i = 0; i < p.count; ++i) all_tiles += group.plan.a_tiles[i];
  const int tiles = (all_tiles - first_tile + clusters - 1) / clusters, of_tile = kWarps / tiles;
  // Which part's, and where its rows begin there, of tile `number` of this cluster's.
  const auto part_of = [&](int number, int& row) -> const KernelRowsPart& {
    int own = 0;
    for (row = first_tile + number * clusters; row >= group.plan.a_tiles[own]; ++own) row -= group.plan.a_tiles[own];
    row *= kTileRows;
    return p.parts[own];
  };
  extern __shared__ uint4 dynamic[];
  float* const sums = reinterpret_cast<float*>(dynamic);      // [tiles, warps of a tile, N, kTileRows]
  float* const of_block = sums + kWarps * N * kTileRows;      // [tiles, M, kTileRows]
  uint4 a[kAtOnce][2];
  if (warp < tiles * of_tile) {
    int row;
    const KernelRowsPart& part = part_of(warp / of_tile, row);
    const int first_chunk = from + warp % of_tile;
    // Of a chunk a lane has eight neighbours of a row of A, two products' share, and the same columns of x, where these stand.
    const auto load_a = [&](int of_row, int chunk) {
      const int column = kNf4 ? chunk / 4 * 128 + 32 * t + chunk % 4 * 8 : chunk * kChunk + 8 * t;
      const int64_t at = int64_t{min(row + of_row, static_cast<int>(part.R) - 1)} * K + column;
      if (!part.lora_f32) return load_early(static_cast<const T*>(part.a) + at);
      const uint4 low = load_early(static_cast<const float*>(part.a) + at), high = load_early(static_cast<const float*>(part.a) + at + 4);
      return pack_words<T>(low, high);
    };
    const auto load_x = [&](int of_row, int chunk) {
      const T* const from_x = static_cast<const T*>(p.x) + of_row * p.x_stride + chunk * kChunk;
      if (!kNf4) return __ldcg(reinterpret_cast<const uint4*>(from_x + 8 * t));
      const auto pair = [&](int i) { return __ldcg(reinterpret_cast<const unsigned*>(from_x + 8 * i + 2 * t)); };
      return make_uint4(pair(0), pair(1), pair(2), pair(3));
    };
    const auto load = [&](int chunk) {
#pragma unroll
      for (int k = 0; k < kAtOnce; ++k) {
        const int at = chunk + k * of_tile;
        a[k][0] = a[k][1] = make_uint4(0, 0, 0, 0);
        if (at < to) a[k][0] = load_a(g, at), a[k][1] = load_a(g + 8, at);
      }
    };
    load(first_chunk);
    inputs_ready();
    float acc[N / 8][4] = {};
#pragma unroll 1
    for (int chunk = first_chunk; chunk < to; chunk += kAtOnce * of_tile) {
      uint4 columns[kAtOnce][N / 8];
#pragma unroll
      for (int k = 0; k < kAtOnce; ++k) {
#pragma unroll
        for (int n = 0; n < N / 8; ++n) columns[k][n] = load_x(min(8 * n + g, M - 1), min(chunk + k * of_tile, to - 1));
      }
#pragma unroll
      for (int k = 0; k < kAtOnce; ++k) {
        const unsigned first[4] = {a[k][0].x, a[k][1].x, a[k][0].y, a[k][1].y}, second[4] = {a[k][0].z, a[k][1].z, a[k][0].w, a[k][1].w};
#pragma unroll
        for (int n = 0; n < N / 8; ++n) {
          multiply(acc[n], first, columns[k][n].x, columns[k][n].y, T{});
          multiply(acc[n], second, columns[k][n].z, columns[k][n].w, T{});
        }
      }
      load(chunk + kAtOnce * of_tile);
    }
#pragma unroll
    for (int n = 0; n < N / 8; ++n) {
#pragma unroll
      for (int k = 0; k < 4; ++k) sums[(warp * N + 8 * n + 2 * t + k % 2) * kTileRows + g + k / 2 * 8] = acc[n][k];
    }
  }
  inputs_ready();
  __syncthreads();
  const int of_columns = M * kTileRows, all = tiles * of_columns;
  for (int i = threadIdx.x; i < all; i += kGroupThreads) {
    float sum = 0;
    for (int k = 0; k < of_tile; ++k) sum += sums[(i / of_columns * of_tile + k) * N * kTileRows + i % of_columns];
    of_block[i] = sum;
  }
  blocks > 1 ? meet_cluster() : __syncthreads();
  for (int i = rank * all / blocks + static_cast<int>(threadIdx.x); i < (rank + 1) * all / blocks; i += kGroupThreads) {
    float sum = 0;
    for (int k = 0; k < blocks; ++k) sum += of_cluster(of_block + i, k, blocks);
    const int tile = i / of_columns;
    int row;
    static_cast<T*>(group.z)[(first_tile + tile * clusters) * kZTile + i % of_columns] = from_float<T>(part_of(tile, row).scale * sum);
  }
  // Others' sums are read.
  blocks > 1 ? meet_cluster() : __syncthreads();
  if (threadIdx.x == 0) add_release(group.z_counters, 1);
}

// z of a task's part into shared memory, by kZWarps warps, once it is there.
template <typename T, bool kNf4, int N>
__device__ __forceinline__ void fetch_z(const GroupTask<T, kNf4, N>& task, unsigned memory, unsigned& phase) {
  constexpr int kThreads = 32 * kZWarps;
  const int thread = threadIdx.x - (kMultipliers + 32), M = static_cast<int>(task.p.M), halves = 2 * M;
  int tile = 0;
  for (int i = 0; i < task.part; ++i) tile += task.tiles_of_z(i);
  const auto* const from = reinterpret_cast<const uint4*>(static_cast<const T*>(task.group.z) + tile * kZTile);
  // z of the task before is read no more.
  wait_phase(memory + kZEmptyAt, phase ^ 1);
  if (threadIdx.x % 32 == 0) {
    while (load_acquire(task.group.z_counters) < task.group.z_blocks) __nanosleep(kPollNanoseconds);
  }
  __syncwarp();
#pragma unroll 4
  for (int i = thread; i < task.tiles_of_z(task.part) * halves; i += kThreads) {
    const int own = i / halves, column = i % halves / 2, piece = 2 * own + i % 2;
    *reinterpret_cast<uint4*>(shared_bytes() + kZAt + column * 128 + (piece ^ column % 8) * 16) = __ldcg(from + own * (kZTile / 8) + i % halves);
  }
  make_visible();
  __syncwarp();
  if (threadIdx.x % 32 == 0) arrive(memory + kZFullAt);
  phase ^= 1;
}

// The last warp of all thread blocks that may have read z leaves counters at zero.
__device__ __forceinline__ void leave_z(const GroupPlan& group, int readers) {
  __syncwarp();
  if (threadIdx.x % 32 != 0) return;
  __threadfence();
  if (atomicAdd(group.z_counters + 1, 1) == readers * kZWarps - 1) group.z_counters[0] = group.z_counters[1] = 0;
}

#endif

}  // namespace
}  // namespace ferrotune
