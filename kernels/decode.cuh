// defines: DecodeStack: what decode.cu is launched with; Barrier of all thread blocks; the places of a thread block's shared memory.
#pragma once

#include "hopper.cuh"
#include "paged_attention.cuh"
#include "rows_stage.cuh"

namespace ferrotune {
namespace {

constexpr int kDecodeWarps = kStripWarps, kDecodeThreads = kStripThreads;
// What fits the 32,764 bytes that a launch may pass.
constexpr int kMostLayers = 56;
// Tiles of a thread block in one product, scales of scales of a tile, pieces of a tile of A.
constexpr int kMostTiles = 36, kNestedOfTile = 32;
// Tiles of A of a product.
constexpr int kMostATiles = 3 * kMostRank / kTileRows;
// The thread that waits for other blocks, of the warp that has neither weights nor copies under way: its loads and fences would wait for them.
constexpr int kPoller = 32 * kDecodeWarps;
// Page numbers that shared memory has room for.
constexpr int kMostPages = 2048;
// Warps that share the pages of a run of keys.
constexpr int kPageWarps = 8, kShortRunPages = 8, kRunPages = 16, kLongRunPages = 64;

enum DecodePhase { kQkv, kO, kGateUp, kDown, kPhases };
// The first of a product's parts.
__host__ __device__ constexpr int first_part(int phase) { return phase == kQkv ? 0 : phase + 2 + (phase == kDown); }

struct DecodePart {
  const void* absmax;
  const float* nested;
  const void *a, *b;
  float nested_offset, scale;
  int w;  // where W begins, packed or dense, in steps of 128 bytes from what its product's map begins with
  int rows, R;
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
  int table, map, layers, sequences, x_arrived, w_arrived, shares, z, statistics, slots, lora, nested, a, x, attention, all;
  int ring[2], first_rings;  // of so many warps one after another, and of the others
  int stages;                // of pages, of each warp in attention
};

// All but the layers. Attention, a function of its own, has it from shared memory: arguments of a launch, read through a pointer, come from
// memory behind a cache that every wait empties.
struct DecodeCommon {
  int layers, M, C, F, H, K, D, R, width, run_pages, runs, activation, nested_shift, a_row;
  int depth;  // boxes of W that a warp has room for
  int parts[kPhases], columns[kPhases], pieces[kPhases], a_pieces[kPhases];  // pieces of a tile of A, and of all: at most one a thread block
  int row_steps[kPhases];  // of W, 128 bytes each
  bool lora_f32, tables_shared, a_shared, x_shared[kPhases];
  float eps, q_eps, norm_offset, q_norm_offset, scale, softcap;
  const float *quant_map, *nested_map;
  const int64_t *tables, *lengths;
  const void* x;
  void *y, *h, *qkv, *attended, *product;
  unsigned long long* z;  // [2, tiles of A, kEight, kTileRows], fixed point
  float* partial;
  int *counters, *arrived;
  DecodeShared at;
};
struct DecodeStack {
  CUtensorMap w[kPhases];  // boxes of 16 rows of 128 bytes
  DecodeCommon common;
  DecodeLayer* copy;  // of `layer` in memory
  DecodeLayer layer[kMostLayers];
};
static_assert(sizeof(DecodeStack) <= 32764);
constexpr int kCommonAt = kReserved;

// What lies `offset` bytes from the start of shared memory. A function of its own, so that the compiler sees which memory it is.
__device__ __forceinline__ char* shared_at(int offset) {
  extern __shared__ uint4 dynamic[];
  return reinterpret_cast<char*>(dynamic) + (offset - kReserved);
}

// threadIdx.x, as a value of its own at each call: else whatever follows from it is kept in registers from one product to the next, which
// there are not enough for.
__device__ __forceinline__ int thread_number() {
  int thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  return thread;
}
__device__ __forceinline__ int anew(int value) {
  asm volatile("" : "+r"(value));
  return value;
}

// A tile of 16 rows of this thread block: the same in every layer.
struct DecodeTile {
  int part, row, out;
  int nested_before;  // blocks between the first of its scales' scales and the tile
  int first_slot, slots;
};
// What a warp has of them: from this unit of this tile on.
struct DecodeUnits {
  int tile, unit, count;
};
// Of A: 16 rows of a part from `row` on, tile `a_tile` of all parts', units of 64 columns.
struct DecodePiece {
  int part, row, a_tile, unit, units;
};
// A thread block's share of a product.
struct DecodeShare {
  int count;  // tiles
  DecodePiece piece;
  DecodeUnits units[kDecodeWarps];
  DecodeTile tiles[kMostTiles];
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
  __device__ __forceinline__ void poll() const {
    while (load_acquire(arrived) < target) {}
  }
  __device__ __forceinline__ void wait() const {
    if (threadIdx.x == kPoller) poll();
    __syncthreads();
  }
};

// A line of 128 bytes into the second-level cache.
__device__ __forceinline__ void prefetch_line(const void* at) { asm volatile("prefetch.global.L2 [%0];" ::"l"(at)); }

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

// Eight elements of 16 bits, rounded to them where they are f32.
template <typename T>
__device__ __forceinline__ uint4 load_rounded(const void* from, bool f32) {
  const auto* const vectors = static_cast<const uint4*>(from);
  const uint4 low = __ldg(vectors);
  return f32 ? pack_words<T>(low, __ldg(vectors + 1)) : low;
}

// Elements 8 vector .. of a head of q or k: divided by its root mean square where `norm` is not null, which takes the D / 8 lanes that
// have the head, then turned (kernels/rope.cu) by angles [R / 2] cos, [R / 2] sin.
template <typename T, int D>
__device__ __forceinline__ uint4 turned(const T* head, int vector, const T* norm, float eps, float offset, const float* angles,
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
    load_float<8>(angles + angle, 0, c);
    load_float<8>(angles + half + angle, 0, s);
#pragma unroll
    for (int i = 0; i < 8; ++i) own.v[i] = low ? own.v[i] * c[i] - partner.v[i] * s[i] : own.v[i] * c[i] + partner.v[i] * s[i];
  }
  return own.rounded();
}

// The attention of one sequence, key/value head and run of keys at a time. Half of a thread block's warps read pages, the first of them
// before the new row is there, which goes into its tile from where it is made; the other half turns the queries.
template <int D>
constexpr int kDecodeTileBytes = kTileElements<D> * 2;
// Tiles; m and l of each warp's heads; whether a run came last; angles.
template <int D>
inline int decode_attention_bytes(int stages) {
  return (1 + 2 * stages * kPageWarps) * kDecodeTileBytes<D> + kPageWarps * kMostHeads * 8 + 16 + D * 4;
}

template <typename T, int D>
struct DecodeAttention {
  const DecodeCommon& s;
  const int layer_at, at = anew(s.at.attention);
  const int thread = thread_number(), warp = thread / 32, lane = thread % 32, group, heads, items;
  int item, run, sequence, head, length, low, begin, end, page, last_page, stage;

