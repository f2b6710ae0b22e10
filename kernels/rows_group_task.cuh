// defines: GroupPlan, StageOf, GroupTask: what a thread block of rows_groups_kernel.cuh has to do, where that lies in shared memory, and what
// becomes of its sums.
#pragma once

#include "activation.cuh"
#include "cluster.cuh"
#include "hopper.cuh"
#include "nf4_order.cuh"
#include "rows.cuh"
#include "rows_groups.h"

namespace ferrotune {
namespace {

// Warps behind those that multiply: one whose first thread brings stages, those that make or fetch z, one that adds up squares of x.
constexpr int kMostGroupRows = 256, kLeastGroupRows = 128, kGroupWarps = 16, kMultipliers = 32 * kGroupWarps, kZWarps = 2, kGroupThreads = kMultipliers + 128;
// Units of a piece in whose time other blocks have made z; rows whose squares are summed up together.
constexpr int kLeastUnitsForZ = 18, kRunOfSquares = 128;
constexpr int kMapThreads = kGroupThreads - kMultipliers - 32;
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
constexpr int kSumsStride = kMostGroupRows + 4;

template <int N, bool kNf4>
struct GroupStage {
  static constexpr int kBlocks = kNf4 ? kRun / kBlock : 1;  // of 64 columns
  static constexpr int kRowBytes = kNf4 ? kRun / 2 : kBlock * 2, kXBytes = kBlocks * N * 128;
  static constexpr int kSumsAt = kNf4 ? kPairsAt : kStagesAt;
};

struct GroupPlan {
  CUtensorMap w[3], a[3], x;  // boxes of a stage; those of x and A have rows of 128 bytes
  Plan plan;                  // tiles of W are groups
  int rows, pieces, tasks, stages, units;               // rows: of a group, 16 a warp; units: runs, or blocks of 64 columns of 16-bit weights
  int scale_stride, w_at, w_bytes, a_at, a_bytes, all;  // bytes; w_bytes and a_bytes: of a stage
  int z_blocks;                                         // the first ones, which make z for all others
  bool a_in_stages;                                     // each makes its own z, of A that comes with x
  void* z;                                              // [tiles of A, kMostColumns, kTileRows]
  int* z_counters;                                      // how many blocks have left z, how many warps have read it
  bool by_fours;                                        // whether four rows of y and of what is added to it are one access
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
// The same with those who bring nothing but what they arrive behind.
__device__ __forceinline__ void meet_all() { asm volatile("bar.sync 2, %0;" ::"n"(kMultipliers + kMapThreads) : "memory"); }
__device__ __forceinline__ void arrive_for_all() { asm volatile("bar.arrive 2, %0;" ::"n"(kMultipliers + kMapThreads) : "memory"); }

// What is computed with it the compiler computes where it stands: else what many tasks share stays in registers that the products need.
__device__ __forceinline__ int anew(int value) {
  asm volatile("" : "+r"(value));
  return value;
}

__device__ __forceinline__ char* shared_bytes() {
  extern __shared__ uint4 dynamic[];
  return reinterpret_cast<char*>(dynamic) - (shared_address(dynamic) & 0xffffff);
}

// A piece of a group, rows of one part. Of gate and up the pieces of a group are the rows of one and of the other.
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
    if (gated) {
      part = piece;
    } else {
      while (local >= plan.w_tiles[part]) {
        local -= plan.w_tiles[part];
        out_row += p.parts[part].rows;
        ++part;
      }
    }
    w = &p.parts[part];
    first_row = int64_t{local} * group.rows;
    from = gated ? 0 : piece * group.units / pieces;
    to = gated ? group.units : (piece + 1) * group.units / pieces;
  }
  // Warps of the warpgroups that have rows. Of those some may have none: all of a warpgroup multiply.
  __device__ static int warps_of(const GroupPlan& group) { return (group.rows + 63) / 64 * 4; }
  __device__ bool has_row(int r) const { return r < group.rows && first_row + r < w->rows; }
  // Where z is that of all columns one piece of a group adds it, that with the fewest units.
  __device__ bool adds_lora() const { return w->a != nullptr && (group.z_blocks == 0 || gated || piece == 0); }
  // Of A 64 columns in 16 bits or 32 in f32, rows up to a multiple of a tile's.
  __device__ int a_box_bytes() const { return tiles_of_z(part) * (kTileRows * 128); }
  __device__ int a_boxes() const { return group.a_in_stages && w->a != nullptr ? Stage::kBlocks * (w->lora_f32 ? 2 : 1) : 0; }
  __device__ int64_t row(int r) const { return min(first_row + r, w->rows - 1); }
  // The scales of a row in 16 bits, four at a time, which start at a multiple of four blocks.
  __device__ int first_scale() const { return 2 * from & ~3; }
  __device__ int fours() const { return (2 * to - first_scale() + 3) / 4; }
  struct Scales {
    unsigned codes;
    float nested;
  };
  __device__ int64_t scale_block(int r, int four) const { return row(r) * plan.blocks + first_scale() + four * 4; }
  __device__ void load(Scales& scales, int r, int four) const {
    const int64_t block = scale_block(r, four);
    const KernelNf4& nf4 = w->nf4;
    if (nf4.nested_absmax == nullptr) return;
    scales.codes = __ldg(reinterpret_cast<const unsigned*>(static_cast<const uint8_t*>(nf4.absmax) + block));
    scales.nested = __ldg(nf4.nested_absmax + (block >> plan.nested_shift[part]));
  }
  __device__ uint2 in_16_bits(const Scales& scales, int r, int four) const {
    const float* const map = reinterpret_cast<const float*>(bytes + kScaleMapAt);
    float4 scale;
    if (w->nf4.nested_absmax != nullptr) {
      const auto of = [&](int j) {
        return __fadd_rn(__fmul_rn(map[scales.codes >> 8 * j & 255], scales.nested), w->nf4.nested_offset);
      };
      scale = make_float4(of(0), of(1), of(2), of(3));
    } else {
      scale = __ldg(reinterpret_cast<const float4*>(static_cast<const float*>(w->nf4.absmax) + scale_block(r, four)));
    }
    return make_uint2(pack(scale.x, scale.y, T{}), pack(scale.z, scale.w, T{}));
  }

