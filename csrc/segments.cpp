#include "ferrotune/csrc/segments.h"

namespace ferrotune {

namespace {

int64_t power_of_two_from(int64_t n) {
  int64_t power = 1;
  while (power < n) power *= 2;
  return power;
}

// Keys of what is kept, beside row strides.
constexpr int64_t kCuSeqlens = -1, kLengths = -2;

}  // namespace

Segments::Segments(std::vector<int32_t> cu_seqlens, Tensor starts, Tensor places, Tensor firsts)
    : cu_seqlens_(std::move(cu_seqlens)), starts_(std::move(starts)), places_(std::move(places)), firsts_(std::move(firsts)) {
  TORCH_CHECK(cu_seqlens_.size() >= 2 && cu_seqlens_.front() == 0,
              "attention: cu_seqlens must begin with 0 and name the end of at least one segment");
  TORCH_CHECK(starts_.scalar_type() == at::kLong && bucket_count() >= count(), "attention: starts is ", starts_.sizes());
  TORCH_CHECK(!shares() || places_.size(0) == rows(), "attention: ", places_.sizes(), " places of ", rows(), " rows");
  int64_t shortest = cu_seqlens_.back();
  for (int64_t s = 0; s < count(); ++s) {
    const int64_t length = cu_seqlens_[s + 1] - cu_seqlens_[s];
    TORCH_CHECK(length > 0, "attention: segment ", s, " is empty");
    longest_ = std::max(longest_, length);
    shortest = std::min(shortest, length);
  }
  equal_ = longest_ == shortest;
}

std::vector<int64_t> Segments::lengths() const {
  std::vector<int64_t> lengths;
  for (int64_t s = 0; s < count(); ++s) lengths.push_back(cu_seqlens_[s + 1] - cu_seqlens_[s]);
  return lengths;
}

template <typename Make>
Tensor Segments::kept(int64_t key, const Make& make) const {
  const std::lock_guard lock(mutex_);
  Tensor& tensor = kept_[key];
  if (!tensor.defined()) tensor = make();
  return tensor;
}

Tensor Segments::device_cu_seqlens() const {
  return kept(kCuSeqlens, [&] { return starts_.narrow(0, 0, count() + 1).to(at::kInt); });
}

int64_t Segments::bucket_longest() const { return std::max<int64_t>(128, power_of_two_from(longest_)); }

int64_t Segments::bucket_rows() const {
  const int64_t step = std::max<int64_t>(128, power_of_two_from(rows()) / 8);
  return (rows() + step - 1) / step * step;
}

Tensor Segments::device_lengths() const {
  return kept(kLengths, [&] {
    return (starts_.narrow(0, 1, bucket_count()) - starts_.narrow(0, 0, bucket_count())).to(at::kInt);
  });
}

Tensor Segments::device_offsets(int64_t row_stride) const {
  return kept(row_stride, [&] { return starts_ * row_stride; });
}

std::shared_ptr<Segments> segments(rust::Slice<const std::int32_t> cu_seqlens, const Tensor& starts, const Tensor& places,
                                   const Tensor& firsts) {
  return std::make_shared<Segments>(std::vector<int32_t>(cu_seqlens.begin(), cu_seqlens.end()), starts, places, firsts);
}

}  // namespace ferrotune
