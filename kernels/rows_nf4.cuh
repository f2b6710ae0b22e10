// defines: launch_strips: at most eight rows of x, NF4 weights. A thread block has a run of tiles of one part to itself and its warps
// share the groups of all of them; sums meet once, at the end. One more warp computes this thread block's pieces of x A^T, waits for
// those of the others, and has the products with A ready when the tiles are.
//
// A group is 256 columns of a tile: two runs of 64 bytes of each of 16 rows, 16 bytes a lane. Lanes 0 and 1 of a row then have one
// block of 64 weights and lanes 2 and 3 the next, which a product would add up unscaled; but of the eight columns of a product few are
// rows of x, and so each block gets columns of its own, with x in the lanes that have it and zeros in the others. Scales are applied
// once a group.
//
// What bounds it is the path to shared memory and the first-level cache, cycles of a processor for 16 x 64 weights: 16 accesses to the
// table of pairs, 8 to look for the lines of W, 3 for x and the scales. 28672 x 4096: 11.7 us at 1.98 GHz; its bytes take 7.6.
#pragma once

#include "rows.cuh"

namespace ferrotune {
namespace {

constexpr int kStripWarps = 15, kStripThreads = 32 * (kStripWarps + 1), kGroupBlocks = 4, kRing = 3;
constexpr int kMapCopies = 8;

// What a thread block's shared memory holds, in bytes from the start of its address space, of which up to kReserved are not ours. Of one
// or two rows of x the pair of byte i lies at kTableAt + 256 i + 4 lane, an address that one permutation of bytes makes; x lies behind
// the table. More rows of x need that room: 128 bytes a pair, and one instruction more.
constexpr int kReserved = 1024, kTableAt = 0x10000;
struct StripShared {
  int table, map, tiles, z, slots, nested, absmax, b, x, all;
  int absmax_stride, x_stride;  // of a row
};

struct StripPlan {
  Plan plan;    // per: tiles of a thread block
  int at_once;  // tiles whose sums meet at a time
  StripShared at;
};

// Rows of a round of tiles in shared memory. Words lie so that eight rows are in different banks.
inline int absmax_words(int blocks) {
  int words = blocks / 4;
  while (words % 8 != 4) ++words;
  return words;
}

__device__ __forceinline__ void copy_4_bytes(unsigned to, const void* from) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(to), "l"(from));
}

// W of this warp's groups, kRing of them under way.
struct StripRows {
  const KernelRowsPart& part;
  const int64_t row_bytes;
  const int groups;  // of a tile
  int tile, group;
  const char *top, *bottom;

  __device__ StripRows(const Plan& plan, const KernelRowsPart& of, int first_tile, int first_group)
      : part(of),
        row_bytes(plan.rows.K / 2),
        groups(plan.blocks / kGroupBlocks),
        tile(first_tile + first_group / groups),
        group(first_group % groups) {
    seek();
  }
  __device__ __forceinline__ void seek() {
    const int lane = threadIdx.x % 32;
    const auto row = [&](int r) {
      const int64_t at = int64_t{tile} * kTileRows + lane / 4 + r;
      return reinterpret_cast<const char*>(part.nf4.packed) + (at < part.rows ? at : part.rows - 1) * row_bytes + group * 128 + lane % 4 * 16;
    };
    top = row(0);
    bottom = row(8);
  }
  __device__ __forceinline__ void load(uint4 (&to)[2], int run) const {
    to[0] = load_once(reinterpret_cast<const uint4*>(top + run * 64));
    to[1] = load_once(reinterpret_cast<const uint4*>(bottom + run * 64));
  }
  __device__ __forceinline__ void advance() {
    top += 128;
    bottom += 128;
    if (++group == groups) {
      group = 0;
      ++tile;
      seek();
    }
  }
};

