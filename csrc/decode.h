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
  // x [M, C], one new row of each sequence. Where ids, int64 [M], is defined: x is a table, of which each has a row, and cos and sin of the layers
  // are of all positions, of which it has that of its newest key.
  DecodeStack(const Tensor& x, const Tensor& ids) : x_(x), ids_(ids), M_((ids.defined() ? ids : x).size(0)), rows_(x) {}

  // Whether it can take this layer; where not, nothing can be run.
  bool push(const NormView& norm, const LinearView& qkv, const LinearView& o, const NormView& post_norm, const AttentionView& attention,
            const NormView& mlp_norm, const LinearView& gate_up, const LinearView& down, const NormView& mlp_post_norm, Activation activation);

  // What the last layer gives, [M, C], behind a norm; null where it cannot.
  std::unique_ptr<Tensor> run(const NormView& norm);

 private:
  Tensor x_, ids_;
  int64_t M_;
  KernelDecode stack_{};
  std::vector<KernelDecodeLayer> layers_;
  RowsStack rows_;
};

std::unique_ptr<DecodeStack> decode_stack(const Tensor& x, const Tensor& ids);

}  // namespace ferrotune
