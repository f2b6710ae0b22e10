// defines: Products: the four products of a layer by one thread block among all, with what stands before and behind each.
//
// Of a product a thread block has a run of tiles of 16 rows, of gate and up tile by tile the same rows of both, and its fifteen warps
// share the units of these tiles: 64 columns of 16-bit weights, 256 of NF4, whose products are those of rows_strips.cuh. Sums meet once, in
// shared memory. One warp more computes this block's piece of x A^T, waits for those of the others, and has s B (x A^T) of all tiles ready
// when their sums are.
#pragma once

#include "decode_weights.cuh"
#include "rows_strips.cuh"

namespace ferrotune {
namespace {

template <typename T, int MP, bool kNf4>
struct Products {
  using Use = ColumnUse<MP>;
  static constexpr int kUnit = kNf4 ? 256 : 64, kSlot = MP * kSumStride, kZ = kMostRank + 4, kLoraStride = kTileRows;
  static constexpr int kPairBytes = Use::kWide ? 256 : 128;
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
  float first_added;

  __device__ explicit Products(const DecodeStack& stack)
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

  // Scales of 16 rows and eight units: this lane has those of units 2 t and 2 t + 1 of rows g and g + 8.
  static constexpr int kScaledUnits = 8;
  struct Scales {
    unsigned of[2][2];
  };
  Scales first_scales;
  __device__ __forceinline__ void fetch_scales(Scales& to, int local, int first) const {
    const DecodeTile& tile = tile_at(min(local, max(count - 1, 0)));
    const int blocks = columns / kBlock;
    const auto* const absmax = static_cast<const unsigned*>(part_at(tile.part).absmax) + int64_t{tile.row + g} * (blocks / 4);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        to.of[half][i] = __ldg(absmax + half * 8 * (blocks / 4) + min(first + 2 * t + i, units - 1));
      }
    }
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
      for (int i = thread; i < (kDecodeWarps + count) * kSlot; i += kDecodeThreads) slots[i] = 0;
    }
    if (warp == kDecodeWarps - 1) fetch_a();
    for (int local = warp; warp < kDecodeWarps && local < count; local += kDecodeWarps) fetch_tile(local);
    commit_copies();
    const void* const norm = phase == kQkv ? layer().norms[0] : phase == kGateUp ? layer().norms[1] : nullptr;
    if (norm != nullptr) {
#pragma unroll
      for (int turn = 0; turn < kNormTurns; ++turn) norm_weight[turn] = __ldg(static_cast<const uint4*>(norm) + norm_vector(turn));
    }
    if (warp < kDecodeWarps) {
      if constexpr (kNf4) fetch_scales(first_scales, first_tile, first_unit / kScaledUnits * kScaledUnits);
      stream.fill(last_product);
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
      for (int i = lane * 128; i < kTileRows * row_bytes; i += 32 * 128) prefetch_line(b + i);
    }
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
  // Vector i of eight elements of row c.
  __device__ __forceinline__ uint4* x_vector(int c, int i) const {
    if (kMixed) i ^= i >> 3 & 3;
    return reinterpret_cast<uint4*>(shared_at(s.at.x + c * (columns * 2 + 16) + 16 * i));
  }
  // Short rows are shared by twice as many threads, each with half of the rows. A thread's vector of a row, in turns: the norm's first ones are
  // on their way before x is.
  static constexpr int kHalf = MP > 1 ? MP / 2 : 1, kNormTurns = 2;
  uint4 norm_weight[kNormTurns];
  __device__ __forceinline__ bool halves() const { return MP > 1 && 2 * (columns / 8) <= kDecodeThreads; }
  __device__ __forceinline__ int norm_place(int turn) const {
    return turn * kDecodeThreads + (halves() && thread >= columns / 8 ? thread - columns / 8 : thread);
  }
  __device__ __forceinline__ int norm_vector(int turn) const { return min(norm_place(turn), columns / 8 - 1); }
  // One row into shared memory, once it is there.
  __device__ __forceinline__ void copy_row(const void* from) const {
    const bool norm = phase == kQkv || phase == kGateUp;
    float sum = 0;
#pragma unroll 4
    for (int i = thread; i < columns / 8; i += kDecodeThreads) {
      const uint4 raw = __ldcg(static_cast<const uint4*>(from) + i);
      *x_vector(0, i) = raw;
      if (!norm) continue;
      const Eight<T> v(reinterpret_cast<const T*>(&raw));
#pragma unroll
      for (int k = 0; k < 8; ++k) sum += v.v[k] * v.v[k];
    }
    if (norm) {
#pragma unroll
      for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffff, sum, step);
      if (lane == 0) reinterpret_cast<float*>(shared_at(s.at.statistics))[warp] = sum;
    }
    __syncthreads();
  }

  // There it is: as it was, or divided by its rows' root mean squares.
  __device__ __forceinline__ void stage() {
    // The next product's sums begin at zero.
    for (int i = blockIdx.x * kDecodeThreads + thread; i < kMostATiles * kEight * kTileRows; i += gridDim.x * kDecodeThreads) {
      z_sums(phase + 1)[i] = 0;
    }
    if (!kOne) wait_x();
    if (phase == kO || phase == kDown) return;
    const int vectors = columns / 8;
    float* const statistics = reinterpret_cast<float*>(shared_at(s.at.statistics));
    const bool second = halves() && thread >= vectors;
    const int first = second ? kHalf : 0, place = norm_place(0);
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
    if (!kOne) {
      sum_rows(first);
      if (!halves()) sum_rows(kHalf);
      if (halves() && lane < kHalf) statistics[(kHalf - first + lane) * 16 + warp] = 0;
      __syncthreads();
    }
    // Every warp for itself: of column lane / 4 in these lanes.
    const float4 four = reinterpret_cast<const float4*>(statistics)[min(lane, 4 * s.M - 1)];
    float of_column = four.x + four.y + (four.z + four.w);
    of_column += __shfl_xor_sync(0xffffffff, of_column, 1);
    of_column += __shfl_xor_sync(0xffffffff, of_column, 2);
    of_column = rsqrtf(of_column / columns + s.eps);
    const int turns = (vectors + kDecodeThreads - 1) / kDecodeThreads, last = halves() ? min(s.M, first + kHalf) : s.M;
    const auto scale = [&](int turn, const uint4& weight) {
      const int own = norm_place(turn), i = min(own, vectors - 1);
      const Eight<T> w(reinterpret_cast<const T*>(&weight));
#pragma unroll 4
      for (int c = first; c < last; ++c) {
        const float rstd = __shfl_sync(0xffffffff, of_column, 4 * c);
        Eight<T> v(reinterpret_cast<const T*>(x_vector(c, i)));
#pragma unroll
        for (int k = 0; k < 8; ++k) v.v[k] *= rstd * (s.norm_offset + w.v[k]);
        if (own < vectors) *x_vector(c, i) = v.rounded();
      }
    };
    scale(0, norm_weight[0]);
    if (turns > 1) scale(1, norm_weight[1]);
#pragma unroll 1
    for (int turn = 2; turn < turns; ++turn) scale(turn, __ldg(static_cast<const uint4*>(layer().norms[phase == kGateUp]) + norm_vector(turn)));
    __syncthreads();
  }

  // ---- LoRA

  __device__ __forceinline__ bool has_piece() const { return static_cast<int>(blockIdx.x) < s.a_pieces[phase]; }
  // Starts the copies of this thread block's piece of A, [units, kTileRows] rows of a_row bytes.
  __device__ __forceinline__ void fetch_a() const {
    if (!s.a_shared || !has_piece()) return;
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
    if (kMixed) return {*x_vector(0, unit * 8 + 2 * t), *x_vector(0, unit * 8 + 2 * t + 1)};
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
    const bool shared = s.x_shared[phase], a_shared = s.a_shared;
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
    s.lora_f32 ? multiply_by_b<float>() : multiply_by_b<T>();
  }
  // z of this thread block's parts, once all pieces are there.
  __device__ __forceinline__ void wait_for_z() const {
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
    __syncwarp();
  }

  // [MP, kTileRows] of a tile.
  __device__ __forceinline__ float* lora_sums(int local) const { return reinterpret_cast<float*>(shared_at(s.at.lora)) + local * (MP * kLoraStride); }
  // z B^T of all tiles: a lane has one row, of every second tile or of half of the columns.
  template <typename Element>
  __device__ __forceinline__ void multiply_by_b() const {
    constexpr int kTiles = MP == 1 ? 2 : 1, kColumns = MP == 1 ? 1 : MP / 2;
    // The rows of several tiles are on their way at a time, the first ones before z is there.
    constexpr int kAtOnce = MP <= 2 ? 4 : 2, kFours = 4;
    const int row = lane % kTileRows, half = lane / kTileRows, column = MP == 1 ? 0 : half * kColumns, begin = MP == 1 ? half : 0;
    struct {
      const Element* b;
      int part, rank;
    } of[kAtOnce];
    Vector<Element, 4> b[kAtOnce][kFours];
    const auto seek = [&](int first) {
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const DecodeTile& tile = tile_at(min(first + i * kTiles, count - 1));
        const DecodePart& part = part_at(tile.part);
        of[i] = {static_cast<const Element*>(part.b) + int64_t{tile.row + row} * part.R, tile.part, part.b == nullptr ? 0 : part.R};
      }
    };
    const auto load = [&](int j) {
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
#pragma unroll
        for (int k = 0; k < kFours; ++k) {
          if (j + 4 * k < of[i].rank) b[i][k] = *reinterpret_cast<const Vector<Element, 4>*>(of[i].b + j + 4 * k);
        }
      }
    };
    seek(begin);
    load(0);
    wait_for_z();
