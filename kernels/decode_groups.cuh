// defines: GroupProducts: the four products of a layer for up to 32 rows of x, by one thread block among all.
//
// A product's rows of W are cut into groups and its columns into slices: a thread block has one slice of one group, and that slice of all rows of
// x in shared memory. Its four warpgroups share the tiles of 64 rows by 64 columns (of NF4 128) evenly and multiply them by x as
// rows_groups.cuh does: 64 rows of W for each time that x is read. Each leaves its sums of a tile in memory, and once all slices of a group are
// there each of the group's thread blocks adds up its share of the outputs, in one order.
//
// Norms are linear but for a row's factor: x goes in times the norm's weight, and sums are multiplied by 1 / rms, which the thread blocks
// that made x left as sums of squares. LoRA is linear, too: a slice's part of x A^T, times B, goes with the slice's own sums.
//
// NF4 as in rows_groups.cuh: of a run of 128 columns lane t of a row has columns 32 t .. 32 t + 31; its pair j is pair 4 j + t of the product's
// columns, and in that order x lies in shared memory.
#pragma once

#include "decode.cuh"
#include "hopper.cuh"

namespace ferrotune {
namespace {

constexpr int kMostRowsOfX = 32, kTall = 64, kWarpgroups = 4, kAllWarps = 4 * kWarpgroups;
// Of a group: tiles of 64 rows, tiles times slices.
constexpr int kMostTall = 32, kMostSlices = 16, kMostTallSlices = 256;
// Elements between rows of a warp's sums of z.
template <int N>
constexpr int kZSumRow = N + 8;

// How a product is cut: groups of tiles (of gate and up pairs of tiles) by slices of units.
struct GroupCut {
  int groups, slices, tiles, units, most_tall;
  int z_slots, z_sums;  // sums of z that meet at a time, and where, behind x's slice
};
struct GroupCommon {
  GroupCut cut[kPhases];
  int depth, z_row;   // boxes of a ring; elements of a row of z
  int rstd, squares;  // in shared memory
  float* sums;                // [group, slice, kWarpgroups - 1 + most_tall, N / 8, 128] of 4
  float* statistics;          // [2, thread blocks, N]
  int* met;                   // [kPhases, kMostGroups]
};
constexpr int kMostGroups = 256, kGroupCommonAt = kCommonAt + (sizeof(DecodeCommon) + 15) / 16 * 16;
struct GroupStack {
  CUtensorMap w[kPhases];  // boxes of 64 rows of 128 bytes, of NF4 64
  DecodeCommon common;
  GroupCommon group;
  DecodeLayer* copy;
  DecodeLayer layer[kMostLayers];
};
static_assert(sizeof(GroupStack) <= 32764);

// A tile of 64 rows: the first of a part, and of the product, by 64 rows.
struct TallTile {
  short part, row, out, unused;
};
// A thread block's share of a product: tiles, and units of its slice.
struct GroupShare {
  int group, slice, tiles, from, units;
  DecodeUnits of[kWarpgroups];
  TallTile tall[kMostTall];
  int boxes[kMostTall];  // of this layer's or the next's product: where a tile's slice begins
  // Of each tile and slice: the first of the sums of that slice's warpgroups, and how many there are.
  unsigned short sums[kMostTallSlices];
};

#ifdef FERROTUNE_HOPPER

__device__ __forceinline__ GroupShare& group_share(const DecodeCommon& s, int phase) {
  return reinterpret_cast<GroupShare*>(shared_at(s.at.shares))[phase];
}

// The weights of a warpgroup on their way into shared memory, through all products of all layers (decode_weights.cuh). The group's first thread
// asks for them, with little to do, as the products of all four warps wait for its own.
template <bool kNf4>
struct GroupStream {
  static constexpr int kUnit = kNf4 ? 128 : 64, kBoxBytes = kTall * (kNf4 ? 64 : 128);  // columns of a box

  const CUtensorMap* const maps;
  const DecodeCommon& s;
  const GroupCommon& group;
  unsigned ring, full;  // shared addresses; `depth` barriers more: read by all four warps
  unsigned parity = 0;
  int slot = 0;
  // Of the warp that asks, the same in all lanes: boxes that there is room for, where the next one goes, which one it is, how many follow it in this
  // tile and, behind those, in this product.
  int free, place = 0, at = 0, until = 0, left = 0, product = -1, tile = 0;

  __device__ explicit GroupStream(const GroupStack& stack) : maps(stack.w), s(stack.common), group(stack.group) {}

  __device__ __forceinline__ static bool asks() { return thread_number() % 128 < 32; }
  __device__ __forceinline__ unsigned empty(int of) const { return full + 8 * (group.depth + of); }
  __device__ __forceinline__ unsigned box() const { return ring + slot * kBoxBytes; }

