// Attention of one new row of each sequence over keys and values in pages (arXiv:2309.06180), which are read where they lie.
// Fuses the rotation of query and new key (rope.cu), the write of the new key and value, both products, softcap, the online softmax (arXiv:1805.02867) and the sum over the
// parts of a sequence. Moves: the keys and values once, 4 D bytes a token and key/value head in 16 bits.
//
// The heads of a group are columns of m16n8k16 products, eight at a time, and keys their rows, so each key is read once for all of them. A thread block takes one
// key/value head of one run of keys of one sequence, its four warps every fourth page; runs have one length whatever else is in
// the batch, so that a row's result does not depend on it. Of a sequence of several runs, the thread block that comes last adds
// up what the others left:   m = max_i m_i,  l = sum_i l_i e^(m_i - m),  o = sum_i o_i e^(m_i - m) / l.
//
// A thread block's start, three memory latencies one after another (lengths and tables, pages, what runs left), is what short contexts take:
// pages are asked for before the kernel ahead has ended, whose new key is put into its tile from where that left it, and up to 512 keys are one run.
#include <algorithm>

#include "nf4_order.cuh"
#include "paged_attention.cuh"

namespace ferrotune {
namespace {

constexpr int kPagedWarps = 4, kPagedThreads = 32 * kPagedWarps, kLeastStages = 2, kMostStages = 3, kRunPages = 32, kRunKeys = kRunPages * kPage;

// q, stages of keys and values of each warp; m and l of each warp's heads; whether this run came last.
template <int D>
__host__ __device__ constexpr int paged_tile_bytes(int stages) {
  return (1 + 2 * stages * kPagedWarps) * kTileElements<D> * 2;
}
template <int D>
constexpr int paged_bytes(int stages) {
  return paged_tile_bytes<D>(stages) + kPagedWarps * kMostHeads * 8 + 16;
}

// Eight elements of a head, turned by the row's angles as rope.cu does.
template <typename T>
__device__ __forceinline__ uint4 turned(const KernelPaged& p, int sequence, const T* head, int piece) {
  const auto* const pieces = reinterpret_cast<const uint4*>(head);
  const int half = static_cast<int>(p.rotary) / 16;  // pieces
  if (p.cos == nullptr || piece >= 2 * half) return pieces[piece];
  const bool low = piece < half;
  const Vector<T, 8> own = load<8>(head, piece), other = load<8>(head, low ? piece + half : piece - half);
  const int64_t row = int64_t{sequence} * half * 8;
  float c[8], s[8];
  load_float<8>(p.cos + row, low ? piece : piece - half, c);
  load_float<8>(p.sin + row, low ? piece : piece - half, s);
  Vector<T, 8> out;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const float a = to_float(own.v[i]), b = to_float(other.v[i]);
    out.v[i] = from_float<T>(low ? a * c[i] - b * s[i] : a * c[i] + b * s[i]);
  }
  return reinterpret_cast<const uint4&>(out);
}

template <typename T, int D, int kEights>
__global__ void __launch_bounds__(kPagedThreads) paged_attention_kernel(const __grid_constant__ KernelPaged p, int stages, float* all_partial,
                                                                       int32_t* all_arrived) {
#if __CUDA_ARCH__ >= 800
  extern __shared__ float4 shared[];
  constexpr int kVectors = D / 8;
  const int run = blockIdx.x, head = blockIdx.y, sequence = blockIdx.z, group = static_cast<int>(p.H / p.K);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  next_may_start();
  // Tables, lengths and all keys but the new one are there since the step began.
  const int length = static_cast<int>(p.lengths[sequence]), window = static_cast<int>(p.window);
  const int low = window > 0 && length > window ? length - window : 0;
  const int begin = max(low, run * kRunKeys), end = min(length, (run + 1) * kRunKeys);
  // Elements i and i + 1 of the group's heads.
  const auto put = [&](int i, float first, float second) {
    const unsigned column = head * group * D + i;
    T* const to = static_cast<T*>(p.out) + sequence * p.out_stride + (p.nf4_order ? in_nf4_order(column) : column);
    *reinterpret_cast<unsigned*>(to) = pack(first, second, T{});
  };
  if (begin >= end) {
    inputs_ready();
    // A row that belongs to no sequence.
    if (length == 0 && run == 0) {
      for (int i = 2 * threadIdx.x; i < group * D; i += 2 * kPagedThreads) put(i, 0, 0);
    }
    return;
  }
  T* const tiles = reinterpret_cast<T*>(shared);
  auto* const statistics = reinterpret_cast<float2*>(reinterpret_cast<char*>(shared) + paged_tile_bytes<D>(stages));  // [warps, heads]: m, l
  int* const last = reinterpret_cast<int*>(statistics + kPagedWarps * kMostHeads);
  const PaddedTile<T, D> q_tile{tiles};
  const auto key_tile = [&](int stage) { return PaddedTile<T, D>{tiles + (1 + 2 * (stages * warp + stage)) * kTileElements<D>}; };
  const auto value_tile = [&](int stage) { return PaddedTile<T, D>{key_tile(stage).base + kTileElements<D>}; };
  const int64_t* const table = p.tables + sequence * p.width;
  T *const pool_k = static_cast<T*>(p.pool_k) + head * D, *const pool_v = static_cast<T*>(p.pool_v) + head * D;
  const int64_t row_elements = p.K * D;
  const int last_page = (end - 1) / kPage;
  // The new row is left out.
  const auto fetch = [&](int page, int stage) {
    if (page <= last_page) {
      const int64_t from = table[page] * kPage * row_elements;
      const int rows = min(end, length - 1) - page * kPage;
#pragma unroll
      for (int i = lane; i < kPage * kVectors; i += 32) {
        const int row = i / kVectors, piece = i % kVectors;
        const int64_t at = from + row * row_elements + piece * 8;
        copy_16_bytes(shared_address(key_tile(stage).at(row, piece)), pool_k + at, row < rows);
        copy_16_bytes(shared_address(value_tile(stage).at(row, piece)), pool_v + at, row < rows);
      }
    }
    commit_copies();
  };
  int page = begin / kPage + warp;
#pragma unroll 1
  for (int stage = 0; stage < stages; ++stage) fetch(page + stage * kPagedWarps, stage);

  inputs_ready();
  const T* const q = static_cast<const T*>(p.q) + sequence * p.q_stride + head * group * D;
#pragma unroll
  for (int i = threadIdx.x; i < kPage * kVectors; i += kPagedThreads) {
    const int row = i / kVectors, piece = i % kVectors;
    *reinterpret_cast<uint4*>(q_tile.at(row, piece)) = row < group ? turned(p, sequence, q + row * D, piece) : make_uint4(0, 0, 0, 0);
  }
  // The warp that has the last page of all.
  const int new_row = (length - 1) % kPage;
  const bool newest = end == length && (last_page - begin / kPage) % kPagedWarps == warp && lane < kVectors;
  uint4 key, value;
  if (newest) {
    key = turned(p, sequence, static_cast<const T*>(p.k) + sequence * p.k_stride + head * D, lane);
    value = reinterpret_cast<const uint4*>(static_cast<const T*>(p.v) + sequence * p.v_stride + head * D)[lane];
    const int64_t at = (table[last_page] * kPage + new_row) * row_elements;
    reinterpret_cast<uint4*>(pool_k + at)[lane] = key;
    reinterpret_cast<uint4*>(pool_v + at)[lane] = value;
  }
  __syncthreads();
  PagedSums<D, kEights> sums;
  int stage = 0;
  for (; page <= last_page; page += kPagedWarps) {
    stages == kMostStages ? wait_copies<kMostStages - 1>() : wait_copies<kLeastStages - 1>();
    if (newest && page == last_page) {
      *reinterpret_cast<uint4*>(key_tile(stage).at(new_row, lane)) = key;
      *reinterpret_cast<uint4*>(value_tile(stage).at(new_row, lane)) = value;
    }
    __syncwarp();
    add_page<T, D, kEights>(sums, q_tile, key_tile(stage), value_tile(stage), page * kPage, begin, end, p.scale, p.softcap);
    __syncwarp();
    fetch(page + stages * kPagedWarps, stage);
    if (++stage == stages) stage = 0;
  }
  wait_copies<0>();
  __syncthreads();

  // The warps' parts, in the tiles' memory.
  float* const parts = reinterpret_cast<float*>(shared);  // [warps, group, D]
  put_parts<D, kEights>(sums, parts + warp * group * D, statistics + warp * kMostHeads, group);
  __syncthreads();
  const int first_run = low / kRunKeys, runs = (length - 1) / kRunKeys - first_run + 1;
  float* const partial = all_partial + (int64_t{sequence} * p.K + head) * group * gridDim.x * kLeft<D>;  // [group, runs, kLeft]
  for (int i = 2 * threadIdx.x; i < group * D; i += 2 * kPagedThreads) {
    const int row = i / D, d = i % D;
    const float3 first = joined<D, kPagedWarps>(parts, statistics, group, row, d), second = joined<D, kPagedWarps>(parts, statistics, group, row, d + 1);
    if (runs == 1) {
      put(i, first.x / first.z, second.x / second.z);
      continue;
    }
    float* const mine = partial + (row * gridDim.x + run) * kLeft<D>;
    __stcg(mine + d, first.x);
    __stcg(mine + d + 1, second.x);
    if (d == 0) {
      __stcg(mine + D, first.y);
      __stcg(mine + D + 1, first.z);
    }
  }
  if (runs == 1) return;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    int32_t* const arrived = all_arrived + sequence * p.K + head;
    *last = atomicAdd(arrived, 1) == runs - 1;
    if (*last) *arrived = 0;
  }
  __syncthreads();
  if (!*last) return;
  __threadfence();
  for (int i = 2 * threadIdx.x; i < group * D; i += 2 * kPagedThreads) {
    const float* const left = partial + (i / D * gridDim.x + first_run) * kLeft<D>;
    const float3 first = joined_runs<D>(left, runs, i % D), second = joined_runs<D>(left, runs, i % D + 1);
    put(i, first.x / first.z, second.x / second.z);
  }
#endif
}

