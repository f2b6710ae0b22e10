// One new row of each of at most eight sequences through all layers of a decoder, one launch:
//   h = x + o(attention(rope(qkv(norm(x))))),   y = h + down(act(gate) * up),  [gate | up] = gate_up(norm(h))
// x may be rows of an embedding, whose ids and positions it looks up; y may be normed, by the thread block that comes last.
// Fuses what kernels/rms_norm.cu, rows.cu, rope.cu, paged_attention.cu and swiglu.cu do in nine launches a layer. Moves: W once, 0.516
// bytes an element of NF4 or 2 in 16 bits, the keys and values once; rows of x come from the second-level cache.
//
// There are as many thread blocks as processors, and all are there to the end. Between two products, and before and behind attention,
// they wait for each other: five times a layer. Weights do not wait: each warp has a ring of boxes that the copy engine fills with the first
// ones of the next product as soon as the last ones of this are in registers (decode_weights.cuh). Scales, A and the norm's weight are on their
// way before the wait, too, and the table of pairs of NF4 stays in shared memory, so that a product costs neither its start nor its maps. Norms
// are computed by every block for itself from rows that it needs whole anyway, and divide behind the product; gate and up lie in the same block,
// which applies the activation. What is added to o and down is of the same rows in each block and stays there. Queries and keys are turned where
// attention reads them.
//
// An H200, 32 layers of 8B with LoRA r 16, context 300, a layer: 50 us for one row on NF4 (28 at 4 TB/s), of which half are the loops
// of the products, bound by the path to shared memory (104 of 125 cycles a unit: rows_strips.cuh), a sixth attention and its waits and the rest
// waits and what stands before and behind a product; 122 us in bf16 (109). What a layer runs through should be few instructions, as a processor
// fetches anew what it cannot keep: loops that run once or twice are not unrolled.
// What did not help: weights of the next product into the second-level cache while blocks wait (3 % slower in bf16: from there they come no
// faster than from memory); fewer, longer pieces of A (one warp among fifteen takes too long for four units: 2.48 ms for 2.23); a quarter
// of the codes by permutations of bytes and not by the table (3 % slower, half of them 9 %); rows that flow from block to block in words of two
// elements and the layer's number, without a fence; z added up where x is made; halves of units, for even shares (docs/decoding.md).
#include <algorithm>

#include "decode_groups.h"
#include "decode_products.cuh"

