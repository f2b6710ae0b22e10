// All layers of a decoder on few new rows: one launch on a GPU (kernels/decode.cu) or a few a layer (decode_groups.cu), one parallel loop on the
// CPU (decode_rows.h).
#pragma once

#include "ferrotune/csrc/decode_rows.h"
#include "ferrotune/csrc/kernels.h"
#include "ferrotune/csrc/ops.h"

namespace ferrotune {

// The layers that a launch or loop is told of. What they are made of must live until `run`.
class DecodeStack {
 public:
  // x [M, C], one new row of each sequence.
  explicit DecodeStack(const Tensor& x) : x_(x), rows_(x) {}

  // Whether it can take this layer; where not, nothing can be run.
  bool push(const NormView& norm, const LinearView& qkv, const LinearView& o, const NormView& post_norm, const AttentionView& attention,
            const NormView& mlp_norm, const LinearView& gate_up, const LinearView& down, const NormView& mlp_post_norm, Activation activation);

  // What the last layer gives, [M, C]; null where it cannot.
  std::unique_ptr<Tensor> run();

 private:
  Tensor x_;
  KernelDecode stack_{};
  std::vector<KernelDecodeLayer> layers_;
  RowsStack rows_;
};

std::unique_ptr<DecodeStack> decode_stack(const Tensor& x);

}  // namespace ferrotune
