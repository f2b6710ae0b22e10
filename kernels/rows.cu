// y = x W^T + bias + scale (x A^T) B^T + residual for at most 64 rows of x: the products of decoding.
// Fuses the dequantisation of NF4 weights, the product, both products of LoRA and three sums; plain libtorch writes the
// weights out in 16 bits first and launches seven kernels. Moves: W once, 0.516 bytes an element of NF4 or 2 in 16 bits; x and
// y are small, and x comes from the caches.
//
// W stands on the rows of m16n8k16 products and x on their columns, so one row of x costs what eight do. An NF4 byte is two
// neighbours of a row: a table of 256 pairs in 16 bits, one copy for each lane, gives a register of the product at one access
// without conflicts. The products of a block of 64 are summed by themselves and then multiplied by its scale in f32. (The
// training path rounds map * scale to 16 bits, this one the map: one rounding a weight in both.)
//
// Work is cut into units, 64 columns of a tile of rows. Few rows of x: a block a tile. More: every block has the same number of
// units in a row (stream-K, arXiv:2301.03598); of a tile that several blocks share, each leaves its sums in the workspace, and
// the last to come adds them in the order of the blocks. The rows of A are the first tiles; the blocks that finish a tile of W
// wait for the products with A then, which are under way since before their own.
#include "chain.cuh"
#include "mma.cuh"

namespace ferrotune {
namespace {

constexpr int kBlock = 64, kMostRank = 64, kMostColumns = 64;

// Two tiles a thread block that need a sum, in the workspace behind the counters and the products with A.
constexpr int64_t kCounterBytes = 64 * 1024;
constexpr int64_t kZBytes = int64_t{3} * kMostRank * kMostColumns * 4;

struct Plan {
  KernelRows rows;
  int a_tiles[3], w_tiles[3];
  int all_a_tiles, blocks, units, per;  // blocks: units of a tile; per: units of a thread block
  int shift[3], nested_shift[3];        // log2 of the block sizes
};

struct Workspace {
  char* base;
  __device__ int* a_ready() const { return reinterpret_cast<int*>(base); }
  __device__ int* left() const { return reinterpret_cast<int*>(base) + 1; }
  __device__ int* arrived(int tile) const { return reinterpret_cast<int*>(base) + 2 + tile; }
  // Of row j of all A, column c.
  __device__ float* z(int j, int c) const { return reinterpret_cast<float*>(base + kCounterBytes) + j * kMostColumns + c; }
  __device__ float* sums(int block, bool second, int elements) const {
    return reinterpret_cast<float*>(base + kCounterBytes + kZBytes) + (int64_t{2} * block + second) * elements;
  }
};

__device__ inline uint2 load_once(const uint2* from) {
  uint2 v;
  asm volatile("ld.global.nc.L1::no_allocate.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(from));
  return v;
}
__device__ inline uint4 load_once(const uint4* from) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(from));
  return v;
}

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

// Weights of 4 bits; see KernelNf4.
template <int RT, int U>
struct Nf4Rows {
  static constexpr bool kScaled = true, kAhead = true;
  static constexpr int kUnits = U;
  struct Stage {
    uint2 packed[RT][2][U];
    // Of unit t % U, which the lanes of a row share.
    float nested[RT][2];
    uint8_t index[RT][2];
  };
  const uint8_t* packed;
  RowOffsets<RT> at;
  const KernelNf4& nf4;
  const unsigned* table;
  int64_t first;
  int shift, nested_shift;

  __device__ Nf4Rows(const Plan& plan, int part, const unsigned* pairs, int64_t first_row)
      : at(first_row, plan.rows.parts[part].rows, plan.rows.K / 2), nf4(plan.rows.parts[part].nf4),
        table(pairs + threadIdx.x % 32), shift(plan.shift[part]), nested_shift(plan.nested_shift[part]) {
    const int64_t rows = plan.rows.parts[part].rows;
    first = (first_row < rows ? first_row : rows - 1) * plan.rows.K;
    packed = nf4.packed + first / 2 + threadIdx.x % 4 * 8;
  }

