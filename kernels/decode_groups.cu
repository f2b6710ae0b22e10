// All layers of a decoder on 9 to 64 new rows, bf16 on Hopper: four products by rows_groups.cuh and paged attention, five launches a layer in place
// of nine. What the others do is done on the way out of the product before:
//   norm        x_i / rms(x) w_i: the product that makes x leaves x w, too, and sums of x^2; the product behind divides its own sums by the root,
//               which commutes with W, A and B. x w is rounded once, where a norm by itself rounds x / rms(x) and then that times w.
//   rotation    in attention (paged_attention.cu)
//   activation  gate and up of the same columns are two thread blocks beside each other
//   order       what a product of NF4 reads is stored as it wants it (nf4_order.cuh)
// What the first layer's product reads is a launch, and so are norms of query and key. Moves: the weights once, keys and values once.
//
// Measured on H200s, Llama-3.1-8B, LoRA r 16, a step of 32 rows, ms: NF4 3.85 layer by layer, 3.74 with the norms; bf16 5.33, 5.18 with the
// norms, 5.20 with the activation, 5.06 with both. A layer of four, us: NF4 105.4 with the activation as a launch, 100.2 without; bf16 145;
// since x is in NF4's order and z of long products made by few blocks 94 and 141, and since all products are one kernel 90.7 and 140.
// Tried: all products between two attentions in one launch (bf16 158 to 173 us, NF4 124; docs/decoding.md); the first stages of the next product's
// weights and its scales asked for into the second-level cache, when the last stage of this has been asked for (bf16 5.10 to 5.40 ms for half of a
// block's stages to twice as many) or is there (5.06 to 5.16), NF4 the same in all cases.
#include "chain.cuh"
#include "decode_groups.h"
#include "nf4_order.cuh"
#include "rows.cuh"
#include "rows_groups.h"

namespace ferrotune {
namespace {

constexpr int64_t kArrivedBytes = 64 * 1024, kMostRows = 64, kRowsOfGroup = 256;

// normed = x (weight + offset) and sums of x^2 over runs of 128 columns, [runs, 64]: what o and down leave for the product behind a norm. A thread
// block a row.
__global__ void __launch_bounds__(512) first_norm_kernel(const __nv_bfloat16* x, const __nv_bfloat16* weight, float offset, __nv_bfloat16* normed,
                                                         float* squares, int C, int runs, bool nf4_order) {
  using T = __nv_bfloat16;
  const int row = static_cast<int>(blockIdx.x), lane = threadIdx.x % 32, warps = static_cast<int>(blockDim.x) / 32;
  next_may_start();
  inputs_ready();
  for (int run = static_cast<int>(threadIdx.x) / 32; run < runs; run += warps) {
    float sum = 0;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int column = run * 128 + 64 * i + 2 * lane;
      if (column >= C) continue;
      const Vector<T, 2> two = load<2>(x + int64_t{row} * C, column / 2), w = load<2>(weight, column / 2);
      Vector<T, 2> out;
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        const float v = to_float(two.v[k]);
        sum += v * v;
        out.v[k] = from_float<T>(v * (to_float(w.v[k]) + offset));
      }
      store<2>(normed + int64_t{row} * C, (nf4_order ? in_nf4_order(column) : column) / 2, out);
    }
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(0xffffffff, sum, lanes);
    if (lane == 0) squares[run * kMostRows + row] = sum;
  }
}

