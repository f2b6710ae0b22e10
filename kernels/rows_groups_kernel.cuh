// defines: groups_kernel: 9 to 64 rows of x on Hopper. A thread block has a group of at most 256 rows of W, or a piece of the group's columns where
// groups are fewer than processors; each of its four warpgroups multiplies 64 rows of W by all columns of x (hopper.cuh). One thread more
// brings W and x through stages in shared memory. LoRA's z is made beside it or by other blocks (rows_groups_z.cuh). Pieces of a group are a
// cluster of thread blocks, which add their sums up in order through each other's shared memory; where gate and up are to be multiplied with each
// other, blocks of the same rows of both are one.
//
// NF4 comes in runs of 128 columns, 64 bytes a row, becomes pairs by the table and these times their scale: map, scale and product are rounded
// to 16 bits. x stands in the order of nf4_order.cuh, in which a lane has 16 bytes of a row of W for itself.
//
// What NF4 takes of a processor's path to shared memory, cycles for 16 x 128 weights: 32 accesses to the table of pairs, 16 for W in and out, 8 to 32
// for x of 16 to 64 rows (a fragment of x serves 64 rows of W), 4 for scales. But a unit of 256 x 128 takes about 0.9 us whichever of these is left out
// (docs/decoding.md): x comes anew for each block, as many bytes for 32 rows as half of W's, and with W and A fills the way from the second-level cache.
#pragma once

#include "rows_groups_z.cuh"

