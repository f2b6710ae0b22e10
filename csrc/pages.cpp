// Attention over paged keys and values (arXiv:2309.06180): the CPU's kernel for f32, a GPU's for sequences with one new row
// (kernels/paged_attention.cu), and the formula for the rest, which copies a sequence's pages together.
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

PagedBatch::PagedBatch(Tensor tables, Tensor lengths, int64_t longest, int64_t pool, int64_t page_size)
    : rows_(lengths.size(0)), page_size_(page_size), pool_(pool) {
  TORCH_CHECK(tables.dim() == 2 && tables.size(0) == rows_ && lengths.dim() == 1 && tables.scalar_type() == at::kLong &&
                  lengths.scalar_type() == at::kLong && tables.is_contiguous() && lengths.is_contiguous() &&
                  tables.size(1) * page_size >= longest,
              "paged rows: tables ", tables.sizes(), " and lengths ", lengths.sizes(), " for ", longest, " keys");
  singles_ = Singles{std::move(tables), std::move(lengths), {}, longest};
}

const PagedBatch::Singles& PagedBatch::singles(at::Device device) const {
  if (singles_) return *singles_;
  std::vector<int64_t> rows, lengths;
  int64_t longest = 0;
  for (const Sequence& sequence : sequences_) {
    if (sequence.rows != 1) continue;
    rows.push_back(sequence.first);
    lengths.push_back(sequence.keys());
    longest = std::max(longest, sequence.keys());
  }
  const int64_t count = static_cast<int64_t>(rows.size()), width = (longest + page_size_ - 1) / page_size_;
  std::vector<int64_t> words(count * width);
  int64_t at = 0;
  for (const Sequence& sequence : sequences_) {
    if (sequence.rows != 1) continue;
    std::copy_n(pages(sequence), (sequence.keys() + page_size_ - 1) / page_size_, words.begin() + at);
    at += width;
  }
  // One copy for all three.
  words.insert(words.end(), lengths.begin(), lengths.end());
  words.insert(words.end(), rows.begin(), rows.end());
  const Tensor all = at::tensor(words, at::kLong).to(device);
  singles_ = Singles{all.narrow(0, 0, count * width).view({count, width}), all.narrow(0, count * width, count),
                     count < rows_ ? all.narrow(0, count * (width + 1), count) : Tensor(), longest};
  return *singles_;
}

std::shared_ptr<PagedBatch> paged_rows(const Tensor& tables, const Tensor& lengths, std::int64_t longest, std::int64_t pool,
                                       std::int64_t page_size) {
  return std::make_shared<PagedBatch>(tables, lengths, longest, pool, page_size);
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

// One new row of each sequence of `singles`; undefined where the kernel cannot. q [n, H, D], k and v [n, K, D].
Tensor by_cuda_kernel(const Tensor& given_q, const Tensor& given_k, const Tensor& given_v, const PagesView& pages,
                      const PagedBatch::Singles& singles, const AttentionSpec& spec) {
  const Kernels* const kernels = kernels_for(given_q);
  if (kernels == nullptr || given_q.scalar_type() == at::kFloat) return {};
  const TokenRows q(given_q), k(given_k), v(given_v);
  const int64_t n = q.x.size(0), heads = q.x.size(1), dim = q.x.size(2), kv_heads = k.x.size(1);
  const Tensor out = at::empty({n, heads * dim}, given_q.options());
  const KernelPaged paged{q.x.const_data_ptr(), k.x.const_data_ptr(), v.x.const_data_ptr(), pages.k.mutable_data_ptr(),
                          pages.v.mutable_data_ptr(), out.mutable_data_ptr(), singles.tables.const_data_ptr<int64_t>(),
                          singles.lengths.const_data_ptr<int64_t>(), n, heads, kv_heads, dim, q.stride, k.stride, v.stride,
                          singles.tables.size(1), pages.batch->page_size(), spec.window, singles.longest,
                          static_cast<float>(spec.scale), static_cast<float>(spec.softcap), kernel_dtype(given_q)};
  const Launch launch(given_q);
  const int64_t floats = kernels->paged_attention_workspace(&paged);
  if (floats == 0) return {};
  const Tensor partial = at::empty({floats}, given_q.options().dtype(at::kFloat));
  auto* const arrived = static_cast<int32_t*>(launch.lasting_zeros("paged_attention", 4 * n * kv_heads));
  check_launch(kernels->paged_attention(&paged, partial.mutable_data_ptr<float>(), arrived, launch.stream()), "paged_attention");
  return out;
}

Tensor by_formula(const Tensor& q, const Tensor& k, const Tensor& v, const PagesView& pages, const AttentionSpec& spec) {
  const PagedBatch& batch = *pages.batch;
  const auto flat = [](const Tensor& pool) { return pool.flatten(0, 1); };  // [slots, K, D]
  flat(pages.k).index_copy_(0, batch.new_slots(q.device()), k);
  flat(pages.v).index_copy_(0, batch.new_slots(q.device()), v);
  const Tensor out = at::empty({q.size(0), q.size(1) * q.size(2)}, q.options());
  Tensor by_kernel;
  if (q.is_cuda() && !batch.all_single() && std::any_of(batch.sequences().begin(), batch.sequences().end(), [](const auto& s) { return s.rows == 1; })) {
    const PagedBatch::Singles& singles = batch.singles(q.device());
    const auto own = [&](const Tensor& x) { return x.index_select(0, singles.rows); };
    by_kernel = by_cuda_kernel(own(q), own(k), own(v), pages, singles, spec);
    if (by_kernel.defined()) out.index_copy_(0, singles.rows, by_kernel);
  }
  for (size_t i = 0; i < batch.sequences().size(); ++i) {
    const PagedBatch::Sequence& sequence = batch.sequences()[i];
    if (sequence.rows == 1 && by_kernel.defined()) continue;
    const auto own = [&](const Tensor& x) { return x.narrow(0, sequence.first, sequence.rows); };
    if (sequence.past == 0 && sequence.rows > 1 && q.is_cuda()) {
      own(out).copy_(attention_prompt(own(q), own(k), own(v), spec));
      continue;
    }
    const Tensor slots = batch.key_slots(i, q.device());
    const auto keys = [&](const Tensor& pool) { return flat(pool).index_select(0, slots).transpose(0, 1); };
    const Tensor all_k = keys(pages.k), all_v = keys(pages.v);
    own(out).copy_(sequence.rows == 1 ? attend_one(own(q), all_k, all_v, spec) : attend_behind(own(q), all_k, all_v, spec));
  }
  return out;
}

Tensor on_gpu(const Tensor& q, const Tensor& k, const Tensor& v, const PagesView& pages, const AttentionSpec& spec) {
  const PagedBatch& batch = *pages.batch;
  if (batch.all_single()) {
    Tensor out = by_cuda_kernel(q, k, v, pages, batch.singles(q.device()), spec);
    TORCH_CHECK(out.defined() || !batch.sequences().empty(), "no kernel reads the pages of ", q.size(1), " heads of ", q.size(2),
                " ", q.scalar_type(), " on this GPU");
    if (out.defined()) return out;
  }
  return by_formula(q, k, v, pages, spec);
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
  if (cpu_kernels_for(q) != nullptr) return by_cpu_kernel(q, k, v, pages, spec);
  return q.is_cuda() ? on_gpu(q, k, v, pages, spec) : by_formula(q, k, v, pages, spec);
}

}  // namespace ferrotune
