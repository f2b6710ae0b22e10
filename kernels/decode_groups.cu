// All layers of a decoder on 9 to 64 new rows, bf16 on Hopper: four products by rows_groups.cuh and paged attention, five launches a layer in place
// of nine. What the others do is done on the way out of the product before:
//   norm        x_i / rms(x) w_i: the product that makes x leaves x w, too, and sums of x^2; the product behind divides its own sums by the root,
//               which commutes with W, A and B. x w is rounded once, where a norm by itself rounds x / rms(x) and then that times w.
//   rotation    in attention (paged_attention.cu)
//   activation  gate and up of the same columns are two thread blocks beside each other
// The first layer's norm is a launch, and so are norms of query and key, and the activation where gate and up are one matrix with LoRA or in 4 bits.
// Moves: the weights once, keys and values once.
//
// Measured on H200s, Llama-3.1-8B, LoRA r 16, a step of 32 rows, ms: NF4 3.85 layer by layer, 3.74 with the norms; bf16 5.33, 5.18 with the
// norms, 5.20 with the activation, 5.06 with both. A layer of four, us: NF4 105.4 with the activation as a launch, 100.2 without; bf16 145.
// Tried: all products between two attentions in one launch (bf16 158 to 173 us, NF4 124; docs/serving.md); the first stages of the next product's
// weights and its scales asked for into the second-level cache, when the last stage of this has been asked for (bf16 5.10 to 5.40 ms for half of a
// block's stages to twice as many) or is there (5.06 to 5.16), NF4 the same in all cases.
#include "chain.cuh"
#include "decode_groups.h"
#include "rows_groups.h"

namespace ferrotune {
namespace {

constexpr int64_t kArrivedBytes = 64 * 1024, kMostRows = 64, kRowsOfGroup = 256;

// Where what passes from launch to launch lies. Counters of attention stand first, zero between launches.
struct Places {
  int32_t* arrived;
  char *qkv, *turned, *attended, *gate_up, *product, *normed, *h[2];
  float *rstd, *squares, *partial;
  int64_t all;

  explicit Places(const KernelDecode& d) {
    char* const base = static_cast<char*>(d.workspace);
    int64_t at = kArrivedBytes;
    const auto take = [&](int64_t bytes) {
      char* const place = base + at;
      at += ceil_div(bytes, 256) * 256;
      return place;
    };
    arrived = reinterpret_cast<int32_t*>(base);
    qkv = take(d.M * (d.H + 2 * d.K) * d.D * 2);
    turned = take(d.M * (d.H + d.K) * d.D * 2);
    attended = take(d.M * d.H * d.D * 2);
    gate_up = take(d.M * 2 * d.F * 2);
    product = take(d.M * d.F * 2);
    normed = take(d.M * d.C * 2);
    h[0] = take(d.M * d.C * 2), h[1] = take(d.M * d.C * 2);
    rstd = reinterpret_cast<float*>(take(d.M * d.H * 4));
    squares = reinterpret_cast<float*>(take(squares_rows(d) * kMostRows * 4));
    partial = reinterpret_cast<float*>(take(d.M * d.H * ceil_div(d.longest, 512) * (d.D + 2) * 4));
    all = at;
  }
  static int squares_rows(const KernelDecode& d) { return static_cast<int>(ceil_div(d.C, kRowsOfGroup) * 2); }
};

struct Product {
  KernelRows rows;
  GroupExtras extras;
};

struct Layers {
  const KernelDecode& d;
  const Places at;
  explicit Layers(const KernelDecode& given) : d(given), at(given) {}

  Product product(const KernelRowsPart* parts, int64_t count, const void* bias, const void* x, int64_t K, void* y, int64_t width) const {
    Product p{};
    for (int64_t i = 0; i < count; ++i) p.rows.parts[i] = parts[i];
    p.rows.count = count;
    p.rows.M = d.M, p.rows.K = p.rows.x_stride = K, p.rows.y_stride = width;
    p.rows.x = x, p.rows.y = y, p.rows.bias = bias, p.rows.dtype = d.dtype;
    return p;
  }
  // x is at.normed, still to be divided by its root.
  Product& behind_norm(Product& p) const {
    p.extras.x_squares = at.squares, p.extras.squares_rows = Places::squares_rows(d), p.extras.eps = d.eps;
    return p;
  }
  Product& before_norm(Product& p, const void* weight) const {
    p.extras.next_weight = weight, p.extras.next_offset = d.norm_offset, p.extras.normed = at.normed, p.extras.squares = at.squares;
    return p;
  }
  const void* residual_of(int64_t layer) const { return layer == 0 ? d.x : at.h[1]; }

