// LoRA's first product (arXiv:2106.09685) of some hundred rows at most, all parts of one projection: z = scale x A^T [N, rank of all parts], in
// one launch with what `fill` does and, on Hopper and newer, with the norm that makes x:
//   lora_z      x as it is
//   rms_norm_z  x and rstd as kernels/rms_norm.cu makes them, to the bit; K from 1056 to 4096
// Either z goes behind x and scale B behind W, and the projection itself adds LoRA (csrc/lora.h), or kernels/lora_add.cu adds it afterwards.
// Fuses the casts of A and B, the scale and the parts, for which libtorch launches five kernels a part, and the norm's own launch. Moves: A and B
// once and x once, which lora_z reads and rms_norm_z writes, having read as much to make it; the norm in a launch of its own is 2 N K bytes more.
// All of it is for the time before the projection: a kernel starts while the one before still runs, and asks for A, B and the norm's weight before
// that has ended.
//
// z is a sum over K of few numbers: on Hopper eight thread blocks of a cluster have a share of K each and add their sums up in order through
// each other's shared memory; elsewhere one block has all. x goes from registers into the products: of 32 columns of K lane t of a row has
// columns 8 t .. 8 t + 7 for its products, whose columns may stand in any order as long as x and A agree.
//
// Measured on an H200 by graph replay, LoRA in bf16 (*: in f32): us that norm and z add between a small kernel and the projection, two launches -> one. K 4096
// and rank 48, scale B of 6,144 rows: 7.8 -> 7.5 of 65 rows, 11.0 -> 9.5 of 256 *, 12.7 -> 9.8 of 300, 16.0 -> 14.8 of 512. 256 rows and rank 32:
// 18.5 -> 17.4 * (K 4096, scale B of 28,672 rows), 10.9 -> 7.6 (K 2048, 8,192 rows).
//
// Tried, too, and slower than two launches: rows of K 8192 with four units a warp, 11.3 -> 18.2; the activation and z of 256 rows, K 14,336, by
// clusters of 16 rows, 11.8 -> 20.9, as exponentials and divisions are bound by the few thread blocks that these are. All ranks from 8 to 64 lost.
#include "chain.cuh"
#include "cluster.cuh"
#include "fill.cuh"
#include "mma.cuh"
#include "rms.cuh"

namespace ferrotune {
namespace {

constexpr int kWarps = 8, kThreads = 32 * kWarps, kMostRank = 64;
constexpr int kDepth = 32, kBlocks = 8;  // columns of x that a warp has at once; thread blocks that share K
constexpr int kFillTiles = 16;           // times kBlocks thread blocks more, which fill
constexpr int kNormedRows = 16;          // of a thread block that makes x

// Of all parts.
__host__ __device__ inline int rank_of(const KernelLoraAdd& lora) {
  int64_t rank = 0;
  for (int64_t p = 0; p < lora.count; ++p) rank += lora.parts[p].R;
  return static_cast<int>(rank);
}

// What rms_norm_forward is given.
struct Normed {
  const void *x, *weight;
  float* rstd;
  int64_t x_stride;
  float eps, offset;
  int weight_f32;
};

// ---- device

// What a lane takes of A: row g of each run of eight, and of each unit of kDepth columns its own. A run is of one part, so that a warp has its
// place but once.
template <typename T, int kTiles>
struct RowsOfA {
  const char* runs[kTiles];
  int64_t of_lane;
  bool f32;

  __device__ explicit RowsOfA(const KernelLoraAdd& lora) : f32(lora.parts[0].f32 != 0) {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, bytes = f32 ? 4 : 2;
    of_lane = (g * lora.K + 8 * t) * bytes;
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
      int64_t row = 8 * j;
      int p = 0;
      while (p + 1 < lora.count && row >= lora.parts[p].R) row -= lora.parts[p++].R;
      // Behind the last one nobody looks.
      row = row < lora.parts[p].R ? row : 0;
      runs[j] = static_cast<const char*>(lora.parts[p].a) + row * lora.K * bytes;
    }
  }

