#include "ferrotune/csrc/kernels.h"
#include "ferrotune/csrc/ops.h"

namespace ferrotune {

void sample(const Tensor& logits, const Tensor& params, const Tensor& tokens, const Tensor& logprobs) {
  const int64_t n = logits.dim() == 2 ? logits.size(0) : -1;
  const auto is = [&](const Tensor& x, at::ScalarType type, at::IntArrayRef sizes) {
    return x.scalar_type() == type && x.sizes() == sizes && x.is_contiguous() && x.device() == logits.device();
  };
  TORCH_CHECK(n >= 0 && is(logits, at::kFloat, logits.sizes()) && is(params, at::kDouble, {n, 5}) && is(tokens, at::kLong, {n}) &&
                  is(logprobs, at::kFloat, {2, n}),
              "sample: logits ", logits.sizes(), " ", logits.scalar_type(), ", params ", params.sizes(), ", tokens ",
              tokens.sizes(), ", logprobs ", logprobs.sizes(), ", expected f32 [N, V], f64 [N, 5], int64 [N] and f32 [2, N]");
  const Kernels* const kernels = kernels_for(logits);
  TORCH_CHECK(kernels != nullptr, "sample: only a GPU with libferrotune_kernels.so draws by itself");
  const Launch launch(logits);
  check_launch(kernels->sample(logits.const_data_ptr<float>(), params.const_data_ptr<double>(), tokens.mutable_data_ptr<int64_t>(),
                               logprobs.mutable_data_ptr<float>(), logprobs.mutable_data_ptr<float>() + n, n, logits.size(1), launch.stream()),
               "sample");
}

}  // namespace ferrotune