  Product qkv(int64_t layer) const {
    const KernelDecodeLayer& l = d.layers[layer];
    Product p = product(l.qkv, l.qkv_count, l.qkv_bias, at.normed, d.C, at.qkv, (d.H + 2 * d.K) * d.D);
    return layer > 0 ? behind_norm(p) : p;
  }
  Product o(int64_t layer) const {
    const KernelDecodeLayer& l = d.layers[layer];
    Product p = product(&l.o, 1, l.o_bias, at.attended, d.H * d.D, at.h[0], d.C);
    p.rows.residual = residual_of(layer), p.rows.residual_stride = d.C;
    return before_norm(p, l.mlp_norm);
  }
  Product gate_up(int64_t layer, bool gated) const {
    const KernelDecodeLayer& l = d.layers[layer];
    KernelRowsPart parts[2] = {l.gate_up[0], l.gate_up[1]};
    int64_t count = l.gate_up_count;
    if (count == 1 && parts[0].w != nullptr && parts[0].a == nullptr) {
      count = 2, parts[0].rows /= 2, parts[1] = parts[0];
      parts[1].w = static_cast<const char*>(parts[0].w) + parts[0].rows * parts[0].w_stride * 2;
    }
    Product p = product(parts, count, l.gate_up_bias, at.normed, d.C, gated ? at.product : at.gate_up, gated ? d.F : 2 * d.F);
    if (gated) p.extras.gated = 1 + d.activation;
    return behind_norm(p);
  }
  Product down(int64_t layer) const {
    const KernelDecodeLayer& l = d.layers[layer];
    const bool last = layer + 1 == d.count;
    Product p = product(&l.down, 1, l.down_bias, at.product, d.F, last ? d.y : at.h[1], d.C);
    p.rows.residual = at.h[0], p.rows.residual_stride = d.C;
    return last ? p : before_norm(p, d.layers[layer + 1].input_norm);
  }
  bool gates(int64_t layer) const {
    const Product p = gate_up(layer, true);
    return groups_take(p.rows, p.extras);
  }

  KernelPaged attention(int64_t layer) const {
    const KernelDecodeLayer& l = d.layers[layer];
    const int64_t width = (d.H + 2 * d.K) * d.D, turned = (d.H + d.K) * d.D;
    const char* const q = l.q_norm == nullptr ? at.qkv : at.turned;
    const int64_t stride = l.q_norm == nullptr ? width : turned;
    KernelPaged p{};
    p.q = q, p.k = q + d.H * d.D * 2, p.v = at.qkv + turned * 2;
    p.q_stride = p.k_stride = stride, p.v_stride = width, p.out_stride = d.H * d.D;
    p.pool_k = l.pool_k, p.pool_v = l.pool_v, p.out = at.attended;
    p.tables = d.tables, p.lengths = d.lengths, p.cos = l.cos, p.sin = l.sin, p.rotary = d.R;
    p.sequences = d.M, p.H = d.H, p.K = d.K, p.D = d.D, p.width = d.width, p.page_size = 16;
    p.window = l.window, p.longest = d.longest, p.scale = d.scale, p.softcap = d.softcap, p.dtype = d.dtype;
    return p;
  }

  bool fit() const {
    if (d.dtype != KERNEL_BF16 || d.M > kMostRows || d.C % 8 != 0 || 4 * d.M * d.K > kArrivedBytes) return false;
    for (int64_t i = 0; i < d.count; ++i) {
      const KernelDecodeLayer& l = d.layers[i];
      const KernelPaged paged = attention(i);
      if (l.input_norm == nullptr || l.mlp_norm == nullptr || (l.q_norm == nullptr) != (l.k_norm == nullptr)) return false;
      if (paged_attention_workspace(&paged) == 0) return false;
      for (const Product& p : {qkv(i), o(i), down(i)}) {
        if (!groups_take(p.rows, p.extras)) return false;
      }
      if (gates(i)) continue;
      const Product plain = gate_up(i, false);
      if (!groups_take(plain.rows, plain.extras)) return false;
    }
    return true;
  }

  int run(void* stream) const {
    int error = rms_norm_forward(d.x, d.layers[0].input_norm, at.normed, at.rstd, d.M, 1, d.C, d.C, d.C, d.eps, d.norm_offset, {}, d.dtype, d.dtype,
                                 stream);
    const auto then = [&](auto&& step) {
      if (error == cudaSuccess) error = step();
    };
    const auto multiply = [&](const Product& p) { then([&] { return launch_groups(p.rows, p.extras, stream); }); };
    for (int64_t i = 0; i < d.count && error == cudaSuccess; ++i) {
      const KernelDecodeLayer& l = d.layers[i];
      multiply(qkv(i));
      if (l.q_norm != nullptr) {
        const int64_t width = (d.H + 2 * d.K) * d.D, turned = (d.H + d.K) * d.D, q_bytes = d.H * d.D * 2;
        const auto norm = [&](int64_t from, int64_t heads, const void* weight) {
          return rms_norm_forward(at.qkv + from, weight, at.turned + from, at.rstd, d.M, heads, d.D, width, turned, d.q_eps, d.q_norm_offset, {},
                                  d.dtype, d.dtype, stream);
        };
        then([&] { return norm(0, d.H, l.q_norm); });
        then([&] { return norm(q_bytes, d.K, l.k_norm); });
      }
      const KernelPaged paged = attention(i);
      then([&] { return paged_attention(&paged, at.partial, at.arrived, stream); });
      multiply(o(i));
      const bool gated = gates(i);
      multiply(gate_up(i, gated));
      if (!gated) then([&] { return swiglu_forward(at.gate_up, at.product, d.M, d.F, 2 * d.F, d.F, {}, d.activation, d.dtype, stream); });
      multiply(down(i));
    }
    return error;
  }
};

}  // namespace

int64_t decode_groups_workspace(const KernelDecode& d) {
  // Where it will lie does not matter to what fits, but that it is somewhere.
  KernelDecode somewhere = d;
  somewhere.workspace = reinterpret_cast<void*>(uintptr_t{1} << 20);
  if (somewhere.y == nullptr) somewhere.y = somewhere.workspace;
  const Layers layers(somewhere);
  return layers.fit() ? Places(d).all : 0;
}

int decode_groups(const KernelDecode& d, void* stream) { return Layers(d).run(stream); }

}  // namespace ferrotune
