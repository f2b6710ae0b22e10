// A frozen or trainable projection with LoRA on some of its row parts (src/ops.rs: Linear).
#pragma once

#include "ferrotune/csrc/ops.h"

namespace ferrotune {

struct Lora {
  int64_t rows;   // output rows of this part
  Tensor a, b;    // [R, in], [rows, R]; undefined where the part has no LoRA
  double scale;   // lora_alpha / R, or lora_alpha / sqrt(R)
  double dropout; // probability that an input element is dropped
  uint64_t key;   // of the counter-based mask: seed, step, micro-batch, layer, module
};

struct Linear {
  Tensor weight;  // [rows, in]
  Tensor bias;    // [rows] or undefined
  std::vector<Lora> parts;

  explicit Linear(const LinearView& view);
  // Every tensor in a fixed order, undefined ones included.
  void visit(std::vector<Tensor*>& tensors);
  // Whether the backward needs the input.
  bool needs_input() const;
  // W in the dtype that a product takes it in.
  Tensor dense(at::ScalarType dtype) const { return weight.to(dtype); }
};

// y = x W^T + bias, and on the rows of each part p: y_p += scale_p (dropout(x) A_p^T) B_p^T.
// x [N, in] -> [N, rows]. LoRA: arXiv:2106.09685. Takes part in autograd.
Tensor linear(const Tensor& x, const Linear& linear);

// The same without autograd. Where z is given it receives the products with all A_p side by side, [N, sum of R], which the
// backward needs; without it, one row on the CPU takes a faster path.
Tensor linear_forward(const Tensor& x, const Linear& linear, Tensor* z);

// z alone; undefined without LoRA.
Tensor linear_z(const Tensor& x, const Linear& linear);

// dx (undefined if not wanted), and into grads the gradients of what trains, in the order of visit().
Tensor linear_backward(const Tensor& dy, const Tensor& x, const Tensor& z, const Linear& linear, bool need_dx,
                       Tensor* grads);

}  // namespace ferrotune
