// All layers of a decoder on one new row of each of many sequences, f32 on the CPU beside weights in f32 or 16 bits. Each thread takes
// some of the sequences through all layers: nobody waits for another between two products. A model whose weights a core's cache does
// not hold is better off with each product shared out, as then every core reads a part of them.
#pragma once

#include "ferrotune/csrc/pages.h"

namespace ferrotune {

class RowsStack {
 public:
  // x [M, C], one new row of each sequence.
  explicit RowsStack(const Tensor& x);
  ~RowsStack();

  // Whether it can take this layer; where not, nothing can be run.
  bool push(const NormView& norm, const LinearView& qkv, const LinearView& o, const NormView& post_norm, const AttentionView& attention,
            const NormView& mlp_norm, const LinearView& gate_up, const LinearView& down, const NormView& mlp_post_norm, Activation activation);

  // What the last layer gives, [M, C]; undefined where it does not pay.
  Tensor run() const;

 private:
  struct Layer;
  Tensor x_;
  std::vector<Layer> layers_;
  // Multiply-adds of a row in the products of all layers, and in the largest of them.
  int64_t work_ = 0, largest_ = 0;
};

}  // namespace ferrotune