// How the eight columns of a product are shared by MP rows of x and the blocks of a group: of MP <= 2 column MP s + c is row c over
// block s of the group, and of the product with a run only the columns of its own blocks are of use; of MP = 4 column 4 s + c is row c
// over block s of the run; of MP = 8 the blocks of a run take a product each.
template <int MP>
struct ColumnUse {
  static constexpr bool kXOfRun = MP >= 4, kWide = MP <= 2;
  // The lane with column g has x of row g % MP, elements 32 t .. of run(g) or of every run, or zeros for good.
  __device__ static bool has(int g, int t) {
    return MP == 8 || (MP == 4 ? t / 2 == g / 4 : MP == 2 ? t / 2 == g / 2 % 2 : g < 4 && t / 2 == g % 2);
  }
  __device__ static int run(int g) { return kXOfRun ? 0 : MP == 2 ? g / 4 : g / 2; }
  // The run whose product has this lane's columns, for MP <= 2.
  __device__ static int run_of_lane(int t) { return MP == 2 ? t / 2 : t; }
};

template <bool kWide>
__device__ __forceinline__ void look_up_words(const uint4& words, unsigned table, unsigned (&out)[16]) {
  const unsigned w[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    const unsigned at = kWide ? __byte_perm(w[i / 4], table, 0x7604 | i % 4 << 4) : table + __byte_perm(w[i / 4], 0, 0x4440 + i % 4) * 128;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(out[i]) : "r"(at));
  }
}

// z[c][j] = scale * the sum of all pieces of row j of A times x c, by one warp: all of a piece's 16 x MP sums at a time.
template <int MP>
__device__ __forceinline__ void add_pieces(const Plan& plan, const Workspace& workspace, int a_tile, int rank, float scale, float* z) {
  constexpr int kLanes = 4 * MP, kAtOnce = 32 / kLanes;
  const int lane = threadIdx.x % 32, column = lane % kLanes / 4, four = lane % 4;
  for (int tile = 0; tile * kTileRows < rank; ++tile) {
    float4 sum = make_float4(0, 0, 0, 0);
#pragma unroll 16
    for (int piece = lane / kLanes; piece < plan.pieces; piece += kAtOnce) {
      const float4 v = __ldcg(reinterpret_cast<const float4*>(workspace.a_sums(plan, a_tile + tile, piece, 0) + column * kTileRows) + four);
      sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
    }
#pragma unroll
    for (int other = kLanes; other < 32; other *= 2) {
      sum.x += __shfl_xor_sync(0xffffffff, sum.x, other), sum.y += __shfl_xor_sync(0xffffffff, sum.y, other);
      sum.z += __shfl_xor_sync(0xffffffff, sum.z, other), sum.w += __shfl_xor_sync(0xffffffff, sum.w, other);
    }
    if (lane < kLanes) {
      float4* const to = reinterpret_cast<float4*>(z + column * kMostRank + tile * kTileRows) + four;
      *to = make_float4(scale * sum.x, scale * sum.y, scale * sum.z, scale * sum.w);
    }
  }
}

