// The samples of a flat batch.
#pragma once

#include <map>
#include <mutex>

#include "ferrotune/csrc/ops.h"

namespace ferrotune {

// Rows cu_seqlens[i] .. cu_seqlens[i + 1] are sample i. Made once a batch and shared by its layers: what kernels read of
// it is computed on the device at the first question and kept, without waiting, so that all of it can be recorded.
//
// Samples may begin with the same rows, which then stand in the batch once: `places` names the row of the batch of each row of the
// samples one after another, and `firsts` the first place of each row of the batch.
class Segments {
 public:
  // starts: cu_seqlens on the device, int64, its last element repeated up to a power of two of segments and one more.
  Segments(std::vector<int32_t> cu_seqlens, Tensor starts, Tensor places = {}, Tensor firsts = {});

  const std::vector<int32_t>& cu_seqlens() const { return cu_seqlens_; }
  int64_t count() const { return static_cast<int64_t>(cu_seqlens_.size()) - 1; }
  int64_t rows() const { return cu_seqlens_.back(); }
  bool shares() const { return places_.defined(); }
  int64_t batch_rows() const { return shares() ? firsts_.size(0) : rows(); }
  // int64 [rows] and [batch_rows].
  const Tensor& places() const { return places_; }
  const Tensor& firsts() const { return firsts_; }
  int64_t longest() const { return longest_; }
  bool equal() const { return equal_; }
  std::vector<int64_t> lengths() const;

  // cu_seqlens on the device: int32 [count + 1].
  Tensor device_cu_seqlens() const;

  // For kernels built for a bucket of shapes: counts rounded up, the segments added at the end empty.
  int64_t bucket_count() const { return starts_.size(0) - 1; }
  int64_t bucket_longest() const;  // a power of two, at least 128
  int64_t bucket_rows() const;     // in steps of an eighth of the next power of two
  // int32 [bucket_count].
  Tensor device_lengths() const;
  // Where the segments start in a tensor of this row stride, in elements: int64 [bucket_count + 1].
  Tensor device_offsets(int64_t row_stride) const;

 private:
  template <typename Make>
  Tensor kept(int64_t key, const Make& make) const;

  std::vector<int32_t> cu_seqlens_;
  Tensor starts_, places_, firsts_;
  int64_t longest_ = 0;
  bool equal_ = true;
  // The backward asks from threads of its own.
  mutable std::mutex mutex_;
  mutable std::map<int64_t, Tensor> kept_;
};

// places and firsts undefined: no sample shares rows.
std::shared_ptr<Segments> segments(rust::Slice<const std::int32_t> cu_seqlens, const Tensor& starts, const Tensor& places,
                                   const Tensor& firsts);

}  // namespace ferrotune
