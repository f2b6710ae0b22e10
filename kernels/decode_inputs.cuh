// defines: ProductInputs: a thread block's share of the four products of a layer, and what they need: weights, scales, its piece of A and x.
//
// Of a product a thread block has a run of tiles of 16 rows, of gate and up tile by tile the same rows of both, and its fifteen warps
// share the units of these tiles: 64 columns of 16-bit weights, 256 of NF4. All that does not depend on x is asked for before the wait for it.
#pragma once

#include "decode_weights.cuh"
#include "rows_strips.cuh"

namespace ferrotune {
namespace {

template <typename T, int MP, bool kNf4>
struct ProductInputs {
  using Use = ColumnUse<MP>;
  static constexpr int kUnit = WeightStream<kNf4>::kUnit, kSlot = MP * kSumStride;
  // A wide table leaves room for all scales between its pairs.
  static constexpr bool kWide = kNf4 && Use::kWide;
  static constexpr int kPairBytes = kWide ? 256 : 128;
  // The threads copy one row, more are the copy engine's. In shared memory one row's vectors lie so that the lanes that have a group of 256
  // columns read different banks.
  static constexpr bool kOne = MP == 1, kMixed = kOne && kNf4;

  const DecodeCommon& s;
  WeightStream<kNf4> stream;
  int thread, warp, lane, g, t;
  bool attends;  // this thread block has a share of attention, for which the ring must be empty

  // The product.
  DecodePhase phase;
  int layer_at;      // where shared memory has the layer
  int last_product;  // by number: weights up to its are asked for
  int columns, units, count;
  int first_tile, first_unit, left;  // of this warp
  unsigned x_parity = 0;

  __device__ explicit ProductInputs(const DecodeStack& stack)
      : s(stack.common), stream(stack), attends(static_cast<int>(blockIdx.x) < s.M * s.K * s.runs) {}

  // Whatever could be read again is: registers are few, and what does not fit them lies in memory behind a cache that every wait empties.
  __device__ __forceinline__ const DecodeLayer& layer() const { return *reinterpret_cast<const DecodeLayer*>(shared_at(layer_at)); }
  __device__ __forceinline__ const DecodePart& part_at(int part) const { return layer().parts[first_part(phase) + part]; }
  __device__ __forceinline__ DecodeShare& share(int of_phase) const { return reinterpret_cast<DecodeShare*>(shared_at(s.at.shares))[of_phase]; }
  __device__ __forceinline__ const DecodeTile& tile_at(int local) const { return share(phase).tiles[local]; }
  __device__ __forceinline__ int x_shared_row(int column) const { return s.at.x + min(column, s.M - 1) * (columns * 2 + 16); }
  __device__ __forceinline__ const char* x_memory_row(int column) const {
    return static_cast<const char*>(s.product) + min(column, s.M - 1) * int64_t{columns} * 2;
  }

  // Whether a norm stands before the product.
  __device__ __forceinline__ bool normed() const { return phase == kQkv || phase == kGateUp; }

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

  // Scales of 16 rows and eight units: this lane has those of units scaled_unit() .. of row scaled_row().
  static constexpr int kScaledUnits = 8;
  struct Scales {
    unsigned of[4];
  };
  Scales first_scales;
  __device__ __forceinline__ int scaled_row() const { return kWide ? lane % kTileRows : lane / 2; }
  __device__ __forceinline__ int scaled_unit() const { return kWide ? lane / kTileRows * 4 : lane % 2 * 4; }
  __device__ __forceinline__ void fetch_scales(Scales& to, int local, int first) const {
    const DecodeTile& tile = tile_at(min(local, max(count - 1, 0)));
    const auto* const absmax = static_cast<const unsigned*>(part_at(tile.part).absmax) + int64_t{tile.row + scaled_row()} * units;
    first += scaled_unit();
    if (units % 4 == 0) {
      const uint4 four = __ldg(reinterpret_cast<const uint4*>(absmax + min(first, units - 4)));
      to.of[0] = four.x, to.of[1] = four.y, to.of[2] = four.z, to.of[3] = four.w;
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) to.of[i] = __ldg(absmax + min(first + i, units - 1));
    }
  }

