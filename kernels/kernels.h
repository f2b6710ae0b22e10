// The launchers of libferrotune_kernels.so, one declaration each, without a CUDA type: csrc includes this file and
// finds the functions with dlsym, so that the executable links on a machine that has never seen CUDA.
//
// Every launcher only enqueues work on `stream` (a cudaStream_t): no allocation, no synchronisation. It returns the
// cudaError_t of the launch, 0 for success. Shapes and dtypes were checked by csrc. Sizes are in elements. An output is
// contiguous, and so is an input, unless a stride is passed. Legend: N tokens, H heads, C hidden_size, D head_dim,
// R rotated dims, F intermediate_size, V vocab_size.
#pragma once

#include <stdint.h>

// Raised with every change of a signature; csrc refuses a library of another number.
#define FERROTUNE_KERNELS_ABI 20

// Storage types. Arithmetic is f32.
enum KernelDtype { KERNEL_F32 = 0, KERNEL_F16 = 1, KERNEL_BF16 = 2 };
enum KernelActivation { KERNEL_SILU = 0, KERNEL_GELU_TANH = 1, KERNEL_GELU = 2 };

// The operands of attention: q [N, H, D], k and v [N, K, D] with heads side by side and token strides of their own. A query
// sees the keys of its own segment cu_seqlens[i] .. cu_seqlens[i + 1] up to itself, the last `window` of them (0: all).
struct KernelAttention {
  const void *q, *k, *v;
  const int32_t* cu_seqlens;  // [segments + 1]
  int64_t N, H, K, D, q_stride, k_stride, v_stride;
  int64_t segments, longest, window;
  float scale, softcap;
  int dtype;
};

// One tensor of adamw_8bit: n elements, their moments in blocks of 256.
struct KernelAdamW8bit {
  float* p;
  const float* g;
  uint8_t *state1, *state2;  // [n]
  float *absmax1, *absmax2;  // [ceil(n / 256)]
  int64_t n;
};

// One matrix of nf4_dequantize, the tensors of csrc/nf4.h. absmax is f32 where nested_absmax is null, else uint8. Both block
// sizes are powers of two, blocksize at least 32.
struct KernelNf4 {
  const uint8_t* packed;
  const float* quant_map;
  const void* absmax;
  const float *nested_absmax, *nested_quant_map;
  void* y;
  int64_t rows, blocksize, nested_blocksize;
  float nested_offset;
};

// A matrix [rows, K] of bf16 in 12 bits, the tensors of csrc/bf12.h.
#define KERNEL_MOST_BF12_ROWS 128
struct KernelBf12 {
  const uint8_t* units;
  const float* scales;
  const int32_t* starts;
  const void* rest;
  int64_t rows;
};

// One part of lora_gradients: dy [N, rows] of a wider matrix, b [rows, R], z [N, R], g [N, R], db [rows, R] f32.
struct KernelLoraPart {
  const void *dy, *b, *z;
  void* g;
  float* db;
  int64_t rows, R;
  float scale;
};

// Pointers and strides are multiples of 16 bytes, rows and R of 8; R is at most 32. `zeros` columns behind g of the last part,
// a multiple of 4, become zero.
struct KernelLora {
  struct KernelLoraPart parts[3];
  int64_t count, N, dy_stride, z_stride, g_stride, zeros;
  int dtype;
};

// A matrix [rows, columns] to fill: scale times the elements of from [from_rows, from_columns], placed from column `first` on, and
// zero around them. from is f32, or of the dtype of the matrix.
#define KERNEL_MOST_FILLS 4
struct KernelFill {
  const void* from;
  void* to;
  int64_t rows, columns, to_stride, from_rows, from_columns, first;
  float scale;
  int from_f32;
};

// One part of lora_z and lora_add: columns first .. first + rows of y and z_first .. z_first + R of z, a [R, K] and b [rows, R] in f32 or the dtype of x.
struct KernelLoraAddPart {
  const void *a, *b;
  int64_t first, rows, z_first, R;
  float scale;
  int f32;
};

