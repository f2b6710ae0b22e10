// LoRA (arXiv:2106.09685) of some hundred rows at most, all parts of one projection, whose two products are little work and many launches:
//   lora_z    z = scale x A^T [N, rank of all parts], and what `fill` does, in one launch
//   lora_add  y[:, first ..] += z_p B_p^T + residual[:, first ..]
// Either z goes behind x and scale B behind W, and the product itself adds LoRA (csrc/lora.h), or the second kernel adds it afterwards.
// Fuses casts of A and B, the scale and the parts, for which libtorch launches five kernels a part. Moves: x, A and B once; lora_add y twice,
// which after a product of a decoding step lies in the second-level cache. lora_z is for the time before the product, as it starts while
// the kernel that makes x still runs.
//
// z is a sum over K of few numbers: on Hopper eight thread blocks of a cluster have a share of K each and add their sums up in order through
// each other's shared memory; elsewhere one block has all. Nothing but the sums is in shared memory: of 32 columns of K lane t of a row has
// columns 8 t .. 8 t + 7 for its products, whose columns may stand in any order as long as x and A agree.
//
// B's fragments stay in registers while a warp goes down 32 columns of y. Its column 2 t' + i of product j is column 8 t' + 2 j + i, so that
// each access to y is 16 bytes.
#include "chain.cuh"
#include "cluster.cuh"
#include "fill.cuh"
#include "mma.cuh"

