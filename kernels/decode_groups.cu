// decode.cu for 9 to 32 sequences: all layers of a decoder on one new row of each, one launch,
//   h = x + o(attention(rope(qkv(norm(x))))),   y = h + down(act(gate) * up),  [gate | up] = gate_up(norm(h))
// Fuses what kernels/rms_norm.cu, rows.cu, rope.cu, paged_attention.cu and swiglu.cu do in nine or ten launches a layer. Moves: W once, 0.516
// bytes an element of NF4 or 2 in 16 bits, the keys and values once; rows of x and the slices' sums by way of the second-level cache (32 rows of
// 8B: 25 MB of sums written and read a layer).
//
// As there: as many thread blocks as processors, which wait for each other between two products, and rings of weights that the copy engine fills
// ahead of the waits. What differs is how a product is shared (decode_groups.cuh): all rows of x do not fit beside the rings, so that a thread block has
// a slice of the columns.
#include "decode_groups.h"

#include "decode_groups.cuh"
#include "decode_stack.cuh"

namespace ferrotune {
namespace {

#ifdef FERROTUNE_HOPPER

// A function of its own: what it keeps in registers is other than what products do.
template <typename T, int D>
__device__ __noinline__ void attend(int layer, Barrier barrier) {
  DecodeAttention<T, D, 2>(*reinterpret_cast<const DecodeCommon*>(shared_at(kCommonAt)), layer).run_all(barrier);
}

// So are x's slice and z, and the sums of slices.
template <typename T, int N, bool kNf4>
__device__ __noinline__ void take_input(int layer, int phase, const void* x, Barrier barrier) {
  GroupInput<T, N, kNf4> input(*reinterpret_cast<const DecodeCommon*>(shared_at(kCommonAt)), *reinterpret_cast<const GroupCommon*>(shared_at(kGroupCommonAt)));
  input.enter(layer, phase);
  const bool some = input.share().tiles > 0;
  if (some) input.prefetch();
  if (threadIdx.x == kPoller) barrier.poll();
  // The layers'.
  wait_copies<0>();
  __syncthreads();
  if (!some) return;
  input.stage(x);
  input.multiply_by_a();
}
template <typename T, int N, bool kNf4>
__device__ __noinline__ void put_output(int layer, int phase, int time, void* to, const void* residual) {
  GroupOutput<T, N, kNf4> output(*reinterpret_cast<const DecodeCommon*>(shared_at(kCommonAt)), *reinterpret_cast<const GroupCommon*>(shared_at(kGroupCommonAt)));
  output.enter(layer, phase);
  output.meet(time);
  output.finish(to, residual);
}

#endif

template <typename T, int D, int N, bool kNf4>
__global__ void __launch_bounds__(kDecodeThreads, 1) group_decode_kernel(const __grid_constant__ GroupStack stack) {
#ifdef FERROTUNE_HOPPER
  extern __shared__ uint4 dynamic[];
  if (shared_address(dynamic) != kReserved) __trap();
  const DecodeCommon& s = stack.common;
  GroupProducts<T, N, kNf4> product(stack);
  Barrier barrier(s.counters);
  const int grid = static_cast<int>(gridDim.x), block = static_cast<int>(blockIdx.x);
  constexpr int kLayerBytes = sizeof(DecodeLayer);
  // Arguments of a launch are slow to read for the first time: the layers' go to memory, and from there into shared memory one layer ahead.
  for (int l = block; l < s.layers; l += grid) {
    for (int i = threadIdx.x; i < kLayerBytes / 8; i += kDecodeThreads) {
      __stcg(reinterpret_cast<int64_t*>(stack.copy + l) + i, reinterpret_cast<const int64_t*>(&stack.layer[l])[i]);
    }
  }
  if constexpr (kNf4) {
    for (int i = threadIdx.x; i < 256 * kMapCopies; i += kDecodeThreads) {
      reinterpret_cast<float*>(shared_at(s.at.map))[i] = s.nested_map[i / kMapCopies];
    }
    const float code = s.quant_map[threadIdx.x % 16];
    for (int i = threadIdx.x; i < 256 * 8; i += kDecodeThreads) {
      const float even = __shfl_sync(0xffffffff, code, i >> 7), odd = __shfl_sync(0xffffffff, code, i >> 3 & 15);
      const unsigned pair = pack(even, odd, T{});
      *reinterpret_cast<uint4*>(shared_at(s.at.table + (i >> 3) * 128 + i % 8 * 16)) = make_uint4(pair, pair, pair, pair);
    }
  }
  static_assert(sizeof(DecodeCommon) % 8 == 0 && sizeof(DecodeCommon) / 8 <= kDecodeThreads);
  if (threadIdx.x < sizeof(DecodeCommon) / 8) {
    reinterpret_cast<int64_t*>(shared_at(kCommonAt))[threadIdx.x] = reinterpret_cast<const int64_t*>(&s)[threadIdx.x];
  }
  static_assert(sizeof(GroupCommon) % 8 == 0 && sizeof(GroupCommon) / 8 <= kDecodeThreads);
  if (threadIdx.x < sizeof(GroupCommon) / 8) {
    reinterpret_cast<int64_t*>(shared_at(kGroupCommonAt))[threadIdx.x] = reinterpret_cast<const int64_t*>(&stack.group)[threadIdx.x];
  }
  auto* const sequences = reinterpret_cast<int*>(shared_at(s.at.sequences));
  inputs_ready();
  for (int i = threadIdx.x; i < s.M; i += kDecodeThreads) sequences[i] = static_cast<int>(s.lengths[i]);
  if (s.tables_shared) {
    for (int i = threadIdx.x; i < s.M * s.width; i += kDecodeThreads) sequences[s.M + i] = static_cast<int>(s.tables[i]);
  }
  // The first norm's sums of squares: a row each.
  float* const squares = reinterpret_cast<float*>(shared_at(stack.group.squares));
  float of_row = 0;
  for (int i = threadIdx.x; block < s.M && i < s.C / 8; i += kDecodeThreads) {
    const Eight<T> v(static_cast<const T*>(s.x) + int64_t{block} * s.C + 8 * i);
#pragma unroll
    for (int k = 0; k < 8; ++k) of_row += v.v[k] * v.v[k];
  }
#pragma unroll
  for (int step = 16; step > 0; step /= 2) of_row += __shfl_xor_sync(0xffffffff, of_row, step);
  if (threadIdx.x % 32 == 0) squares[threadIdx.x / 32] = of_row;
  __syncthreads();
  if (threadIdx.x < N) {
    float sum = 0;
    for (int w = 0; w < kAllWarps; ++w) sum += squares[w];
    __stcg(stack.group.statistics + (grid + block) * N + threadIdx.x, static_cast<int>(threadIdx.x) == block ? sum : 0.0f);
  }
  barrier.arrive();
  barrier.wait();
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
  product.make_shares();
  product.stream.begin();
  __syncthreads();
#pragma unroll 1
  for (int step = 0; step < kPhases * s.layers; ++step) {
    const int l = step / kPhases;
    const int layer = s.at.layers + l % 2 * kLayerBytes;
    const auto phase = static_cast<DecodePhase>(step % kPhases);
    const void *const x = l == 0 ? s.x : s.y, *const residual = phase == kO ? x : phase == kDown ? s.h : nullptr;
    product.prepare(layer, step);
    if (phase == kQkv) {
      // Its place is that of the layer before, which is done.
      fetch_layer(l + 1);
    }
    take_input<T, N, kNf4>(layer, phase, phase == kQkv ? x : phase == kO ? s.attended : phase == kGateUp ? s.h : s.product, barrier);
    product.run();
    put_output<T, N, kNf4>(layer, phase, l + 1, phase == kQkv ? s.qkv : phase == kO ? s.h : phase == kGateUp ? s.product : s.y, residual);
    barrier.arrive();
    if (phase != kQkv) continue;
    attend<T, D>(layer, barrier);
    // Behind what attention left in the rings' place comes what the copy engine writes there.
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    barrier.arrive();
  }
  // The last thread block leaves the counters as it found them. Nobody waits any more.
  if (threadIdx.x == 0) {
    __threadfence();
    if (atomicAdd(s.counters + 1, 1) == grid - 1) {
      s.counters[0] = s.counters[1] = 0;
      for (int phase = 0; phase < kPhases; ++phase) {
        for (int i = 0; i < stack.group.cut[phase].groups; ++i) stack.group.met[phase * kMostGroups + i] = 0;
      }
    }
  }
#endif
}

// ---- launchers

// Runs of 512 keys: with so many sequences there are heads for all thread blocks.
inline int run_pages_of(const KernelDecode& d) { return d.longest <= 8192 ? 32 : kLongRunPages; }

// The way to cut a product that takes a warpgroup the fewest units, and of these the one with the fewest slices. False where none fits.
inline bool cut_product(GroupCut& cut, int tiles, int units, bool pairs, int processors, int most_units) {
  int64_t least = INT64_MAX;
  for (int slices = 1; slices <= kMostSlices && slices <= units; ++slices) {
    // A group of one tile would be shared by all four warpgroups, whose sums are looked for two at a time.
    const int groups = std::min(pairs ? tiles : tiles / 2, processors / slices);
    if (groups < 1) continue;
    const int tall = static_cast<int>(ceil_div(tiles, groups)) << pairs, of_slice = static_cast<int>(ceil_div(units, slices));
    const int64_t cost = ceil_div(int64_t{tall} * of_slice, kWarpgroups);
    if (of_slice > most_units || tall > kMostTall || tall * slices > kMostTallSlices || groups > kMostGroups || cost >= least) continue;
    least = cost;
    cut = {groups, slices, tiles, units, tall};
  }
  return least != INT64_MAX;
}

struct PlannedGroups {
  GroupStack stack;
  bool nf4;
  int64_t sums_bytes, statistics_bytes;
};

inline Workspaces workspaces_of(const KernelDecode& d, const PlannedGroups& planned) {
  return workspaces_of(d, kMostRowsOfX, run_pages_of(d), planned.sums_bytes, planned.statistics_bytes);
}

// False where the kernel cannot.
inline bool plan_groups(const KernelDecode& d, PlannedGroups& planned) {
  GroupStack& stack = planned.stack;
  stack = GroupStack{};
  DecodeCommon& s = stack.common;
  GroupCommon& group = stack.group;
  Described of;
  if (device_attribute(cudaDevAttrComputeCapabilityMajor) != 9 || !describe(d, kMostRowsOfX, run_pages_of(d), {kTall, 128, 64}, of, s, stack.layer, stack.w)) return false;
  planned.nf4 = of.nf4;
  const int processors = device_attribute(cudaDevAttrMultiProcessorCount), limit = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  const int N = s.M <= 16 ? 16 : 32, unit = of.nf4 ? 128 : 64, box_bytes = kTall * (of.nf4 ? 64 : 128);
  s.tables_shared = d.M * d.width <= kMostPages;
  if (d.M * d.K * 4 + kArrivedAt > kMetAt || processors > kMostGroups || (of.some_lora && s.lora_f32)) return false;
  int most_rank = 0;
  for (const DecodePart& part : stack.layer[0].parts) most_rank = std::max(most_rank, part.R);
  for (int64_t l = 0; l < d.count; ++l) {
    for (const DecodePart& part : stack.layer[l].parts) most_rank = std::max(most_rank, part.R);
  }
  group.z_row = static_cast<int>(ceil_div(most_rank, kTileRows)) * kTileRows + 8;

  // Shared memory: x's slice, which attention uses, too, and rings as deep as there is room for.
  DecodeShared& at = s.at;
  const int64_t end = limit + kReserved;
  const auto lay_out = [&](int depth, int most_units) {
    planned.sums_bytes = 0;
    const int64_t z_slot = of.some_lora ? kTileRows * (N + 8) * 4 : 0;
    int64_t x_bytes = 0;
    for (int phase = 0; phase < kPhases; ++phase) {
      const bool pairs = phase == kGateUp;
      GroupCut& cut = group.cut[phase];
      if (!cut_product(cut, static_cast<int>((of.rows[phase] >> pairs) / kTall), s.columns[phase] / unit, pairs, processors, most_units)) return false;
      x_bytes = std::max(x_bytes, ceil_div(cut.units, cut.slices) * unit * N * 2 + 2 * z_slot);
      planned.sums_bytes = std::max(planned.sums_bytes, int64_t{cut.groups} * cut.slices * (kWarpgroups - 1 + cut.most_tall) * kTall * N * 4);
    }
    int64_t next = kGroupCommonAt + ceil_div(sizeof(GroupCommon), 16) * 16;
    const auto take = [&](int& to, int64_t bytes) {
      to = static_cast<int>(next);
      next += ceil_div(bytes, 16) * 16;
    };
    take(at.layers, 2 * int64_t{sizeof(DecodeLayer)});
    take(at.sequences, (d.M + (s.tables_shared ? d.M * d.width : 0)) * 4);
    take(at.w_arrived, kWarpgroups * depth * 16);
    take(at.shares, kPhases * int64_t{sizeof(GroupShare)});
    take(at.statistics, kDecodeThreads * 4);
    take(group.squares, kAllWarps * N * 4);
    take(group.rstd, N * 4);
    take(at.z, int64_t{3} * N * group.z_row * 2);
    if (of.nf4) take(at.map, 256 * kMapCopies * 4);
    if (of.nf4) take(at.table, 256 * 128);
    next = ceil_div(next, 1024) * 1024;
    take(at.x, x_bytes);
    at.attention = at.x;
    next = ceil_div(next, 1024) * 1024;
    for (GroupCut& cut : group.cut) {
      cut.z_sums = at.x + static_cast<int>(ceil_div(cut.units, cut.slices)) * unit * N * 2;
      for (cut.z_slots = 16; cut.z_slots > 1 && cut.z_sums + cut.z_slots * z_slot > next;) cut.z_slots /= 2;
    }
    take(at.ring[0], int64_t{kWarpgroups} * depth * box_bytes);
    // Attention's two teams have x's place and the rings'.
    at.stages = at.x + 2 * attention_bytes(d.D, 2) <= end ? 2 : 1;
    next = std::max<int64_t>(next, at.x + 2 * attention_bytes(d.D, at.stages));
    group.depth = depth;
    at.all = static_cast<int>(next - kReserved);
    return next <= end;
  };
  bool fits = false;
  for (int most_units = 2048 / unit; !fits && most_units >= 256 / unit; most_units -= 128 / unit) {
    for (int depth = of.nf4 ? 6 : 4; !fits && depth >= 3; --depth) fits = lay_out(depth, most_units);
  }
  if (!fits) return false;
  planned.statistics_bytes = int64_t{2} * processors * N * 4;
  const Workspaces w = workspaces_of(d, planned);
  place(s, w, d.workspace);
  char* const base = static_cast<char*>(d.workspace);
  group.met = reinterpret_cast<int*>(base + kMetAt);
  group.sums = reinterpret_cast<float*>(base + w.sums);
  group.statistics = reinterpret_cast<float*>(base + w.statistics);
  stack.copy = reinterpret_cast<DecodeLayer*>(base + w.copy);
  return true;
}

template <typename T, int D, int N>
int launch_groups(const PlannedGroups& planned, void* stream) {
  const int shared = planned.stack.common.at.all;
  return planned.nf4 ? launch_on_all(group_decode_kernel<T, D, N, true>, planned.stack, shared, stream)
                     : launch_on_all(group_decode_kernel<T, D, N, false>, planned.stack, shared, stream);
}

}  // namespace

int64_t decode_groups_workspace(const KernelDecode& d) {
  PlannedGroups planned;
  return plan_groups(d, planned) ? workspaces_of(d, planned).all : 0;
}

int decode_groups(const KernelDecode& d, void* stream) {
  using T = __nv_bfloat16;
  PlannedGroups planned;
  if (!plan_groups(d, planned)) return cudaErrorInvalidValue;
  if (d.D == 64) return d.M <= 16 ? launch_groups<T, 64, 16>(planned, stream) : launch_groups<T, 64, 32>(planned, stream);
  return d.M <= 16 ? launch_groups<T, 128, 16>(planned, stream) : launch_groups<T, 128, 32>(planned, stream);
}

}  // namespace ferrotune
