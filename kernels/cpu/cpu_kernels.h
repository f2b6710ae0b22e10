// Kernels for f32 on the CPU, where decoding multiplies beside weights of 16 bits, too: raw pointers and sizes, no torch type, no
// allocation by the caller's allocator, one thread (csrc splits the work). The same sources are compiled once an instruction set; cpu_kernels() picks at run time.
//
// Why own ones: MKL takes a slow path on processors that are not Intel's (57 % of peak at 512 x 512 x 1536 on Zen 4, far
// less on small shapes), and ATen spends microseconds a call where a small model's whole product takes ten.
//
// Legend: N tokens, H query heads, K key/value heads, D head_dim, C hidden_size, F intermediate_size, V vocab_size.
#pragma once

#include <stdint.h>

#include "../dynamic_map.h"

namespace ferrotune {

// Element (i, j) lies at data[i * row + j * col].
struct CpuMatrix {
  const float* data;
  int64_t row, col;
};

enum class CpuActivation { kSilu, kGeluTanh, kGelu };

// What weights, keys and values of decoding are stored as; all sums are of f32.
enum class CpuType { kFloat, kBfloat16, kHalf };
struct CpuArray {
  const void* data;
  CpuType type;
};

// One segment of one key/value head's attention, its `group` query heads included. Strides are in elements; heads of a
// group lie D apart in q, o, dq and do.
struct CpuAttention {
  const float *q, *k, *v;
  int64_t q_stride, k_stride, v_stride;  // token to token
  int64_t length, dim, group;
  float scale, softcap;  // softcap 0 for none
  int64_t window;        // a query sees the last `window` keys, itself included; at least 1
  float* lse;            // [group, length] with lse_stride from head to head: log sum exp of the scores
  int64_t lse_stride;
};

// One query of each of the `group` heads of a key/value head, over the keys low..high of its sequence. Key s lies at row
// pages[s / page_size] * page_size + s % page_size of k and v, whose rows are key_stride apart; heads of q lie D apart.
struct CpuPagedAttention {
  const float* q;
  const void *k, *v;
  CpuType type;  // of k and v
  const int32_t* pages;
  int64_t page_size, key_stride, low, high, dim, group;
  float scale, softcap;
};

// One AdamW step as factors; csrc/optim.cpp has the formula.
struct CpuAdamW {
  float grad_factor;  // gradients are multiplied by it
  float beta1, rest1, beta2, rest2;  // rest = 1 - beta
  float decay;        // 1 - lr weight_decay
  float rate;         // lr / (1 - beta1^t)
  float root_factor;  // 1 / sqrt(1 - beta2^t)
  float epsilon;
};

struct CpuKernels {
  const char* name;
  // Threads should split products at multiples of these.
  int64_t tile_rows, tile_columns;
  // c[i * ldc + j] (+)= alpha sum_p a(i, p) b(p, j); i < m, j < n, p < k.
  void (*gemm)(int64_t m, int64_t n, int64_t k, float alpha, CpuMatrix a, CpuMatrix b, float* c, int64_t ldc, bool add);
  // y = x rstd (w + offset), rstd[i] = 1 / sqrt(mean x^2 + eps); rows of c elements, x rows x_stride apart.
  void (*rms_norm_forward)(int64_t rows, int64_t c, const float* x, int64_t x_stride, const float* w, float eps,
                           float offset, float* y, float* rstd);
  // dx, and dw += sum of dy x rstd where dw is not null.
  void (*rms_norm_backward)(int64_t rows, int64_t c, const float* dy, const float* x, int64_t x_stride, const float* w,
                            const float* rstd, float offset, float* dx, float* dw);
  // y = x turned by the angles of its token (by the opposite ones where sign is -1); cos and sin [rows, half].
  void (*rope)(int64_t rows, int64_t heads, int64_t dim, int64_t half, const float* x, int64_t x_stride, const float* cos,
               const float* sin, float sign, float* y, int64_t y_stride);
  // y = act(gate) up; gate_up rows are [gate | up].
  void (*swiglu_forward)(int64_t rows, int64_t f, const float* gate_up, CpuActivation activation, float* y);
  // dgate_up may be gate_up.
  void (*swiglu_backward)(int64_t rows, int64_t f, const float* dy, const float* gate_up, CpuActivation activation,
                          float* dgate_up);
  // o [length, group, D], rows o_stride apart; also writes lse. scratch: attention_scratch floats.
  void (*attention_forward)(const CpuAttention& attention, float* o, int64_t o_stride, float* scratch);
  // Adds to dk and dv, writes dq.
  void (*attention_backward)(const CpuAttention& attention, const float* o, const float* d_o, int64_t o_stride, float* dq,
                             int64_t dq_stride, float* dk, int64_t dk_stride, float* dv, int64_t dv_stride,
                             float* scratch);
  // out = map[index] scale of 2 * bytes elements of one NF4 block, the high nibble first.
  void (*nf4_block)(const uint8_t* packed, int64_t bytes, const float* map, float scale, float* out);
  // Logits z in place to softmax(z) - onehot(label) (times the softcap's slope), and the rows' losses.
  void (*cross_entropy)(int64_t rows, int64_t v, float* z, const int64_t* labels, float softcap, float* losses);
  // y[i, r] (+)= scale w_r . x_i; x [m, n], w [rows, n], rows of y y_stride apart. scratch: 4 n floats, unless w is f32.
  void (*rows_product)(int64_t m, int64_t rows, int64_t n, float scale, CpuArray w, const float* x, float* y,
                       int64_t y_stride, bool add, float* scratch);
  // n elements as f32.
  void (*widen)(int64_t n, CpuArray from, float* to);
  // o [group, D]; scores: room for twice high - low + 16 floats.
  void (*paged_attention)(const CpuPagedAttention& attention, float* o, float* scores);
  // n elements of the parameter, its gradient and its two moments.
  void (*adamw)(int64_t n, float* p, const float* g, float* m, float* v, const CpuAdamW& step);
  // The same with moments as indices of the maps; n at most kDynamicBlock.
  void (*adamw_8bit)(int64_t n, float* p, const float* g, uint8_t* state1, uint8_t* state2, float* absmax1, float* absmax2,
                     const DynamicMaps& maps, const CpuAdamW& step);
  double (*sum_of_squares)(int64_t n, const float* x);
};

// Floats that attention_forward and attention_backward need as scratch.
int64_t cpu_attention_scratch(int64_t length, int64_t dim);

// For this processor; nullptr where it has neither AVX-512F nor AVX2 with FMA. Each of those has F16C, too.
const CpuKernels* cpu_kernels();

}  // namespace ferrotune