  __device__ __forceinline__ void begin() {
    const int warpgroup = thread_number() / 128;
    ring = s.at.ring[0] + warpgroup * group.depth * kBoxBytes;
    full = s.at.w_arrived + warpgroup * group.depth * 16;
    free = group.depth;
    if (thread_number() % 128 != 0) return;
    for (int i = 0; i < group.depth; ++i) init_barrier(full + 8 * i, 1), init_barrier(empty(i), 4);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }

  // ---- by the warp that asks

  // The next tile's units, or those of the next product up to number `last`. False if there are none.
  __device__ __forceinline__ bool seek(int last) {
    int unit = 0;
    while (left == 0) {
      if (product >= last) return false;
      const DecodeUnits own = group_share(s, ++product % kPhases).of[thread_number() / 128];
      tile = own.tile, left = own.count, unit = own.unit;
    }
    const GroupShare& share = group_share(s, product % kPhases);
    at = share.boxes[tile++] + unit;
    until = min(share.units - unit, left);
    left -= until;
    return true;
  }
  // The next one of the products up to number `last`. False if there is none.
  __device__ __forceinline__ bool ask(int last) {
    if (until == 0 && !seek(last)) return false;
    if (is_elected()) {
      const unsigned barrier = full + 8 * place;
      arrive_with_boxes(barrier, kBoxBytes);
      copy_box(ring + place * kBoxBytes, maps + product % kPhases, at, 0, 0, barrier);
    }
    --free, ++at, --until;
    if (++place == group.depth) place = 0;
    return true;
  }
  __device__ __forceinline__ void fill(int last) {
#pragma unroll 1
    while (free > 0 && ask(last)) {}
  }

  // ---- by all

  __device__ __forceinline__ void wait() const { wait_phase(full + 8 * slot, parity); }
  // The box of `of` is read no more by this warp.
  __device__ __forceinline__ void leave(int of) const {
    __syncwarp();
    if (thread_number() % 32 == 0) arrive(empty(of));
  }
  // Once all warps have left it.
  __device__ __forceinline__ void refill(int of, unsigned of_parity, int last) {
    if (asks()) {
      wait_phase(empty(of), of_parity);
      ++free;
      ask(last);
    }
    __syncwarp();
  }
  __device__ __forceinline__ void next() {
    if (++slot == group.depth) slot = 0, parity ^= 1;
  }
};

// What the parts of a product share.
template <typename T, int N, bool kNf4>
struct GroupPart {
  static constexpr int kUnit = GroupStream<kNf4>::kUnit, kChunks = kNf4 ? 2 : 1;  // columns of a unit, of which 64 are a chunk
  static constexpr int kTileBytes = N * 128;                                       // of x: a chunk

  const DecodeCommon& s;
  const GroupCommon& group;
  int thread, warp, lane, g, t;
  DecodePhase phase;
  int layer_at;
  int from, units;  // of the slice

  __device__ __forceinline__ GroupPart(const DecodeCommon& common, const GroupCommon& group_common) : s(common), group(group_common) {}
  __device__ __forceinline__ void enter(int of_layer, int of_phase) {
    thread = thread_number();
    warp = thread / 32, lane = thread % 32, g = lane / 4, t = lane % 4;
    layer_at = of_layer;
    phase = static_cast<DecodePhase>(of_phase);
    from = share().from, units = share().units;
  }

  __device__ __forceinline__ const DecodeLayer& layer() const { return *reinterpret_cast<const DecodeLayer*>(shared_at(layer_at)); }
  __device__ __forceinline__ const DecodePart& part_at(int part) const { return layer().parts[first_part(phase) + part]; }
  __device__ __forceinline__ GroupShare& share() const { return group_share(s, phase); }
  __device__ __forceinline__ TallTile tile_at(int local) const { return share().tall[local]; }
  __device__ __forceinline__ const void* norm() const { return phase == kQkv ? layer().norms[0] : phase == kGateUp ? layer().norms[1] : nullptr; }
  // What thread block `block` leaves of each row of x: the sum of the squares of its elements.
  __device__ __forceinline__ float* statistics_of(int which, int block) const {
    return group.statistics + (which * static_cast<int64_t>(gridDim.x) + block) * N;
  }
  // [N, z_row] of a part, in 16 bits.
  __device__ __forceinline__ T* z_of(int part) const { return reinterpret_cast<T*>(shared_at(s.at.z)) + part * (N * group.z_row); }
  __device__ __forceinline__ float4* sums_of(const GroupShare& own, int slice) const {
    const GroupCut& cut = group.cut[phase];
    return reinterpret_cast<float4*>(group.sums) + int64_t{own.group * cut.slices + slice} * (kWarpgroups - 1 + cut.most_tall) * (N / 8 * 128);
  }
};

// x's slice and z.
template <typename T, int N, bool kNf4>
struct GroupInput : GroupPart<T, N, kNf4> {
  using Part = GroupPart<T, N, kNf4>;
  using Part::kUnit, Part::kChunks, Part::kTileBytes, Part::s, Part::group, Part::thread, Part::warp, Part::lane, Part::g, Part::t, Part::phase, Part::from, Part::units;
  using Part::layer, Part::part_at, Part::share, Part::tile_at, Part::norm, Part::statistics_of, Part::z_of;
  using Part::Part;

