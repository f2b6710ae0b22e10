// defines: DecodeStack: what decode.cu is launched with; Barrier of all thread blocks; the places of a thread block's shared memory.
#pragma once

#include "paged_attention.cuh"
#include "rows_stage.cuh"

namespace ferrotune {
namespace {

constexpr int kDecodeWarps = kStripWarps, kDecodeThreads = kStripThreads;
// What fits the 32,764 bytes that a launch may pass.
constexpr int kMostLayers = 56;
// Tiles of a thread block in one product, scales of scales of a tile, pieces of a tile of A.
constexpr int kMostTiles = 64, kNestedOfTile = 32, kMostDecodePieces = 32, kMostQuads = 4;

enum DecodePhase { kQkv, kO, kGateUp, kDown, kPhases };
// The first of a product's parts.
__host__ __device__ constexpr int first_part(int phase) { return phase == kQkv ? 0 : phase + 2 + (phase == kDown); }

struct DecodePart {
  const char* w;  // packed, or dense
  const void* absmax;
  const float* nested;
  const void *a, *b;
  float nested_offset, scale;
  int rows, row_bytes, R;
};

struct DecodeLayer {
  DecodePart parts[7];
  const void *norms[2], *q_norm, *k_norm, *bias[kPhases];
  void *pool_k, *pool_v;
  const float *cos, *sin;
  int window;
};

// Where shared memory has what, in bytes from the start of its address space.
struct DecodeShared {
  int table, map, tiles, z, slots, nested, absmax, statistics, x, attention, all;
  int quads;
};

struct DecodeStack {
  int layers, M, C, F, H, K, D, R, width, run_pages, runs, activation, nested_shift;
  int parts[kPhases], columns[kPhases], pieces[kPhases];
  bool lora_f32, x_shared[kPhases];
  float eps, q_eps, norm_offset, q_norm_offset, scale, softcap;
  const float *quant_map, *nested_map;
  const int64_t *tables, *lengths;
  const void* x;
  void *y, *h, *qkv, *attended, *product;
  float *a_sums, *partial;
  int *counters, *arrived;
  DecodeShared at;
  DecodeLayer layer[kMostLayers];
};
static_assert(sizeof(DecodeStack) <= 32764);

// A tile of 16 rows of this thread block.
struct DecodeTile {
  const char* w;  // its first row
  int part, row, out, row_bytes;
  int nested_before;  // blocks between the first of its scales' scales and the tile
  int first_slot, slots;
};

// All thread blocks, which are on the processors at once. What was written before `arrive` is seen behind `wait`.
struct Barrier {
  int* const arrived;
  int target = 0;
  __device__ explicit Barrier(int* counter) : arrived(counter) {}
  __device__ __forceinline__ void arrive() {
    __syncthreads();
    target += static_cast<int>(gridDim.x);
    if (threadIdx.x == 0) add_release(arrived, 1);
  }
  __device__ __forceinline__ void wait() const {
    if (threadIdx.x == 0) {
      while (load_acquire(arrived) < target) {}
    }
    __syncthreads();
  }
};

__device__ inline void prefetch_l2(const void* from, unsigned bytes) {
#if __CUDA_ARCH__ >= 900
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(bytes) : "memory");
#endif
}

// Eight elements of a row in 16 bits.
template <typename T>
struct Eight {
  float v[8];
  __device__ __forceinline__ explicit Eight(const T* from) {
    const auto packed = *reinterpret_cast<const Vector<T, 8>*>(from);
#pragma unroll
    for (int i = 0; i < 8; ++i) v[i] = to_float(packed.v[i]);
  }
  __device__ __forceinline__ uint4 rounded() const {
    return make_uint4(pack(v[0], v[1], T{}), pack(v[2], v[3], T{}), pack(v[4], v[5], T{}), pack(v[6], v[7], T{}));
  }
};

// Elements 8 vector .. of a head of q or k: divided by its root mean square where `norm` is not null, which takes the D / 8 lanes that
// have the head, then turned (kernels/rope.cu).
template <typename T, int D>
__device__ __forceinline__ uint4 turned(const T* head, int vector, const T* norm, float eps, float offset, const float* cos, const float* sin,
                                        int R) {
  Eight<T> own(head + 8 * vector);
  const int half = R / 2, at = 8 * vector;
  const bool turns = at < R, low = at < half;
  const int other = turns ? (low ? at + half : at - half) : at;
  Eight<T> partner(head + other);
  if (norm != nullptr) {
    float sum = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) sum += own.v[i] * own.v[i];
#pragma unroll
    for (int step = 1; step < D / 8; step *= 2) sum += __shfl_xor_sync(0xffffffff, sum, step);
    const float rstd = rsqrtf(sum / D + eps);
    const Eight<T> w(norm + at), other_w(norm + other);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      own.v[i] = to_float(from_float<T>(own.v[i] * rstd * (offset + w.v[i])));
      partner.v[i] = to_float(from_float<T>(partner.v[i] * rstd * (offset + other_w.v[i])));
    }
  }
  if (turns) {
    const int angle = low ? at : at - half;
    float c[8], s[8];
    load_float<8>(cos + angle, 0, c);
    load_float<8>(sin + angle, 0, s);
#pragma unroll
    for (int i = 0; i < 8; ++i) own.v[i] = low ? own.v[i] * c[i] - partner.v[i] * s[i] : own.v[i] * c[i] + partner.v[i] * s[i];
  }
  return own.rounded();
}