namespace ferrotune {
namespace {

#ifdef FERROTUNE_HOPPER

// 1 / root of the mean square of each row of x, by one warp.
template <typename T, bool kNf4, int N>
__device__ __forceinline__ void add_squares(const GroupTask<T, kNf4, N>& task, unsigned memory) {
  const GroupExtras& extras = task.group.extras;
  constexpr int kAtOnce = 16;
  const int lane = threadIdx.x % 32;
  inputs_ready();
  for (int c = lane; c < task.p.M; c += 32) {
    float sum = 0;
    for (int first = 0; first < extras.squares_rows; first += kAtOnce) {
      float some[kAtOnce];
#pragma unroll
      for (int k = 0; k < kAtOnce; ++k) some[k] = first + k < extras.squares_rows ? __ldcg(extras.x_squares + (first + k) * kMostColumns + c) : 0;
#pragma unroll
      for (int k = 0; k < kAtOnce; ++k) sum += some[k];
    }
    reinterpret_cast<float*>(task.bytes + kRootsAt)[c] = 1 / sqrtf(sum / static_cast<float>(task.p.K) + extras.eps);
  }
  __syncwarp();
  if (lane == 0) arrive(memory + kRootsFullAt);
}

// By the thread that brings a task's stages: W and A of the next one.
template <typename T, bool kNf4, int N>
__device__ __forceinline__ void bring_w(const GroupTask<T, kNf4, N>& task, int unit, StageOf& stage) {
  const int boxes = task.a_boxes(), first_row = static_cast<int>(task.first_row), columns_of_a = task.w->lora_f32 ? kBlock / 2 : kBlock;
  wait_phase(stage.empty(), stage.phase ^ 1);
  arrive_with_boxes(stage.full(), task.group.w_bytes + GroupStage<N, kNf4>::kXBytes + boxes * static_cast<int>(task.w->R) * 128);
  const CUtensorMap* const w = task.group.w + task.part;
  const unsigned to = stage.memory + task.group.w_at + stage.stage * task.group.w_bytes;
  const int column = unit * (kNf4 ? kRun / 2 : kBlock);
  copy_box(to, w, column, first_row, stage.full());
  copy_box(to + task.group.w_bytes / 2, w, column, first_row + task.group.rows / 2, stage.full());
  unsigned a = stage.memory + task.group.a_at + stage.stage * task.group.a_bytes;
  for (int i = 0; i < boxes; ++i, a += task.a_box_bytes()) copy_box(a, task.group.a + task.part, (unit * boxes + i) * columns_of_a, 0, stage.full());
  stage.next(task.group.stages);
}

// x, and W of the stages that were not asked for at first.
template <typename T, bool kNf4, int N>
__device__ __forceinline__ void bring_x(const GroupTask<T, kNf4, N>& task, StageOf& x) {
  using Stage = GroupStage<N, kNf4>;
  inputs_ready();
#pragma unroll 1
  for (int unit = task.from; unit < task.to; ++unit) {
    if (unit - task.from >= task.group.stages) {
      StageOf same = x;
      bring_w(task, unit, same);
    }
    const unsigned to = x.memory + kStagesAt + x.stage * Stage::kXBytes;
#pragma unroll
    for (int block = 0; block < Stage::kBlocks; ++block) {
      copy_box(to + block * (N * 128), &task.group.x, (unit * Stage::kBlocks + block) * kBlock, 0, x.full());
    }
    x.next(task.group.stages);
  }
}

// acc += W x^T of 64 rows of W.
template <typename T, int N>
__device__ __forceinline__ void multiply_nf4(const GroupPlan& group, int from, int to, int first_scale, float (&acc)[N / 2], StageOf& stage) {
  using Stage = GroupStage<N, true>;
  const int warp = threadIdx.x / 32, lane = anew(threadIdx.x % 32), g = lane / 4, t = lane % 4, stages = group.stages;
  const unsigned table = stage.memory + kPairsAt + lane * 4, of_block = t < 2 ? 0x1010 : 0x3232;
  // Piece q of a row's 64 bytes lies at q ^ (row / 2 % 4).
  const unsigned w = stage.memory + group.w_at + (16 * warp + g) * (kRun / 2) + (g / 2 ^ t) * 16;
  unsigned scales = stage.memory + kScalesAt + (16 * warp + g) * group.scale_stride + (2 * from - first_scale) * 2;
  const unsigned below = 8 * group.scale_stride;
  unsigned last = 0;  // barrier of the stage before
  uint64_t x = 0;
  unsigned a[2][4][2];  // of a word, by turns: its pairs of the rows above and below
#pragma unroll 1
  for (int unit = from; unit < to; ++unit) {
    unsigned scale_above, scale_below;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(scale_above) : "r"(scales));
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(scale_below) : "r"(scales + below));
    scales += 4;
    const unsigned w_at = w + stage.stage * (kMostGroupRows * Stage::kRowBytes);
    wait_phase(stage.full(), stage.phase);
    const unsigned scale[2] = {__byte_perm(scale_above, 0, of_block), __byte_perm(scale_below, 0, of_block)};
    const uint4 above = load_shared_4(w_at), under = load_shared_4(w_at + 8 * (kRun / 2));
    const unsigned words[4][2] = {{above.x, under.x}, {above.y, under.y}, {above.z, under.z}, {above.w, under.w}};
#pragma unroll
    for (int word = 0; word < 4; ++word) {
      unsigned(&pairs)[4][2] = a[word % 2];
      // The products that read these registers are done.
      wait_products<1>();
      if (word == 1 && unit > from && lane == 0) arrive(last);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          asm volatile("ld.shared.u32 %0, [%1];" : "=r"(pairs[j][i]) : "r"(__byte_perm(words[word][i], table, 0x7604 | j << 4)));
        }
      }
      // By all lanes at once, while pairs are on their way.
      if (word == 0) x = uniform_matrix(kStagesAt + stage.stage * Stage::kXBytes);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
#pragma unroll
        for (int i = 0; i < 2; ++i) pairs[j][i] = scale_pair(pairs[j][i], scale[i], T{});
      }
      begin_products();
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        const unsigned of_k[4] = {pairs[2 * k][0], pairs[2 * k][1], pairs[2 * k + 1][0], pairs[2 * k + 1][1]};
        wgmma(acc, of_k, x + word / 2 * (N * 128 >> 4) + 2 * (word % 2 * 2 + k), T{});
      }
      commit_products();
    }
    last = stage.empty();
    stage.next(stages);
  }
  wait_products<0>();
  if (lane == 0) stage.leave_last(stages);
}

