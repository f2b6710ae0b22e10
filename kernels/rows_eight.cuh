// defines: launch_eight: at most eight rows of x, 16-bit weights. A thread block has a piece of a tile of A, or every C-th tile of W, whose units its
// warps share; weights of the next tile are under way while it finishes one.
#pragma once

#include "rows.cuh"

namespace ferrotune {
namespace {

// The tiles of a thread block: every `step`-th from `tile` on.
struct Tiles {
  int tile, step, all;
};
struct TilePlace {
  int part, a_tile;
  int64_t row, out_row;  // of the part, and of the output
};
__device__ inline TilePlace place_of(const Plan& plan, int tile) {
  TilePlace at{0, 0, 0, 0};
  while (tile >= plan.w_tiles[at.part]) {
    tile -= plan.w_tiles[at.part];
    at.out_row += plan.rows.parts[at.part].rows;
    at.a_tile += plan.a_tiles[at.part];
    ++at.part;
  }
  at.row = int64_t{tile} * kTileRows;
  at.out_row += at.row;
  return at;
}

// This warp's units [from, from + count) of one tile after another, 128 bytes of a row each, through a ring in shared memory that does
// not run dry between tiles.
template <typename T>
struct DenseTiles {
  static constexpr int kRing = 3, kUnitBytes = kTileRows * kBlock * 2;
  const Plan& plan;
  const int from, count;
  const unsigned ring;
  Tiles fetched;
  const char* w[4];
  int left = 0;
  unsigned slot = 0;

  __device__ DenseTiles(const Plan& given, Tiles tiles, int first, int units, unsigned ring_address)
      : plan(given), from(first), count(units), ring(ring_address), fetched(tiles) {
    fetched.tile -= tiles.step;
#pragma unroll
    for (int s = 0; s < kRing; ++s) fetch(s * kUnitBytes);
  }

  __device__ __forceinline__ void fetch(unsigned to) {
    const int lane = threadIdx.x % 32;
    if (left == 0 && fetched.tile + fetched.step < fetched.all && count > 0) {
      fetched.tile += fetched.step;
      const TilePlace at = place_of(plan, fetched.tile);
      const KernelRowsPart& part = plan.rows.parts[at.part];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int64_t row = at.row + 4 * i + lane / 8;
        w[i] = static_cast<const char*>(part.w) + ((row < part.rows ? row : part.rows - 1) * part.w_stride + from * kBlock) * 2 +
               lane % 8 * 16;
      }
      left = count;
    }
    if (left > 0) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        copy_16_bytes(ring + to + i * 512 + lane * 16, w[i], true);
        w[i] += kBlock * 2;
      }
      --left;
    }
    commit_copies();
  }

  __device__ __forceinline__ void tile(float (&acc)[4], const T* x) {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    XOfUnit columns{};
    if (x != nullptr && count > 0) columns = load_x(x);
    float odd[4] = {};
#pragma unroll 1
    for (int unit = 0; unit < count; ++unit) {
      XOfUnit following = columns;
      if (x != nullptr && unit + 1 < count) following = load_x(x += kBlock);
      wait_copies<kRing - 1>();
      __syncwarp();
      const unsigned at = ring + slot + g * 128 + t * 32;
      const uint4 a = load_shared_4(at), b = load_shared_4(at + 16), c = load_shared_4(at + 1024), d = load_shared_4(at + 1040);
      __syncwarp();
      fetch(slot);
      slot = slot + kUnitBytes == kRing * kUnitBytes ? 0 : slot + kUnitBytes;
      const unsigned top[8] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w}, bottom[8] = {c.x, c.y, c.z, c.w, d.x, d.y, d.z, d.w};
      multiply_pairs<T>(acc, odd, top, bottom, columns);
      columns = following;
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) acc[i] += odd[i];
  }
};