// x [N, K], z [N, R of all parts], y [N, ..] and residual, like y or null, with row strides. What makes z knows no y; lora_z and lora_add
// do not write x.
struct KernelLoraAdd {
  struct KernelLoraAddPart parts[3];
  int64_t count, N, K, x_stride, z_stride, y_stride, residual_stride;
  void* x;
  const void* residual;
  void *z, *y;
  int dtype;
};

// Where rows in e4m3 go: bytes [N, K], rows `stride` apart, a multiple of 16, and their scales [N]. Nowhere where bytes is null.
struct KernelFp8Rows {
  uint8_t* bytes;
  float* scale;
  int64_t stride;
};

// One part of fp8_lora: factor times from, element (i, r) of which is at i row_stride + r rank_stride; rows first .. first + rows
// and columns column .. column + R of what stands behind the weight.
struct KernelFp8Part {
  const float* from;
  int64_t first, rows, column, R, row_stride, rank_stride;
  float factor;
};

// x [N, 3 padded] behind rows in e4m3 and weight [rows, 3 padded] behind those of a weight: z_factor z [N, R], bf16, and the parts,
// over the scales of their rows, zero around them. padded and strides of bytes are multiples of 16.
struct KernelFp8Lora {
  struct KernelFp8Part parts[3];
  struct KernelFp8Rows x, weight;
  const void* z;
  int64_t count, N, rows, R, z_stride, padded;
  float z_factor;
};

// One part of rows_linear: rows of W [rows, K], dense in the dtype of x, or NF4 where w is null (y and rows of nf4 unused). LoRA a
// [R, K] and b [rows, R] in the dtype of x or f32, or null.
struct KernelRowsPart {
  const void* w;
  int64_t w_stride;
  struct KernelNf4 nf4;
  const void *a, *b;
  int64_t rows, R;
  float scale;
  int lora_f32;
};

// x [M, K]; bias [rows of all parts], residual and y [M, rows of all parts]; bias and residual may be null. y is f32 where
// y_f32, else of the dtype, which is a 16-bit one. workspace: as rows_linear_workspace says.
struct KernelRows {
  struct KernelRowsPart parts[3];
  int64_t count, M, K, x_stride, y_stride, residual_stride;
  const void *x, *bias, *residual;
  void *y, *workspace;
  int dtype, y_f32;
};

// One new row of each of `sequences` sequences over pages. q [sequences, H, D], k and v [sequences, K, D] with token strides;
// pools [pages, page_size, K, D]; tables [sequences, width] int64: of each sequence its pages in order; lengths [sequences]
// int64: keys of each, the new one included; 0 for a row that belongs to none. cos and sin [sequences, rotary / 2] f32 turn q and k as rope does;
// null where they are turned. out [sequences, H, D], its rows out_stride apart, their elements in the order of kernels/nf4_order.cuh where nf4_order.
struct KernelPaged {
  const void *q, *k, *v;
  void *pool_k, *pool_v, *out;
  const int64_t *tables, *lengths;
  const float *cos, *sin;
  int64_t rotary, sequences, H, K, D, q_stride, k_stride, v_stride, out_stride, width, page_size, window;
  int64_t longest;  // at least any of lengths
  float scale, softcap;
  int dtype, nf4_order;
};

// One layer of decode: parts of q, k, v (or one), of o, of gate and up (or one) and of down, as in rows_linear. Biases may be null, and
// so may q_norm and k_norm [D]. Pools as in paged_attention; cos and sin [M, R/2] f32 of the rows' positions.
struct KernelDecodeLayer {
  struct KernelRowsPart qkv[3], o, gate_up[2], down;
  int64_t qkv_count, gate_up_count, window;
  const void *input_norm, *mlp_norm, *q_norm, *k_norm;
  const void *qkv_bias, *o_bias, *gate_up_bias, *down_bias;
  void *pool_k, *pool_v;
  const float *cos, *sin;
};

