// Attention of one new row of each sequence over keys and values in pages (arXiv:2309.06180), which are read where they lie.
// Fuses the write of the new key and value, both products, softcap, the online softmax (arXiv:1805.02867) and the sum over the
// parts of a sequence. Moves: the keys and values once, 4 D bytes a token and key/value head in 16 bits.
//
// The heads of a group are the rows of m16n8k16 products, so each key is read once for all of them. A thread block takes one
// key/value head of one run of keys of one sequence, its four warps every fourth page; runs have one length whatever else is in
// the batch (up to 8192 tokens, a longer one beyond), so that a row's result does not depend on it. Of a sequence of several runs, the thread block that comes last adds
// up what the others left:   m = max_i m_i,  l = sum_i l_i e^(m_i - m),  o = sum_i o_i e^(m_i - m) / l.
#include "chain.cuh"
#include "mma.cuh"

namespace ferrotune {
namespace {

constexpr int kPage = 16, kWarps = 4, kThreads = 32 * kWarps, kMostHeads = 16, kStages = 2;

// What a thread block leaves of a head: o [D], m, l.
template <int D>
constexpr int kLeft = D + 2;

template <int D>
constexpr int kTileElements = kPage * (D + 8);

// Pages of a run: longer runs for long contexts, or adding them up takes too long.
inline int pages_of_run(int64_t longest) { return longest <= 8192 ? 2 * kWarps : 8 * kWarps; }

template <typename T, int D>
__global__ void __launch_bounds__(kThreads) paged_attention_kernel(const __grid_constant__ KernelPaged p, int run_pages,
                                                                   float* partial, int32_t* arrived) {
#if __CUDA_ARCH__ >= 800
  extern __shared__ float4 shared[];
  __shared__ float2 statistics[kWarps][kMostHeads];  // m, l
  __shared__ int last;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int run = blockIdx.x, head = blockIdx.y, sequence = blockIdx.z;
  const int group = static_cast<int>(p.H / p.K), run_keys = run_pages * kPage;
  next_may_start();
  inputs_ready();
  const int length = static_cast<int>(p.lengths[sequence]);
  const int low = p.window > 0 && length > p.window ? length - static_cast<int>(p.window) : 0;
  const int begin = max(low, run * run_keys), end = min(length, (run + 1) * run_keys);
  T* const out = static_cast<T*>(p.out) + (int64_t{sequence} * p.H + head * group) * D;
  if (begin >= end) {
    // A row that belongs to no sequence.
    if (length == 0 && run == 0) {
      for (int i = threadIdx.x; i < group * D; i += kThreads) out[i] = from_float<T>(0);
    }
    return;
  }
  const int64_t* const table = p.tables + sequence * p.width;
  const int64_t row_elements = p.K * D, page_elements = kPage * row_elements;
  T *const pool_k = static_cast<T*>(p.pool_k) + head * D, *const pool_v = static_cast<T*>(p.pool_v) + head * D;
  if (end == length) {
    // The new row; this thread block alone reads it.
    const int64_t at = table[(length - 1) / kPage] * page_elements + (length - 1) % kPage * row_elements;
    const T* const k = static_cast<const T*>(p.k) + sequence * p.k_stride + head * D;
    const T* const v = static_cast<const T*>(p.v) + sequence * p.v_stride + head * D;
    for (int i = threadIdx.x; i < D / 8; i += kThreads) {
      reinterpret_cast<uint4*>(pool_k + at)[i] = reinterpret_cast<const uint4*>(k)[i];
      reinterpret_cast<uint4*>(pool_v + at)[i] = reinterpret_cast<const uint4*>(v)[i];
    }
  }
  T* const tiles = reinterpret_cast<T*>(shared);
  const PaddedTile<T, D> q_tile{tiles};
  const auto key_tile = [&](int stage) { return PaddedTile<T, D>{tiles + (1 + 2 * (kStages * warp + stage)) * kTileElements<D>}; };
  const auto value_tile = [&](int stage) { return PaddedTile<T, D>{key_tile(stage).base + kTileElements<D>}; };
  const T* const q = static_cast<const T*>(p.q) + sequence * p.q_stride + head * group * D;
  for (int i = threadIdx.x; i < kPage * D / 8; i += kThreads) {
    const int row = i / (D / 8), piece = i % (D / 8);
    *reinterpret_cast<uint4*>(q_tile.at(row, piece)) =
        row < group ? *reinterpret_cast<const uint4*>(q + row * D + piece * 8) : make_uint4(0, 0, 0, 0);
  }
  __syncthreads();

  const int first_page = begin / kPage, last_page = (end - 1) / kPage;
  const auto fetch = [&](int page, int stage) {
    if (page <= last_page) {
      const int64_t from = table[page] * page_elements;
#pragma unroll
      for (int i = lane; i < kPage * D / 8; i += 32) {
        const int row = i / (D / 8), piece = i % (D / 8);
        const bool inside = page * kPage + row < end;
        const int64_t at = from + row * row_elements + piece * 8;
        copy_16_bytes(shared_address(key_tile(stage).at(row, piece)), pool_k + at, inside);
        copy_16_bytes(shared_address(value_tile(stage).at(row, piece)), pool_v + at, inside);
      }
    }
    commit_copies();
  };
#pragma unroll
  for (int s = 0; s < kStages; ++s) fetch(first_page + warp + s * kWarps, s);
  unsigned a[D / 16][4];
#pragma unroll
  for (int i = 0; i < D / 16; ++i) load_a(a[i], q_tile, 0, 2 * i);

  // Of rows g and g + 8: heads of the group.
  float m[2] = {-INFINITY, -INFINITY}, l[2] = {0, 0}, o[D / 8][4] = {};
  int stage = 0;
  for (int page = first_page + warp; page <= last_page; page += kWarps) {
    wait_copies<kStages - 1>();
    __syncwarp();
    float s[2][4] = {};
#pragma unroll
    for (int i = 0; i < D / 16; ++i) {
      unsigned b[4];
      load_b_rows(b, key_tile(stage), 0, 2 * i);
      multiply(s[0], a[i], b[0], b[1], T{});
      multiply(s[1], a[i], b[2], b[3], T{});
    }
    float most[2] = {m[0], m[1]};
#pragma unroll
    for (int n = 0; n < 2; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int key = page * kPage + 8 * n + 2 * t + i % 2;
        float score = s[n][i] * p.scale;
        if (p.softcap > 0) score = p.softcap * tanhf(score / p.softcap);
        s[n][i] = key >= begin && key < end ? score : -INFINITY;
        most[i / 2] = fmaxf(most[i / 2], s[n][i]);
      }
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      most[h] = fmaxf(most[h], __shfl_xor_sync(0xffffffff, most[h], 1));
      most[h] = fmaxf(most[h], __shfl_xor_sync(0xffffffff, most[h], 2));
      // A page of which nothing is seen leaves everything as it was.
      const float base = most[h] == -INFINITY ? 0 : most[h], factor = __expf(m[h] - base);
      m[h] = most[h];
      float sum = 0;
#pragma unroll
      for (int n = 0; n < 2; ++n) {
#pragma unroll
        for (int i = 2 * h; i < 2 * h + 2; ++i) {
          s[n][i] = __expf(s[n][i] - base);
          sum += s[n][i];
        }
      }
      l[h] = l[h] * factor + sum;
#pragma unroll
      for (int i = 0; i < D / 8; ++i) {
        o[i][2 * h] *= factor;
        o[i][2 * h + 1] *= factor;
      }
    }
    const unsigned weights[4] = {pack(s[0][0], s[0][1], T{}), pack(s[0][2], s[0][3], T{}), pack(s[1][0], s[1][1], T{}),
                                 pack(s[1][2], s[1][3], T{})};
#pragma unroll
    for (int i = 0; i < D / 16; ++i) {
      unsigned b[4];
      load_b(b, value_tile(stage), 0, 2 * i);
      multiply(o[2 * i], weights, b[0], b[1], T{});
      multiply(o[2 * i + 1], weights, b[2], b[3], T{});
    }
    __syncwarp();
    fetch(page + kStages * kWarps, stage);
    stage = (stage + 1) % kStages;
  }
  wait_copies<0>();
  __syncthreads();

