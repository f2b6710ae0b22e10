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
  // Every tensor in a fixed order, undefined ones included: what a checkpointed block must be given back.
  void visit(std::vector<Tensor*>& tensors);
};

// y = x W^T + bias, and on the rows of each part p: y_p += scale_p (dropout(x) A_p^T) B_p^T.
// x [N, in] -> [N, rows]. LoRA: arXiv:2106.09685.
Tensor linear(const Tensor& x, const Linear& linear);

}  // namespace ferrotune
