// defines: launch_many: 9 to 64 rows of x. The products with A come from a launch of their own; then every thread block has the same
// number of units (stream-K, arXiv:2301.03598).
#pragma once

#include "rows.cuh"

namespace ferrotune {
namespace {

// Where the rows of a warp's tiles start: row 16 r + 8 h + g of the warp, the last row of the matrix for those behind it.
// Lane (g, t) has columns 16 t .. 16 t + 15 of each unit, as eight pairs.
template <int RT>
struct RowOffsets {
  unsigned row[RT][2];
  __device__ RowOffsets(int64_t first, int64_t rows, int64_t row_bytes) {
#pragma unroll
    for (int r = 0; r < RT; ++r) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int64_t at = first + 16 * r + 8 * h + threadIdx.x % 32 / 4;
        row[r][h] = static_cast<unsigned>(((at < rows ? at : rows - 1) - (first < rows ? first : rows - 1)) * row_bytes);
      }
    }
  }
};

// Weights of 4 bits; see KernelNf4. A warp's units come through a ring of its own in shared memory: what is under way takes no
// registers.
template <int RT>
struct Nf4Rows {
  static constexpr int kRing = 4, kUnitBytes = 16 * RT * 32;
  const uint8_t* packed;
  unsigned copied[RT];    // row this lane copies a piece of, for each of RT
  RowOffsets<RT> at;
  const KernelNf4& nf4;
  unsigned table, ring;   // shared addresses: this lane's copy of the pairs, this warp's ring
  int64_t first;
  int nested_shift;

  __device__ Nf4Rows(const Plan& plan, int part, unsigned pairs, unsigned ring_address, int64_t first_row)
      : at(first_row, plan.rows.parts[part].rows, plan.rows.K / 2), nf4(plan.rows.parts[part].nf4),
        table(pairs + threadIdx.x % 32 * 4), ring(ring_address), nested_shift(plan.nested_shift[part]) {
    const int64_t rows = plan.rows.parts[part].rows, start = first_row < rows ? first_row : rows - 1;
    first = start * plan.rows.K;
    packed = nf4.packed + first / 2;
#pragma unroll
    for (int r = 0; r < RT; ++r) {
      const int64_t row = start + 16 * r + threadIdx.x % 32 / 2;
      copied[r] = static_cast<unsigned>(((row < rows ? row : rows - 1) - start) * (plan.rows.K / 2)) + threadIdx.x % 2 * 16;
    }
  }

  // Starts the copy of a unit, if there is one, into a slot: row after row, 32 bytes each.
  __device__ void fetch(int unit, int end, int slot) const {
    if (unit < end) {
#pragma unroll
      for (int r = 0; r < RT; ++r) {
        copy_16_bytes(ring + slot * kUnitBytes + r * 512 + threadIdx.x % 32 * 16, packed + copied[r] + unit * (kBlock / 2), true);
      }
    }
    commit_copies();
  }

  __device__ uint2 packed_pairs(int slot, int r, int h) const {
    uint2 v;
    asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];"
                 : "=r"(v.x), "=r"(v.y)
                 : "r"(ring + slot * kUnitBytes + (16 * r + 8 * h) * 32 + threadIdx.x % 32 * 8));
    return v;
  }

  // What the scales of four units are made of: lane t has those of unit + t, if that is before end.
  struct Scales {
    float nested[RT][2];
    unsigned index[RT][2];
  };
  __device__ void load(Scales& s, int unit, int end) const {
    const int own = min(unit + static_cast<int>(threadIdx.x % 4), end - 1);
#pragma unroll
    for (int r = 0; r < RT; ++r) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int64_t block = (first + int64_t{2} * at.row[r][h] + int64_t{own} * kBlock) / kBlock;
        if (nf4.nested_absmax == nullptr) {
          s.nested[r][h] = static_cast<const float*>(nf4.absmax)[block];
        } else {
          s.index[r][h] = static_cast<const uint8_t*>(nf4.absmax)[block];
          s.nested[r][h] = nf4.nested_absmax[block >> nested_shift];
        }
      }
    }
  }
  __device__ float scale(const Scales& s, int r, int h) const {
    if (nf4.nested_absmax == nullptr) return s.nested[r][h];
    return __fadd_rn(__fmul_rn(nf4.nested_quant_map[s.index[r][h]], s.nested[r][h]), nf4.nested_offset);
  }
};

