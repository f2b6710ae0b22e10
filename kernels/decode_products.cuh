// defines: Products: the four products of a layer by one thread block among all, with what stands before and behind each.
//
// Of a product a thread block has a run of tiles of 16 rows, of gate and up tile by tile the same rows of both, and its fifteen warps
// share the units of these tiles: 64 columns of 16-bit weights, 256 of NF4, whose products are those of rows_strips.cuh. Sums meet once, in
// shared memory. One warp more computes this block's piece of x A^T and waits for those of the others.
#pragma once

#include "decode.cuh"
#include "rows_strips.cuh"

namespace ferrotune {
namespace {

// Where not `any`, what was there.
__device__ __forceinline__ void load_once(const char* from, bool any, uint4& to) {
  asm volatile(
      "{ .reg .pred p; setp.ne.s32 p, %5, 0;\n"
      "@p ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4]; }"
      : "+r"(to.x), "+r"(to.y), "+r"(to.z), "+r"(to.w)
      : "l"(from), "r"(static_cast<int>(any)));
}

template <typename T, int MP, bool kNf4>
struct Products {
  using Use = ColumnUse<MP>;
  static constexpr int kDepth = kNf4 ? 2 : 4, kUnit = kNf4 ? 256 : 64, kSlot = MP * kSumStride, kZ = kMostRank + 4;
  // Of the first kDepth units of a warp this many are asked for before the wait for x, and with these so many before x is looked at. Memory is idle
  // meanwhile, but a warp whose loads wait for their turn does nothing else.
  static constexpr int kEarly = kNf4 ? 0 : 2, kBehindX = kNf4 ? 1 : kDepth;
  static constexpr int kPairBytes = Use::kWide ? 256 : 128;

  const DecodeCommon& s;
  int thread, warp, lane, g, t;

  // The product.
  DecodePhase phase;
  int layer_at;  // where shared memory has the layer
  int columns, units, count;
  int first_tile, first_unit, left;  // of this warp
  unsigned x_parity = 0;
  float first_added;

  __device__ explicit Products(const DecodeCommon& common) : s(common) {}

  // Whatever could be read again is: registers are few, and what does not fit them lies in memory behind a cache that every wait empties.
  __device__ __forceinline__ const DecodeLayer& layer() const { return *reinterpret_cast<const DecodeLayer*>(shared_at(layer_at)); }
  __device__ __forceinline__ const DecodePart& part_at(int part) const { return layer().parts[first_part(phase) + part]; }
  __device__ __forceinline__ DecodeShare& share(int of_phase) const { return reinterpret_cast<DecodeShare*>(shared_at(s.at.shares))[of_phase]; }
  __device__ __forceinline__ const DecodeTile& tile_at(int local) const { return share(phase).tiles[local]; }
  __device__ __forceinline__ int x_shared_row(int column) const { return s.at.x[phase] + min(column, s.M - 1) * (columns * 2 + 16); }
  __device__ __forceinline__ const char* x_memory_row(int column) const {
    return static_cast<const char*>(s.product) + min(column, s.M - 1) * int64_t{columns} * 2;
  }

