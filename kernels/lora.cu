// LoRA's gradients towards its input and its B (arXiv:2106.09685), all parts of one projection in one launch:
//   g = s dY B [N, R]      dB = s dY^T Z [rows, R]
// Fuses both products, which read dY once, the parts, the scale and the casts. cuBLAS needs two products a part and splits
// each over its inner dimension, for which it clears memory, and writes and reads f32 partial sums in launches of their own.
// Must move dY once, 2 N rows bytes; the rest is smaller by rows / R and N / R. So it is bound by memory as long as shared
// memory keeps up, where each element of dY is written once and read twice, and B and Z once for each 16 rows or columns.
//
// The two sums run over different dimensions. A tile of dY is kRows tokens of kColumns columns; the tiles are in order, down a
// stripe of columns first, and each thread block takes an equal run of them. It adds up dB of its stripe in registers, and
// writes it where it leaves the stripe; g of a tile is complete for these columns and is written at once. A second kernel
// adds these partial sums in their order: no atomics, the same bits every time.
#include "fill.cuh"
#include "mma.cuh"

namespace ferrotune {
namespace {

constexpr int kWarps = 8, kThreads = 32 * kWarps;
constexpr int kRows = 16 * kWarps;   // of a tile: a warp has 16 of them for g
constexpr int kPiece = 16 * kWarps;  // columns that are copied at once: a warp has 16 of them for dB
constexpr int kPieces = 4;           // of a tile. More make fewer partial sums of g and take R registers a thread each two
constexpr int kColumns = kPieces * kPiece;
constexpr int kStages = 3, kAhead = kStages - 1;
static_assert(kAhead <= kPieces, "z of the tile after the next would overwrite that of this one");

// The work, and where partial sums are.
struct Plan {
  KernelLora lora;
  int row_tiles, stripes, blocks;
  float* g;   // [stripes, N, R]
  float* db;  // [blocks + stripes, kColumns, R]: those of block b for stripe s are at b + s, which no other pair has

  // The first tile of a block; the block of a tile.
  __device__ int first(int block) const {
    return static_cast<int>(static_cast<int64_t>(row_tiles) * stripes * block / blocks);
  }
  __device__ int block_of(int tile) const {
    return static_cast<int>(((tile + int64_t{1}) * blocks - 1) / (static_cast<int64_t>(row_tiles) * stripes));
  }
};

__host__ __device__ inline int stripes_of(const KernelLoraPart& part) {
  return static_cast<int>((part.rows + kColumns - 1) / kColumns);
}

// ---- device

// The part of a stripe, and its first column there.
struct Stripe {
  int part, column;