// A 16-bit matrix.
template <typename T, int RT>
struct DenseRows {
  struct Stage {
    uint4 v[RT][2][2];
  };
  const char* base;
  RowOffsets<RT> at;

  __device__ DenseRows(const void* w, int64_t stride, int64_t first_row, int64_t rows)
      : base(static_cast<const char*>(w) + (first_row < rows ? first_row : rows - 1) * stride * 2 + threadIdx.x % 4 * 32),
        at(first_row, rows, stride * 2) {}

  __device__ void load(Stage& s, int unit) const {
#pragma unroll
    for (int r = 0; r < RT; ++r) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const auto* from = reinterpret_cast<const uint4*>(base + at.row[r][h] + unit * (kBlock * 2));
        s.v[r][h][0] = load_once(from);
        s.v[r][h][1] = load_once(from + 1);
      }
    }
  }
};

// Columns of x: eight for each n, of which this lane has column g, elements 16 t .. of each unit. Columns that x does not have
// are its last again: nobody reads what becomes of them.
template <typename T, int NT>
struct Columns {
  const T* x;
  unsigned column[NT];

  __device__ Columns(const void* from, int64_t stride, int count) : x(static_cast<const T*>(from) + threadIdx.x % 4 * 16) {
#pragma unroll
    for (int n = 0; n < NT; ++n) {
      column[n] = static_cast<unsigned>(min(8 * n + static_cast<int>(threadIdx.x) % 32 / 4, count - 1) * stride);
    }
  }
  // Half `half` of the pairs of a unit.
  __device__ void load(uint4 (&to)[NT], int unit, int half) const {
#pragma unroll
    for (int n = 0; n < NT; ++n) to[n] = *reinterpret_cast<const uint4*>(x + column[n] + unit * kBlock + 8 * half);
  }
};

// acc += W x^T over units [begin, end) of this warp's rows, of which the first four are under way.
template <typename T, int RT, int NT>
__device__ __forceinline__ void accumulate_nf4(float (&acc)[RT][NT][4], const Nf4Rows<RT>& rows, typename Nf4Rows<RT>::Scales& next,
                                               const Columns<T, NT>& x, int begin, int end) {
#pragma unroll 1
  for (int first = begin; first < end; first += 4) {
    float mine[RT][2];
#pragma unroll
    for (int r = 0; r < RT; ++r) {
      mine[r][0] = rows.scale(next, r, 0);
      mine[r][1] = rows.scale(next, r, 1);
    }
    if (first + 4 < end) rows.load(next, first + 4, end);
#pragma unroll
    for (int u = 0; u < 4; ++u) {
      uint4 columns[NT];
      if (first + u < end) x.load(columns, first + u, 0);
      wait_copies<3>();
      __syncwarp();
      uint2 bytes[RT][2];
#pragma unroll
      for (int r = 0; r < RT; ++r) {
        bytes[r][0] = rows.packed_pairs(u, r, 0);
        bytes[r][1] = rows.packed_pairs(u, r, 1);
      }
      __syncwarp();
      rows.fetch(first + u + 4, end, u);
      if (first + u >= end) continue;
      float part[RT][NT][4] = {};
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        if (half == 1) x.load(columns, first + u, 1);
#pragma unroll
        for (int r = 0; r < RT; ++r) {
          unsigned top[4], bottom[4];
          look_up(half == 0 ? bytes[r][0].x : bytes[r][0].y, rows.table, top);
          look_up(half == 0 ? bytes[r][1].x : bytes[r][1].y, rows.table, bottom);
#pragma unroll
          for (int pair = 0; pair < 4; pair += 2) {
            const unsigned a[4] = {top[pair], bottom[pair], top[pair + 1], bottom[pair + 1]};
#pragma unroll
            for (int n = 0; n < NT; ++n) {
              multiply(part[r][n], a, pair == 0 ? columns[n].x : columns[n].z, pair == 0 ? columns[n].y : columns[n].w, T{});
            }
          }
        }
      }
#pragma unroll
      for (int r = 0; r < RT; ++r) {
        const float above = __shfl_sync(0xffffffff, mine[r][0], u, 4), below = __shfl_sync(0xffffffff, mine[r][1], u, 4);
#pragma unroll
        for (int n = 0; n < NT; ++n) {
          acc[r][n][0] += above * part[r][n][0];
          acc[r][n][1] += above * part[r][n][1];
          acc[r][n][2] += below * part[r][n][2];
          acc[r][n][3] += below * part[r][n][3];
        }
      }
    }
  }
}