// All layers of a decoder on one new row of each of M sequences. x and y [M, C], which may be one; tables and lengths as in
// paged_attention. Up to 8 rows: where ids [M] int64 is not null, x is a table of rows, of which sequence m has row ids[m]; where `positional`,
// cos and sin are of all positions, of which it has lengths[m] - 1; where `norm` [C] is not null, y is RMS-normed with it, eps and norm_offset.
struct KernelDecode {
  const struct KernelDecodeLayer* layers;
  int64_t count, M, C, F, H, K, D, R, width, longest;
  const int64_t *tables, *lengths, *ids;
  const void *x, *norm;
  void *y, *workspace;
  float eps, q_eps, norm_offset, q_norm_offset, scale, softcap;
  int activation, dtype, positional;
};

// What fits a launch's arguments.
#define KERNEL_MOST_WORDS 8128

// The names of all launchers below, for the table in csrc/kernels.h.
#define FERROTUNE_KERNELS(ROW)  \
  ROW(adamw_8bit)               \
  ROW(bf12_product)             \
  ROW(bf12_unpack)              \
  ROW(fill)                     \
  ROW(fp8_rows)                 \
  ROW(fp8_lora)                 \
  ROW(lora_z)                   \
  ROW(lora_z_fits)              \
  ROW(rms_norm_z)               \
  ROW(rms_norm_z_fits)          \
  ROW(lora_add)                 \
  ROW(lora_add_fits)            \
  ROW(lora_gradients)           \
  ROW(lora_gradients_workspace) \
  ROW(nf4_dequantize)           \
  ROW(nf4_quantize)             \
  ROW(rms_norm_forward)         \
  ROW(rms_norm_backward)        \
  ROW(rms_norm_weight_backward) \
  ROW(rope)                     \
  ROW(swiglu_forward)           \
  ROW(swiglu_backward)          \
  ROW(cross_entropy)            \
  ROW(attention_softcap_forward) \
  ROW(attention_softcap_backward) \
  ROW(rows_linear)              \
  ROW(rows_linear_workspace)    \
  ROW(decode)                   \
  ROW(decode_workspace)         \
  ROW(paged_attention)          \
  ROW(paged_attention_workspace) \
  ROW(put_words)                \
  ROW(sample)

