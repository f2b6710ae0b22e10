// defines: launch_groups: 9 to 64 rows of x on Hopper. A thread block has a group of 256 rows of W, or a piece of the group's columns where
// groups are fewer than processors; each of its four warpgroups multiplies 64 rows of W by all columns of x (hopper.cuh). Three more warps
// (of 16-bit weights one thread) bring W and x through stages in shared memory, one has LoRA's products with A. Pieces of a group leave their sums in the workspace, and
// each adds up its share of them in the order of the pieces.
//
// NF4 comes in runs of 128 columns, 16 bytes a lane and row, becomes pairs by the table and these times their scale: map, scale and product
// are rounded to 16 bits. Lane t of a row has columns 32 t .. 32 t + 31 of a run; its pair j is pair 4 j + t of the product's columns, and in
// that order x lies in shared memory.
//
// What bounds NF4, cycles of a processor's path to shared memory for 16 x 128 weights: 32 accesses to the table of pairs, 16 for W in and
// out, 8 to 32 for x of 16 to 64 rows (a fragment of x serves 64 rows of W), 4 for scales.
#pragma once

#include "hopper.cuh"
#include "rows.cuh"

namespace ferrotune {
namespace {

constexpr int kGroupRows = 256, kGroupWarps = 16, kProducers = 3, kGroupThreads = 32 * (kGroupWarps + kProducers + 1);
constexpr int kRun = 128, kMostStages = 8, kMostPiecesOfGroup = 16;

// Offsets in shared memory from the start of its address space, of which up to 1024 are not ours. NF4: stages of x, the table of pairs,
// where that of byte i has the address kPairsAt + 256 i + 4 lane, which one permutation of bytes makes, the scales in 16 bits, stages of W.
// Else: stages of W and of x.
constexpr int kFullAt = 1024, kEmptyAt = kFullAt + 8 * kMostStages, kZAt = 2048, kStagesAt = kZAt + kMostColumns * 128 + 1024;
constexpr int kScaleMapAt = kStagesAt - 1024, kPairsAt = 0x10000, kScalesAt = kPairsAt + 256 * 256;
static_assert(kStagesAt % 1024 == 0 && kEmptyAt + 8 * kMostStages <= kZAt);

template <int N, bool kNf4>
struct GroupStage {
  static constexpr int kWBytes = kGroupRows * (kNf4 ? kRun / 2 : kBlock * 2), kXBytes = N * 128 * (kNf4 ? 2 : 1);
};

struct GroupPlan {
  CUtensorMap w[3], x;  // boxes of a stage; x's of 16-bit weights only
  Plan plan;            // tiles of W are groups
  int pieces, tasks, stages, units;  // units: runs, or blocks of 64 columns of 16-bit weights
  int scale_stride, w_at, all;       // bytes
};

// A stage after another, and the phase of its barriers.
struct StageOf {
  int stage = 0;
  unsigned phase = 0;
  __device__ __forceinline__ void next(int stages) {
    if (++stage == stages) stage = 0, phase ^= 1;
  }
};

#ifdef FERROTUNE_HOPPER

// What other thread blocks left; several are under way at a time.
constexpr int kAtOnce = 16;
__device__ __forceinline__ float load_fresh(const float* from) {
  float v;
  asm volatile("ld.relaxed.gpu.global.f32 %0, [%1];" : "=f"(v) : "l"(from));
  return v;
}
__device__ __forceinline__ float4 load_fresh(const float4* from) {
  float4 v;
  asm volatile("ld.global.cg.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "l"(from));
  return v;
}
__device__ __forceinline__ void meet_group() { asm volatile("bar.sync 1, %0;" ::"n"(32 * kGroupWarps) : "memory"); }

// A piece of a group.
template <typename T, bool kNf4, int N>
struct GroupTask {
  const GroupPlan& group;
  const Plan& plan;
  const KernelRows& p;
  char* const bytes;
  int part = 0, a_tile = 0, number, piece, from, to;
  int64_t first_row, out_row = 0;
  const KernelRowsPart* w;

  __device__ GroupTask(const GroupPlan& given, char* shared, int task) : group(given), plan(given.plan), p(given.plan.rows), bytes(shared) {
    number = task / group.pieces;
    piece = task % group.pieces;
    int local = number;
    while (local >= plan.w_tiles[part]) {
      local -= plan.w_tiles[part];
      out_row += p.parts[part].rows;
      a_tile += plan.a_tiles[part];
      ++part;
    }
    w = &p.parts[part];
    first_row = int64_t{local} * kGroupRows;
    from = static_cast<int>(int64_t{piece} * group.units / group.pieces);
    to = static_cast<int>(int64_t{piece + 1} * group.units / group.pieces);
  }
  __device__ bool has_lora() const { return piece == 0 && w->a != nullptr; }
  __device__ int64_t row(int r) const { return min(first_row + r, w->rows - 1); }

  // The scales of this task in 16 bits, four at a time, which start at a multiple of four blocks.
  __device__ int first_scale() const { return 2 * from & ~3; }
  __device__ int fours() const { return (2 * to - first_scale() + 3) / 4; }
  static constexpr int kHeld = 4;
  struct Scales {
    unsigned codes[kHeld];
    float nested[kHeld];
  };
  __device__ void load(Scales& scales, int first) const {
    const int fours = this->fours(), shift = plan.nested_shift[part];
#pragma unroll
    for (int k = 0; k < kHeld; ++k) {
      const int i = first + k * kGroupThreads;
      if (i >= kGroupRows * fours || w->nf4.nested_absmax == nullptr) continue;
      const int r = i / fours;
      const int64_t block = row(r) * plan.blocks + first_scale() + (i - r * fours) * 4;
      scales.codes[k] = __ldg(reinterpret_cast<const unsigned*>(static_cast<const uint8_t*>(w->nf4.absmax) + block));
      scales.nested[k] = __ldg(w->nf4.nested_absmax + (block >> shift));
    }
  }
  __device__ void store(const Scales& scales, int first) const {
    const float* const map = reinterpret_cast<const float*>(bytes + kScaleMapAt);
    const int fours = this->fours();
#pragma unroll
    for (int k = 0; k < kHeld; ++k) {
      const int i = first + k * kGroupThreads;
      if (i >= kGroupRows * fours) continue;
      const int r = i / fours, at = (i - r * fours) * 4;
      float4 scale;
      if (w->nf4.nested_absmax != nullptr) {
        const auto of = [&](int j) {
          return __fadd_rn(__fmul_rn(map[scales.codes[k] >> 8 * j & 255], scales.nested[k]), w->nf4.nested_offset);
        };
        scale = make_float4(of(0), of(1), of(2), of(3));
      } else {
        scale = __ldg(reinterpret_cast<const float4*>(static_cast<const float*>(w->nf4.absmax) + row(r) * plan.blocks + first_scale() + at));
      }
      unsigned* const words = reinterpret_cast<unsigned*>(bytes + kScalesAt + r * group.scale_stride + at * 2);
      words[0] = pack(scale.x, scale.y, T{});
      words[1] = pack(scale.z, scale.w, T{});
    }
  }

  // acc += B z^T of 64 rows, z = scale x A^T in 16 bits.
  __device__ void add_lora(float (&acc)[N / 2]) const {
    const Workspace workspace{static_cast<char*>(p.workspace)};
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, rank = static_cast<int>(w->R);
    const int64_t top = row(16 * warp + g) * rank, bottom = row(16 * warp + g + 8) * rank;
    unsigned b[kMostRank / 16][4];
#pragma unroll
    for (int i = 0; i < kMostRank / 16; ++i) {
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const int j = 16 * i + 8 * (k / 2) + 2 * t;
        const int64_t at = (k % 2 == 0 ? top : bottom) + j;
        b[i][k] = 0;
        if (j >= rank) continue;
        if (w->lora_f32) {
          const float2 v = __ldg(reinterpret_cast<const float2*>(static_cast<const float*>(w->b) + at));
          b[i][k] = pack(v.x, v.y, T{});
        } else {
          b[i][k] = __ldg(reinterpret_cast<const unsigned*>(static_cast<const T*>(w->b) + at));
        }
      }
    }
    while (load_acquire(workspace.a_ready()) < plan.a_blocks * plan.eights) {}
    // z of the task before is read no more.
    meet_group();
    const int of_tile = plan.eights * kEight * kTileRows;
    for (int i = threadIdx.x; i < kMostRank / kTileRows * of_tile; i += 32 * kGroupWarps) {
      const int tile = i / of_tile, at = i % of_tile, column = at / kTileRows;
      const int j = tile * kTileRows + at % kTileRows;
      const float* const sums = workspace.a_sums(plan, a_tile + tile, 0, 0) + at;
      float z = 0;
      for (int first = 0; j < rank && first < plan.pieces; first += kAtOnce) {
        float of_piece[kAtOnce];
#pragma unroll
        for (int k = 0; k < kAtOnce; ++k) of_piece[k] = first + k < plan.pieces ? load_fresh(sums + (first + k) * of_tile) : 0;
#pragma unroll
        for (int k = 0; k < kAtOnce; ++k) z += of_piece[k];
      }
      *reinterpret_cast<T*>(bytes + kZAt + column * 128 + (j / 8 ^ column % 8) * 16 + j % 8 * 2) = from_float<T>(w->scale * z);
    }
    make_visible();
    meet_group();
    const uint64_t z = matrix_at(kZAt);
    begin_products();
#pragma unroll
    for (int i = 0; i < kMostRank / 16; ++i) wgmma(acc, b[i], z + 2 * i, T{});
    commit_products();
    wait_products<0>();
  }

  // y of row r of the group.
  __device__ void store(int r, int c, float value) const {
    if (first_row + r >= w->rows || c >= p.M) return;
    const int64_t at = out_row + first_row + r;
    if (p.bias != nullptr) value += to_float(static_cast<const T*>(p.bias)[at]);
    if (p.residual != nullptr) value += to_float(static_cast<const T*>(p.residual)[c * p.residual_stride + at]);
    if (p.y_f32) {
      static_cast<float*>(p.y)[c * p.y_stride + at] = value;
    } else {
      static_cast<T*>(p.y)[c * p.y_stride + at] = from_float<T>(value);
    }
  }
  // y, by way of the workspace, where a thread finds again what it has put there if the group is in one piece.
  __device__ void finish(const float (&acc)[N / 2]) const {
    constexpr int kThreads = 32 * kGroupWarps, kFours = N / 8 * kThreads, kSums = kAtOnce / 4;
    const Workspace workspace{static_cast<char*>(p.workspace)};
    const bool whole = group.pieces == 1;
    float4* const sums = reinterpret_cast<float4*>(workspace.sums(0, false, 0)) +
                         (whole ? int64_t{blockIdx.x} : int64_t{number} * group.pieces) * kFours;
#pragma unroll
    for (int n = 0; n < N / 8; ++n) {
      const float4 own = make_float4(acc[4 * n], acc[4 * n + 1], acc[4 * n + 2], acc[4 * n + 3]);
      if (8 * n < p.M) __stcg(sums + piece * kFours + n * kThreads + threadIdx.x, own);
    }
    int* const arrived = workspace.arrived(2 * number);
    if (!whole) {
      __threadfence();
      meet_group();
      if (threadIdx.x == 0) {
        add_release(arrived, 1);
        while (load_acquire(arrived) < group.pieces) {}
      }
      meet_group();
    }
    const int fours = plan.eights * kThreads;
#pragma unroll 1
    for (int i = piece * fours / group.pieces + static_cast<int>(threadIdx.x); i < (piece + 1) * fours / group.pieces; i += kThreads) {
      float4 sum = {};
#pragma unroll 1
      for (int first = 0; first < group.pieces; first += kSums) {
        float4 of_piece[kSums];
#pragma unroll
        for (int k = 0; k < kSums; ++k) {
          of_piece[k] = make_float4(0, 0, 0, 0);
          if (first + k < group.pieces) of_piece[k] = load_fresh(sums + (first + k) * kFours + i);
        }
#pragma unroll
        for (int k = 0; k < kSums; ++k) sum.x += of_piece[k].x, sum.y += of_piece[k].y, sum.z += of_piece[k].z, sum.w += of_piece[k].w;
      }
      const int thread = i % kThreads, r = thread / 32 * 16 + thread % 32 / 4, c = i / kThreads * 8 + thread % 4 * 2;
      store(r, c, sum.x);
      store(r, c + 1, sum.y);
      store(r + 8, c, sum.z);
      store(r + 8, c + 1, sum.w);
    }
    // Who is last to leave sets both counters back.
    if (!whole && threadIdx.x == 0 && atomicAdd(arrived + 1, 1) == group.pieces - 1) arrived[0] = arrived[1] = 0;
  }
};

// By those who bring a task's stages: W of the next one. NF4's three warps all wait, as each brings part of x.
template <typename T, bool kNf4, int N>
__device__ __forceinline__ void bring_w(const GroupTask<T, kNf4, N>& task, int unit, StageOf& stage) {
  using Stage = GroupStage<N, kNf4>;
  const unsigned full = kFullAt + 8 * stage.stage;
  wait_phase(kEmptyAt + 8 * stage.stage, stage.phase ^ 1);
  if (threadIdx.x == 32 * kGroupWarps) {
    arrive_with_boxes(full, Stage::kWBytes + (kNf4 ? 0 : Stage::kXBytes));
    copy_box(task.group.w_at + stage.stage * Stage::kWBytes, task.group.w + task.part, unit * (kNf4 ? kRun / 2 : kBlock),
             static_cast<int>(task.first_row), full);
  }
  stage.next(task.group.stages);
}

// x, and W of the stages that were not free at first. Columns that x does not have are left as they are: nobody reads what becomes of them.
template <typename T, bool kNf4, int N>
__device__ __forceinline__ void bring_x(const GroupTask<T, kNf4, N>& task, StageOf& x) {
  using Stage = GroupStage<N, kNf4>;
  const KernelRows& p = task.p;
  const int M = static_cast<int>(p.M), producer = threadIdx.x / 32 - kGroupWarps, lane = threadIdx.x % 32, j = lane % 8, t = lane / 8;
  const T* run = static_cast<const T*>(p.x) + static_cast<int64_t>(task.from) * kRun + t * 32 + j * 2;
  inputs_ready();
#pragma unroll 1
  for (int unit = task.from; unit < task.to; ++unit) {
    if (unit - task.from >= task.group.stages) {
      StageOf same = x;
      bring_w(task, unit, same);
    }
    const unsigned full = kFullAt + 8 * x.stage, to = kStagesAt + x.stage * Stage::kXBytes;
    if constexpr (kNf4) {
      // Eight columns and half a run at a time: lane (t, j) has pair 16 t + 8 half + j.
#pragma unroll 1
      for (int i = producer; i < 2 * task.plan.eights; i += kProducers) {
        const int eight = i / 2, half = i % 2;
        const T* row = run + half * 16 + eight * 8 * p.x_stride;
        const unsigned at = to + half * (N * 128) + eight * 1024 + t * 4;
#pragma unroll
        for (int c = 0; c < 8; ++c) {
          if (8 * eight + c < M) asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(at + c * 128 + ((j ^ c) << 4)), "l"(row));
          row += p.x_stride;
        }
      }
      run += kRun;
      arrive_with_copies(full);
    } else {
      copy_box(to, &task.group.x, unit * kBlock, 0, full);
    }
    x.next(task.group.stages);
  }
}

// acc += W x^T of 64 rows of W.
template <typename T, int N>
__device__ __forceinline__ void multiply_nf4(const GroupTask<T, true, N>& task, float (&acc)[N / 2], StageOf& stage) {
  using Stage = GroupStage<N, true>;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, stages = task.group.stages;
  const unsigned table = kPairsAt + lane * 4, of_block = t < 2 ? 0x1010 : 0x3232;
  const unsigned w = task.group.w_at + (16 * warp + g) * (kRun / 2) + t * 16;
  unsigned scales = kScalesAt + (16 * warp + g) * task.group.scale_stride + (2 * task.from - task.first_scale()) * 2;
  const unsigned below = 8 * task.group.scale_stride;
  unsigned a[2][4][2];  // of a quarter of a run, by turns: its pairs of the rows above and below
  int before = -1;
#pragma unroll 1
  for (int left = task.to - task.from; left > 0; --left) {
    unsigned scale_above, scale_below;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(scale_above) : "r"(scales));
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(scale_below) : "r"(scales + below));
    scale_above = __byte_perm(scale_above, 0, of_block);
    scale_below = __byte_perm(scale_below, 0, of_block);
    scales += 4;
    wait_phase(kFullAt + 8 * stage.stage, stage.phase);
    const unsigned w_at = w + stage.stage * Stage::kWBytes;
    const uint4 own[2] = {load_shared_4(w_at), load_shared_4(w_at + 8 * (kRun / 2))};
    const uint64_t x = uniform_matrix(kStagesAt + stage.stage * Stage::kXBytes);
#pragma unroll
    for (int quarter = 0; quarter < 4; ++quarter) {
      unsigned(&pairs)[4][2] = a[quarter % 2];
      // The products that read these registers are done.
      wait_products<1>();
      if (quarter == 1 && before >= 0 && lane == 0) arrive(kEmptyAt + 8 * before);
      const unsigned above = quarter == 0 ? own[0].x : quarter == 1 ? own[0].y : quarter == 2 ? own[0].z : own[0].w;
      const unsigned under = quarter == 0 ? own[1].x : quarter == 1 ? own[1].y : quarter == 2 ? own[1].z : own[1].w;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        unsigned up, down;
        asm volatile("ld.shared.u32 %0, [%1];" : "=r"(up) : "r"(__byte_perm(above, table, 0x7604 | j << 4)));
        asm volatile("ld.shared.u32 %0, [%1];" : "=r"(down) : "r"(__byte_perm(under, table, 0x7604 | j << 4)));
        pairs[j][0] = scale_pair(up, scale_above, T{});
        pairs[j][1] = scale_pair(down, scale_below, T{});
      }
      if (quarter == 0) make_visible();
      begin_products();
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        const unsigned of_k[4] = {pairs[2 * k][0], pairs[2 * k][1], pairs[2 * k + 1][0], pairs[2 * k + 1][1]};
        wgmma(acc, of_k, x + quarter / 2 * (N * 128 >> 4) + 2 * (quarter % 2 * 2 + k), T{});
      }
      commit_products();
    }
    before = stage.stage;
    stage.next(stages);
  }
  wait_products<0>();
  if (before >= 0 && lane == 0) arrive(kEmptyAt + 8 * before);
}