// Three thread blocks are on a processor. Those with a piece of A come first; each other has every C-th tile of W.
template <typename T>
__global__ void __launch_bounds__(32 * kWarps, 3) eight_rows_kernel(const __grid_constant__ Plan plan) {
#if __CUDA_ARCH__ >= 800
  using Source = DenseTiles<T>;
  constexpr int kThreads = 32 * kWarps;
  __shared__ float sums[2][kWarps][kEight * kSumStride];
  __shared__ float z[kEight][kMostRank];
  // B of this thread block's tile and of the next.
  __shared__ __align__(16) unsigned char b_tiles[2][kTileRows * kMostRank * 4];
  extern __shared__ uint4 dynamic[];
  const KernelRows& p = plan.rows;
  const Workspace workspace{static_cast<char*>(p.workspace)};
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const T* const x = static_cast<const T*>(p.x) + min(g, static_cast<int>(p.M) - 1) * p.x_stride + 16 * t;
  const int row = threadIdx.x % kTileRows, column = threadIdx.x / kTileRows, block = static_cast<int>(blockIdx.x);
  const auto sum_of = [&](int half) {
    float value = 0;
#pragma unroll
    for (int k = 0; k < kWarps; ++k) value += sums[half][k][column * kSumStride + row];
    return value;
  };
  next_may_start();

  if (block < plan.a_blocks) {
    inputs_ready();
    share_of_a<T>(plan, workspace, sums[0], block, 0);
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) atomicAdd(workspace.a_ready(), 1);
  } else {
    const int each = (plan.blocks + kWarps - 1) / kWarps, from = min(warp * each, plan.blocks), count = min(each, plan.blocks - from);
    const Tiles tiles{block - plan.a_blocks, static_cast<int>(gridDim.x) - plan.a_blocks, plan.units};
    Source source(plan, tiles, from, count, shared_address(dynamic) + warp * (Source::kRing * Source::kUnitBytes));
    int half = 0, z_of = -1;
    for (int tile = tiles.tile; tile < tiles.all; tile += tiles.step) {
      const TilePlace at = place_of(plan, tile);
      const KernelRowsPart& w = p.parts[at.part];
      if (w.b != nullptr) {
        // Under way with the first units of the tile, which are in the next group of copies.
        const int64_t row_bytes = w.R * (w.lora_f32 ? 4 : 2), bytes = min(int64_t{kTileRows}, w.rows - at.row) * row_bytes;
        const char* const b = static_cast<const char*>(w.b) + at.row * row_bytes;
        for (int i = 16 * threadIdx.x; i < bytes; i += 16 * kThreads) copy_16_bytes(shared_address(b_tiles[half] + i), b + i, true);
      }
      if (tile == tiles.tile) inputs_ready();
      float acc[4] = {};
      source.tile(acc, g < p.M ? x + from * kBlock : nullptr);
      float* const own = sums[half][warp];
      own[2 * t * kSumStride + g] = acc[0];
      own[(2 * t + 1) * kSumStride + g] = acc[1];
      own[2 * t * kSumStride + g + 8] = acc[2];
      own[(2 * t + 1) * kSumStride + g + 8] = acc[3];
      const int rank = static_cast<int>(w.R);
      if (w.a != nullptr && z_of != at.part) {
        if (threadIdx.x == 0) {
          const volatile int* const done = workspace.a_ready();
          while (*done < plan.a_blocks) {}
          __threadfence();
        }
        __syncthreads();
        z_of = at.part;
        for (int i = threadIdx.x; i < static_cast<int>(p.M) * rank; i += kThreads) {
          const int c = i / rank, j = i - c * rank;
          z[c][j] = w.scale * workspace.z(plan, at.a_tile, j, c);
        }
      }
      if (w.b != nullptr && count < 8) wait_copies<0>();
      __syncthreads();
      if (column < p.M && at.row + row < w.rows) {
        float value = sum_of(half);
        const int64_t to = column * p.y_stride + at.out_row + row;
        if (w.a != nullptr) {
          const auto add = [&](const auto* b) {
#pragma unroll 8
            for (int j = 0; j < rank; ++j) value += to_float(from_float<T>(to_float(b[row * rank + j]))) * z[column][j];
          };
          w.lora_f32 ? add(reinterpret_cast<const float*>(b_tiles[half])) : add(reinterpret_cast<const T*>(b_tiles[half]));
        }
        if (p.bias != nullptr) value += to_float(static_cast<const T*>(p.bias)[at.out_row + row]);
        if (p.residual != nullptr) value += to_float(static_cast<const T*>(p.residual)[column * p.residual_stride + at.out_row + row]);
        if (p.y_f32) {
          static_cast<float*>(p.y)[to] = value;
        } else {
          static_cast<T*>(p.y)[to] = from_float<T>(value);
        }
      }
      half ^= 1;
    }
    inputs_ready();
  }
  // The last block leaves the counters as it found them. Nobody waits any more.
  if (threadIdx.x == 0 && plan.a_blocks > 0 && atomicAdd(workspace.left(), 1) == static_cast<int>(gridDim.x) - 1) {
    *workspace.a_ready() = 0;
    *workspace.left() = 0;
  }
#endif
}

template <typename T>
int launch_eight(Plan plan, int tiles, void* stream) {
  plan.units = tiles;
  // What is on the processors at once, A's pieces included.
  const int most = 3 * device_attribute(cudaDevAttrMultiProcessorCount) - plan.a_blocks;
  const int blocks = plan.a_blocks + (tiles < most ? tiles : most > 1 ? most : 1);
  const size_t shared = kWarps * DenseTiles<T>::kRing * DenseTiles<T>::kUnitBytes;
  return launch_with(eight_rows_kernel<T>, dim3(static_cast<unsigned>(blocks)), 32 * kWarps, shared, stream, plan);
}

}  // namespace
}  // namespace ferrotune