  // Eight neighbours of the norm's weight, for this warp's first chunk of x.
  uint4 norm_weight;
  __device__ __forceinline__ int chunk_column(int chunk) const { return from * kUnit + chunk * 64 + lane % 8 * 8; }

  // Tiles of A that the share's rows of W need: 16 rows of part `part` from `row` on.
  struct ATile {
    int part, row;
  };
  int a_first, a_count;
  __device__ __forceinline__ int rank_tiles(int part) const { return part_at(part).a == nullptr ? 0 : (part_at(part).R + kTileRows - 1) / kTileRows; }
  __device__ __forceinline__ ATile a_tile(int index) const {
    int part = a_first;
    while (index >= rank_tiles(part)) index -= rank_tiles(part++);
    return {part, index * kTileRows};
  }
  // Of 64 columns: pairs of 16 neighbours of rows g and g + 8.
  struct PairsOfA {
    unsigned of[2][8];
  };
  __device__ __forceinline__ int chunks() const { return units * kChunks; }
  __device__ __forceinline__ PairsOfA load_a(ATile tile, int chunk) const {
    PairsOfA to;
    const DecodePart& part = part_at(tile.part);
    const int columns = s.columns[phase], column = from * kUnit + (kNf4 ? chunk / 2 * 128 + 32 * t + chunk % 2 * 16 : chunk * 64 + 16 * t);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const auto* const row = reinterpret_cast<const uint4*>(static_cast<const T*>(part.a) + int64_t{min(tile.row + g + 8 * half, part.R - 1)} * columns + column);
      const uint4 low = __ldg(row), high = __ldg(row + 1);
      to.of[half][0] = low.x, to.of[half][1] = low.y, to.of[half][2] = low.z, to.of[half][3] = low.w;
      to.of[half][4] = high.x, to.of[half][5] = high.y, to.of[half][6] = high.z, to.of[half][7] = high.w;
    }
    return to;
  }

  // What does not depend on x is on its way.
  __device__ __forceinline__ void prefetch() {
    const GroupShare& own = share();
    if (norm() != nullptr) norm_weight = __ldg(reinterpret_cast<const uint4*>(static_cast<const T*>(norm()) + min(chunk_column(warp), s.columns[phase] - 8)));
    a_first = own.tall[0].part;
    a_count = 0;
    const int last_part = max(own.tall[own.tiles - 1].part, own.tall[own.tiles > 1].part);
    for (int part = a_first; part <= last_part; ++part) a_count += rank_tiles(part);
    // A into the second-level cache, for all groups of a slice by some: registers are too few for what comes in between.
    if (own.group % 8 != 0 || lane >= kTileRows) return;
    for (int index = 0; index < a_count; ++index) {
      const ATile tile = a_tile(index);
      const DecodePart& part = part_at(tile.part);
      const T* const row = static_cast<const T*>(part.a) + int64_t{min(tile.row + lane, part.R - 1)} * s.columns[phase] + from * kUnit;
      for (int chunk = warp; chunk < chunks(); chunk += kAllWarps) prefetch_line(row + chunk * 64);
    }
  }

  static constexpr int kThirds = kDecodeThreads / N;  // threads that share a row's sum

  __device__ __forceinline__ static uint4 times(const uint4& raw, const uint4& weight, float offset) {
    Eight<T> v(reinterpret_cast<const T*>(&raw));
    const Eight<T> w(reinterpret_cast<const T*>(&weight));
#pragma unroll
    for (int i = 0; i < 8; ++i) v.v[i] *= offset + w.v[i];
    return v.rounded();
  }

