// Keys and values in pages, and the batch of sequences that reads and extends them.
#pragma once

#include "ferrotune/csrc/attention.h"

namespace ferrotune {

// New rows of several sequences, one sequence after another, behind what each has cached. Made once a batch and shared by its
// layers. Key s of a sequence lies at position s % size of page pages[s / size].
class PagedBatch {
 public:
  struct Sequence {
    int64_t first, rows, past;  // rows of the batch, and how many keys were there before
    int64_t table;              // where its pages start
    int64_t keys() const { return past + rows; }
  };

  // Sequence i has rows[i] new rows behind past[i] cached keys; its pages, enough for both, follow those of i - 1.
  PagedBatch(rust::Slice<const std::int64_t> rows, rust::Slice<const std::int64_t> past,
             rust::Slice<const std::int32_t> pages, int64_t page_size);

  // One new row of each of many sequences, all on the device, so that a recorded graph can be launched for others: tables
  // [sequences, width], of each its pages in order, and lengths [sequences], its keys with the new one, both int64; a row of
  // length 0 belongs to no sequence. No length is over `longest`, no page over `pool`.
  PagedBatch(Tensor tables, Tensor lengths, int64_t longest, int64_t pool, int64_t page_size);

  const std::vector<Sequence>& sequences() const { return sequences_; }
  // Whether every sequence has one new row.
  bool all_single() const { return sequences_.size() == static_cast<size_t>(rows_) || sequences_.empty(); }
  int64_t rows() const { return rows_; }
  int64_t page_size() const { return page_size_; }
  // Pages that the batch may read: all below this.
  int64_t pool() const { return pool_; }
  const int32_t* pages(const Sequence& sequence) const { return pages_.data() + sequence.table; }
  // Row of the pool, its pages one after another, that key `key` has.
  int64_t slot(const Sequence& sequence, int64_t key) const {
    return pages(sequence)[key / page_size_] * page_size_ + key % page_size_;
  }
  // On the device, made at the first question, as all below: the slots of all new rows, int64 [N].
  Tensor new_slots(at::Device device) const;
  // The sequences with one new row, as the second constructor has them.
  struct Singles {
    Tensor tables, lengths;
    Tensor rows;  // int64 [n] of the batch; undefined where these are all
    int64_t longest;
  };
  const Singles& singles(at::Device device) const;

  // The rows of some of the sequences.
  struct Rows {
    int64_t first = 0, count = 0;
    Tensor places;  // int64 [count] of the batch; undefined where they stand side by side from `first` on
    Tensor of(const Tensor& x) const;
    void put(const Tensor& out, const Tensor& y) const;
  };
  // Sequences of several rows with nothing before them: their keys are their own rows.
  struct Starts {
    Rows rows;
    std::unique_ptr<Segments> segments;
  };
  // Of all others (pieces of prompts, and single rows where no kernel has them) some whose keys together take little memory.
  struct Continued {
    Rows rows;
    KeyedRows keyed;
    Tensor slots;  // int64 [keys]: of all their keys, one sequence after another
  };
  const Starts& starts(at::Device device) const;
  const std::vector<Continued>& continued(bool with_singles, at::Device device) const;

 private:
  Rows rows_of(const std::vector<const Sequence*>& some, at::Device device) const;
  Continued continued_of(const std::vector<const Sequence*>& some, at::Device device) const;

  std::vector<Sequence> sequences_;
  std::vector<int32_t> pages_;
  int64_t rows_ = 0, page_size_, pool_ = 0;
  mutable Tensor new_slots_;
  mutable std::optional<Singles> singles_;
  mutable std::optional<Starts> starts_;
  mutable std::optional<std::vector<Continued>> continued_[2];  // without single rows and with them
};

std::shared_ptr<PagedBatch> paged_batch(rust::Slice<const std::int64_t> rows, rust::Slice<const std::int64_t> past,
                                        rust::Slice<const std::int32_t> pages, std::int64_t page_size);

std::shared_ptr<PagedBatch> paged_rows(const Tensor& tables, const Tensor& lengths, std::int64_t longest, std::int64_t pool,
                                       std::int64_t page_size);

// The pool of one layer: [pages, page_size, K, D] each; undefined where there is none.
struct PagesView {
  Tensor k, v;
  std::shared_ptr<PagedBatch> batch;
};

// Fails unless the pools are those of K heads of D for x's dtype (or of 16 bits for f32 on the CPU) and device, with the batch's pages.
void check_pages(const PagesView& pages, const Tensor& x, int64_t kv_heads, int64_t dim);

// Pages of f32 or 16 bits on the CPU, as kernels/cpu reads them, beside rows of f32.
struct CpuPages {
  const PagedBatch& batch;
  const Tensor &k, &v;
  int64_t heads, kv_heads, dim;
  AttentionSpec spec;

  CpuPages(const PagesView& pages, int64_t heads, int64_t kv_heads, int64_t dim, const AttentionSpec& spec);
  // new_k and new_v [K D] of the row at `position`.
  void write(const PagedBatch::Sequence& sequence, int64_t position, const float* new_k, const float* new_v) const;
  // What the queries of one key/value head see from `position`: q and o [H D] of the row.
  void attend(const PagedBatch::Sequence& sequence, int64_t position, int64_t head, const float* q, float* o,
              std::vector<float>& scores) const;
};

// Writes k and v [N, K, D] into the pages and lets each row of q [N, H, D] attend to the keys of its sequence up to its own.
// -> [N, H*D]. On the CPU in f32 (k and v are rounded to the dtype of the pages) a row's result does not depend on the other rows. On
// a GPU one kernel takes the sequences with one new row, one call those that start, and one those that go on; `tail` columns of the result's rows are then left for the caller to write:
// [N, H*D + tail]. cos and sin [N, R/2]: of q and k that are not turned yet. Not differentiable.
Tensor attention_paged(const Tensor& q, const Tensor& k, const Tensor& v, const PagesView& pages, const AttentionSpec& spec, int64_t tail = 0,
                       const Tensor& cos = {}, const Tensor& sin = {});

// Whether attention_paged of these rows turns q and k by itself, in one launch with all else.
bool attention_turns(const Tensor& rows, const PagesView& pages, const Tensor& cos);

}  // namespace ferrotune