  __device__ void load(uint4 (&to)[kTiles], int unit) const {
    const int64_t at = of_lane + static_cast<int64_t>(unit) * kDepth * (f32 ? 4 : 2);
    if (!f32) {
#pragma unroll
      for (int j = 0; j < kTiles; ++j) to[j] = load_early(runs[j] + at);
      return;
    }
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
      to[j] = pack_words<T>(load_early(runs[j] + at), load_early(runs[j] + at + 16));
    }
  }
};

// acc += x A^T of a unit; top and bottom: eight columns of rows g and g + 8.
template <typename T, int kTiles>
__device__ inline void multiply_unit(float (&acc)[kTiles][4], uint4 top, uint4 bottom, const uint4 (&a)[kTiles]) {
  const unsigned low[4] = {top.x, bottom.x, top.y, bottom.y}, high[4] = {top.z, bottom.z, top.w, bottom.w};
#pragma unroll
  for (int j = 0; j < kTiles; ++j) {
    multiply(acc[j], low, a[j].x, a[j].y, T{});
    multiply(acc[j], high, a[j].z, a[j].w, T{});
  }
}

// z of the block's rows: the sums of warps, then those of the cluster's blocks, and `between` while these come. Warp w has rows
// 16 (w % kRowWarps) ...
template <typename T, int kRowWarps, int kTiles, typename Between>
__device__ inline void sum_up(const float (&acc)[kTiles][4], const KernelLoraAdd& lora, int64_t first_row, Between&& between) {
  constexpr int kDepthWarps = kWarps / kRowWarps, kTile = 16 * kRowWarps, kColumns = 8 * kTiles, kPairs = kTile * kColumns / 2;
  __shared__ __align__(16) float sums[kDepthWarps][kTile][kColumns];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int split = static_cast<int>(blockIdx.x), splits = static_cast<int>(gridDim.x);
#pragma unroll
  for (int j = 0; j < kTiles; ++j) {
    float* const to = &sums[warp / kRowWarps][16 * (warp % kRowWarps) + g][8 * j + 2 * t];
    *reinterpret_cast<float2*>(to) = make_float2(acc[j][0], acc[j][1]);
    *reinterpret_cast<float2*>(to + 8 * kColumns) = make_float2(acc[j][2], acc[j][3]);
  }
  __syncthreads();
  float* const own = &sums[0][0][0];
#pragma unroll
  for (int i = threadIdx.x; i < kPairs; i += kThreads) {
    float2 sum = *reinterpret_cast<const float2*>(own + 2 * i);
#pragma unroll
    for (int w = 1; w < kDepthWarps; ++w) {
      const float2 v = *reinterpret_cast<const float2*>(own + w * 2 * kPairs + 2 * i);
      sum.x += v.x, sum.y += v.y;
    }
    *reinterpret_cast<float2*>(own + 2 * i) = sum;
  }
  if (splits > 1) {
    arrive_at_cluster();
    between();
    wait_for_cluster();
  } else {
    between();
    __syncthreads();
  }
  const int rank = rank_of(lora);
  for (int i = split * kThreads + static_cast<int>(threadIdx.x); i < kPairs; i += splits * kThreads) {
    const int row = 2 * i / kColumns, column = 2 * i % kColumns;
    if (first_row + row >= lora.N || column >= rank) continue;
    float2 sum = make_float2(0, 0), of_block[kBlocks];
#pragma unroll
    for (int block = 0; block < kBlocks; ++block) {
      of_block[block] = make_float2(0, 0);
      if (block < splits) of_block[block] = of_cluster(reinterpret_cast<const float2*>(own) + i, block, splits);
    }
#pragma unroll
    for (int block = 0; block < kBlocks; ++block) sum.x += of_block[block].x, sum.y += of_block[block].y;
    int p = 0;
    int64_t of_part = column;
    for (; of_part >= lora.parts[p].R; ++p) of_part -= lora.parts[p].R;
    const float scale = lora.parts[p].scale;
    T* const to = static_cast<T*>(lora.z) + (first_row + row) * lora.z_stride + lora.parts[p].z_first + of_part;
    *reinterpret_cast<unsigned*>(to) = pack(scale * sum.x, scale * sum.y, T{});
  }
  if (splits > 1) leave_cluster();
}

