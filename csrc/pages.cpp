// Attention over paged keys and values (arXiv:2309.06180): the CPU's kernel for f32, and the formula for the rest, which
// copies a sequence's pages together. A kernel that reads the pages where they lie takes that formula's place.
#include "ferrotune/csrc/pages.h"

#include "ferrotune/csrc/cpu.h"
#include "ferrotune/csrc/kernels.h"
#include "ferrotune/csrc/rows.h"

namespace ferrotune {

PagedBatch::PagedBatch(rust::Slice<const std::int64_t> rows, rust::Slice<const std::int64_t> past,
                       rust::Slice<const std::int32_t> pages, int64_t page_size)
    : pages_(pages.begin(), pages.end()), page_size_(page_size) {
  TORCH_CHECK(!rows.empty() && rows.size() == past.size() && page_size > 0, "paged batch: ", rows.size(), " sequences, ",
              past.size(), " lengths, pages of ", page_size);
  int64_t table = 0;
  for (size_t i = 0; i < rows.size(); ++i) {
    TORCH_CHECK(rows[i] > 0 && past[i] >= 0, "paged batch: sequence ", i, " has ", rows[i], " rows behind ", past[i]);
    sequences_.push_back({rows_, rows[i], past[i], table});
    rows_ += rows[i];
    table += (past[i] + rows[i] + page_size - 1) / page_size;
  }
  TORCH_CHECK(table == static_cast<int64_t>(pages_.size()), "paged batch: ", pages_.size(), " pages, expected ", table);
  for (const int32_t page : pages_) {
    TORCH_CHECK(page >= 0, "paged batch: page ", page);
    pool_ = std::max<int64_t>(pool_, page + 1);
  }
  key_slots_.resize(sequences_.size());
}

Tensor PagedBatch::new_slots(at::Device device) const {
  if (!new_slots_.defined()) {
    std::vector<int64_t> slots;
    for (const Sequence& sequence : sequences_) {
      for (int64_t key = sequence.past; key < sequence.keys(); ++key) slots.push_back(slot(sequence, key));
    }
    new_slots_ = at::tensor(slots, at::kLong).to(device);
  }
  return new_slots_;
}

Tensor PagedBatch::key_slots(size_t index, at::Device device) const {
  Tensor& kept = key_slots_[index];
  if (!kept.defined()) {
    std::vector<int64_t> slots;
    for (int64_t key = 0; key < sequences_[index].keys(); ++key) slots.push_back(slot(sequences_[index], key));
    kept = at::tensor(slots, at::kLong).to(device);
  }
  return kept;
}

std::shared_ptr<PagedBatch> paged_batch(rust::Slice<const std::int64_t> rows, rust::Slice<const std::int64_t> past,
                                        rust::Slice<const std::int32_t> pages, std::int64_t page_size) {
  return std::make_shared<PagedBatch>(rows, past, pages, page_size);
}

namespace {

// f32 on the CPU, by kernels/cpu/rows.h: each row and key/value head by itself.
Tensor by_cpu_kernel(const Tensor& given_q, const Tensor& given_k, const Tensor& given_v, const PagesView& pages,
                     const AttentionSpec& spec) {
  const CpuKernels& kernels = *cpu_kernels();
  const PagedBatch& batch = *pages.batch;
  const TokenRows q_rows(given_q), k_rows(given_k), v_rows(given_v);
  const int64_t n = q_rows.x.size(0), heads = q_rows.x.size(1), dim = q_rows.x.size(2), kv_heads = k_rows.x.size(1);
  const int64_t width = kv_heads * dim, group = heads / kv_heads;
  const Tensor out = at::empty({n, heads * dim}, given_q.options());
  float *const ks = pages.k.mutable_data_ptr<float>(), *const vs = pages.v.mutable_data_ptr<float>();
  float* const to = out.mutable_data_ptr<float>();
  const float *const q = q_rows.x.const_data_ptr<float>(), *const k = k_rows.x.const_data_ptr<float>();
  const float* const v = v_rows.x.const_data_ptr<float>();
  std::vector<std::pair<const PagedBatch::Sequence*, int64_t>> rows;  // of the batch: the sequence, and the row's place in it
  int64_t keys = 0;
  for (const PagedBatch::Sequence& sequence : batch.sequences()) {
    for (int64_t row = 0; row < sequence.rows; ++row) {
      const int64_t at = batch.slot(sequence, sequence.past + row) * width, from = sequence.first + row;
      std::copy_n(k + from * k_rows.stride, width, ks + at);
      std::copy_n(v + from * v_rows.stride, width, vs + at);
      rows.emplace_back(&sequence, sequence.past + row);
      keys += spec.window > 0 ? std::min(spec.window, sequence.past + row + 1) : sequence.past + row + 1;
    }
  }
  const auto part = [&](int64_t begin, int64_t end) {
    std::vector<float> scores;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t row = task / kv_heads, head = task % kv_heads;
      const auto& [sequence, position] = rows[row];
      const int64_t low = spec.window > 0 ? std::max<int64_t>(0, position + 1 - spec.window) : 0;
      scores.resize(std::max<size_t>(scores.size(), 2 * (position + 1 - low + 16)));
      kernels.paged_attention({q + row * q_rows.stride + head * group * dim, ks + head * dim, vs + head * dim,
                               batch.pages(*sequence), batch.page_size(), width, low, position + 1, dim, group,
                               static_cast<float>(spec.scale), static_cast<float>(spec.softcap)},
                              to + (row * heads + head * group) * dim, scores.data());
    }
  };
  const int64_t tasks = n * kv_heads, task_work = std::max<int64_t>(1, 2 * group * dim * keys / n);
  tasks * task_work < 2 * kRowThreadWork
      ? part(0, tasks)
      : at::parallel_for(0, tasks, std::max<int64_t>(1, kRowThreadWork / task_work), part);
  return out;
}

// One query: the heads of a group are the rows of one small product, and no head is repeated. k and v [K, keys, D].
Tensor attend_one(const Tensor& q, const Tensor& k, const Tensor& v, const AttentionSpec& spec) {
  const int64_t heads = q.size(1), dim = q.size(2), kv_heads = k.size(0), keys = k.size(1);
  const int64_t low = spec.window > 0 ? std::max<int64_t>(0, keys - spec.window) : 0;
  const Tensor ks = k.narrow(1, low, keys - low), vs = v.narrow(1, low, keys - low);
  Tensor scores = at::bmm(q.reshape({kv_heads, heads / kv_heads, dim}), ks.transpose(1, 2)).mul_(spec.scale);
  if (spec.softcap > 0) scores = scores.div_(spec.softcap).tanh_().mul_(spec.softcap);
  const auto acc = q.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  return at::bmm(at::softmax(scores, -1, acc).to(v.scalar_type()), vs).view({1, heads * dim});
}

Tensor by_formula(const Tensor& q, const Tensor& k, const Tensor& v, const PagesView& pages, const AttentionSpec& spec) {
  const PagedBatch& batch = *pages.batch;
  const auto flat = [](const Tensor& pool) { return pool.flatten(0, 1); };  // [slots, K, D]
  flat(pages.k).index_copy_(0, batch.new_slots(q.device()), k);
  flat(pages.v).index_copy_(0, batch.new_slots(q.device()), v);
  TensorList outs;
  for (size_t i = 0; i < batch.sequences().size(); ++i) {
    const PagedBatch::Sequence& sequence = batch.sequences()[i];
    const auto own = [&](const Tensor& x) { return x.narrow(0, sequence.first, sequence.rows); };
    if (sequence.past == 0 && sequence.rows > 1 && q.is_cuda()) {
      outs.push_back(attention_prompt(own(q), own(k), own(v), spec));
      continue;
    }
    const Tensor slots = batch.key_slots(i, q.device());
    const auto keys = [&](const Tensor& pool) { return flat(pool).index_select(0, slots).transpose(0, 1); };
    const Tensor all_k = keys(pages.k), all_v = keys(pages.v);
    outs.push_back(sequence.rows == 1 ? attend_one(own(q), all_k, all_v, spec) : attend_behind(own(q), all_k, all_v, spec));
  }
  return outs.size() == 1 ? outs[0] : at::cat(outs, 0);
}

}  // namespace