#pragma unroll 1
    for (int first = begin; first < count; first += kTiles * kAtOnce) {
      if (first != begin) {
        seek(first);
        load(0);
      }
      float sums[kAtOnce][kColumns] = {};
#pragma unroll 1
      for (int j = 0;;) {
        int most = 0;
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
          most = max(most, of[i].rank);
#pragma unroll
          for (int c = 0; c < kColumns; ++c) {
            const float4* const own_z = reinterpret_cast<const float4*>(z(of[i].part, column + c) + j);
#pragma unroll
            for (int k = 0; k < kFours; ++k) {
              if (j + 4 * k >= of[i].rank) continue;
              const float4 of_z = own_z[k];
              sums[i][c] += to_float(from_float<T>(to_float(b[i][k].v[0]))) * of_z.x;
              sums[i][c] += to_float(from_float<T>(to_float(b[i][k].v[1]))) * of_z.y;
              sums[i][c] += to_float(from_float<T>(to_float(b[i][k].v[2]))) * of_z.z;
              sums[i][c] += to_float(from_float<T>(to_float(b[i][k].v[3]))) * of_z.w;
            }
          }
        }
        if ((j += 4 * kFours) >= most) break;
        load(j);
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        if (first + i * kTiles >= count) break;
#pragma unroll
        for (int c = 0; c < kColumns; ++c) lora_sums(first + i * kTiles)[(column + c) * kLoraStride + row] = sums[i][c];
      }
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
  __device__ __forceinline__ void multiply_dense() {
    int unit = first_unit;
    float* slot = reinterpret_cast<float*>(shared_at(s.at.slots)) + (warp + first_tile) * kSlot + g;
    const char* const shared = shared_at(x_shared_row(g) + t * 32);
    float sum[4] = {}, odd[4] = {};
#pragma unroll 1
    for (; left > 0; --left) {
      uint4 own[4];
      stream.take(own, last_product);
      const auto* const at = reinterpret_cast<const uint4*>(shared + unit * 128);
      const XOfUnit x = kShared ? XOfUnit{at[0], at[1]} : x_unit(false, unit);
      const unsigned top[8] = {own[0].x, own[0].y, own[0].z, own[0].w, own[1].x, own[1].y, own[1].z, own[1].w};
      const unsigned bottom[8] = {own[2].x, own[2].y, own[2].z, own[2].w, own[3].x, own[3].y, own[3].z, own[3].w};
      multiply_pairs<T>(sum, odd, top, bottom, x);
      if (++unit < units && left > 1) continue;
      const float total[4] = {sum[0] + odd[0], sum[1] + odd[1], sum[2] + odd[2], sum[3] + odd[3]};
      put(slot, total);
      sum[0] = sum[1] = sum[2] = sum[3] = odd[0] = odd[1] = odd[2] = odd[3] = 0;
      unit = 0;
    }
  }

  // As strips_kernel does: see there.
  template <bool kShared>
  __device__ __forceinline__ void multiply_nf4() {
    const float* const map = reinterpret_cast<const float*>(shared_at(s.at.map)) + g;
    const unsigned table = s.at.table + lane * 4;
    const int blocks = columns / kBlock, shift = s.nested_shift;
    const bool has = Use::has(g, t) && g % MP < s.M;
    const char* const shared = shared_at(x_shared_row(g % MP) + t * 64 + Use::run(g) * 256);
    const char* const memory = x_memory_row(g % MP) + t * 64 + Use::run(g) * 256;
    const int mixed = kMixed ? 2 * Use::run(g) + t / 2 : 0;
    unsigned x[16] = {};
    float acc[Use::kBlocks][4] = {};
    int unit = first_unit, local = first_tile;
    float* slot = reinterpret_cast<float*>(shared_at(s.at.slots)) + (warp + local) * kSlot + g;
    const auto load = [&](int at) {
      if (!has) return;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const uint4 four = kShared ? reinterpret_cast<const uint4*>(shared + at)[kMixed ? i ^ mixed : i] : reinterpret_cast<const uint4*>(memory + at)[i];
        x[4 * i] = four.x, x[4 * i + 1] = four.y, x[4 * i + 2] = four.z, x[4 * i + 3] = four.w;
      }
    };
    Scales scales = first_scales, next_scales;
    // The eight units behind these, of this tile or of the next. Eight rows leave no registers for them.
    constexpr bool kAhead = MP < 8;
    const auto fetch_next_scales = [&] {
      const int behind = unit / kScaledUnits * kScaledUnits + kScaledUnits;
      behind < units ? fetch_scales(next_scales, local, behind) : fetch_scales(next_scales, local + 1, 0);
    };
    if (kAhead) fetch_next_scales();
    const float* nested;
    float offset;
    int top_block;
    const auto rows_of_tile = [&] {
      nested = reinterpret_cast<const float*>(shared_at(s.at.nested)) + local * kNestedOfTile;
      const DecodeTile& tile = tile_at(local);
      top_block = tile.nested_before + g * blocks;
      offset = part_at(tile.part).nested_offset;
    };
    rows_of_tile();