  // The slice of x [M, columns], times the norm's weight, into shared memory; 1 / rms of all rows.
  __device__ __forceinline__ void stage(const void* x) {
    const int columns = s.columns[phase], count = chunks();
    const bool normed = norm() != nullptr;
    float squares = 0;
    if (normed) {
      const float* const from_blocks = statistics_of(phase == kQkv, 0) + thread % N;
#pragma unroll 4
      for (int block = thread / N; block < static_cast<int>(gridDim.x); block += kThirds) squares += __ldcg(from_blocks + block * N);
    }
    float* const parts = reinterpret_cast<float*>(shared_at(s.at.statistics));
    // Four rows of 64 columns at a time; each second time piece p of a row lies at p ^ 4.
    constexpr int kRows = 4, kLoads = N / kRows;
    const int row = lane / 8, piece = lane % 8;
#pragma unroll 1
    for (int chunk = warp; chunk < count; chunk += kAllWarps) {
      const int column = chunk_column(chunk), step = anew(kRows * columns);
      const T* from_row = static_cast<const T*>(x) + row * columns + column;
      uint4 v[kLoads], weight = norm_weight;
#pragma unroll
      for (int k = 0; k < kLoads; ++k, from_row += step) {
        v[k] = row + k * kRows < s.M ? __ldcg(reinterpret_cast<const uint4*>(from_row)) : make_uint4(0, 0, 0, 0);
      }
      if (normed && chunk != warp) weight = __ldg(reinterpret_cast<const uint4*>(static_cast<const T*>(norm()) + column));
      // NF4: pairs 4 (piece % 4) .. of lane 2 (chunk % 2) + piece / 4 of a run.
      const unsigned to = s.at.x + (kNf4 ? (chunk & ~1) + piece % 4 / 2 : chunk) * kTileBytes + row * 128 + (kNf4 ? (chunk % 2 * 2 + piece / 4) * 4 : 0);
      const unsigned place = anew((kNf4 ? piece % 2 * 4 ^ row : piece ^ row) << 4);
#pragma unroll
      for (int k = 0; k < kLoads; ++k) {
        const uint4 own = normed ? times(v[k], weight, s.norm_offset) : v[k];
        const auto at = [&](int of) { return shared_at(static_cast<int>(to + k * kRows * 128 + (place ^ k % 2 * 64 ^ of * 16))); };
        if constexpr (kNf4) {
          *reinterpret_cast<unsigned*>(at(0)) = own.x;
          *reinterpret_cast<unsigned*>(at(1)) = own.y;
          *reinterpret_cast<unsigned*>(at(2)) = own.z;
          *reinterpret_cast<unsigned*>(at(3)) = own.w;
        } else {
          *reinterpret_cast<uint4*>(at(0)) = own;
        }
      }
    }
    if (normed) parts[thread] = squares;
    make_visible();
    __syncthreads();
    if (normed && thread < N) {
      float sum = 0;
#pragma unroll
      for (int i = 0; i < kThirds; ++i) sum += parts[i * N + thread];
      reinterpret_cast<float*>(shared_at(group.rstd))[thread] = rsqrtf(sum / s.columns[phase] + s.eps);
    }
  }

  // sums += A x^T of an item's 16 rows and 64 columns.
  __device__ __forceinline__ void multiply_item(float (&sums)[N / 8][4], const PairsOfA& a, int chunk) const {
    const unsigned x = s.at.x + chunk * kTileBytes;
#pragma unroll
    for (int n = 0; n < N / 8; ++n) {
      const unsigned row = x + (8 * n + g) * 128;
      unsigned b[8];
      if constexpr (kNf4) {
#pragma unroll
        for (int j = 0; j < 8; ++j) asm volatile("ld.shared.u32 %0, [%1];" : "=r"(b[j]) : "r"(row + ((j ^ g) << 4) + 4 * t));
      } else {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const uint4 four = load_shared_4(row + ((2 * t + i ^ g) << 4));
          b[4 * i] = four.x, b[4 * i + 1] = four.y, b[4 * i + 2] = four.z, b[4 * i + 3] = four.w;
        }
      }
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const unsigned of_k[4] = {a.of[0][2 * k], a.of[1][2 * k], a.of[0][2 * k + 1], a.of[1][2 * k + 1]};
        multiply(sums[n], of_k, b[2 * k], b[2 * k + 1], T{});
      }
    }
  }
  // The warps' sums meet, some at a time, and are z of 16 rows of A.
  __device__ __forceinline__ void meet_z(const float (&sums)[N / 8][4], ATile tile) const {
    constexpr int kRow = kZSumRow<N>, kSlot = kTileRows * kRow;
    const int z_slots = group.cut[phase].z_slots;
    float* const slots = reinterpret_cast<float*>(shared_at(group.cut[phase].z_sums));
#pragma unroll 1
    for (int first = 0; first < kAllWarps; first += z_slots) {
      if (warp >= first && warp < first + z_slots) {
        float* const own = slots + (warp - first) * kSlot + g * kRow + 2 * t;
#pragma unroll
        for (int n = 0; n < N / 8; ++n) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            float2* const to = reinterpret_cast<float2*>(own + 8 * half * kRow + 8 * n);
            float2 sum = make_float2(sums[n][2 * half], sums[n][2 * half + 1]);
            if (first > 0) sum.x += to->x, sum.y += to->y;
            *to = sum;
          }
        }
      }
      __syncthreads();
    }
    if (thread < kTileRows * N) {
      const int j = thread % kTileRows, n = thread / kTileRows;
      float sum = 0;
#pragma unroll 4
      for (int slot = 0; slot < z_slots; ++slot) sum += slots[slot * kSlot + j * kRow + n];
      z_of(tile.part)[n * group.z_row + tile.row + j] = from_float<T>(part_at(tile.part).scale * sum);
    }
    __syncthreads();
  }
  __device__ __forceinline__ void multiply_by_a() {
    if (a_count == 0) return;
#pragma unroll 1
    for (int index = 0; index < a_count; ++index) {
      const ATile tile = a_tile(index);
      float sums[N / 8][4] = {};
#pragma unroll 1
      for (int chunk = warp; chunk < chunks(); chunk += kAllWarps) multiply_item(sums, load_a(tile, chunk), chunk);
      meet_z(sums, tile);
    }
  }
};

