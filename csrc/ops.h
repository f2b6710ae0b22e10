// Every C++ function that Rust calls, declared once. Shapes use the legend of docs/architecture.md:
// N rows (tokens, flat: samples one after another), C hidden_size, F intermediate_size, H query heads,
// K key/value heads, D head_dim, V vocab_size, R LoRA rank.
#pragma once

#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>

#include <vector>

#include "rust/cxx.h"

namespace rust::behavior {
// One line of the C++ message for Rust, without the backtrace that TORCH_CHECK appends.
template <typename Try, typename Fail>
static void trycatch(Try&& func, Fail&& fail) noexcept try {
  func();
} catch (const c10::Error& error) {
  fail(error.what_without_backtrace());
} catch (const std::exception& error) {
  fail(error.what());
}
}  // namespace rust::behavior

namespace ferrotune {

using at::Tensor;

// Shared with Rust; defined in src/ffi.rs.
struct Nf4View;
struct Bf12View;
struct HeadView;
struct Fp8View;
struct PartView;
struct LinearView;
struct NormView;
struct AttentionView;
struct MlpView;
struct AdamWStep;
enum class Activation : std::uint8_t;
struct BlockPolicy;

class Segments;
struct Fp8Rows;
struct LoraFold;

using TensorList = std::vector<Tensor>;
std::unique_ptr<TensorList> tensor_list();
void push(TensorList& list, const Tensor& tensor);

// ---- blocks.cpp
// overwrites: nobody else reads x, so that without autograd its memory may become the result's.
std::unique_ptr<Tensor> attention_block(const Tensor& x, const NormView& norm, const LinearView& qkv,
                                        const LinearView& o, const NormView& post_norm,
                                        const AttentionView& attention, BlockPolicy policy, bool overwrites);
std::unique_ptr<Tensor> mlp_block(const Tensor& x, const NormView& norm, const LinearView& gate_up,
                                  const LinearView& down, const NormView& post_norm, Activation activation,
                                  BlockPolicy policy, bool overwrites);

// ---- one file each; these take part in autograd
Tensor rms_norm(const Tensor& x, const Tensor& weight, double eps, double offset);
Tensor rope(const Tensor& x, const Tensor& cos, const Tensor& sin);
Tensor swiglu(const Tensor& gate_up, Activation activation);

// ---- the same without autograd, for nodes that differentiate a whole block
// y and rstd. The kernel leaves `tail` columns of y's rows for the caller to write: [N, C + tail]. Here and below `fp8`, where it
// is defined (csrc/fp8.h), receives what is written in e4m3, too: the kernel of bf16 does that.
std::tuple<Tensor, Tensor> rms_norm_forward(const Tensor& x, const Tensor& weight, double eps, double offset,
                                            int64_t tail = 0, const Fp8Rows* fp8 = nullptr);
// By a kernel into the first C columns of y [N, ..], the fold's X, and rstd unless it is null; whether the launch did the fold's work, too.
bool rms_norm_fold(const Tensor& y, const Tensor& x, const Tensor& weight, double eps, double offset, Tensor* rstd, const LoraFold& fold);
// dx, plus `residual` where it is defined, and dweight where it trains. The kernel leaves `room` columns behind the rows of
// dx [N, C], in memory that no other tensor holds.
std::tuple<Tensor, Tensor> rms_norm_backward(const Tensor& dy, const Tensor& x, const Tensor& weight, const Tensor& rstd,
                                             double offset, const Tensor& residual = {}, int64_t room = 0,
                                             const Fp8Rows* fp8 = nullptr);
// By the opposite angles where `inverse`, which is the backward. y may have a token stride of its own, or be x.
Tensor rotate(const Tensor& x, const Tensor& cos, const Tensor& sin, bool inverse);
void rotate_into(const Tensor& y, const Tensor& x, const Tensor& cos, const Tensor& sin, bool inverse);
// The kernel leaves `tail` columns of y's rows for the caller to write: [N, F + tail].
Tensor swiglu_forward(const Tensor& gate_up, Activation activation, int64_t tail = 0, const Fp8Rows* fp8 = nullptr);
// in_place: a kernel may write over gate_up. Else it leaves `room` columns behind the rows of the result.
Tensor swiglu_backward(const Tensor& dy, const Tensor& gate_up, Activation activation, bool in_place = false,
                       int64_t room = 0, const Fp8Rows* fp8 = nullptr);
// Into y [N, F], whose rows may lie apart.
void swiglu_forward_into(const Tensor& y, const Tensor& gate_up, Activation activation);
// gate_up becomes its gradient, and dy, whose rows may lie apart, what the forward gave.
void swiglu_backward_in_place(const Tensor& dy, const Tensor& gate_up, Activation activation);

// ---- the same for Rust
std::unique_ptr<Tensor> op_rms_norm(const Tensor& x, const Tensor& weight, double eps, double offset);
std::unique_ptr<Tensor> op_rope(const Tensor& x, const Tensor& cos, const Tensor& sin);
std::unique_ptr<Tensor> op_swiglu(const Tensor& gate_up, Activation activation);
std::unique_ptr<Tensor> op_linear(const Tensor& x, const LinearView& linear);
std::unique_ptr<Tensor> op_attention(const Tensor& q, const Tensor& k, const Tensor& v,
                                     std::shared_ptr<Segments> segments, double scale, double softcap,
                                     std::int64_t window);

// ---- cross_entropy.cpp
// labels are those of `rows` of hidden, or of all rows where `rows` is undefined; then rows labelled -100 count nothing. The
// head is nf4 where weight is undefined.
std::unique_ptr<Tensor> linear_cross_entropy(const Tensor& hidden, const HeadView& head, const Tensor& rows, const Tensor& labels,
                                             double softcap);
// The loss alone without autograd, and for a gradient of 1 its dhidden and dweight (in f32 or f64), undefined unless wanted.
std::tuple<Tensor, Tensor, Tensor> linear_cross_entropy_forward(const Tensor& hidden, const Tensor& weight,
                                                                const Tensor& labels, double softcap, bool need_dh,
                                                                bool need_dw);
// hidden W^T. Where the head is dense, differentiable and in the dtype of hidden on the CPU
// and with autograd; else in f32 (f64 for f64).
std::unique_ptr<Tensor> head_scores(const Tensor& hidden, const HeadView& head);

// ---- log_probs.cpp
// As linear_cross_entropy, but a number for every row of hidden, 0 where it has no label; entropy [N], unless undefined, is filled
// where there is one. Every label is a word.
std::unique_ptr<Tensor> token_log_probs(const Tensor& hidden, const HeadView& head, const Tensor& rows, const Tensor& labels,
                                        double temperature, double softcap, const Tensor& entropy);

// ---- bf12.cpp
std::unique_ptr<Tensor> bf12_pack(const Tensor& weight, const Tensor& units, const Tensor& scales, const Tensor& counts);
void bf12_unpack(const Bf12View& weight, const Tensor& destination);

// ---- nf4.cpp
// The 16 values of NF4, and the 256 of the 8-bit absmax: f32, ascending.
std::unique_ptr<Tensor> nf4_quant_map();
std::unique_ptr<Tensor> nf4_nested_quant_map();
// x: n elements in f32, f16 or bf16; packed uint8 [ceil(n / 2)], absmax f32 [ceil(n / 64)]. A NaN or an infinity in x is
// one in absmax.
void nf4_quantize(const Tensor& x, const Tensor& packed, const Tensor& absmax);
// absmax f32 [blocks] -> index uint8 [blocks], nested_absmax f32 [ceil(blocks / 256)], on the CPU; returns nested_offset.
double nf4_nest(const Tensor& absmax, const Tensor& index, const Tensor& nested_absmax);
// destination [rows, in], whose rows may lie apart, in any float dtype.
void nf4_dequantize(const Nf4View& weight, const Tensor& destination);

// ---- fp8.cpp
// weight [rows, in] in a float dtype, finite, into the tensors of csrc/fp8.h, which are there.
void fp8_quantize(const Tensor& weight, const Fp8View& to);
// destination [rows, in], in any float dtype.
void fp8_dequantize(const Fp8View& weight, const Tensor& destination);

// ---- sample.cpp
// kernels/sample.cu: logits f32 [N, V], params [N, 5] -> tokens int64 [N], and the results as kernels.h has them, int64 [2 N] in the host's memory,
// there once the launch is over.
std::unique_ptr<Tensor> sample(const Tensor& logits, rust::Slice<const double> params, const Tensor& tokens);
// kernels/put_words.cu: to, int64 [n] on a GPU, = words, of which the first are those of ids (int64 on that GPU, may be undefined), 0 for a negative one.
void put_words(const Tensor& to, rust::Slice<const std::int32_t> words, const Tensor& ids);

// ---- optim.cpp
void backward(const Tensor& y, const Tensor& dy, const TensorList& inputs);
std::unique_ptr<Tensor> grad_norm(const TensorList& params);
void zero_grads(const TensorList& params);
void copy_all(const TensorList& to, const TensorList& from);
void drop_grads(const TensorList& params);
void adamw_step(const TensorList& params, const TensorList& exp_avg, const TensorList& exp_avg_sq,
                const AdamWStep& step);

// ---- adamw_8bit.cpp
// The "dynamic" 8-bit values of arXiv:1511.04561, ascending: for each decimal exponent i - 6, i < 7, the midpoints of 2^i
// equal steps from 0.1 to 1 with both signs (twice as many without), 0 and 1. f32 [256].
Tensor dynamic_map(bool has_sign);
// DynamicMaps of kernels/dynamic_map.h as uint8, on the CPU.
std::unique_ptr<Tensor> adamw_8bit_maps();
void adamw_8bit_step(const TensorList& params, const TensorList& state1, const TensorList& state2,
                     const TensorList& absmax1, const TensorList& absmax2, const Tensor& maps, const AdamWStep& step);

}  // namespace ferrotune
