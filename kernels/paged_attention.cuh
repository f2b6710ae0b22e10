// defines: add_page, put_parts, joined, joined_runs: attention of a group of heads over pages of 16 keys, by a warp (paged_attention.cu, decode.cu).
#pragma once

#include "chain.cuh"
#include "mma.cuh"

namespace ferrotune {
namespace {

constexpr int kPage = 16, kMostHeads = 16;

// What a run leaves of a head: o [D], m, l.
template <int D>
constexpr int kLeft = D + 2;

template <int D>
constexpr int kTileElements = kPage * (D + 8);

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
// a time: S^T = K Q^T, O^T += V^T P^T, of kWidth elements from piece `piece` of eight on.
template <typename T, int D, int kEights, int kWidth, typename AnyTile>
__device__ __forceinline__ void add_page(PagedSums<kWidth, kEights>& sums, const AnyTile& query, const AnyTile& keys, const AnyTile& values, int first,
                                         int begin, int end, float scale, float softcap, int piece = 0) {
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
      for (int i = 0; i < kWidth / 16; ++i) {
        float(&o)[4] = sums.o[e][i];
        o[0] *= factor[0], o[1] *= factor[1], o[2] *= factor[0], o[3] *= factor[1];
      }
    }
    weights[e][0] = transposed(pack(p[0][0], p[0][1], T{}));
    weights[e][1] = transposed(pack(p[1][0], p[1][1], T{}));
  }
#pragma unroll
  for (int i = 0; i < kWidth / 16; ++i) {
    unsigned v[4];
    load_matrices_transposed(v, values.at(lane % 8 + lane / 16 * 8, piece + 2 * i + lane / 8 % 2));
#pragma unroll
    for (int e = 0; e < kEights; ++e) multiply(sums.o[e][i], v, weights[e][0], weights[e][1], T{});
  }
}

// To parts, rows of D for each of the group, and statistics [group], m and l, of this warp.
template <int D, int kEights, int kWidth>
__device__ __forceinline__ void put_parts(const PagedSums<kWidth, kEights>& sums, float* parts, float2* statistics, int group) {
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
      for (int i = 0; i < kWidth / 16; ++i) {
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

}  // namespace
}  // namespace ferrotune