  // Where the weights of this warp's next unit are. The units under way are an array of their own: beside it these would be in memory, too.
  struct Source {
    const char* at;
    int tile, unit, below;
  };
  __device__ __forceinline__ void seek(Source& source) const {
    const DecodeTile& tile = tile_at(max(min(source.tile, count - 1), 0));
    const DecodePart& part = part_at(tile.part);
    source.below = 8 * part.row_bytes;
    source.at = part.w + int64_t{tile.row + g} * part.row_bytes + source.unit * 128 + t * (kNf4 ? 16 : 32);
  }
  // A unit has 128 bytes of each row.
  template <typename Load>
  __device__ __forceinline__ static void load(const Source& source, uint4 (&to)[4], Load&& put) {
    constexpr int kNext = kNf4 ? 64 : 16;
    put(source.at, to[0]);
    put(source.at + kNext, to[1]);
    put(source.at + source.below, to[2]);
    put(source.at + source.below + kNext, to[3]);
  }
  // The next unit, of `ahead` that are still to be fetched.
  __device__ __forceinline__ void fetch(Source& source, uint4 (&to)[4], int ahead) const {
    if (ahead <= 0) return;
    load(source, to, [](const char* at, uint4& own) { own = load_once(reinterpret_cast<const uint4*>(at)); });
    source.at += 128;
    if (++source.unit == units) {
      source.unit = 0;
      ++source.tile;
      if (ahead > 1) seek(source);
    }
  }
  // Without a branch between the loads, at which they would be waited for. Registers that may hold what they held before would have to
  // hold it everywhere.
  __device__ __forceinline__ static void clear(uint4 (&ring)[kDepth][4]) {
#pragma unroll
    for (int i = 0; i < 4 * kDepth; ++i) ring[i / 4][i % 4] = make_uint4(0, 0, 0, 0);
  }
  // Units `from` up to `to` of the first kDepth; where the next one is.
  __device__ __forceinline__ Source start(uint4 (&ring)[kDepth][4], int from, int to) const {
    Source source{nullptr, first_tile, first_unit, 0};
    const auto next = [&](uint4 (&own_unit)[4], int number) {
      seek(source);
      const bool any = left > number && number >= from && number < to;
      load(source, own_unit, [&](const char* at, uint4& own) { load_once(at, any, own); });
      const bool over = ++source.unit == units;
      source.unit = over ? 0 : source.unit;
      source.tile += over;
    };
    // Written out: the compiler leaves a loop of this a loop until it is too late for registers.
    next(ring[0], 0);
    next(ring[1], 1);
    if constexpr (kDepth == 4) {
      next(ring[2], 2);
      next(ring[3], 3);
    }
    seek(source);
    return source;
  }

  // The shares of all four products, once.
  __device__ __forceinline__ void make_shares(int first_layer) {
    layer_at = first_layer;
    const int grid = static_cast<int>(gridDim.x), block = static_cast<int>(blockIdx.x), own_thread = thread_number();
    for (int of = 0; of < kPhases; ++of) {
      phase = static_cast<DecodePhase>(of);
      const bool pairs = phase == kGateUp;
      const int rows = phase == kQkv ? (s.H + 2 * s.K) * s.D : pairs ? s.F : s.C, all_tiles = rows / kTileRows;
      const int first = block * all_tiles / grid, last = (block + 1) * all_tiles / grid, tiles = last - first << pairs;
      const int of_tile = s.columns[of] / kUnit, all = tiles * of_tile, blocks = s.columns[of] / kBlock;
      DecodeShare& own = share(of);
      if (own_thread == 0) own.count = tiles;
      // Where there is none, something that an address may be made from.
      if (own_thread == 0 && tiles == 0) own.tiles[0] = DecodeTile{};
      if (own_thread == 0 && block < s.a_pieces[of]) {
        // A tile of 16 rows has as many pieces as there are blocks for.
        const int a_tile = block / s.pieces[of], piece = block % s.pieces[of], units_of_row = s.columns[of] / kBlock;
        int part = 0, row = a_tile * kTileRows;
        for (;; ++part) {
          const DecodePart& at = part_at(part);
          const int rows_of_part = at.a == nullptr ? 0 : (at.R + kTileRows - 1) / kTileRows * kTileRows;
          if (row < rows_of_part) break;
          row -= rows_of_part;
        }
        const int unit = piece * units_of_row / s.pieces[of];
        own.piece = {part, row, a_tile, unit, (piece + 1) * units_of_row / s.pieces[of] - unit};
      }
      if (own_thread < kDecodeWarps) {
        const int begin = own_thread * all / kDecodeWarps;
        own.units[own_thread] = {begin / of_tile, begin % of_tile, (own_thread + 1) * all / kDecodeWarps - begin};
      }
      if (own_thread < tiles) {
        const int local = own_thread;
        int row = (first + (local >> pairs)) * kTileRows + (pairs && local % 2 == 1 ? s.F : 0), part = 0;
        const int out = row;
        while (row >= part_at(part).rows) row -= part_at(part++).rows;
        const int begin = ((local * of_tile + 1) * kDecodeWarps - 1) / all, end = ((local + 1) * of_tile * kDecodeWarps - 1) / all;
        own.tiles[local] = {part, row, out, row * blocks & ((1 << s.nested_shift) - 1), begin + local, end - begin + 1};
      }
    }
    __syncthreads();
  }

