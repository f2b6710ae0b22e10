// defines: Products: the four products of a layer by one thread block among all.
//
// Products of units are those of rows_strips.cuh. Sums meet once, in shared memory. One warp more computes this block's piece of x A^T, waits
// for those of the others, and has s B (x A^T) of all tiles ready when their sums are.
#pragma once

#include "activation.cuh"
#include "decode_inputs.cuh"

namespace ferrotune {
namespace {

template <typename T, int MP, bool kNf4>
struct Products : ProductInputs<T, MP, kNf4> {
  using Inputs = ProductInputs<T, MP, kNf4>;
  using Inputs::Inputs;
  using typename Inputs::Scales;
  using typename Inputs::Use;
  using Inputs::kSlot, Inputs::kMixed, Inputs::kWide, Inputs::kScaledUnits, Inputs::s, Inputs::stream, Inputs::warp, Inputs::lane, Inputs::g, Inputs::t;
  using Inputs::phase, Inputs::last_product, Inputs::columns, Inputs::units, Inputs::count, Inputs::first_tile, Inputs::first_unit, Inputs::left;
  using Inputs::first_scales, Inputs::layer, Inputs::part_at, Inputs::share, Inputs::tile_at, Inputs::x_shared_row, Inputs::x_memory_row;
  using Inputs::x_vector, Inputs::z_sums, Inputs::has_piece, Inputs::fetch_scales, Inputs::scales_at, Inputs::put_scales;
  static constexpr int kZ = kMostRank + 4, kLoraStride = kTileRows;

  // ---- LoRA

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
    const auto row = [&](int r, int unit) -> const char* {
      if (a_shared) return shared_at(s.at.a + (unit * kTileRows + r) * s.a_row + 16 * t * element);
      return static_cast<const char*>(part.a) + (int64_t{min(piece.row + r, part.R - 1)} * columns + (piece.unit + unit) * kBlock + 16 * t) * element;
    };
#pragma unroll 1
    for (int unit = 0; unit < piece.units; ++unit) {
      const XOfUnit x = x_unit(shared, piece.unit + unit);
      unsigned top[8], bottom[8];
      pairs_of_a<T>(s.lora_f32, row(g, unit), top);
      pairs_of_a<T>(s.lora_f32, row(g + 8, unit), bottom);
      multiply_pairs<T>(sum, odd, top, bottom, x);
    }
    // In fixed point, the same sum in any order, above the number of the pieces that are in it.
    unsigned long long* const to = z_sums(phase) + piece.a_tile * (kEight * kTileRows) + g;
#pragma unroll
    for (int i = 0; i < 4; i += MP == 1 ? 2 : 1) {
      const int c = 2 * t + i % 2;
      if (c < s.M) atomicAdd(to + c * kTileRows + i / 2 * 8, one_in_fixed_point(sum[i] + odd[i]));
    }
  }