  // B of sixteen ranks from `first` on, as a product takes it.
  __device__ void load_b(unsigned (&b)[4], int first) const {
    const int warp = thread / 32, g = thread % 32 / 4, t = thread % 4, rank = static_cast<int>(w->R);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const int j = first + 8 * (k / 2) + 2 * t;
      const int64_t at = row(16 * warp + g + k % 2 * 8) * rank + j;
      b[k] = 0;
      if (j >= rank) continue;
      if (w->lora_f32) {
        const float2 v = __ldg(reinterpret_cast<const float2*>(static_cast<const float*>(w->b) + at));
        b[k] = pack(v.x, v.y, T{});
      } else {
        b[k] = __ldg(reinterpret_cast<const unsigned*>(static_cast<const T*>(w->b) + at));
      }
    }
  }

  __device__ int tiles_of_z(int of_part) const { return plan.a_tiles[of_part]; }
  // Whether a tile of A is all of it and two warps multiply by it; z is then in two, of every other block of columns each.
  __device__ bool shares_a() const { return group.a_in_stages && w->R <= kTileRows; }
  // acc += B z^T of 64 rows; b: its first sixteen ranks. Tiles of z lie side by side.
  __device__ void add_lora(float (&acc)[N / 2], unsigned (&b)[4], unsigned memory, unsigned& phase) const {
    const int tiles = tiles_of_z(part);
    wait_phase(memory + kZFullAt, phase);
    phase ^= 1;
    const uint64_t z = uniform_matrix(kZAt);
    if (shares_a()) {
      begin_products();
      wgmma(acc, b, z, T{});
      wgmma(acc, b, z + 2, T{});
      commit_products();
      wait_products<0>();
    } else {
#pragma unroll 1
      for (int i = 0;;) {
        begin_products();
        wgmma(acc, b, z + 2 * i, T{});
        commit_products();
        wait_products<0>();
        if (++i >= tiles) break;
        load_b(b, i * kTileRows);
      }
    }
    if (thread % 32 == 0) arrive(memory + kZEmptyAt);
  }