  __device__ DecodeAttention(const DecodeCommon& common, int of_layer)
      : s(common), layer_at(of_layer), group(common.H / common.K), heads(common.M * common.K), items(heads * common.runs), item(blockIdx.x) {}

  __device__ __forceinline__ const DecodeLayer& layer() const { return *reinterpret_cast<const DecodeLayer*>(shared_at(layer_at)); }
  __device__ char* tile(int index) const { return shared_at(at + index * kDecodeTileBytes<D>); }
  __device__ PaddedTile<T, D> query_tile() const { return {reinterpret_cast<T*>(tile(0))}; }
  __device__ PaddedTile<T, D> key_tile(int of_stage) const { return {reinterpret_cast<T*>(tile(1 + 2 * (s.at.stages * warp + of_stage)))}; }
  __device__ PaddedTile<T, D> value_tile(int of_stage) const { return {reinterpret_cast<T*>(tile(2 + 2 * (s.at.stages * warp + of_stage)))}; }
  __device__ float2* statistics() const { return reinterpret_cast<float2*>(tile(1 + 2 * s.at.stages * kPageWarps)); }
  __device__ int* last() const { return reinterpret_cast<int*>(statistics() + kPageWarps * kMostHeads); }
  __device__ float* angles() const { return reinterpret_cast<float*>(last() + 4); }
  // Row `row` of the pool's page that a sequence has at `of`, and this head's elements of it.
  __device__ int64_t place(int of, int row) const {
    const auto* const tables = reinterpret_cast<const int*>(shared_at(s.at.sequences)) + kEight;
    const int64_t number = s.tables_shared ? tables[sequence * s.width + of] : s.tables[int64_t{sequence} * s.width + of];
    return (number * kPage + row) * (int64_t{s.K} * D) + head * D;
  }