// Whether this block stands behind the `tiles` of x; it has then filled its share.
template <typename T>
__device__ inline bool fills_instead(const Fills& fills, int tiles) {
  if (static_cast<int>(blockIdx.y) < tiles) return false;
  const unsigned block = (blockIdx.y - tiles) * gridDim.x + blockIdx.x, blocks = (gridDim.y - tiles) * gridDim.x;
  EightsToFill<T> share(fills, block * kThreads + threadIdx.x, blocks * kThreads);
  share.ask();
  inputs_ready();
  while (share.write()) share.ask();
  return true;
}

// kTile rows of x; kTiles: runs of eight columns of z. The grid's first dimension is a cluster, which shares K; in the second the `tiles` of x
// come before those who fill.
template <typename T, int kTile, int kTiles>
__global__ void __launch_bounds__(kThreads, kTile == 16 && kTiles <= 6 ? 2 : 1)
    z_kernel(const __grid_constant__ KernelLoraAdd lora, const __grid_constant__ Fills fills, int tiles) {
#if __CUDA_ARCH__ >= 800
  constexpr int kRowWarps = kTile / 16, kDepthWarps = kWarps / kRowWarps;
  next_may_start();
  if (fills_instead<T>(fills, tiles)) return;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int64_t first_row = static_cast<int64_t>(blockIdx.y) * kTile, own_row = first_row + 16 * (warp % kRowWarps) + g;
  const RowsOfA<T, kTiles> a(lora);
  const int units = static_cast<int>(lora.K / kDepth), step = static_cast<int>(gridDim.x) * kDepthWarps;
  int unit = static_cast<int>(blockIdx.x) * kDepthWarps + warp / kRowWarps;
  constexpr int kAhead = kTiles <= 2 ? 4 : 2;
  uint4 of_a[kAhead][kTiles], of_x[kAhead][2];
  const auto inside = [&](int of) { return of < units ? of : 0; };
#pragma unroll
  for (int turn = 0; turn < kAhead; ++turn) a.load(of_a[turn], inside(unit + turn * step));
  inputs_ready();
  const T* const x = static_cast<const T*>(lora.x) + 8 * t;
  const T* const above = x + (own_row < lora.N ? own_row : lora.N - 1) * lora.x_stride;
  const T* const below = x + (own_row + 8 < lora.N ? own_row + 8 : lora.N - 1) * lora.x_stride;
  const auto load_x = [&](uint4(&to)[2], int of) {
    to[0] = *reinterpret_cast<const uint4*>(above + static_cast<int64_t>(of) * kDepth);
    to[1] = *reinterpret_cast<const uint4*>(below + static_cast<int64_t>(of) * kDepth);
  };
#pragma unroll
  for (int turn = 0; turn < kAhead; ++turn) load_x(of_x[turn], inside(unit + turn * step));
  float acc[kTiles][4] = {};
  while (unit < units) {
#pragma unroll
    for (int turn = 0; turn < kAhead; ++turn) {
      if (unit < units) multiply_unit<T>(acc, of_x[turn][0], of_x[turn][1], of_a[turn]);
      if (unit + kAhead * step < units) a.load(of_a[turn], unit + kAhead * step), load_x(of_x[turn], unit + kAhead * step);
      unit += step;
    }
  }
  sum_up<T, kRowWarps>(acc, lora, first_row, [] {});
#endif
}

// Columns that rms_norm_z takes, one or two units a warp: row_threads is 64 times as many.
constexpr int64_t kUnitColumns = kBlocks * kWarps * kDepth, kLeastNormed = kUnitColumns / 2, kMostNormed = 2 * kUnitColumns;

