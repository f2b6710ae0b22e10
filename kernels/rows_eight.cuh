// defines: launch_eight: at most eight rows of x. A thread block has a piece of a tile of A, or every C-th tile of W, whose units its
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

// This warp's units [from, from + count) of one tile after another, 4-bit weights, through a ring in shared memory that does not run
// dry between tiles: while a group of four units is worked on, the next is under way.
template <typename T>
struct Nf4Tiles {
  static constexpr int kRing = 4, kUnitBytes = kTileRows * kBlock / 2;
  const Plan& plan;
  const int from, count;
  const unsigned table, ring;
  // The next group: its tile, its first unit, and where this lane's copies and scales come from.
  Tiles next;
  int unit;
  const uint8_t* w;
  int64_t top_block = 0, bottom_block = 0;
  int nested_shift = 0;
  // Lane t has the scales of unit t of the next group.
  float top_most = 0, bottom_most = 0;
  unsigned top_index = 0, bottom_index = 0;

  __device__ Nf4Tiles(const Plan& given, Tiles tiles, int first, int units, unsigned pairs, unsigned ring_address)
      : plan(given), from(first), count(units), table(pairs + threadIdx.x % 32 * 4), ring(ring_address), next(tiles), unit(units) {
    next.tile -= tiles.step;
    advance();
#pragma unroll
    for (int u = 0; u < kRing; ++u) fetch(u);
    load_scales();
  }

  __device__ __forceinline__ void advance() {
    unit += 4;
    w += 4 * (kBlock / 2);
    top_block += 4;
    bottom_block += 4;
    if (unit < count) return;
    next.tile += next.step;
    unit = 0;
    if (next.tile >= next.all) {
      unit = count;
      return;
    }
    const int lane = threadIdx.x % 32;
    const TilePlace at = place_of(plan, next.tile);
    const KernelRowsPart& part = plan.rows.parts[at.part];
    const auto row = [&](int64_t r) { return at.row + r < part.rows ? at.row + r : part.rows - 1; };
    w = part.nf4.packed + row(lane / 2) * (plan.rows.K / 2) + from * (kBlock / 2) + lane % 2 * 16;
    top_block = row(lane / 4) * plan.blocks + from;
    bottom_block = row(lane / 4 + 8) * plan.blocks + from;
    nested_shift = plan.nested_shift[at.part];
    nf4 = &part.nf4;
  }
  const KernelNf4* nf4 = nullptr;

  __device__ __forceinline__ void fetch(int u) {
    if (unit + u < count) copy_16_bytes(ring + u * kUnitBytes + threadIdx.x % 32 * 16, w + u * (kBlock / 2), true);
    commit_copies();
  }

  __device__ __forceinline__ void load_scales() {
    if (unit >= count) return;
    const int own = min(static_cast<int>(threadIdx.x % 4), count - 1 - unit);
    const int64_t top = top_block + own, bottom = bottom_block + own;
    if (nf4->nested_absmax == nullptr) {
      top_most = static_cast<const float*>(nf4->absmax)[top];
      bottom_most = static_cast<const float*>(nf4->absmax)[bottom];
      return;
    }
    top_index = static_cast<const uint8_t*>(nf4->absmax)[top];
    bottom_index = static_cast<const uint8_t*>(nf4->absmax)[bottom];
    top_most = nf4->nested_absmax[top >> nested_shift];
    bottom_most = nf4->nested_absmax[bottom >> nested_shift];
  }

