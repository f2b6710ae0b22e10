// defines: launch_strips: at most eight rows of x, NF4 weights. The warps of a thread block share the groups of all its tiles; sums meet
// once, at the end.
//
// Of a group a warp reads two runs of 64 bytes of each of 16 rows, 16 bytes a lane, straight into registers. Lanes 0 and 1 of a row then
// have one block of 64 weights and lanes 2 and 3 the next, which a product would add up unscaled; but of the eight columns of a product
// few are rows of x, and so each block gets columns of its own, with x in the lanes that have it and zeros in the others. Scales are
// applied once a group.
//
// What bounds it is the path to shared memory and the first-level cache, cycles of a processor for 16 x 64 weights: 16 accesses to the
// table of pairs, 8 for the lines of W, 5 for x and the scales; 31 in all were counted. 28672 x 4096: 13.6 us at 1.98 GHz, and the bytes
// take 7.6; beside it a kernel this short waits 4 us for its start, its maps and the last sums.
#pragma once

#include "rows_stage.cuh"

namespace ferrotune {
namespace {

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
  // Blocks of a group whose sums a lane has in registers of their own, beside those in other lanes or in the other column.
  static constexpr int kBlocks = MP <= 2 ? 1 : MP == 4 ? 2 : 4;
  // The lane with column g has x of row g % MP, elements 32 t .. of run(g) or of every run, or zeros for good.
  __device__ static bool has(int g, int t) {
    return MP == 8 || (MP == 4 ? t / 2 == g / 4 : MP == 2 ? t / 2 == g / 2 % 2 : g < 4 && t / 2 == g % 2);
  }
  __device__ static int run(int g) { return kXOfRun ? 0 : MP == 2 ? g / 4 : g / 2; }
  // The run whose product has this lane's columns, for MP <= 2.
  __device__ static int run_of_lane(int t) { return MP == 2 ? t / 2 : t; }
};

// What a lane has of a group of 256 columns of 16 rows: sums of the runs, and acc, the same of all groups, scaled, by block of a group: the
// same sums in the same order, however many rows of x there are. scale(half, block): of rows g and g + 8.
template <int MP>
struct GroupSums {
  using Use = ColumnUse<MP>;
  float sum[2][4] = {};

  template <typename T>
  __device__ __forceinline__ void multiply_run(int run, int t, const unsigned (&top)[16], const unsigned (&bottom)[16], const unsigned (&x)[16]) {
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const unsigned a[4] = {top[2 * j], bottom[2 * j], top[2 * j + 1], bottom[2 * j + 1]};
      if constexpr (MP == 8) {
        multiply(sum[0], a, t < 2 ? x[2 * j] : 0, t < 2 ? x[2 * j + 1] : 0, T{});
        multiply(sum[1], a, t < 2 ? 0 : x[2 * j], t < 2 ? 0 : x[2 * j + 1], T{});
      } else if constexpr (MP == 4) {
        multiply(sum[0], a, x[2 * j], x[2 * j + 1], T{});
      } else {
        multiply(sum[run], a, x[2 * j], x[2 * j + 1], T{});
      }
    }
  }
  // Behind a run.
  template <typename Scale>
  __device__ __forceinline__ void scale_run(int run, int t, float (&acc)[Use::kBlocks][4], const Scale& scale) {
    if constexpr (MP >= 4) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int block_of_run = 0; block_of_run < (MP == 8 ? 2 : 1); ++block_of_run) {
          float(&own_acc)[4] = acc[MP == 8 ? 2 * run + block_of_run : run];
          const float own_scale = scale(half, 2 * run + (MP == 8 ? block_of_run : t / 2));
          own_acc[2 * half] += own_scale * sum[block_of_run][2 * half];
          own_acc[2 * half + 1] += own_scale * sum[block_of_run][2 * half + 1];
        }
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) sum[0][i] = sum[1][i] = 0;
    }
  }
  // Behind both.
  template <typename Scale>
  __device__ __forceinline__ void scale_group(int t, float (&acc)[Use::kBlocks][4], const Scale& scale) {
    if constexpr (MP <= 2) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const bool second = Use::run_of_lane(t) == 1;
        const float even = second ? sum[1][2 * half] : sum[0][2 * half], odd = second ? sum[1][2 * half + 1] : sum[0][2 * half + 1];
        // Of one row of x, lanes 0 and 1 have two blocks each and the others columns of zeros.
        acc[0][2 * half] += scale(half, MP == 1 ? 2 * (t & 1) : t) * even;
        acc[0][2 * half + 1] += scale(half, MP == 1 ? 2 * (t & 1) + 1 : t) * odd;
      }
    }
  }
  // (block 0 + block 1) + (block 2 + block 3) of each row.
  __device__ __forceinline__ static void add_blocks(const float (&acc)[Use::kBlocks][4], float (&total)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const auto other = [](float v, int lane_step) { return __shfl_xor_sync(0xffffffff, v, lane_step); };
      if constexpr (MP == 1) {
        const float pair = acc[0][i & 2] + acc[0][i | 1];
        total[i] = pair + other(pair, 1);
      } else if constexpr (MP == 2) {
        const float pair = acc[0][i] + other(acc[0][i], 1);
        total[i] = pair + other(pair, 2);
      } else if constexpr (MP == 4) {
        total[i] = (acc[0][i] + other(acc[0][i], 2)) + (acc[1][i] + other(acc[1][i], 2));
      } else {
        total[i] = (acc[0][i] + acc[1][i]) + (acc[2][i] + acc[3][i]);
      }
    }
  }
};