// kNormedRows rows of a cluster, kUnits units a warp. rms_norm.cu's sums give the order: its thread i of a row has kForwardVectors vectors, i and
// then every kRowThreads-th, and here those of kOwn neighbouring threads are one block's.
template <typename T, int kTiles, int kUnits>
__global__ void __launch_bounds__(kThreads, kTiles <= 6 ? 2 : 1)
    norm_z_kernel(const __grid_constant__ KernelLoraAdd lora, const __grid_constant__ Fills fills, const __grid_constant__ Normed norm, int tiles) {
#if __CUDA_ARCH__ >= 900
  constexpr int kRowThreads = row_threads(kUnits * kUnitColumns / 8, kForwardVectors), kOwn = kRowThreads / kBlocks, kTurn = kOwn / 4;
  static_assert(kWarps * kUnits == kForwardVectors * kTurn, "units of a block are all of its vectors");
  __shared__ float of_vectors[kNormedRows][kForwardVectors * kOwn + 4], of_threads[kNormedRows][kOwn], of_rows[kNormedRows];
  next_may_start();
  if (fills_instead<T>(fills, tiles)) return;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, split = static_cast<int>(blockIdx.x);
  const int units = static_cast<int>(lora.K / kDepth);
  const int64_t first_row = static_cast<int64_t>(blockIdx.y) * kNormedRows, own_row = first_row + g;
  const auto unit_of = [&](int i) {
    const int own = warp + kWarps * i;
    return own / kTurn * (kBlocks * kTurn) + split * kTurn + own % kTurn;
  };
  const auto inside = [&](int i) { return unit_of(i) < units ? unit_of(i) : 0; };

  const RowsOfA<T, kTiles> a(lora);
  uint4 of_a[kUnits][kTiles], of_weight[kUnits][2];
#pragma unroll
  for (int i = 0; i < kUnits; ++i) {
    a.load(of_a[i], inside(i));
    const char* const from = static_cast<const char*>(norm.weight) + (inside(i) * kDepth + 8 * t) * (norm.weight_f32 ? 4 : 2);
    of_weight[i][0] = load_early(from);
    if (norm.weight_f32) of_weight[i][1] = load_early(from + 16);
  }
  inputs_ready();
  const auto row_at = [&](int half) { return own_row + 8 * half < lora.N ? own_row + 8 * half : lora.N - 1; };
  Vector<T, 8> x[kUnits][2];
#pragma unroll
  for (int i = 0; i < kUnits; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      x[i][half] = load<8>(static_cast<const T*>(norm.x) + row_at(half) * norm.x_stride, 4 * inside(i) + t);
    }
  }
#pragma unroll
  for (int i = 0; i < kUnits; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      keep_packed(x[i][half]);
      of_vectors[g + 8 * half][4 * (warp + kWarps * i) + t] = unit_of(i) < units ? squares(x[i][half]) : 0;
      keep_packed(x[i][half]);
    }
  }
  __syncthreads();
  const int row = threadIdx.x / 16, half_lane = threadIdx.x % 16;
  for (int i = half_lane; i < kOwn; i += 16) {
    float sum = 0;
#pragma unroll
    for (int turn = 0; turn < kForwardVectors; ++turn) sum += of_vectors[row][turn * kOwn + i];
    of_threads[row][i] = sum;
  }
  meet_cluster();
  float of_warps[kRowThreads / 32], sum = 0;
#pragma unroll
  for (int w = 0; w < kRowThreads / 32; ++w) {
    const auto of_thread = [&](int i) { return of_cluster(&of_threads[row][i % kOwn], i / kOwn, kBlocks); };
    of_warps[w] = of_thread(32 * w + half_lane) + of_thread(32 * w + 16 + half_lane);
  }