  __device__ void load(Stage& s, int unit, int end) const {
    const int t = threadIdx.x % 4 % U;
#pragma unroll
    for (int r = 0; r < RT; ++r) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
#pragma unroll
        for (int u = 0; u < U; ++u) {
          if (unit + u < end) {
            s.packed[r][h][u] = load_once(reinterpret_cast<const uint2*>(packed + at.row[r][h] + (unit + u) * (kBlock / 2)));
          }
        }
        const int64_t block = (first + int64_t{2} * at.row[r][h] + int64_t{unit + t} * kBlock) >> shift;
        if (unit + t >= end) continue;
        if (nf4.nested_absmax == nullptr) {
          s.nested[r][h] = static_cast<const float*>(nf4.absmax)[block];
        } else {
          s.index[r][h] = static_cast<const uint8_t*>(nf4.absmax)[block];
          s.nested[r][h] = nf4.nested_absmax[block >> nested_shift];
        }
      }
    }
  }

  __device__ float scale(const Stage& s, int r, int h, int u) const {
    float mine = s.nested[r][h];
    if (nf4.nested_absmax != nullptr) {
      mine = __fadd_rn(__fmul_rn(nf4.nested_quant_map[s.index[r][h]], mine), nf4.nested_offset);
    }
    return __shfl_sync(0xffffffff, mine, u, 4);
  }

  __device__ void pairs(const Stage& s, int r, int h, int u, unsigned (&out)[8]) const {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      out[j] = table[(s.packed[r][h][u].x >> 8 * j & 255) * 32];
      out[4 + j] = table[(s.packed[r][h][u].y >> 8 * j & 255) * 32];
    }
  }
};

// A 16-bit matrix.
template <typename T, int RT, int U>
struct DenseRows {
  static constexpr bool kScaled = false, kAhead = RT < 4;
  static constexpr int kUnits = U;
  struct Stage {
    uint4 v[RT][2][U][2];
  };
  const char* base;
  RowOffsets<RT> at;

  __device__ DenseRows(const void* w, int64_t stride, int64_t first_row, int64_t rows)
      : base(static_cast<const char*>(w) + (first_row < rows ? first_row : rows - 1) * stride * 2 + threadIdx.x % 4 * 32),
        at(first_row, rows, stride * 2) {}

  __device__ void load(Stage& s, int unit, int end) const {
#pragma unroll
    for (int r = 0; r < RT; ++r) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
#pragma unroll
        for (int u = 0; u < U; ++u) {
          if (unit + u >= end) continue;
          const auto* from = reinterpret_cast<const uint4*>(base + at.row[r][h] + (unit + u) * (kBlock * 2));
          s.v[r][h][u][0] = load_once(from);
          s.v[r][h][u][1] = load_once(from + 1);
        }
      }
    }
  }

  __device__ void pairs(const Stage& s, int r, int h, int u, unsigned (&out)[8]) const {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const uint4 v = s.v[r][h][u][j];
      out[4 * j] = v.x, out[4 * j + 1] = v.y, out[4 * j + 2] = v.z, out[4 * j + 3] = v.w;
    }
  }
};

// A matrix in f32, rounded to T.
template <typename T, int RT>
struct FloatRows {
  static constexpr bool kScaled = false, kAhead = false;
  static constexpr int kUnits = 1;
  struct Stage {
    unsigned v[RT][2][8];
  };
  const char* base;
  RowOffsets<RT> at;

  __device__ FloatRows(const void* w, int64_t stride, int64_t first_row, int64_t rows)
      : base(static_cast<const char*>(w) + (first_row < rows ? first_row : rows - 1) * stride * 4 + threadIdx.x % 4 * 64),
        at(first_row, rows, stride * 4) {}

  __device__ void load(Stage& s, int unit, int end) const {
    if (unit >= end) return;
#pragma unroll
    for (int r = 0; r < RT; ++r) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const auto* from = reinterpret_cast<const float4*>(base + at.row[r][h] + unit * (kBlock * 4));
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const float4 v = from[j];
          s.v[r][h][2 * j] = pack(v.x, v.y, T{});
          s.v[r][h][2 * j + 1] = pack(v.z, v.w, T{});
        }
      }
    }
  }

  __device__ void pairs(const Stage& s, int r, int h, int, unsigned (&out)[8]) const {
#pragma unroll
    for (int j = 0; j < 8; ++j) out[j] = s.v[r][h][j];
  }
};

// Columns of x: eight for each n, of which this lane has column g, elements 16 t .. of each unit.
template <typename T>
struct Columns {
  const T* x;
  int64_t stride;
  int count;  // of x's rows

  // Half `half` of the pairs of tile n.
  __device__ uint4 load(int n, int unit, int half) const {
    const int column = 8 * n + threadIdx.x % 32 / 4;
    if (column >= count) return make_uint4(0, 0, 0, 0);
    return *reinterpret_cast<const uint4*>(x + column * stride + unit * kBlock + threadIdx.x % 4 * 16 + 8 * half);
  }
};