  // Whatever does not depend on the product's input: weights and scales on their way. Nobody uses shared memory but for the shares.
  __device__ __forceinline__ void prepare(int of_layer, DecodePhase which) {
    thread = thread_number();
    warp = thread / 32, lane = thread % 32, g = lane / 4, t = lane % 4;
    layer_at = of_layer;
    phase = which;
    columns = s.columns[phase];
    units = columns / kUnit;
    count = share(phase).count;
    const DecodeUnits own = warp < kDecodeWarps ? share(phase).units[warp] : DecodeUnits{};
    first_tile = own.tile, first_unit = own.unit, left = own.count;
    if (count * units < kDecodeWarps) {
      float* const slots = reinterpret_cast<float*>(shared_at(s.at.slots));
      for (int i = thread; i < (kDecodeWarps + count) * kSlot; i += kDecodeThreads) slots[i] = 0;
    }
    if (warp == kDecodeWarps - 1) fetch_a();
    for (int local = warp; warp < kDecodeWarps && local < count; local += kDecodeWarps) fetch_tile(local);
    const void* const norm = phase == kQkv ? layer().norms[0] : phase == kGateUp ? layer().norms[1] : nullptr;
    if (norm != nullptr) {
      for (int i = thread; warp < kDecodeWarps && i < columns / 8; i += 32 * kDecodeWarps) {
        copy_16_bytes(shared_address(shared_at(s.at.norm[phase] + 16 * i)), static_cast<const uint4*>(norm) + i, true);
      }
    }
    commit_copies();
  }
  __device__ __forceinline__ unsigned long long* z_sums(int of_phase) const {
    return s.z + of_phase % 2 * (kMostATiles * kEight * kTileRows);
  }

