// A block of a decoder layer as one autograd node: what of its forward waits for its backward, and where.
#pragma once

#include "ferrotune/csrc/cuda_library.h"
#include "ferrotune/csrc/node.h"
#include "ferrotune/csrc/ops.h"
#include "ferrotune/src/ffi.rs.h"

namespace ferrotune {

// A tensor of a block's forward, and where it waits for the backward.
struct Waiting {
  Tensor* tensor;
  Place place;
};

// Columns behind the rows of d [N, C] that are nobody's: a block's backward leaves room there (rms_norm_backward), and as no
// other tensor holds the memory, nobody sees what is written.
inline int64_t room_behind(const Tensor& d) {
  const bool alone = d.dim() == 2 && d.stride(1) == 1 && d.storage_offset() == 0 && d.storage().use_count() == 1 &&
                     static_cast<int64_t>(d.storage().nbytes()) >= d.size(0) * d.stride(0) * d.element_size();
  return alone ? std::max<int64_t>(d.stride(0) - d.size(1), 0) : 0;
}

// Autograd sees x and the block's weights as inputs, so that a block trains whatever stands before it.
template <typename Block>
struct BlockNode : torch::autograd::Function<BlockNode<Block>> {
  // What waits for the backward, which takes it: memory is free as soon as a tensor has been used for the last time.
  struct Saved {
    Block block;
    BlockPolicy policy;
    Tensor x;
    typename Block::Kept kept;
    std::vector<std::shared_ptr<Stashed>> stash;  // of x, then of kept.waiting(policy); null where it stays
  };

  // Without a GPU there is no other memory: x stays, and what may go to the host is computed again.
  static BlockPolicy possible(BlockPolicy policy, const Block& block, bool has_host) {
    if (!has_host && policy.input == Place::Host) policy.input = Place::Device;
    for (Place* place : {&policy.normed, &policy.projected, &policy.inner, &policy.output}) {
      if (*place == Place::Host && !has_host) *place = Place::Recompute;
    }
    if (policy.inner == Place::Host && !block.inner_to_host()) policy.inner = Place::Recompute;
    return policy;
  }

  static Tensor forward(torch::autograd::AutogradContext* ctx, const Tensor& x, at::TensorList, const Block& block, BlockPolicy wanted) {
    const CudaLibrary* const cuda = x.is_cuda() ? cuda_library() : nullptr;
    Saved saved{block, possible(wanted, block, cuda != nullptr), x, {}, {}};
    const bool frugal = block.has_frugal_way(x) && saved.policy.projected == Place::Recompute;
    const Tensor y = frugal ? block.forward_only(x) : block.forward(x, &saved.kept, true);
    const auto leave = [&](Tensor& tensor, Place place) {
      saved.stash.push_back(place == Place::Host && tensor.defined() ? cuda->stash(tensor) : nullptr);
      if (place != Place::Device) tensor = Tensor();
    };
    TORCH_CHECK(saved.policy.input != Place::Recompute, "a block's input cannot be computed again");
    leave(saved.x, saved.policy.input);
    for (const auto& [tensor, place] : saved.kept.waiting(saved.policy)) leave(*tensor, place);
    ctx->saved_data["saved"] = hold(std::move(saved));
    return y;
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx, torch::autograd::variable_list dy) {
    TORCH_CHECK(!ctx->saved_data.empty(), "a block's gradient was taken already");
    Saved saved = taken<Saved>(ctx->saved_data["saved"]);
    ctx->saved_data.clear();
    // The last first, as they come back. While this block works, those of the next are on their way: three where this one is an
    // MLP, only its x where attention fetched three itself, and memory is shortest.
    constexpr int kBothBlocks = 4;
    const auto waiting = saved.kept.waiting(saved.policy);
    int own = static_cast<int>(std::count_if(saved.stash.begin() + 1, saved.stash.end(), [](const auto& s) { return s != nullptr; }));
    const int of_next = std::max(0, kBothBlocks - 1 - own);
    for (size_t i = waiting.size(); i > 0; --i) {
      if (saved.stash[i]) *waiting[i - 1].tensor = saved.stash[i]->fetch(own--);
    }
    if (saved.stash[0]) saved.x = saved.stash[0]->fetch(of_next);
    const std::vector<Tensor*> weights = saved.block.visit();
    std::vector<Tensor> grads(weights.size());
    const Tensor d = room_behind(dy[0]) > 0 ? dy[0] : dy[0].contiguous();
    const Tensor dx = saved.block.completed_backward(d, saved.x, saved.kept, ctx->needs_input_grad(0), grads.data());
    torch::autograd::variable_list result{dx};
    for (size_t i = 0; i < weights.size(); ++i) {
      if (weights[i]->defined()) result.push_back(grads[i]);
    }
    result.resize(result.size() + 2);  // block, policy
    return result;
  }
};

template <typename Block>
Tensor run(Block block, const Tensor& x, BlockPolicy policy, bool overwrites) {
  if (!at::GradMode::is_enabled()) return block.forward_only(x, overwrites);
  TensorList weights;
  for (const Tensor* weight : block.visit()) {
    if (weight->defined()) weights.push_back(*weight);
  }
  return BlockNode<Block>::apply(x, at::TensorList(weights), block, policy);
}

}  // namespace ferrotune