template <typename T, int N>
__device__ __forceinline__ void multiply_dense(const GroupTask<T, false, N>& task, float (&acc)[N / 2], StageOf& stage) {
  using Stage = GroupStage<N, false>;
  const int stages = task.group.stages, lane = threadIdx.x % 32, warpgroup = threadIdx.x / 128;
  int before = -1;
#pragma unroll 1
  for (int left = task.to - task.from; left > 0; --left) {
    const uint64_t w = uniform_matrix(task.group.w_at + stage.stage * Stage::kWBytes + warpgroup * (64 * 128));
    const uint64_t x = uniform_matrix(kStagesAt + stage.stage * Stage::kXBytes);
    wait_phase(kFullAt + 8 * stage.stage, stage.phase);
    begin_products();
#pragma unroll
    for (int k = 0; k < 4; ++k) wgmma(acc, w + 2 * k, x + 2 * k, T{});
    commit_products();
    wait_products<1>();
    if (before >= 0 && lane == 0) arrive(kEmptyAt + 8 * before);
    before = stage.stage;
    stage.next(stages);
  }
  wait_products<0>();
  if (before >= 0 && lane == 0) arrive(kEmptyAt + 8 * before);
}

#endif

template <typename T, bool kNf4, int N>
__global__ void __launch_bounds__(kGroupThreads, 1) groups_kernel(const __grid_constant__ GroupPlan group) {
#ifdef FERROTUNE_HOPPER
  extern __shared__ uint4 dynamic[];
  using Task = GroupTask<T, kNf4, N>;
  char* const bytes = reinterpret_cast<char*>(dynamic) - shared_address(dynamic);
  const Plan& plan = group.plan;
  const KernelRows& p = plan.rows;
  const Workspace workspace{static_cast<char*>(p.workspace)};
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  next_may_start();
  if (threadIdx.x == 0) {
    for (int i = 0; i < group.stages; ++i) {
      init_barrier(kFullAt + 8 * i, kNf4 ? 32 * kProducers + 1 : 1);
      init_barrier(kEmptyAt + 8 * i, kGroupWarps);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncthreads();
  const int a_tasks = plan.a_blocks * plan.eights, first = static_cast<int>(blockIdx.x), step = static_cast<int>(gridDim.x);

  // Those who bring a task's stages and those who use them count the same ones.
  StageOf stage;
  const KernelNf4* before = nullptr;
  for (int number = first; number < group.tasks; number += step) {
    const Task task(group, bytes, number);
    const KernelRowsPart& w = *task.w;
    // Boxes need one thread: another that only waited for their stages could fall a round behind, and a phase is known by its parity alone.
    const bool multiplies = warp < kGroupWarps, multiplies_by_a = warp == kGroupWarps + kProducers;
    const bool brings = kNf4 ? !multiplies && !multiplies_by_a : threadIdx.x == 32 * kGroupWarps;
    // What no kernel writes. The first stages of W, LoRA's matrices into the second-level cache, and by all warps the maps and the scales.
    if (brings) {
      StageOf first_stages = stage;
      for (int unit = task.from; unit < min(task.to, task.from + group.stages); ++unit) bring_w(task, unit, first_stages);
    } else if (multiplies && task.has_lora()) {
      const int row_bytes = static_cast<int>(w.R) * (w.lora_f32 ? 4 : 2);
      const int rows = static_cast<int>(min(int64_t{kTileRows}, w.rows - task.first_row - 16 * warp));
      const char* const b = static_cast<const char*>(w.b) + (task.first_row + 16 * warp) * row_bytes;
      for (int i = lane * 128; i < rows * row_bytes; i += 32 * 128) asm volatile("prefetch.global.L2 [%0];" ::"l"(b + i));
    } else if (multiplies_by_a && number == first) {
      for (int i = first; i < a_tasks; i += step) prefetch_share_of_a(plan, i % plan.a_blocks);
    }
    if constexpr (kNf4) {
      typename Task::Scales scales;
      task.load(scales, threadIdx.x);
      if (w.nf4.nested_absmax != nullptr && threadIdx.x < 256 && (before == nullptr || before->nested_quant_map != w.nf4.nested_quant_map)) {
        reinterpret_cast<float*>(bytes + kScaleMapAt)[threadIdx.x] = __ldg(w.nf4.nested_quant_map + threadIdx.x);
      }
      if (before == nullptr || before->quant_map != w.nf4.quant_map) {
        const float mine = __ldg(w.nf4.quant_map + threadIdx.x % 16);
#pragma unroll 1
        for (int i = threadIdx.x; i < 256 * 8; i += kGroupThreads) {
          const float even = __shfl_sync(0xffffffff, mine, i >> 7), odd = __shfl_sync(0xffffffff, mine, i >> 3 & 15);
          const unsigned pair = pack(even, odd, T{});
          *reinterpret_cast<uint4*>(bytes + kPairsAt + (i >> 3) * 256 + i % 8 * 16) = make_uint4(pair, pair, pair, pair);
        }
      }
      before = &w.nf4;
      __syncthreads();
      const int all = kGroupRows * task.fours();
#pragma unroll 1
      for (int i = threadIdx.x;;) {
        task.store(scales, i);
        i += Task::kHeld * kGroupThreads;
        if (i >= all) break;
        task.load(scales, i);
      }
      __syncthreads();
    }

    if (multiplies) {
      float acc[N / 2] = {};
      if constexpr (kNf4) {
        multiply_nf4<T, N>(task, acc, stage);
      } else {
        multiply_dense<T, N>(task, acc, stage);
      }
      // What a task is need not stay in registers till here.
      int again = number;
      asm volatile("" : "+r"(again));
      const Task after(group, bytes, again);
      inputs_ready();
      if (after.has_lora()) after.add_lora(acc);
      after.finish(acc);
    } else if (brings) {
      bring_x(task, stage);
    } else if (multiplies_by_a && number == first) {
      inputs_ready();
      for (int i = first; i < a_tasks; i += step) warp_share_of_a<T>(plan, workspace, i % plan.a_blocks, i / plan.a_blocks);
    }
    // Scales of this task are read no more. Without them W of the next one is on its way already.
    if constexpr (kNf4) __syncthreads();
  }
  // The last block leaves the counters as it found them. Nobody waits any more.
  if (threadIdx.x == 0 && plan.a_blocks > 0 && atomicAdd(workspace.left(), 1) == step - 1) {
    *workspace.a_ready() = 0;
    *workspace.left() = 0;
  }
#else
  __trap();  // of a library for sm_90 without 90a's instructions; elsewhere nobody launches it
#endif
}

// False where these kernels cannot.
template <typename T, bool kNf4, int N>
bool plan_groups(const KernelRows& rows, int processors, GroupPlan& group) {
  using Stage = GroupStage<N, kNf4>;
  bool nf4;
  int groups, a_tiles = 0;
  Plan& plan = group.plan;
  plan = plan_of(rows, kGroupRows, nf4, groups);
  const auto at_most = [](int value, int most) { return value < most ? value : most; };
  group.units = plan.blocks / (kNf4 ? 2 : 1);
  group.pieces = at_most(at_most(processors / groups, kMostPiecesOfGroup), group.units);
  if (group.pieces < 1) group.pieces = 1;
  group.tasks = groups * group.pieces;
  for (int64_t i = 0; i < rows.count; ++i) a_tiles += plan.a_tiles[i];
  if (a_tiles > 0) {
    plan.pieces = at_most(at_most(at_most(group.tasks, processors) / (a_tiles * plan.eights), 4 * kMostPieces / plan.eights), plan.blocks);
    if (plan.pieces < 1) plan.pieces = 1;
    plan.a_blocks = a_tiles * plan.pieces;
  }

  const int limit = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  bool fits = true;
  if constexpr (kNf4) {
    // Words of a row's scales are an odd number, so that eight rows are in different banks.
    group.scale_stride = static_cast<int>(ceil_div(group.units, group.pieces) + 3 | 1) * 4;
    group.w_at = kScalesAt + (kGroupRows * group.scale_stride + 1023) / 1024 * 1024;
    group.stages = at_most((kPairsAt - kStagesAt) / Stage::kXBytes, (limit - group.w_at) / Stage::kWBytes);
    fits = plan.blocks % 4 == 0;
  } else {
    group.stages = (limit - kStagesAt) / (Stage::kWBytes + Stage::kXBytes);
  }
  group.stages = at_most(group.stages, kMostStages);
  if (!kNf4) group.w_at = kStagesAt + group.stages * Stage::kXBytes;
  group.all = group.w_at + group.stages * Stage::kWBytes;
  fits = fits && group.stages >= 2;
  for (int64_t i = 0; i < rows.count && fits; ++i) {
    const KernelRowsPart& part = rows.parts[i];
    if constexpr (kNf4) {
      const KernelNf4& own = part.nf4;
      fits = (own.nested_absmax == nullptr ? aligned16(own.absmax) : plan.nested_shift[i] >= 2 && reinterpret_cast<uintptr_t>(own.absmax) % 4 == 0) &&
             boxes_of(group.w[i], own.packed, 1, rows.K / 2, part.rows, rows.K / 2, kRun / 2, kGroupRows, false);
    } else {
      fits = boxes_of(group.w[i], part.w, 2, rows.K, part.rows, part.w_stride * 2, kBlock, kGroupRows, true);
    }
  }
  return fits && (kNf4 || boxes_of(group.x, rows.x, 2, rows.K, rows.M, rows.x_stride * 2, kBlock, N, true));
}

template <typename T, bool kNf4, int N>
bool launch_groups_of(const KernelRows& rows, void* stream, int& error) {
  GroupPlan group{};
  const int processors = device_attribute(cudaDevAttrMultiProcessorCount);
  if (!plan_groups<T, kNf4, N>(rows, processors, group)) return false;
  const dim3 grid(static_cast<unsigned>(group.tasks < processors ? group.tasks : processors));
  error = launch_with(groups_kernel<T, kNf4, N>, grid, kGroupThreads, group.all, stream, group);
  return true;
}

// False where these kernels cannot.
template <typename T, bool kNf4>
bool launch_groups(const KernelRows& rows, void* stream, int& error) {
  if (device_attribute(cudaDevAttrComputeCapabilityMajor) != 9) return false;
  if (rows.M > 32) return launch_groups_of<T, kNf4, 64>(rows, stream, error);
  return rows.M > 16 ? launch_groups_of<T, kNf4, 32>(rows, stream, error) : launch_groups_of<T, kNf4, 16>(rows, stream, error);
}

}  // namespace
}  // namespace ferrotune
