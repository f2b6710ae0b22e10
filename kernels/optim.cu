// AdamW with its moments in 8 bits (the formulas are in csrc/adamw_8bit.cpp), all tensors in one launch: LoRA on
// Llama-3.1-8B has 448 of them, of 16 thousand elements and more, and a launch for each would cost more than its work. Moments
// are read, updated and quantised again in registers; nothing in f32 reaches memory but the parameter. Moves 16.06 bytes an
// element: p read and written, g, two indices read and written, and absmax; AdamW in f32 moves 28 (libtorch's, which stores the
// scaled gradient as well, 32).
//
// Each operation is rounded as on the CPU, so bytes and parameters are the same.
#include "dynamic_map.h"
#include "vector.cuh"

namespace ferrotune {
namespace {

// ---- device

constexpr int kThreads = 256, kWarps = kThreads / 32;
// A warp takes a block of 256 elements: a lane those at 4 lane and at 128 + 4 lane.
constexpr int kParts = 2, kWidth = 4;
constexpr int kTensors = 512;

// By value: 30 KiB of the 32,764 bytes that a launch may carry.
struct Batch {
  KernelAdamW8bit tensors[kTensors];
  int32_t first_block[kTensors + 1];  // in the launch, then their number
  int32_t count;
};

struct Settings {
  const float *step, *learning_rate, *grad_scale, *skip;
  double beta1, beta2, epsilon, weight_decay;
};

struct Factors {
  float grad_factor, beta1, rest1, beta2, rest2, decay, rate, root_factor, epsilon;

  __device__ explicit Factors(const Settings& s)
      : grad_factor(static_cast<float>(1 / static_cast<double>(*s.grad_scale))),
        beta1(static_cast<float>(s.beta1)),
        rest1(static_cast<float>(1 - s.beta1)),
        beta2(static_cast<float>(s.beta2)),
        rest2(static_cast<float>(1 - s.beta2)),
        epsilon(static_cast<float>(s.epsilon)) {
    const double lr = *s.learning_rate, t = *s.step;
    decay = static_cast<float>(1 - lr * s.weight_decay);
    rate = static_cast<float>(lr / (1 - pow(s.beta1, t)));
    root_factor = static_cast<float>(1 / sqrt(1 - pow(s.beta2, t)));
  }
};

// Index of the nearest value to y.
__device__ inline uint8_t nearest(const DynamicMap& map, float y) {
  const int32_t bits = __float_as_int(y);
  const bool negative = bits < 0;
  const int32_t magnitude = (bits & 0x7fffffff) + negative;
  const int32_t step = min(max((magnitude - kDynamicFirst) >> 16, 0), kDynamicSteps - 1);
  int32_t i = map.below[step];
  i += __int_as_float(magnitude) > map.magnitudes[i];
  return static_cast<uint8_t>(negative ? map.zero - min(i, map.zero) : map.zero + i);
}

// The largest of the warp, of numbers that are not negative.
__device__ inline float warp_largest(float value) {
  int bits = __float_as_int(value);
#pragma unroll
  for (int lane = 1; lane < 32; lane *= 2) bits = max(bits, __shfl_xor_sync(0xffffffff, bits, lane));
  return __int_as_float(bits);
}

// kWhole: 256 elements at addresses that vectors fit. Else one at a time, and none behind the last.
template <bool kWhole, typename T>
__device__ inline void load_part(const T* from, int place, int count, T (&to)[kWidth]) {
  if constexpr (kWhole) {
    const auto piece = *reinterpret_cast<const Vector<T, kWidth>*>(from + place);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) to[i] = piece.v[i];
  } else {
#pragma unroll
    for (int i = 0; i < kWidth; ++i) to[i] = place + i < count ? from[place + i] : T{};
  }
}

template <bool kWhole, typename T>
__device__ inline void store_part(T* to, int place, int count, const T (&from)[kWidth]) {
  if constexpr (kWhole) {
    Vector<T, kWidth> piece;
#pragma unroll
    for (int i = 0; i < kWidth; ++i) piece.v[i] = from[i];
    *reinterpret_cast<Vector<T, kWidth>*>(to + place) = piece;
  } else {
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      if (place + i < count) to[place + i] = from[i];
    }
  }
}