Tensor attention_paged(const Tensor& q, const Tensor& k, const Tensor& v, const PagesView& pages, const AttentionSpec& spec) {
  const PagedBatch& batch = *pages.batch;
  TORCH_CHECK(q.dim() == 3 && k.dim() == 3 && k.sizes() == v.sizes() && q.size(0) == batch.rows() &&
                  k.size(0) == batch.rows() && k.size(2) == q.size(2) && q.size(1) % k.size(1) == 0,
              "paged attention: q is ", q.sizes(), ", k ", k.sizes(), " and v ", v.sizes(), " for ", batch.rows(),
              " rows, expected [N, H, D] and twice [N, K, D]");
  const std::array<int64_t, 3> row{batch.page_size(), k.size(1), k.size(2)};
  for (const Tensor* pool : {&pages.k, &pages.v}) {
    TORCH_CHECK(pool->dim() == 4 && pool->sizes().slice(1) == at::IntArrayRef(row) && pool->size(0) >= batch.pool() &&
                    pool->is_contiguous() && pool->scalar_type() == q.scalar_type() && pool->device() == q.device(),
                "paged attention: the pool is ", pool->sizes(), " ", pool->scalar_type(), ", expected at least ",
                batch.pool(), " pages of ", at::IntArrayRef(row), " ", q.scalar_type(), " on ", q.device());
  }
  TORCH_CHECK(!at::GradMode::is_enabled(), "paged attention has no backward");
  return cpu_kernels_for(q) != nullptr ? by_cpu_kernel(q, k, v, pages, spec) : by_formula(q, k, v, pages, spec);
}

}  // namespace ferrotune