// acc += W x^T over units [begin, end) of this warp's rows. Where it is kAhead, the weights of the next units are under way while
// these are multiplied, and `stage` holds the first already.
template <typename T, int RT, int NT, typename Rows>
__device__ inline void accumulate(float (&acc)[RT][NT][4], const Rows& rows, typename Rows::Stage& stage,
                                  const Columns<T>& x, int begin, int end) {
  constexpr int U = Rows::kUnits;
#pragma unroll 1
  for (int unit = begin; unit < end; unit += U) {
    typename Rows::Stage next;
    if constexpr (Rows::kAhead) {
      rows.load(next, unit + U, end);
    } else {
      rows.load(stage, unit, end);
    }
#pragma unroll
    for (int u = 0; u < U; ++u) {
      if (unit + u >= end) break;
      uint4 columns[NT][2];
#pragma unroll
      for (int n = 0; n < NT; ++n) {
        columns[n][0] = x.load(n, unit + u, 0);
        columns[n][1] = x.load(n, unit + u, 1);
      }
#pragma unroll
      for (int r = 0; r < RT; ++r) {
        unsigned top[8], bottom[8];
        rows.pairs(stage, r, 0, u, top);
        rows.pairs(stage, r, 1, u, bottom);
        const auto multiply_all = [&](float (&c)[NT][4]) {
#pragma unroll
          for (int p = 0; p < 8; p += 2) {
            const unsigned a[4] = {top[p], bottom[p], top[p + 1], bottom[p + 1]};
#pragma unroll
            for (int n = 0; n < NT; ++n) {
              const uint4 v = columns[n][p / 4];
              multiply(c[n], a, p % 4 == 0 ? v.x : v.z, p % 4 == 0 ? v.y : v.w, T{});
            }
          }
        };
        if constexpr (Rows::kScaled) {
          float part[NT][4] = {};
          multiply_all(part);
          const float above = rows.scale(stage, r, 0, u), below = rows.scale(stage, r, 1, u);
#pragma unroll
          for (int n = 0; n < NT; ++n) {
            acc[r][n][0] += above * part[n][0];
            acc[r][n][1] += above * part[n][1];
            acc[r][n][2] += below * part[n][2];
            acc[r][n][3] += below * part[n][3];
          }
        } else {
          multiply_all(acc[r]);
        }
      }
    }
    if constexpr (Rows::kAhead) stage = next;
  }
}

