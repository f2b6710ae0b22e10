// defines: draw_kernel, kMostRun: the next token of few rows of logits without top-k and top-p, as kernels/sample.cu draws it.
//   token  the first in the order of ids at which the sum of the kept w exceeds u times their total, or for temperature 0 the largest logit's
// Fuses the arg max, log-sum-exp, min-p and the draw. Moves: a row once. Each warp has its run of ids in registers from the largest logit to the draw,
// which the warp that owns it finds alone; thread blocks of a row meet twice, and lanes read what all of them found at once.
//
// An H200, one row of 128,256 in a step of 8B: 8.7 us at temperature 1 (20.6 by the kernel of all cases), where an empty launch takes 3.5.
#pragma once

#include "sample.cuh"

namespace ferrotune {
namespace {

// Of four logits of a lane: what registers hold.
constexpr int kMostVectors = 8, kMostRun = kMostVectors * 128;

__device__ inline unsigned largest_of_warp(unsigned key) {
#if __CUDA_ARCH__ >= 800
  return __reduce_max_sync(0xffffffff, key);
#else
  for (int step = 16; step > 0; step /= 2) key = max(key, __shfl_xor_sync(0xffffffff, key, step));
  return key;
#endif
}
template <typename Value>
__device__ inline Value sum_of_lanes(Value value, int lanes) {
  for (int step = lanes / 2; step > 0; step /= 2) value += __shfl_xor_sync(0xffffffff, value, step);
  return value;
}

// What a thread block found of its part of a row.
struct DrawPart {
  Mass mass;   // of the kept
  float sum;   // of e^(logit - largest)
  unsigned id; // the first with the largest logit
};

template <int kVectors, int kRows>
__global__ void __launch_bounds__(kThreads) draw_kernel(const __grid_constant__ Params<kRows> params, const float* __restrict__ logits,
                                                        int64_t* __restrict__ tokens, int64_t* __restrict__ results, int64_t N, int64_t first, int V) {
  __shared__ unsigned keys[kWarps], key_of_block;
  __shared__ DrawPart parts[kWarps], part_of_block;
  constexpr int kCount = 4 * kVectors;
  const int size = static_cast<int>(gridDim.x), block = static_cast<int>(blockIdx.x), lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t row = first + blockIdx.y;
  const int run = run_of(V, size), begin = min((block * kWarps + warp) * run, V), end = min(begin + run, V);
  const float* const from = logits + row * V;
  float v[kCount];
#pragma unroll
  for (int k = 0; k < kVectors; ++k) {
    const int at = begin + 4 * (lane + 32 * k);
    reinterpret_cast<float4&>(v[4 * k]) = at < end ? *reinterpret_cast<const float4*>(from + at) : make_float4(-INFINITY, -INFINITY, -INFINITY, -INFINITY);
  }
  const float temperature = static_cast<float>(params.of[blockIdx.y][0]);
  const double min_p = params.of[blockIdx.y][3], u = params.of[blockIdx.y][4];
  const auto meet = [&] { size > 1 ? meet_cluster() : __syncthreads(); };
  const int other = lane % kMostBlocks;

  // The largest of all; infinity's key or more where one is infinite or not a number.
  float most = v[0];
#pragma unroll
  for (int i = 1; i < kCount; ++i) most = larger(most, v[i]);
  unsigned key = largest_of_warp(isnan(most) ? 0xffffffffu : key_of(most));
  if (lane == 0) keys[warp] = key;
  __syncthreads();
  key = largest_of_warp(keys[lane]);
  if (size > 1) {
    if (threadIdx.x == 0) key_of_block = key;
    meet();
    key = largest_of_warp(other < size ? of_cluster(&key_of_block, other, size) : 0);
  }
  const float best = value_of(key);
  const bool valid = key < key_of(INFINITY) && key > key_of(-INFINITY), draws = valid && temperature > 0;

  const float highest = best / temperature;
  // A division by one would take longer than the rest.
  const auto weight_of = [&](float logit) { return expf((temperature == 1 ? logit : logit / temperature) - highest); };
  const auto mass_of = [&](float logit) {
    const float weight = weight_of(logit);
    return min_p <= 0 || weight >= min_p ? units_of(weight) : Mass{0};
  };
  // The kept w are all that there is.
  const bool all = draws && temperature == 1 && min_p <= 0;
  Mass mass = 0;
  float sum = 0;
  unsigned id = 0xffffffff;
  if (draws) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) mass += mass_of(v[i]);
  } else {
#pragma unroll
    for (int i = kCount - 1; i >= 0; --i) id = v[i] == best ? begin + 4 * (lane + 32 * (i / 4)) + i % 4 : id;
  }
  if (!all) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) sum += __expf(v[i] - best);
  }
  const Mass of_warp = sum_of_lanes(mass, 32);
  sum = sum_of_lanes(sum, 32);
  id = ~largest_of_warp(~id);
  if (lane == 0) parts[warp] = {of_warp, sum, id};
  __syncthreads();
  const DrawPart own = parts[lane];
  const Mass behind_warp = scan(own.mass);
  Mass before = __shfl_sync(0xffffffff, behind_warp - own.mass, warp), total = __shfl_sync(0xffffffff, behind_warp, 31);
  sum = sum_of_lanes(own.sum, 32);
  id = ~largest_of_warp(~own.id);
  if (size > 1) {
    if (threadIdx.x == 0) part_of_block = {total, sum, id};
    meet();
    const DrawPart part = other < size ? of_cluster(&part_of_block, other, size) : DrawPart{0, 0, 0xffffffff};
    before += sum_of_lanes(other < block ? part.mass : 0, kMostBlocks);
    total = sum_of_lanes(part.mass, kMostBlocks);
    sum = sum_of_lanes(part.sum, kMostBlocks);
    id = ~largest_of_warp(~part.id);
  }
  const auto put = [&](int64_t token, float logprob, float drawn_from) {
    tokens[row] = results[row] = token;
    auto* const logprobs = reinterpret_cast<float*>(results + N);
    logprobs[row] = logprob;
    logprobs[N + row] = drawn_from;
  };
  const float of_all = static_cast<float>(total) * 0x1p-40f, log_sum = logf(all ? of_all : sum);
  const Mass target = min(static_cast<Mass>(u * static_cast<double>(total)), total - 1);
  if (!draws) {
    if (block == 0 && threadIdx.x == 0) put(valid ? static_cast<int64_t>(id) : -1, valid ? -log_sum : 0, 0);
  } else if (before <= target && target < before + of_warp) {
    Mass rest = target - before;
#pragma unroll 1
    for (int k = 0; k < kVectors; ++k) {
      // v by a constant place only, or it would leave the registers.
      float four[4] = {};
#pragma unroll
      for (int i = 0; i < kCount; ++i) four[i % 4] = i / 4 == k ? v[i] : four[i % 4];
      Mass own_mass = 0;
#pragma unroll
      for (int i = 0; i < 4; ++i) own_mass += mass_of(four[i]);
      const Mass behind = scan(own_mass), all_of_them = __shfl_sync(0xffffffff, behind, 31);
      if (rest >= all_of_them) {
        rest -= all_of_them;
        continue;
      }
      Mass seen = behind - own_mass;
      if (seen <= rest && rest < behind) {
        int i = 0;
        while (i < 3 && (seen += mass_of(four[i])) <= rest) ++i;
        float logit = four[0];
        for (int j = 1; j < 4; ++j) logit = i == j ? four[j] : logit;
        const float score = temperature == 1 ? logit : logit / temperature;
        put(begin + 4 * (lane + 32 * k) + i, logit - best - log_sum, score - highest - logf(of_all));
      }
      break;
    }
  }
  // Nobody leaves while others read what it found.
  if (size > 1) leave_cluster();
}

}  // namespace
}  // namespace ferrotune