  // Between the pairs of a wide table: of this warp, row r and block b of unit u at [u % kScaledUnits, r / 8] times 256 bytes, [r % 8, b] in f32.
  __device__ __forceinline__ int scales_at() const { return s.at.table + 128 + warp * (2 * kScaledUnits * 256); }
  // What fetch_scales got of those with unit `unit` of tile `local`. nested(i): the tile's scale of scales i.
  template <typename Nested>
  __device__ __forceinline__ void put_scales(const Scales& raw, int local, int unit, const Nested& nested) const {
    static_assert(kMapCopies == 8);
    const DecodeTile& tile = tile_at(local);
    const float offset = part_at(tile.part).nested_offset;
    const int row = scaled_row(), first = (unit & ~(kScaledUnits - 1)) + scaled_unit();
    const int block = tile.nested_before + row * (columns / kBlock) + first * kGroupBlocks;
    float4* const to = reinterpret_cast<float4*>(shared_at(scales_at() + row / 8 * 256 + row % 8 * 16 + scaled_unit() * 512));
    const unsigned copy = lane % kMapCopies * 4;
    __syncwarp();
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float of_unit = nested(block + i * kGroupBlocks >> s.nested_shift);
      const auto scale = [&](int of_group) {
        const unsigned at = of_group == 0 ? raw.of[i] << 5 : raw.of[i] >> 8 * of_group - 5;
        float value;
        asm volatile("ld.shared.f32 %0, [%1];" : "=f"(value) : "r"((at & 255 << 5 | copy) + s.at.map));
        return __fadd_rn(__fmul_rn(value, of_unit), offset);
      };
      to[i * 32] = make_float4(scale(0), scale(1), scale(2), scale(3));
    }
    __syncwarp();
  }

  // Whatever does not depend on the product's input is on its way. Nobody uses shared memory but for the shares, the layers and the rings.
  __device__ __forceinline__ void prepare(int of_layer, int number) {
    thread = thread_number();
    warp = thread / 32, lane = thread % 32, g = lane / 4, t = lane % 4;
    layer_at = of_layer;
    phase = static_cast<DecodePhase>(number % kPhases);
    last_product = min(number + (phase != kQkv || !attends), kPhases * s.layers - 1);
    columns = s.columns[phase];
    units = columns / kUnit;
    count = share(phase).count;
    const DecodeUnits own = warp < kDecodeWarps ? share(phase).units[warp] : DecodeUnits{};
    first_tile = own.tile, first_unit = own.unit, left = own.count;
    if (count * units < kDecodeWarps) {
      float* const slots = reinterpret_cast<float*>(shared_at(s.at.slots));
#pragma unroll 1
      for (int i = thread; i < (kDecodeWarps + count) * kSlot; i += kDecodeThreads) slots[i] = 0;
    }
    if (warp == kDecodeWarps - 1) fetch_a();
#pragma unroll 1
    for (int local = warp; warp < kDecodeWarps && local < count; local += kDecodeWarps) fetch_tile(local);
    if (phase == kQkv || phase == kGateUp) {
      const auto* const norm = static_cast<const uint4*>(layer().norms[phase == kGateUp]);
#pragma unroll 1
      for (int i = thread; i < columns / 8; i += kDecodeThreads) copy_16_bytes(shared_address(norm_weight(i)), norm + i, true);
    }
    commit_copies();
    if (warp < kDecodeWarps) {
      stream.fill(last_product);
      if constexpr (kNf4) fetch_scales(first_scales, first_tile, first_unit / kScaledUnits * kScaledUnits);
      if constexpr (kWide) {
        // Before the copies of scales' scales can be seen by all.
        const DecodeTile& tile = tile_at(first_tile);
        const int blocks = columns / kBlock, last = tile.nested_before + kTileRows * blocks - 1 >> s.nested_shift;
        const float* const nested = part_at(tile.part).nested + (int64_t{tile.row} * blocks >> s.nested_shift);
        if (left > 0) put_scales(first_scales, first_tile, first_unit, [&](int i) { return __ldg(nested + min(i, last)); });
      }
    }
  }
  __device__ __forceinline__ unsigned long long* z_sums(int of_phase) const {
    return s.z + of_phase % 2 * (kMostATiles * kEight * kTileRows);
  }