  __device__ float added(int64_t at, int c) const {
    return (p.bias == nullptr ? 0 : to_float(static_cast<const T*>(p.bias)[at])) +
           (p.residual == nullptr ? 0 : to_float(static_cast<const T*>(p.residual)[c * p.residual_stride + at]));
  }
  // y of row r of the group and column c.
  __device__ void store(int r, int c, float value) const {
    if (!has_row(r) || c >= p.M) return;
    const int64_t at = out_row + first_row + r;
    value += added(at, c);
    if (p.y_f32) {
      static_cast<float*>(p.y)[c * p.y_stride + at] = value;
    } else {
      static_cast<T*>(p.y)[c * p.y_stride + at] = from_float<T>(value);
    }
  }
  // v += four elements of T.
  __device__ static void add_four(float4& v, const uint2& pairs) {
    const T* const four = reinterpret_cast<const T*>(&pairs);
    v.x += to_float(four[0]), v.y += to_float(four[1]), v.z += to_float(four[2]), v.w += to_float(four[3]);
  }
  // What is added to rows r .. r + 3 and multiplied with them, zero where there is none.
  struct Beside {
    uint2 bias, up_bias, residual, weight;
  };
  __device__ Beside load_beside(int r, int c) const {
    Beside beside{};
    const int64_t at = out_row + first_row + r;
    if (!group.by_fours || !has_row(r)) return beside;
    const auto four = [](const void* from, int64_t first) { return *reinterpret_cast<const uint2*>(static_cast<const T*>(from) + first); };
    if (p.bias != nullptr) {
      beside.bias = four(p.bias, at);
      if (gated) beside.up_bias = four(p.bias, at + w->rows);
    }
    if (p.residual != nullptr) beside.residual = four(p.residual, c * p.residual_stride + at);
    if (group.extras.normed != nullptr) beside.weight = four(group.extras.next_weight, at);
    return beside;
  }
  // Rows r .. r + 3 of y, and what the norm behind it takes.
  __device__ void store_four(int r, int c, float4 v, float4 up, const Beside& beside) const {
    const GroupExtras& extras = group.extras;
    const bool inside = has_row(r);
    const int64_t at = out_row + first_row + r;
    if (!group.by_fours) {
      store(r, c, v.x), store(r + 1, c, v.y), store(r + 2, c, v.z), store(r + 3, c, v.w);
      return;
    }
    // What a product of NF4 reads next stands in its order.
    const auto put = [&](void* to, const uint2& pairs) {
      T* const row = static_cast<T*>(to) + c * p.y_stride;
      if constexpr (kNf4) {
        // A warp has 128 columns, and each lane of them what is eight bytes there; what products of NF4 read is a multiple of that.
        const int lane = thread % 32, from = lane % 2 * 16 + lane / 4;
        uint2 own;
        for (int i = 0; i < 2; ++i) {
          const unsigned first = __shfl_sync(0xffffffff, pairs.x, from + 8 * i), second = __shfl_sync(0xffffffff, pairs.y, from + 8 * i);
          (i == 0 ? own.x : own.y) = lane / 2 % 2 == 0 ? first : second;
        }
        *reinterpret_cast<uint2*>(row + at) = own;
      } else {
        *reinterpret_cast<uint2*>(row + at) = pairs;
      }
    };
    if (inside) {
      add_four(v, beside.bias);
      if (gated) {
        add_four(up, beside.up_bias);
        // Rounded as what stands in memory elsewhere.
        const auto rounded = [](float4 of) {
          const uint2 pairs = make_uint2(pack(of.x, of.y, T{}), pack(of.z, of.w, T{}));
          of = make_float4(0, 0, 0, 0);
          add_four(of, pairs);
          return of;
        };
        v = activated(extras.gated - 1, rounded(v)), up = rounded(up);
        v = make_float4(v.x * up.x, v.y * up.y, v.z * up.z, v.w * up.w);
      }
      add_four(v, beside.residual);
      if (p.y_f32) {
        *reinterpret_cast<float4*>(static_cast<float*>(p.y) + c * p.y_stride + at) = v;
      } else {
        const uint2 pairs = make_uint2(pack(v.x, v.y, T{}), pack(v.z, v.w, T{}));
        if (gated) {
          put(p.y, pairs);
        } else {
          *reinterpret_cast<uint2*>(static_cast<T*>(p.y) + c * p.y_stride + at) = pairs;
        }
        v = make_float4(0, 0, 0, 0);
        add_four(v, pairs);
      }
    }
    if (extras.normed == nullptr) return;
    float squares = 0;
    if (inside) {
      squares = v.x * v.x + v.y * v.y + v.z * v.z + v.w * v.w;
      float4 weight = make_float4(extras.next_offset, extras.next_offset, extras.next_offset, extras.next_offset);
      add_four(weight, beside.weight);
      put(extras.normed, make_uint2(pack(v.x * weight.x, v.y * weight.y, T{}), pack(v.z * weight.z, v.w * weight.w, T{})));
    }
    // A warp has half of a column.
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes /= 2) squares += __shfl_xor_sync(0xffffffff, squares, lanes);
    if (thread % 32 == 0) extras.squares[(number * 2 + r / kRunOfSquares) * kMostColumns + c] = squares;
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
    constexpr int kQuads = kMostGroupRows / 4;
    const int M = static_cast<int>(p.M), first = piece * M / pieces;
    const int all = ((piece + 1) * M / pieces - first) * kQuads, rounds = (all + kMultipliers - 1) / kMultipliers;
    const auto column = [&](int i) { return first + i / kQuads; };
    const auto row_of = [&](int i) { return i % kQuads * 4; };
    // What lies there is read no more.
    meet_group();
    float* const own = sums + thread % 4 * 2 * kSumsStride + thread / 32 * 16 + thread % 32 / 4;
    // Rows that a group does not have are there for all that follows, and nobody looks at them.
#pragma unroll
    for (int n = 0; n < N / 8; ++n) {
      float* const to = own + 8 * n * kSumsStride;
      to[0] = acc[4 * n], to[kSumsStride] = acc[4 * n + 1], to[8] = acc[4 * n + 2], to[kSumsStride + 8] = acc[4 * n + 3];
    }
    pieces == 1 ? meet_group() : arrive_at_cluster();
    // On its way meanwhile.
    int i = thread;
    Beside beside{};
    if (i < all) beside = load_beside(row_of(i), column(i));
    if (roots != nullptr) wait_phase(memory + kRootsFullAt, 0);
    if (pieces > 1) wait_for_cluster();
    const auto times_root = [&](const float4& sum, int c) {
      const float root = roots == nullptr ? 1 : roots[c];
      return make_float4(root * sum.x, root * sum.y, root * sum.z, root * sum.w);
    };
    const auto summed = [&](const float4* four) {
      float4 sum;
      if (pieces == 1) {
        sum = *four;
      } else {
        float4 of_piece[kMostPiecesOfGroup];
#pragma unroll
        for (int k = 0; k < kMostPiecesOfGroup; ++k) {
          of_piece[k] = make_float4(0, 0, 0, 0);
          if (k < pieces) of_piece[k] = of_cluster(four, k, pieces);
        }
        sum = of_piece[0];
#pragma unroll
        for (int k = 1; k < kMostPiecesOfGroup; ++k) {
          sum.x += of_piece[k].x, sum.y += of_piece[k].y, sum.z += of_piece[k].z, sum.w += of_piece[k].w;
        }
      }
      return sum;
    };
#pragma unroll 1
    for (int round = 1; round <= rounds; ++round, i += kMultipliers) {
      const bool any = i < all;
      const int c = column(i), r = row_of(i);
      float4 sum{}, up{};
      const float4* const four = reinterpret_cast<const float4*>(sums + c * kSumsStride + r);
      if (any && gated) {
        sum = times_root(of_cluster(four, 0, pieces), c), up = times_root(of_cluster(four, 1, pieces), c);
      } else if (any) {
        sum = times_root(summed(four), c);
      }
      // Others' sums are here: their blocks may end. Not relaxed, which would overtake the reads.
      if (pieces > 1 && round == rounds) arrive_at_cluster();
      if (any) store_four(r, c, sum, up, beside);
      if (i + kMultipliers < all) beside = load_beside(row_of(i + kMultipliers), column(i + kMultipliers));
    }
    if (pieces > 1) {
      if (rounds == 0) arrive_at_cluster();
      wait_for_cluster();
    }
  }
};

#endif

}  // namespace
}  // namespace ferrotune