  // x: of column g, or null where there is none.
  __device__ __forceinline__ void tile(float (&acc)[4], int part, const T* x) {
    const KernelNf4& own = plan.rows.parts[part].nf4;
    const int lane = threadIdx.x % 32;
    XOfUnit columns{};
    if (x != nullptr && count > 0) columns = load_x(x);
#pragma unroll 1
    for (int first = 0; first < count; first += 4) {
      float top = top_most, bottom = bottom_most;
      if (own.nested_absmax != nullptr) {
        top = __fadd_rn(__fmul_rn(own.nested_quant_map[top_index], top), own.nested_offset);
        bottom = __fadd_rn(__fmul_rn(own.nested_quant_map[bottom_index], bottom), own.nested_offset);
      }
      advance();
      load_scales();
#pragma unroll
      for (int u = 0; u < 4; ++u) {
        XOfUnit following = columns;
        if (x != nullptr && first + u + 1 < count) following = load_x(x + (u + 1) * kBlock);
        wait_copies<kRing - 1>();
        __syncwarp();
        const uint2 above = load_shared_2(ring + u * kUnitBytes + lane * 8);
        const uint2 below = load_shared_2(ring + u * kUnitBytes + 256 + lane * 8);
        __syncwarp();
        fetch(u);
        if (first + u < count) {
          unsigned top_pairs[8], bottom_pairs[8];
          look_up(above.x, table, top_pairs);
          look_up(below.x, table, bottom_pairs);
          look_up(above.y, table, top_pairs + 4);
          look_up(below.y, table, bottom_pairs + 4);
          float sum[4] = {};
          multiply_pairs<T>(sum, sum, top_pairs, bottom_pairs, columns);
          const float top_scale = __shfl_sync(0xffffffff, top, u, 4), bottom_scale = __shfl_sync(0xffffffff, bottom, u, 4);
          acc[0] += top_scale * sum[0];
          acc[1] += top_scale * sum[1];
          acc[2] += bottom_scale * sum[2];
          acc[3] += bottom_scale * sum[3];
        }
        columns = following;
      }
      if (x != nullptr) x += 4 * kBlock;
    }
  }
};

// The same for 16-bit weights: 128 bytes of a row a unit.
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

  __device__ DenseTiles(const Plan& given, Tiles tiles, int first, int units, unsigned, unsigned ring_address)
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

  __device__ __forceinline__ void tile(float (&acc)[4], int, const T* x) {
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
template <typename T, bool kNf4>
__global__ void __launch_bounds__(32 * kWarps, 3) eight_rows_kernel(const __grid_constant__ Plan plan) {
#if __CUDA_ARCH__ >= 800
  using Source = std::conditional_t<kNf4, Nf4Tiles<T>, DenseTiles<T>>;
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
    const unsigned base = shared_address(dynamic), ring = base + (kNf4 ? 256 * 32 * 4 : 0) + warp * (Source::kRing * Source::kUnitBytes);
    Source source(plan, tiles, from, count, base, ring);
    const float* table_of = nullptr;
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
      if (kNf4 && table_of != w.nf4.quant_map) {
        if (table_of != nullptr) __syncthreads();
        table_of = w.nf4.quant_map;
        fill_table<T, kThreads>(dynamic, table_of);
      }
      if (tile == tiles.tile) inputs_ready();
      float acc[4] = {};
      source.tile(acc, at.part, g < p.M ? x + from * kBlock : nullptr);
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
int launch_eight(Plan plan, bool nf4, int tiles, void* stream) {
  plan.units = tiles;
  // What is on the processors at once, A's pieces included.
  const int most = 3 * device_attribute(cudaDevAttrMultiProcessorCount) - plan.a_blocks;
  const int blocks = plan.a_blocks + (tiles < most ? tiles : most > 1 ? most : 1);
  const size_t ring = nf4 ? Nf4Tiles<T>::kRing * Nf4Tiles<T>::kUnitBytes : DenseTiles<T>::kRing * DenseTiles<T>::kUnitBytes;
  const size_t shared = kWarps * ring + (nf4 ? 256 * 32 * 4 : 0);
  return nf4 ? launch_with(eight_rows_kernel<T, true>, dim3(static_cast<unsigned>(blocks)), 32 * kWarps, shared, stream, plan)
             : launch_with(eight_rows_kernel<T, false>, dim3(static_cast<unsigned>(blocks)), 32 * kWarps, shared, stream, plan);
}

}  // namespace
}  // namespace ferrotune