#pragma unroll
  for (int w = 0; w < kRowThreads / 32; ++w) {
#pragma unroll
    for (int step = 8; step > 0; step /= 2) of_warps[w] += __shfl_xor_sync(0xffffffff, of_warps[w], step);
    sum += of_warps[w];
  }
  if (half_lane == 0) {
    const float r = rsqrtf(sum / static_cast<float>(lora.K) + norm.eps);
    of_rows[row] = r;
    if (split == 0 && first_row + row < lora.N) norm.rstd[first_row + row] = r;
  }
  __syncthreads();

  float acc[kTiles][4] = {};
#pragma unroll
  for (int i = 0; i < kUnits; ++i) {
    if (unit_of(i) < units) {
      float w[8];
      const unsigned words[8] = {of_weight[i][0].x, of_weight[i][0].y, of_weight[i][0].z, of_weight[i][0].w,
                                 of_weight[i][1].x, of_weight[i][1].y, of_weight[i][1].z, of_weight[i][1].w};
#pragma unroll
      for (int c = 0; c < 8; ++c) {
        w[c] = norm.weight_f32 ? __uint_as_float(words[c]) : to_float(reinterpret_cast<const T*>(words)[c]);
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) x[i][half] = normed(x[i][half], w, of_rows[g + 8 * half], norm.offset);
      multiply_unit<T>(acc, reinterpret_cast<const uint4&>(x[i][0]), reinterpret_cast<const uint4&>(x[i][1]), of_a[i]);
    }
  }
  sum_up<T, 1>(acc, lora, first_row, [&] {
#pragma unroll
    for (int i = 0; i < kUnits; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        if (unit_of(i) >= units || own_row + 8 * half >= lora.N) continue;
        store<8>(static_cast<T*>(lora.x) + (own_row + 8 * half) * lora.x_stride, 4 * unit_of(i) + t, x[i][half]);
      }
    }
  });
#endif
}

// ---- launchers

// `rows` blocks, or clusters where these are.
template <typename Kernel, typename... Arguments>
int launch_rows(Kernel* kernel, int64_t rows, void* stream, const Arguments&... arguments) {
  const int size = device_attribute(cudaDevAttrComputeCapabilityMajor) >= 9 ? kBlocks : 1;
  return launch_clusters(kernel, dim3(size, static_cast<unsigned>(rows)), dim3(kThreads), 0, stream, size, arguments...);
}

int64_t with_fills(int64_t tiles, const Fills& fills) { return tiles + (fills.count > 0 ? kFillTiles : 0); }

// Calls body(Width<kTiles>{}).
template <typename Body>
int with_tiles(const KernelLoraAdd& lora, Body&& body) {
  const int rank = rank_of(lora);
  if (rank <= 16) return body(Width<2>{});
  if (rank <= 32) return body(Width<4>{});
  return rank <= 48 ? body(Width<6>{}) : body(Width<8>{});
}

template <typename T, int kTile>
int launch_z_tiles(const KernelLoraAdd& lora, const Fills& fills, void* stream) {
  const int64_t tiles = ceil_div(lora.N, kTile);
  return with_tiles(lora, [&](auto runs) -> int {
    return launch_rows(z_kernel<T, kTile, decltype(runs)::value>, with_fills(tiles, fills), stream, lora, fills, tiles);
  });
}

bool is_one_launch(const KernelLoraAdd& lora) {
  bool together = rank_of(lora) <= kMostRank;
  for (int64_t p = 1; p < lora.count; ++p) together = together && lora.parts[p].f32 == lora.parts[0].f32;
  return together;
}

// One launch, or one a part where they are too many columns or of several types.
template <typename T>
int launch_z(const KernelLoraAdd& lora, Fills fills, void* stream) {
  const bool together = is_one_launch(lora);
  for (int64_t p = 0; p < (together ? 1 : lora.count); ++p) {
    KernelLoraAdd some = lora;
    if (!together) some.count = 1, some.parts[0] = lora.parts[p];
    // Large tiles read A less often, small ones are more blocks.
    const int error = lora.N > 512 ? launch_z_tiles<T, 64>(some, fills, stream) : launch_z_tiles<T, 16>(some, fills, stream);
    if (error != cudaSuccess) return error;
    fills.count = 0;
  }
  return cudaSuccess;
}

