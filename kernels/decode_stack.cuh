// defines: describe, Workspaces: what the host tells a kernel for all layers (decode.cu, decode_groups.cu).
#pragma once

#include <algorithm>

#include "decode.cuh"

namespace ferrotune {
namespace {

// Zero between launches: how many thread blocks are at the barrier, have left, have a run of a head's keys; from kMetAt on, have a slice of a
// group of rows.
constexpr int64_t kCountersBytes = 8192, kArrivedAt = 64, kMetAt = 4096;

// Where the workspace has what.
struct Workspaces {
  int64_t copy, h, qkv, attended, product, z, partial, sums, statistics, all;
};
inline Workspaces workspaces_of(const KernelDecode& d, int64_t rows, int run_pages, int64_t sums_bytes, int64_t statistics_bytes) {
  Workspaces w{};
  int64_t at = kCountersBytes;
  const auto take = [&](int64_t& to, int64_t bytes) {
    to = at;
    at += ceil_div(bytes, 256) * 256;
  };
  // Zero between launches, like the counters, and so where it is for every model and number of rows.
  take(w.z, int64_t{2} * kMostATiles * kEight * kTileRows * 8);
  take(w.copy, int64_t{kMostLayers} * sizeof(DecodeLayer));
  take(w.h, rows * d.C * 2);
  take(w.qkv, rows * (d.H + 2 * d.K) * d.D * 2);
  take(w.attended, rows * d.H * d.D * 2);
  take(w.product, rows * d.F * 2);
  take(w.partial, rows * d.H * ceil_div(d.longest, run_pages * kPage) * (d.D + 2) * 4);
  take(w.sums, sums_bytes);
  take(w.statistics, statistics_bytes);
  w.all = at;
  return w;
}

inline int attention_bytes(int64_t D, int stages) {
  return D == 64 ? decode_attention_bytes<64>(stages) : decode_attention_bytes<128>(stages);
}

// A box of weights: rows, and bytes of each.
struct BoxSize {
  int rows, bytes, nf4_bytes;
};
struct Described {
  bool nf4, some_lora;
  int64_t rows[kPhases];  // of W
  int a_tiles[kPhases];   // 16 rows each, of all parts
};

// All but what the workspace has and how the work is shared. False where neither kernel can.
inline bool describe(const KernelDecode& d, int most_rows, int run_pages, BoxSize box, Described& described, DecodeCommon& s, DecodeLayer* layers,
                     CUtensorMap* maps) {
  described = Described{};
  const auto size = [](int64_t v) { return static_cast<int>(v); };
  if (d.count < 1 || d.M < 1 || d.M > most_rows || d.dtype != KERNEL_BF16) return false;
  if (device_attribute(cudaDevAttrComputeCapabilityMajor) < 9) return false;
  if ((d.D != 64 && d.D != 128) || d.H % d.K != 0 || d.H / d.K > kEight || d.R % 16 != 0 || d.R > d.D) return false;
  if (d.C % 256 != 0 || d.F % 256 != 0 || d.H * d.D % 256 != 0 || d.K * d.D % box.rows != 0 || d.C % box.rows != 0 || d.F % box.rows != 0) return false;
  const KernelDecodeLayer& first = d.layers[0];
  described.nf4 = first.o.w == nullptr;
  const auto begin_of = [&](const KernelRowsPart& part) { return reinterpret_cast<uintptr_t>(described.nf4 ? part.nf4.packed : part.w); };
  uintptr_t least = begin_of(first.o), most[kPhases] = {};
  s.layers = size(d.count), s.M = size(d.M), s.C = size(d.C), s.F = size(d.F), s.H = size(d.H), s.K = size(d.K), s.D = size(d.D), s.R = size(d.R);
  s.width = size(d.width), s.run_pages = run_pages, s.runs = size(ceil_div(d.longest, run_pages * kPage)), s.activation = d.activation;
  s.eps = d.eps, s.q_eps = d.q_eps, s.norm_offset = d.norm_offset, s.q_norm_offset = d.q_norm_offset, s.scale = d.scale, s.softcap = d.softcap;
  s.quant_map = first.o.nf4.quant_map, s.nested_map = first.o.nf4.nested_quant_map;
  s.tables = d.tables, s.lengths = d.lengths, s.x = d.x, s.y = d.y;
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
  const int step = described.nf4 ? box.nf4_bytes : box.bytes;
  for (int64_t l = 0; l < d.count && l < kMostLayers; ++l) {
    const KernelDecodeLayer& from = d.layers[l];
    DecodeLayer& to = layers[l];
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
        if ((part.w == nullptr) != described.nf4 || part.rows % box.rows != 0 || part.R > kMostRank) return false;
        if (described.nf4) {
          if (nf4.blocksize != kBlock || nf4.nested_absmax == nullptr || nf4.quant_map != s.quant_map || nf4.nested_quant_map != s.nested_map ||
              nf4.nested_blocksize != int64_t{1} << s.nested_shift || s.nested_shift < 2 || !aligned16(nf4.packed) || !aligned16(nf4.absmax)) {
            return false;
          }
          own.absmax = nf4.absmax, own.nested = nf4.nested_absmax, own.nested_offset = nf4.nested_offset;
        }
        // Boxes are found by their distance from the first.
        const int64_t row_bytes = described.nf4 ? s.columns[phase] / 2 : part.w_stride * 2;
        const uintptr_t begin = begin_of(part);
        if (row_bytes % step != 0 || (begin - least) % step != 0 || begin % 16 != 0 || (begin - least) / step > INT32_MAX) return false;
        if (l + i > 0 && row_bytes / step != s.row_steps[phase]) return false;
        s.row_steps[phase] = size(row_bytes / step);
        own.w = size(static_cast<int64_t>((begin - least) / step));
        most[phase] = std::max(most[phase], begin + static_cast<uintptr_t>(part.rows * row_bytes));
        own.rows = size(part.rows);
        if (part.a != nullptr) {
          if ((described.some_lora && (part.lora_f32 != 0) != s.lora_f32) || part.R % 8 != 0 || !aligned16(part.a) || !aligned16(part.b)) return false;
          described.some_lora = true;
          s.lora_f32 = part.lora_f32 != 0;
          own.a = part.a, own.b = part.b, own.scale = part.scale, own.R = size(part.R);
          tiles += size(ceil_div(part.R, kTileRows));
        }
        rows += part.rows;
      }
      if (rows != of_phase[phase]) return false;
      if (l > 0 && tiles != described.a_tiles[phase]) return false;
      described.a_tiles[phase] = tiles;
    }
    to.norms[0] = from.input_norm, to.norms[1] = from.mlp_norm, to.q_norm = from.q_norm, to.k_norm = from.k_norm;
    to.bias[kQkv] = from.qkv_bias, to.bias[kO] = from.o_bias, to.bias[kGateUp] = from.gate_up_bias, to.bias[kDown] = from.down_bias;
    to.pool_k = from.pool_k, to.pool_v = from.pool_v, to.cos = from.cos, to.sin = from.sin, to.window = size(from.window);
  }
  for (int phase = 0; phase < kPhases; ++phase) {
    described.rows[phase] = of_phase[phase];
    if (!boxes_anywhere(maps[phase], reinterpret_cast<const void*>(least), step, static_cast<int64_t>((most[phase] - least) / step), int64_t{s.row_steps[phase]} * step,
                        box.rows)) {
      return false;
    }
  }
  return true;
}

// What the workspace has, but for the layers' copy.
inline void place(DecodeCommon& s, const Workspaces& w, void* workspace) {
  char* const base = static_cast<char*>(workspace);
  s.counters = reinterpret_cast<int*>(base);
  s.arrived = reinterpret_cast<int*>(base + kArrivedAt);
  s.h = base + w.h, s.qkv = base + w.qkv, s.attended = base + w.attended, s.product = base + w.product;
  s.z = reinterpret_cast<unsigned long long*>(base + w.z), s.partial = reinterpret_cast<float*>(base + w.partial);
}

template <typename Kernel, typename Stack>
int launch_on_all(Kernel* kernel, const Stack& stack, int shared, void* stream) {
  const int error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeCooperative;
  attribute.val.cooperative = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(device_attribute(cudaDevAttrMultiProcessorCount)));
  config.blockDim = dim3(kDecodeThreads);
  config.dynamicSmemBytes = static_cast<size_t>(shared);
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &attribute;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, stack);
}

}  // namespace
}  // namespace ferrotune
