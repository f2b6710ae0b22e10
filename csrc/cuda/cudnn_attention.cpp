// Attention by cuDNN's frontend, forward and backward: segments of one length, or of any lengths (packed) in one call.
// ATen's own way to cuDNN builds the graph anew for every packed batch and gives wrong gradients (2.11). Here a graph is
// built once for each bucket of shapes and kept: the lengths and the places of the segments are device tensors, so any
// batch of the bucket runs through it. Operands are read and written where they lie: ATen allocates dq, dk and dv apart.
#include <ATen/cudnn/Handle.h>
#include <cudnn_frontend.h>

#include <cstring>
#include <map>
#include <mutex>

#include "library.h"

namespace ferrotune {

namespace {

namespace fe = cudnn_frontend;
namespace graph = cudnn_frontend::graph;

// The tensors of both graphs. The offsets of a ragged one are at kOffsets + the number of the first with its row stride.
enum Uid : int64_t { kQ = 1, kK, kV, kOut, kLse, kDout, kDq, kDk, kDv, kLengths, kOffsets = 20 };

void check(fe::error_t error, const char* what) {
  TORCH_CHECK(error.is_good(), "cuDNN attention: ", what, ": ", error.get_message());
}

struct Operand {
  int64_t uid;
  const AttentionRows* rows;
};

// What a graph depends on.
using Key = std::vector<int64_t>;

struct Plan {
  graph::Graph graph;
  int64_t workspace = 0;
};

struct Call {
  const AttentionShape& shape;
  int64_t heads, kv_heads, head_dim;
  at::ScalarType dtype;
  std::vector<Operand> operands;

  bool packed() const { return shape.lengths.defined(); }

  // Where segments start depends on the row stride alone.
  int64_t offsets_uid(const Operand& operand) const {
    for (const Operand& first : operands) {
      if (first.rows->x.stride(0) == operand.rows->x.stride(0)) return kOffsets + first.uid;
    }
    return kOffsets + operand.uid;
  }