namespace ferrotune {
namespace {

constexpr int kWarps = 8, kThreads = 32 * kWarps, kMostRank = 64;
constexpr int kDepth = 32, kBlocks = 8;  // columns of x that a warp has at once; thread blocks that share K
constexpr int kFillTiles = 16;           // times kBlocks thread blocks more, which fill
constexpr int kUnit = 32, kStep = 32;    // columns of y of a warp; rows that it has under way

// Of all parts.
__host__ __device__ inline int rank_of(const KernelLoraAdd& lora) {
  int64_t rank = 0;
  for (int64_t p = 0; p < lora.count; ++p) rank += lora.parts[p].R;
  return static_cast<int>(rank);
}

// ---- device

// Eight neighbours of a row of A as two products take them.
template <typename T>
__device__ inline uint4 eight_of_a(const char* row, int64_t k, bool f32) {
  if (!f32) return __ldg(reinterpret_cast<const uint4*>(row + k * sizeof(T)));
  const float4* const from = reinterpret_cast<const float4*>(row + k * sizeof(float));
  const float4 low = __ldg(from), high = __ldg(from + 1);
  return make_uint4(pack(low.x, low.y, T{}), pack(low.z, low.w, T{}), pack(high.x, high.y, T{}), pack(high.z, high.w, T{}));
}

// kTile rows of x; kTiles: runs of eight columns of z. The grid's first dimension is a cluster, which shares K; in the second the `tiles` of x
// come before those who fill.
template <typename T, int kTile, int kTiles>
__global__ void __launch_bounds__(kThreads, kTile == 16 && kTiles <= 6 ? 2 : 1) z_kernel(const __grid_constant__ KernelLoraAdd lora, const __grid_constant__ Fills fills,
                                                                                        int tiles) {
  constexpr int kRowWarps = kTile / 16, kDepthWarps = kWarps / kRowWarps, kColumns = 8 * kTiles;
  __shared__ __align__(16) float sums[kDepthWarps][kTile][kColumns];
  next_may_start();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int split = static_cast<int>(blockIdx.x), splits = static_cast<int>(gridDim.x);
  const int row_warp = warp % kRowWarps, depth_warp = warp / kRowWarps;
  if (static_cast<int>(blockIdx.y) >= tiles) {
    // What is filled may have readers under way.
    inputs_ready();
    const unsigned block = (blockIdx.y - tiles) * splits + split, blocks = (gridDim.y - tiles) * splits;
    for (int i = 0; i < fills.count; ++i) fill_matrix<T, 16 / sizeof(T)>(fills.matrices[i], block * kThreads + threadIdx.x, blocks * kThreads);
    return;
  }
  const int64_t first_row = static_cast<int64_t>(blockIdx.y) * kTile, own_row = first_row + 16 * row_warp + g;
  const bool f32 = lora.parts[0].f32 != 0;

  const char* a[kTiles];
#pragma unroll
  for (int j = 0; j < kTiles; ++j) {
    int64_t row = 8 * j + g;
    int p = 0;
    while (p + 1 < lora.count && row >= lora.parts[p].R) row -= lora.parts[p++].R;
    // Behind the last one nobody looks.
    row = row < lora.parts[p].R ? row : lora.parts[p].R - 1;
    a[j] = static_cast<const char*>(lora.parts[p].a) + row * lora.K * (f32 ? 4 : 2);
  }
  const int units = static_cast<int>(lora.K / kDepth), step = splits * kDepthWarps;
  int unit = split * kDepthWarps + depth_warp;
  constexpr int kAhead = kTiles <= 2 ? 4 : 2;
  uint4 of_a[kAhead][kTiles], of_x[kAhead][2];
  const auto load_a = [&](uint4(&to)[kTiles], int of) {
    const int64_t k = static_cast<int64_t>(of < units ? of : 0) * kDepth + 8 * t;
#pragma unroll
    for (int j = 0; j < kTiles; ++j) to[j] = eight_of_a<T>(a[j], k, f32);
  };
#pragma unroll
  for (int turn = 0; turn < kAhead; ++turn) load_a(of_a[turn], unit + turn * step);
  inputs_ready();
  const T* const x = static_cast<const T*>(lora.x) + 8 * t;
  const T* const above = x + (own_row < lora.N ? own_row : lora.N - 1) * lora.x_stride;
  const T* const below = x + (own_row + 8 < lora.N ? own_row + 8 : lora.N - 1) * lora.x_stride;
  const auto load_x = [&](uint4(&to)[2], int of) {
    const int64_t k = static_cast<int64_t>(of < units ? of : 0) * kDepth;
    to[0] = *reinterpret_cast<const uint4*>(above + k);
    to[1] = *reinterpret_cast<const uint4*>(below + k);
  };
#pragma unroll
  for (int turn = 0; turn < kAhead; ++turn) load_x(of_x[turn], unit + turn * step);
  float acc[kTiles][4] = {};
  while (unit < units) {
#pragma unroll
    for (int turn = 0; turn < kAhead; ++turn) {
      const uint4 top = of_x[turn][0], bottom = of_x[turn][1];
      const unsigned low[4] = {top.x, bottom.x, top.y, bottom.y}, high[4] = {top.z, bottom.z, top.w, bottom.w};
      if (unit < units) {
#pragma unroll
        for (int j = 0; j < kTiles; ++j) {
          multiply(acc[j], low, of_a[turn][j].x, of_a[turn][j].y, T{});
          multiply(acc[j], high, of_a[turn][j].z, of_a[turn][j].w, T{});
        }
      }
      if (unit + kAhead * step < units) load_a(of_a[turn], unit + kAhead * step), load_x(of_x[turn], unit + kAhead * step);
      unit += step;
    }
  }
#pragma unroll
  for (int j = 0; j < kTiles; ++j) {
    float* const to = &sums[depth_warp][16 * row_warp + g][8 * j + 2 * t];
    *reinterpret_cast<float2*>(to) = make_float2(acc[j][0], acc[j][1]);
    *reinterpret_cast<float2*>(to + 8 * kColumns) = make_float2(acc[j][2], acc[j][3]);
  }
  __syncthreads();
  constexpr int kPairs = kTile * kColumns / 2;
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
  splits > 1 ? meet_cluster() : __syncthreads();
  const int rank = rank_of(lora);
  for (int i = split * kThreads + static_cast<int>(threadIdx.x); i < kPairs; i += splits * kThreads) {
    float2 sum = make_float2(0, 0), of_block[kBlocks];
#pragma unroll
    for (int block = 0; block < kBlocks; ++block) {
      of_block[block] = make_float2(0, 0);
      if (block < splits) of_block[block] = of_cluster(reinterpret_cast<const float2*>(own) + i, block, splits);
    }
#pragma unroll
    for (int block = 0; block < kBlocks; ++block) sum.x += of_block[block].x, sum.y += of_block[block].y;
    const int row = 2 * i / kColumns, column = 2 * i % kColumns;
    if (first_row + row >= lora.N || column >= rank) continue;
    int p = 0;
    int64_t own = column;
    for (; own >= lora.parts[p].R; ++p) own -= lora.parts[p].R;
    const float scale = lora.parts[p].scale;
    T* const to = static_cast<T*>(lora.z) + (first_row + row) * lora.z_stride + lora.parts[p].z_first + own;
    *reinterpret_cast<unsigned*>(to) = pack(scale * sum.x, scale * sum.y, T{});
  }
  // Nobody leaves while others read its sums.
  if (splits > 1) meet_cluster();
}

// kSlices: runs of 16 of a part's rank. A warp has 32 columns of y and `rows` rows.
template <typename T, int kSlices>
__global__ void __launch_bounds__(kThreads) add_kernel(const __grid_constant__ KernelLoraAdd lora, int rows) {
  next_may_start();
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  int64_t unit = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  int p = 0;
  for (; p < lora.count; ++p) {
    const int64_t units = (lora.parts[p].rows + kUnit - 1) / kUnit;
    if (unit < units) break;
    unit -= units;
  }
  if (p == lora.count) return;
  const KernelLoraAddPart& part = lora.parts[p];
  const int64_t first = unit * kUnit;

  unsigned b[kSlices][4][2];
#pragma unroll
  for (int s = 0; s < kSlices; ++s) {
    const int64_t k = 16 * s + 4 * t;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int64_t row = first + 8 * (g / 2) + 2 * j + g % 2, at = row * part.R + k;
      b[s][j][0] = b[s][j][1] = 0;
      if (row >= part.rows || k >= part.R) continue;
      if (part.f32) {
        const float4 v = __ldg(reinterpret_cast<const float4*>(static_cast<const float*>(part.b) + at));
        b[s][j][0] = pack(v.x, v.y, T{});
        b[s][j][1] = pack(v.z, v.w, T{});
      } else {
        const uint2 v = __ldg(reinterpret_cast<const uint2*>(static_cast<const T*>(part.b) + at));
        b[s][j][0] = v.x;
        b[s][j][1] = v.y;
      }
    }
  }
  inputs_ready();
  const int64_t begin = static_cast<int64_t>(blockIdx.y) * rows, end = begin + rows < lora.N ? begin + rows : lora.N, column = part.first + first + 8 * t;
  const bool inside = first + 8 * t < part.rows;
  T* const y = static_cast<T*>(lora.y) + column;
  const T* const residual = lora.residual == nullptr ? nullptr : static_cast<const T*>(lora.residual) + column;
  const T* const z = static_cast<const T*>(lora.z) + part.z_first + 4 * t;
  constexpr int kAtOnce = kStep / 8;  // rows g, g + 8, ..
  for (int64_t row = begin + g; row - g < end; row += kStep) {
    Vector<T, 8> of_y[kAtOnce], of_residual[kAtOnce];
    uint2 of_z[kAtOnce][kSlices];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int64_t n = row + 8 * i;
      of_residual[i] = {};
      if (inside && n < end) {
        of_y[i] = *reinterpret_cast<const Vector<T, 8>*>(y + n * lora.y_stride);
        if (residual != nullptr) of_residual[i] = *reinterpret_cast<const Vector<T, 8>*>(residual + n * lora.residual_stride);
      }
#pragma unroll
      for (int s = 0; s < kSlices; ++s) {
        of_z[i][s] = make_uint2(0, 0);
        if (n < end && 16 * s + 4 * t < part.R) of_z[i][s] = *reinterpret_cast<const uint2*>(z + n * lora.z_stride + 16 * s);
      }
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; i += 2) {
      float acc[4][4] = {};
#pragma unroll
      for (int s = 0; s < kSlices; ++s) {
        const unsigned of_rows[4] = {of_z[i][s].x, of_z[i + 1][s].x, of_z[i][s].y, of_z[i + 1][s].y};
#pragma unroll
        for (int j = 0; j < 4; ++j) multiply(acc[j], of_rows, b[s][j][0], b[s][j][1], T{});
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int64_t n = row + 8 * (i + half);
        if (!inside || n >= end) continue;
        const auto sum = [&](int c) {
          return to_float(of_y[i + half].v[c]) + acc[c / 2][2 * half + c % 2] + to_float(of_residual[i + half].v[c]);
        };
        // Left alone, the compiler stores them one by one: three times the time.
        asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(y + n * lora.y_stride), "r"(pack(sum(0), sum(1), T{})),
                     "r"(pack(sum(2), sum(3), T{})), "r"(pack(sum(4), sum(5), T{})), "r"(pack(sum(6), sum(7), T{}))
                     : "memory");
      }
    }
  }
}

