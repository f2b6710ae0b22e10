// The next token of each row of logits: the rules and their order of src/generate/sampler.rs.
//   score = logit / temperature, weight w = e^(score - largest score)
//   top-k  keeps scores not below the k-th; top-p drops the least likely while all dropped have at most 1 - p of the sum of w (the
//          lower ids first among equals); min-p keeps w >= min_p
//   token  the first in the order of ids at which the sum of the kept w exceeds u times their total
// Fuses the arg max, log-sum-exp, three filters and the draw; plain libtorch sorts the vocabulary. Moves: a row twice, and three
// times more for each of top-k and top-p, after the first time from the cache, or from shared memory where a thread block's part fits there.
//
// Of few rows each is the work of a cluster of thread blocks on Hopper, a piece of the vocabulary each, which read each other's sums.
//
// Thresholds are found by the bits of the scores, 11, 11 and 10 at a time (a radix select), over counts or over sums of w. These are
// integers, w 2^40, so that their sum has no order and the result no chance in it. Few rows without top-k and top-p need no threshold and stay in
// registers: draw.cuh.
#include <cstring>

#include "draw.cuh"

namespace ferrotune {
namespace {

constexpr int kBins = 2048;

struct Best {
  float value;
  int id;
  float sum;  // of e^(logit - value)
  bool valid;
};

__device__ inline Best better(const Best& a, const Best& b) {
  const bool first = a.value > b.value || (a.value == b.value && a.id < b.id);
  Best best = first ? a : b;
  const float other = first ? b.value : a.value;
  // Nothing beside -infinity has any weight.
  best.sum += (first ? b.sum : a.sum) * (other == -INFINITY ? 0 : __expf(other - best.value));
  best.valid = a.valid && b.valid;
  return best;
}

__device__ inline Best shuffled(const Best& a, int step) {
  return {__shfl_xor_sync(0xffffffff, a.value, step), __shfl_xor_sync(0xffffffff, a.id, step),
          __shfl_xor_sync(0xffffffff, a.sum, step), static_cast<bool>(__shfl_xor_sync(0xffffffff, a.valid, step))};
}

// Elements that are under way at once, as a thread has nothing else to wait with: so many vectors of four.
constexpr int kAtOnce = 4;

// More of a row, whose ids ascend and are behind all before. One exponential an element, and the largest of all first, so that it is the only one.
template <int kCount, typename Id>
__device__ inline void take(Best& best, const float (&v)[kCount], const Id& id_of) {
  float most = v[0];
#pragma unroll
  for (int i = 1; i < kCount; ++i) most = larger(most, v[i]);
  best.valid = best.valid && most < INFINITY;
  if (most > best.value) {
    best.sum *= __expf(best.value - most);
    best.value = most;
    // The first of equals.
#pragma unroll
    for (int i = kCount - 1; i >= 0; --i) best.id = v[i] == most ? id_of(i) : best.id;
  }
  if (!(best.value > -INFINITY)) return;
  float sums[4] = {};
#pragma unroll
  for (int i = 0; i < kCount; ++i) sums[i % 4] += __expf(v[i] - best.value);
  best.sum += (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

// Of this thread's share of [begin, end), which goes to `copy`, too, unless that is null; `aligned`: from, begin and end are whole vectors.
__device__ inline Best best_of(const float* from, int begin, int end, bool aligned, float* copy) {
  Best best{-INFINITY, 0x7fffffff, 0, true};
  const int lane = threadIdx.x;
  for (int first = begin + 4 * lane; aligned && first < end; first += kAtOnce * 4 * kThreads) {
    float v[4 * kAtOnce];
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) {
      const int at = first + 4 * k * kThreads;
      reinterpret_cast<float4&>(v[4 * k]) = at < end ? *reinterpret_cast<const float4*>(from + at) : make_float4(-INFINITY, -INFINITY, -INFINITY, -INFINITY);
    }
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) {
      const int at = first + 4 * k * kThreads;
      if (copy != nullptr && at < end) *reinterpret_cast<float4*>(copy + at - begin) = reinterpret_cast<const float4&>(v[4 * k]);
    }
    take(best, v, [&](int i) { return first + i / 4 * 4 * kThreads + i % 4; });
  }
  for (int i = begin + lane; !aligned && i < end; i += kThreads) {
    const float v[1] = {from[i]};
    take(best, v, [&](int) { return i; });
  }
  return best;
}

// body(i, from[i]) for this lane's share of [begin, end), in the order of i.
template <typename Body>
__device__ inline void each_of(const float* from, int begin, int end, int lane, int lanes, bool aligned, Body&& body) {
  if (aligned) {
    for (int first = begin + 4 * lane; first < end; first += kAtOnce * 4 * lanes) {
      float4 v[kAtOnce];
#pragma unroll
      for (int k = 0; k < kAtOnce; ++k) {
        const int at = first + 4 * k * lanes;
        v[k] = at < end ? *reinterpret_cast<const float4*>(from + at) : make_float4(0, 0, 0, 0);
      }
#pragma unroll
      for (int k = 0; k < kAtOnce; ++k) {
        const int at = first + 4 * k * lanes;
        if (at >= end) break;
        body(at, v[k].x), body(at + 1, v[k].y), body(at + 2, v[k].z), body(at + 3, v[k].w);
      }
    }
    return;
  }
  for (int i = begin + lane; i < end; i += lanes) body(i, from[i]);
}

struct Shared {
  Best best[kWarps];
  Mass sums[kWarps];
  Mass bins[kBins];
  Mass rest;
  Mass of_block[3];
  Best best_of_block;
  unsigned key;
  int chosen;
  float logit;  // of the chosen one
};

// The thread blocks of a row. What one does between two meetings, others see after the second.
struct Team {
  int size, block;