  Key key(bool backward) const {
    const bool half = dtype == at::kHalf;
    int64_t scale;
    static_assert(sizeof scale == sizeof shape.scale);
    std::memcpy(&scale, &shape.scale, sizeof scale);
    Key key{backward,      half,         operands[0].rows->x.get_device(), packed(), shape.segments, shape.longest,
            shape.tokens, heads,        kv_heads, head_dim, scale};
    for (const Operand& operand : operands) key.push_back(operand.rows->x.stride(0));
    return key;
  }
};

// x [tokens, heads, D] or, for the log-sum-exp, [tokens, heads], as cuDNN sees it: [segments, heads, longest, D], each
// segment where its offset says.
void describe(graph::Tensor_attributes& tensor, const Call& call, const Operand& operand,
              std::map<int64_t, std::shared_ptr<graph::Tensor_attributes>>& offsets, graph::Graph& g) {
  const at::Tensor& x = operand.rows->x;
  const int64_t segments = call.shape.segments, longest = call.shape.longest, row = x.stride(0);
  const bool lse = x.dim() == 2;
  tensor.set_uid(operand.uid).set_dim({segments, x.size(1), longest, lse ? 1 : x.size(2)});
  if (lse) tensor.set_data_type(fe::DataType_t::FLOAT);
  if (!call.packed() && lse) {
    tensor.set_stride({x.size(1) * longest, longest, 1, 1});
    return;
  }
  tensor.set_stride({longest * row, x.stride(1), row, 1});
  if (!call.packed()) return;
  auto& starts = offsets[call.offsets_uid(operand)];
  if (!starts) {
    starts = g.tensor(graph::Tensor_attributes()
                          .set_uid(call.offsets_uid(operand))
                          .set_dim({segments + 1, 1, 1, 1})
                          .set_stride({1, 1, 1, 1})
                          .set_data_type(fe::DataType_t::INT64));
  }
  tensor.set_ragged_offset(starts);
}

std::shared_ptr<Plan> build(const Call& call, bool backward) {
  auto plan = std::make_shared<Plan>();
  graph::Graph& g = plan->graph;
  g.set_io_data_type(call.dtype == at::kHalf ? fe::DataType_t::HALF : fe::DataType_t::BFLOAT16)
      .set_intermediate_data_type(fe::DataType_t::FLOAT)
      .set_compute_data_type(fe::DataType_t::FLOAT);
  // Of the forward's attributes and the backward's alike.
  const auto padded = [&](auto& attributes) {
    if (!call.packed()) return;
    const auto lengths = g.tensor(graph::Tensor_attributes()
                                      .set_uid(kLengths)
                                      .set_dim({call.shape.segments, 1, 1, 1})
                                      .set_stride({1, 1, 1, 1})
                                      .set_data_type(fe::DataType_t::INT32));
    attributes.set_padding_mask(true).set_seq_len_q(lengths).set_seq_len_kv(lengths);
  };
  std::map<int64_t, std::shared_ptr<graph::Tensor_attributes>> offsets;
  const auto input = [&](size_t i) {
    graph::Tensor_attributes tensor;
    describe(tensor, call, call.operands[i], offsets, g);
    return g.tensor(tensor);
  };
  const auto output = [&](const std::shared_ptr<graph::Tensor_attributes>& tensor, size_t i) {
    describe(tensor->set_output(true), call, call.operands[i], offsets, g);
  };
  const auto scale = static_cast<float>(call.shape.scale);
  if (!backward) {
    auto attributes = graph::SDPA_attributes().set_generate_stats(true).set_causal_mask(true).set_attn_scale(scale);
    padded(attributes);
    auto [out, lse] = g.sdpa(input(0), input(1), input(2), attributes);
    output(out, 3);
    output(lse, 4);
  } else {
    auto attributes = graph::SDPA_backward_attributes().set_causal_mask(true).set_attn_scale(scale);
    padded(attributes);
    if (call.shape.tokens > 0) {
      attributes.set_max_total_seq_len_q(call.shape.tokens).set_max_total_seq_len_kv(call.shape.tokens);
    }
    auto [dq, dk, dv] = g.sdpa_backward(input(0), input(1), input(2), input(3), input(5), input(4), attributes);
    output(dq, 6);
    output(dk, 7);
    output(dv, 8);
  }
  const cudnnHandle_t handle = at::native::getCudnnHandle();
  check(g.validate(), "the graph");
  check(g.build_operation_graph(handle), "the operations");
  check(g.create_execution_plans({fe::HeurMode_t::A}), "plans");
  check(g.check_support(handle), "support");
  check(g.build_plans(handle), "the plan");
  check(g.get_workspace_size(plan->workspace), "the workspace");
  return plan;
}

std::shared_ptr<Plan> plan_for(const Call& call, bool backward) {
  static std::mutex mutex;
  static std::map<Key, std::shared_ptr<Plan>> plans;
  const Key key = call.key(backward);
  const std::lock_guard lock(mutex);
  auto& plan = plans[key];
  if (!plan) plan = build(call, backward);
  return plan;
}

void run(const Call& call, bool backward) {
  const auto plan = plan_for(call, backward);
  std::unordered_map<int64_t, void*> pointers;
  if (call.packed()) pointers[kLengths] = call.shape.lengths.data_ptr();
  for (const Operand& operand : call.operands) {
    pointers[operand.uid] = operand.rows->x.data_ptr();
    if (call.packed()) pointers[call.offsets_uid(operand)] = operand.rows->offsets.data_ptr();
  }
  const at::Tensor workspace = at::empty({plan->workspace}, call.operands[0].rows->x.options().dtype(at::kByte));
  check(plan->graph.execute(at::native::getCudnnHandle(), pointers, workspace.data_ptr()), "the run");
}

Call call_of(const AttentionShape& shape, const AttentionRows& q, const AttentionRows& k) {
  return Call{shape, q.x.size(1), k.x.size(1), q.x.size(2), q.x.scalar_type(), {}};
}

}  // namespace

void cudnn_attention_forward(const AttentionShape& shape, const AttentionRows& q, const AttentionRows& k, const AttentionRows& v,
                              const AttentionRows& out, const AttentionRows& lse) {
  Call call = call_of(shape, q, k);
  call.operands = {{kQ, &q}, {kK, &k}, {kV, &v}, {kOut, &out}, {kLse, &lse}};
  run(call, false);
}

void cudnn_attention_backward(const AttentionShape& shape, const AttentionRows& dout, const AttentionRows& q,
                               const AttentionRows& k, const AttentionRows& v, const AttentionRows& out, const AttentionRows& lse,
                               const AttentionRows& dq, const AttentionRows& dk, const AttentionRows& dv) {
  Call call = call_of(shape, q, k);
  call.operands = {{kQ, &q},       {kK, &k},   {kV, &v},   {kOut, &out}, {kLse, &lse},
                   {kDout, &dout}, {kDq, &dq}, {kDk, &dk}, {kDv, &dv}};
  run(call, true);
}

}  // namespace ferrotune