// Tiles of W times x's slice.
template <typename T, int N, bool kNf4>
struct GroupProducts : GroupPart<T, N, kNf4> {
  using Part = GroupPart<T, N, kNf4>;
  using Part::kTileBytes, Part::s, Part::group, Part::thread, Part::warp, Part::lane, Part::g, Part::t, Part::phase, Part::from, Part::units;
  using Part::part_at, Part::share, Part::tile_at, Part::z_of, Part::sums_of;

  GroupStream<kNf4> stream;
  int last_product;  // by number: weights up to its are asked for

  __device__ __forceinline__ explicit GroupProducts(const GroupStack& stack) : Part(stack.common, stack.group), stream(stack) {}

  // Whether this thread block has a share of attention, for which the rings must be empty.
  __device__ __forceinline__ bool attends() const { return static_cast<int>(blockIdx.x) < s.M * s.K * s.runs; }

  // The shares of all four products, once.
  __device__ __forceinline__ void make_shares() const {
    const int block = static_cast<int>(blockIdx.x), own_thread = thread_number();
#pragma unroll 1
    for (int of = 0; of < kPhases; ++of) {
      const GroupCut& cut = group.cut[of];
      GroupShare& own = group_share(s, of);
      const bool pairs = of == kGateUp, some = block < cut.groups * cut.slices;
      const int number = block / cut.slices, slice = block % cut.slices;
      const int first = number * cut.tiles / cut.groups, tiles = some ? (number + 1) * cut.tiles / cut.groups - first << pairs : 0;
      const auto begin_of = [&](int i) { return i * cut.units / cut.slices; };
      const int units_here = begin_of(slice + 1) - begin_of(slice), all = tiles * units_here;
      if (own_thread == 0) {
        own.group = number, own.slice = slice, own.tiles = tiles;
        own.from = begin_of(slice), own.units = units_here;
      }
      if (own_thread < kWarpgroups) {
        const int begin = own_thread * all / kWarpgroups;
        own.of[own_thread] = {begin / units_here, begin % units_here, (own_thread + 1) * all / kWarpgroups - begin};
      }
      if (own_thread < tiles) {
        // The first layer's parts have as many rows as the others'.
        const auto& parts = reinterpret_cast<const DecodeLayer*>(shared_at(s.at.layers))->parts;
        const int out = (first + (own_thread >> pairs)) * kTall + (pairs && own_thread % 2 == 1 ? s.F : 0);
        int part = first_part(of), row = out;
        while (row >= parts[part].rows) row -= parts[part++].rows;
        own.tall[own_thread] = {static_cast<short>(part - first_part(of)), static_cast<short>(row / kTall), static_cast<short>(out / kTall), 0};
      }
      if (own_thread < tiles * cut.slices) {
        const int local = own_thread / cut.slices, of_slice = own_thread % cut.slices;
        const int of_tile = begin_of(of_slice + 1) - begin_of(of_slice), sum = tiles * of_tile;
        const int begin = ((local * of_tile + 1) * kWarpgroups - 1) / sum, end = ((local + 1) * of_tile * kWarpgroups - 1) / sum;
        own.sums[own_thread] = static_cast<unsigned short>(begin + local << 3 | end - begin + 1);
      }
    }
    __syncthreads();
    if (s.layers > 0) put_boxes(0), put_boxes(1);
  }
  // Where the boxes of a product begin, by number.
  __device__ __forceinline__ void put_boxes(int number) const {
    if (number >= kPhases * s.layers) return;
    const int of = number % kPhases, own_thread = thread_number();
    GroupShare& own = group_share(s, of);
    if (own_thread >= own.tiles) return;
    const auto& of_layer = *reinterpret_cast<const DecodeLayer*>(shared_at(s.at.layers + number / kPhases % 2 * static_cast<int>(sizeof(DecodeLayer))));
    const TallTile tile = own.tall[own_thread];
    own.boxes[own_thread] = of_layer.parts[first_part(of) + tile.part].w + tile.row * kTall * s.row_steps[of] + own.from;
  }