// ---- launchers

template <typename T, int kTile, int kTiles>
int launch_z_of(const KernelLoraAdd& lora, const Fills& fills, void* stream) {
  const bool hopper = device_attribute(cudaDevAttrComputeCapabilityMajor) >= 9;
  const int tiles = static_cast<int>(ceil_div(lora.N, kTile));
  cudaLaunchAttribute attributes[2] = {};
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim = {kBlocks, 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(hopper ? kBlocks : 1, static_cast<unsigned>(tiles + (fills.count > 0 ? kFillTiles : 0)));
  config.blockDim = dim3(kThreads);
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = attributes;
  config.numAttrs = hopper ? 2 : 0;
  return cudaLaunchKernelEx(&config, z_kernel<T, kTile, kTiles>, KernelLoraAdd(lora), Fills(fills), int(tiles));
}

template <typename T, int kTile>
int launch_z_tiles(const KernelLoraAdd& lora, const Fills& fills, void* stream) {
  const int rank = rank_of(lora);
  if (rank <= 16) return launch_z_of<T, kTile, 2>(lora, fills, stream);
  if (rank <= 32) return launch_z_of<T, kTile, 4>(lora, fills, stream);
  return rank <= 48 ? launch_z_of<T, kTile, 6>(lora, fills, stream) : launch_z_of<T, kTile, 8>(lora, fills, stream);
}

// One launch, or one a part where they are too many columns or of several types.
template <typename T>
int launch_z(const KernelLoraAdd& lora, const KernelFill* matrices, int64_t count, void* stream) {
  Fills fills{};
  for (; fills.count < count; ++fills.count) {
    if (!fills_by<T, 16 / sizeof(T)>(fills.matrices[fills.count] = matrices[fills.count])) return cudaErrorInvalidValue;
  }
  bool together = rank_of(lora) <= kMostRank;
  for (int64_t p = 1; p < lora.count; ++p) together = together && lora.parts[p].f32 == lora.parts[0].f32;
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

template <typename T, int kSlices>
int launch_add_of(const KernelLoraAdd& lora, void* stream) {
  int64_t units = 0;
  for (int64_t p = 0; p < lora.count; ++p) units += ceil_div(lora.parts[p].rows, kUnit);
  const int64_t blocks = ceil_div(units, kWarps), steps = ceil_div(lora.N, kStep);
  // As many as keep each processor's memory path busy, or one for each step.
  const int64_t wanted = ceil_div(4 * device_attribute(cudaDevAttrMultiProcessorCount), blocks), runs = wanted < steps ? wanted : steps;
  const int64_t rows = ceil_div(steps, runs) * kStep;
  return launch_chained(true, add_kernel<T, kSlices>, dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(ceil_div(lora.N, rows))),
                        dim3(kThreads), 0, stream, lora, static_cast<int>(rows));
}

template <typename T>
int launch_add(const KernelLoraAdd& lora, void* stream) {
  int64_t rank = 0;
  for (int64_t p = 0; p < lora.count; ++p) rank = lora.parts[p].R > rank ? lora.parts[p].R : rank;
  if (rank <= 16) return launch_add_of<T, 1>(lora, stream);
  return rank <= 32 ? launch_add_of<T, 2>(lora, stream) : launch_add_of<T, 4>(lora, stream);
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

extern "C" int64_t lora_add_fits(const KernelLoraAdd* lora) {
  bool fits = lora->y_stride % 8 == 0 && aligned16(lora->y) && lora->residual_stride % 8 == 0 && aligned16(lora->residual);
  for (int64_t p = 0; p < lora->count; ++p) fits = fits && lora->parts[p].rows % 8 == 0 && lora->parts[p].first % 8 == 0;
  return fits;
}

extern "C" int lora_z(const KernelLoraAdd* lora, const KernelFill* fills, int64_t count, void* stream) {
  if (lora->N == 0) return cudaSuccess;
  if (count > KERNEL_MOST_FILLS) return cudaErrorInvalidValue;
  return lora->dtype == KERNEL_BF16 ? launch_z<__nv_bfloat16>(*lora, fills, count, stream) : launch_z<__half>(*lora, fills, count, stream);
}

extern "C" int lora_add(const KernelLoraAdd* lora, void* stream) {
  if (lora->N == 0) return cudaSuccess;
  return lora->dtype == KERNEL_BF16 ? launch_add<__nv_bfloat16>(*lora, stream) : launch_add<__half>(*lora, stream);
}