  // The new row is left out.
  __device__ __forceinline__ void fetch(int of, int to_stage) const {
    if (of <= last_page) {
      const int64_t from = place(of, 0);
      const T *const k = static_cast<const T*>(layer().pool_k) + from, *const v = static_cast<const T*>(layer().pool_v) + from;
      const int rows = min(end, length - 1) - of * kPage;
#pragma unroll 4
      for (int i = lane; i < kPage * D / 8; i += 32) {
        const int row = i / (D / 8), piece = i % (D / 8), at = row * s.K * D + piece * 8;
        copy_16_bytes(shared_address(key_tile(to_stage).at(row, piece)), k + at, row < rows);
        copy_16_bytes(shared_address(value_tile(to_stage).at(row, piece)), v + at, row < rows);
      }
    }
    commit_copies();
  }

  __device__ __forceinline__ void seek() {
    run = item / heads;
    sequence = item % heads / s.K;
    head = item % s.K;
    length = reinterpret_cast<const int*>(shared_at(s.at.sequences))[sequence];
    const int window = layer().window, run_keys = s.run_pages * kPage;
    low = window > 0 && length > window ? length - window : 0;
    begin = max(low, run * run_keys), end = min(length, (run + 1) * run_keys);
    page = begin / kPage + warp;
    last_page = (end - 1) / kPage;
    stage = 0;
  }

  // The pages of this thread block's first item come into the second-level cache, while there is nothing else to do.
  __device__ __forceinline__ void prefetch() {
    if (item >= items) return;
    seek();
    if (begin >= end) return;
    constexpr int kLines = D * 2 / 128;
    for (int at = page; at <= last_page; at += kDecodeThreads / 32) {
      const int64_t from = place(at, lane % kPage);
      const void* const pool = lane < kPage ? layer().pool_k : layer().pool_v;
#pragma unroll
      for (int line = 0; line < kLines; ++line) prefetch_line(static_cast<const T*>(pool) + from + 64 * line);
    }
  }

  // Before what the layer's projection wrote can be seen.
  __device__ __forceinline__ void start() {
    seek();
    if (begin >= end) return;
    if (warp < kPageWarps) {
#pragma unroll 1
      for (int i = 0; i < s.at.stages; ++i) fetch(page + i * kPageWarps, i);
    } else {
      const int half = s.R / 2;
#pragma unroll 1
      for (int i = thread - 32 * kPageWarps; i < half; i += 32 * kPageWarps) {
        angles()[i] = layer().cos[sequence * half + i];
        angles()[half + i] = layer().sin[sequence * half + i];
      }
    }
  }