  // The four warps' parts, in the tiles' memory.
  float* const parts = reinterpret_cast<float*>(shared);  // [warps, 16, D]
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    l[h] += __shfl_xor_sync(0xffffffff, l[h], 1);
    l[h] += __shfl_xor_sync(0xffffffff, l[h], 2);
    const int row = g + 8 * h;
    if (row >= group) continue;
    if (t == 0) statistics[warp][row] = make_float2(m[h], l[h]);
#pragma unroll
    for (int i = 0; i < D / 8; ++i) {
      *reinterpret_cast<float2*>(parts + (warp * kMostHeads + row) * D + 8 * i + 2 * t) = make_float2(o[i][2 * h], o[i][2 * h + 1]);
    }
  }
  __syncthreads();
  const int runs = (length - 1) / run_keys - low / run_keys + 1;
  const int64_t all_runs = gridDim.x;
  const auto left = [&](int row, int of_run) {
    return partial + (((int64_t{sequence} * p.K + head) * group + row) * all_runs + of_run) * kLeft<D>;
  };
  for (int i = threadIdx.x; i < group * D; i += kThreads) {
    const int row = i / D, d = i % D;
    float most = -INFINITY, sum = 0, total = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) most = fmaxf(most, statistics[w][row].x);
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      const float factor = __expf(statistics[w][row].x - most);
      sum += factor * parts[(w * kMostHeads + row) * D + d];
      total += factor * statistics[w][row].y;
    }
    if (runs == 1) {
      out[i] = from_float<T>(sum / total);
      continue;
    }
    float* const mine = left(row, run);
    __stcg(mine + d, sum);
    if (d == 0) {
      __stcg(mine + D, most);
      __stcg(mine + D + 1, total);
    }
  }
  if (runs == 1) return;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    int32_t* const count = arrived + sequence * p.K + head;
    last = atomicAdd(count, 1) == runs - 1;
    if (last) *count = 0;
  }
  __syncthreads();
  if (!last) return;
  __threadfence();
  const int first_run = low / run_keys;
  for (int i = threadIdx.x; i < group * D; i += kThreads) {
    const int row = i / D, d = i % D;
    float most = -INFINITY, sum = 0, total = 0;
#pragma unroll 4
    for (int r = 0; r < runs; ++r) {
      const float* const theirs = left(row, first_run + r);
      const float their_most = __ldcg(theirs + D), higher = fmaxf(most, their_most);
      const float factor = __expf(most - higher), their_factor = __expf(their_most - higher);
      sum = sum * factor + their_factor * __ldcg(theirs + d);
      total = total * factor + their_factor * __ldcg(theirs + D + 1);
      most = higher;
    }
    out[i] = from_float<T>(sum / total);
  }
