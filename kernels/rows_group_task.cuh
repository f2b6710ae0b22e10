// defines: GroupPlan, StageOf, GroupTask: what a thread block of rows_groups.cuh has to do, where that lies in shared memory, and what becomes of
// its sums.
#pragma once

#include "activation.cuh"
#include "cluster.cuh"
#include "hopper.cuh"
#include "rows.cuh"
#include "rows_groups.h"

namespace ferrotune {
namespace {

// Warps behind those that multiply by W: one whose first thread brings stages, those that multiply by A, one that adds up squares of x.
constexpr int kGroupRows = 256, kHalf = kGroupRows / 2, kGroupWarps = 16, kMultipliers = 32 * kGroupWarps, kAWarps = 2, kGroupThreads = kMultipliers + 128;
constexpr int kRun = 128, kMostStages = 8, kMostPiecesOfGroup = 8;

// Offsets in shared memory from the start of its address space (a block of a cluster has one of its own), of which up to 1024 are not ours. NF4:
// stages of x, the table of pairs, where that of byte i has the address kPairsAt + 256 i + 4 lane, which one permutation of bytes makes, the scales
// in 16 bits, stages of W. Else: stages of x and of W. Stages of A lie behind those of x or of W.
constexpr int kFullAt = 1024, kEmptyAt = kFullAt + 8 * kMostStages, kZFullAt = kEmptyAt + 8 * kMostStages, kZEmptyAt = kZFullAt + 8;
constexpr int kRootsFullAt = kZEmptyAt + 8, kRootsAt = kRootsFullAt + 8;
constexpr int kZAt = 2048, kStagesAt = kZAt + kMostColumns * 128 + 1024;
constexpr int kScaleMapAt = kStagesAt - 1024, kPairsAt = 0x10000, kScalesAt = kPairsAt + 256 * 256;
static_assert(kStagesAt % 1024 == 0 && kRootsAt + kMostColumns * 4 <= kZAt);
// Sums of a piece, [columns, rows] in f32, columns so far apart that lanes write to different banks; they lie where stages (NF4: pairs) were.
constexpr int kSumsStride = kGroupRows + 4;

template <int N, bool kNf4>
struct GroupStage {
  static constexpr int kBlocks = kNf4 ? kRun / kBlock : 1;  // of 64 columns
  static constexpr int kWBytes = kGroupRows * (kNf4 ? kRun / 2 : kBlock * 2), kXBytes = kBlocks * N * 128;
  static constexpr int kSumsAt = kNf4 ? kPairsAt : kStagesAt;
};

struct GroupPlan {
  CUtensorMap w[3], a[3], x;  // boxes of a stage; those of x and A have rows of 128 bytes
  Plan plan;                  // tiles of W are groups
  int pieces, tasks, stages, units;            // units: runs, or blocks of 64 columns of 16-bit weights
  int scale_stride, w_at, a_at, a_bytes, all;  // bytes; a_bytes: of a stage
  bool lora, by_fours;                         // whether any part has LoRA; whether four rows of y and of what is added to it are one access
  GroupExtras extras;
};

// A stage after another, and the phase of its barriers.
struct StageOf {
  unsigned memory;  // where shared memory's address space starts
  int stage = 0;
  unsigned phase = 0;
  __device__ __forceinline__ unsigned full() const { return memory + kFullAt + 8 * stage; }
  __device__ __forceinline__ unsigned empty() const { return memory + kEmptyAt + 8 * stage; }
  // By one lane of those who have used the stage before: only when they have gone on to the next one, as an arrival seems to overtake reads.
  __device__ __forceinline__ void leave_last(int stages) const { arrive(memory + kEmptyAt + 8 * (stage == 0 ? stages - 1 : stage - 1)); }
  __device__ __forceinline__ void next(int stages) {
    if (++stage == stages) stage = 0, phase ^= 1;
  }
};

#ifdef FERROTUNE_HOPPER

__device__ __forceinline__ void meet_group() { asm volatile("bar.sync 1, %0;" ::"n"(kMultipliers) : "memory"); }

// What is computed with it the compiler computes where it stands: else what many tasks share stays in registers that the products need.
__device__ __forceinline__ int anew(int value) {
  asm volatile("" : "+r"(value));
  return value;
}

// A piece of a group: rows of one part, or of gate and as many of up.
template <typename T, bool kNf4, int N>
struct GroupTask {
  using Stage = GroupStage<N, kNf4>;
  const GroupPlan& group;
  const Plan& plan;
  const KernelRows& p;
  char* const bytes;
  const int thread = anew(threadIdx.x), pieces = anew(group.pieces);
  const bool gated = group.extras.gated != 0;
  int part = 0, number, piece, from, to;
  int64_t first_row, out_row = 0;
  const KernelRowsPart* w;

