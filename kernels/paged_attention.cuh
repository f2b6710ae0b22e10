// defines: attend: one key/value head of one run of keys of one sequence over pages, by four warps (paged_attention.cu, decode.cu).
#pragma once

#include "chain.cuh"
#include "mma.cuh"

namespace ferrotune {
namespace {

constexpr int kPage = 16, kPagedWarps = 4, kPagedThreads = 32 * kPagedWarps, kMostHeads = 16, kPagedStages = 2;

// What a run leaves of a head: o [D], m, l.
template <int D>
constexpr int kLeft = D + 2;

template <int D>
constexpr int kTileElements = kPage * (D + 8);

// q, stages of keys and values of each warp; m and l of each warp's heads; whether this run came last.
template <int D>
constexpr int kPagedTileBytes = (1 + 2 * kPagedStages * kPagedWarps) * kTileElements<D> * 2;
template <int D>
constexpr int kPagedBytes = kPagedTileBytes<D> + kPagedWarps * kMostHeads * 8 + 16;

// Pages of a run: longer runs for long contexts, or adding them up takes too long.
inline int pages_of_run(int64_t longest) { return longest <= 8192 ? 2 * kPagedWarps : 8 * kPagedWarps; }

// What a warp has of its keys so far, of heads 2 t and 2 t + 1 of each eight of the group: m of all its keys, l of rows g and g + 8 of its
// pages, o^T of elements 16 i + g and g + 8.
template <int D, int kEights>
struct PagedSums {
  float m[kEights][2], l[kEights][2] = {}, o[kEights][D / 16][4] = {};
  __device__ __forceinline__ PagedSums() {
#pragma unroll
    for (int e = 0; e < kEights; ++e) m[e][0] = m[e][1] = -INFINITY;
  }
};

// An 8x8 matrix of pairs, as a product leaves it, turned to what a product takes.
__device__ __forceinline__ unsigned transposed(unsigned rows) {
  unsigned columns;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(columns) : "r"(rows));
  return columns;
}

// One page more: keys from `first` on, of which [begin, end) are seen. Keys are the rows of the products and heads their columns, eight at
// a time: S^T = K Q^T, O^T += V^T P^T.
template <typename T, int D, int kEights, typename AnyTile>
__device__ __forceinline__ void add_page(PagedSums<D, kEights>& sums, const AnyTile& query, const AnyTile& keys, const AnyTile& values, int first,
                                         int begin, int end, float scale, float softcap) {
  const int lane = threadIdx.x % 32, g = lane / 4;
  float s[kEights][2][4] = {};
#pragma unroll
  for (int i = 0; i < D / 32; ++i) {
    unsigned k[2][4];
    load_a(k[0], keys, 0, 4 * i);
    load_a(k[1], keys, 0, 4 * i + 2);
#pragma unroll
    for (int e = 0; e < kEights; ++e) {
      unsigned q[4];
      load_matrices(q, query.at(8 * e + lane % 8, 4 * i + lane / 8));
      multiply(s[e][0], k[0], q[0], q[1], T{});
      multiply(s[e][1], k[1], q[2], q[3], T{});
    }
  }
  const bool seen[2] = {first + g >= begin && first + g < end, first + g + 8 >= begin && first + g + 8 < end};
  unsigned weights[kEights][2];
#pragma unroll
  for (int e = 0; e < kEights; ++e) {
    float p[2][2], factor[2];  // [key, head]
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      float& m = sums.m[e][j];
      float most = m;
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float score = (s[e][0][2 * h + j] + s[e][1][2 * h + j]) * scale;
        if (softcap > 0) score = softcap * tanhf(score / softcap);
        p[h][j] = seen[h] ? score : -INFINITY;
        most = fmaxf(most, p[h][j]);
      }
#pragma unroll
      for (int step = 4; step < 32; step *= 2) most = fmaxf(most, __shfl_xor_sync(0xffffffff, most, step));
      // A page of which nothing is seen leaves everything as it was.
      const float base = most == -INFINITY ? 0 : most;
      factor[j] = __expf(m - base);
      m = most;
      p[0][j] = __expf(p[0][j] - base), p[1][j] = __expf(p[1][j] - base);
      sums.l[e][j] = sums.l[e][j] * factor[j] + (p[0][j] + p[1][j]);
    }
    if (__any_sync(0xffffffff, factor[0] != 1 || factor[1] != 1)) {
#pragma unroll
      for (int i = 0; i < D / 16; ++i) {
        float(&o)[4] = sums.o[e][i];
        o[0] *= factor[0], o[1] *= factor[1], o[2] *= factor[0], o[3] *= factor[1];
      }
    }
    weights[e][0] = transposed(pack(p[0][0], p[0][1], T{}));
    weights[e][1] = transposed(pack(p[1][0], p[1][1], T{}));
  }
#pragma unroll
  for (int i = 0; i < D / 16; ++i) {
    unsigned v[4];
    load_matrices_transposed(v, values.at(lane % 8 + lane / 16 * 8, 2 * i + lane / 8 % 2));
#pragma unroll
    for (int e = 0; e < kEights; ++e) multiply(sums.o[e][i], v, weights[e][0], weights[e][1], T{});
  }
}

// To parts [group, D] and statistics [group], m and l, of this warp.
template <int D, int kEights>
__device__ __forceinline__ void put_parts(const PagedSums<D, kEights>& sums, float* parts, float2* statistics, int group) {
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
  for (int e = 0; e < kEights; ++e) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      float l = sums.l[e][j];
#pragma unroll
      for (int step = 4; step < 32; step *= 2) l += __shfl_xor_sync(0xffffffff, l, step);
      const int row = 8 * e + 2 * t + j;
      if (row >= group) continue;
      if (g == 0) statistics[row] = make_float2(sums.m[e][j], l);
#pragma unroll
      for (int i = 0; i < D / 16; ++i) {
        parts[row * D + 16 * i + g] = sums.o[e][i][j];
        parts[row * D + 16 * i + g + 8] = sums.o[e][i][2 + j];
      }
    }
  }
}

// o, m and l of element d of head `row` from the parts of kWarps warps.
template <int D, int kWarps>
__device__ __forceinline__ float3 joined(const float* parts, const float2* statistics, int group, int row, int d) {
  float most = -INFINITY, sum = 0, total = 0;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) most = fmaxf(most, statistics[w * kMostHeads + row].x);
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    const float2 own = statistics[w * kMostHeads + row];
    const float factor = __expf(own.x - most);
    sum += factor * parts[(w * group + row) * D + d];
    total += factor * own.y;
  }
  return make_float3(sum, most, total);
}

// The same from what `runs` runs left one behind the other.
template <int D>
__device__ __forceinline__ float3 joined_runs(const float* left, int runs, int d) {
  float most = -INFINITY, sum = 0, total = 0;
#pragma unroll 4
  for (int r = 0; r < runs; ++r) {
    const float* const theirs = left + r * kLeft<D>;
    const float their_most = __ldcg(theirs + D), higher = fmaxf(most, their_most);
    const float factor = __expf(most - higher), their_factor = __expf(their_most - higher);
    sum = sum * factor + their_factor * __ldcg(theirs + d);
    total = total * factor + their_factor * __ldcg(theirs + D + 1);
    most = higher;
  }
  return make_float3(sum, most, total);
}

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

}  // namespace
}  // namespace ferrotune
