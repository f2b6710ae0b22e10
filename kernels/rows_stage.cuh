// defines: StripPlan, Nf4Block: what the kernels of few rows and NF4 weights share. A thread block has a run of tiles of one part to
// itself; scales, B, the maps and the table of pairs come into shared memory before the inputs are ready; one warp more than multiply
// computes this thread block's pieces of x A^T, waits for those of the others and has the products with A ready when the tiles are.
#pragma once

#include "rows.cuh"

namespace ferrotune {
namespace {

// A group is 256 columns of a tile, a run 128.
constexpr int kStripWarps = 15, kStripThreads = 32 * (kStripWarps + 1), kGroupBlocks = 4, kRing = 2;
// Of the map of scales, so that lanes of different rows read different banks.
constexpr int kMapCopies = 8;
// The bytes of a round of tiles' scales and B, and their scales' scales.
constexpr int kRoundBytes = 39 * 1024, kMostNested = 512, kMostAtOnce = 64;

// What a thread block's shared memory holds, in bytes from the start of its address space, of which up to kReserved are not ours. A
// wide table has the pair of byte i at kTableAt + 256 i + 4 lane, an address that one permutation of bytes makes; x lies behind it.
// Another has 128 bytes a pair, and takes one instruction more.
constexpr int kReserved = 1024, kTableAt = 0x10000;
struct StripShared {
  int table, map, tiles, z, slots, nested, absmax, b, x, all;
  int absmax_stride, x_stride;  // of a row
};

struct StripPlan {
  Plan plan;     // per: tiles of a thread block
  int at_once;   // tiles whose sums meet at a time
  // Of rows_tiles.cuh: the pieces of a tile's columns, and runs of x of each that have room at a time.
  int k_pieces, x_stages;
  StripShared at;
};

__device__ __forceinline__ void copy_4_bytes(unsigned to, const void* from) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(to), "l"(from));
}

template <bool kWide>
__device__ __forceinline__ void look_up_words(const uint4& words, unsigned table, unsigned (&out)[16]) {
  const unsigned w[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    const unsigned at = kWide ? __byte_perm(w[i / 4], table, 0x7604 | i % 4 << 4) : table + __byte_perm(w[i / 4], 0, 0x4440 + i % 4) * 128;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(out[i]) : "r"(at));
  }
}

// Sums of pieces are added up in one order, however many columns there are: those whose numbers leave the same rest by
// kPieceClasses one after another, and then ((0 + 1) + (2 + 3)) + ((4 + 5) + (6 + 7)).
constexpr int kPieceClasses = 8;

// z[c][j] = scale * the sum of all pieces of row j of A times x c, of one or two columns, by one warp: eight or four pieces at a time.
template <int MP>
__device__ __forceinline__ void add_pieces(const Plan& plan, const Workspace& workspace, int a_tile, int rank, float scale, float* z) {
  constexpr int kLanes = 4 * MP, kAtOnce = 32 / kLanes, kSums = kPieceClasses / kAtOnce;
  const int lane = threadIdx.x % 32, column = lane % kLanes / 4, four = lane % 4;
  for (int tile = 0; tile * kTileRows < rank; ++tile) {
    float4 sum[kSums] = {};
#pragma unroll 8
    for (int piece = lane / kLanes; piece < plan.pieces; piece += kPieceClasses) {
#pragma unroll
      for (int k = 0; k < kSums; ++k) {
        if (piece + k * kAtOnce >= plan.pieces) continue;
        const float* const from = workspace.a_sums(plan, a_tile + tile, piece + k * kAtOnce, 0) + column * kTileRows;
        const float4 v = __ldcg(reinterpret_cast<const float4*>(from) + four);
        sum[k].x += v.x, sum[k].y += v.y, sum[k].z += v.z, sum[k].w += v.w;
      }
    }
#pragma unroll
    for (int k = 0; k < kSums; ++k) {
#pragma unroll
      for (int other = kLanes; other < 32; other *= 2) {
        sum[k].x += __shfl_xor_sync(0xffffffff, sum[k].x, other), sum[k].y += __shfl_xor_sync(0xffffffff, sum[k].y, other);
        sum[k].z += __shfl_xor_sync(0xffffffff, sum[k].z, other), sum[k].w += __shfl_xor_sync(0xffffffff, sum[k].w, other);
      }
    }
    if constexpr (kSums == 2) sum[0].x += sum[1].x, sum[0].y += sum[1].y, sum[0].z += sum[1].z, sum[0].w += sum[1].w;
    if (lane < kLanes) {
      float4* const to = reinterpret_cast<float4*>(z + column * kMostRank + tile * kTileRows) + four;
      *to = make_float4(scale * sum[0].x, scale * sum[0].y, scale * sum[0].z, scale * sum[0].w);
    }
  }
}