  // Starts the copies of a tile's scales' scales; its rows of B come into the second-level cache.
  __device__ __forceinline__ void fetch_tile(int local) const {
    const DecodeTile& tile = tile_at(local);
    const DecodePart& part = part_at(tile.part);
    if constexpr (kNf4) {
      const int blocks = columns / kBlock;
      if (lane <= tile.nested_before + kTileRows * blocks - 1 >> s.nested_shift) {
        const int64_t first = int64_t{tile.row} * blocks >> s.nested_shift;
        copy_4_bytes(shared_address(shared_at(s.at.nested + 4 * (local * kNestedOfTile + lane))), part.nested + first + lane);
      }
    }
    if (part.b != nullptr) {
      const int row_bytes = part.R * (s.lora_f32 ? 4 : 2);
      const char* const b = static_cast<const char*>(part.b) + int64_t{tile.row} * row_bytes;
#pragma unroll 1
      for (int i = lane * 128; i < kTileRows * row_bytes; i += 32 * 128) prefetch_line(b + i);
    }
  }
  __device__ __forceinline__ bool has_piece() const { return static_cast<int>(blockIdx.x) < s.a_pieces[phase]; }
  // Starts the copies of this thread block's piece of A, [units, kTileRows] rows of a_row bytes.
  __device__ __forceinline__ void fetch_a() const {
    if (!s.a_shared || !has_piece()) return;
    const DecodePiece& piece = share(phase).piece;
    const DecodePart& part = part_at(piece.part);
    const int element = s.lora_f32 ? 4 : 2, shift = s.lora_f32 ? 4 : 3;  // vectors of a row: a power of two
    const char* const from = static_cast<const char*>(part.a) + int64_t{piece.unit} * kBlock * element;
    const unsigned to = shared_address(shared_at(s.at.a));
#pragma unroll 1
    for (int i = lane; i < piece.units * kTileRows << shift; i += 32) {
      const int vector = i & (1 << shift) - 1, row = i >> shift & kTileRows - 1, unit = i >> shift + 4;
      copy_16_bytes(to + (unit * kTileRows + row) * s.a_row + vector * 16,
                    from + (int64_t{min(piece.row + row, part.R - 1)} * columns + unit * kBlock) * element + vector * 16, true);
    }
  }