// A warp has 16 RT rows and 8 NT columns; a thread block WR of these below each other, and WK that share their units.
template <typename T, int RT, int NT, int WR, int WK>
__global__ void __launch_bounds__(32 * WR * WK, RT == 1 ? 16 / WK : 1) rows_kernel(const __grid_constant__ Plan plan) {
  constexpr int kThreads = 32 * WR * WK;
  constexpr int kTile = 16 * RT * WR, kColumns = 8 * NT, kStride = kTile + 4, kElements = kTile * kColumns;
  constexpr int kEach = kElements > kThreads ? kElements / kThreads : 1;
  static_assert(kThreads % kTile == 0, "a thread finishes columns of one row");
  extern __shared__ float4 shared[];
  float* const red = reinterpret_cast<float*>(shared);      // [WK, columns, kStride]
  float* const z = red + WK * kColumns * kStride;           // [columns, kMostRank]
  unsigned* const table = reinterpret_cast<unsigned*>(z + kColumns * kMostRank);  // [256, 32]
  __shared__ int flag;

  const KernelRows& p = plan.rows;
  const Workspace workspace{static_cast<char*>(p.workspace)};
  const int warp = threadIdx.x / 32, wk = warp % WK, wr = warp / WK, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const Columns<T> x{static_cast<const T*>(p.x), p.x_stride, static_cast<int>(p.M)};
  const float* table_of = nullptr;
  bool ready = false;
  const auto wait = [&] {
    if (!ready) inputs_ready();
    ready = true;
  };
  next_may_start();

  int unit = blockIdx.x * plan.per;
  const int last_unit = min(unit + plan.per, plan.units);
  while (unit < last_unit) {
    const int tile = unit / plan.blocks, begin = unit - tile * plan.blocks, end = min(plan.blocks, begin + last_unit - unit);
    unit += end - begin;
    // Which matrix, and where.
    int local = tile, part = 0, a_rows = 0;
    const bool of_a = tile < plan.all_a_tiles;
    if (!of_a) local -= plan.all_a_tiles;
    const int* const tiles = of_a ? plan.a_tiles : plan.w_tiles;
    int64_t out_row = 0;
    while (local >= tiles[part]) {
      local -= tiles[part];
      out_row += p.parts[part].rows;
      a_rows += static_cast<int>(p.parts[part].R);
      ++part;
    }
    const KernelRowsPart& w = p.parts[part];
    const int64_t rows = of_a ? w.R : w.rows, tile_row = int64_t{local} * kTile, warp_row = tile_row + 16 * RT * wr;
    const int each = (end - begin + WK - 1) / WK, from = min(begin + wk * each, end), to = min(from + each, end);

    float acc[RT][NT][4] = {};
    if (!of_a && w.w == nullptr) {
      using Rows = Nf4Rows<RT, RT == 1 ? 4 : RT == 2 ? 2 : 1>;
      const Rows source(plan, part, table, warp_row);
      typename Rows::Stage stage;
      source.load(stage, from, to);
      if (table_of != w.nf4.quant_map) {
        // All warps have left the table: they met at the sums of the tile before.
        table_of = w.nf4.quant_map;
        for (int i = threadIdx.x; i < 256 * 32; i += kThreads) {
          table[i] = pack(table_of[i >> 9], table_of[i >> 5 & 15], T{});
        }
        __syncthreads();
      }
      wait();
      accumulate<T>(acc, source, stage, x, from, to);
    } else if (!of_a || !w.lora_f32) {
      using Rows = DenseRows<T, RT, RT == 1 ? 2 : 1>;
      const Rows source(of_a ? w.a : w.w, of_a ? p.K : w.w_stride, warp_row, rows);
      typename Rows::Stage stage;
      if constexpr (Rows::kAhead) source.load(stage, from, to);
      wait();
      accumulate<T>(acc, source, stage, x, from, to);
    } else {
      using Rows = FloatRows<T, RT>;
      const Rows source(w.a, p.K, warp_row, rows);
      typename Rows::Stage stage;
      if constexpr (Rows::kAhead) source.load(stage, from, to);
      wait();
      accumulate<T>(acc, source, stage, x, from, to);
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
      float* const mine = workspace.sums(blockIdx.x, begin == 0, kElements);
#pragma unroll
      for (int i = 0; i < kEach; ++i) __stcg(mine + i * kThreads + threadIdx.x, value[i]);
      __threadfence();
      __syncthreads();
      const int first_block = tile * plan.blocks / plan.per;
      const int last_block = ((tile + 1) * plan.blocks - 1) / plan.per;
      if (threadIdx.x == 0) {
        flag = atomicAdd(workspace.arrived(tile), 1) == last_block - first_block;
        if (flag) *workspace.arrived(tile) = 0;
      }
      __syncthreads();
      if (!flag) continue;
      __threadfence();
#pragma unroll
      for (int i = 0; i < kEach; ++i) value[i] = 0;
      for (int block = first_block; block <= last_block; ++block) {
        const float* const theirs = workspace.sums(block, block == first_block, kElements);
#pragma unroll
        for (int i = 0; i < kEach; ++i) value[i] += __ldcg(theirs + i * kThreads + threadIdx.x);
      }
    }

    const bool inside = tile_row + row < rows;
    if (of_a) {
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        if (inside && column(i) < kColumns) __stcg(workspace.z(a_rows + static_cast<int>(tile_row) + row, column(i)), value[i]);
      }
      __threadfence();
      __syncthreads();
      if (threadIdx.x == 0) atomicAdd(workspace.a_ready(), 1);
      continue;
    }
    if (w.a != nullptr) {
      if (threadIdx.x == 0) {
        const volatile int* const done = workspace.a_ready();
        while (*done < plan.all_a_tiles) {}
        __threadfence();
      }
      __syncthreads();
      const int rank = static_cast<int>(w.R);
      for (int i = threadIdx.x; i < kColumns * kMostRank; i += kThreads) {
        const int j = i / kColumns, c = i % kColumns;
        z[c * kMostRank + j] = j < rank ? w.scale * __ldcg(workspace.z(a_rows + j, c)) : 0;
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
  // The last block leaves the counters as it found them. Nobody waits any more.
  if (threadIdx.x == 0 && plan.all_a_tiles > 0 && atomicAdd(workspace.left(), 1) == static_cast<int>(gridDim.x) - 1) {
    *workspace.a_ready() = 0;
    *workspace.left() = 0;
  }
}

// ---- launchers

template <typename T, int RT, int NT, int WR, int WK>
int launch(const KernelRows& rows, void* stream) {
  constexpr int kTile = 16 * RT * WR, kColumns = 8 * NT;
  Plan plan{rows, {}, {}, 0, static_cast<int>(rows.K / kBlock), 0, 0, {}, {}};
  bool nf4 = false;
  int tiles = 0;
  for (int64_t i = 0; i < rows.count; ++i) {
    const KernelRowsPart& part = rows.parts[i];
    nf4 = nf4 || part.w == nullptr;
    while (part.nf4.blocksize >> (plan.shift[i] + 1) > 0) ++plan.shift[i];
    while (part.nf4.nested_blocksize >> (plan.nested_shift[i] + 1) > 0) ++plan.nested_shift[i];
    plan.a_tiles[i] = part.a == nullptr ? 0 : static_cast<int>(ceil_div(part.R, kTile));
    plan.w_tiles[i] = static_cast<int>(ceil_div(part.rows, kTile));
    plan.all_a_tiles += plan.a_tiles[i];
    tiles += plan.a_tiles[i] + plan.w_tiles[i];
  }
  plan.units = tiles * plan.blocks;
  plan.per = plan.blocks;
  if (RT > 1) plan.per = static_cast<int>(ceil_div(plan.units, device_attribute(cudaDevAttrMultiProcessorCount)));
  const size_t shared = (WK * kColumns * (kTile + 4) + kColumns * kMostRank + (nf4 ? 256 * 32 : 0)) * sizeof(float);
  const auto kernel = rows_kernel<T, RT, NT, WR, WK>;
  const int error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
  if (error != cudaSuccess) return error;
  return launch_chained(kernel, dim3(static_cast<unsigned>(ceil_div(plan.units, plan.per))), dim3(32 * WR * WK), shared, stream, plan);
}

template <typename T>
int launch(const KernelRows& rows, void* stream) {
  if (rows.M <= 8) {
    // Two thread blocks of 8 warps, or four of 4, are on a processor: all tiles at once, where they can be.
    int64_t tiles = 0;
    for (int64_t i = 0; i < rows.count; ++i) tiles += ceil_div(rows.parts[i].rows, 16) + ceil_div(rows.parts[i].R, 16);
    const bool few = tiles <= 2 * device_attribute(cudaDevAttrMultiProcessorCount);
    return few ? launch<T, 1, 1, 1, 8>(rows, stream) : launch<T, 1, 1, 1, 4>(rows, stream);
  }
  bool nf4 = false;
  for (int64_t i = 0; i < rows.count; ++i) nf4 = nf4 || rows.parts[i].w == nullptr;
  if (rows.M > 32) return launch<T, 2, 8, 4, 2>(rows, stream);
  if (rows.M > 16) return nf4 ? launch<T, 4, 4, 2, 4>(rows, stream) : launch<T, 2, 4, 4, 2>(rows, stream);
  return nf4 ? launch<T, 4, 2, 2, 4>(rows, stream) : launch<T, 2, 2, 4, 2>(rows, stream);
}

}  // namespace
}  // namespace ferrotune