// The same for weights that are not quantised: those of the next unit are under way while these are multiplied, and `stage` holds
// the first already.
template <typename T, int RT, int NT>
__device__ __forceinline__ void accumulate_dense(float (&acc)[RT][NT][4], const DenseRows<T, RT>& rows,
                                                 typename DenseRows<T, RT>::Stage& stage, const Columns<T, NT>& x, int begin, int end) {
#pragma unroll 1
  for (int unit = begin; unit < end; ++unit) {
    typename DenseRows<T, RT>::Stage next;
    if (unit + 1 < end) rows.load(next, unit + 1);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint4 columns[NT];
      x.load(columns, unit, half);
#pragma unroll
      for (int r = 0; r < RT; ++r) {
        const uint4 top = stage.v[r][0][half], bottom = stage.v[r][1][half];
        const unsigned first[4] = {top.x, bottom.x, top.y, bottom.y}, second[4] = {top.z, bottom.z, top.w, bottom.w};
#pragma unroll
        for (int n = 0; n < NT; ++n) {
          multiply(acc[r][n], first, columns[n].x, columns[n].y, T{});
          multiply(acc[r][n], second, columns[n].z, columns[n].w, T{});
        }
      }
    }
    stage = next;
  }
}

// A warp has 16 RT rows and 8 NT columns; a thread block WR of these below each other, and WK that share their units.
template <typename T, bool kNf4, int RT, int NT, int WR, int WK>
__global__ void __launch_bounds__(32 * WR * WK, NT <= 4 ? 2 : 1) rows_kernel(const __grid_constant__ Plan plan) {
#if __CUDA_ARCH__ >= 800
  constexpr int kThreads = 32 * WR * WK;
  constexpr int kTile = 16 * RT * WR, kColumns = 8 * NT, kStride = kTile + 4, kElements = kTile * kColumns;
  constexpr int kEach = kElements > kThreads ? kElements / kThreads : 1;
  static_assert(kThreads % kTile == 0, "a thread finishes columns of one row");
  extern __shared__ float4 shared[];
  float* const red = reinterpret_cast<float*>(shared);      // [WK, columns, kStride]
  float* const z = red + WK * kColumns * kStride;           // [columns, kMostRank]
  uint4* const pairs = reinterpret_cast<uint4*>(z + kColumns * kMostRank);  // [256, 32 lanes]
  const unsigned table = shared_address(pairs);
  const unsigned ring = table + 256 * 32 * 4 + threadIdx.x / 32 * (Nf4Rows<RT>::kRing * Nf4Rows<RT>::kUnitBytes);
  __shared__ int flag;

  const KernelRows& p = plan.rows;
  const Workspace workspace{static_cast<char*>(p.workspace)};
  const int warp = threadIdx.x / 32, wk = warp % WK, wr = warp / WK, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const Columns<T, NT> x(p.x, p.x_stride, static_cast<int>(p.M));
  const float* table_of = nullptr;
  bool ready = false;
  const auto wait = [&] {
    if (!ready) inputs_ready();
    ready = true;
  };
  next_may_start();

  int unit = static_cast<int>(blockIdx.x) * plan.per;
  const int last_unit = min(unit + plan.per, plan.units);
  while (unit < last_unit) {
    const int tile = unit / plan.blocks, begin = unit - tile * plan.blocks, end = min(plan.blocks, begin + last_unit - unit);
    unit += end - begin;
    // Which matrix, and where.
    int local = tile, part = 0, a_tile = 0;
    int64_t out_row = 0;
    while (local >= plan.w_tiles[part]) {
      local -= plan.w_tiles[part];
      out_row += p.parts[part].rows;
      a_tile += plan.a_tiles[part];
      ++part;
    }
    const KernelRowsPart& w = p.parts[part];
    const int64_t rows = w.rows, tile_row = int64_t{local} * kTile, warp_row = tile_row + 16 * RT * wr;
    if (w.b != nullptr && static_cast<int>(threadIdx.x) < kTile && tile_row + threadIdx.x < rows) {
      // Needed at the end.
      const char* const b = static_cast<const char*>(w.b) + (tile_row + threadIdx.x) * w.R * (w.lora_f32 ? 4 : 2);
      asm volatile("prefetch.global.L2 [%0];" ::"l"(b));
    }
    const int each = (end - begin + WK - 1) / WK, to = min(begin + (wk + 1) * each, end);
    int at = min(begin + wk * each, end);

    float acc[RT][NT][4] = {};
    if constexpr (kNf4) {
      using Rows = Nf4Rows<RT>;
      const Rows source(plan, part, table, ring, warp_row);
#pragma unroll
      for (int slot = 0; slot < Rows::kRing; ++slot) source.fetch(at + slot, to, slot);
      typename Rows::Scales scales;
      if (at < to) source.load(scales, at, to);
      if (table_of != w.nf4.quant_map) {
        // All warps have left the table: they met at the sums of the tile before.
        table_of = w.nf4.quant_map;
        fill_table<T, kThreads>(pairs, table_of);
      }
      wait();
      accumulate_nf4<T>(acc, source, scales, x, at, to);
    } else {
      const DenseRows<T, RT> source(w.w, w.w_stride, warp_row, rows);
      typename DenseRows<T, RT>::Stage stage;
      if (at < to) source.load(stage, at);
      wait();
      accumulate_dense<T>(acc, source, stage, x, at, to);
    }

#pragma unroll
    for (int r = 0; r < RT; ++r) {
      const int row = 16 * (wr * RT + r) + g;
#pragma unroll
      for (int n = 0; n < NT; ++n) {
        float* const to_columns = red + (wk * kColumns + 8 * n + 2 * t) * kStride + row;
        to_columns[0] = acc[r][n][0];
        to_columns[kStride] = acc[r][n][1];
        to_columns[8] = acc[r][n][2];
        to_columns[kStride + 8] = acc[r][n][3];
      }
    }
    __syncthreads();
    const int row = threadIdx.x % kTile;
    const auto column = [&](int i) { return static_cast<int>(threadIdx.x / kTile) + i * (kThreads / kTile); };
    float value[kEach];
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      value[i] = 0;
      if (kElements < kThreads && column(i) >= kColumns) continue;
#pragma unroll
      for (int k = 0; k < WK; ++k) value[i] += red[(k * kColumns + column(i)) * kStride + row];
    }
    __syncthreads();

    if (end - begin < plan.blocks) {
      // In part: the last of the thread blocks that share the tile adds up.
      float* const mine = workspace.sums(static_cast<int>(blockIdx.x), begin == 0, kElements);
#pragma unroll
      for (int i = 0; i < kEach; ++i) __stcg(mine + i * kThreads + threadIdx.x, value[i]);
      __threadfence();
      __syncthreads();
      const int first_block = tile * plan.blocks / plan.per, last_block = ((tile + 1) * plan.blocks - 1) / plan.per;
      if (threadIdx.x == 0) {
        flag = atomicAdd(workspace.arrived(tile), 1) == last_block - first_block;
        if (flag) *workspace.arrived(tile) = 0;
      }
      __syncthreads();
      if (!flag) continue;
      __threadfence();
#pragma unroll
      for (int i = 0; i < kEach; ++i) value[i] = 0;
      for (int other = first_block; other <= last_block; ++other) {
        const float* const theirs = workspace.sums(other, other == first_block, kElements);
#pragma unroll
        for (int i = 0; i < kEach; ++i) value[i] += __ldcg(theirs + i * kThreads + threadIdx.x);
      }
    }

    const bool inside = tile_row + row < rows;
    if (w.a != nullptr) {
      const int rank = static_cast<int>(w.R);
      for (int i = threadIdx.x; i < kColumns * ((rank + 15) / 16 * 16); i += kThreads) {
        const int j = i / kColumns, c = i % kColumns;
        float sum = 0;
        if (j < rank && c < p.M) {
          sum = workspace.z(plan, a_tile, j, c);
        }
        z[c * kMostRank + j] = w.scale * sum;
      }
      __syncthreads();
      for (int first = 0; first < rank; first += 16) {
        float b[16];
#pragma unroll
        for (int j = 0; j < 16; ++j) {
          const int64_t at = (tile_row + row) * rank + first + j;
          const bool known = inside && first + j < rank;
          b[j] = !known ? 0 : w.lora_f32 ? to_float(from_float<T>(static_cast<const float*>(w.b)[at])) : to_float(static_cast<const T*>(w.b)[at]);
        }
#pragma unroll
        for (int i = 0; i < kEach; ++i) {
          if (column(i) >= kColumns) continue;
          const float* const zs = z + column(i) * kMostRank + first;
#pragma unroll
          for (int j = 0; j < 16; ++j) value[i] += b[j] * zs[j];
        }
      }
    }
    const int64_t to_row = out_row + tile_row + row;
    const float bias = inside && p.bias != nullptr ? to_float(static_cast<const T*>(p.bias)[to_row]) : 0;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      if (!inside || column(i) >= p.M) continue;
      float v = value[i] + bias;
      if (p.residual != nullptr) v += to_float(static_cast<const T*>(p.residual)[column(i) * p.residual_stride + to_row]);
      const int64_t at = column(i) * p.y_stride + to_row;
      if (p.y_f32) {
        static_cast<float*>(p.y)[at] = v;
      } else {
        static_cast<T*>(p.y)[at] = from_float<T>(v);
      }
    }
  }
  wait();