#pragma unroll 1
    for (; left > 0; --left) {
      uint4 own[4];
      stream.take(own, last_product);
      if (!Use::kXOfRun) load(unit * 512);
      const int from = lane & 28 | unit % kScaledUnits / 2;
      const bool odd_unit = unit % 2 == 1;
      const unsigned absmax[2] = {__shfl_sync(0xffffffff, odd_unit ? scales.of[0][1] : scales.of[0][0], from),
                                  __shfl_sync(0xffffffff, odd_unit ? scales.of[1][1] : scales.of[1][0], from)};
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
        group_sums.template multiply_run<T>(run, t, top, bottom, x);
        group_sums.scale_run(run, t, acc, scale);
      }
      group_sums.scale_group(t, acc, scale);
      ++unit;
      const bool over = unit == units;
      if (over || left == 1) {
        float total[4];
        group_sums.add_blocks(acc, total);
        put(slot, total);
#pragma unroll
        for (int i = 0; i < Use::kBlocks; ++i) acc[i][0] = acc[i][1] = acc[i][2] = acc[i][3] = 0;
      }
      if (left == 1) continue;
      if (over) {
        unit = 0;
        ++local;
        rows_of_tile();
      }
      if (unit % kScaledUnits == 0) {
        if (!kAhead) fetch_scales(next_scales, local, unit);
        scales = next_scales;
        if (kAhead) fetch_next_scales();
      }
    }
  }

  // residual: what finish adds.
  __device__ __forceinline__ void run(const void* residual) {
    if (warp == kDecodeWarps) {
      multiply_by_a();
    } else if (left > 0) {
      if constexpr (kNf4) {
        // One or two rows always fit shared memory.
        MP <= 2 || s.x_shared[phase] ? multiply_nf4<true>() : multiply_nf4<MP <= 2>();
      } else {
        s.x_shared[phase] ? multiply_dense<true>() : multiply_dense<false>();
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
#pragma unroll 4
    for (int k = 0; k < tile.slots; ++k, slot += kSlot) value += *slot;
    if (part_at(tile.part).b != nullptr) value += lora_sums(local)[c * kLoraStride + row];
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
