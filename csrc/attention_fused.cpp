// Which kernel attends, forward and backward. In order of preference:
//   softcap        own kernels (kernels/attention_softcap.cu)   16-bit, D = 64, 128, 256, sm_80
//   cuDNN          ATen's, one graph a shape                     16-bit, sm_90, no window, segments of one length
//   packed cuDNN   csrc/cuda, one graph a bucket of shapes       16-bit, sm_90 (Hopper), no window
//   flash          FlashAttention-2 (arXiv:2307.08691) in ATen   16-bit, sm_80
//   efficient      memory-efficient attention in ATen            f32, and f16 on sm_75
//   formula        what is left: f64, softcap in f32, other head sizes
// No copy is made on the way in: all take heads side by side in wider rows, but `efficient`, which knows no groups.
#include <ATen/Context.h>
#include <ATen/ops/_efficient_attention_backward.h>
#include <ATen/ops/_efficient_attention_forward.h>
#include <ATen/ops/_flash_attention_backward.h>
#include <ATen/ops/_flash_attention_forward.h>
#include <ATen/ops/_scaled_dot_product_cudnn_attention.h>
#include <ATen/ops/_scaled_dot_product_cudnn_attention_backward.h>
#include <dlfcn.h>

#include "ferrotune/csrc/attention.h"
#include "ferrotune/csrc/cuda_library.h"
#include "ferrotune/csrc/kernels.h"