  __device__ Stripe(const Plan& plan, int stripe) : part(0) {
    for (int stripes; stripe >= (stripes = stripes_of(plan.lora.parts[part])); ++part) stripe -= stripes;
    column = stripe * kColumns;
  }
};

// Addresses of fragments are a few registers, made once, and constants: an address that is computed for each fragment costs
// more than the fragment.
template <typename T, int R>
__global__ void __launch_bounds__(kThreads, 1) gradients_kernel(const __grid_constant__ Plan plan) {
#if __CUDA_ARCH__ >= 800
  constexpr int kRowBytes = kPiece * sizeof(T), kStageBytes = kRows * kRowBytes, kFactorBytes = R * sizeof(T);
  constexpr int kCopyRows = kThreads * 16 / kRowBytes;  // that all threads copy at once
  extern __shared__ __align__(128) char shared[];
  T* const stages = reinterpret_cast<T*>(shared);
  const Tile<T, R> b{stages + kStages * kRows * kPiece};
  const Tile<T, R> z_tiles{b.base + kColumns * R};

  const KernelLora& lora = plan.lora;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, row = lane / 4, column = lane % 4 * 2;
  const int begin = plan.first(blockIdx.x), end = plan.first(blockIdx.x + 1);

  // Of a stage: dY [16, 16] of this warp's rows at columns 16 k (as A: 2 k pieces of 16 bytes on, which the swizzle of Tile turns
  // within eight pieces), and of this warp's columns at rows 16 k (as A of dY^T).
  const unsigned stage0 = shared_address(stages);
  unsigned rows_at[4], factor_at[R / 16];
#pragma unroll
  for (int k = 0; k < 4; ++k) rows_at[k] = shared_address(Tile<T, kPiece>{stages}.at(16 * warp + lane % 16, 2 * k + lane / 16)) - stage0;
  const unsigned columns_at = shared_address(Tile<T, kPiece>{stages}.at(lane % 8 + lane / 16 * 8, 2 * warp + lane / 8 % 2)) - stage0;
  // Of B and of Z: [16, 16] at rows 0 and columns 16 j.
#pragma unroll
  for (int j = 0; j < R / 16; ++j) factor_at[j] = shared_address(b.at(lane % 16, 2 * j + lane / 16)) - shared_address(b.base);

  // What this thread copies of the tile whose copy is under way: columns `piece` on of rows kCopyRows apart.
  const int copy_row = threadIdx.x / (kPiece / 8), copy_piece = threadIdx.x % (kPiece / 8);
  const unsigned copy_at = shared_address(Tile<T, kPiece>{stages}.at(copy_row, copy_piece)) - stage0;
  const int64_t copy_step = kCopyRows * lora.dy_stride;
  const T* copy_from = nullptr;
  int copy_rows_left = 0, copy_columns_left = 0;
  bool copying = false;
  const auto start_copy = [&](int tile, int piece, int stage) {
    if (piece == 0) {
      copying = tile < end;
      if (copying) {
        const int s = tile / plan.row_tiles, first = (tile - s * plan.row_tiles) * kRows;
        const Stripe at(plan, s);
        const KernelLoraPart& part = lora.parts[at.part];
        const int rows_left = static_cast<int>(lora.N - first);
        copy_from = static_cast<const T*>(part.dy) + (first + copy_row) * lora.dy_stride + at.column + copy_piece * 8;
        copy_rows_left = rows_left - copy_row;
        copy_columns_left = static_cast<int>(part.rows) - at.column - copy_piece * 8;
        copy_rows<kThreads, kRows>(Tile<T, R>{z_tiles.base + tile % 2 * kRows * R},
                                   static_cast<const T*>(part.z) + first * lora.z_stride, lora.z_stride, rows_left, part.R);
      }
    }
    if (copying) {
      const unsigned to = stage0 + stage * kStageBytes + copy_at;
      const bool inside = piece * kPiece < copy_columns_left;
      const T* from = copy_from + piece * kPiece;
#pragma unroll
      for (int i = 0; i < kRows / kCopyRows; ++i) {
        copy_16_bytes(to + i * kCopyRows * kRowBytes, from, inside && i * kCopyRows < copy_rows_left);
        from += copy_step;
      }
    }
    commit_copies();
  };

  float g[R / 8][4] = {}, db[kPieces][R / 8][4] = {};
#pragma unroll
  for (int piece = 0; piece < kAhead; ++piece) start_copy(begin, piece, piece);
  int stage = 0, stripe = -1;
  for (int tile = begin; tile < end; ++tile) {
    if (tile / plan.row_tiles != stripe) {
      stripe = tile / plan.row_tiles;
      const Stripe at(plan, stripe);
      const KernelLoraPart& part = lora.parts[at.part];
      __syncthreads();
      copy_rows<kThreads, kColumns>(b, static_cast<const T*>(part.b) + at.column * part.R, part.R, part.rows - at.column,
                                    part.R);
      commit_copies();
      wait_copies<0>();
    }
    const unsigned b_at = shared_address(b.base), z_at = shared_address(z_tiles.base) + tile % 2 * kRows * kFactorBytes;
#pragma unroll
    for (int piece = 0; piece < kPieces; ++piece) {
      wait_copies<kAhead - 1>();
      __syncthreads();
      start_copy(tile + (piece + kAhead) / kPieces, (piece + kAhead) % kPieces, stage == 0 ? kAhead : stage - 1);
      const unsigned dy_at = stage0 + stage * kStageBytes;
      stage = stage + 1 == kStages ? 0 : stage + 1;
      unsigned fa[4], fb[4];
#pragma unroll
      for (int k = 0; k < kPiece / 16; ++k) {
        load_matrices(fa, dy_at + rows_at[k % 4] + k / 4 * 128);
#pragma unroll
        for (int j = 0; j < R / 16; ++j) {
          load_matrices_transposed(fb, b_at + factor_at[j] + (piece * kPiece + 16 * k) * kFactorBytes);
          multiply(g[2 * j], fa, fb[0], fb[1], T{});
          multiply(g[2 * j + 1], fa, fb[2], fb[3], T{});
        }
      }
#pragma unroll
      for (int k = 0; k < kRows / 16; ++k) {
        load_matrices_transposed(fa, dy_at + columns_at + 16 * k * kRowBytes);
#pragma unroll
        for (int j = 0; j < R / 16; ++j) {
          load_matrices_transposed(fb, z_at + factor_at[j] + 16 * k * kFactorBytes);
          multiply(db[piece][2 * j], fa, fb[0], fb[1], T{});
          multiply(db[piece][2 * j + 1], fa, fb[2], fb[3], T{});
        }
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t n = static_cast<int64_t>(tile - stripe * plan.row_tiles) * kRows + 16 * warp + row + 8 * half;
      float* const to = plan.g + (stripe * lora.N + n) * R + column;
#pragma unroll
      for (int j = 0; j < R / 8; ++j) {
        if (n < lora.N) *reinterpret_cast<float2*>(to + 8 * j) = make_float2(g[j][2 * half], g[j][2 * half + 1]);
        g[j][2 * half] = g[j][2 * half + 1] = 0;
      }
    }
    if (tile + 1 < end && (tile + 1) / plan.row_tiles == stripe) continue;
    float* const to = plan.db + static_cast<int64_t>(blockIdx.x + stripe) * kColumns * R;
#pragma unroll
    for (int piece = 0; piece < kPieces; ++piece) {
#pragma unroll
      for (int j = 0; j < R / 8; ++j) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int c = piece * kPiece + 16 * warp + row + 8 * half;
          float(&sum)[4] = db[piece][j];
          *reinterpret_cast<float2*>(to + c * R + 8 * j + column) = make_float2(sum[2 * half], sum[2 * half + 1]);
          sum[2 * half] = sum[2 * half + 1] = 0;
        }
      }
    }
  }
#endif
}

// scale (from[0] + from[step] + ..), `count` of them.
__device__ inline float4 sum_of(const float* from, int64_t step, int count, float scale) {
  float4 sum = make_float4(0, 0, 0, 0);
#pragma unroll 8
  for (int i = 0; i < count; ++i) {
    const float4 v = *reinterpret_cast<const float4*>(from + i * step);
    sum = make_float4(sum.x + v.x, sum.y + v.y, sum.z + v.z, sum.w + v.w);
  }
  return make_float4(scale * sum.x, scale * sum.y, scale * sum.z, scale * sum.w);
}

// Four neighbours a thread: of g of the parts in the grid's first rows, of dB in the others.
template <typename T, int R>
__global__ void __launch_bounds__(128) sums_kernel(const __grid_constant__ Plan plan) {
  const KernelLora& lora = plan.lora;
  const int count = static_cast<int>(lora.count), p = blockIdx.y % count;
  const KernelLoraPart& part = lora.parts[p];
  int stripe = 0;
  for (int before = 0; before < p; ++before) stripe += stripes_of(lora.parts[before]);
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (static_cast<int>(blockIdx.y) < count) {
    const int64_t quads = (part.R + (p + 1 == count ? lora.zeros : 0)) / 4, n = i / quads, r = i % quads * 4;
    if (n >= lora.N) return;
    float4 sum = make_float4(0, 0, 0, 0);
    if (r < part.R) sum = sum_of(plan.g + (stripe * lora.N + n) * R + r, lora.N * R, stripes_of(part), part.scale);
    const Vector<T, 4> out{{from_float<T>(sum.x), from_float<T>(sum.y), from_float<T>(sum.z), from_float<T>(sum.w)}};
    store<4>(static_cast<T*>(part.g) + n * lora.g_stride + r, 0, out);
    return;
  }
  const int64_t quads = part.R / 4, c = i / quads, r = i % quads * 4;
  if (c >= part.rows) return;
  stripe += static_cast<int>(c / kColumns);
  const int first = plan.block_of(stripe * plan.row_tiles), last = plan.block_of((stripe + 1) * plan.row_tiles - 1);
  const float* const from = plan.db + (static_cast<int64_t>(first + stripe) * kColumns + c % kColumns) * R + r;
  reinterpret_cast<float4*>(part.db)[i] = sum_of(from, kColumns * R, last - first + 1, part.scale);
}

// kWidth neighbours a thread.
template <typename T, int kWidth>
__global__ void fill_kernel(const __grid_constant__ Fills fills) {
  fill_matrix<T, kWidth>(fills.matrices[blockIdx.y], blockIdx.x * blockDim.x + threadIdx.x, gridDim.x * blockDim.x);
}

// ---- launchers

// Calls body(Width<R>{}) with the largest rank rounded up to a multiple of 16.
template <typename Body>
int64_t with_rank(const KernelLora& lora, Body&& body) {
  int64_t rank = 0;
  for (int64_t p = 0; p < lora.count; ++p) rank = lora.parts[p].R > rank ? lora.parts[p].R : rank;
  return rank <= 16 ? body(Width<16>{}) : body(Width<32>{});
}

int attribute(cudaDeviceAttr which) {
  int device = 0, value = 0;
  if (cudaGetDevice(&device) == cudaSuccess) cudaDeviceGetAttribute(&value, which, device);
  return value;
}

template <int R>
constexpr int kSharedBytes = (kStages * kRows * kPiece + kColumns * R + 2 * kRows * R) * 2;

template <int R>
Plan plan_of(const KernelLora& lora, float* workspace) {
  const int processors = attribute(cudaDevAttrMultiProcessorCount);
  Plan plan{lora, static_cast<int>(ceil_div(lora.N, kRows)), 0, processors, workspace, nullptr};
  for (int64_t p = 0; p < lora.count; ++p) plan.stripes += stripes_of(lora.parts[p]);
  const int64_t tiles = static_cast<int64_t>(plan.row_tiles) * plan.stripes;
  if (tiles < plan.blocks) plan.blocks = static_cast<int>(tiles);
  plan.db = workspace + plan.stripes * lora.N * R;
  return plan;
}

template <typename T, int R>
int launch(const Plan& plan, cudaStream_t stream) {
  const auto kernel = gradients_kernel<T, R>;
  int error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes<R>);
  if (error != cudaSuccess) return error;
  kernel<<<plan.blocks, kThreads, kSharedBytes<R>, stream>>>(plan);
  error = cudaGetLastError();
  if (error != cudaSuccess) return error;
  const KernelLora& lora = plan.lora;
  int64_t quads = 0;
  for (int64_t p = 0; p < lora.count; ++p) {
    const int64_t g = lora.N * (lora.parts[p].R + lora.zeros) / 4, db = lora.parts[p].rows * lora.parts[p].R / 4;
    quads = quads > g ? quads : g;
    quads = quads > db ? quads : db;
  }
  const dim3 grid(grid_x(ceil_div(quads, 128)), static_cast<unsigned>(2 * lora.count));
  sums_kernel<T, R><<<grid, 128, 0, stream>>>(plan);
  return cudaGetLastError();
}

}  // namespace
}  // namespace ferrotune