template <typename T, bool kNested, int MP, bool kShared>
__global__ void __launch_bounds__(kStripThreads, 1) strips_kernel(const __grid_constant__ StripPlan strip_plan) {
#if __CUDA_ARCH__ >= 800
  using Use = ColumnUse<MP>;
  extern __shared__ uint4 dynamic[];
  constexpr int kPairBytes = Use::kWide ? 256 : 128;
  const Plan& plan = strip_plan.plan;
  const StripShared& in = strip_plan.at;
  const KernelRows& p = plan.rows;
  const Workspace workspace{static_cast<char*>(p.workspace)};
  char* const bytes = reinterpret_cast<char*>(dynamic) - shared_address(dynamic);
  float* const map = reinterpret_cast<float*>(bytes + in.map);
  int2* const tile_slots = reinterpret_cast<int2*>(bytes + in.tiles);
  float* const z = reinterpret_cast<float*>(bytes + in.z);
  float* const slots = reinterpret_cast<float*>(bytes + in.slots);
  float* const nested = reinterpret_cast<float*>(bytes + in.nested);
  char* const b_rows = bytes + in.b;
  constexpr int kSlot = MP * kSumStride;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, M = static_cast<int>(p.M);
  int block = static_cast<int>(blockIdx.x), which = 0, a_tile = 0;
  int64_t part_row = 0;
  while (block >= plan.w_blocks[which]) {
    block -= plan.w_blocks[which];
    a_tile += plan.a_tiles[which];
    part_row += p.parts[which].rows;
    ++which;
  }
  const KernelRowsPart& w = p.parts[which];
  const int rank = static_cast<int>(w.R), b_row_bytes = rank * (w.lora_f32 ? 4 : 2), shift = plan.nested_shift[which];
  const int first_tile = block * plan.per, last_tile = min(first_tile + plan.per, plan.w_tiles[which]);
  const int groups = plan.blocks / kGroupBlocks;
  next_may_start();

  for (int tile = first_tile; tile < last_tile; tile += strip_plan.at_once) {
    const int tiles = min(strip_plan.at_once, last_tile - tile), all = tiles * groups;
    const int from = warp * all / kStripWarps;
    int left = warp < kStripWarps ? (warp + 1) * all / kStripWarps - from : 0;
    const int64_t first_row = int64_t{tile} * kTileRows;
    const int rows = static_cast<int>(min(int64_t{tiles} * kTileRows, w.rows - first_row));
    const bool first_time = tile == first_tile;

    // What no kernel writes: maps, W's first groups, scales, B.
    float code = 0, of_map[256 * kMapCopies / kStripThreads];
    if (first_time) {
      code = w.nf4.quant_map[lane % 16];
      if constexpr (kNested) {
#pragma unroll
        for (int i = 0; i < 256 * kMapCopies / kStripThreads; ++i) of_map[i] = w.nf4.nested_quant_map[(i * kStripThreads + threadIdx.x) / kMapCopies];
      }
    }
    StripRows source(plan, w, tile, warp < kStripWarps ? from : 0);
    uint4 ring[kRing][2][2];
    int ahead = left;
    const auto fetch = [&](uint4 (&to)[2][2], int run) {
      if (ahead > 0) source.load(to[run], run);
    };
    const auto fetched = [&] {
      if (--ahead > 0) source.advance();
    };
#pragma unroll
    for (int i = 0; i < kRing; ++i) {
      fetch(ring[i], 0);
      fetch(ring[i], 1);
      fetched();
    }
    const int64_t first_nested = kNested ? first_row * plan.blocks >> shift : 0;
    if constexpr (kNested) {
      const auto* const from_absmax = static_cast<const uint8_t*>(w.nf4.absmax) + first_row * plan.blocks;
      const int piece = plan.blocks % 16 == 0 ? 16 : 4, pieces = plan.blocks / piece;
      for (int i = threadIdx.x; i < rows * pieces; i += kStripThreads) {
        const int row = i / pieces;
        const unsigned to = shared_address(bytes + in.absmax + row * in.absmax_stride + (i - row * pieces) * piece);
        piece == 16 ? copy_16_bytes(to, from_absmax + i * 16, true) : copy_4_bytes(to, from_absmax + i * 4);
      }
      const int count = static_cast<int>(((first_row + rows) * plan.blocks - 1 >> shift) - first_nested) + 1;
      for (int i = threadIdx.x; i < count; i += kStripThreads) copy_4_bytes(shared_address(nested + i), w.nf4.nested_absmax + first_nested + i);
    }
    if (first_time && warp == kStripWarps) {
      for (int task = static_cast<int>(blockIdx.x); task < plan.a_blocks; task += static_cast<int>(gridDim.x)) prefetch_share_of_a(plan, task);
    }
    if (w.b != nullptr) {
      const char* const b = static_cast<const char*>(w.b) + first_row * b_row_bytes;
      for (int i = 16 * threadIdx.x; i < rows * b_row_bytes; i += 16 * kStripThreads) copy_16_bytes(shared_address(b_rows + i), b + i, true);
    }
    commit_copies();
    // Warp k begins at group k all / kStripWarps: the warps that a tile has, whose slots follow each other. Where there are more warps
    // than groups some have none, and their slots are zero.
    if (static_cast<int>(threadIdx.x) < tiles) {
      const int local = threadIdx.x, begin = ((local * groups + 1) * kStripWarps - 1) / all, end = ((local + 1) * groups * kStripWarps - 1) / all;
      tile_slots[local] = make_int2(begin + local, end - begin + 1);
    }
    if (all < kStripWarps) {
      for (int i = threadIdx.x; i < (kStripWarps + tiles) * kSlot; i += kStripThreads) slots[i] = 0;
    }
    if (first_time) {
      if constexpr (kNested) {
#pragma unroll
        for (int i = 0; i < 256 * kMapCopies / kStripThreads; ++i) map[i * kStripThreads + threadIdx.x] = of_map[i];
      }
      for (int i = threadIdx.x; i < 256 * 8; i += kStripThreads) {
        const float even = __shfl_sync(0xffffffff, code, i >> 7), odd = __shfl_sync(0xffffffff, code, i >> 3 & 15);
        const unsigned pair = pack(even, odd, T{});
        *reinterpret_cast<uint4*>(bytes + in.table + (i >> 3) * kPairBytes + i % 8 * 16) = make_uint4(pair, pair, pair, pair);
      }
      inputs_ready();
      if (kShared) {
        for (int c = 0; c < M; ++c) {
          const auto* const row = reinterpret_cast<const uint4*>(static_cast<const T*>(p.x) + c * p.x_stride);
          const unsigned copy = shared_address(bytes + in.x + c * in.x_stride);
          for (int i = threadIdx.x; i < p.K / 8; i += kStripThreads) {
            copy_16_bytes(copy + 16 * i, row + i, true);
          }
        }
        commit_copies();
      }
    }
    wait_copies<0>();
    __syncthreads();

    if (warp == kStripWarps) {
      if (first_time) {
        for (int task = static_cast<int>(blockIdx.x); task < plan.a_blocks; task += static_cast<int>(gridDim.x)) {
          warp_share_of_a<T>(plan, workspace, task);
        }
        if (w.a != nullptr) {
          while (load_acquire(workspace.a_ready()) < plan.a_blocks) {}
          add_pieces<MP>(plan, workspace, a_tile, rank, w.scale, z);
        }
      }
    } else if (left > 0) {
      const unsigned table = in.table + lane * 4;
      const bool has = Use::has(g, t) && g % MP < M;
      const char* const x_row = kShared ? bytes + in.x + g % MP * in.x_stride : static_cast<const char*>(p.x) + g % MP * p.x_stride * 2;
      const char* const x_at = x_row + t * 64 + Use::run(g) * 256;
      const float* const my_map = map + g;
      unsigned x[16] = {};
      float acc[4] = {};
      int group = from % groups, local = from / groups;
      float* slot = slots + (warp + local) * kSlot + g;
      const auto load_x = [&](const char* at) {
        if (!has) return;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const uint4 four = *reinterpret_cast<const uint4*>(at + 16 * i);
          x[4 * i] = four.x, x[4 * i + 1] = four.y, x[4 * i + 2] = four.z, x[4 * i + 3] = four.w;
        }
      };
      // Where this lane's two rows begin: their scales in shared memory, and their blocks from the first of the scales' scales on.
      const char* absmax_at;
      int top_block, bottom_block;
      const auto rows_of_tile = [&] {
        const int top_row = min(local * kTileRows + g, rows - 1), bottom_row = min(local * kTileRows + g + 8, rows - 1);
        const int before = kNested ? static_cast<int>(first_row * plan.blocks - (first_nested << shift)) : 0;
        absmax_at = bytes + in.absmax + (local * kTileRows + g) * in.absmax_stride;
        top_block = before + top_row * plan.blocks;
        bottom_block = before + bottom_row * plan.blocks;
      };
      rows_of_tile();
      const auto step = [&](uint4 (&own)[2][2]) {
        const char* const x_group = x_at + group * 512;
        if (!Use::kXOfRun) load_x(x_group);
        // The scales of the blocks of this lane's columns: of rows g and g + 8.
        unsigned absmax[2];
        float nested_of[2];
        if constexpr (kNested) {
          absmax[0] = *reinterpret_cast<const unsigned*>(absmax_at + group * 4);
          absmax[1] = *reinterpret_cast<const unsigned*>(absmax_at + group * 4 + 8 * in.absmax_stride);
          nested_of[0] = nested[top_block + group * kGroupBlocks >> shift];
          nested_of[1] = nested[bottom_block + group * kGroupBlocks >> shift];
        }
        const auto scale = [&](int half, int of_group) {
          if constexpr (kNested) {
            const float value = my_map[(absmax[half] >> 8 * of_group & 255) * kMapCopies];
            return __fadd_rn(__fmul_rn(value, nested_of[half]), w.nf4.nested_offset);
          } else {
            const int64_t at = first_row * plan.blocks + (half == 0 ? top_block : bottom_block);
            return static_cast<const float*>(w.nf4.absmax)[at + group * kGroupBlocks + of_group];
          }
        };
        float sum[2][4] = {};
#pragma unroll
        for (int run = 0; run < 2; ++run) {
          if (Use::kXOfRun) load_x(x_group + run * 256);
          unsigned top[16], bottom[16];
          look_up_words<Use::kWide>(own[run][0], table, top);
          look_up_words<Use::kWide>(own[run][1], table, bottom);
          fetch(own, run);
          if (run == 1) fetched();
#pragma unroll
          for (int j = 0; j < 8; ++j) {
            const unsigned a[4] = {top[2 * j], bottom[2 * j], top[2 * j + 1], bottom[2 * j + 1]};
            if constexpr (MP == 8) {
              multiply(sum[0], a, t < 2 ? x[2 * j] : 0, t < 2 ? x[2 * j + 1] : 0, T{});
              multiply(sum[1], a, t < 2 ? 0 : x[2 * j], t < 2 ? 0 : x[2 * j + 1], T{});
            } else if constexpr (MP == 4) {
              multiply(sum[j % 2], a, x[2 * j], x[2 * j + 1], T{});
            } else {
              multiply(sum[run], a, x[2 * j], x[2 * j + 1], T{});
            }
          }
          if constexpr (MP >= 4) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
              if constexpr (MP == 8) {
                const float even = scale(half, 2 * run), odd = scale(half, 2 * run + 1);
                acc[2 * half] += even * sum[0][2 * half] + odd * sum[1][2 * half];
                acc[2 * half + 1] += even * sum[0][2 * half + 1] + odd * sum[1][2 * half + 1];
              } else {
                const float own_scale = scale(half, 2 * run + t / 2);
                acc[2 * half] += own_scale * (sum[0][2 * half] + sum[1][2 * half]);
                acc[2 * half + 1] += own_scale * (sum[0][2 * half + 1] + sum[1][2 * half + 1]);
              }
            }
#pragma unroll
            for (int i = 0; i < 4; ++i) sum[0][i] = sum[1][i] = 0;
          }
        }
        if constexpr (MP <= 2) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const bool second = Use::run_of_lane(t) == 1;
            const float even = second ? sum[1][2 * half] : sum[0][2 * half], odd = second ? sum[1][2 * half + 1] : sum[0][2 * half + 1];
            if constexpr (MP == 1) {
              // Lanes 2 and 3 have columns of zeros.
              acc[2 * half] += scale(half, 2 * (t & 1)) * even + scale(half, 2 * (t & 1) + 1) * odd;
            } else {
              const float own_scale = scale(half, t);
              acc[2 * half] += own_scale * even;
              acc[2 * half + 1] += own_scale * odd;
            }
          }
        }
        --left;
        ++group;
        if (left > 0 && group < groups) return;
        // Blocks of one row of x in several lanes.
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          if (MP <= 2) acc[i] += __shfl_xor_sync(0xffffffff, acc[i], 1);
          if (MP <= 4) acc[i] += __shfl_xor_sync(0xffffffff, acc[i], 2);
        }
        // Warps and tiles both in order: every pair that meets has a slot of its own.
        if (2 * t < MP) {
          slot[2 * t * kSumStride] = acc[0], slot[2 * t * kSumStride + 8] = acc[2];
          if (MP > 1) slot[(2 * t + 1) * kSumStride] = acc[1], slot[(2 * t + 1) * kSumStride + 8] = acc[3];
        }
        acc[0] = acc[1] = acc[2] = acc[3] = 0;
        slot += kSlot;
        group = 0;
        ++local;
        rows_of_tile();
      };