template <typename T, int N>
__device__ __forceinline__ void multiply_dense(const GroupTask<T, false, N>& task, float (&acc)[N / 2], StageOf& stage) {
  using Stage = GroupStage<N, false>;
  const int stages = task.group.stages, lane = threadIdx.x % 32, warpgroup = threadIdx.x / 128;
#pragma unroll 1
  for (int unit = task.from; unit < task.to; ++unit) {
    const uint64_t w = uniform_matrix(task.group.w_at + stage.stage * task.group.w_bytes + warpgroup * (64 * 128));
    const uint64_t x = uniform_matrix(kStagesAt + stage.stage * Stage::kXBytes);
    wait_phase(stage.full(), stage.phase);
    begin_products();
#pragma unroll
    for (int k = 0; k < 4; ++k) wgmma(acc, w + 2 * k, x + 2 * k, T{});
    commit_products();
    wait_products<1>();
    if (unit > task.from && lane == 0) stage.leave_last(stages);
    stage.next(stages);
  }
  wait_products<0>();
  if (lane == 0) stage.leave_last(stages);
}

// The table of pairs and the map of scales, by kThreads threads, of which this is `thread`.
template <typename T, int kThreads>
__device__ __forceinline__ void fill_maps(const KernelNf4& nf4, char* bytes, int thread) {
  if (nf4.nested_absmax != nullptr) {
    for (int i = thread; i < 256; i += kThreads) reinterpret_cast<float*>(bytes + kScaleMapAt)[i] = __ldg(nf4.nested_quant_map + i);
  }
  const float mine = __ldg(nf4.quant_map + thread % 16);
#pragma unroll 4
  for (int i = thread; i < 256 * 8; i += kThreads) {
    const float even = __shfl_sync(0xffffffff, mine, i >> 7), odd = __shfl_sync(0xffffffff, mine, i >> 3 & 15);
    const unsigned pair = pack(even, odd, T{});
    *reinterpret_cast<uint4*>(bytes + kPairsAt + (i >> 3) * 256 + i % 8 * 16) = make_uint4(pair, pair, pair, pair);
  }
}

// The scales of a task by the warps that multiply, each its rows', and b, the first ranks of B. Maps are those of part `part`, or, where it is -1, the first
// task's, which other warps make meanwhile.
template <typename T, int N>
__device__ __forceinline__ void prepare(const GroupTask<T, true, N>& task, int& part, unsigned (&b)[4]) {
  constexpr int kAtOnce = 4;
  const KernelNf4& nf4 = task.w->nf4;
  const int lane = task.thread % 32, r = task.thread / 32 * 16 + lane % 16, fours = task.fours();
  typename GroupTask<T, true, N>::Scales scales[kAtOnce];
  const auto load = [&](int first) {
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) {
      if (first + 2 * k < fours) task.load(scales[k], r, first + 2 * k);
    }
  };
  load(lane / 16);
  if (task.adds_lora()) task.load_b(b, 0);
  if (part < 0) {
    meet_all();
  } else {
    const KernelNf4& before = task.p.parts[part].nf4;
    if (before.quant_map != nf4.quant_map || before.nested_quant_map != nf4.nested_quant_map) {
      meet_group();
      fill_maps<T, kMultipliers>(nf4, task.bytes, task.thread);
      meet_group();
    }
  }
  part = task.part;
  unsigned* const row = reinterpret_cast<unsigned*>(task.bytes + kScalesAt + r * task.group.scale_stride);
  // Those of the task before are read no more.
  __syncwarp();
#pragma unroll 1
  for (int first = lane / 16;;) {
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) {
      const int four = first + 2 * k;
      if (four >= fours) continue;
      const uint2 pairs = task.in_16_bits(scales[k], r, four);
      row[2 * four] = pairs.x, row[2 * four + 1] = pairs.y;
    }
    first += 2 * kAtOnce;
    if (first >= fours) break;
    load(first);
  }
  __syncwarp();
}

#endif