// This thread block's part and tiles, and the round of tiles that it is at.
template <typename T, bool kNested>
struct Nf4Block {
  const StripPlan& strip;
  const Plan& plan;
  const KernelRows& p;
  const StripShared& in;
  char* const bytes;
  int which = 0, a_tile = 0, first_tile, last_tile, shift;
  int64_t part_row = 0;
  const KernelRowsPart* w;
  int b_stride;
  // The round.
  int tile, tiles, rows;
  int64_t first_row, first_nested;

  __device__ Nf4Block(const StripPlan& given, char* shared)
      : strip(given), plan(given.plan), p(plan.rows), in(given.at), bytes(shared) {
    int block = static_cast<int>(blockIdx.x);
    while (block >= plan.w_blocks[which]) {
      block -= plan.w_blocks[which];
      a_tile += plan.a_tiles[which];
      part_row += p.parts[which].rows;
      ++which;
    }
    w = &p.parts[which];
    shift = plan.nested_shift[which];
    first_tile = block * plan.per;
    last_tile = min(first_tile + plan.per, plan.w_tiles[which]);
    // 16 bytes more: eight rows are in different banks.
    b_stride = static_cast<int>(w->R) * (w->lora_f32 ? 4 : 2) + 16;
  }
  __device__ bool first_time() const { return tile == first_tile; }
  __device__ void at(int first) {
    tile = first;
    tiles = min(strip.at_once, last_tile - tile);
    first_row = int64_t{tile} * kTileRows;
    rows = static_cast<int>(min(int64_t{tiles} * kTileRows, w->rows - first_row));
    first_nested = kNested ? first_row * plan.blocks >> shift : 0;
  }

  // Starts the copies of the round's scales and B.
  __device__ void fetch_scales_and_b() const {
    if constexpr (kNested) {
      const auto* const from = static_cast<const uint8_t*>(w->nf4.absmax) + first_row * plan.blocks;
      const int piece = plan.blocks % 16 == 0 ? 16 : 4, pieces = plan.blocks / piece;
      for (int i = threadIdx.x; i < rows * pieces; i += kStripThreads) {
        const int row = i / pieces;
        const unsigned to = shared_address(bytes + in.absmax + row * in.absmax_stride + (i - row * pieces) * piece);
        piece == 16 ? copy_16_bytes(to, from + i * 16, true) : copy_4_bytes(to, from + i * 4);
      }
      const int count = static_cast<int>(((first_row + rows) * plan.blocks - 1 >> shift) - first_nested) + 1;
      for (int i = threadIdx.x; i < count; i += kStripThreads) {
        copy_4_bytes(shared_address(bytes + in.nested + 4 * i), w->nf4.nested_absmax + first_nested + i);
      }
    }
    if (w->b != nullptr) {
      const int row_bytes = b_stride - 16, pieces = row_bytes / 16;
      const char* const b = static_cast<const char*>(w->b) + first_row * row_bytes;
      for (int i = threadIdx.x; i < rows * pieces; i += kStripThreads) {
        const int row = i / pieces;
        copy_16_bytes(shared_address(bytes + in.b + row * b_stride + (i - row * pieces) * 16), b + 16 * i, true);
      }
    }
    commit_copies();
  }

  // The maps, of which this thread holds a share since the kernel's start.
  static constexpr int kOfMap = 256 * kMapCopies / kStripThreads;
  float code, of_map[kOfMap];
  __device__ void load_maps() {
    code = w->nf4.quant_map[threadIdx.x % 16];
    if constexpr (kNested) {
#pragma unroll
      for (int i = 0; i < kOfMap; ++i) of_map[i] = w->nf4.nested_quant_map[(i * kStripThreads + threadIdx.x) / kMapCopies];
    }
  }
  template <int kPairBytes>
  __device__ void store_maps() const {
    if constexpr (kNested) {
#pragma unroll
      for (int i = 0; i < kOfMap; ++i) reinterpret_cast<float*>(bytes + in.map)[i * kStripThreads + threadIdx.x] = of_map[i];
    }
    for (int i = threadIdx.x; i < 256 * 8; i += kStripThreads) {
      const float even = __shfl_sync(0xffffffff, code, i >> 7), odd = __shfl_sync(0xffffffff, code, i >> 3 & 15);
      const unsigned pair = pack(even, odd, T{});
      *reinterpret_cast<uint4*>(bytes + in.table + (i >> 3) * kPairBytes + i % 8 * 16) = make_uint4(pair, pair, pair, pair);
    }
  }