  // NF4: codes of the scales of four units of a tile, and the scales of these: this lane has unit t's of rows g and g + 8.
  struct RawScales {
    unsigned codes[2];
    float nested[2], offset;
  };
  RawScales raw;
  __device__ __forceinline__ void load_scales(int local, int first) {
    const TallTile tile = tile_at(min(local, max(share().tiles - 1, 0)));
    const DecodePart& part = part_at(tile.part);
    const int blocks = s.columns[phase] / kBlock, unit = from + min(first + t, units - 1);
    raw.offset = part.nested_offset;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t block = int64_t{tile.row * kTall + warp % 4 * 16 + g + 8 * half} * blocks + 2 * unit;
      raw.codes[half] = __ldg(reinterpret_cast<const unsigned short*>(static_cast<const uint8_t*>(part.absmax) + block));
      raw.nested[half] = __ldg(part.nested + (block >> s.nested_shift));
    }
  }
  // In 16 bits, two blocks of a unit.
  __device__ __forceinline__ void convert_scales(unsigned (&to)[2]) const {
    const float* const map = reinterpret_cast<const float*>(shared_at(s.at.map)) + g;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const auto of = [&](int i) { return __fadd_rn(__fmul_rn(map[(raw.codes[half] >> 8 * i & 255) * kMapCopies], raw.nested[half]), raw.offset); };
      to[half] = pack(of(0), of(1), T{});
    }
  }

  // Weights that do not depend on anything are on their way.
  __device__ __forceinline__ void prepare(int of_layer, int number) {
    this->enter(of_layer, number % kPhases);
    last_product = min(number + (phase != kQkv || !attends()), kPhases * s.layers - 1);
    if (stream.asks()) stream.fill(last_product);
    put_boxes(number + 2);
  }

  // B's pairs of rows g and g + 8 of the warp's 16, ranks from 16 i on.
  __device__ __forceinline__ void load_b(unsigned (&to)[4], const DecodePart& part, int row, int i) const {
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const int j = kTileRows * i + k / 2 * 8 + 2 * t;
      const int64_t at = int64_t{row + k % 2 * 8} * part.R + j;
      to[k] = 0;
      if (j >= part.R) continue;
      to[k] = __ldg(reinterpret_cast<const unsigned*>(static_cast<const T*>(part.b) + at));
    }
  }

  // ---- the products

  __device__ __forceinline__ void multiply_nf4(float (&acc)[N / 2], int local, int unit, int count) {
    const unsigned table = s.at.table + lane * 4, of_block = t < 2 ? 0x1010 : 0x3232;
    const unsigned own = warp % 4 * 1024 + lane * 16;
    unsigned a[2][4][2];  // of a quarter of a run, by turns: its pairs of the rows above and below
    unsigned scales[2];
    bool fresh = true;
#pragma unroll 1
    for (; count > 0; --count, ++unit) {
      if (fresh || unit % 4 == 0) {
        convert_scales(scales);
        const int behind = (unit & ~3) + 4;
        behind < units ? load_scales(local, behind) : load_scales(local + 1, 0);
        fresh = false;
      }
      const int lane_of_scale = lane & 28 | unit & 3;
      const unsigned above_scale = __byte_perm(__shfl_sync(0xffffffff, scales[0], lane_of_scale), 0, of_block);
      const unsigned under_scale = __byte_perm(__shfl_sync(0xffffffff, scales[1], lane_of_scale), 0, of_block);
      stream.wait();
      const unsigned box = stream.box() + own;
      const uint4 above = load_shared_4(box), under = load_shared_4(box + 512);
      asm volatile("" ::"r"(above.x), "r"(under.x) : "memory");
      const int slot = stream.slot;
      const unsigned parity = stream.parity;
      stream.leave(slot);
      stream.next();
      const uint64_t x = uniform_matrix(s.at.x + unit * 2 * kTileBytes);
#pragma unroll
      for (int quarter = 0; quarter < 4; ++quarter) {
        unsigned(&pairs)[4][2] = a[quarter % 2];
        // The products that read these registers are done.
        wait_products<1>();
        if (quarter == 2) stream.refill(slot, parity, last_product);
        const unsigned up_bytes = quarter == 0 ? above.x : quarter == 1 ? above.y : quarter == 2 ? above.z : above.w;
        const unsigned down_bytes = quarter == 0 ? under.x : quarter == 1 ? under.y : quarter == 2 ? under.z : under.w;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          unsigned up, down;
          asm volatile("ld.shared.u32 %0, [%1];" : "=r"(up) : "r"(table + __byte_perm(up_bytes, 0, 0x4440 + j) * 128));
          asm volatile("ld.shared.u32 %0, [%1];" : "=r"(down) : "r"(table + __byte_perm(down_bytes, 0, 0x4440 + j) * 128));
          pairs[j][0] = scale_pair(up, above_scale, T{});
          pairs[j][1] = scale_pair(down, under_scale, T{});
        }
        begin_products();
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          const unsigned of_k[4] = {pairs[2 * k][0], pairs[2 * k][1], pairs[2 * k + 1][0], pairs[2 * k + 1][1]};
          wgmma(acc, of_k, x + quarter / 2 * (kTileBytes >> 4) + 2 * (quarter % 2 * 2 + k), T{});
        }
        commit_products();
      }
    }
    wait_products<0>();
  }

  __device__ __forceinline__ void multiply_dense(float (&acc)[N / 2], int unit, int count) {
    int before = -1;
    unsigned before_parity = 0;
#pragma unroll 1
    for (; count > 0; --count, ++unit) {
      const uint64_t w = uniform_matrix(stream.box()), x = uniform_matrix(s.at.x + unit * kTileBytes);
      stream.wait();
      begin_products();
#pragma unroll
      for (int k = 0; k < 4; ++k) wgmma(acc, w + 2 * k, x + 2 * k, T{});
      commit_products();
      wait_products<1>();
      if (before >= 0) {
        stream.leave(before);
        stream.refill(before, before_parity, last_product);
      }
      before = stream.slot, before_parity = stream.parity;
      stream.next();
    }
    wait_products<0>();
    if (before >= 0) {
      stream.leave(before);
      stream.refill(before, before_parity, last_product);
    }
  }

  // This warpgroup's tiles.
  __device__ __forceinline__ void run() {
    const GroupShare& own = share();
    const DecodeUnits mine = own.of[warp / 4];
    if (mine.count == 0) return;
    if constexpr (kNf4) load_scales(mine.tile, mine.unit & ~3);
    int local = mine.tile, unit = mine.unit;
    const int eights = (s.M + 7) / 8;
#pragma unroll 1
    for (int left = mine.count; left > 0;) {
      const int here = min(left, units - unit);
      const TallTile tile = tile_at(local);
      const int row = tile.row * kTall + warp % 4 * 16 + g;
      // Once for each tile of a slice.
      const bool adds = unit == 0 && part_at(tile.part).a != nullptr;
      unsigned b[4] = {};
      if (adds) load_b(b, part_at(tile.part), row, 0);
      float acc[N / 2] = {};
      if constexpr (kNf4) {
        multiply_nf4(acc, local, unit, here);
      } else {
        multiply_dense(acc, unit, here);
      }
      if (adds) {
        const DecodePart& part = part_at(tile.part);
        const unsigned z = shared_address(z_of(tile.part)) + g * group.z_row * 2 + t * 4;
        for (int i = 0; i * kTileRows < part.R; ++i) {
          if (i > 0) load_b(b, part, row, i);
#pragma unroll
          for (int n = 0; n < N / 8; ++n) {
            unsigned low, high;
            asm volatile("ld.shared.u32 %0, [%1];" : "=r"(low) : "r"(z + (8 * n * group.z_row + kTileRows * i) * 2));
            asm volatile("ld.shared.u32 %0, [%1];" : "=r"(high) : "r"(z + (8 * n * group.z_row + kTileRows * i + 8) * 2));
            float four[4] = {acc[4 * n], acc[4 * n + 1], acc[4 * n + 2], acc[4 * n + 3]};
            multiply(four, b, low, high, T{});
            acc[4 * n] = four[0], acc[4 * n + 1] = four[1], acc[4 * n + 2] = four[2], acc[4 * n + 3] = four[3];
          }
        }
      }
      float4* const to = sums_of(own, own.slice) + (warp / 4 + local) * (N / 8 * 128) + thread % 128;
#pragma unroll
      for (int n = 0; n < N / 8; ++n) {
        if (n < eights) __stcg(to + n * 128, make_float4(acc[4 * n], acc[4 * n + 1], acc[4 * n + 2], acc[4 * n + 3]));
      }
      left -= here, unit = 0, ++local;
    }
  }
};