template <typename T>
int launch_norm_z(const KernelLoraAdd& lora, const Fills& fills, const Normed& norm, void* stream) {
  const int64_t tiles = ceil_div(lora.N, kNormedRows);
  return with_tiles(lora, [&](auto runs) -> int {
    constexpr int kTiles = decltype(runs)::value;
    const auto launch = [&](auto* kernel) -> int {
      return launch_rows(kernel, with_fills(tiles, fills), stream, lora, fills, norm, tiles);
    };
    return lora.K <= kUnitColumns ? launch(norm_z_kernel<T, kTiles, 1>) : launch(norm_z_kernel<T, kTiles, 2>);
  });
}

// Calls body(T{}, fills) for the 16-bit dtypes.
template <typename Body>
int with_fills_of(const KernelLoraAdd& lora, const KernelFill* matrices, int64_t count, Body&& body) {
  if (lora.N == 0) return cudaSuccess;
  if (count > KERNEL_MOST_FILLS) return cudaErrorInvalidValue;
  const auto call = [&](auto t) -> int {
    using T = decltype(t);
    Fills fills{};
    for (; fills.count < count; ++fills.count) {
      if (!fills_by_eights<T>(fills.matrices[fills.count] = matrices[fills.count])) return cudaErrorInvalidValue;
    }
    return body(t, fills);
  };
  return lora.dtype == KERNEL_BF16 ? call(__nv_bfloat16{}) : call(__half{});
}

}  // namespace
}  // namespace ferrotune

using namespace ferrotune;

extern "C" int64_t lora_z_fits(const KernelLoraAdd* lora) {
  bool fits = lora->count > 0 && (lora->dtype == KERNEL_BF16 || lora->dtype == KERNEL_F16) && lora->N <= 16 * 65000 &&
              lora->K % kDepth == 0 && lora->x_stride % 8 == 0 && aligned16(lora->x) && device_attribute(cudaDevAttrComputeCapabilityMajor) >= 8;
  for (int64_t p = 0; p < lora->count; ++p) {
    const KernelLoraAddPart& part = lora->parts[p];
    fits = fits && part.R > 0 && part.R % 8 == 0 && part.R <= kMostRank && aligned16(part.a) && aligned16(part.b);
  }
  return fits;
}

extern "C" int64_t rms_norm_z_fits(const KernelLoraAdd* lora, const void* x, const void* weight, int64_t x_stride) {
  return lora->K > kLeastNormed && lora->K <= kMostNormed && x_stride % 8 == 0 && aligned16(x) && aligned16(weight) && lora_z_fits(lora) &&
         is_one_launch(*lora) && device_attribute(cudaDevAttrComputeCapabilityMajor) >= 9;
}

extern "C" int lora_z(const KernelLoraAdd* lora, const KernelFill* matrices, int64_t count, void* stream) {
  return with_fills_of(*lora, matrices, count, [&](auto t, const Fills& fills) { return launch_z<decltype(t)>(*lora, fills, stream); });
}

extern "C" int rms_norm_z(const KernelLoraAdd* lora, const KernelFill* matrices, int64_t count, const void* x, const void* weight, float* rstd,
                          int64_t x_stride, float eps, float offset, int weight_dtype, void* stream) {
  if (weight_dtype != KERNEL_F32 && weight_dtype != lora->dtype) return cudaErrorInvalidValue;
  const Normed norm{x, weight, rstd, x_stride, eps, offset, weight_dtype == KERNEL_F32};
  return with_fills_of(*lora, matrices, count, [&](auto t, const Fills& fills) { return launch_norm_z<decltype(t)>(*lora, fills, norm, stream); });
}