  // By one warp: A on its way; its products with x, of this thread block's share and then of all.
  __device__ void prefetch_a() const {
    for (int task = static_cast<int>(blockIdx.x); task < plan.a_blocks; task += static_cast<int>(gridDim.x)) prefetch_share_of_a(plan, task);
  }
  template <int MP>
  __device__ void multiply_by_a() const {
    const Workspace workspace{static_cast<char*>(p.workspace)};
    const int all = plan.a_blocks * plan.eights;
    for (int task = static_cast<int>(blockIdx.x); task < all; task += static_cast<int>(gridDim.x)) {
      warp_share_of_a<T>(plan, workspace, task % plan.a_blocks, task / plan.a_blocks);
    }
    if (w->a == nullptr) return;
    while (load_acquire(workspace.a_ready()) < all) {}
    if constexpr (MP <= 2) add_pieces<MP>(plan, workspace, a_tile, static_cast<int>(w->R), w->scale, z());
  }
  // The same sums of more columns, by all warps once the tiles are done: threads share the classes of a sum, and leave them in memory
  // of [kPieceClasses, kColumns, 16] floats.
  template <int kColumns>
  __device__ void sum_pieces(float* parts) const {
    if (w->a == nullptr) return;
    constexpr int kSums = kColumns * kTileRows, kThreadsOfSum = kStripThreads / kSums;
    static_assert(kThreadsOfSum * kSums == kStripThreads && kPieceClasses % kThreadsOfSum == 0);
    const Workspace workspace{static_cast<char*>(p.workspace)};
    const int first = threadIdx.x / kSums, at = threadIdx.x % kSums, column = at / kTileRows, row = threadIdx.x % kTileRows;
    for (int tile = 0; tile * kTileRows < w->R; ++tile) {
      float sum[kPieceClasses / kThreadsOfSum] = {};
#pragma unroll 4
      for (int piece = first; piece < plan.pieces; piece += kPieceClasses) {
#pragma unroll
        for (int k = 0; k < kPieceClasses / kThreadsOfSum; ++k) {
          const int own = piece + k * kThreadsOfSum;
          if (own < plan.pieces) sum[k] += __ldcg(workspace.a_sums(plan, a_tile + tile, own, column / kEight) + column % kEight * kTileRows + row);
        }
      }
#pragma unroll
      for (int k = 0; k < kPieceClasses / kThreadsOfSum; ++k) parts[(first + k * kThreadsOfSum) * kSums + at] = sum[k];
      __syncthreads();
      if (first == 0) {
        const auto of = [&](int k) { return parts[k * kSums + at]; };
        const float total = ((of(0) + of(1)) + (of(2) + of(3))) + ((of(4) + of(5)) + (of(6) + of(7)));
        z()[column * kMostRank + tile * kTileRows + row] = w->scale * total;
      }
      __syncthreads();
    }
  }
  __device__ float* z() const { return reinterpret_cast<float*>(bytes + in.z); }

  // What is added to an output.
  __device__ float added(int row, int c) const {
    float value = 0;
    const int64_t out_row = part_row + first_row + row;
    if (p.bias != nullptr) value += to_float(static_cast<const T*>(p.bias)[out_row]);
    if (p.residual != nullptr) value += to_float(static_cast<const T*>(p.residual)[c * p.residual_stride + out_row]);
    return value;
  }
  __device__ float lora(int row, int c) const {
    if (w->a == nullptr) return 0;
    const int rank = static_cast<int>(w->R);
    const float* const own_z = z() + c * kMostRank;
    const char* const b = bytes + in.b + row * b_stride;
    float value = 0;
    const auto add = [&](auto element) {
      using Element = decltype(element);
      constexpr int kWidth = 16 / sizeof(Element);
#pragma unroll 2
      for (int j = 0; j < rank; j += kWidth) {
        const auto v = *reinterpret_cast<const Vector<Element, kWidth>*>(b + j * sizeof(Element));
#pragma unroll
        for (int i = 0; i < kWidth; ++i) value += to_float(from_float<T>(to_float(v.v[i]))) * own_z[j + i];
      }
    };
    w->lora_f32 ? add(float{}) : add(T{});
    return value;
  }
  __device__ void store(int row, int c, float value) const {
    const int64_t to = c * p.y_stride + part_row + first_row + row;
    if (p.y_f32) {
      static_cast<float*>(p.y)[to] = value;
    } else {
      static_cast<T*>(p.y)[to] = from_float<T>(value);
    }
  }