#endif
}

// ---- launchers

// Calls body(T{}, Width<D>{}).
template <typename Body>
int64_t with_heads(const KernelPaged& p, int64_t otherwise, Body&& body) {
  const auto with_dim = [&](auto t) -> int64_t {
    switch (p.D) {
      case 64:
        return body(t, Width<64>{});
      case 96:
        return body(t, Width<96>{});
      case 128:
        return body(t, Width<128>{});
      case 256:
        return body(t, Width<256>{});
    }
    return otherwise;
  };
  if (p.dtype == KERNEL_BF16) return with_dim(__nv_bfloat16{});
  return p.dtype == KERNEL_F16 ? with_dim(__half{}) : otherwise;
}

template <int D>
constexpr size_t kSharedBytes = (1 + 2 * kStages * kWarps) * kTileElements<D> * 2;

}  // namespace
}  // namespace ferrotune

using namespace ferrotune;

extern "C" int64_t paged_attention_workspace(const KernelPaged* p) {
  return with_heads(*p, 0, [&](auto, auto dim) -> int64_t {
    constexpr int D = decltype(dim)::value;
    const auto aligned = [](const void* pointer, int64_t stride) { return aligned16(pointer) && stride % 8 == 0; };
    const bool fits = p->page_size == kPage && p->H / p->K <= kMostHeads && aligned(p->q, p->q_stride) &&
                      aligned(p->k, p->k_stride) && aligned(p->v, p->v_stride) && aligned(p->pool_k, 0) && aligned(p->pool_v, 0) &&
                      p->sequences < 65536 && device_attribute(cudaDevAttrComputeCapabilityMajor) >= 8 &&
                      device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin) >= static_cast<int>(kSharedBytes<D>);
    return fits ? p->sequences * p->H * ceil_div(p->longest, pages_of_run(p->longest) * kPage) * kLeft<D> : 0;
  });
}

extern "C" int paged_attention(const KernelPaged* p, float* partial, int32_t* arrived, void* stream) {
  if (p->sequences == 0) return cudaSuccess;
  return static_cast<int>(with_heads(*p, cudaErrorInvalidValue, [&](auto t, auto dim) -> int64_t {
    constexpr int D = decltype(dim)::value;
    const auto kernel = paged_attention_kernel<decltype(t), D>;
    const int error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes<D>);
    if (error != cudaSuccess) return error;
    const int run_pages = pages_of_run(p->longest);
    const dim3 grid(static_cast<unsigned>(ceil_div(p->longest, run_pages * kPage)), static_cast<unsigned>(p->K),
                    static_cast<unsigned>(p->sequences));
    return launch_chained(true, kernel, grid, dim3(kThreads), kSharedBytes<D>, stream, *p, run_pages, partial, arrived);
  }));
}