// The attention of this thread block's share of sequences, key/value heads and runs of keys, four warps each.
template <typename T, int D>
__device__ __noinline__ void decode_attention(const DecodeStack& s, const DecodeLayer& layer, char* shared) {
  const int quad = threadIdx.x / kPagedThreads, thread = threadIdx.x % kPagedThreads;
  if (quad >= s.at.quads) return;
  const int group = s.H / s.K, heads = s.M * s.K, items = heads * s.runs;
  const int row_width = (s.H + 2 * s.K) * D;
  for (int item = quad * static_cast<int>(gridDim.x) + static_cast<int>(blockIdx.x); item < items; item += s.at.quads * static_cast<int>(gridDim.x)) {
    const int run = item / heads, sequence = item % heads / s.K, head = item % s.K;
    const T* const row = static_cast<const T*>(s.qkv) + sequence * row_width;
    const float *const cos = layer.cos + sequence * (s.R / 2), *const sin = layer.sin + sequence * (s.R / 2);
    const PagedRun<T> p{static_cast<T*>(layer.pool_k) + head * D,
                        static_cast<T*>(layer.pool_v) + head * D,
                        int64_t{s.K} * D,
                        s.tables + int64_t{sequence} * s.width,
                        static_cast<int>(s.lengths[sequence]),
                        layer.window,
                        run,
                        s.run_pages * kPage,
                        group,
                        s.scale,
                        s.softcap,
                        static_cast<T*>(s.attended) + (sequence * s.H + head * group) * D,
                        s.partial + int64_t{sequence * s.K + head} * group * s.runs * kLeft<D>,
                        s.runs,
                        s.arrived + sequence * s.K + head};
    const auto query = [&](int of_group, int piece) {
      const uint4 q = turned<T, D>(row + (head * group + min(of_group, group - 1)) * D, piece, static_cast<const T*>(layer.q_norm), s.q_eps,
                                   s.q_norm_offset, cos, sin, s.R);
      return of_group < group ? q : make_uint4(0, 0, 0, 0);
    };
    const auto put_new = [&](T* to_k, T* to_v) {
      if (thread >= 32) return;
      const T *const k = row + (s.H + head) * D, *const v = k + s.K * D;
      const int piece = min(thread, D / 8 - 1);
      const uint4 key = turned<T, D>(k, piece, static_cast<const T*>(layer.k_norm), s.q_eps, s.q_norm_offset, cos, sin, s.R);
      if (thread < D / 8) {
        reinterpret_cast<uint4*>(to_k)[thread] = key;
        reinterpret_cast<uint4*>(to_v)[thread] = reinterpret_cast<const uint4*>(v)[thread];
      }
    };
    const auto sync = [&] { asm volatile("bar.sync %0, %1;" ::"r"(quad + 1), "n"(kPagedThreads) : "memory"); };
    attend<T, D>(p, shared + quad * kPagedBytes<D>, thread, query, put_new, sync);
    sync();
  }
}

}  // namespace
}  // namespace ferrotune