  // The last block leaves the counters as it found them. Nobody waits any more.
  __device__ void leave() const {
    const Workspace workspace{static_cast<char*>(p.workspace)};
    if (threadIdx.x == 0 && plan.a_blocks > 0 && atomicAdd(workspace.left(), 1) == static_cast<int>(gridDim.x) - 1) {
      *workspace.a_ready() = 0;
      *workspace.left() = 0;
    }
  }
};

// Tiles of a thread block, so that all thread blocks are on the processors at once.
inline int tiles_of_a_block(const Plan& plan, int64_t parts, int most) {
  for (int per = 1;; ++per) {
    int64_t blocks = 0;
    for (int64_t i = 0; i < parts; ++i) blocks += ceil_div(plan.w_tiles[i], per);
    if (blocks <= most) return per;
  }
}

// The plan of a launch, with the shared memory up to B; z and the sums are as long as the caller says, the sums for each number of tiles
// at once. Returns the number of thread blocks.
template <typename SumBytes>
int plan_strips(StripPlan& strip, int most_pieces, int most_at_once, int z_bytes, SumBytes&& sum_bytes) {
  Plan& plan = strip.plan;
  const KernelRows& rows = plan.rows;
  const bool nested = rows.parts[0].nf4.nested_absmax != nullptr;
  plan.per = tiles_of_a_block(plan, rows.count, device_attribute(cudaDevAttrMultiProcessorCount));
  int blocks = 0, a_tiles = 0;
  int64_t b_tile = 0, nested_tile = 0;
  for (int64_t i = 0; i < rows.count; ++i) {
    const KernelRowsPart& part = rows.parts[i];
    plan.w_blocks[i] = static_cast<int>(ceil_div(plan.w_tiles[i], plan.per));
    blocks += plan.w_blocks[i];
    a_tiles += plan.a_tiles[i];
    const int64_t b = part.b == nullptr ? 0 : kTileRows * (part.R * (part.lora_f32 ? 4 : 2) + 16);
    const int64_t scales = nested ? ceil_div(kTileRows * plan.blocks, part.nf4.nested_blocksize) : 0;
    if (b > b_tile) b_tile = b;
    if (scales > nested_tile) nested_tile = scales;
  }
  if (a_tiles > 0) {
    const int tasks = a_tiles * plan.eights;
    plan.pieces = blocks / tasks < 1 ? 1 : blocks / tasks;
    if (plan.pieces > most_pieces) plan.pieces = most_pieces;
    if (plan.pieces > plan.blocks) plan.pieces = plan.blocks;
    plan.a_blocks = a_tiles * plan.pieces;
  }
  StripShared& at = strip.at;
  // Words lie so that eight rows are in different banks.
  int words = plan.blocks / 4;
  while (words % 8 != 4) ++words;
  at.absmax_stride = words * 4;
  const int64_t absmax_tile = nested ? int64_t{kTileRows} * at.absmax_stride : 0;
  int64_t most = plan.per < most_at_once ? plan.per : most_at_once;
  if (b_tile + absmax_tile > 0 && most > kRoundBytes / (b_tile + absmax_tile)) most = kRoundBytes / (b_tile + absmax_tile);
  if (nested_tile > 0 && most > (kMostNested - 2) / nested_tile) most = (kMostNested - 2) / nested_tile;
  if (most < 1) most = 1;
  // Rounds of one length.
  most = ceil_div(plan.per, ceil_div(plan.per, most));
  strip.at_once = static_cast<int>(most);
  at.map = kReserved;
  at.tiles = at.map + (nested ? 256 * kMapCopies * 4 : 0);
  at.z = at.tiles + (strip.at_once + 1) / 2 * 16;
  at.slots = at.z + z_bytes;
  at.nested = at.slots + sum_bytes(strip.at_once);
  at.absmax = at.nested + (nested ? kMostNested * 4 : 0);
  at.b = at.absmax + static_cast<int>(absmax_tile) * strip.at_once;
  at.table = at.b + static_cast<int>(b_tile) * strip.at_once;
  return blocks;
}

// A row of scales, of their scales and of B fits a round.
inline bool fits_strips(const KernelRows& rows) {
  const int64_t blocks = rows.K / kBlock;
  bool fits = rows.M <= 32 && rows.K % (kGroupBlocks * kBlock) == 0 && kTileRows * (blocks + 32 + kMostRank * 4 + 16) <= kRoundBytes;
  for (int64_t i = 0; i < rows.count; ++i) {
    const KernelNf4& nf4 = rows.parts[i].nf4;
    fits = fits && (nf4.nested_absmax == nullptr || kTileRows * blocks / nf4.nested_blocksize + 3 <= kMostNested);
  }
  return fits;
}

}  // namespace
}  // namespace ferrotune