// ---- launchers

// What a block has of a processor's shared memory if all run at once.
int share_of_block(int64_t blocks) {
  constexpr int kReservedOfBlock = 1024;
  const int64_t share = ceil_div(blocks, device_attribute(cudaDevAttrMultiProcessorCount));
  const int64_t most = device_attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor) / share - kReservedOfBlock;
  return static_cast<int>(std::min<int64_t>(most, device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin)));
}

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
    const bool turns = p->cos == nullptr || (p->rotary % 16 == 0 && p->rotary <= D && aligned16(p->cos) && aligned16(p->sin));
    const bool fits = turns && p->page_size == kPage && p->H / p->K <= kMostHeads && aligned(p->q, p->q_stride) &&
                      aligned(p->k, p->k_stride) && aligned(p->v, p->v_stride) && aligned(p->pool_k, 0) && aligned(p->pool_v, 0) &&
                      p->sequences < 65536 && device_attribute(cudaDevAttrComputeCapabilityMajor) >= 8 &&
                      device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin) >= paged_bytes<D>(kLeastStages);
    return fits ? p->sequences * p->H * ceil_div(p->longest, kRunKeys) * kLeft<D> : 0;
  });
}

extern "C" int paged_attention(const KernelPaged* p, float* partial, int32_t* arrived, void* stream) {
  if (p->sequences == 0) return cudaSuccess;
  return static_cast<int>(with_heads(*p, cudaErrorInvalidValue, [&](auto t, auto dim) -> int64_t {
    constexpr int D = decltype(dim)::value;
    const auto kernel = p->H / p->K > 8 ? paged_attention_kernel<decltype(t), D, 2> : paged_attention_kernel<decltype(t), D, 1>;
    const int64_t runs = ceil_div(p->longest, kRunKeys), blocks = runs * p->K * p->sequences;
    // More stages where that leaves no block out, and so much that a processor has no more of few blocks than its share: else those that start while the
    // kernel ahead still runs crowd on the processors that it has left free.
    const int share = share_of_block(blocks), stages = paged_bytes<D>(kMostStages) <= share ? kMostStages : kLeastStages;
    const int shared = std::max(share, paged_bytes<D>(stages));
    const int error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
    if (error != cudaSuccess) return error;
    const dim3 grid(static_cast<unsigned>(runs), static_cast<unsigned>(p->K), static_cast<unsigned>(p->sequences));
    return launch_chained(true, kernel, grid, dim3(kPagedThreads), shared, stream, *p, stages, partial, arrived);
  }));
}