  __device__ GroupTask(const GroupPlan& given, char* shared, int task) : group(given), plan(given.plan), p(given.plan.rows), bytes(shared) {
    int local = number = task / pieces;
    piece = task % pieces;
    while (local >= plan.w_tiles[part]) {
      local -= plan.w_tiles[part];
      out_row += p.parts[part].rows;
      ++part;
    }
    w = &p.parts[part];
    first_row = int64_t{local} * (gated ? kHalf : kGroupRows);
    from = piece * group.units / pieces;
    to = (piece + 1) * group.units / pieces;
  }
  __device__ bool has_lora() const { return w->a != nullptr; }
  __device__ int64_t row(int r) const { return min(first_row + (gated ? r % kHalf : r), w->rows - 1); }
  __device__ const KernelRowsPart& part_of(int r) const { return gated && r >= kHalf ? w[1] : w[0]; }
  // Of A 64 columns in 16 bits or 32 in f32, rows up to a multiple of a tile's.
  __device__ int a_box_bytes() const { return (static_cast<int>(w->R) + kTileRows - 1) / kTileRows * (kTileRows * 128); }

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
      const int i = first + k * kMultipliers;
      if (i >= kGroupRows * fours || w->nf4.nested_absmax == nullptr) continue;
      const int r = i / fours;
      const int64_t block = row(r) * plan.blocks + first_scale() + (i - r * fours) * 4;
      const KernelNf4& nf4 = part_of(r).nf4;
      scales.codes[k] = __ldg(reinterpret_cast<const unsigned*>(static_cast<const uint8_t*>(nf4.absmax) + block));
      scales.nested[k] = __ldg(nf4.nested_absmax + (block >> shift));
    }
  }
  __device__ void store(const Scales& scales, int first) const {
    const float* const map = reinterpret_cast<const float*>(bytes + kScaleMapAt);
    const int fours = this->fours();
#pragma unroll
    for (int k = 0; k < kHeld; ++k) {
      const int i = first + k * kMultipliers;
      if (i >= kGroupRows * fours) continue;
      const int r = i / fours, at = (i - r * fours) * 4;
      float4 scale;
      if (w->nf4.nested_absmax != nullptr) {
        const auto of = [&](int j) {
          return __fadd_rn(__fmul_rn(map[scales.codes[k] >> 8 * j & 255], scales.nested[k]), part_of(r).nf4.nested_offset);
        };
        scale = make_float4(of(0), of(1), of(2), of(3));
      } else {
        scale = __ldg(reinterpret_cast<const float4*>(static_cast<const float*>(part_of(r).nf4.absmax) + row(r) * plan.blocks + first_scale() + at));
      }
      unsigned* const words = reinterpret_cast<unsigned*>(bytes + kScalesAt + r * group.scale_stride + at * 2);
      words[0] = pack(scale.x, scale.y, T{});
      words[1] = pack(scale.z, scale.w, T{});
    }
  }