  // All of this thread block's share.
  __device__ __forceinline__ void run_all(const Barrier& barrier) {
    if (item >= items) barrier.wait();
#pragma unroll 1
    for (bool first = true; item < items; item += static_cast<int>(gridDim.x), first = false) {
      start();
      if (first) barrier.wait();
      T* const out = static_cast<T*>(s.attended) + (sequence * s.H + head * group) * D;
      if (begin >= end) {
        // A row that belongs to no sequence.
        if (length == 0 && run == 0) {
#pragma unroll 1
          for (int i = thread; i < group * D; i += kDecodeThreads) out[i] = from_float<T>(0);
        }
        continue;
      }
      // The angles.
      if (!first) __syncthreads();
      const bool newest = warp < kPageWarps && end == length && (last_page - begin / kPage) % kPageWarps == warp;
      uint4 key = make_uint4(0, 0, 0, 0), value = key;
      if (warp >= kPageWarps || newest) {
        // Heads of the group, or the new key.
        const T* const row = static_cast<const T*>(s.qkv) + sequence * (s.H + 2 * s.K) * D;
        constexpr int kVectors = kEight * D / 8;
#pragma unroll 1
        for (int i = newest ? lane : thread - 32 * kPageWarps; i < (newest ? 32 : kVectors); i += 32 * kPageWarps) {
          const int of_group = newest ? 0 : i / (D / 8), piece = newest ? min(i, D / 8 - 1) : i % (D / 8);
          const T* const from = row + (newest ? s.H + head : head * group + min(of_group, group - 1)) * D;
          if (newest) value = reinterpret_cast<const uint4*>(from + s.K * D)[piece];
          const uint4 made = turned<T, D>(from, piece, static_cast<const T*>(newest ? layer().k_norm : layer().q_norm), s.q_eps, s.q_norm_offset, angles(), s.R);
          if (newest) {
            key = made;
          } else {
            *reinterpret_cast<uint4*>(query_tile().at(of_group, piece)) = of_group < group ? made : make_uint4(0, 0, 0, 0);
          }
        }
        if (newest && lane < D / 8) {
          const int64_t at = place(last_page, (length - 1) % kPage);
          reinterpret_cast<uint4*>(static_cast<T*>(layer().pool_k) + at)[lane] = key;
          reinterpret_cast<uint4*>(static_cast<T*>(layer().pool_v) + at)[lane] = value;
        }
      }
      __syncthreads();
      PagedSums<D, 1> sums;
      if (warp < kPageWarps) {
#pragma unroll 1
        for (; page <= last_page; page += kPageWarps) {
          s.at.stages == 2 ? wait_copies<1>() : wait_copies<0>();
          if (newest && page == last_page && lane < D / 8) {
            *reinterpret_cast<uint4*>(key_tile(stage).at((length - 1) % kPage, lane)) = key;
            *reinterpret_cast<uint4*>(value_tile(stage).at((length - 1) % kPage, lane)) = value;
          }
          __syncwarp();
          add_page<T, D, 1>(sums, query_tile(), key_tile(stage), value_tile(stage), page * kPage, begin, end, s.scale, s.softcap);
          __syncwarp();
          fetch(page + s.at.stages * kPageWarps, stage);
          if (++stage == s.at.stages) stage = 0;
        }
      }
      wait_copies<0>();
      __syncthreads();
      float* const parts = reinterpret_cast<float*>(tile(0));  // [warps, group, D]
      if (warp < kPageWarps) put_parts<D, 1>(sums, parts + warp * group * D, statistics() + warp * kMostHeads, group);
      __syncthreads();
      join(out, parts);
      __syncthreads();
    }
  }

  // What the warps have, and where there are several runs what the others left, by the thread block that comes last.
  __device__ __forceinline__ void join(T* out, const float* parts) const {
    const int run_keys = s.run_pages * kPage, runs = (length - 1) / run_keys - low / run_keys + 1;
    float* const partial = s.partial + int64_t{sequence * s.K + head} * group * s.runs * kLeft<D>;
#pragma unroll 1
    for (int i = thread; i < group * D; i += kDecodeThreads) {
      const int row = i / D, d = i % D;
      const float3 all = joined<D, kPageWarps>(parts, statistics(), group, row, d);
      if (runs == 1) {
        out[i] = from_float<T>(all.x / all.z);
        continue;
      }
      float* const mine = partial + (row * s.runs + run) * kLeft<D>;
      __stcg(mine + d, all.x);
      if (d == 0) {
        __stcg(mine + D, all.y);
        __stcg(mine + D + 1, all.z);
      }
    }
    if (runs == 1) return;
    __syncthreads();
    if (thread == 0) {
      int* const arrived = s.arrived + sequence * s.K + head;
      int before;
      asm volatile("atom.acq_rel.gpu.global.add.s32 %0, [%1], 1;" : "=r"(before) : "l"(arrived) : "memory");
      *last() = before == runs - 1;
      if (*last()) *arrived = 0;
    }
    __syncthreads();
    if (!*last()) return;
#pragma unroll 1
    for (int i = thread; i < group * D; i += kDecodeThreads) {
      const float3 all = joined_runs<D>(partial + (i / D * s.runs + low / run_keys) * kLeft<D>, runs, i % D);
      out[i] = from_float<T>(all.x / all.z);
    }
  }
};

}  // namespace
}  // namespace ferrotune