using namespace ferrotune;

extern "C" int64_t rows_linear_workspace(const KernelRows* rows) {
  constexpr int64_t kShared = 160 * 1024, kMostTiles = kCounterBytes / 4 - 2;
  bool fits = rows->M <= kMostColumns && rows->K % kBlock == 0 && rows->x_stride % 8 == 0 && aligned16(rows->x) &&
              (rows->dtype == KERNEL_BF16 || rows->dtype == KERNEL_F16);
  int64_t tiles = 0;
  for (int64_t i = 0; i < rows->count; ++i) {
    const KernelRowsPart& part = rows->parts[i];
    tiles += ceil_div(part.rows, 16) + ceil_div(part.R, 16);
    fits = fits && part.R <= kMostRank && (part.a == nullptr || aligned16(part.a));
    // Offsets within a tile have 32 bits.
    if (part.w != nullptr) {
      fits = fits && part.w_stride % 8 == 0 && aligned16(part.w) && part.w_stride < (1 << 22);
    } else {
      fits = fits && part.nf4.blocksize >= kBlock && reinterpret_cast<uintptr_t>(part.nf4.packed) % 8 == 0;
    }
  }
  fits = fits && tiles * (rows->K / kBlock) < (int64_t{1} << 31) && (rows->M <= 8 || ceil_div(tiles, 8) + 6 <= kMostTiles) &&
         device_attribute(cudaDevAttrComputeCapabilityMajor) >= 8 &&
         device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin) >= kShared;
  if (!fits) return 0;
  return kCounterBytes + kZBytes + int64_t{2} * device_attribute(cudaDevAttrMultiProcessorCount) * 128 * kMostColumns * 4;
}

extern "C" int rows_linear(const KernelRows* rows, void* stream) {
  if (rows->M == 0) return cudaSuccess;
  if (rows->dtype == KERNEL_BF16) return launch<__nv_bfloat16>(*rows, stream);
  return rows->dtype == KERNEL_F16 ? launch<__half>(*rows, stream) : static_cast<int>(cudaErrorInvalidValue);
}
