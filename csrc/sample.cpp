#include <ATen/core/CachingHostAllocator.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include "ferrotune/csrc/kernels.h"
#include "ferrotune/csrc/ops.h"

namespace ferrotune {

std::unique_ptr<Tensor> sample(const Tensor& logits, rust::Slice<const double> params, const Tensor& tokens) {
  const int64_t n = logits.dim() == 2 ? logits.size(0) : -1;
  TORCH_CHECK(n >= 0 && logits.scalar_type() == at::kFloat && logits.is_contiguous() && static_cast<int64_t>(params.size()) == 5 * n &&
                  tokens.scalar_type() == at::kLong && tokens.sizes() == at::IntArrayRef{n} && tokens.is_contiguous() && tokens.device() == logits.device(),
              "sample: logits ", logits.sizes(), " ", logits.scalar_type(), ", ", params.size(), " params, tokens ", tokens.sizes(),
              ", expected f32 [N, V], 5 N numbers and int64 [N]");
  const Kernels* const kernels = kernels_for(logits);
  TORCH_CHECK(kernels != nullptr, "sample: only a GPU with libferrotune_kernels.so draws by itself");
  const Launch launch(logits);
  Tensor results = at::empty({2 * n}, tokens.options().device(at::kCPU).pinned_memory(true));
  check_launch(kernels->sample(logits.const_data_ptr<float>(), params.data(), tokens.mutable_data_ptr<int64_t>(), results.mutable_data_ptr<int64_t>(), n,
                               logits.size(1), launch.stream()),
               "sample");
  // Nobody is given its memory before the kernel has written there.
  const c10::Stream stream = c10::impl::VirtualGuardImpl(logits.device().type()).getStream(logits.device());
  at::getHostAllocator(logits.device().type())->record_event(results.mutable_data_ptr(), results.storage().data_ptr().get_context(), stream);
  return std::make_unique<Tensor>(std::move(results));
}

void put_words(const Tensor& to, rust::Slice<const std::int32_t> words, const Tensor& ids) {
  const int64_t count = static_cast<int64_t>(words.size()), n = ids.defined() ? ids.size(0) : 0;
  TORCH_CHECK(to.is_cuda() && to.scalar_type() == at::kLong && to.sizes() == at::IntArrayRef{count} && to.is_contiguous() && n <= count,
              "put_words: ", count, " words and ", n, " ids to ", to.sizes(), " ", to.scalar_type(), " on ", to.device());
  TORCH_CHECK(n == 0 || (ids.device() == to.device() && ids.scalar_type() == at::kLong && ids.is_contiguous()), "put_words: ids are ", ids.scalar_type(), " on ",
              ids.device());
  const Kernels* const kernels = kernels_on(to.device());
  if (kernels != nullptr && count <= KERNEL_MOST_WORDS) {
    const Launch launch(to);
    check_launch(kernels->put_words(words.data(), count, n > 0 ? ids.const_data_ptr<int64_t>() : nullptr, n, to.mutable_data_ptr<int64_t>(), launch.stream()),
                 "put_words");
    return;
  }
  const Tensor host = at::empty({count}, at::TensorOptions().dtype(at::kLong).pinned_memory(true));
  std::copy(words.begin(), words.end(), host.mutable_data_ptr<int64_t>());
  to.copy_(host, /*non_blocking=*/true);
  if (n > 0) to.narrow(0, 0, n).copy_(ids.clamp_min(0));
}

}  // namespace ferrotune
