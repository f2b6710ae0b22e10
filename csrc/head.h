// The head of a model on a chunk of rows: its scores, what they say of a label, and the gradients of both. Shared by the ops that
// go through the rows chunk by chunk (cross_entropy.cpp, log_probs.cpp).
//
// With the scores s = h W^T [n, V] in f32, z = cap(s) / T, cap(s) = c tanh(s / c) or s, p = softmax(z) and y the label:
//   loss = logsumexp(z) - z_y      ds = (p - onehot(y)) (1 - (cap(s) / c)^2)      dh = ds W      dW = ds^T h
// ds is the gradient with respect to s / T: a division by T is the caller's, who scales rows in any case.
//
// A head in 12 bits (bf12.h) is unpacked in runs of words as one in 4 bits is dequantised.
// A head in 4 bits is dequantised in runs of words, once for the scores of a chunk and once for its dh: 1.3 GB of traffic each
// at 128,256 words of 4096, 0.36 ms, beside 1.4 ms of product for 1024 rows (H200, derived). Keeping the runs' maxima and
// sums instead, so that one pass over the words does, would save half of that for a kernel more.
#pragma once

#include "ferrotune/csrc/bf12.h"
#include "ferrotune/csrc/nf4.h"

namespace ferrotune {

inline at::ScalarType accumulate_type(const Tensor& x) { return x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat; }

// How scores become logits: z = cap(s) / T.
struct Logits {
  double temperature = 1;
  double softcap = 0;  // 0 for none
};

// The matrix of the head, [V, C].
struct Head {
  // Words of a run that are dequantised or unpacked at once: 64 MiB at 4096 of 16 bits. Even C gives each run scales of its own.
  static constexpr int64_t kRun = 8192;

  Tensor dense;  // in the dtype of the products, or undefined:
  std::optional<Nf4> nf4;
  std::optional<Bf12> bf12;

  Head(const Tensor& weight, at::ScalarType dtype) {
    if (weight.defined()) dense = weight.to(dtype);
  }
  Head(const HeadView& view, at::ScalarType dtype);

  int64_t words() const { return nf4 ? nf4->rows : bf12 ? bf12->rows : dense.size(0); }

  // Calls body(first word, W of the words from there on in the dtype of x).
  template <typename Body>
  void each_run(const Tensor& x, const Body& body) const {
    if (dense.defined()) return body(0, dense);
    if (bf12) {
      for (int64_t first = 0; first < bf12->rows; first += kRun) {
        const Tensor w = at::empty({std::min(kRun, bf12->rows - first), bf12->in}, x.options().dtype(at::kBFloat16));
        unpack_rows(*bf12, first, w);
        body(first, w.to(x.scalar_type()));
      }
      return;
    }
    const int64_t run = nf4->splits_at(kRun) ? kRun : nf4->rows;
    for (int64_t first = 0; first < nf4->rows; first += run) {
      const int64_t count = std::min(run, nf4->rows - first);
      const Tensor w = at::empty({count, nf4->in}, x.options());
      dequantize_into(nf4->some_rows(first, count), w);
      body(first, w);
    }
  }
};

// Rows a chunk: on the CPU f32 logits of at most 64 MiB (they should stay near the caches), on a GPU 512 MiB and 512 rows,
// 1024 where the head must be dequantised or unpacked for each chunk.
int64_t chunk_rows(const Tensor& hidden, const Head& head);

// h W^T / T, [n, V], summed and stored in f32 (f64 for f64).
Tensor scores_of(const Tensor& hidden, const Head& head, double temperature);

struct Chunk {
  Tensor losses;  // [n]
  Tensor ds;      // [n, V] in the dtype of the products; undefined unless asked for
};

// The scores of scores_of with the rows that they are of; they are used up. Every label is a word, or (on a GPU) -100.
Chunk chunk_of(const Tensor& hidden, const Tensor& scores, const Tensor& labels, Logits logits, bool gradient);

// dh = ds W.
void head_gradient_into(const Tensor& dh, const Tensor& ds, const Head& head);
// dW += ds^T h, added in dW's own f32 where the products are 16-bit.
void add_head_gradient(Tensor& dw, const Tensor& ds, const Tensor& hidden);

// labels are those of `rows`, or of all rows of hidden where `rows` is undefined.
void check_head(const char* op, const Tensor& hidden, int64_t words, int64_t in, const Tensor& rows, const Tensor& labels);
void check_head(const char* op, const Tensor& hidden, const HeadView& head, const Tensor& rows, const Tensor& labels);

}  // namespace ferrotune
