#include "ferrotune/csrc/decode.h"

#include "ferrotune/csrc/few_rows.h"
#include "ferrotune/csrc/pages.h"
#include "ferrotune/src/ffi.rs.h"

namespace ferrotune {

namespace {

// Rows of one launch of all layers.
constexpr int64_t kMostAtOnce = 8;

// The parts of a product into [most] parts of a layer; false where rows_linear could not take them either.
bool put_parts(KernelRowsPart* parts, int64_t most, int64_t& count, const void*& bias, const LinearView& view, int64_t M, at::ScalarType dtype) {
  bool some = false;
  const std::optional<KernelRows> rows = linear_operands(Linear(view), M, dtype, some);
  if (!rows || some || rows->count > most) return false;
  std::copy(rows->parts, rows->parts + rows->count, parts);
  count = rows->count;
  bias = rows->bias;
  return true;
}

// The weight of a norm in the dtype of x, or null where there is none; false for others.
bool put_norm(const void*& to, const NormView& norm, const Tensor& x) {
  to = norm.weight.defined() ? norm.weight.const_data_ptr() : nullptr;
  return !norm.weight.defined() || (norm.weight.scalar_type() == x.scalar_type() && norm.weight.is_contiguous());
}

}  // namespace

bool DecodeStack::push(const NormView& norm, const LinearView& qkv, const LinearView& o, const NormView& post_norm,
                       const AttentionView& attention, const NormView& mlp_norm, const LinearView& gate_up, const LinearView& down,
                       const NormView& mlp_post_norm, Activation activation) {
  if (x_.is_cpu()) return !ids_.defined() && rows_.push(norm, qkv, o, post_norm, attention, mlp_norm, gate_up, down, mlp_post_norm, activation);
  if (ids_.defined() && (M_ > kMostAtOnce || !x_.is_contiguous())) return false;
  if (!is_few_rows(x_, M_) || !attention.pages || post_norm.weight.defined() || mlp_post_norm.weight.defined()) return false;
  const PagedBatch& batch = *attention.pages;
  if (!batch.all_single() || batch.rows() != M_ || !attention.pages_k.is_contiguous() || !attention.pages_v.is_contiguous()) return false;
  const PagedBatch::Singles& singles = batch.singles(x_.device());
  KernelDecodeLayer layer{};
  int64_t one = 0;
  const at::ScalarType dtype = x_.scalar_type();
  const bool fits = put_norm(layer.input_norm, norm, x_) && put_norm(layer.mlp_norm, mlp_norm, x_) && put_norm(layer.q_norm, attention.q_norm, x_) &&
                    put_norm(layer.k_norm, attention.k_norm, x_) && put_parts(layer.qkv, 3, layer.qkv_count, layer.qkv_bias, qkv, M_, dtype) &&
                    put_parts(&layer.o, 1, one, layer.o_bias, o, M_, dtype) &&
                    put_parts(layer.gate_up, 2, layer.gate_up_count, layer.gate_up_bias, gate_up, M_, dtype) &&
                    put_parts(&layer.down, 1, one, layer.down_bias, down, M_, dtype) && attention.cos.is_contiguous() && attention.sin.is_contiguous() &&
                    attention.cos.scalar_type() == at::kFloat && singles.tables.size(1) > 0;
  if (!fits) return false;
  layer.window = attention.window;
  layer.pool_k = attention.pages_k.mutable_data_ptr();
  layer.pool_v = attention.pages_v.mutable_data_ptr();
  layer.cos = attention.cos.const_data_ptr<float>();
  layer.sin = attention.sin.const_data_ptr<float>();
  KernelDecode same = stack_;
  same.M = M_;
  same.C = x_.size(1);
  same.F = gate_up.parts.empty() ? 0 : Linear(gate_up).rows() / 2;
  same.H = attention.num_heads;
  same.K = attention.num_kv_heads;
  same.D = attention.head_dim;
  same.R = 2 * attention.cos.size(1);
  same.width = singles.tables.size(1);
  same.longest = singles.longest;
  same.tables = singles.tables.const_data_ptr<int64_t>();
  same.lengths = singles.lengths.const_data_ptr<int64_t>();
  if (ids_.defined()) same.ids = ids_.const_data_ptr<int64_t>(), same.positional = 1;
  same.eps = static_cast<float>(norm.eps);
  same.q_eps = static_cast<float>(attention.q_norm.eps);
  same.norm_offset = static_cast<float>(norm.offset);
  same.q_norm_offset = static_cast<float>(attention.q_norm.offset);
  same.scale = static_cast<float>(attention.scale);
  same.softcap = static_cast<float>(attention.softcap);
  same.activation = static_cast<int>(activation);
  same.dtype = kernel_dtype(x_);
  // What all layers share.
  if (batch.page_size() != 16 || (!layers_.empty() && std::memcmp(&same, &stack_, sizeof same) != 0)) return false;
  stack_ = same;
  layers_.push_back(layer);
  return true;
}

std::unique_ptr<Tensor> DecodeStack::run(const NormView& norm) {
  if (x_.is_cpu()) {
    const Tensor y = rows_.run();
    return y.defined() ? op_rms_norm(y, norm.weight, norm.eps, norm.offset) : nullptr;
  }
  const Kernels* const kernels = kernels_for(x_);
  if (kernels == nullptr || layers_.empty()) return nullptr;
  KernelDecode stack = stack_;
  stack.layers = layers_.data();
  stack.count = static_cast<int64_t>(layers_.size());
  const Launch launch(x_);
  const Tensor x = x_.contiguous();
  stack.x = x.const_data_ptr();
  const bool norms = M_ <= kMostAtOnce && put_norm(stack.norm, norm, x_) && static_cast<float>(norm.eps) == stack.eps &&
                     static_cast<float>(norm.offset) == stack.norm_offset;
  if (!norms) stack.norm = nullptr;
  const int64_t bytes = kernels->decode_workspace(&stack);
  if (bytes == 0) return nullptr;
  Tensor y = at::empty({M_, stack.C}, x.options());
  stack.y = y.mutable_data_ptr();
  // What one launch of all layers keeps zero, a launch a product does not.
  stack.workspace = launch.lasting_zeros(M_ > kMostAtOnce ? "decode_groups" : "decode", bytes);
  check_launch(kernels->decode(&stack, launch.stream()), "decode");
  return norms ? std::make_unique<Tensor>(std::move(y)) : op_rms_norm(y, norm.weight, norm.eps, norm.offset);
}

std::unique_ptr<DecodeStack> decode_stack(const Tensor& x, const Tensor& ids) { return std::make_unique<DecodeStack>(x, ids); }

}  // namespace ferrotune