  // B of sixteen ranks from `first` on, as a product takes it.
  __device__ void load_b(unsigned (&b)[4], int first) const {
    const int warp = thread / 32, g = thread % 32 / 4, t = thread % 4, rank = static_cast<int>(w->R);
    const void* const rows = part_of(16 * warp).b;
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const int j = first + 8 * (k / 2) + 2 * t;
      const int64_t at = row(16 * warp + g + k % 2 * 8) * rank + j;
      b[k] = 0;
      if (j >= rank) continue;
      if (w->lora_f32) {
        const float2 v = __ldg(reinterpret_cast<const float2*>(static_cast<const float*>(rows) + at));
        b[k] = pack(v.x, v.y, T{});
      } else {
        b[k] = __ldg(reinterpret_cast<const unsigned*>(static_cast<const T*>(rows) + at));
      }
    }
  }

  // acc += B z^T of 64 rows; b: its first sixteen ranks. Tiles of z lie side by side: those of A, of gate's and then up's, or two that are added
  // up.
  __device__ void add_lora(float (&acc)[N / 2], unsigned (&b)[4], unsigned memory, unsigned& phase) const {
    const int tiles = (static_cast<int>(w->R) + kTileRows - 1) / kTileRows, of_half = gated && thread >= kMultipliers / 2 ? tiles : 0;
    const bool in_two = !gated && tiles == 1;
    wait_phase(memory + kZFullAt, phase);
    phase ^= 1;
    const uint64_t z = uniform_matrix(kZAt + of_half * kTileRows * 2);
#pragma unroll 1
    for (int i = 0;;) {
      begin_products();
      wgmma(acc, b, z + 2 * i, T{});
      commit_products();
      wait_products<0>();
      if (++i >= (in_two ? 2 : tiles)) break;
      if (!in_two) load_b(b, i * kTileRows);
    }
    if (thread % 32 == 0) arrive(memory + kZEmptyAt);
  }

  __device__ float added(int64_t at, int c) const {
    return (p.bias == nullptr ? 0 : to_float(static_cast<const T*>(p.bias)[at])) +
           (p.residual == nullptr ? 0 : to_float(static_cast<const T*>(p.residual)[c * p.residual_stride + at]));
  }
  // y of row r of the group and column c.
  __device__ void store(int r, int c, float value) const {
    if (first_row + r >= w->rows || c >= p.M) return;
    const int64_t at = out_row + first_row + r;
    value += added(at, c);
    if (p.y_f32) {
      static_cast<float*>(p.y)[c * p.y_stride + at] = value;
    } else {
      static_cast<T*>(p.y)[c * p.y_stride + at] = from_float<T>(value);
    }
  }
  // v += of a row of T at `at`, four elements.
  __device__ static void add_four(float4& v, const void* from, int64_t at) {
    if (from == nullptr) return;
    const uint2 pairs = *reinterpret_cast<const uint2*>(static_cast<const T*>(from) + at);
    const T* const four = reinterpret_cast<const T*>(&pairs);
    v.x += to_float(four[0]), v.y += to_float(four[1]), v.z += to_float(four[2]), v.w += to_float(four[3]);
  }
  // Rows r .. r + 3 of y, and what the norm behind it takes.
  __device__ void store_four(int r, int c, float4 v, const float4& up) const {
    const GroupExtras& extras = group.extras;
    const bool inside = first_row + r < w->rows;
    const int64_t at = out_row + first_row + r;
    if (!group.by_fours) {
      store(r, c, v.x), store(r + 1, c, v.y), store(r + 2, c, v.z), store(r + 3, c, v.w);
      return;
    }
    if (inside) {
      add_four(v, p.bias, at);
      if (gated) {
        float4 other = up;
        add_four(other, p.bias, at + w->rows);
        // Rounded as what stands in memory elsewhere.
        const auto of = [&](float gate, float by) { return activated(extras.gated - 1, to_float(from_float<T>(gate))) * to_float(from_float<T>(by)); };
        v = make_float4(of(v.x, other.x), of(v.y, other.y), of(v.z, other.z), of(v.w, other.w));
      }
      add_four(v, p.residual, c * p.residual_stride + at);
      if (p.y_f32) {
        *reinterpret_cast<float4*>(static_cast<float*>(p.y) + c * p.y_stride + at) = v;
      } else {
        const uint2 pairs = make_uint2(pack(v.x, v.y, T{}), pack(v.z, v.w, T{}));
        *reinterpret_cast<uint2*>(static_cast<T*>(p.y) + c * p.y_stride + at) = pairs;
        const T* const four = reinterpret_cast<const T*>(&pairs);
        v = make_float4(to_float(four[0]), to_float(four[1]), to_float(four[2]), to_float(four[3]));
      }
    }
    if (extras.normed == nullptr) return;
    float squares = 0;
    if (inside) {
      squares = v.x * v.x + v.y * v.y + v.z * v.z + v.w * v.w;
      float4 weight = make_float4(extras.next_offset, extras.next_offset, extras.next_offset, extras.next_offset);
      add_four(weight, extras.next_weight, at);
      *reinterpret_cast<uint2*>(static_cast<T*>(extras.normed) + c * p.y_stride + at) =
          make_uint2(pack(v.x * weight.x, v.y * weight.y, T{}), pack(v.z * weight.z, v.w * weight.w, T{}));
    }
    // A warp has half of a column.
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes /= 2) squares += __shfl_xor_sync(0xffffffff, squares, lanes);
    if (thread % 32 == 0) extras.squares[(number * 2 + r / kHalf) * kMostColumns + c] = squares;
  }

  // y of a task whose block has another one: stages are in use.
  __device__ void finish_alone(const float (&acc)[N / 2]) const {
    const int r = thread / 32 * 16 + thread % 32 / 4, first = thread % 4 * 2;
#pragma unroll
    for (int n = 0; n < N / 8; ++n) {
      const int c = 8 * n + first;
      store(r, c, acc[4 * n]), store(r, c + 1, acc[4 * n + 1]), store(r + 8, c, acc[4 * n + 2]), store(r + 8, c + 1, acc[4 * n + 3]);
    }
  }
  // y of all pieces, each of which has a share of its columns.
  __device__ void finish(const float (&acc)[N / 2], unsigned memory) const {
    float* const sums = reinterpret_cast<float*>(bytes + Stage::kSumsAt);
    const float* const roots = group.extras.x_squares == nullptr ? nullptr : reinterpret_cast<const float*>(bytes + kRootsAt);
    // What lies there is read no more.
    meet_group();
    float* const own = sums + thread % 4 * 2 * kSumsStride + thread / 32 * 16 + thread % 32 / 4;
#pragma unroll
    for (int n = 0; n < N / 8; ++n) {
      float* const to = own + 8 * n * kSumsStride;
      to[0] = acc[4 * n], to[kSumsStride] = acc[4 * n + 1], to[8] = acc[4 * n + 2], to[kSumsStride + 8] = acc[4 * n + 3];
    }
    pieces == 1 ? meet_group() : meet_cluster();
    if (roots != nullptr) wait_phase(memory + kRootsFullAt, 0);
    const auto summed = [&](int r, int c) {
      const float4* const four = reinterpret_cast<const float4*>(sums + c * kSumsStride + r);
      float4 of_piece[kMostPiecesOfGroup];
#pragma unroll
      for (int k = 0; k < kMostPiecesOfGroup; ++k) {
        of_piece[k] = make_float4(0, 0, 0, 0);
        if (k < pieces) of_piece[k] = of_cluster(four, k, pieces);
      }
      float4 sum = of_piece[0];
#pragma unroll
      for (int k = 1; k < kMostPiecesOfGroup; ++k) {
        sum.x += of_piece[k].x, sum.y += of_piece[k].y, sum.z += of_piece[k].z, sum.w += of_piece[k].w;
      }
      const float root = roots == nullptr ? 1 : roots[c];
      return make_float4(root * sum.x, root * sum.y, root * sum.z, root * sum.w);
    };
    const int M = static_cast<int>(p.M), quads = (gated ? kHalf : kGroupRows) / 4, first = piece * M / pieces, columns = (piece + 1) * M / pieces - first;
#pragma unroll 1
    for (int i = thread; i < columns * quads; i += kMultipliers) {
      const int c = first + i / quads, r = i % quads * 4;
      store_four(r, c, summed(r, c), gated ? summed(r + kHalf, c) : float4{});
    }
    if (pieces > 1) leave_cluster();
  }
};

#endif

}  // namespace
}  // namespace ferrotune