  // Starts the copies of a tile's scales and of its rows of B.
  __device__ __forceinline__ void fetch_tile(int local) const {
    const DecodeTile& tile = tile_at(local);
    const DecodePart& part = part_at(tile.part);
    if constexpr (kNf4) {
      const int blocks = columns / kBlock, piece = blocks % 16 == 0 ? 16 : 4, stride = absmax_stride();
      const auto* const absmax = static_cast<const uint8_t*>(part.absmax) + int64_t{tile.row} * blocks;
      const unsigned to = shared_address(shared_at(s.at.absmax + local * kTileRows * stride));
      // Two lanes a row.
      for (int i = lane % 2 * piece; i < blocks; i += 2 * piece) {
        const int row = lane / 2;
        piece == 16 ? copy_16_bytes(to + row * stride + i, absmax + row * blocks + i, true) : copy_4_bytes(to + row * stride + i, absmax + row * blocks + i);
      }
      if (lane <= tile.nested_before + kTileRows * blocks - 1 >> s.nested_shift) {
        const int64_t first = int64_t{tile.row} * blocks >> s.nested_shift;
        copy_4_bytes(shared_address(shared_at(s.at.nested + 4 * (local * kNestedOfTile + lane))), part.nested + first + lane);
      }
    }
    if (part.b != nullptr && s.b_shared[phase]) {
      const int row_bytes = part.R * (s.lora_f32 ? 4 : 2), row = lane / 2;
      const char* const b = static_cast<const char*>(part.b) + int64_t{tile.row + row} * row_bytes;
      const unsigned to = shared_address(shared_at(s.at.b + (local * kTileRows + row) * s.b_most));
      for (int i = lane % 2 * 16; i < row_bytes; i += 32) copy_16_bytes(to + i, b + i, true);
    }
  }
  __device__ __forceinline__ int absmax_stride() const {
    // Words lie so that eight rows are in different banks.
    const int words = columns / kBlock / 4;
    return (words + (12 - words % 8) % 8) * 4;
  }
  // x on its way into shared memory, by one thread. All thread blocks are done with the product before.
  __device__ __forceinline__ void fetch_x(const void* from) const {
    if (!s.x_shared[phase]) return;
    const unsigned arrived = shared_address(shared_at(s.at.x_arrived)), bytes = columns * 2;
    // What others wrote to memory, and read of this block's, comes before copies that are not theirs.
    asm volatile("fence.proxy.async;" ::: "memory");
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(arrived), "r"(s.M * bytes) : "memory");
    for (int c = 0; c < s.M; ++c) {
      asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(shared_address(x_vector(c, 0))),
                   "l"(static_cast<const char*>(from) + int64_t{c} * bytes), "r"(bytes), "r"(arrived)
                   : "memory");
    }
  }
  __device__ __forceinline__ void wait_x() {
    if (!s.x_shared[phase]) return;
    const unsigned arrived = shared_address(shared_at(s.at.x_arrived));
    unsigned done = 0;
    while (done == 0) {
      asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
                   : "=r"(done)
                   : "r"(arrived), "r"(x_parity)
                   : "memory");
    }
    x_parity ^= 1;
  }
  __device__ __forceinline__ uint4* x_vector(int c, int i) const {
    return reinterpret_cast<uint4*>(shared_at(s.at.x[phase] + c * (columns * 2 + 16) + 16 * i));
  }
  // There it is: as it was, or divided by its rows' root mean squares.
  __device__ __forceinline__ void stage() {
    // The next product's sums begin at zero.
    for (int i = blockIdx.x * kDecodeThreads + thread; i < kMostATiles * kEight * kTileRows; i += gridDim.x * kDecodeThreads) {
      z_sums(phase + 1)[i] = 0;
    }
    wait_x();
    if (phase == kO || phase == kDown) return;
    const int vectors = columns / 8;
    float* const statistics = reinterpret_cast<float*>(shared_at(s.at.statistics));
    // Short rows are shared by twice as many threads, each with half of the rows: from `first` on.
    constexpr int kHalf = MP > 1 ? MP / 2 : 1;
    const bool halves = MP > 1 && 2 * vectors <= kDecodeThreads, second = halves && thread >= vectors;
    const int first = second ? kHalf : 0, place = second ? thread - vectors : thread;
    const auto sum_rows = [&](int from) {
      float sums[kHalf] = {};
      for (int i = place; i < vectors; i += kDecodeThreads) {
        uint4 raw[kHalf];
#pragma unroll
        for (int c = 0; c < kHalf; ++c) raw[c] = *x_vector(min(from + c, s.M - 1), i);
#pragma unroll
        for (int c = 0; c < kHalf; ++c) {
          const Eight<T> v(reinterpret_cast<const T*>(&raw[c]));
#pragma unroll
          for (int k = 0; k < 8; ++k) sums[c] += v.v[k] * v.v[k];
        }
      }
#pragma unroll
      for (int c = 0; c < kHalf; ++c) {
#pragma unroll
        for (int step = 16; step > 0; step /= 2) sums[c] += __shfl_xor_sync(0xffffffff, sums[c], step);
        if (lane == 0) statistics[(from + c) * 16 + warp] = sums[c];
      }
    };
    sum_rows(first);
    if (!halves && MP > 1) sum_rows(kHalf);
    if (halves && lane < kHalf) statistics[(kHalf - first + lane) * 16 + warp] = 0;
    __syncthreads();
    // Every warp for itself: of column lane / 4 in these lanes.
    const float4 four = reinterpret_cast<const float4*>(statistics)[min(lane, 4 * s.M - 1)];
    float of_column = four.x + four.y + (four.z + four.w);
    of_column += __shfl_xor_sync(0xffffffff, of_column, 1);
    of_column += __shfl_xor_sync(0xffffffff, of_column, 2);
    of_column = rsqrtf(of_column / columns + s.eps);
    const int turns = (vectors + kDecodeThreads - 1) / kDecodeThreads, last = halves ? min(s.M, first + kHalf) : s.M;
    for (int turn = 0; turn < turns; ++turn) {
      const int own = turn * kDecodeThreads + place, i = min(own, vectors - 1);
      const Eight<T> w(reinterpret_cast<const T*>(shared_at(s.at.norm[phase] + 16 * i)));
#pragma unroll 4
      for (int c = first; c < last; ++c) {
        const float rstd = __shfl_sync(0xffffffff, of_column, 4 * c);
        Eight<T> v(reinterpret_cast<const T*>(x_vector(c, i)));
#pragma unroll
        for (int k = 0; k < 8; ++k) v.v[k] *= rstd * (s.norm_offset + w.v[k]);
        if (own < vectors) *x_vector(c, i) = v.rounded();
      }
    }
    __syncthreads();
  }

  // ---- LoRA

  __device__ __forceinline__ bool has_piece() const { return static_cast<int>(blockIdx.x) < s.a_pieces[phase]; }
  // Starts the copies of this thread block's piece of A, [units, kTileRows] rows of a_row bytes.
  __device__ __forceinline__ void fetch_a() const {
    if (!s.a_shared[phase] || !has_piece()) return;
    const DecodePiece& piece = share(phase).piece;
    const DecodePart& part = part_at(piece.part);
    const int element = s.lora_f32 ? 4 : 2, shift = s.lora_f32 ? 4 : 3;  // vectors of a row: a power of two
    const char* const from = static_cast<const char*>(part.a) + int64_t{piece.unit} * kBlock * element;
    const unsigned to = shared_address(shared_at(s.at.a));
    for (int i = lane; i < piece.units * kTileRows << shift; i += 32) {
      const int vector = i & (1 << shift) - 1, row = i >> shift & kTileRows - 1, unit = i >> shift + 4;
      copy_16_bytes(to + (unit * kTileRows + row) * s.a_row + vector * 16,
                    from + (int64_t{min(piece.row + row, part.R - 1)} * columns + unit * kBlock) * element + vector * 16, true);
    }
  }

  // Elements 16 t .. of this lane's column of x.
  __device__ __forceinline__ XOfUnit x_unit(bool shared, int unit) const {
    if (shared) {
      const auto* const at = reinterpret_cast<const uint4*>(shared_at(x_shared_row(g) + unit * 128 + t * 32));
      return {at[0], at[1]};
    }
    return load_x(reinterpret_cast<const T*>(x_memory_row(g) + unit * 128 + t * 32));
  }

  // This thread block's piece of x A^T.
  __device__ __forceinline__ void multiply_piece() const {
    const DecodePiece& piece = share(phase).piece;
    const DecodePart& part = part_at(piece.part);
    const bool shared = s.x_shared[phase], a_shared = s.a_shared[phase];
    const int element = s.lora_f32 ? 4 : 2;
    float sum[4] = {}, odd[4] = {};
    const auto pairs = [&](const char* from, unsigned (&out)[8]) { pairs_of_a<T>(s.lora_f32, from, out); };
    const auto row = [&](int r, int unit) {
      return static_cast<const char*>(part.a) + (int64_t{min(piece.row + r, part.R - 1)} * columns + (piece.unit + unit) * kBlock + 16 * t) * element;
    };
#pragma unroll 1
    for (int unit = 0; unit < piece.units; ++unit) {
      unsigned top[8], bottom[8];
      if (a_shared) {
        const char* const own = shared_at(s.at.a + (unit * kTileRows + g) * s.a_row + 16 * t * element);
        pairs(own, top);
        pairs(own + 8 * s.a_row, bottom);
      } else {
        pairs(row(g, unit), top);
        pairs(row(g + 8, unit), bottom);
      }
      multiply_pairs<T>(sum, odd, top, bottom, x_unit(shared, piece.unit + unit));
    }
    // In fixed point, the same sum in any order, above the number of the pieces that are in it.
    unsigned long long* const to = z_sums(phase) + piece.a_tile * (kEight * kTileRows) + g;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int c = 2 * t + i % 2;
      if (c < s.M) atomicAdd(to + c * kTileRows + i / 2 * 8, (static_cast<unsigned long long>(__float2ll_rn((sum[i] + odd[i]) * kFixed)) << kPieceBits) + 1);
    }
  }

  __device__ __forceinline__ void multiply_by_a() const {
    if (has_piece()) multiply_piece();
    if (s.a_pieces[phase] == 0 || count == 0) return;
    const int pieces = s.pieces[phase];
    for (int p = 0, a_tile = 0; p <= tile_at(count - 1).part; ++p) {
      const DecodePart& part = part_at(p);
      const int of_part = part.a == nullptr ? 0 : (part.R + kTileRows - 1) / kTileRows, ranks = of_part * kTileRows;
      if (p >= tile_at(0).part) {
        constexpr int kAtOnce = 4;
        for (int first = lane; first < ranks * s.M; first += 32 * kAtOnce) {
          unsigned long long sums[kAtOnce];
          bool all;
          do {
            all = true;
#pragma unroll
            for (int i = 0; i < kAtOnce; ++i) {
              const int own = min(first + 32 * i, ranks * s.M - 1), c = own / ranks, j = own % ranks;
              sums[i] = load_relaxed(z_sums(phase) + ((a_tile + j / kTileRows) * kEight + c) * kTileRows + j % kTileRows);
            }
#pragma unroll
            for (int i = 0; i < kAtOnce; ++i) all = all && static_cast<int>(sums[i] & ((1 << kPieceBits) - 1)) == pieces;
          } while (!all);
#pragma unroll
          for (int i = 0; i < kAtOnce; ++i) {
            const int own = first + 32 * i;
            if (own >= ranks * s.M) break;
            z(p, own / ranks)[own % ranks] = part.scale * (__ll2float_rn(static_cast<long long>(sums[i]) >> kPieceBits) * (1 / kFixed));
          }
        }
      }
      a_tile += of_part;
    }
  }

  __device__ __forceinline__ float* z(int part, int column) const {
    return reinterpret_cast<float*>(shared_at(s.at.z)) + (part * MP + column) * kZ;
  }

  // ---- the products

  __device__ __forceinline__ void put(float*& slot, const float (&total)[4]) {
    if (2 * t < MP) {
      slot[2 * t * kSumStride] = total[0], slot[2 * t * kSumStride + 8] = total[2];
      if (MP > 1) slot[(2 * t + 1) * kSumStride] = total[1], slot[(2 * t + 1) * kSumStride + 8] = total[3];
    }
    slot += kSlot;
  }

  template <bool kShared>
  __device__ __forceinline__ void multiply_dense(uint4 (&ring)[kDepth][4], Source& source) {
    int unit = first_unit;
    float* slot = reinterpret_cast<float*>(shared_at(s.at.slots)) + (warp + first_tile) * kSlot + g;
    const char* const shared = shared_at(x_shared_row(g) + t * 32);
    float sum[4] = {}, odd[4] = {};
    const auto step = [&](uint4 (&own)[4]) {
      const auto* const at = reinterpret_cast<const uint4*>(shared + unit * 128);
      const XOfUnit x = kShared ? XOfUnit{at[0], at[1]} : x_unit(false, unit);
      const unsigned top[8] = {own[0].x, own[0].y, own[0].z, own[0].w, own[1].x, own[1].y, own[1].z, own[1].w};
      const unsigned bottom[8] = {own[2].x, own[2].y, own[2].z, own[2].w, own[3].x, own[3].y, own[3].z, own[3].w};
      multiply_pairs<T>(sum, odd, top, bottom, x);
      fetch(source, own, left - kDepth);
      --left;
      if (++unit < units && left > 0) return;
      const float total[4] = {sum[0] + odd[0], sum[1] + odd[1], sum[2] + odd[2], sum[3] + odd[3]};
      put(slot, total);
      sum[0] = sum[1] = sum[2] = sum[3] = odd[0] = odd[1] = odd[2] = odd[3] = 0;
      unit = 0;
    };
#pragma unroll 1
    while (left > 0) {
#pragma unroll
      for (int i = 0; i < kDepth; ++i) {
        if (left > 0) step(ring[i]);
      }
    }
  }

  // As strips_kernel does: see there.
  template <bool kShared>
  __device__ __forceinline__ void multiply_nf4(uint4 (&ring)[kDepth][4], Source& source) {
    const float* const map = reinterpret_cast<const float*>(shared_at(s.at.map)) + g;
    const unsigned table = s.at.table + lane * 4;
    const int blocks = columns / kBlock, stride = absmax_stride(), shift = s.nested_shift;
    const bool has = Use::has(g, t) && g % MP < s.M;
    const char* const shared = shared_at(x_shared_row(g % MP) + t * 64 + Use::run(g) * 256);
    const char* const memory = x_memory_row(g % MP) + t * 64 + Use::run(g) * 256;
    unsigned x[16] = {};
    float acc[Use::kBlocks][4] = {};
    int unit = first_unit, local = first_tile;
    float* slot = reinterpret_cast<float*>(shared_at(s.at.slots)) + (warp + local) * kSlot + g;
    const auto load = [&](int at) {
      if (!has) return;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const uint4 four = kShared ? reinterpret_cast<const uint4*>(shared + at)[i] : reinterpret_cast<const uint4*>(memory + at)[i];
        x[4 * i] = four.x, x[4 * i + 1] = four.y, x[4 * i + 2] = four.z, x[4 * i + 3] = four.w;
      }
    };
    const char* absmax_at;
    const float* nested;
    float offset;
    int top_block;
    const auto rows_of_tile = [&] {
      absmax_at = shared_at(s.at.absmax + (local * kTileRows + g) * stride);
      nested = reinterpret_cast<const float*>(shared_at(s.at.nested)) + local * kNestedOfTile;
      const DecodeTile& tile = tile_at(local);
      top_block = tile.nested_before + g * blocks;
      offset = part_at(tile.part).nested_offset;
    };
    rows_of_tile();
    const auto step = [&](uint4 (&own)[4]) {
      if (!Use::kXOfRun) load(unit * 512);
      const unsigned absmax[2] = {*reinterpret_cast<const unsigned*>(absmax_at + unit * 4),
                                  *reinterpret_cast<const unsigned*>(absmax_at + unit * 4 + 8 * stride)};
      const float nested_of[2] = {nested[top_block + unit * kGroupBlocks >> shift], nested[top_block + 8 * blocks + unit * kGroupBlocks >> shift]};
      const auto scale = [&](int half, int of_group) {
        const float value = map[(absmax[half] >> 8 * of_group & 255) * kMapCopies];
        return __fadd_rn(__fmul_rn(value, nested_of[half]), offset);
      };
      GroupSums<MP> group_sums;
#pragma unroll
      for (int run = 0; run < 2; ++run) {
        if (Use::kXOfRun) load(unit * 512 + run * 256);
        unsigned top[16], bottom[16];
        look_up_words<Use::kWide>(own[run], table, top);
        look_up_words<Use::kWide>(own[2 + run], table, bottom);
        if (run == 1) fetch(source, own, left - kDepth);
        group_sums.template multiply_run<T>(run, t, top, bottom, x);
        group_sums.scale_run(run, t, acc, scale);
      }
      group_sums.scale_group(t, acc, scale);
      --left;
      if (++unit < units && left > 0) return;
      float total[4];
      group_sums.add_blocks(acc, total);
      put(slot, total);
#pragma unroll
      for (int i = 0; i < Use::kBlocks; ++i) acc[i][0] = acc[i][1] = acc[i][2] = acc[i][3] = 0;
      unit = 0;
      ++local;
      if (left > 0) rows_of_tile();
    };