// One kernel for whoever makes z: instructions of another one would have to be fetched anew by the next product (8B, NF4, 32 rows: 93.6 us a layer with a
// kernel for products that make z of their own and one for the others, 89.9 with this).
template <typename T, bool kNf4, int N>
__global__ void __launch_bounds__(kGroupThreads, 1) groups_kernel(const __grid_constant__ GroupPlan group) {
#ifdef FERROTUNE_HOPPER
  extern __shared__ uint4 dynamic[];
  using Task = GroupTask<T, kNf4, N>;
  const unsigned offset = shared_address(dynamic) & 0xffffff, memory = shared_address(dynamic) - offset;
  char* const bytes = reinterpret_cast<char*>(dynamic) - offset;
  const int warp = threadIdx.x / 32, first = static_cast<int>(blockIdx.x) - group.z_blocks, step = static_cast<int>(gridDim.x) - group.z_blocks;
  next_may_start();
  if (first < 0) {
    make_z<T, kNf4, N>(group, static_cast<int>(blockIdx.x));
    return;
  }
  if (threadIdx.x == 0) {
    for (int i = 0; i < group.stages; ++i) {
      init_barrier(memory + kFullAt + 8 * i, 1);
      init_barrier(memory + kEmptyAt + 8 * i, Task::warps_of(group) + (group.a_in_stages ? kZWarps : 0));
    }
    init_barrier(memory + kZFullAt, kZWarps);
    init_barrier(memory + kZEmptyAt, Task::warps_of(group));
    init_barrier(memory + kRootsFullAt, 1);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncthreads();

  // Those who bring a task's stages and those who use them count the same ones.
  StageOf stage{memory};
  unsigned z_phase = 0;
  if (warp < kGroupWarps) {
    // Those that multiply by A need more registers, and those by W fewer.
    if constexpr (N == 64) asm volatile("setmaxnreg.dec.sync.aligned.u32 88;");
    const bool multiplies = warp < Task::warps_of(group);
    int part = -1;
    for (int number = first; number < group.tasks; number += step) {
      float acc[N / 2] = {};
      unsigned b[4];
      {
        const Task task(group, bytes, number);
        if constexpr (kNf4) {
          prepare(task, part, b);
          if (multiplies) multiply_nf4<T, N>(group, task.from, task.to, task.first_scale(), acc, stage);
        } else if (multiplies) {
          if (task.adds_lora()) task.load_b(b, 0);
          multiply_dense<T, N>(task, acc, stage);
        }
      }
      const Task task(group, bytes, anew(number));
      inputs_ready();
      if (multiplies && task.adds_lora()) task.add_lora(acc, b, stage.memory, z_phase);
      group.tasks > step ? task.finish_alone(acc) : task.finish(acc, memory);
    }
  } else {
    if constexpr (N == 64) asm volatile("setmaxnreg.inc.sync.aligned.u32 128;");
    if constexpr (kNf4) {
      // A block has a task at least.
      if (warp > kGroupWarps) {
        fill_maps<T, kMapThreads>(Task(group, bytes, first).w->nf4, bytes, threadIdx.x - (kMultipliers + 32));
        arrive_for_all();
      }
    }
    if (threadIdx.x == kMultipliers) {
      for (int number = first; number < group.tasks; number += step) {
        const Task task(group, bytes, number);
        // What no kernel writes.
        StageOf first_stages = stage;
        for (int unit = task.from; unit < min(task.to, task.from + group.stages); ++unit) bring_w(task, unit, first_stages);
        bring_x(task, stage);
      }
    } else if (warp > kGroupWarps && warp <= kGroupWarps + kZWarps) {
      if (group.a_in_stages) {
        for (int number = first; number < group.tasks; number += step) multiply_by_a<T, kNf4, N>(Task(group, bytes, number), stage, z_phase);
      } else if (group.z_blocks > 0) {
        inputs_ready();
        for (int number = first; number < group.tasks; number += step) {
          const Task task(group, bytes, number);
          if (task.adds_lora()) fetch_z(task, memory, z_phase);
        }
        leave_z(group, step);
      }
    } else if (group.extras.x_squares != nullptr && warp == kGroupWarps + kZWarps + 1) {
      add_squares<T, kNf4, N>(Task(group, bytes, first), memory);
    }
  }
#else
  __trap();  // of a library for sm_90 without 90a's instructions; elsewhere nobody launches it
#endif
}

}  // namespace
}  // namespace ferrotune
