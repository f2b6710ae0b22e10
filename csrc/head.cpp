#include "ferrotune/csrc/head.h"

#include "ferrotune/csrc/cpu.h"
#include "ferrotune/csrc/kernels.h"
#include "ferrotune/src/ffi.rs.h"

namespace ferrotune {

int64_t chunk_rows(const Tensor& hidden, const Head& head) {
  const int64_t row = 4 * head.words();
  if (hidden.is_cuda()) return std::clamp<int64_t>((int64_t{1} << 29) / row, 1, head.dense.defined() ? 512 : 1024);
  return std::max<int64_t>(16, (int64_t{1} << 26) / row);
}

Tensor scores_of(const Tensor& hidden, const Head& head, double temperature) {
  const Tensor scores = at::empty({hidden.size(0), head.words()}, hidden.options().dtype(accumulate_type(hidden)));
  head.each_run(hidden, [&](int64_t first, const Tensor& w) {
    product_as(scores.narrow(1, first, w.size(0)), hidden, w.t(), 1 / temperature, false);
  });
  return scores;
}

void head_gradient_into(const Tensor& dh, const Tensor& ds, const Head& head) {
  if (head.dense.defined()) return product_into(dh, ds, head.dense, 1, false);
  const Tensor sum = at::empty(dh.sizes(), dh.options().dtype(accumulate_type(dh)));
  head.each_run(dh, [&](int64_t first, const Tensor& w) {
    product_as(sum, ds.narrow(1, first, w.size(0)), w, 1, first > 0);
  });
  dh.copy_(sum);
}

namespace {

Chunk chunk_formula(const Tensor& scores, const Tensor& labels, double softcap, bool gradient, at::ScalarType dtype) {
  Tensor z = scores;
  if (softcap > 0) z.div_(softcap).tanh_().mul_(softcap);
  const Tensor y = labels.unsqueeze(1);
  // Not z - logsumexp(z): that rounds at the size of the largest logit, and p - 1 of a confident row drowns in it.
  Tensor log_p = at::log_softmax(z, 1);
  Chunk chunk{log_p.gather(1, y).neg_().squeeze(1), Tensor()};
  if (!gradient) return chunk;
  Tensor slope;
  if (softcap > 0) slope = z.div(softcap).square_().neg_().add_(1);
  Tensor dz = log_p.exp_();
  dz.scatter_add_(1, y, at::full({z.size(0), 1}, -1, dz.options()));
  if (slope.defined()) dz.mul_(slope);
  chunk.ds = dz.to(dtype);
  return chunk;
}

// ds replaces scores in its memory: a view of it whose rows are 4 V bytes apart.
Chunk chunk_kernel(const Kernels& kernels, const Tensor& scores, const Tensor& labels, double softcap, bool gradient,
                   const Tensor& hidden) {
  const Launch launch(scores);
  const int64_t n = scores.size(0), vocab = scores.size(1);
  Chunk chunk{at::empty({n}, scores.options()), Tensor()};
  check_launch(kernels.cross_entropy(scores.mutable_data_ptr<float>(), labels.const_data_ptr<int64_t>(),
                                     chunk.losses.mutable_data_ptr<float>(), n, vocab, static_cast<float>(softcap),
                                     gradient, kernel_dtype(hidden), launch.stream()),
               "cross_entropy");
  if (gradient) chunk.ds = scores.view(hidden.scalar_type()).narrow(1, 0, vocab);
  return chunk;
}

// ds replaces scores.
Chunk chunk_cpu(const CpuKernels& kernels, const Tensor& scores, const Tensor& labels, double softcap) {
  const int64_t vocab = scores.size(1);
  const Tensor y = labels.contiguous();
  const Chunk chunk{at::empty({scores.size(0)}, scores.options()), scores};
  cpu_rows(scores.size(0), 8 * vocab, [&](int64_t begin, int64_t end) {
    kernels.cross_entropy(end - begin, vocab, scores.mutable_data_ptr<float>() + begin * vocab,
                          y.const_data_ptr<int64_t>() + begin, static_cast<float>(softcap),
                          chunk.losses.mutable_data_ptr<float>() + begin);
  });
  return chunk;
}

}  // namespace

Chunk chunk_of(const Tensor& hidden, const Tensor& scores, const Tensor& labels, Logits logits, bool gradient) {
  // cap_c(s) / T = cap_{c / T}(s / T).
  const double softcap = logits.softcap / logits.temperature;
  if (const Kernels* kernels = kernels_for(hidden)) {
    return chunk_kernel(*kernels, scores, labels, softcap, gradient, hidden);
  }
  if (const CpuKernels* kernels = cpu_kernels_for(scores); kernels != nullptr && hidden.scalar_type() == at::kFloat) {
    return chunk_cpu(*kernels, scores, labels, softcap);
  }
  return chunk_formula(scores, labels, softcap, gradient, hidden.scalar_type());
}

void add_head_gradient(Tensor& dw, const Tensor& ds, const Tensor& hidden) {
  if (dw.scalar_type() == hidden.scalar_type()) {
    product_into(dw, ds.t(), hidden, 1, true);
  } else if (hidden.is_cuda()) {
    at::addmm_out(dw, dw, ds.t(), hidden, at::kFloat);
  } else {
    dw.add_(at::mm(ds.t(), hidden));
  }
}

Head::Head(const HeadView& view, at::ScalarType dtype) : Head(view.weight, dtype) {
  if (dense.defined()) return;
  view.bf12.rows > 0 ? void(bf12.emplace(view.bf12)) : void(nf4.emplace(view.nf4));
}

void check_head(const char* op, const Tensor& hidden, int64_t words, int64_t in, const Tensor& rows, const Tensor& labels) {
  const int64_t expected = rows.defined() ? rows.size(0) : hidden.size(0);
  TORCH_CHECK(hidden.dim() == 2 && hidden.size(1) == in && labels.dim() == 1 && labels.size(0) == expected && labels.scalar_type() == at::kLong, op,
              ": hidden is ", hidden.sizes(), ", weight is [", words, ", ", in, "], labels is ", labels.sizes(),
              ", expected [N, C], [V, C] and int64 [", expected, "]");
}

void check_head(const char* op, const Tensor& hidden, const HeadView& head, const Tensor& rows, const Tensor& labels) {
  if (const Tensor& weight = head.weight; weight.defined()) {
    TORCH_CHECK(weight.dim() == 2, op, ": weight is ", weight.sizes(), ", expected [V, C]");
    return check_head(op, hidden, weight.size(0), weight.size(1), rows, labels);
  }
  const bool bf12 = head.bf12.rows > 0;
  check_head(op, hidden, bf12 ? head.bf12.rows : head.nf4.rows, bf12 ? head.bf12.in_features : head.nf4.in_features, rows, labels);
}

}  // namespace ferrotune