  __device__ void meet() const {
    size > 1 ? meet_cluster() : __syncthreads();
  }
  // The block's sum: of the team, and of the blocks before this one. Each call has a place of its own, which is written but once.
  __device__ Mass before_block(Mass& total, Shared& s, int place) const {
    if (size == 1) return 0;
    if (threadIdx.x == 0) s.of_block[place] = total;
    meet();
    Mass before = 0;
    total = 0;
    for (int b = 0; b < size; ++b) {
      const Mass other = of_cluster(&s.of_block[place], b, size);
      if (b < block) before += other;
      total += other;
    }
    return before;
  }
};

// Sum over the threads before this one; the block's sum in `total`.
__device__ inline Mass before_this(Mass value, Shared& s, Mass& total) {
  const Mass inclusive = scan(value);
  __syncthreads();
  if (threadIdx.x % 32 == 31) s.sums[threadIdx.x / 32] = inclusive;
  __syncthreads();
  const Mass of_warps = scan(s.sums[threadIdx.x % 32]);
  total = __shfl_sync(0xffffffff, of_warps, 31);
  return __shfl_sync(0xffffffff, of_warps, threadIdx.x / 32) - s.sums[threadIdx.x / 32] + inclusive - value;
}

// The smallest key at which the sum of mass(key) over all keys up to it exceeds `rest`, and what of rest is left there.
template <typename Each>
__device__ inline unsigned select(Mass& rest, Shared& s, const Team& team, const Each& each) {
  unsigned prefix = 0;
  int bits = 32;
  for (const int width : {11, 11, 10}) {
    for (int i = threadIdx.x; i < kBins; i += kThreads) s.bins[i] = 0;
    __syncthreads();
    const int shift = bits - width;
    each([&](unsigned key, Mass mass) {
      if (bits == 32 || key >> bits == prefix) atomicAdd(&s.bins[key >> shift & ((1u << width) - 1)], mass);
    });
    team.meet();
    // Two bins a thread, of all blocks: each finds the key by itself.
    Mass low = 0, high = 0, total;
    for (int b = 0; b < team.size; ++b) {
      low += of_cluster(&s.bins[2 * threadIdx.x], b, team.size);
      high += of_cluster(&s.bins[2 * threadIdx.x + 1], b, team.size);
    }
    const Mass before = before_this(low + high, s, total);
    if (before <= rest && rest < before + low + high) {
      const bool second = rest >= before + low;
      s.key = 2 * threadIdx.x + second;
      s.rest = rest - before - (second ? low : 0);
    }
    __syncthreads();
    prefix = prefix << width | s.key;
    rest = s.rest;
    bits = shift;
    team.meet();
  }
  return prefix;
}

template <int kRows>
__global__ void __launch_bounds__(kThreads) sample_kernel(const __grid_constant__ Params<kRows> params, const float* __restrict__ logits,
                                                          int64_t* __restrict__ tokens, int64_t* __restrict__ results, int64_t N, int64_t first, int V,
                                                          bool may_hold) {
  __shared__ Shared s;
  extern __shared__ __align__(16) float held[];
  const Team team{static_cast<int>(gridDim.x), static_cast<int>(blockIdx.x)};
  const int64_t row = first + blockIdx.y;
  const float* const logits_of_row = logits + row * V;
  const double(&own)[5] = params.of[blockIdx.y];
  const float temperature = static_cast<float>(own[0]);
  const double top_k = own[1], top_p = own[2], min_p = own[3], u = own[4];

  const bool aligned = V % 4 == 0 && reinterpret_cast<uintptr_t>(logits_of_row) % 16 == 0;
  // Of each block, and of each of its warps when a token is drawn: a run of ids.
  const int run = run_of(V, team.size);
  const int own_begin = min(team.block * kWarps * run, V), own_end = min(own_begin + kWarps * run, V);
  // What is read again comes from shared memory where all of the block's fits there.
  const bool holds = aligned && may_hold;
  Best best = best_of(logits_of_row, own_begin, own_end, aligned, holds ? held : nullptr);
  const float* const from = holds ? held - own_begin : logits_of_row;
  for (int step = 16; step > 0; step /= 2) best = better(best, shuffled(best, step));
  if (threadIdx.x % 32 == 0) s.best[threadIdx.x / 32] = best;
  __syncthreads();
  best = s.best[threadIdx.x % 32];
  for (int step = 16; step > 0; step /= 2) best = better(best, shuffled(best, step));
  if (team.size > 1) {
    if (threadIdx.x == 0) s.best_of_block = best;
    team.meet();
    best = of_cluster(&s.best_of_block, 0, team.size);
    for (int b = 1; b < team.size; ++b) best = better(best, of_cluster(&s.best_of_block, b, team.size));
  }
  const bool valid = best.valid && best.value > -INFINITY;
  int chosen = best.id;
  float logit = best.value, drawn_from = 0;
  bool writes = team.block == 0;
  if (valid && temperature > 0) {
    const float highest = best.value / temperature;
    // A division by one would take longer than what is left of the work.
    const auto scaled = [&](float v) { return temperature == 1 ? v : v / temperature; };
    const auto score_of = [&](int i) { return scaled(from[i]); };
    const auto each_score = [&](int begin, int end, int lane, int lanes, const auto& body) {
      each_of(from, begin, end, lane, lanes, aligned, [&](int, float v) { body(scaled(v)); });
    };
    const auto mass_of = [&](float score) { return units_of(expf(score - highest)); };
    unsigned lowest = 0;  // key of the least score that is kept
    Mass dropped_equals = 0;
    if (top_k > 0 && top_k < V) {
      // Ascending, V - k tokens stand before the k-th largest.
      Mass rest = static_cast<Mass>(V - static_cast<int>(top_k));
      lowest = select(rest, s, team, [&](const auto& add) {
        each_score(own_begin, own_end, threadIdx.x, kThreads, [&](float score) { add(key_of(score), Mass{1}); });
      });
    }
    if (top_p < 1) {
      Mass mine = 0, total;
      each_score(own_begin, own_end, threadIdx.x, kThreads, [&](float score) {
        if (key_of(score) >= lowest) mine += mass_of(score);
      });
      before_this(mine, s, total);
      team.before_block(total, s, 0);
      Mass rest = static_cast<Mass>((1 - top_p) * static_cast<double>(total));
      if (rest >= total) rest = total - 1;
      const unsigned from_top_k = lowest;
      lowest = select(rest, s, team, [&](const auto& add) {
        each_score(own_begin, own_end, threadIdx.x, kThreads, [&](float score) {
          const unsigned key = key_of(score);
          if (key >= from_top_k) add(key, mass_of(score));
        });
      });
      dropped_equals = rest / mass_of(value_of(lowest));
    }
    const auto kept = [&](float score) {
      const Mass mass = mass_of(score);
      return key_of(score) >= lowest && (min_p <= 0 || expf(score - highest) >= min_p) ? mass : 0;
    };
    // Each warp has a run of ids; the run that the draw falls into is looked at again by all.
    const int begin = min(own_begin + static_cast<int>(threadIdx.x / 32) * run, V), end = min(begin + run, V);
    // Equals that were dropped are the first ones: few rows have any.
    Mass equals_before = 0;
    if (dropped_equals > 0) {
      Mass mine = 0, total;
      each_score(begin, end, threadIdx.x % 32, 32, [&](float score) { mine += key_of(score) == lowest; });
      before_this(mine, s, total);
      equals_before = team.before_block(total, s, 1);
      for (int w = 0; w < static_cast<int>(threadIdx.x / 32); ++w) equals_before += s.sums[w];
    }
    const auto kept_in_order = [&](float score, Mass& equals) {
      if (dropped_equals > 0 && key_of(score) == lowest && equals++ < dropped_equals) return Mass{0};
      return kept(score);
    };
    Mass mine = 0, total;
    if (dropped_equals == 0) {
      each_score(begin, end, threadIdx.x % 32, 32, [&](float score) { mine += kept(score); });
    } else {
      Mass equals = equals_before;
      for (int i = begin; i < end; i += 32) {
        const int id = i + threadIdx.x % 32;
        const float score = id < end ? score_of(id) : 0;
        const bool equal = id < end && key_of(score) == lowest;
        const unsigned all = __ballot_sync(0xffffffff, equal);
        Mass own = equals + __popc(all & ((1u << threadIdx.x % 32) - 1));
        if (id < end) mine += kept_in_order(score, own);
        equals += __popc(all);
      }
    }
    before_this(mine, s, total);
    const Mass of_block = total, before_block = team.before_block(total, s, 2);
    const Mass target = min(static_cast<Mass>(u * static_cast<double>(total)), total - 1);
    writes = before_block <= target && target < before_block + of_block;
    // The first run behind which the target is passed, or the last.
    const Mass own_run = s.sums[threadIdx.x % 32], behind_run = before_block + scan(own_run);
    const unsigned passed = __ballot_sync(0xffffffff, behind_run > target);
    const int of_run = passed == 0 ? kWarps - 1 : __ffs(static_cast<int>(passed)) - 1;
    const Mass before_run = __shfl_sync(0xffffffff, behind_run - own_run, of_run);
    __syncthreads();
    // The equals before that run.
    if (dropped_equals > 0) {
      if (threadIdx.x % 32 == 0) s.sums[threadIdx.x / 32] = equals_before;
      __syncthreads();
      equals_before = s.sums[of_run];
      __syncthreads();
    }
    const int run_begin = min(own_begin + of_run * run, V), run_end = min(run_begin + run, V), each = (run + kThreads - 1) / kThreads;
    const int piece_begin = run_begin + threadIdx.x * each, piece_end = min(piece_begin + each, run_end);
    Mass unused, equals = equals_before;
    if (dropped_equals > 0) {
      Mass own = 0;
      for (int i = piece_begin; i < piece_end; ++i) own += key_of(score_of(i)) == lowest;
      equals += before_this(own, s, unused);
    }
    mine = 0;
    Mass seen = equals;
    for (int i = piece_begin; i < piece_end; ++i) mine += kept_in_order(score_of(i), seen);
    Mass sum = before_run + before_this(mine, s, unused);
    if (sum <= target && target < sum + mine) {
      seen = equals;
      for (int i = piece_begin; i < piece_end; ++i) {
        sum += kept_in_order(score_of(i), seen);
        if (sum > target) {
          s.chosen = i, s.logit = from[i];
          break;
        }
      }
    }
    __syncthreads();
    if (writes) chosen = s.chosen, logit = s.logit;
    drawn_from = scaled(logit) - highest - logf(static_cast<float>(total) * 0x1p-40f);
  }
  if (writes && threadIdx.x == 0) {
    tokens[row] = results[row] = valid ? chosen : -1;
    float* const logprobs = reinterpret_cast<float*>(results + N);
    logprobs[row] = valid ? logit - best.value - logf(best.sum) : 0;
    logprobs[N + row] = drawn_from;
  }
  // Nobody leaves while others read what it found.
  if (team.size > 1) team.meet();
}

// Rows first .. first + count of N.
template <int kRows>
int launch(const float* logits, const double* params, int64_t* tokens, int64_t* results, int64_t N, int64_t first, int64_t count, int64_t V, void* stream) {
  Params<kRows> own;
  std::memcpy(own.of, params + 5 * first, count * sizeof own.of[0]);
  unsigned blocks = 1;
  if (device_attribute(cudaDevAttrComputeCapabilityMajor) >= 9) {
    // A block fills a processor, and a cluster must find its processors beside each other: half of them stay free.
    while (blocks < kMostBlocks && 4 * blocks * count <= device_attribute(cudaDevAttrMultiProcessorCount)) blocks *= 2;
  }
  const int run = run_of(static_cast<int>(V), static_cast<int>(blocks));
  bool plain = V % 4 == 0 && aligned16(logits) && run <= kMostRun;
  for (int64_t i = 0; i < count; ++i) plain = plain && (own.of[i][1] <= 0 || own.of[i][1] >= V) && own.of[i][2] >= 1;
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {blocks, 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(blocks, static_cast<unsigned>(count));
  config.blockDim = dim3(kThreads);
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &cluster;
  config.numAttrs = blocks > 1 ? 1 : 0;
  if (plain) {
    const auto kernel = run <= kMostRun / 2 ? draw_kernel<kMostVectors / 2, kRows> : draw_kernel<kMostVectors, kRows>;
    return cudaLaunchKernelEx(&config, kernel, own, logits, tokens, results, N, first, static_cast<int>(V));
  }
  const int64_t held = int64_t{kWarps} * run * 4;
  const int64_t room = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin) - static_cast<int64_t>(sizeof(Shared));
  const bool may_hold = held <= room;
  config.dynamicSmemBytes = may_hold ? held : 0;
  const int error = cudaFuncSetAttribute(sample_kernel<kRows>, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(config.dynamicSmemBytes));
  if (error != cudaSuccess) return error;
  return cudaLaunchKernelEx(&config, sample_kernel<kRows>, own, logits, tokens, results, N, first, static_cast<int>(V), may_hold);
}

}  // namespace
}  // namespace ferrotune

using namespace ferrotune;

extern "C" int sample(const float* logits, const double* params, int64_t* tokens, int64_t* results, int64_t N, int64_t V, void* stream) {
  if (V < 1 || V > 1 << 28) return cudaErrorInvalidValue;
  for (int64_t first = 0; first < N; first += kMostParams) {
    const int64_t count = N - first < kMostParams ? N - first : kMostParams;
    const auto own = count <= kFewParams ? launch<kFewParams> : launch<kMostParams>;
    if (const int error = own(logits, params, tokens, results, N, first, count, V, stream); error != cudaSuccess) return error;
  }
  return cudaSuccess;
}
