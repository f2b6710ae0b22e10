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
// It has the sequences' lengths, which row of angles each has, and behind these the page numbers.
constexpr int kTablesAt = 16;
// Pairs of warps that share the pages of a run of keys; of each, the barriers of two stages and their phases.
constexpr int kPageWarps = 8, kPagesBytes = 24, kShortRunPages = 8, kRunPages = 16, kLongRunPages = 64;

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
  int table, map, layers, sequences, x_arrived, w_arrived, shares, z, statistics, slots, lora, nested, residual, a, x, pages, attention, all;
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
  bool lora_f32, tables_shared, a_shared, positional, x_shared[kPhases], biased[kPhases];
  float eps, q_eps, norm_offset, q_norm_offset, scale, softcap;
  const float *quant_map, *nested_map;
  const int64_t *tables, *lengths, *ids;
  const void *embedding, *x, *norm;  // where there are ids, x is where rows of the embedding are put first
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

// All thread blocks, which are on the processors at once. What was written before the n-th `arrive` is seen behind `wait` for n.
struct Barrier {
  int* const arrived;
  __device__ explicit Barrier(int* counter) : arrived(counter) {}
  __device__ __forceinline__ void arrive() const {
    __syncthreads();
    if (threadIdx.x == kPoller) add_release(arrived, 1);
  }
  __device__ __forceinline__ void poll(int times) const {
    const int all = times * static_cast<int>(gridDim.x);
    while (load_acquire(arrived) < all) {}
  }
  __device__ __forceinline__ void wait(int times) const {
    if (threadIdx.x == kPoller) poll(times);
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

// Zeros where not `inside`, and `from` is then not read. Without a branch, at whose end the compiler would wait for loads before.
__device__ __forceinline__ uint4 load_4_if(bool inside, const uint4* from) {
  uint4 v;
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.u32 p, %5, 0;\nmov.b32 %0, 0;\nmov.b32 %1, 0;\nmov.b32 %2, 0;\nmov.b32 %3, 0;\n"
      "@p ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];\n}"
      : "=&r"(v.x), "=&r"(v.y), "=&r"(v.z), "=&r"(v.w)
      : "l"(from), "r"(static_cast<unsigned>(inside)));
  return v;
}

// What a lane has of a head of q or k that its warp turns (kernels/rope.cu), once known: elements p, p + 1 and other, other + 1, which are turned
// together by angles c and s, or are not turned.
template <int D>
struct Turn {
  int p, other;
  bool own, turns;
  float2 c{}, s{};

  // Of angles [R / 2] cos, [R / 2] sin.
  __device__ __forceinline__ Turn(int lane, int R, const float* cos, const float* sin) : own(4 * lane < D), turns(own && 4 * lane < R) {
    const int half = R / 2;
    p = turns ? 2 * lane : 2 * lane + half;
    other = turns ? p + half : p + D / 2 - half;
    if (!turns) return;
    c = *reinterpret_cast<const float2*>(cos + p);
    s = *reinterpret_cast<const float2*>(sin + p);
  }
  // Divided by the root mean square where `norm` is not null, turned, to shared memory and, unless it is null, to memory.
  template <typename T>
  __device__ __forceinline__ void make(const T* head, const T* norm, float eps, float offset, T* to, T* pool) const {
    const auto pair_of = [](const T* at) {
      const unsigned packed = __ldcg(reinterpret_cast<const unsigned*>(at));
      const auto v = *reinterpret_cast<const Vector<T, 2>*>(&packed);
      return make_float2(to_float(v.v[0]), to_float(v.v[1]));
    };
    float2 a{}, b{};
    if (own) a = pair_of(head + p), b = pair_of(head + other);
    if (norm != nullptr) {
      float sum = a.x * a.x + a.y * a.y + b.x * b.x + b.y * b.y;
#pragma unroll
      for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffff, sum, step);
      if (own) {
        const float rstd = rsqrtf(sum / D + eps);
        const auto scaled = [&](float v, int i) { return to_float(from_float<T>(v * rstd * (offset + to_float(norm[i])))); };
        a = {scaled(a.x, p), scaled(a.y, p + 1)}, b = {scaled(b.x, other), scaled(b.y, other + 1)};
      }
    }
    if (!own) return;
    if (turns) {
      const float2 first = a;
      a = {a.x * c.x - b.x * s.x, a.y * c.y - b.y * s.y};
      b = {b.x * c.x + first.x * s.x, b.y * c.y + first.y * s.y};
    }
    const unsigned pairs[2] = {pack(a.x, a.y, T{}), pack(b.x, b.y, T{})};
    *reinterpret_cast<unsigned*>(to + p) = pairs[0], *reinterpret_cast<unsigned*>(to + other) = pairs[1];
    if (pool != nullptr) *reinterpret_cast<unsigned*>(pool + p) = pairs[0], *reinterpret_cast<unsigned*>(pool + other) = pairs[1];
  }
};