// Where what passes from launch to launch lies. Counters of attention stand first, zero between launches.
struct Places {
  int32_t* arrived;
  char *qkv, *turned, *attended, *product, *normed, *h[2];
  float *rstd, *squares, *partial;
  void* counters;  // of products
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
    counters = take(kCounterBytes);
    qkv = take(d.M * (d.H + 2 * d.K) * d.D * 2);
    turned = take(d.M * (d.H + d.K) * d.D * 2);
    attended = take(d.M * d.H * d.D * 2);
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
    p.rows.x = x, p.rows.y = y, p.rows.bias = bias, p.rows.dtype = d.dtype, p.rows.workspace = at.counters;
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
    return behind_norm(p);
  }
  Product o(int64_t layer) const {
    const KernelDecodeLayer& l = d.layers[layer];
    Product p = product(&l.o, 1, l.o_bias, at.attended, d.H * d.D, at.h[0], d.C);
    p.rows.residual = residual_of(layer), p.rows.residual_stride = d.C;
    return before_norm(p, l.mlp_norm);
  }
  // Rows `first` .. `first` + `rows` of a part that has K columns. False where the scales of its scales are not cut there.
  static bool cut(KernelRowsPart& part, int64_t first, int64_t rows, int64_t K) {
    const auto behind = [](const void* pointer, int64_t bytes) { return pointer == nullptr ? nullptr : static_cast<const char*>(pointer) + bytes; };
    KernelNf4& nf4 = part.nf4;
    if (part.w == nullptr) {
      const int64_t scales = first * K / nf4.blocksize;
      const bool nested = nf4.nested_absmax != nullptr;
      if (nested && scales % nf4.nested_blocksize != 0) return false;
      nf4.packed = static_cast<const uint8_t*>(nf4.packed) + first * K / 2;
      nf4.absmax = behind(nf4.absmax, scales * (nested ? 1 : 4));
      if (nested) nf4.nested_absmax += scales / nf4.nested_blocksize;
      nf4.rows = rows;
    }
    part.w = behind(part.w, first * part.w_stride * 2);
    part.b = behind(part.b, first * part.R * (part.lora_f32 ? 4 : 2));
    part.rows = rows;
    return true;
  }
  // False where gate and up are one matrix that cannot be cut in two.
  bool gate_up(int64_t layer, Product& p) const {
    const KernelDecodeLayer& l = d.layers[layer];
    KernelRowsPart parts[2] = {l.gate_up[0], l.gate_up[l.gate_up_count - 1]};
    if (l.gate_up_count == 1 && (!cut(parts[0], 0, d.F, d.C) || !cut(parts[1], d.F, d.F, d.C))) return false;
    p = product(parts, 2, l.gate_up_bias, at.normed, d.C, at.product, d.F);
    p.extras.gated = 1 + d.activation;
    behind_norm(p);
    return true;
  }
  Product down(int64_t layer) const {
    const KernelDecodeLayer& l = d.layers[layer];
    const bool last = layer + 1 == d.count;
    Product p = product(&l.down, 1, l.down_bias, at.product, d.F, last ? d.y : at.h[1], d.C);
    p.rows.residual = at.h[0], p.rows.residual_stride = d.C;
    return last ? p : before_norm(p, d.layers[layer + 1].input_norm);
  }
  bool nf4() const { return d.layers[0].o.w == nullptr; }

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
    p.window = l.window, p.longest = d.longest, p.scale = d.scale, p.softcap = d.softcap, p.dtype = d.dtype, p.nf4_order = nf4();
    return p;
  }

  bool fit() const {
    if (d.dtype != KERNEL_BF16 || d.M > kMostRows || d.C % 8 != 0 || 4 * d.M * d.K > kArrivedBytes) return false;
    for (int64_t i = 0; i < d.count; ++i) {
      const KernelDecodeLayer& l = d.layers[i];
      const KernelPaged paged = attention(i);
      if (l.input_norm == nullptr || l.mlp_norm == nullptr || (l.q_norm == nullptr) != (l.k_norm == nullptr)) return false;
      if (paged_attention_workspace(&paged) == 0) return false;
      Product gated;
      if (!gate_up(i, gated)) return false;
      for (const Product& p : {qkv(i), o(i), gated, down(i)}) {
        if ((p.rows.parts[0].w == nullptr) != nf4() || !groups_take(p.rows, p.extras)) return false;
      }
    }
    return true;
  }

  int run(void* stream) const {
    using T = __nv_bfloat16;
    int error = launch_chained(true, first_norm_kernel, dim3(static_cast<unsigned>(d.M)), dim3(512), 0, stream, static_cast<const T*>(d.x),
                               static_cast<const T*>(d.layers[0].input_norm), d.norm_offset, reinterpret_cast<T*>(at.normed), at.squares,
                               static_cast<int>(d.C), Places::squares_rows(d), nf4());
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
      Product gated;
      gate_up(i, gated);
      multiply(gated);
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