namespace ferrotune {

namespace {

enum class Path { Softcap, Cudnn, Flash, Efficient, Formula };

// 10 major + minor. libtorch_cpu has loaded the CUDA run time.
int compute_capability(const Tensor& x) {
  // cudaDeviceAttr: cudaDevAttrComputeCapabilityMajor and Minor.
  constexpr int kMajorAttribute = 75, kMinorAttribute = 76;
  static const auto attribute =
      reinterpret_cast<int (*)(int*, int, int)>(dlsym(RTLD_DEFAULT, "cudaDeviceGetAttribute"));
  int major = 0, minor = 0;
  TORCH_CHECK(attribute && attribute(&major, kMajorAttribute, x.get_device()) == 0 &&
                  attribute(&minor, kMinorAttribute, x.get_device()) == 0,
              "attention: the compute capability of ", x.device(), " is unknown");
  return 10 * major + minor;
}

// A cuDNN graph is built for each length, forward and backward: only for lengths that come again.
constexpr int64_t kDenseMultiple = 256;

bool dense(const Segments& segments) { return segments.equal() && segments.longest() % kDenseMultiple == 0; }

Path path_of(const Tensor& q, const Segments& segments, const AttentionSpec& spec) {
  if (!q.is_cuda() || q.scalar_type() == at::kDouble) return Path::Formula;
  const int64_t dim = q.size(2), longest = segments.longest();
  const int capability = compute_capability(q);
  const bool sixteen_bit = q.scalar_type() != at::kFloat;
  if (spec.softcap > 0) {
    const bool fits = sixteen_bit && capability >= 80 && (dim == 64 || dim == 128 || dim == 256);
    return fits && kernels_for(q) ? Path::Softcap : Path::Formula;
  }
  if (dim % 8 != 0) return Path::Formula;
  if (!sixteen_bit || capability < 80) return Path::Efficient;
  const bool windowed = spec.window > 0 && spec.window < longest;
  // cuDNN's backward adds in no fixed order; that of flash attention has a fixed one where it is asked for.
  const bool cudnn = cuda_library() != nullptr && capability >= 90 && dim <= (capability == 90 ? 256 : 128) &&
                     !windowed && longest > 1 && !at::globalContext().deterministicAlgorithms();
  if (cudnn && (dense(segments) || (capability == 90 && dim % 16 == 0))) return Path::Cudnn;
  return dim <= 256 ? Path::Flash : Path::Formula;
}

// dq, dk and dv, where they are wanted or as a kernel made them.
struct Gradients {
  Tensor dq, dk, dv;
};

// Kernels read 16 bytes at a time. Rows of a projection lie so; others are copied.
Tensor aligned(const Tensor& x) {
  const int64_t elements = 16 / x.element_size();
  const bool fits = x.stride(2) == 1 && x.stride(1) % elements == 0 && x.stride(0) % elements == 0 &&
                    reinterpret_cast<uintptr_t>(x.const_data_ptr()) % 16 == 0;
  return fits || x.size(2) % elements != 0 ? x : x.contiguous();
}

// [N, heads, D] as [B, T, heads, D].
Tensor by_segment(const Tensor& x, const Segments& segments) {
  return x.unflatten(0, {segments.count(), segments.longest()});
}

// ---- softcap

KernelAttention softcap_operands(const TokenRows& q, const TokenRows& k, const TokenRows& v, const Tensor& cu_seqlens,
                                 const Segments& segments, const AttentionSpec& spec) {
  KernelAttention operands{};
  operands.q = q.x.const_data_ptr();
  operands.k = k.x.const_data_ptr();
  operands.v = v.x.const_data_ptr();
  operands.cu_seqlens = cu_seqlens.const_data_ptr<int32_t>();
  operands.N = q.x.size(0);
  operands.H = q.x.size(1);
  operands.K = k.x.size(1);
  operands.D = q.x.size(2);
  operands.q_stride = q.stride;
  operands.k_stride = k.stride;
  operands.v_stride = v.stride;
  operands.segments = segments.count();
  operands.longest = segments.longest();
  operands.window = spec.window;
  operands.scale = static_cast<float>(spec.scale);
  operands.softcap = static_cast<float>(spec.softcap);
  operands.dtype = kernel_dtype(q.x);
  return operands;
}

Attended softcap_forward(const Tensor& q, const Tensor& k, const Tensor& v, const Segments& segments,
                         const AttentionSpec& spec) {
  const Launch launch(q);
  const TokenRows rows_q(q), rows_k(k), rows_v(v);
  const Tensor cu = segments.device_cu_seqlens();
  Attended result{at::empty(q.sizes(), q.options()),
                  at::empty({q.size(1), q.size(0)}, q.options().dtype(at::kFloat))};
  const KernelAttention operands = softcap_operands(rows_q, rows_k, rows_v, cu, segments, spec);
  check_launch(kernels_for(q)->attention_softcap_forward(&operands, result.out.mutable_data_ptr(),
                                                         result.lse.mutable_data_ptr<float>(), launch.stream()),
               "attention_softcap_forward");
  return result;
}

void softcap_backward(const Tensor& dout, const Tensor& q, const Tensor& k, const Tensor& v,
                      const Attended& attended, const Segments& segments, const AttentionSpec& spec,
                      const Gradients& to) {
  const Launch launch(q);
  const TokenRows rows_q(q), rows_k(k), rows_v(v);
  const Tensor cu = segments.device_cu_seqlens();
  const Tensor delta = at::empty_like(attended.lse);
  const KernelAttention operands = softcap_operands(rows_q, rows_k, rows_v, cu, segments, spec);
  check_launch(kernels_for(q)->attention_softcap_backward(
                   &operands, dout.const_data_ptr(), attended.out.const_data_ptr(),
                   attended.lse.const_data_ptr<float>(), delta.mutable_data_ptr<float>(), to.dq.mutable_data_ptr(),
                   to.dk.mutable_data_ptr(), to.dv.mutable_data_ptr(), to.dq.stride(0), to.dk.stride(0),
                   to.dv.stride(0), launch.stream()),
               "attention_softcap_backward");
}

// ---- cuDNN

// cuDNN 9.19 adds up dq, and dk before the groups are summed, in a workspace: of segments padded to the longest, or of
// rows packed as in dq. The second is wrong where the rows of dq and dk are not as far apart as those of q and k, so it is
// only for batches whose padding is much.
bool padding_is_little(const Segments& segments) {
  return segments.bucket_count() * segments.bucket_longest() <= 4 * segments.rows();
}

AttentionShape attention_shape(const Segments& segments, const AttentionSpec& spec) {
  if (dense(segments)) return AttentionShape{segments.count(), Tensor(), segments.longest(), 0, spec.scale};
  const int64_t tokens = padding_is_little(segments) ? 0 : segments.bucket_rows();
  return AttentionShape{segments.bucket_count(), segments.device_lengths(), segments.bucket_longest(), tokens, spec.scale};
}

// The rows of x, with where segments start if the kernel cannot know.
AttentionRows attention_rows(const Tensor& x, const Segments& segments) {
  return {x, dense(segments) ? Tensor() : segments.device_offsets(x.stride(0))};
}

Attended cudnn_forward(const Tensor& q, const Tensor& k, const Tensor& v, const Segments& segments,
                       const AttentionSpec& spec) {
  const c10::DeviceGuard guard(q.device());
  Attended result{at::empty(q.sizes(), q.options()), at::empty({q.size(0), q.size(1)}, q.options().dtype(at::kFloat))};
  const auto rows = [&](const Tensor& x) { return attention_rows(x, segments); };
  cuda_library()->cudnn_attention_forward(attention_shape(segments, spec), rows(q), rows(k), rows(v),
                                           rows(result.out), rows(result.lse));
  return result;
}

void cudnn_backward(const Tensor& dout, const Tensor& q, const Tensor& k, const Tensor& v, const Attended& attended,
                    const Segments& segments, const AttentionSpec& spec, const Gradients& to) {
  const c10::DeviceGuard guard(q.device());
  const auto rows = [&](const Tensor& x) { return attention_rows(x, segments); };
  const auto written = [&](const Tensor& wanted, const Tensor& x) {
    if (dense(segments) || padding_is_little(segments) || wanted.stride(0) == x.stride(0)) return wanted;
    return at::empty_strided(x.sizes(), x.strides(), x.options());
  };
  const Tensor dq = written(to.dq, q), dk = written(to.dk, k);
  cuda_library()->cudnn_attention_backward(attention_shape(segments, spec), rows(dout), rows(q), rows(k), rows(v),
                                            rows(attended.out), rows(attended.lse), rows(dq), rows(dk), rows(to.dv));
  if (!dq.is_same(to.dq)) to.dq.copy_(dq);
  if (!dk.is_same(to.dk)) to.dk.copy_(dk);
}

// ---- ATen's kernels

std::optional<c10::SymInt> left_of(const AttentionSpec& spec) {
  return spec.window > 0 ? std::optional<c10::SymInt>(spec.window - 1) : std::nullopt;
}
std::optional<c10::SymInt> right_of(const AttentionSpec& spec) {
  return spec.window > 0 ? std::optional<c10::SymInt>(0) : std::nullopt;
}

// State of a dropout that does not happen.
Tensor no_philox(const Tensor& q) { return at::empty({2}, q.options().dtype(at::kLong)); }

Attended flash_forward(const Tensor& q, const Tensor& k, const Tensor& v, const Segments& segments,
                       const AttentionSpec& spec) {
  const int64_t longest = segments.longest();
  if (segments.equal()) {
    const auto result = at::_flash_attention_forward_symint(
        by_segment(q, segments), by_segment(k, segments), by_segment(v, segments), {}, {}, longest, longest, 0.0, true,
        false, spec.scale, left_of(spec), right_of(spec));
    return {std::get<0>(result).flatten(0, 1), std::get<1>(result)};
  }
  const Tensor cu = segments.device_cu_seqlens();
  const auto result = at::_flash_attention_forward_symint(q, k, v, cu, cu, longest, longest, 0.0, true, false,
                                                          spec.scale, left_of(spec), right_of(spec));
  return {std::get<0>(result), std::get<1>(result)};
}

Gradients flash_backward(const Tensor& dout, const Tensor& q, const Tensor& k, const Tensor& v,
                         const Attended& attended, const Segments& segments,
                         const AttentionSpec& spec) {
  const int64_t longest = segments.longest();
  const bool equal = segments.equal();
  const Tensor cu = equal ? Tensor() : segments.device_cu_seqlens();
  const auto rows = [&](const Tensor& x) { return equal ? by_segment(x, segments) : x; };
  const auto [dq, dk, dv] = at::_flash_attention_backward_symint(
      rows(dout), rows(q), rows(k), rows(v), rows(attended.out), attended.lse, cu, cu, longest, longest, 0.0, true,
      no_philox(q), no_philox(q), spec.scale, left_of(spec), right_of(spec));
  if (!equal) return {dq, dk, dv};
  return {dq.flatten(0, 1), dk.flatten(0, 1), dv.flatten(0, 1)};
}

// 1 is the causal mask from the top left.
constexpr int64_t kCausal = 1;

std::optional<int64_t> window_of(const AttentionSpec& spec) {
  return spec.window > 0 ? std::optional<int64_t>(spec.window) : std::nullopt;
}

// [N, K, D] -> [N, H, D]: each key/value head beside itself once for each query head it serves.
Tensor every_head(const Tensor& kv, int64_t heads) {
  if (kv.size(1) == heads) return kv;
  return kv.unsqueeze(2).expand({-1, -1, heads / kv.size(1), -1}).flatten(1, 2);
}

// Packed batches as one row of segments, [1, N, H, D].
Attended efficient_forward(const Tensor& q, const Tensor& k, const Tensor& v, const Segments& segments,
                           const AttentionSpec& spec) {
  const Tensor cu = segments.device_cu_seqlens();
  const auto result = at::_efficient_attention_forward(
      q.unsqueeze(0), every_head(k, q.size(1)).unsqueeze(0), every_head(v, q.size(1)).unsqueeze(0), {}, cu, cu,
      segments.longest(), segments.longest(), 0.0, kCausal, true, spec.scale, {}, window_of(spec));
  return {std::get<0>(result).squeeze(0), std::get<1>(result)};
}

Gradients efficient_backward(const Tensor& dout, const Tensor& q, const Tensor& k, const Tensor& v,
                             const Attended& attended, const Segments& segments,
                             const AttentionSpec& spec) {
  const Tensor cu = segments.device_cu_seqlens();
  const auto [dq, dk, dv, dbias] = at::_efficient_attention_backward(
      dout.unsqueeze(0), q.unsqueeze(0), every_head(k, q.size(1)).unsqueeze(0), every_head(v, q.size(1)).unsqueeze(0),
      {}, attended.out.unsqueeze(0), cu, cu, segments.longest(), segments.longest(), attended.lse, 0.0, no_philox(q),
      no_philox(q), kCausal, false, spec.scale, {}, window_of(spec));
  const auto by_group = [&](const Tensor& x) {
    const Tensor all = x.squeeze(0);
    if (k.size(1) == q.size(1)) return all;
    return all.unflatten(1, {k.size(1), q.size(1) / k.size(1)}).sum(2);
  };
  return {dq.squeeze(0), by_group(dk), by_group(dv)};
}

// Writes what ATen allocated to where it is wanted.
void give(const Gradients& made, const Gradients& to) {
  to.dq.copy_(made.dq);
  to.dk.copy_(made.dk);
  to.dv.copy_(made.dv);
}

Attended by_path(Path path, const Tensor& given_q, const Tensor& given_k, const Tensor& given_v,
                 const Segments& segments, const AttentionSpec& spec) {
  const Tensor q = aligned(given_q), k = aligned(given_k), v = aligned(given_v);
  const auto joined = [](const Attended& attended) { return Attended{attended.out.flatten(1, 2), attended.lse}; };
  switch (path) {
    case Path::Softcap:
      return joined(softcap_forward(q, k, v, segments, spec));
    case Path::Cudnn:
      return joined(cudnn_forward(q, k, v, segments, spec));
    case Path::Flash:
      return joined(flash_forward(q, k, v, segments, spec));
    case Path::Efficient:
      return joined(efficient_forward(q, k, v, segments, spec));
    case Path::Formula:
      break;
  }
  return attention_formula(q, k, v, segments, spec);
}

// cuDNN and FlashAttention-2 add up gradients in f32 or for each query head before they write them, in about 8 D bytes a token and
// head. So that this does not grow without bound, groups of heads go one after the other: 2 groups take 0.6 % longer at 2 x 2048
// (32 heads of 128, an H200), 8 groups 1.2 % longer than 2 at 1 x 16,384.
int64_t head_groups(Path path, const Tensor& q, const Tensor& k) {
  constexpr int64_t kMostBytes = 256 << 20;
  if (path != Path::Cudnn && path != Path::Flash) return 1;
  int64_t groups = 1;
  while (8 * q.numel() > groups * kMostBytes && k.size(1) % (2 * groups) == 0) groups *= 2;
  return groups;
}

// The log-sum-exp of some heads, as the forward would have made it of these alone.
Tensor lse_of_heads(Path path, const Tensor& lse, int64_t first, int64_t count, const Segments& segments) {
  if (path == Path::Flash) return lse.narrow(segments.equal() ? 1 : 0, first, count).contiguous();
  if (!dense(segments)) return lse.narrow(1, first, count);
  const Tensor by_head = lse.view({segments.count(), lse.size(1), segments.longest()});
  return by_head.narrow(1, first, count).contiguous().view({lse.size(0), count});
}

void backward_by_path(Path path, const Tensor& dout, const Tensor& q, const Tensor& k, const Tensor& v, const Attended& attended,
                      const Segments& segments, const AttentionSpec& spec, const Gradients& to) {
  switch (path) {
    case Path::Softcap:
      return softcap_backward(dout, q, k, v, attended, segments, spec, to);
    case Path::Cudnn:
      return cudnn_backward(dout, q, k, v, attended, segments, spec, to);
    case Path::Flash:
      return give(flash_backward(dout, q, k, v, attended, segments, spec), to);
    case Path::Efficient:
      return give(efficient_backward(dout, q, k, v, attended, segments, spec), to);
    case Path::Formula:
      break;
  }
  const Attended rows{attended.out.flatten(1, 2), attended.lse};
  attention_formula_backward(dout, q, k, v, rows, segments, spec, to.dq, to.dk, to.dv);
}

}  // namespace

Attended attention_fused(const Tensor& q, const Tensor& k, const Tensor& v, const Segments& segments,
                         const AttentionSpec& spec) {
  return by_path(path_of(q, segments, spec), q, k, v, segments, spec);
}

// A cuDNN graph of a new length takes longer to build (23 to 37 ms have been measured) than a prompt to read.
Attended attention_fused_of_any_length(const Tensor& q, const Tensor& k, const Tensor& v, const Segments& segments,
                                       const AttentionSpec& spec) {
  const Path path = path_of(q, segments, spec);
  return by_path(path == Path::Cudnn ? Path::Flash : path, q, k, v, segments, spec);
}

Tensor flash_behind(const Tensor& given_q, const Tensor& given_k, const Tensor& given_v, const KeyedRows& keyed,
                    const AttentionSpec& spec) {
  const int64_t dim = given_q.size(2);
  const bool fits = given_q.is_cuda() && at::elementSize(given_q.scalar_type()) == 2 && spec.softcap == 0 && dim % 8 == 0 &&
                    dim <= 256 && compute_capability(given_q) >= 80;
  if (!fits) return {};
  const Tensor q = aligned(given_q), k = aligned(given_k), v = aligned(given_v);
  // Causal from the bottom right: the last query sees the last key.
  const auto result = at::_flash_attention_forward_symint(q, k, v, keyed.cu_rows, keyed.cu_keys, keyed.longest_rows,
                                                          keyed.longest_keys, 0.0, true, false, spec.scale, left_of(spec),
                                                          right_of(spec));
  return std::get<0>(result).flatten(1, 2);
}

void attention_fused_backward(const Tensor& d_out, const Tensor& given_q, const Tensor& given_k, const Tensor& given_v,
                              const Attended& attended, const Segments& segments, const AttentionSpec& spec,
                              const Tensor& dq, const Tensor& dk, const Tensor& dv) {
  const Tensor q = aligned(given_q), k = aligned(given_k), v = aligned(given_v);
  const Tensor dout = d_out.contiguous().view(q.sizes()), out = attended.out.view(q.sizes());
  const Path path = path_of(q, segments, spec);
  const int64_t groups = head_groups(path, q, k), heads = q.size(1) / groups, kv_heads = k.size(1) / groups;
  if (groups == 1) return backward_by_path(path, dout, q, k, v, {out, attended.lse}, segments, spec, {dq, dk, dv});
  for (int64_t g = 0; g < groups; ++g) {
    const auto some = [&](const Tensor& x) { return x.narrow(1, g * heads, heads); };
    const auto some_kv = [&](const Tensor& x) { return x.narrow(1, g * kv_heads, kv_heads); };
    const Tensor lse = lse_of_heads(path, attended.lse, g * heads, heads, segments);
    backward_by_path(path, some(dout), some(q), some_kv(k), some_kv(v), {some(out), lse}, segments, spec,
                     {some(dq), some_kv(dk), some_kv(dv)});
  }
}

}  // namespace ferrotune
