// A frozen or trainable projection with LoRA on some of its row parts (src/ops.rs: Linear).
#pragma once

#include <functional>
#include <variant>

#include "ferrotune/csrc/fp8.h"
#include "ferrotune/csrc/nf4.h"

namespace ferrotune {

struct Lora {
  int64_t rows;   // output rows of this part
  Tensor a, b;    // [R, in], [rows, R]; undefined where the part has no LoRA
  double scale;   // lora_alpha / R, or lora_alpha / sqrt(R)
  double dropout; // probability that an input element is dropped
  uint64_t key;   // of the counter-based mask: seed, step, micro-batch, layer, module
  Tensor b_cast;  // b in the dtype of the products, if someone made it

  Tensor b_in(at::ScalarType dtype) const {
    return b_cast.defined() && b_cast.scalar_type() == dtype ? b_cast : b.to(dtype);
  }
};

// LoRA of an adapter that only some rows of a batch have, on one part; in inference, beside parts without LoRA of their own.
struct LoraRows {
  int64_t first, rows;  // of the batch
  int64_t part;
  Tensor a, b;
  double scale;
};

// A frozen weight that is not one matrix: each part as the checkpoint has it, quantised or not.
struct PartWeights : torch::CustomClassHolder {
  std::vector<std::variant<Tensor, Nf4>> parts;
  int64_t rows = 0, in = 0;

  // One after the other in one new [rows + below, in + tail] matrix of that dtype, what is beside them not written. Never saved
  // for the backward, which makes it again.
  Tensor joined(at::ScalarType dtype, int64_t tail = 0, int64_t below = 0) const;
};

struct Linear {
  Tensor weight;  // [rows, in], or undefined:
  c10::intrusive_ptr<PartWeights> part_weights;
  Fp8 fp8;
  Tensor bias;  // [rows] or undefined
  Tensor a_cast;  // all A_p below each other in the dtype of the products, if someone made it
  std::vector<Lora> parts;
  std::vector<LoraRows> lora_rows;

  Linear() = default;
  // A matrix alone.
  explicit Linear(Tensor matrix) : weight(std::move(matrix)) {}
  explicit Linear(const Nf4& matrix);
  explicit Linear(const LinearView& view);
  int64_t rows() const { return fp8.defined() ? fp8.rows() : part_weights ? part_weights->rows : weight.size(0); }
  // Row of W where part p begins.
  int64_t first_row(int64_t part) const;
  int64_t in() const { return fp8.defined() ? fp8.in() : part_weights ? part_weights->in : weight.size(1); }
  // Every tensor that may train, in a fixed order, undefined ones included.
  void visit(std::vector<Tensor*>& tensors);
  // Whether the backward needs the input.
  bool needs_input() const;
  // From here on the weight is one matrix, with room for `tail` columns behind and `tail` rows below it.
  void dequantize(at::ScalarType dtype, int64_t tail);
  // W in the dtype that a product takes it in.
  Tensor dense(at::ScalarType dtype) const { return part_weights ? part_weights->joined(dtype) : weight.to(dtype); }
};

// y = x W^T + bias, and on the rows of each part p: y_p += scale_p (dropout(x) A_p^T) B_p^T.
// x [N, in] -> [N, rows]. LoRA: arXiv:2106.09685. Takes part in autograd.
Tensor linear(const Tensor& x, const Linear& linear);

// The same without autograd. `rows`: Q(x) of linear_fp8_rows, if someone made it. Where z is given it receives the products with all
// A_p side by side, [N, sum of R], which the backward needs; without it, one row on the CPU takes a faster path.
Tensor linear_forward(const Tensor& x, const Linear& linear, Tensor* z, Fp8Rows rows = {});

// Memory for x in e4m3, x [N, columns] being the input or the gradient of `linear`, for the kernel that writes x in bf16; undefined
// where `linear` is not in e4m3 or x not written by a kernel. With room for LoRA, where that rides in the product.
Fp8Rows linear_fp8_rows(const Tensor& like, const Linear& linear, int64_t columns);

// LoRA inside the main product: with Z = X A^T behind X and scale B behind W, y = [X | Z] [W | scale B]^T is one product whose
// inner dimension is 64 longer, and y is not read and written once more. linear_tail: how many columns X needs behind it, a
// multiple of 64, or 0 where this cannot be or does not pay: it is for 16 bits on a GPU, without dropout, and for weights that
// are made for each product (NF4) or lie in rows with room (nn/linear.rs).
int64_t linear_tail(const Tensor& x, const Linear& linear);

// Makes x, the first columns of such rows; whether the launch did the fold's work, too (csrc/lora.h).
struct LoraFold;
using MakeInput = std::function<bool(const LoraFold&)>;

// The same as linear_forward for x in rows [N, in + tail]; the tail is written, and before it x by `make`, if someone has not yet made it. Behind
// the rows of y is room for `room` columns.
Tensor linear_with_tail(const Tensor& x, const Linear& linear, Tensor* z, int64_t room = 0, const MakeInput& make = {});

// Whether linear_onto can: 16 bits on a GPU, no bias, no LoRA but what linear_tail has room for.
bool linear_adds(const Tensor& x, const Linear& linear);

// y += x W^T and LoRA by one product, without autograd; x in rows [N, in + linear_tail]. Returns y.
Tensor linear_onto(const Tensor& y, const Tensor& x, const Linear& linear);

// As linear_forward, and residual, where it is defined, without autograd; undefined where not on a GPU in 16 bits.
Tensor inference_linear(const Tensor& x, const Linear& linear, const Tensor& residual = {});

// y += what lora_rows adds.
void add_lora_rows(const Tensor& y, const Tensor& x, const Linear& linear);

// z alone; undefined without LoRA.
Tensor linear_z(const Tensor& x, const Linear& linear);

// The same in the backward: with G = scale dY B behind dY and A below W, dX = [dY | G] [W; A]. How many columns dY needs behind
// it, or 0; dense weights have room below them, too (nn/linear.rs).
int64_t linear_gradient_tail(const Tensor& dy, const Linear& linear);

// dx (undefined if not wanted), and into grads the gradients of what trains, in the order of visit(). A caller that moves x in
// frees its memory for dx. `tail` columns behind dy's, in rows [N, rows + tail], are this function's to write. dy_rows: Q(dy), if
// someone made it.
Tensor linear_backward(const Tensor& dy, Tensor x, const Tensor& z, const Linear& linear, bool need_dx, Tensor* grads,
                       int64_t tail = 0, Fp8Rows dy_rows = {});

}  // namespace ferrotune