// y divided by the root mean square of its rows, times the norm's weight, by one thread block, once y is there: 16 / MP warps a row.
template <typename T, int MP>
__device__ __forceinline__ void norm_rows(const DecodeCommon& s) {
  constexpr int kThreads = kDecodeThreads / MP;
  const int thread = thread_number(), c = thread / kThreads, vectors = s.C / 8;
  auto* const row = static_cast<uint4*>(s.y) + min(c, s.M - 1) * vectors;
  auto* const sums = reinterpret_cast<float*>(shared_at(s.at.statistics));
  float sum = 0;
#pragma unroll 1
  for (int i = thread % kThreads; i < vectors; i += kThreads) {
    const uint4 raw = __ldcg(row + i);
    const Eight<T> v(reinterpret_cast<const T*>(&raw));
#pragma unroll
    for (int k = 0; k < 8; ++k) sum += v.v[k] * v.v[k];
  }
#pragma unroll
  for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffff, sum, step);
  if (thread % 32 == 0) sums[thread / 32] = sum;
  __syncthreads();
  if (c >= s.M) return;
  sum = 0;
#pragma unroll
  for (int k = 0; k < kThreads / 32; ++k) sum += sums[c * (kThreads / 32) + k];
  const float rstd = rsqrtf(sum / s.C + s.eps);
#pragma unroll 1
  for (int i = thread % kThreads; i < vectors; i += kThreads) {
    const uint4 raw = __ldcg(row + i);
    Eight<T> v(reinterpret_cast<const T*>(&raw));
    const Eight<T> w(static_cast<const T*>(s.norm) + 8 * i);
#pragma unroll
    for (int k = 0; k < 8; ++k) v.v[k] *= rstd * (s.norm_offset + w.v[k]);
    row[i] = v.rounded();
  }
}

// Rows of keys and values come into the second-level cache before attention asks for them, by one warp of each thread block, which has a share of all
// sequences' rows, at most so many lines a lane.
constexpr int kMostLines = 16;
__device__ __forceinline__ void prefetch_rows(const DecodeCommon& s, int layer_at, int lane) {
  const DecodeLayer& layer = *reinterpret_cast<const DecodeLayer*>(shared_at(layer_at));
  const auto* const sequences = reinterpret_cast<const int*>(shared_at(s.at.sequences));
  const int lines = s.K * s.D / 64, lanes = static_cast<int>(gridDim.x) * 32, first = static_cast<int>(blockIdx.x) * 32 + lane;
  int left = kMostLines;
#pragma unroll 1
  for (int m = 0; m < s.M; ++m) {
    const int length = sequences[m], low = layer.window > 0 && length > layer.window ? length - layer.window : 0;
#pragma unroll 1
    for (int i = first; i < (length - low) * lines * 2 && left > 0; i += lanes, --left) {
      const int key = low + i / (2 * lines), place = m * s.width + key / kPage;
      const int64_t number = s.tables_shared ? sequences[kTablesAt + place] : s.tables[place];
      const void* const pool = i / lines % 2 == 0 ? layer.pool_k : layer.pool_v;
      prefetch_line(static_cast<const char*>(pool) + (number * kPage + key % kPage) * lines * 128 + i % lines * 128);
    }
  }
}

// The attention of one sequence, key/value head and run of keys at a time. Two warps have a page, and half of what comes of it each. The first
// pages are under way before the new row is there, which goes into its tile from where it is made; a warp turns a head of the queries. The copy
// engine brings pages: loads would stand before the one that waits for other thread blocks.
template <int D>
constexpr int kDecodeTileBytes = kTileElements<D> * 2;
// Tiles; m and l of each warp's heads; whether a run came last.
template <int D>
inline int decode_attention_bytes(int stages) {
  return (1 + 2 * stages * kPageWarps) * kDecodeTileBytes<D> + kPageWarps * kMostHeads * 8 + 16;
}