using namespace ferrotune;

extern "C" int fill(const KernelFill* matrices, int64_t count, int dtype, void* stream) {
  Fills fills{};
  if (count > KERNEL_MOST_FILLS) return cudaErrorInvalidValue;
  return with_type(dtype, [&](auto t) -> int {
    using T = decltype(t);
    constexpr int kWidth = 16 / sizeof(T);
    int64_t largest = 0;
    bool fits = true;
    for (int64_t i = 0; i < count; ++i) {
      const KernelFill& m = fills.matrices[i] = matrices[i];
      largest = m.rows * m.columns > largest ? m.rows * m.columns : largest;
      fits = fits && fills_by<T, kWidth>(m);
    }
    if (largest == 0) return cudaSuccess;
    if (largest >> 31 != 0) return cudaErrorInvalidValue;
    const int64_t width = fits ? kWidth : 1;
    const dim3 grid(grid_x(ceil_div(largest / width, 256)), static_cast<unsigned>(count));
    const auto kernel = fits ? fill_kernel<T, kWidth> : fill_kernel<T, 1>;
    kernel<<<grid, 256, 0, static_cast<cudaStream_t>(stream)>>>(fills);
    return cudaGetLastError();
  });
}

extern "C" int64_t lora_gradients_workspace(const KernelLora* lora) {
  return with_rank(*lora, [&](auto rank) -> int64_t {
    constexpr int R = decltype(rank)::value;
    const bool fits = attribute(cudaDevAttrComputeCapabilityMajor) >= 8 &&
                      attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin) >= kSharedBytes<R>;
    if (!fits) return 0;
    const Plan plan = plan_of<R>(*lora, nullptr);
    return plan.stripes * lora->N * R + static_cast<int64_t>(plan.blocks + plan.stripes) * kColumns * R;
  });
}

extern "C" int lora_gradients(const KernelLora* lora, float* workspace, void* stream) {
  if (lora->N == 0 || lora->count == 0) return cudaSuccess;
  return static_cast<int>(with_rank(*lora, [&](auto rank) -> int64_t {
    constexpr int R = decltype(rank)::value;
    const Plan plan = plan_of<R>(*lora, workspace);
    const auto to = static_cast<cudaStream_t>(stream);
    if (lora->dtype == KERNEL_BF16) return launch<__nv_bfloat16, R>(plan, to);
    return lora->dtype == KERNEL_F16 ? launch<__half, R>(plan, to) : static_cast<int>(cudaErrorInvalidValue);
  }));
}