#pragma unroll 1
      while (left > 0) {
#pragma unroll
        for (int i = 0; i < kRing; ++i) {
          if (left > 0) step(ring[i]);
        }
      }
    }
    // Of the first rows, on their way while the warps meet.
    const auto added = [&](int row, int c) {
      float value = 0;
      const int64_t out_row = part_row + first_row + row;
      if (p.bias != nullptr) value += to_float(static_cast<const T*>(p.bias)[out_row]);
      if (p.residual != nullptr) value += to_float(static_cast<const T*>(p.residual)[c * p.residual_stride + out_row]);
      return value;
    };
    const int outs = rows * M, first_out = threadIdx.x, first_c = first_out / rows;
    const float first_added = first_out < outs ? added(first_out - first_c * rows, first_c) : 0;
    __syncthreads();

    for (int i = first_out; i < outs; i += kStripThreads) {
      const int c = i / rows, row = i - c * rows;
      const int2 at = tile_slots[row / kTileRows];
      float value = 0;
      for (int k = 0; k < at.y; ++k) value += slots[(at.x + k) * kSlot + c * kSumStride + row % kTileRows];
      if (w.a != nullptr) {
        const auto add = [&](const auto* b) {
#pragma unroll 8
          for (int j = 0; j < rank; ++j) value += to_float(from_float<T>(to_float(b[row * rank + j]))) * z[c * kMostRank + j];
        };
        w.lora_f32 ? add(reinterpret_cast<const float*>(b_rows)) : add(reinterpret_cast<const T*>(b_rows));
      }
      value += i == first_out ? first_added : added(row, c);
      const int64_t to = c * p.y_stride + part_row + first_row + row;
      if (p.y_f32) {
        static_cast<float*>(p.y)[to] = value;
      } else {
        static_cast<T*>(p.y)[to] = from_float<T>(value);
      }
    }
    if (tile + strip_plan.at_once < last_tile) __syncthreads();
  }
  // The last block leaves the counters as it found them. Nobody waits any more.
  if (threadIdx.x == 0 && plan.a_blocks > 0 && atomicAdd(workspace.left(), 1) == static_cast<int>(gridDim.x) - 1) {
    *workspace.a_ready() = 0;
    *workspace.left() = 0;
  }