// Sums of slices.
template <typename T, int N, bool kNf4>
struct GroupOutput : GroupPart<T, N, kNf4> {
  using Part = GroupPart<T, N, kNf4>;
  using Part::s, Part::group, Part::thread, Part::warp, Part::lane, Part::g, Part::t, Part::phase;
  using Part::layer, Part::share, Part::tile_at, Part::norm, Part::statistics_of, Part::sums_of;
  using Part::Part;

  // All slices of the group have left theirs: for the time that this product comes.
  __device__ __forceinline__ void meet(int time) const {
    const GroupShare& own = share();
    const int slices = group.cut[phase].slices;
    __syncthreads();
    if (slices == 1 || own.tiles == 0) return;
    int* const met = group.met + phase * kMostGroups + own.group;
    if (thread == 0) add_release(met, 1);
    if (thread == kPoller) {
      while (load_acquire(met) < slices * time) {}
    }
    __syncthreads();
  }

  // Columns 8 n + 2 t and the next of rows g and g + 8 of 16 rows of tiles from `local` on: (row g: x, y; row g + 8: z, w). Two warpgroups at
  // most share a tile that is not alone.
  template <int kTiles>
  __device__ __forceinline__ void add_slices(float4 (&total)[kTiles], int local, int n, int strip) const {
    const GroupShare& own = share();
    const GroupCut& cut = group.cut[phase];
    constexpr int kSums = N / 8 * 128, kAtOnce = 8 / kTiles;
    const int64_t of_slice = int64_t{kWarpgroups - 1 + cut.most_tall} * kSums;
    const float4* const first = sums_of(own, 0) + n * 128 + strip * 32 + lane;
#pragma unroll
    for (int i = 0; i < kTiles; ++i) total[i] = make_float4(0, 0, 0, 0);
#pragma unroll 1
    for (int begin = 0; begin < cut.slices; begin += kAtOnce) {
      float4 v[kTiles][kAtOnce][2];
#pragma unroll
      for (int i = 0; i < kTiles; ++i) {
#pragma unroll
        for (int k = 0; k < kAtOnce; ++k) {
          const int slice = begin + k, entry = slice < cut.slices ? own.sums[(local + i) * cut.slices + slice] : 0;
          const float4* const at = first + slice * of_slice + (entry >> 3) * kSums;
          v[i][k][0] = (entry & 7) > 0 ? __ldcg(at) : make_float4(0, 0, 0, 0);
          v[i][k][1] = (entry & 7) > 1 ? __ldcg(at + kSums) : make_float4(0, 0, 0, 0);
        }
      }
#pragma unroll
      for (int i = 0; i < kTiles; ++i) {
#pragma unroll
        for (int k = 0; k < kAtOnce; ++k) {
#pragma unroll
          for (int j = 0; j < 2; ++j) total[i].x += v[i][k][j].x, total[i].y += v[i][k][j].y, total[i].z += v[i][k][j].z, total[i].w += v[i][k][j].w;
        }
      }
    }
  }