template <typename T, int D>
struct DecodeAttention {
  static_assert(kDecodeThreads == 64 * kPageWarps);
  const DecodeCommon& s;
  const int layer_at, at = anew(s.at.attention);
  const int thread = thread_number(), warp = thread / 32, lane = thread % 32, group, heads, items;
  const int pair = warp % kPageWarps, half = warp / kPageWarps;
  int item, run, sequence, head, length, low, begin, end, page, last_page, stage;
  unsigned phase_bits;

  __device__ DecodeAttention(const DecodeCommon& common, int of_layer)
      : s(common), layer_at(of_layer), group(common.H / common.K), heads(common.M * common.K), items(heads * common.runs), item(blockIdx.x) {}

  __device__ __forceinline__ const DecodeLayer& layer() const { return *reinterpret_cast<const DecodeLayer*>(shared_at(layer_at)); }
  __device__ char* tile(int index) const { return shared_at(at + index * kDecodeTileBytes<D>); }
  __device__ PaddedTile<T, D> query_tile() const { return {reinterpret_cast<T*>(tile(0))}; }
  __device__ PaddedTile<T, D> key_tile(int of_stage) const { return {reinterpret_cast<T*>(tile(1 + 2 * (s.at.stages * pair + of_stage)))}; }
  __device__ PaddedTile<T, D> value_tile(int of_stage) const { return {reinterpret_cast<T*>(tile(2 + 2 * (s.at.stages * pair + of_stage)))}; }
  // The new key and value, behind the queries.
  __device__ T* new_row() const { return query_tile().at(kEight, 0); }
  __device__ float2* statistics() const { return reinterpret_cast<float2*>(tile(1 + 2 * s.at.stages * kPageWarps)); }
  __device__ int* last() const { return reinterpret_cast<int*>(statistics() + kPageWarps * kMostHeads); }
  // Of a pair of warps: the barriers of its stages, and behind them their phases, a bit each.
  __device__ unsigned arrived(int of_stage) const { return static_cast<unsigned>(s.at.pages + pair * kPagesBytes + 8 * of_stage); }
  __device__ unsigned& phases() const { return *reinterpret_cast<unsigned*>(shared_at(static_cast<int>(arrived(2)))); }
  // Row `row` of the pool's page that a sequence has at `of`, and this head's elements of it.
  __device__ int64_t place(int of, int row) const {
    const auto* const tables = reinterpret_cast<const int*>(shared_at(s.at.sequences)) + kTablesAt;
    const int64_t number = s.tables_shared ? tables[sequence * s.width + of] : s.tables[int64_t{sequence} * s.width + of];
    return (number * kPage + row) * (int64_t{s.K} * D) + head * D;
  }