#endif
}

// Tiles of a thread block, so that all thread blocks are on the processors at once.
inline int tiles_of_a_block(const Plan& plan, int64_t parts, int most) {
  for (int per = 1;; ++per) {
    int64_t blocks = 0;
    for (int64_t i = 0; i < parts; ++i) blocks += ceil_div(plan.w_tiles[i], per);
    if (blocks <= most) return per;
  }
}

inline bool fits_strips(const KernelRows& rows) { return rows.M <= kEight && rows.K % (kGroupBlocks * kBlock) == 0; }

// In front of a wide table there is room for a round of tiles.
static_assert(kReserved + 256 * kMapCopies * 4 + 512 + 2 * kMostRank * 4 + (kStripWarps + 64) * 2 * kSumStride * 4 + 2048 + 39 * 1024 <= kTableAt);

template <typename T>
int launch_strips(const Plan& given, void* stream) {
  constexpr int kRoundBytes = 39 * 1024, kMostNested = 512, kMostAtOnce = 64;
  StripPlan strip{};
  strip.plan = given;
  Plan& plan = strip.plan;
  const KernelRows& rows = plan.rows;
  const bool nested = rows.parts[0].nf4.nested_absmax != nullptr;
  const int MP = rows.M <= 1 ? 1 : rows.M <= 2 ? 2 : rows.M <= 4 ? 4 : 8;
  plan.per = tiles_of_a_block(plan, rows.count, device_attribute(cudaDevAttrMultiProcessorCount));
  int blocks = 0, a_tiles = 0;
  int64_t b_tile = 0, nested_tile = 0;
  for (int64_t i = 0; i < rows.count; ++i) {
    const KernelRowsPart& part = rows.parts[i];
    plan.w_blocks[i] = static_cast<int>(ceil_div(plan.w_tiles[i], plan.per));
    blocks += plan.w_blocks[i];
    a_tiles += plan.a_tiles[i];
    const int64_t b = part.b == nullptr ? 0 : kTileRows * part.R * (part.lora_f32 ? 4 : 2);
    const int64_t scales = nested ? ceil_div(kTileRows * plan.blocks, part.nf4.nested_blocksize) : 0;
    if (b > b_tile) b_tile = b;
    if (scales > nested_tile) nested_tile = scales;
  }
  if (a_tiles > 0) {
    plan.pieces = blocks / a_tiles < 1 ? 1 : blocks / a_tiles;
    if (plan.pieces > 2 * kMostPieces) plan.pieces = 2 * kMostPieces;
    if (plan.pieces > plan.blocks) plan.pieces = plan.blocks;
    plan.a_blocks = a_tiles * plan.pieces;
  }
  StripShared& at = strip.at;
  at.absmax_stride = absmax_words(plan.blocks) * 4;
  const int64_t absmax_tile = nested ? int64_t{kTileRows} * at.absmax_stride : 0;
  int64_t most = plan.per < kMostAtOnce ? plan.per : kMostAtOnce;
  if (b_tile + absmax_tile > 0 && most > kRoundBytes / (b_tile + absmax_tile)) most = kRoundBytes / (b_tile + absmax_tile);
  if (nested_tile > 0 && most > (kMostNested - 2) / nested_tile) most = (kMostNested - 2) / nested_tile;
  if (most < 1) return -1;
  strip.at_once = static_cast<int>(most);
  const bool wide = MP <= 2;
  at.map = kReserved;
  at.tiles = at.map + (nested ? 256 * kMapCopies * 4 : 0);
  at.z = at.tiles + (strip.at_once + 1) / 2 * 16;
  at.slots = at.z + MP * kMostRank * 4;
  at.nested = at.slots + (kStripWarps + strip.at_once) * MP * kSumStride * 4;
  at.absmax = at.nested + (nested ? kMostNested * 4 : 0);
  at.b = at.absmax + static_cast<int>(absmax_tile) * strip.at_once;
  const int b_end = at.b + static_cast<int>(b_tile) * strip.at_once;
  at.table = wide ? kTableAt : b_end;
  at.x = at.table + (wide ? 256 * 256 : 256 * 128);
  // A row has a multiple of 128 bytes: two are in different banks.
  at.x_stride = static_cast<int>(rows.K * 2 + 16);
  const int64_t x_bytes = rows.M * at.x_stride;
  const bool shared = at.x + x_bytes <= device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  at.all = at.x + (shared ? static_cast<int>(x_bytes) : 0);
  const auto launch = [&](auto* kernel) { return launch_with(kernel, dim3(static_cast<unsigned>(blocks)), kStripThreads, at.all, stream, strip); };
  const auto with_rows = [&](auto columns, auto is_nested) {
    constexpr int kColumns = decltype(columns)::value;
    constexpr bool kNested = decltype(is_nested)::value;
    return shared ? launch(strips_kernel<T, kNested, kColumns, true>) : launch(strips_kernel<T, kNested, kColumns, false>);
  };
  const auto with = [&](auto is_nested) {
    switch (MP) {
      case 1:
        return with_rows(Width<1>{}, is_nested);
      case 2:
        return with_rows(Width<2>{}, is_nested);
      case 4:
        return with_rows(Width<4>{}, is_nested);
    }
    return with_rows(Width<8>{}, is_nested);
  };
  return nested ? with(std::true_type{}) : with(std::false_type{});
}

}  // namespace
}  // namespace ferrotune
