// Attention of one new row of each sequence over keys and values in pages (arXiv:2309.06180), which are read where they lie.
// Fuses the write of the new key and value, both products, softcap, the online softmax (arXiv:1805.02867) and the sum over the
// parts of a sequence. Moves: the keys and values once, 4 D bytes a token and key/value head in 16 bits.
//
// The heads of a group are columns of m16n8k16 products, eight at a time, and keys their rows, so each key is read once for all of them. A thread block takes one
// key/value head of one run of keys of one sequence, its four warps every fourth page; runs have one length whatever else is in
// the batch (up to 8192 tokens, a longer one beyond), so that a row's result does not depend on it. Of a sequence of several runs, the thread block that comes last adds
// up what the others left:   m = max_i m_i,  l = sum_i l_i e^(m_i - m),  o = sum_i o_i e^(m_i - m) / l.
#include "paged_attention.cuh"

namespace ferrotune {
namespace {

constexpr int kPagedWarps = 4, kPagedThreads = 32 * kPagedWarps, kPagedStages = 2;

// q, stages of keys and values of each warp; m and l of each warp's heads; whether this run came last.
template <int D>
constexpr int kPagedTileBytes = (1 + 2 * kPagedStages * kPagedWarps) * kTileElements<D> * 2;
template <int D>
constexpr int kPagedBytes = kPagedTileBytes<D> + kPagedWarps * kMostHeads * 8 + 16;

// Pages of a run: longer runs for long contexts, or adding them up takes too long.
inline int pages_of_run(int64_t longest) { return longest <= 8192 ? 2 * kPagedWarps : 8 * kPagedWarps; }

// A run of keys of one sequence for one key/value head.
template <typename T>
struct PagedRun {
  T *pool_k, *pool_v;    // of this head
  int64_t row_elements;  // from key to key
  const int64_t* table;
  int length, window, run, run_keys, group;
  float scale, softcap;
  T* out;          // [group, D]
  float* partial;  // [group, all_runs, kLeft]
  int64_t all_runs;
  int32_t* arrived;
};

// q(row, vector): eight elements of a head of the group; put_new(k, v): writes the new key and value to these places; sync(): a barrier of
// the four warps, of which this is thread `thread`.
template <typename T, int D, int kEights, typename Query, typename PutNew, typename Sync>
__device__ __forceinline__ void attend(const PagedRun<T>& p, char* shared, int thread, Query&& query, PutNew&& put_new, Sync&& sync) {
  float2* const statistics = reinterpret_cast<float2*>(shared + kPagedTileBytes<D>);  // [warps, heads]: m, l
  int* const last = reinterpret_cast<int*>(statistics + kPagedWarps * kMostHeads);
  const int warp = thread / 32, lane = thread % 32;
  const int group = p.group, length = p.length;
  const int low = p.window > 0 && length > p.window ? length - p.window : 0;
  const int begin = max(low, p.run * p.run_keys), end = min(length, (p.run + 1) * p.run_keys);
  if (begin >= end) {
    // A row that belongs to no sequence.
    if (length == 0 && p.run == 0) {
      for (int i = thread; i < group * D; i += kPagedThreads) p.out[i] = from_float<T>(0);
    }
    return;
  }
  const int64_t page_elements = kPage * p.row_elements;
  if (end == length) {
    // These four warps alone read it.
    const int64_t at = p.table[(length - 1) / kPage] * page_elements + (length - 1) % kPage * p.row_elements;
    put_new(p.pool_k + at, p.pool_v + at);
  }
  T* const tiles = reinterpret_cast<T*>(shared);
  const PaddedTile<T, D> q_tile{tiles};
  const auto key_tile = [&](int stage) { return PaddedTile<T, D>{tiles + (1 + 2 * (kPagedStages * warp + stage)) * kTileElements<D>}; };
  const auto value_tile = [&](int stage) { return PaddedTile<T, D>{key_tile(stage).base + kTileElements<D>}; };
#pragma unroll
  for (int i = thread; i < kPage * D / 8; i += kPagedThreads) {
    const int row = i / (D / 8), piece = i % (D / 8);
    *reinterpret_cast<uint4*>(q_tile.at(row, piece)) = query(row, piece);
  }
  sync();

  const int first_page = begin / kPage, last_page = (end - 1) / kPage;
  const auto fetch = [&](int page, int stage) {
    if (page <= last_page) {
      const int64_t from = p.table[page] * page_elements;
#pragma unroll
      for (int i = lane; i < kPage * D / 8; i += 32) {
        const int row = i / (D / 8), piece = i % (D / 8);
        const bool inside = page * kPage + row < end;
        const int64_t at = from + row * p.row_elements + piece * 8;
        copy_16_bytes(shared_address(key_tile(stage).at(row, piece)), p.pool_k + at, inside);
        copy_16_bytes(shared_address(value_tile(stage).at(row, piece)), p.pool_v + at, inside);
      }
    }
    commit_copies();
  };
#pragma unroll
  for (int s = 0; s < kPagedStages; ++s) fetch(first_page + warp + s * kPagedWarps, s);
  PagedSums<D, kEights> sums;
  int stage = 0;
  for (int page = first_page + warp; page <= last_page; page += kPagedWarps) {
    wait_copies<kPagedStages - 1>();
    __syncwarp();
    add_page<T, D, kEights>(sums, q_tile, key_tile(stage), value_tile(stage), page * kPage, begin, end, p.scale, p.softcap);
    __syncwarp();
    fetch(page + kPagedStages * kPagedWarps, stage);
    stage = (stage + 1) % kPagedStages;
  }
  wait_copies<0>();
  sync();

  // The warps' parts, in the tiles' memory.
  float* const parts = reinterpret_cast<float*>(shared);  // [warps, group, D]
  put_parts<D, kEights>(sums, parts + warp * group * D, statistics + warp * kMostHeads, group);
  sync();
  const int runs = (length - 1) / p.run_keys - low / p.run_keys + 1;
  const auto left = [&](int row, int of_run) { return p.partial + (row * p.all_runs + of_run) * kLeft<D>; };
  for (int i = thread; i < group * D; i += kPagedThreads) {
    const int row = i / D, d = i % D;
    const float3 all = joined<D, kPagedWarps>(parts, statistics, group, row, d);
    if (runs == 1) {
      p.out[i] = from_float<T>(all.x / all.z);
      continue;
    }
    float* const mine = left(row, p.run);
    __stcg(mine + d, all.x);
    if (d == 0) {
      __stcg(mine + D, all.y);
      __stcg(mine + D + 1, all.z);
    }
  }
  if (runs == 1) return;
  __threadfence();
  sync();
  if (thread == 0) {
    *last = atomicAdd(p.arrived, 1) == runs - 1;
    if (*last) *p.arrived = 0;
  }
  sync();
  if (!*last) return;
  __threadfence();
  const int first_run = low / p.run_keys;
  for (int i = thread; i < group * D; i += kPagedThreads) {
    const float3 all = joined_runs<D>(left(i / D, first_run), runs, i % D);
    p.out[i] = from_float<T>(all.x / all.z);
  }
}

template <typename T, int D, int kEights>
__global__ void __launch_bounds__(kPagedThreads) paged_attention_kernel(const __grid_constant__ KernelPaged p, int run_pages,
                                                                        float* partial, int32_t* arrived) {
#if __CUDA_ARCH__ >= 800
  extern __shared__ float4 shared[];
  const int head = blockIdx.y, sequence = blockIdx.z, group = static_cast<int>(p.H / p.K);
  next_may_start();
  inputs_ready();
  const T* const q = static_cast<const T*>(p.q) + sequence * p.q_stride + head * group * D;
  const PagedRun<T> run{static_cast<T*>(p.pool_k) + head * D,
                        static_cast<T*>(p.pool_v) + head * D,
                        p.K * D,
                        p.tables + sequence * p.width,
                        static_cast<int>(p.lengths[sequence]),
                        static_cast<int>(p.window),
                        static_cast<int>(blockIdx.x),
                        run_pages * kPage,
                        group,
                        p.scale,
                        p.softcap,
                        static_cast<T*>(p.out) + (int64_t{sequence} * p.H + head * group) * D,
                        partial + (int64_t{sequence} * p.K + head) * group * gridDim.x * kLeft<D>,
                        gridDim.x,
                        arrived + sequence * p.K + head};
  const auto query = [&](int row, int piece) {
    return row < group ? *reinterpret_cast<const uint4*>(q + row * D + piece * 8) : make_uint4(0, 0, 0, 0);
  };
  const auto put_new = [&](T* to_k, T* to_v) {
    const T* const k = static_cast<const T*>(p.k) + sequence * p.k_stride + head * D;
    const T* const v = static_cast<const T*>(p.v) + sequence * p.v_stride + head * D;
    for (int i = threadIdx.x; i < D / 8; i += kPagedThreads) {
      reinterpret_cast<uint4*>(to_k)[i] = reinterpret_cast<const uint4*>(k)[i];
      reinterpret_cast<uint4*>(to_v)[i] = reinterpret_cast<const uint4*>(v)[i];
    }
  };
  attend<T, D, kEights>(run, reinterpret_cast<char*>(shared), threadIdx.x, query, put_new, [] { __syncthreads(); });
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
                      device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin) >= kPagedBytes<D>;
    return fits ? p->sequences * p->H * ceil_div(p->longest, pages_of_run(p->longest) * kPage) * kLeft<D> : 0;
  });
}

extern "C" int paged_attention(const KernelPaged* p, float* partial, int32_t* arrived, void* stream) {
  if (p->sequences == 0) return cudaSuccess;
  return static_cast<int>(with_heads(*p, cudaErrorInvalidValue, [&](auto t, auto dim) -> int64_t {
    constexpr int D = decltype(dim)::value;
    const auto kernel = p->H / p->K > 8 ? paged_attention_kernel<decltype(t), D, 2> : paged_attention_kernel<decltype(t), D, 1>;
    const int error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kPagedBytes<D>);
    if (error != cudaSuccess) return error;
    const int run_pages = pages_of_run(p->longest);
    const dim3 grid(static_cast<unsigned>(ceil_div(p->longest, run_pages * kPage)), static_cast<unsigned>(p->K),
                    static_cast<unsigned>(p->sequences));
    return launch_chained(true, kernel, grid, dim3(kPagedThreads), kPagedBytes<D>, stream, *p, run_pages, partial, arrived);
  }));
}