  // The new row is left out: a lane for each row of keys, and for each of values, of which zeros stand for those that are not there.
  __device__ __forceinline__ void fetch(int of, int to_stage) const {
    if (of > last_page) return;
    const int row = lane % kPage, rows = min(end, length - 1) - of * kPage, count = max(0, min(kPage, rows));
    const bool key = lane < kPage;
    T* const to = (key ? key_tile(to_stage) : value_tile(to_stage)).at(row, 0);
    if (lane == 0) arrive_with_boxes(arrived(to_stage), count * (2 * D * static_cast<int>(sizeof(T))));
    __syncwarp();
    if (row < count) {
      const T* const from = static_cast<const T*>(key ? layer().pool_k : layer().pool_v) + place(of, row);
      asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(shared_address(to)), "l"(from),
                   "n"(D * 2), "r"(arrived(to_stage))
                   : "memory");
    } else if (!key) {
#pragma unroll 1
      for (int piece = 0; piece < D / 8; ++piece) reinterpret_cast<uint4*>(to)[piece] = make_uint4(0, 0, 0, 0);
    }
  }

  __device__ __forceinline__ void seek() {
    run = item / heads;
    sequence = item % heads / s.K;
    head = item % s.K;
    length = reinterpret_cast<const int*>(shared_at(s.at.sequences))[sequence];
    const int window = layer().window, run_keys = s.run_pages * kPage;
    low = window > 0 && length > window ? length - window : 0;
    begin = max(low, run * run_keys), end = min(length, (run + 1) * run_keys);
    page = begin / kPage + pair;
    last_page = (end - 1) / kPage;
    stage = 0;
  }

  // All of this thread block's share.
  __device__ __forceinline__ void run_all(int arrivals) {
    const Barrier barrier(s.counters);
    if (item >= items) barrier.wait(arrivals);
#pragma unroll 1
    for (bool first = true; item < items; item += static_cast<int>(gridDim.x), first = false) {
      seek();
      const bool seen = begin < end, newest = seen && half == 0 && end == length && (last_page - begin / kPage) % kPageWarps == pair;
      // Before what the layer's projection wrote can be seen.
      if (seen) phase_bits = phases();
      if (seen && half == 0) {
        // Behind what others wrote there comes what the copy engine does.
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#pragma unroll 1
        for (int i = 0; i < s.at.stages; ++i) fetch(page + i * kPageWarps, i);
      }
      const int angles = reinterpret_cast<const int*>(shared_at(s.at.sequences))[kEight + sequence] * (s.R / 2);
      const Turn<D> turn(lane, s.R, layer().cos + angles, layer().sin + angles);
      if (first) barrier.wait(arrivals);
      T* const out = static_cast<T*>(s.attended) + (sequence * s.H + head * group) * D;
      if (!seen) {
        // A row that belongs to no sequence.
        if (length == 0 && run == 0) {
#pragma unroll 1
          for (int i = thread; i < group * D; i += kDecodeThreads) out[i] = from_float<T>(0);
        }
        continue;
      }
      const T* const row = static_cast<const T*>(s.qkv) + sequence * (s.H + 2 * s.K) * D;
      if (newest) {
        // The new key and value, into the pool and for when their page is there.
        const int64_t in_pool = place(last_page, (length - 1) % kPage);
        T* const own_key = new_row(), *const own_value = own_key + D;
        turn.make(row + (s.H + head) * D, static_cast<const T*>(layer().k_norm), s.q_eps, s.q_norm_offset, own_key, static_cast<T*>(layer().pool_k) + in_pool);
        if (lane < D / 8) {
          const uint4 value = __ldcg(reinterpret_cast<const uint4*>(row + (s.H + s.K + head) * D) + lane);
          reinterpret_cast<uint4*>(own_value)[lane] = value;
          reinterpret_cast<uint4*>(static_cast<T*>(layer().pool_v) + in_pool)[lane] = value;
        }
      } else if (half == 1 && pair < group) {
        turn.make(row + (head * group + pair) * D, static_cast<const T*>(layer().q_norm), s.q_eps, s.q_norm_offset, query_tile().at(pair, 0),
                  static_cast<T*>(nullptr));
      }
      __syncthreads();
      PagedSums<D / 2, 1> sums;
      // The two warps of a page.
      const auto meet = [&] { asm volatile("bar.sync %0, 64;" ::"r"(1 + pair) : "memory"); };
#pragma unroll 1
      for (; page <= last_page; page += kPageWarps) {
        wait_phase(arrived(stage), phase_bits >> stage & 1);
        phase_bits ^= 1u << stage;
        if (page == last_page && end == length) {
          if (newest && lane < D / 8) {
            const auto* const from = reinterpret_cast<const uint4*>(new_row());
            *reinterpret_cast<uint4*>(key_tile(stage).at((length - 1) % kPage, lane)) = from[lane];
            *reinterpret_cast<uint4*>(value_tile(stage).at((length - 1) % kPage, lane)) = from[lane + D / 8];
          }
          meet();
        }
        add_page<T, D, 1>(sums, query_tile(), key_tile(stage), value_tile(stage), page * kPage, begin, end, s.scale, s.softcap, half * (D / 16));
        if (page + s.at.stages * kPageWarps <= last_page) {
          meet();
          if (half == 0) fetch(page + s.at.stages * kPageWarps, stage);
        }
        if (++stage == s.at.stages) stage = 0;
      }
      if (half == 0) phases() = phase_bits;
      __syncthreads();
      float* const parts = reinterpret_cast<float*>(tile(0));  // [warps, group, D]
      put_parts<D, 1>(sums, parts + pair * group * D + half * (D / 2), statistics() + pair * kMostHeads, group);
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