  __device__ __forceinline__ void multiply_by_a() const {
    if (has_piece()) multiply_piece();
    if (s.a_pieces[phase] == 0 || count == 0) return;
    multiply_by_b();
  }
  // z of this thread block's parts, once all pieces are there.
  __device__ __forceinline__ void wait_for_z() const {
    const int pieces = s.pieces[phase];
#pragma unroll 1
    for (int p = 0, a_tile = 0; p <= tile_at(count - 1).part; ++p) {
      const DecodePart& part = part_at(p);
      const int of_part = part.a == nullptr ? 0 : (part.R + kTileRows - 1) / kTileRows, ranks = of_part * kTileRows;
      if (p >= tile_at(0).part) {
        constexpr int kAtOnce = MP == 1 ? 1 : 4;
#pragma unroll 1
        for (int first = lane; first < ranks * s.M; first += 32 * kAtOnce) {
          unsigned long long sums[kAtOnce];
          bool all;
          do {
            all = true;
#pragma unroll
            for (int i = 0; i < kAtOnce; ++i) {
              const int own = min(first + 32 * i, ranks * s.M - 1), c = MP == 1 ? 0 : own / ranks, j = own - c * ranks;
              sums[i] = load_relaxed(z_sums(phase) + ((a_tile + j / kTileRows) * kEight + c) * kTileRows + j % kTileRows);
            }
#pragma unroll
            for (int i = 0; i < kAtOnce; ++i) all = all && in_fixed_point(sums[i]) == pieces;
          } while (!all);
#pragma unroll
          for (int i = 0; i < kAtOnce; ++i) {
            const int own = first + 32 * i;
            if (own >= ranks * s.M) break;
            const int c = MP == 1 ? 0 : own / ranks;
            const float factor = this->normed() ? part.scale * this->rstd(c) : part.scale;
            z(p, c)[own - c * ranks] = factor * of_fixed_point(sums[i]);
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
  __device__ __forceinline__ void multiply_by_b() const {
    constexpr int kTiles = MP == 1 ? 2 : 1, kColumns = MP == 1 ? 1 : MP / 2;
    const int row = lane % kTileRows, half = lane / kTileRows, column = MP == 1 ? 0 : half * kColumns;
    // The rows of several tiles are on their way at a time, the first ones before z is there.
    constexpr int kAtOnce = 2, kRanks = 16, kEights = kRanks / 8;
    // Where they are f32, the second half of each eight is `high`.
    uint4 b[kAtOnce][kEights], high[kAtOnce][kEights];
    float sums[kAtOnce][kColumns] = {};
    const auto load = [&](int first, int j) {
      bool any = false;
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const DecodeTile& tile = tile_at(min(first + i * kTiles, count - 1));
        const DecodePart& part = part_at(tile.part);
        const auto* const from = static_cast<const char*>(part.b) + (int64_t{tile.row + row} * part.R + j << 1 + s.lora_f32);
#pragma unroll
        for (int k = 0; k < kEights; ++k) {
          const bool own = part.b != nullptr && j + 8 * k < part.R;
          const auto* const vectors = reinterpret_cast<const uint4*>(from + (k << 4 + s.lora_f32));
          b[i][k] = load_4_if(own, vectors), high[i][k] = load_4_if(own && s.lora_f32, vectors + 1);
          any = any || own;
        }
      }
      return any;
    };
    const int begin = MP == 1 ? half : 0;
    load(begin, 0);
    wait_for_z();
#pragma unroll 1
    for (int first = begin, j = 0; first < count;) {
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int part = tile_at(min(first + i * kTiles, count - 1)).part;
#pragma unroll
        for (int k = 0; k < kEights; ++k) {
          if (j + 8 * k >= part_at(part).R) break;
          const uint4 rounded = s.lora_f32 ? pack_words<T>(b[i][k], high[i][k]) : b[i][k];
          const Eight<T> own(reinterpret_cast<const T*>(&rounded));
#pragma unroll
          for (int c = 0; c < kColumns; ++c) {
            const float* const of_z = z(part, column + c) + j + 8 * k;
#pragma unroll
            for (int r = 0; r < 8; ++r) sums[i][c] += own.v[r] * of_z[r];
          }
        }
      }
      j += kRanks;
      if (j < kMostRank && load(first, j)) continue;
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
#pragma unroll
        for (int c = 0; c < kColumns; ++c) {
          if (first + i * kTiles < count) lora_sums(first + i * kTiles)[(column + c) * kLoraStride + row] = sums[i][c];
          sums[i][c] = 0;
        }
      }
      first += kTiles * kAtOnce, j = 0;
      if (first < count) load(first, 0);
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

  // What this warp has of a tile; the next one begins at zero.
  __device__ __forceinline__ void put_sums(float*& slot, float (&acc)[Use::kBlocks][4]) {
    float total[4];
    GroupSums<MP>::add_blocks(acc, total);
    put(slot, total);
#pragma unroll
    for (int i = 0; i < Use::kBlocks; ++i) acc[i][0] = acc[i][1] = acc[i][2] = acc[i][3] = 0;
  }

  // One or two rows. As strips_kernel does: see there; scales lie in shared memory, of eight units at a time.
  __device__ __forceinline__ void multiply_wide() {
    const bool has = Use::has(g, t) && g % MP < s.M;
    const int row = stream.row_of(g), mixed = kMixed ? (2 * Use::run(g) + t / 2) * 16 : 0;
    const unsigned shared = shared_address(shared_at(x_shared_row(g % MP) + t * 64 + Use::run(g) * 256 + mixed)), table = s.at.table + lane * 4;
    unsigned x[16] = {};
    float acc[Use::kBlocks][4] = {};
    unsigned unit = first_unit;
    int local = first_tile;
    float* slot = reinterpret_cast<float*>(shared_at(s.at.slots)) + (warp + local) * kSlot + row;
    const int own_scales = scales_at() + row * 16 + (MP == 1 ? 8 * (t & 1) : 4 * t);
    // Shared memory has the scales of so many units from this one on; those behind them, of this tile or of the next, are on their way.
    Scales scales;
    int scaled;
    const auto fetch_behind = [&] {
      const int behind = (unit & ~(kScaledUnits - 1)) + kScaledUnits;
      scaled = min(behind, units) - static_cast<int>(unit);
      fetch_scales(scales, local + (behind >= units), behind < units ? behind : 0);
    };
    fetch_behind();
#pragma unroll 1
    for (; left > 0; --left) {
      uint4 own[4];
      stream.take(own, last_product);
      if (has) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const uint4 four = load_shared_4(kMixed ? shared + unit * 512 ^ 16 * i : shared + unit * 512 + 16 * i);
          x[4 * i] = four.x, x[4 * i + 1] = four.y, x[4 * i + 2] = four.z, x[4 * i + 3] = four.w;
        }
      }
      if (scaled == 0) {
        const float* const nested = reinterpret_cast<const float*>(shared_at(s.at.nested)) + local * kNestedOfTile;
        put_scales(scales, local, unit, [&](int i) { return nested[i]; });
        fetch_behind();
      }
      --scaled;
      GroupSums<MP> sums;
#pragma unroll
      for (int run = 0; run < 2; ++run) {
        unsigned top[16], bottom[16];
        look_up_words<true>(own[run], table, top);
        look_up_words<true>(own[2 + run], table, bottom);
        sums.template multiply_run<T>(run, t, top, bottom, x);
      }
      const auto* const at = reinterpret_cast<const float*>(shared_at(own_scales + unit % kScaledUnits * 512));
      float of[2][2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        if constexpr (MP == 1) {
          const auto two = *reinterpret_cast<const float2*>(at + 64 * half);
          of[half][0] = two.x, of[half][1] = two.y;
        } else {
          of[half][0] = at[64 * half];
        }
      }
      sums.scale_group(t, acc, [&](int half, int of_group) { return of[half][MP == 1 ? of_group & 1 : 0]; });
      ++unit;
      if (unit == units || left == 1) put_sums(slot, acc);
      if (unit == units) {
        unit = 0;
        ++local;
      }
    }
  }

  // More rows, the same.
  template <bool kShared>
  __device__ __forceinline__ void multiply_nf4() {
    const unsigned table = s.at.table + lane * 4;
    const bool has = Use::has(g, t) && g % MP < s.M;
    const int row = stream.row_of(g);
    const char* const shared = shared_at(x_shared_row(g % MP) + t * 64);
    const char* const memory = x_memory_row(g % MP) + t * 64;
    unsigned x[16] = {};
    float acc[Use::kBlocks][4] = {};
    unsigned unit = first_unit;
    int local = first_tile;
    float* slot = reinterpret_cast<float*>(shared_at(s.at.slots)) + (warp + local) * kSlot + row;
    const auto load = [&](unsigned at) {
      if (!has) return;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const uint4 four = reinterpret_cast<const uint4*>((kShared ? shared : memory) + at)[i];
        x[4 * i] = four.x, x[4 * i + 1] = four.y, x[4 * i + 2] = four.z, x[4 * i + 3] = four.w;
      }
    };
    // The eight units behind these, of this tile or of the next. Eight rows leave no registers for them.
    constexpr bool kAhead = MP < 8;
    Scales scales = first_scales, next_scales;
    const auto fetch_next = [&] {
      const int behind = (unit & ~(kScaledUnits - 1)) + kScaledUnits;
      fetch_scales(next_scales, local + (behind >= units), behind < units ? behind : 0);
    };
    if (kAhead) fetch_next();
    const float* const map = reinterpret_cast<const float*>(shared_at(s.at.map)) + g;
    const int blocks = columns / kBlock, shift = s.nested_shift;
    const float* nested;
    float offset;
    int top_block;
    const auto rows_of_tile = [&] {
      nested = reinterpret_cast<const float*>(shared_at(s.at.nested)) + local * kNestedOfTile;
      const DecodeTile& tile = tile_at(local);
      top_block = tile.nested_before + row * blocks;
      offset = part_at(tile.part).nested_offset;
    };
    rows_of_tile();
#pragma unroll 1
    for (; left > 0; --left) {
      uint4 own[4];
      stream.take(own, last_product);
      const int from = 2 * row + unit % kScaledUnits / 4;
      const unsigned of_unit = unit % 4 < 2 ? (unit % 4 == 0 ? scales.of[0] : scales.of[1]) : (unit % 4 == 2 ? scales.of[2] : scales.of[3]);
      const unsigned absmax[2] = {__shfl_sync(0xffffffff, of_unit, from), __shfl_sync(0xffffffff, of_unit, from + 16)};
      const int block = top_block + unit * kGroupBlocks;
      const float nested_of[2] = {nested[block >> shift], nested[block + 8 * blocks >> shift]};
      const auto scale = [&](int half, int of_group) {
        const float value = map[(absmax[half] >> 8 * of_group & 255) * kMapCopies];
        return __fadd_rn(__fmul_rn(value, nested_of[half]), offset);
      };
      GroupSums<MP> sums;
#pragma unroll
      for (int run = 0; run < 2; ++run) {
        load(unit * 512 + run * 256);
        unsigned top[16], bottom[16];
        look_up_words<false>(own[run], table, top);
        look_up_words<false>(own[2 + run], table, bottom);
        sums.template multiply_run<T>(run, t, top, bottom, x);
        sums.scale_run(run, t, acc, scale);
      }
      ++unit;
      const bool over = unit == units;
      if (over || left == 1) put_sums(slot, acc);
      if (left == 1) continue;
      if (over) {
        unit = 0;
        ++local;
        rows_of_tile();
      }
      if (unit % kScaledUnits == 0) {
        if (kAhead) {
          scales = next_scales;
          fetch_next();
        } else {
          fetch_scales(scales, local, unit);
        }
      }
    }
  }

  __device__ __forceinline__ void run() {
    if (warp == kDecodeWarps) {
      if (this->normed()) {
        const float own = this->rstd_of_lane();
        if (lane % 4 == 0 && lane / 4 < MP) this->rstd(lane / 4) = own;
        __syncwarp();
      }
      multiply_by_a();
      // While it waits for the others: what attention of the next layer reads.
      if (phase == kDown && last_product % kPhases == kQkv) {
        prefetch_rows(s, 2 * s.at.layers + static_cast<int>(sizeof(DecodeLayer)) - this->layer_at, lane);
      }
    } else if (left > 0) {
      if constexpr (kWide) {
        multiply_wide();
      } else if constexpr (kNf4) {
        s.x_shared[phase] ? multiply_nf4<true>() : multiply_nf4<false>();
      } else {
        s.x_shared[phase] ? multiply_dense<true>() : multiply_dense<false>();
      }
    }
    __syncthreads();
  }

  // Row `row` of a local tile and column c: the product, LoRA and the bias.
  __device__ __forceinline__ float value(int local, int row, int c) const {
    const DecodeTile& tile = tile_at(local);
    const float* slot = reinterpret_cast<const float*>(shared_at(s.at.slots)) + tile.first_slot * kSlot + c * kSumStride + row;
    float value = 0;
#pragma unroll 2
    for (int k = 0; k < tile.slots; ++k, slot += kSlot) value += *slot;
    if (this->normed()) value *= this->rstd(c);
    // Zero of a part without LoRA.
    if (s.a_pieces[phase] > 0) value += lora_sums(local)[c * kLoraStride + row];
    if (s.biased[phase]) {
      const void* const bias = layer().bias[phase];
      if (bias != nullptr) value += to_float(static_cast<const T*>(bias)[tile.out + row]);
    }
    return value;
  }

  // A warp has the rows of a tile, of gate and up of two, and two columns of x at a time; of one column gate and up of a pair of tiles.
  static constexpr int kColumnPairs = (MP + 1) / 2;
  __device__ __forceinline__ int turns() const { return (count >> (phase == kGateUp)) * kColumnPairs; }
  __device__ __forceinline__ int column_of(int turn) const { return turn % kColumnPairs * 2 + (MP > 1 ? lane / kTileRows : 0); }
  __device__ __forceinline__ int64_t output(int turn) const {
    const int width = phase == kQkv ? (s.H + 2 * s.K) * s.D : phase == kGateUp ? s.F : s.C;
    return int64_t{column_of(turn)} * width + tile_at(turn / kColumnPairs << (phase == kGateUp)).out + lane % kTileRows;
  }
  __device__ __forceinline__ bool has_output(int turn) const { return column_of(turn) < s.M && (MP > 1 || lane < kTileRows); }

  // What o and down add to what comes behind them: both have the same rows of it in a thread block, and so it never leaves.
  __device__ __forceinline__ float& residual(int local, int row, int c) const {
    return reinterpret_cast<float*>(shared_at(s.at.residual))[(local * MP + c) * kTileRows + row];
  }
  // That of the first layer.
  __device__ __forceinline__ void load_residual() {
    const int own_thread = thread_number();
    phase = kO;
#pragma unroll 1
    for (int i = own_thread; i < share(kO).count * MP * kTileRows; i += kDecodeThreads) {
      const int row = i % kTileRows, c = i / kTileRows % MP, local = i / kTileRows / MP;
      if (c < s.M) residual(local, row, c) = to_float(static_cast<const T*>(s.x)[int64_t{c} * s.C + tile_at(local).out + row]);
    }
  }

  // to [M, width] = the product, plus the residual of o and down; of gate and up their activation.
  __device__ __forceinline__ void finish(void* to) const {
    const int all = turns(), row = lane % kTileRows;
#pragma unroll 1
    for (int turn = warp; turn < all; turn += kDecodeWarps + 1) {
      const bool pair = phase == kGateUp;
      const int local = turn / kColumnPairs << pair, c = column_of(turn);
      if (MP > 1 && c >= s.M) continue;
      float v = value(local + (MP == 1 && pair ? lane / kTileRows : 0), row, c);
      if (pair) {
        // Rounded as what stands in memory elsewhere.
        const float up = to_float(from_float<T>(MP == 1 ? __shfl_down_sync(0xffffffff, v, kTileRows) : value(local + 1, row, c)));
        v = activated(s.activation, make_float4(to_float(from_float<T>(v)), 0, 0, 0)).x * up;
      } else {
        if (phase != kQkv) v += residual(local, row, c);
      }
      const T rounded = from_float<T>(v);
      if (has_output(turn)) {
        if (phase == kO || phase == kDown) residual(local, row, c) = to_float(rounded);
        static_cast<T*>(to)[output(turn)] = rounded;
      }
    }
  }
};

}  // namespace
}  // namespace ferrotune