#endif
}
// x A^T for rows_kernel.
template <typename T>
__global__ void __launch_bounds__(32 * kWarps) a_kernel(const __grid_constant__ Plan plan) {
#if __CUDA_ARCH__ >= 800
  __shared__ float sums[kWarps][kEight * kSumStride];
  next_may_start();
  inputs_ready();
  share_of_a<T>(plan, Workspace{static_cast<char*>(plan.rows.workspace)}, sums, blockIdx.x, blockIdx.y);
#endif
}

template <typename T, bool kNf4, int RT, int NT, int WR, int WK>
int launch_many(const KernelRows& rows, void* stream) {
  constexpr int kTile = 16 * RT * WR, kColumns = 8 * NT;
  bool nf4;
  int tiles;
  Plan plan = plan_of(rows, kTile, nf4, tiles);
  plan.units = tiles * plan.blocks;
  plan.per = static_cast<int>(ceil_div(plan.units, (NT <= 4 ? 2 : 1) * device_attribute(cudaDevAttrMultiProcessorCount)));
  if (plan.a_blocks > 0) {
    const dim3 grid(static_cast<unsigned>(plan.a_blocks), static_cast<unsigned>(plan.eights));
    const int error = launch_with(a_kernel<T>, grid, 32 * kWarps, 0, stream, plan);
    if (error != cudaSuccess) return error;
  }
  const size_t shared = (WK * kColumns * (kTile + 4) + kColumns * kMostRank + (kNf4 ? 256 * 32 : 0)) * sizeof(float) +
                        (kNf4 ? WR * WK * Nf4Rows<RT>::kRing * Nf4Rows<RT>::kUnitBytes : 0);
  const dim3 grid(static_cast<unsigned>(ceil_div(plan.units, plan.per)));
  return launch_with(rows_kernel<T, kNf4, RT, NT, WR, WK>, grid, 32 * WR * WK, shared, stream, plan);
}

template <typename T, bool kNf4>
int launch_many(const KernelRows& rows, void* stream) {
  if (rows.M > 32) return launch_many<T, kNf4, 2, 8, 4, 2>(rows, stream);
  return rows.M > 16 ? launch_many<T, kNf4, 2, 4, 4, 2>(rows, stream) : launch_many<T, kNf4, 2, 2, 4, 2>(rows, stream);
}

}  // namespace
}  // namespace ferrotune