  // x on its way into shared memory, by one thread. All thread blocks are done with the product before.
  __device__ __forceinline__ void fetch_x(const void* from) const {
    if (!s.x_shared[phase]) return;
    const unsigned arrived = shared_address(shared_at(s.at.x_arrived)), bytes = columns * 2;
    // What others wrote to memory, and read of this block's, comes before copies that are not theirs.
    asm volatile("fence.proxy.async;" ::: "memory");
    arrive_with_boxes(arrived, s.M * bytes);
    for (int c = 0; c < s.M; ++c) {
      asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(shared_address(x_vector(c, 0))),
                   "l"(static_cast<const char*>(from) + int64_t{c} * bytes), "r"(bytes), "r"(arrived)
                   : "memory");
    }
  }
  __device__ __forceinline__ void wait_x() {
    if (!s.x_shared[phase]) return;
    wait_phase(shared_address(shared_at(s.at.x_arrived)), x_parity);
    x_parity ^= 1;
  }
  // Vector i of eight elements of row c.
  __device__ __forceinline__ uint4* x_vector(int c, int i) const {
    if (kMixed) i ^= i >> 3 & 3;
    return reinterpret_cast<uint4*>(shared_at(s.at.x + c * (columns * 2 + 16) + 16 * i));
  }
  // Vector i of the norm's weight, behind x.
  __device__ __forceinline__ uint4* norm_weight(int i) const { return reinterpret_cast<uint4*>(shared_at(s.at.x + s.M * (columns * 2 + 16) + 16 * i)); }
  static constexpr int kHalf = MP / 2;
  // Sums of squares of warps, [MP, 16], and behind them what products are multiplied by: norms divide by the root mean square behind the product.
  __device__ __forceinline__ float* statistics() const { return reinterpret_cast<float*>(shared_at(s.at.statistics)); }
  __device__ __forceinline__ float& rstd(int c) const { return statistics()[16 * MP + c]; }
  // Of column lane / 4, in these lanes.
  __device__ __forceinline__ float rstd_of_lane() const {
    const float4 four = reinterpret_cast<const float4*>(statistics())[min(lane, 4 * s.M - 1)];
    float sum = four.x + four.y + (four.z + four.w);
    sum += __shfl_xor_sync(0xffffffff, sum, 1);
    sum += __shfl_xor_sync(0xffffffff, sum, 2);
    return rsqrtf(sum / columns + s.eps);
  }
  // Vector i of a row whose norm the product is of, times the norm's weight; its squares are added to `sum`.
  __device__ __forceinline__ uint4 weighted(const uint4& raw, int i, float& sum) const {
    Eight<T> v(reinterpret_cast<const T*>(&raw));
    const Eight<T> w(reinterpret_cast<const T*>(norm_weight(i)));
#pragma unroll
    for (int k = 0; k < 8; ++k) sum += v.v[k] * v.v[k], v.v[k] *= s.norm_offset + w.v[k];
    return v.rounded();
  }
  __device__ __forceinline__ void put_squares(int c, float sum) const {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffff, sum, step);
    if (lane == 0) statistics()[c * 16 + warp] = sum;
  }

  // x into shared memory, once it is there: as it was, or times the norm's weight.
  __device__ __forceinline__ void stage(const void* from) {
    // The next product's sums begin at zero.
#pragma unroll 1
    for (int i = blockIdx.x * kDecodeThreads + thread; i < kMostATiles * kEight * kTileRows; i += gridDim.x * kDecodeThreads) {
      z_sums(phase + 1)[i] = 0;
    }
    const int vectors = columns / 8;
    if constexpr (kOne) {
      float sum = 0;
#pragma unroll 2
      for (int i = thread; i < vectors; i += kDecodeThreads) {
        const uint4 raw = __ldcg(static_cast<const uint4*>(from) + i);
        *x_vector(0, i) = normed() ? weighted(raw, i, sum) : raw;
      }
      if (normed()) put_squares(0, sum);
      __syncthreads();
    } else {
      wait_x();
      if (!normed()) return;
      // Short rows are shared by twice as many threads, each with half of the rows.
      const bool halves = 2 * vectors <= kDecodeThreads, second = halves && thread >= vectors;
      const int place = second ? thread - vectors : thread;
      const auto some_rows = [&](int first) {
        float sums[kHalf] = {};
        for (int i = place; i < vectors; i += kDecodeThreads) {
#pragma unroll
          for (int c = 0; c < kHalf; ++c) {
            uint4* const at = x_vector(min(first + c, s.M - 1), i);
            const uint4 result = weighted(*at, i, sums[c]);
            if (first + c < s.M) *at = result;
          }
        }
#pragma unroll
        for (int c = 0; c < kHalf; ++c) put_squares(first + c, sums[c]);
      };
      some_rows(second ? kHalf : 0);
      if (!halves) some_rows(kHalf);
      if (halves && lane < kHalf) statistics()[((second ? 0 : kHalf) + lane) * 16 + warp] = 0;
      __syncthreads();
    }
  }
};

}  // namespace
}  // namespace ferrotune