// One block, by one warp.
template <bool kWhole>
__device__ inline void adamw_8bit_block(const KernelAdamW8bit& tensor, int64_t block, const DynamicMaps& maps,
                                        const Factors& c) {
  const int64_t first = block * kDynamicBlock;
  const int lane = threadIdx.x % 32, count = static_cast<int>(min(tensor.n - first, kDynamicBlock));
  float p[kParts][kWidth], g[kParts][kWidth], m[kParts][kWidth], v[kParts][kWidth];
  uint8_t index1[kParts][kWidth], index2[kParts][kWidth];
#pragma unroll
  for (int part = 0; part < kParts; ++part) {
    const int place = part * 128 + lane * kWidth;
    load_part<kWhole>(tensor.g + first, place, count, g[part]);
    load_part<kWhole>(tensor.state1 + first, place, count, index1[part]);
    load_part<kWhole>(tensor.state2 + first, place, count, index2[part]);
    load_part<kWhole>(tensor.p + first, place, count, p[part]);
  }
  const float absmax1 = tensor.absmax1[block], absmax2 = tensor.absmax2[block];
  float m_most = 0, v_most = 0;
#pragma unroll
  for (int part = 0; part < kParts; ++part) {
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      const float grad = __fmul_rn(g[part][i], c.grad_factor);
      const float m_before = __fmul_rn(maps.exp_avg.values[index1[part][i]], absmax1);
      const float v_before = __fmul_rn(maps.exp_avg_sq.values[index2[part][i]], absmax2);
      float m_next = __fmaf_rn(grad, c.rest1, __fmul_rn(m_before, c.beta1));
      const float v_next = __fmaf_rn(__fmul_rn(grad, c.rest2), grad, __fmul_rn(v_before, c.beta2));
      const float root = __fmaf_rn(__fsqrt_rn(v_next), c.root_factor, c.epsilon);
      p[part][i] = __fmaf_rn(p[part][i], c.decay, __fmul_rn(__fdiv_rn(m_next, root), -c.rate));
      // Behind the last element index 0 stands for no moment.
      if (!kWhole && part * 128 + lane * kWidth + i >= count) m_next = 0;
      m[part][i] = m_next;
      v[part][i] = v_next;
      m_most = fmaxf(m_most, fabsf(m_next));
      v_most = fmaxf(v_most, v_next);
    }
  }
  m_most = warp_largest(m_most);
  v_most = warp_largest(v_most);
  const float inverse1 = __fdiv_rn(1.0f, fmaxf(m_most, kLeastAbsmax));
  const float inverse2 = __fdiv_rn(1.0f, fmaxf(v_most, kLeastAbsmax));
#pragma unroll
  for (int part = 0; part < kParts; ++part) {
    const int place = part * 128 + lane * kWidth;
    store_part<kWhole>(tensor.p + first, place, count, p[part]);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      index1[part][i] = nearest(maps.exp_avg, __fmul_rn(m[part][i], inverse1));
      index2[part][i] = nearest(maps.exp_avg_sq, __fmul_rn(v[part][i], inverse2));
    }
    store_part<kWhole>(tensor.state1 + first, place, count, index1[part]);
    store_part<kWhole>(tensor.state2 + first, place, count, index2[part]);
  }
  if (lane == 0) {
    tensor.absmax1[block] = m_most;
    tensor.absmax2[block] = v_most;
  }
}