namespace ferrotune {
namespace {

// The last thread block leaves the counters as it found them, as nobody waits any more, and norms what all have written.
template <typename T, int MP>
__device__ __forceinline__ void leave(const DecodeCommon& s) {
  auto* const last = reinterpret_cast<int*>(shared_at(s.at.sequences));
  if (threadIdx.x == 0) {
    int before;
    asm volatile("atom.acq_rel.gpu.global.add.s32 %0, [%1], 1;" : "=r"(before) : "l"(s.counters + 1) : "memory");
    *last = before == static_cast<int>(gridDim.x) - 1;
    if (*last) s.counters[0] = s.counters[1] = 0;
  }
  if (s.norm == nullptr) return;
  __syncthreads();
  if (*last) norm_rows<T, MP>(s);
}

// Attention of a layer, once so many arrivals have been seen, or for none the end. One function for both and not in the kernel: attention's sums need
// the registers that products have their weights in, and each function that is called leaves them fewer.
template <typename T, int D, int MP>
__device__ __noinline__ void attend_or_leave(int layer, int arrivals) {
  const DecodeCommon& s = *reinterpret_cast<const DecodeCommon*>(shared_at(kCommonAt));
  if (arrivals == 0) {
    leave<T, MP>(s);
  } else {
    DecodeAttention<T, D>(s, layer).run_all(arrivals);
  }
}

template <typename T, int D, int MP, bool kNf4>
__global__ void __launch_bounds__(kDecodeThreads, 1) decode_kernel(const __grid_constant__ DecodeStack stack) {
#if __CUDA_ARCH__ >= 900
  extern __shared__ uint4 dynamic[];
  if (shared_address(dynamic) != kReserved) __trap();
  const DecodeCommon& s = stack.common;
  Products<T, MP, kNf4> product(stack);
  const Barrier barrier(s.counters);
  const int grid = static_cast<int>(gridDim.x), block = static_cast<int>(blockIdx.x);
  constexpr int kLayerBytes = sizeof(DecodeLayer);
  // Arguments of a launch are slow to read for the first time: the layers' go to memory, and from there into shared memory one layer ahead.
  for (int l = block; l < s.layers; l += grid) {
    for (int i = threadIdx.x; i < kLayerBytes / 8; i += kDecodeThreads) {
      __stcg(reinterpret_cast<int64_t*>(stack.copy + l) + i, reinterpret_cast<const int64_t*>(&stack.layer[l])[i]);
    }
  }
  if (s.ids != nullptr && block < s.M) {
    inputs_ready();
    const auto* const row = reinterpret_cast<const uint4*>(static_cast<const T*>(s.embedding) + s.ids[block] * s.C);
    auto* const to = const_cast<uint4*>(static_cast<const uint4*>(s.x)) + block * (s.C / 8);
    for (int i = threadIdx.x; i < s.C / 8; i += kDecodeThreads) __stcg(to + i, row[i]);
  }
  barrier.arrive();
  if constexpr (kNf4) {
    for (int i = threadIdx.x; i < 256 * kMapCopies; i += kDecodeThreads) {
      reinterpret_cast<float*>(shared_at(s.at.map))[i] = s.nested_map[i / kMapCopies];
    }
    const float code = s.quant_map[threadIdx.x % 16];
    for (int i = threadIdx.x; i < 256 * 8; i += kDecodeThreads) {
      const float even = __shfl_sync(0xffffffff, code, i >> 7), odd = __shfl_sync(0xffffffff, code, i >> 3 & 15);
      const unsigned pair = pack(even, odd, T{});
      *reinterpret_cast<uint4*>(shared_at(s.at.table + (i >> 3) * product.kPairBytes + i % 8 * 16)) = make_uint4(pair, pair, pair, pair);
    }
  }
  static_assert(sizeof(DecodeCommon) % 8 == 0 && sizeof(DecodeCommon) / 8 <= kDecodeThreads);
  if (threadIdx.x < sizeof(DecodeCommon) / 8) {
    reinterpret_cast<int64_t*>(shared_at(kCommonAt))[threadIdx.x] = reinterpret_cast<const int64_t*>(&s)[threadIdx.x];
  }
  if (threadIdx.x == 0) init_barrier(shared_address(shared_at(s.at.x_arrived)), 1);
  if (threadIdx.x < kPageWarps) {
    const unsigned at = static_cast<unsigned>(s.at.pages + threadIdx.x * kPagesBytes);
    init_barrier(at, 1);
    init_barrier(at + 8, 1);
    *reinterpret_cast<int*>(shared_at(static_cast<int>(at) + 16)) = 0;
  }
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  auto* const sequences = reinterpret_cast<int*>(shared_at(s.at.sequences));
  inputs_ready();
  for (int i = threadIdx.x; i < s.M; i += kDecodeThreads) {
    sequences[i] = static_cast<int>(s.lengths[i]);
    sequences[kEight + i] = s.positional ? max(sequences[i] - 1, 0) : i;
  }
  if (s.tables_shared) {
    for (int i = threadIdx.x; i < s.M * s.width; i += kDecodeThreads) sequences[kTablesAt + i] = static_cast<int>(s.tables[i]);
  }
  barrier.wait(1);
  const auto fetch_layer = [&](int l) {
    if (l < s.layers && threadIdx.x < kLayerBytes / 8) {
      const unsigned to = shared_address(shared_at(s.at.layers + l % 2 * kLayerBytes)) + 8 * threadIdx.x;
      asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" ::"r"(to), "l"(reinterpret_cast<const int64_t*>(stack.copy + l) + threadIdx.x));
    }
    commit_copies();
  };
  fetch_layer(0);
  wait_copies<0>();
  __syncthreads();
  product.make_shares(s.at.layers);
  product.load_residual();
  if (threadIdx.x < 32 * kDecodeWarps) product.stream.begin(threadIdx.x / 32);
  // Its blocks find room when those of this leave.
  next_may_start();
#pragma unroll 1
  for (int step = 0; step < kPhases * s.layers; ++step) {
    const int l = step / kPhases;
    const int layer = s.at.layers + l % 2 * kLayerBytes;
    const auto phase = static_cast<DecodePhase>(step % kPhases);
    product.prepare(layer, step);
    // Its place is that of the layer before, which is done.
    if (phase == kQkv) fetch_layer(l + 1);
    const void* const from = phase == kQkv ? (l == 0 ? s.x : s.y) : phase == kO ? s.attended : phase == kGateUp ? s.h : s.product;
    if (threadIdx.x == kPoller) {
      // Behind all products before, and the attention of their layers.
      if (step > 0) barrier.poll(1 + step + (step + kPhases - 1) / kPhases);
      if (!product.kOne) product.fetch_x(from);
    }
    // The product's scales and A, for all threads to see.
    wait_copies<0>();
    __syncthreads();
    product.stage(from);
    product.run();
    product.finish(phase == kQkv ? s.qkv : phase == kO ? s.h : phase == kGateUp ? s.product : s.y);
    barrier.arrive();
    if (phase != kQkv) continue;
    attend_or_leave<T, D, MP>(layer, 2 + step + step / kPhases);
    // Behind what attention left in the rings' place comes what the copy engine writes there.
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    barrier.arrive();
  }
  attend_or_leave<T, D, MP>(0, 0);
#endif
}

// ---- launchers

constexpr int64_t kCountersBytes = 4096;

inline int64_t rounded_up(int64_t bytes) { return ceil_div(bytes, 256) * 256; }

// Longer runs for long contexts, or adding them up takes too long; shorter ones where there are thread blocks for all.
inline int run_pages(const KernelDecode& d) {
  const int64_t short_runs = d.M * d.K * ceil_div(d.longest, kShortRunPages * kPage);
  if (short_runs <= device_attribute(cudaDevAttrMultiProcessorCount)) return kShortRunPages;
  return d.longest <= 8192 ? kRunPages : kLongRunPages;
}

struct Workspaces {
  int64_t copy, h, qkv, attended, product, z, partial, all;
};
inline Workspaces workspaces_of(const KernelDecode& d) {
  Workspaces w{};
  int64_t at = kCountersBytes;
  const auto take = [&](int64_t& to, int64_t bytes) {
    to = at;
    at += rounded_up(bytes);
  };
  const int64_t M = 8;
  // Zero between launches, like the counters, and so where it is for every model.
  take(w.z, int64_t{2} * kMostATiles * kEight * kTileRows * 8);
  take(w.copy, int64_t{kMostLayers} * sizeof(DecodeLayer));
  take(w.h, M * d.C * 2);
  take(w.qkv, M * (d.H + 2 * d.K) * d.D * 2);
  take(w.attended, M * d.H * d.D * 2);
  take(w.product, M * d.F * 2);
  take(w.partial, M * d.H * ceil_div(d.longest, run_pages(d) * kPage) * (d.D + 2) * 4);
  w.all = at;
  return w;
}

inline int attention_bytes(int64_t D, int stages) {
  return D == 64 ? decode_attention_bytes<64>(stages) : decode_attention_bytes<128>(stages);
}

struct Planned {
  DecodeStack stack;
  bool nf4;
  int MP;
};

// False where the kernel cannot.
inline bool plan_decode(const KernelDecode& d, Planned& planned) {
  DecodeStack& stack = planned.stack;
  stack = DecodeStack{};
  DecodeCommon& s = stack.common;
  const auto size = [](int64_t v) { return static_cast<int>(v); };
  if (d.count < 1 || d.M < 1 || d.M > kEight || d.dtype != KERNEL_BF16) return false;
  if (device_attribute(cudaDevAttrComputeCapabilityMajor) < 9) return false;
  if ((d.D != 64 && d.D != 128) || d.H % d.K != 0 || d.H / d.K > kEight || d.R % 16 != 0 || d.R > d.D) return false;
  if (d.C % 256 != 0 || d.F % 256 != 0 || d.H * d.D % 256 != 0 || d.K * d.D % kTileRows != 0) return false;
  const KernelDecodeLayer& first = d.layers[0];
  planned.nf4 = first.o.w == nullptr;
  const auto begin_of = [&](const KernelRowsPart& part) { return reinterpret_cast<uintptr_t>(planned.nf4 ? part.nf4.packed : part.w); };
  uintptr_t least = begin_of(first.o), most[kPhases] = {};
  s.layers = size(d.count), s.M = size(d.M), s.C = size(d.C), s.F = size(d.F), s.H = size(d.H), s.K = size(d.K), s.D = size(d.D), s.R = size(d.R);
  s.width = size(d.width), s.run_pages = run_pages(d), s.runs = size(ceil_div(d.longest, s.run_pages * kPage)), s.activation = d.activation;
  s.eps = d.eps, s.q_eps = d.q_eps, s.norm_offset = d.norm_offset, s.q_norm_offset = d.q_norm_offset, s.scale = d.scale, s.softcap = d.softcap;
  s.quant_map = first.o.nf4.quant_map, s.nested_map = first.o.nf4.nested_quant_map;
  s.tables = d.tables, s.lengths = d.lengths, s.ids = d.ids, s.positional = d.positional != 0;
  s.embedding = d.x, s.x = d.ids == nullptr ? d.x : d.y, s.norm = d.norm, s.y = d.y;
  s.parts[kQkv] = size(first.qkv_count), s.parts[kO] = s.parts[kDown] = 1, s.parts[kGateUp] = size(first.gate_up_count);
  s.columns[kQkv] = s.columns[kGateUp] = size(d.C), s.columns[kO] = size(d.H * d.D), s.columns[kDown] = size(d.F);
  s.nested_shift = 0;
  while (first.o.nf4.nested_blocksize >> (s.nested_shift + 1) > 0) ++s.nested_shift;
  const int64_t of_phase[kPhases] = {(d.H + 2 * d.K) * d.D, d.C, 2 * d.F, d.C};
  const auto parts_of = [&](const KernelDecodeLayer& of, int phase) {
    return phase == kQkv ? of.qkv : phase == kO ? &of.o : phase == kGateUp ? of.gate_up : &of.down;
  };
  for (int64_t l = 0; l < d.count && l < kMostLayers; ++l) {
    for (int phase = 0; phase < kPhases; ++phase) {
      for (int i = 0; i < s.parts[phase]; ++i) least = std::min(least, begin_of(parts_of(d.layers[l], phase)[i]));
    }
  }
  bool some_lora = false;
  int a_tiles_of[kPhases] = {};
  for (int64_t l = 0; l < d.count && l < kMostLayers; ++l) {
    const KernelDecodeLayer& from = d.layers[l];
    DecodeLayer& to = stack.layer[l];
    if (from.qkv_count != first.qkv_count || from.gate_up_count != first.gate_up_count || from.input_norm == nullptr || from.mlp_norm == nullptr) return false;
    if ((from.q_norm != nullptr || from.k_norm != nullptr) && (from.q_norm == nullptr || from.k_norm == nullptr)) return false;
    for (int phase = 0; phase < kPhases; ++phase) {
      const KernelRowsPart* const parts = parts_of(from, phase);
      int64_t rows = 0;
      int tiles = 0;
      for (int i = 0; i < s.parts[phase]; ++i) {
        const KernelRowsPart& part = parts[i];
        const KernelNf4& nf4 = part.nf4;
        DecodePart& own = to.parts[first_part(phase) + i];
        if ((part.w == nullptr) != planned.nf4 || part.rows % kTileRows != 0 || part.R > kMostRank) return false;
        if (planned.nf4) {
          if (nf4.blocksize != kBlock || nf4.nested_absmax == nullptr || nf4.quant_map != s.quant_map || nf4.nested_quant_map != s.nested_map ||
              nf4.nested_blocksize != int64_t{1} << s.nested_shift || !aligned16(nf4.packed) || !aligned16(nf4.absmax) ||
              kTileRows * (s.columns[phase] / kBlock) / nf4.nested_blocksize + 2 > kNestedOfTile) {
            return false;
          }
          own.absmax = nf4.absmax, own.nested = nf4.nested_absmax, own.nested_offset = nf4.nested_offset;
        }
        // Boxes are found by their distance from the first.
        const int64_t row_bytes = planned.nf4 ? s.columns[phase] / 2 : part.w_stride * 2;
        const uintptr_t begin = begin_of(part);
        if (row_bytes % 128 != 0 || (begin - least) % 128 != 0 || begin % 16 != 0 || (begin - least) / 128 > INT32_MAX) return false;
        if (l + i > 0 && row_bytes / 128 != s.row_steps[phase]) return false;
        s.row_steps[phase] = size(row_bytes / 128);
        own.w = size(static_cast<int64_t>((begin - least) / 128));
        most[phase] = std::max(most[phase], begin + static_cast<uintptr_t>(part.rows * row_bytes));
        own.rows = size(part.rows);
        if (part.a != nullptr) {
          if ((some_lora && (part.lora_f32 != 0) != s.lora_f32) || part.R % 8 != 0 || !aligned16(part.a) || !aligned16(part.b)) return false;
          some_lora = true;
          s.lora_f32 = part.lora_f32 != 0;
          own.a = part.a, own.b = part.b, own.scale = part.scale, own.R = size(part.R);
          tiles += size(ceil_div(part.R, kTileRows));
        }
        rows += part.rows;
      }
      if (rows != of_phase[phase]) return false;
      if (l > 0 && tiles != a_tiles_of[phase]) return false;
      a_tiles_of[phase] = tiles;
    }
    to.norms[0] = from.input_norm, to.norms[1] = from.mlp_norm, to.q_norm = from.q_norm, to.k_norm = from.k_norm;
    for (int phase = 0; phase < kPhases; ++phase) {
      const void* const bias[kPhases] = {from.qkv_bias, from.o_bias, from.gate_up_bias, from.down_bias};
      to.bias[phase] = bias[phase];
      s.biased[phase] = s.biased[phase] || bias[phase] != nullptr;
    }
    to.pool_k = from.pool_k, to.pool_v = from.pool_v, to.cos = from.cos, to.sin = from.sin, to.window = size(from.window);
  }

  const int processors = device_attribute(cudaDevAttrMultiProcessorCount), limit = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  planned.MP = s.M <= 1 ? 1 : !planned.nf4 ? kEight : s.M <= 2 ? 2 : s.M <= 4 ? 4 : 8;
  const bool wide = planned.nf4 && planned.MP <= 2;
  int most_tiles = 0;
  s.a_row = kBlock * (s.lora_f32 ? 4 : 2) + 16;
  int64_t a_bytes = 0;
  for (int phase = 0; phase < kPhases; ++phase) {
    const int tiles = size(ceil_div(phase == kGateUp ? d.F / kTileRows : of_phase[phase] / kTileRows, processors)) << (phase == kGateUp);
    most_tiles = std::max(most_tiles, tiles);
    s.pieces[phase] = a_tiles_of[phase] == 0 ? 1 : processors / a_tiles_of[phase];
    if (s.pieces[phase] < 1) s.pieces[phase] = 1;
    if (s.pieces[phase] > s.columns[phase] / kBlock) s.pieces[phase] = s.columns[phase] / kBlock;
    s.a_pieces[phase] = a_tiles_of[phase] * s.pieces[phase];
    if (s.a_pieces[phase] > processors) return false;
    // A piece of A has as many units of 64 columns as the longest.
    if (s.a_pieces[phase] > 0) a_bytes = std::max(a_bytes, ceil_div(s.columns[phase] / kBlock, s.pieces[phase]) * kTileRows * s.a_row);
    if (!boxes_anywhere(stack.w[phase], reinterpret_cast<const void*>(least), static_cast<int64_t>((most[phase] - least) / 128), int64_t{s.row_steps[phase]} * 128,
                        kTileRows)) {
      return false;
    }
  }
  if (most_tiles > kMostTiles) return false;
  s.tables_shared = d.M * d.width <= kMostPages;

  // Shared memory: rings as deep as there is room for, with all of x if that can be, and A.
  DecodeShared& at = s.at;
  const int64_t end = limit + kReserved;
  const auto lay_out = [&](int depth, bool all_x, bool a) {
    int64_t next = kCommonAt + (sizeof(DecodeCommon) + 15) / 16 * 16, behind = kTableAt + 256 * 256;
    // A wide table has its place: what does not fit before it lies behind.
    const auto take = [&](int& to, int64_t bytes) {
      int64_t& own = wide && next + bytes > kTableAt ? behind : next;
      to = size(own);
      own += ceil_div(bytes, 16) * 16;
    };
    if (planned.nf4) take(at.map, 256 * kMapCopies * 4);
    if (wide) at.table = kTableAt;
    if (planned.nf4 && !wide) take(at.table, 256 * 128);
    take(at.layers, 2 * int64_t{sizeof(DecodeLayer)});
    take(at.sequences, (kTablesAt + (s.tables_shared ? d.M * d.width : 0)) * 4);
    take(at.x_arrived, 8);
    take(at.w_arrived, kDecodeWarps * kStreamBytes);
    take(at.pages, kPageWarps * kPagesBytes);
    take(at.shares, kPhases * int64_t{sizeof(DecodeShare)});
    take(at.z, int64_t{3} * planned.MP * (kMostRank + 4) * 4);
    take(at.statistics, 17 * planned.MP * 4);
    take(at.residual, ceil_div(d.C / kTileRows, processors) * planned.MP * kTileRows * 4);
    if (behind > kTableAt + 256 * 256) return false;
    at.attention = size(wide ? behind : next);
    take(at.slots, int64_t{kDecodeWarps + most_tiles} * planned.MP * kSumStride * 4);
    take(at.lora, some_lora ? int64_t{most_tiles} * planned.MP * kTileRows * 4 : 0);
    take(at.nested, planned.nf4 ? most_tiles * kNestedOfTile * 4 : 0);
    s.a_shared = a && a_bytes > 0;
    take(at.a, s.a_shared ? a_bytes : 0);
    int64_t x_bytes = 0;
    for (int phase = 0; phase < kPhases; ++phase) {
      s.x_shared[phase] = all_x || phase != kDown;
      const int64_t norm_bytes = phase == kQkv || phase == kGateUp ? s.columns[phase] * 2 : 0;
      if (s.x_shared[phase]) x_bytes = std::max(x_bytes, int64_t{s.M} * (s.columns[phase] * 2 + 16) + norm_bytes);
    }
    // Vectors of a row are mixed by their addresses.
    next = ceil_div(next, 64) * 64, behind = ceil_div(behind, 64) * 64;
    take(at.x, x_bytes);
    next = ceil_div(next, 1024) * 1024, behind = ceil_div(behind, 1024) * 1024;
    const int64_t ring = depth * kBoxBytes, before_table = wide ? (kTableAt - next) / ring : kDecodeWarps;
    s.depth = depth;
    at.ring[0] = size(next), at.ring[1] = size(behind);
    at.first_rings = size(std::min<int64_t>(before_table, kDecodeWarps));
    next += at.first_rings * ring, behind += (kDecodeWarps - at.first_rings) * ring;
    at.stages = at.attention + attention_bytes(d.D, 2) <= end ? 2 : 1;
    const int64_t used = std::max<int64_t>(wide ? behind : next, at.attention + attention_bytes(d.D, at.stages));
    at.all = size(used - kReserved);
    return used <= end;
  };
  const auto fits = [&](bool all_x, bool a) {
    for (int depth = wide ? kLeastDepth : kMostDepth; depth >= kLeastDepth; --depth) {
      if (lay_out(depth, all_x, a)) return true;
    }
    return false;
  };
  if (!fits(true, true) && !fits(true, false) && (planned.MP <= 2 || (!fits(false, true) && !fits(false, false)))) return false;

  char* const base = static_cast<char*>(d.workspace);
  const Workspaces w = workspaces_of(d);
  s.counters = reinterpret_cast<int*>(base);
  s.arrived = s.counters + 16;
  stack.copy = reinterpret_cast<DecodeLayer*>(base + w.copy);
  s.h = base + w.h, s.qkv = base + w.qkv, s.attended = base + w.attended, s.product = base + w.product;
  s.z = reinterpret_cast<unsigned long long*>(base + w.z), s.partial = reinterpret_cast<float*>(base + w.partial);
  return d.M * d.K * 4 + 64 <= kCountersBytes;
}

template <typename T, int D>
int launch_decode(const Planned& planned, void* stream) {
  const auto launch = [&](auto* kernel) -> int {
    const int error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, planned.stack.common.at.all);
    if (error != cudaSuccess) return error;
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeCooperative;
    attribute.val.cooperative = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(device_attribute(cudaDevAttrMultiProcessorCount)));
    config.blockDim = dim3(kDecodeThreads);
    config.dynamicSmemBytes = static_cast<size_t>(planned.stack.common.at.all);
    config.stream = static_cast<cudaStream_t>(stream);
    config.attrs = &attribute;
    config.numAttrs = 1;
    return cudaLaunchKernelEx(&config, kernel, planned.stack);
  };
  if (!planned.nf4) return planned.MP == 1 ? launch(decode_kernel<T, D, 1, false>) : launch(decode_kernel<T, D, 8, false>);
  switch (planned.MP) {
    case 1:
      return launch(decode_kernel<T, D, 1, true>);
    case 2:
      return launch(decode_kernel<T, D, 2, true>);
    case 4:
      return launch(decode_kernel<T, D, 4, true>);
  }
  return launch(decode_kernel<T, D, 8, true>);
}

}  // namespace
}  // namespace ferrotune

using namespace ferrotune;

extern "C" int64_t decode_workspace(const KernelDecode* d) {
  if (d->M > kEight) return decode_groups_workspace(*d);
  Planned planned;
  KernelDecode some = *d;
  if (some.count > kMostLayers) some.count = kMostLayers;
  return plan_decode(some, planned) ? workspaces_of(*d).all : 0;
}

extern "C" int decode(const KernelDecode* d, void* stream) {
  if (d->M > kEight) return decode_groups(*d, stream);
  // As many layers a launch as it can be told of.
  const int64_t launches = ceil_div(d->count, kMostLayers);
  for (int64_t i = 0; i < launches; ++i) {
    KernelDecode some = *d;
    const int64_t first = i * d->count / launches;
    some.layers += first;
    some.count = (i + 1) * d->count / launches - first;
    if (i > 0) some.x = d->y, some.ids = nullptr;
    if (i < launches - 1) some.norm = nullptr;
    Planned planned;
    if (!plan_decode(some, planned)) return cudaErrorInvalidValue;
    const int error = d->D == 64 ? launch_decode<__nv_bfloat16, 64>(planned, stream) : launch_decode<__nv_bfloat16, 128>(planned, stream);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}