// The library exports these and nothing else.
#pragma GCC visibility push(default)
extern "C" {

int ferrotune_kernels_abi(void);

// `count` tensors, listed in the host's memory, which is read before the call returns; maps is a DynamicMaps
// (kernels/dynamic_map.h) on the device; step, learning_rate, grad_scale and skip are f32 scalars there.
int adamw_8bit(const struct KernelAdamW8bit* tensors, int64_t count, const void* maps, const float* step,
               const float* learning_rate, const float* grad_scale, const float* skip, double beta1, double beta2,
               double epsilon, double weight_decay, void* stream);

// y [M, rows] f32 = x W^T: x [M, K] bf16, M at most KERNEL_MOST_BF12_ROWS, K a multiple of 64, x_stride of 8. sm_80 or newer.
int bf12_product(const struct KernelBf12* w, const void* x, int64_t M, int64_t K, int64_t x_stride, float* y, int64_t y_stride, void* stream);

// Rows first .. first + count of W in bf16; first is a multiple of 16.
int bf12_unpack(const struct KernelBf12* w, int64_t first, int64_t count, int64_t K, void* y, void* stream);

// `count` matrices, at most KERNEL_MOST_FILLS, one launch.
int fill(const struct KernelFill* matrices, int64_t count, int dtype, void* stream);

// x [N, K] bf16 in e4m3. K is a multiple of 16, x_stride of 8.
int fp8_rows(const void* x, struct KernelFp8Rows to, int64_t N, int64_t K, int64_t x_stride, void* stream);

// LoRA's two factors behind the rows of a product's operands in e4m3, as kernels/fp8.cu says.
int fp8_lora(const struct KernelFp8Lora* lora, void* stream);

// z = scale x a^T, and what `fill` does with matrices of rows of whole 16 bytes, placed at such, of what no kernel writes. Whether it takes the
// operands: 16-bit dtypes, K a multiple of 32, R and strides of 8, R at most 64, pointers to 16 bytes, sm_80 or newer.
int lora_z(const struct KernelLoraAdd* lora, const struct KernelFill* matrices, int64_t count, void* stream);
int64_t lora_z_fits(const struct KernelLoraAdd* lora);

// rms_norm_forward of x with H of 1, whose y is lora->x, and lora_z, in one. Whether it takes the operands: as lora_z, parts of one type with
// R at most 64 together, K from 1056 to 4096, x and weight as lora->x, sm_90 or newer.
int rms_norm_z(const struct KernelLoraAdd* lora, const struct KernelFill* matrices, int64_t count, const void* x, const void* weight, float* rstd,
               int64_t x_stride, float eps, float offset, int weight_dtype, void* stream);
int64_t rms_norm_z_fits(const struct KernelLoraAdd* lora, const void* x, const void* weight, int64_t x_stride);

// y += z b^T + residual, all parts, whose columns of y are their own. Whether it takes the operands: as lora_z, rows and first multiples of 8.
int lora_add(const struct KernelLoraAdd* lora, void* stream);
int64_t lora_add_fits(const struct KernelLoraAdd* lora);

// g = scale dy b and db = scale dy^T z of all parts. 16-bit dtypes. workspace: as many floats as lora_gradients_workspace
// says, for its own use; 0 where the current GPU cannot run it (older than sm_80, or too little shared memory).
int lora_gradients(const struct KernelLora* lora, float* workspace, void* stream);
int64_t lora_gradients_workspace(const struct KernelLora* lora);

// Of each of `count` matrices, at most 3, y [rows, in] with row stride y_stride.
int nf4_dequantize(const struct KernelNf4* matrices, int64_t count, int64_t in, int64_t y_stride, int dtype, void* stream);

// x [n], packed [ceil(n / 2)], absmax [ceil(n / 64)] f32.
int nf4_quantize(const void* x, uint8_t* packed, float* absmax, int64_t n, int dtype, void* stream);

// x [N, H, C] with token stride x_stride (heads stand side by side), weight [C], y [N, H, C] with token stride y_stride,
// rstd [N, H] f32.
// weight has dtype weight_dtype: that of x, or f32. fp8: y in e4m3, too; bf16 and H of 1 alone.
int rms_norm_forward(const void* x, const void* weight, void* y, float* rstd, int64_t N, int64_t H, int64_t C,
                     int64_t x_stride, int64_t y_stride, float eps, float offset, struct KernelFp8Rows fp8, int dtype,
                     int weight_dtype, void* stream);

// dy [N, H, C], x and weight as above, rstd [N, H] from the forward, residual [N, H, C] or null: added to dx [N, H, C]. These
// two have token strides of their own. fp8: dx in e4m3, too; bf16 and H of 1 alone.
int rms_norm_backward(const void* dy, const void* x, const void* weight, const float* rstd, const void* residual,
                      void* dx, int64_t N, int64_t H, int64_t C, int64_t x_stride, int64_t residual_stride,
                      int64_t dx_stride, float offset, struct KernelFp8Rows fp8, int dtype, int weight_dtype, void* stream);

// partial [chunks, C] f32: sums of dweight over `chunks` runs of rows, for the caller to add up.
int rms_norm_weight_backward(const void* dy, const void* x, const float* rstd, float* partial, int64_t N, int64_t H,
                             int64_t C, int64_t x_stride, int64_t chunks, int dtype, void* stream);

// x and y [N, H, D] with token strides x_stride and y_stride, cos and sin [N, R/2] f32. inverse != 0 turns by the opposite
// angle, which is the backward.
int rope(const void* x, const float* cos, const float* sin, void* y, int64_t N, int64_t H, int64_t D, int64_t R,
         int64_t x_stride, int64_t y_stride, int inverse, int dtype, void* stream);

// gate_up [N, 2F] and y [N, F], with row strides. fp8: y in e4m3, too; bf16 alone.
int swiglu_forward(const void* gate_up, void* y, int64_t N, int64_t F, int64_t gate_up_stride, int64_t y_stride,
                   struct KernelFp8Rows fp8, int activation, int dtype, void* stream);

// dy [N, F], gate_up [N, 2F] and dgate_up [N, 2F], which may be gate_up, with row strides. y, unless null, receives what the
// forward wrote, in rows as far apart as dy's, and may be dy. fp8: dgate_up in e4m3, too; bf16 alone, and without y.
int swiglu_backward(const void* dy, const void* gate_up, void* dgate_up, void* y, int64_t N, int64_t F,
                    int64_t dy_stride, int64_t gate_up_stride, int64_t dgate_up_stride, struct KernelFp8Rows fp8,
                    int activation, int dtype, void* stream);

// logits [N, V] f32, labels [N] (negative for none), losses [N] f32. With gradient != 0 the memory of logits then holds
// the gradient of the sum of losses in dtype, each row from where it started. softcap 0 for none.
int cross_entropy(float* logits, const int64_t* labels, float* losses, int64_t N, int64_t V, float softcap,
                  int gradient, int dtype, void* stream);

// out [N, H, D], lse [H, N]. 16-bit dtypes, D = 64, 128 or 256, sm_80 or newer.
int attention_softcap_forward(const struct KernelAttention* attention, void* out, float* lse, void* stream);

// dout and out [N, H, D], lse [H, N] from the forward, delta [H, N] f32 for its own use; dq [N, H, D], dk and dv [N, K, D]
// with token strides.
int attention_softcap_backward(const struct KernelAttention* attention, const void* dout, const void* out,
                               const float* lse, float* delta, void* dq, void* dk, void* dv, int64_t dq_stride,
                               int64_t dk_stride, int64_t dv_stride, void* stream);

// y = x W^T + bias + scale (x A^T) B^T + residual. The workspace's bytes; 0 where the kernel cannot run: more than 64 rows, K no
// multiple of 64, R over 64, a GPU older than sm_80, .. It is zero at the first use; calls on
// one stream share it.
int rows_linear(const struct KernelRows* rows, void* stream);
int64_t rows_linear_workspace(const struct KernelRows* rows);

// Writes k and v into the pages, then each row of q attends to the keys of its sequence, the last `window` of them (0: all).
// partial: as many floats as paged_attention_workspace says, for its own use; 0 where the kernel cannot run: D other than 64, 96,
// 128, 256, H / K over 16, pages of other than 16 tokens, a GPU older than sm_80. arrived [sequences * K] is zero before and after.
int paged_attention(const struct KernelPaged* paged, float* partial, int32_t* arrived, void* stream);
int64_t paged_attention_workspace(const struct KernelPaged* paged);

// Every layer: attention block and MLP block, one launch up to 8 rows and a few a layer up to 64. The workspace's bytes; 0 where the kernels cannot
// run: more rows, 16-bit and NF4 parts beside each other, sizes that they do not divide, a GPU older than sm_90, .. It is zero at the first use, and
// one for up to 8 rows is not one for more.
int decode(const struct KernelDecode* decode, void* stream);
int64_t decode_workspace(const struct KernelDecode* decode);

// tokens [N] and results: 2 N words of 8 bytes, the tokens and behind them in f32 their log-probabilities [N] and those in the distribution that they
// are drawn from [N], of logits [N, V] f32, by params [N, 5] in the host's memory, which is read before the call returns: temperature (0: the
// largest logit), top_k (0: all), top_p, min_p, and a number drawn from [0, 1). A row with NaN, infinity or only -infinity gives the token -1.
// results may lie in the host's memory, pinned.
int sample(const float* logits, const double* params, int64_t* tokens, int64_t* results, int64_t N, int64_t V, void* stream);

// to[i] = i < n ? max(ids[i], 0) : words[i] for `count` words, at most KERNEL_MOST_WORDS, in the host's memory, which is read before the call returns.
int put_words(const int32_t* words, int64_t count, const int64_t* ids, int64_t n, int64_t* to, void* stream);

}  // extern "C"
#pragma GCC visibility pop