#pragma unroll 1
    while (left > 0) {
#pragma unroll
      for (int i = 0; i < kDepth; ++i) {
        if (left > 0) step(ring[i]);
      }
    }
  }

  // residual: what finish adds.
  __device__ __forceinline__ void run(uint4 (&ring)[kDepth][4], Source source, const void* residual) {
    if (warp == kDecodeWarps) {
      multiply_by_a();
    } else if (left > 0) {
      if constexpr (kNf4) {
        // One or two rows always fit shared memory.
        MP <= 2 || s.x_shared[phase] ? multiply_nf4<true>(ring, source) : multiply_nf4<MP <= 2>(ring, source);
      } else {
        s.x_shared[phase] ? multiply_dense<true>(ring, source) : multiply_dense<false>(ring, source);
      }
    }
    first_added = warp < turns() ? added(residual, warp) : 0;
    __syncthreads();
  }

  // Row `row` of a local tile and column c: the product, LoRA and the bias.
  __device__ __forceinline__ float value(int local, int row, int c) const {
    const DecodeTile& tile = tile_at(local);
    const float* slot = reinterpret_cast<const float*>(shared_at(s.at.slots)) + tile.first_slot * kSlot + c * kSumStride + row;
    float value = 0;
#pragma unroll 2
    for (int k = 0; k < tile.slots; ++k, slot += kSlot) value += *slot;
    const DecodePart& part = part_at(tile.part);
    if (part.b != nullptr) {
      const float4* own_z = reinterpret_cast<const float4*>(z(tile.part, c));
      const auto add = [&](const auto* b) {
        using Element = std::remove_cv_t<std::remove_pointer_t<decltype(b)>>;
#pragma unroll 2
        for (int j = 0; j < part.R; j += 4, ++own_z) {
          const auto v = *reinterpret_cast<const Vector<Element, 4>*>(b + j);
          const float4 of_z = *own_z;
          value += to_float(from_float<T>(to_float(v.v[0]))) * of_z.x;
          value += to_float(from_float<T>(to_float(v.v[1]))) * of_z.y;
          value += to_float(from_float<T>(to_float(v.v[2]))) * of_z.z;
          value += to_float(from_float<T>(to_float(v.v[3]))) * of_z.w;
        }
      };
      if (s.b_shared[phase]) {
        const char* const b = shared_at(s.at.b + (local * kTileRows + row) * s.b_most);
        s.lora_f32 ? add(reinterpret_cast<const float*>(b)) : add(reinterpret_cast<const T*>(b));
      } else {
        const int64_t at = int64_t{tile.row + row} * part.R;
        s.lora_f32 ? add(static_cast<const float*>(part.b) + at) : add(static_cast<const T*>(part.b) + at);
      }
    }
    const void* const bias = layer().bias[phase];
    if (bias != nullptr) value += to_float(static_cast<const T*>(bias)[tile.out + row]);
    return value;
  }

  // A warp has the rows of a tile, of gate and up of two, and two columns of x at a time.
  static constexpr int kColumnPairs = (MP + 1) / 2;
  __device__ __forceinline__ int turns() const { return (count >> (phase == kGateUp)) * kColumnPairs; }
  __device__ __forceinline__ int column_of(int turn) const { return turn % kColumnPairs * 2 + lane / kTileRows; }
  __device__ __forceinline__ int64_t output(int turn) const {
    const int width = phase == kQkv ? (s.H + 2 * s.K) * s.D : phase == kGateUp ? s.F : s.C;
    return int64_t{column_of(turn)} * width + tile_at(turn / kColumnPairs << (phase == kGateUp)).out + lane % kTileRows;
  }
  __device__ __forceinline__ float added(const void* residual, int turn) const {
    return residual == nullptr || column_of(turn) >= s.M ? 0 : to_float(static_cast<const T*>(residual)[output(turn)]);
  }

  // to [M, width] = the product, plus `residual` of the same shape unless it is null; of gate and up their activation.
  __device__ __forceinline__ void finish(void* to, const void* residual) const {
    const int all = turns(), row = lane % kTileRows;
#pragma unroll 1
    for (int turn = warp; turn < all; turn += kDecodeWarps + 1) {
      const int local = turn / kColumnPairs << (phase == kGateUp), c = column_of(turn);
      if (c >= s.M) continue;
      float v = value(local, row, c) + (turn == warp ? first_added : added(residual, turn));
      if (phase == kGateUp) {
        // Rounded as what stands in memory elsewhere.
        const float gate = to_float(from_float<T>(v)), up = to_float(from_float<T>(value(local + 1, row, c)));
        v = activated(gate) * up;
      }
      static_cast<T*>(to)[output(turn)] = from_float<T>(v);
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
};

}  // namespace
}  // namespace ferrotune