// Thread blocks take runs of `run` blocks of elements, so that each finds its tensor once and then walks on. Four of them a
// processor, in 64 registers: 225 us for the tensors above on an H200, where the bytes at the rate of a copy take 164. In 70
// registers, which is three, 238; five, which spill, 251; approximate division and root 217, but then parameters differ from
// the CPU's.
__global__ void __launch_bounds__(kThreads, 4)
    adamw_8bit_kernel(const __grid_constant__ Batch batch, const DynamicMaps* __restrict__ from, Settings settings,
                      int32_t run) {
  if (*settings.skip != 0) return;
  __shared__ DynamicMaps maps;
  __shared__ alignas(Factors) unsigned char factors[sizeof(Factors)];
  static_assert(sizeof(DynamicMaps) % 4 == 0);
  for (int i = threadIdx.x; i < static_cast<int>(sizeof(DynamicMaps) / 4); i += kThreads) {
    reinterpret_cast<uint32_t*>(&maps)[i] = reinterpret_cast<const uint32_t*>(from)[i];
  }
  if (threadIdx.x == 0) *reinterpret_cast<Factors*>(factors) = Factors(settings);
  __syncthreads();
  const Factors c = *reinterpret_cast<const Factors*>(factors);
  const int32_t total = batch.first_block[batch.count], begin = static_cast<int32_t>(blockIdx.x) * run;
  const int32_t end = min(begin + run, total);
  int32_t block = begin + static_cast<int32_t>(threadIdx.x) / 32, t = 0;
  // The last tensor that starts at or before the block.
  for (int32_t above = batch.count; above - t > 1;) {
    const int32_t middle = (t + above) / 2;
    (batch.first_block[middle] <= block ? t : above) = middle;
  }
  for (; block < end; block += kWarps) {
    while (batch.first_block[t + 1] <= block) ++t;
    const KernelAdamW8bit& tensor = batch.tensors[t];
    const int64_t own = block - batch.first_block[t];
    const auto fits = [](const void* p, int bytes) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; };
    if ((own + 1) * kDynamicBlock <= tensor.n && fits(tensor.p, 16) && fits(tensor.g, 16) && fits(tensor.state1, 4) &&
        fits(tensor.state2, 4)) {
      adamw_8bit_block<true>(tensor, own, maps, c);
    } else {
      adamw_8bit_block<false>(tensor, own, maps, c);
    }
  }
}

// ---- launchers

// Thread blocks that run at a time.
int resident(int* result) {
  int device = 0, processors = 0, each = 0;
  if (const cudaError_t error = cudaGetDevice(&device)) return error;
  if (const cudaError_t error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device)) return error;
  if (const cudaError_t error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, adamw_8bit_kernel, kThreads, 0)) {
    return error;
  }
  *result = processors * each;
  return cudaSuccess;
}

}  // namespace
}  // namespace ferrotune

using namespace ferrotune;

extern "C" int adamw_8bit(const KernelAdamW8bit* tensors, int64_t count, const void* maps, const float* step,
                          const float* learning_rate, const float* grad_scale, const float* skip, double beta1,
                          double beta2, double epsilon, double weight_decay, void* stream) {
  int blocks_at_once = 0;
  if (const int error = resident(&blocks_at_once)) return error;
  const Settings settings{step, learning_rate, grad_scale, skip, beta1, beta2, epsilon, weight_decay};
  for (int64_t next = 0; next < count;) {
    Batch batch;
    batch.count = 0;
    int64_t total = 0;
    for (; next < count && batch.count < kTensors; ++next) {
      const int64_t blocks = ceil_div(tensors[next].n, kDynamicBlock);
      if (blocks > 0x7fffffff) return cudaErrorInvalidValue;
      if (total + blocks > 0x7fffffff) break;
      if (blocks == 0) continue;
      batch.tensors[batch.count] = tensors[next];
      batch.first_block[batch.count++] = static_cast<int32_t>(total);
      total += blocks;
    }
    if (batch.count == 0) continue;
    batch.first_block[batch.count] = static_cast<int32_t>(total);
    // One wave of equal runs, each a whole number of rounds of its warps.
    const int64_t run = ceil_div(ceil_div(total, blocks_at_once), kWarps) * kWarps;
    adamw_8bit_kernel<<<grid_x(ceil_div(total, run)), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
        batch, static_cast<const DynamicMaps*>(maps), settings, static_cast<int32_t>(run));
    if (const cudaError_t error = cudaGetLastError()) return error;
  }
  return cudaSuccess;
}