template <typename T, bool kNested, int MP, bool kShared>
__global__ void __launch_bounds__(kStripThreads, 1) strips_kernel(const __grid_constant__ StripPlan strip_plan) {
#if __CUDA_ARCH__ >= 800
  using Use = ColumnUse<MP>;
  extern __shared__ uint4 dynamic[];
  constexpr int kPairBytes = Use::kWide ? 256 : 128;
  Nf4Block<T, kNested> block(strip_plan, reinterpret_cast<char*>(dynamic) - shared_address(dynamic));
  const Plan& plan = block.plan;
  const StripShared& in = block.in;
  const KernelRows& p = block.p;
  const KernelRowsPart& w = *block.w;
  char* const bytes = block.bytes;
  const float* const map = reinterpret_cast<const float*>(bytes + in.map);
  const float* const nested = reinterpret_cast<const float*>(bytes + in.nested);
  int2* const tile_slots = reinterpret_cast<int2*>(bytes + in.tiles);
  float* const slots = reinterpret_cast<float*>(bytes + in.slots);
  constexpr int kSlot = MP * kSumStride;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, M = static_cast<int>(p.M);
  const int groups = plan.blocks / kGroupBlocks, shift = block.shift;
  next_may_start();

  for (int tile = block.first_tile; tile < block.last_tile; tile += strip_plan.at_once) {
    block.at(tile);
    const int tiles = block.tiles, rows = block.rows, all = tiles * groups, from = warp * all / kStripWarps;
    const int64_t first_row = block.first_row;
    int left = warp < kStripWarps ? (warp + 1) * all / kStripWarps - from : 0;

    // What no kernel writes: maps, W's first groups, scales, B, A.
    if (block.first_time()) block.load_maps();
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
    block.fetch_scales_and_b();
    if (block.first_time() && warp == kStripWarps) block.prefetch_a();
    // Warp k begins at group k all / kStripWarps: the warps that a tile has, whose slots follow each other. Where there are more warps
    // than groups some have none, and their slots are zero.
    if (static_cast<int>(threadIdx.x) < tiles) {
      const int local = threadIdx.x, begin = ((local * groups + 1) * kStripWarps - 1) / all, end = ((local + 1) * groups * kStripWarps - 1) / all;
      tile_slots[local] = make_int2(begin + local, end - begin + 1);
    }
    if (all < kStripWarps) {
      for (int i = threadIdx.x; i < (kStripWarps + tiles) * kSlot; i += kStripThreads) slots[i] = 0;
    }
    if (block.first_time()) {
      block.template store_maps<kPairBytes>();
      inputs_ready();
      if (kShared) {
        for (int c = 0; c < M; ++c) {
          const auto* const row = reinterpret_cast<const uint4*>(static_cast<const T*>(p.x) + c * p.x_stride);
          const unsigned copy = shared_address(bytes + in.x + c * in.x_stride);
          for (int i = threadIdx.x; i < p.K / 8; i += kStripThreads) copy_16_bytes(copy + 16 * i, row + i, true);
        }
        commit_copies();
      }
    }
    wait_copies<0>();
    __syncthreads();

    if (warp == kStripWarps) {
      if (block.first_time()) block.template multiply_by_a<MP>();
    } else if (left > 0) {
      const unsigned table = in.table + lane * 4;
      const bool has = Use::has(g, t) && g % MP < M;
      const char* const x_row = kShared ? bytes + in.x + g % MP * in.x_stride : static_cast<const char*>(p.x) + g % MP * p.x_stride * 2;
      const char* const x_at = x_row + t * 64 + Use::run(g) * 256;
      const float* const my_map = map + g;
      unsigned x[16] = {};
      float acc[Use::kBlocks][4] = {};
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
        const int before = kNested ? static_cast<int>(first_row * plan.blocks - (block.first_nested << shift)) : 0;
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
        GroupSums<MP> group_sums;
#pragma unroll
        for (int run = 0; run < 2; ++run) {
          if (Use::kXOfRun) load_x(x_group + run * 256);
          unsigned top[16], bottom[16];
          look_up_words<Use::kWide>(own[run][0], table, top);
          look_up_words<Use::kWide>(own[run][1], table, bottom);
          fetch(own, run);
          if (run == 1) fetched();
          group_sums.template multiply_run<T>(run, t, top, bottom, x);
          group_sums.scale_run(run, t, acc, scale);
        }
        group_sums.scale_group(t, acc, scale);
        --left;
        ++group;
        if (left > 0 && group < groups) return;
        float total[4];
        group_sums.add_blocks(acc, total);
        // Warps and tiles both in order: every pair that meets has a slot of its own.
        if (2 * t < MP) {
          slot[2 * t * kSumStride] = total[0], slot[2 * t * kSumStride + 8] = total[2];
          if (MP > 1) slot[(2 * t + 1) * kSumStride] = total[1], slot[(2 * t + 1) * kSumStride + 8] = total[3];
        }
#pragma unroll
        for (int i = 0; i < Use::kBlocks; ++i) acc[i][0] = acc[i][1] = acc[i][2] = acc[i][3] = 0;
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
    // What is added to the first outputs is on its way while the warps meet.
    const int outs = rows * M, first_out = threadIdx.x, first_c = first_out / rows;
    const float first_added = first_out < outs ? block.added(first_out - first_c * rows, first_c) : 0;
    __syncthreads();
    if constexpr (MP > 2) {
      if (block.first_time()) block.template sum_pieces<MP>(block.z() + MP * kMostRank);
    }

    for (int i = first_out; i < outs; i += kStripThreads) {
      const int c = i / rows, row = i - c * rows;
      const int2 at = tile_slots[row / kTileRows];
      float value = 0;
      for (int k = 0; k < at.y; ++k) value += slots[(at.x + k) * kSlot + c * kSumStride + row % kTileRows];
      block.store(row, c, value + block.lora(row, c) + (i == first_out ? first_added : block.added(row, c)));
    }
    if (tile + strip_plan.at_once < block.last_tile) __syncthreads();
  }
  block.leave();
#endif
}

// In front of a wide table there is room for a round of tiles.
static_assert(kReserved + 256 * kMapCopies * 4 + 512 + 2 * kMostRank * 4 + (kStripWarps + kMostAtOnce) * 2 * kSumStride * 4 + kMostNested * 4 +
                  kRoundBytes <=
              kTableAt);

template <typename T>
int launch_strips(const Plan& given, void* stream) {
  StripPlan strip{};
  strip.plan = given;
  const KernelRows& rows = strip.plan.rows;
  const bool nested = rows.parts[0].nf4.nested_absmax != nullptr;
  const int MP = rows.M <= 1 ? 1 : rows.M <= 2 ? 2 : rows.M <= 4 ? 4 : 8;
  const int blocks = plan_strips(strip, 2 * kMostPieces, kMostAtOnce, MP * kMostRank * 4 + (MP > 2 ? kPieceClasses * MP * kTileRows * 4 : 0),
                                 [&](int tiles) { return (kStripWarps + tiles) * MP * kSumStride * 4; });
  StripShared& at = strip.at;
  const bool wide = MP <= 2;
  if (wide) at.table = kTableAt;
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