  __device__ __forceinline__ float activated(float x) const {
    switch (s.activation) {
      case KERNEL_SILU:
        return x / (1 + expf(-x));
      case KERNEL_GELU_TANH:
        return 0.5f * x * (1 + tanhf(0.7978845608028654f * (x + 0.044715f * x * x * x)));
    }
    return 0.5f * x * (1 + erff(x * 0.7071067811865476f));
  }

  // to [M, width] = the product, plus `residual` of the same shape unless it is null; of gate and up their activation. Of what a norm comes
  // behind, the sums of squares.
  __device__ __forceinline__ void finish(void* to, const void* residual) const {
    const GroupShare& own = share();
    const GroupCut& cut = group.cut[phase];
    const bool pairs = phase == kGateUp, normed = norm() != nullptr, before_norm = phase == kO || phase == kDown;
    const int width = phase == kQkv ? (s.H + 2 * s.K) * s.D : pairs ? s.F : s.C, eights = (s.M + 7) / 8;
    float* const squares = reinterpret_cast<float*>(shared_at(group.squares));
    if (before_norm && lane < N) squares[warp * N + lane] = 0;
    __syncwarp();
    const float* const rstd = reinterpret_cast<const float*>(shared_at(group.rstd));
    const T* const bias = static_cast<const T*>(layer().bias[phase]);
    const int all = (own.tiles >> pairs) * eights * 4, last = (own.slice + 1) * all / cut.slices;
#pragma unroll 1
    for (int piece = own.slice * all / cut.slices + warp; piece < last; piece += kAllWarps) {
      const int strip = piece % 4, n = piece / 4 % eights, local = piece / (4 * eights) << pairs, column = 8 * n + 2 * t;
      const int out = tile_at(local).out * kTall + strip * 16 + g;
      float before[4] = {};
      if (residual != nullptr) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          if (column + i % 2 < s.M) before[i] = to_float(__ldcg(static_cast<const T*>(residual) + int64_t{column + i % 2} * width + out + i / 2 * 8));
        }
      }
      float4 sums[2] = {};
      if (pairs) {
        add_slices<2>(sums, local, n, strip);
      } else {
        add_slices<1>(reinterpret_cast<float4(&)[1]>(sums), local, n, strip);
      }
      float v[4] = {sums[0].x, sums[0].y, sums[0].z, sums[0].w};
      const float up[4] = {sums[1].x, sums[1].y, sums[1].z, sums[1].w};
      float of_column[2] = {};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float factor = normed ? rstd[column + i % 2] : 1;
        v[i] = v[i] * factor + before[i];
        if (bias != nullptr) v[i] += to_float(bias[out + i / 2 * 8]);
        if (pairs) {
          // Rounded as what stands in memory elsewhere.
          const float above = up[i] * factor + (bias == nullptr ? 0 : to_float(bias[s.F + out + i / 2 * 8]));
          v[i] = activated(to_float(from_float<T>(v[i]))) * to_float(from_float<T>(above));
        }
        const T rounded = from_float<T>(v[i]);
        if (column + i % 2 >= s.M) continue;
        static_cast<T*>(to)[int64_t{column + i % 2} * width + out + i / 2 * 8] = rounded;
        of_column[i % 2] += to_float(rounded) * to_float(rounded);
      }
      if (!before_norm) continue;
#pragma unroll
      for (int step = 4; step < 32; step *= 2) {
        of_column[0] += __shfl_xor_sync(0xffffffff, of_column[0], step);
        of_column[1] += __shfl_xor_sync(0xffffffff, of_column[1], step);
      }
      if (g == 0) squares[warp * N + column] += of_column[0], squares[warp * N + column + 1] += of_column[1];
      __syncwarp();
    }
    if (!before_norm) return;
    __syncthreads();
    if (thread < N) {
      float sum = 0;
#pragma unroll
      for (int w = 0; w < kAllWarps; ++w) sum += squares[w * N + thread];
      __stcg(statistics_of(phase == kDown, static_cast<int>(blockIdx.x)) + thread, sum);
    }
  }
};

#endif

}  // namespace
}  // namespace ferrotune
