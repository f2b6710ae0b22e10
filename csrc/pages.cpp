// Attention over paged keys and values (arXiv:2309.06180): the CPU's kernel for rows of f32, a GPU's for sequences with one new row
// (kernels/paged_attention.cu). Of the rest those that start attend to their own rows; those that go on have their keys copied
// together out of the pages, 4 D bytes a key and key/value head in 16 bits.
#include "ferrotune/csrc/pages.h"

#include "ferrotune/csrc/cpu.h"
#include "ferrotune/csrc/device.h"
#include "ferrotune/csrc/kernels.h"
#include "ferrotune/csrc/ops.h"
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
}

namespace {

// Without waiting for the device.
Tensor on_device(const std::vector<int64_t>& words, at::Device device) {
  if (!device.is_cuda()) return at::tensor(words, at::kLong);
  return std::move(*upload({words.data(), words.size()}, device.index()));
}

}  // namespace

Tensor PagedBatch::new_slots(at::Device device) const {
  if (!new_slots_.defined()) {
    std::vector<int64_t> slots;
    for (const Sequence& sequence : sequences_) {
      for (int64_t key = sequence.past; key < sequence.keys(); ++key) slots.push_back(slot(sequence, key));
    }
    new_slots_ = on_device(slots, device);
  }
  return new_slots_;
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
  const Tensor all = on_device(words, device);
  singles_ = Singles{all.narrow(0, 0, count * width).view({count, width}), all.narrow(0, count * width, count),
                     count < rows_ ? all.narrow(0, count * (width + 1), count) : Tensor(), longest};
  return *singles_;
}

Tensor PagedBatch::Rows::of(const Tensor& x) const {
  return places.defined() ? x.index_select(0, places) : x.narrow(0, first, count);
}

void PagedBatch::Rows::put(const Tensor& out, const Tensor& y) const {
  places.defined() ? out.index_copy_(0, places, y) : out.narrow(0, first, count).copy_(y);
}

PagedBatch::Rows PagedBatch::rows_of(const std::vector<const Sequence*>& some, at::Device device) const {
  std::vector<int64_t> rows;
  for (const Sequence* sequence : some) {
    for (int64_t row = 0; row < sequence->rows; ++row) rows.push_back(sequence->first + row);
  }
  const int64_t count = static_cast<int64_t>(rows.size());
  if (count == 0) return {};
  const bool side_by_side = rows.back() - rows.front() == count - 1;
  return {rows.front(), count, side_by_side ? Tensor() : on_device(rows, device)};
}

namespace {

bool is_start(const PagedBatch::Sequence& sequence) { return sequence.past == 0 && sequence.rows > 1; }

// Keys that are copied together, if no sequence has more: 128 MiB of keys and values for 8 heads of 128 in 16 bits.
constexpr int64_t kKeysTogether = 1 << 15;

}  // namespace

const PagedBatch::Starts& PagedBatch::starts(at::Device device) const {
  if (starts_) return *starts_;
  std::vector<const Sequence*> some;
  std::vector<int32_t> ends{0};
  for (const Sequence& sequence : sequences_) {
    if (!is_start(sequence)) continue;
    some.push_back(&sequence);
    ends.push_back(ends.back() + static_cast<int32_t>(sequence.rows));
  }
  starts_ = Starts{rows_of(some, device), nullptr};
  if (some.empty()) return *starts_;
  const std::vector<int64_t> words(ends.begin(), ends.end());
  starts_->segments = std::make_unique<Segments>(std::move(ends), on_device(words, device));
  return *starts_;
}

const std::vector<PagedBatch::Continued>& PagedBatch::continued(bool with_singles, at::Device device) const {
  std::optional<std::vector<Continued>>& kept = continued_[with_singles];
  if (kept) return *kept;
  kept.emplace();
  std::vector<const Sequence*> some;
  int64_t keys = 0;
  for (const Sequence& sequence : sequences_) {
    if (is_start(sequence) || (sequence.rows == 1 && !with_singles)) continue;
    if (keys > 0 && keys + sequence.keys() > kKeysTogether) {
      kept->push_back(continued_of(some, device));
      some.clear();
      keys = 0;
    }
    some.push_back(&sequence);
    keys += sequence.keys();
  }
  if (!some.empty()) kept->push_back(continued_of(some, device));
  return *kept;
}

PagedBatch::Continued PagedBatch::continued_of(const std::vector<const Sequence*>& some, at::Device device) const {
  KeyedRows keyed;
  std::vector<int64_t> slots, cu_rows{0}, cu_keys{0};
  for (const Sequence* sequence : some) {
    for (int64_t key = 0; key < sequence->keys(); ++key) slots.push_back(slot(*sequence, key));
    keyed.rows.push_back(sequence->rows);
    keyed.keys.push_back(sequence->keys());
    cu_rows.push_back(cu_rows.back() + sequence->rows);
    cu_keys.push_back(cu_keys.back() + sequence->keys());
    keyed.longest_rows = std::max(keyed.longest_rows, sequence->rows);
    keyed.longest_keys = std::max(keyed.longest_keys, sequence->keys());
  }
  keyed.cu_rows = on_device(cu_rows, device).to(at::kInt);
  keyed.cu_keys = on_device(cu_keys, device).to(at::kInt);
  return {rows_of(some, device), std::move(keyed), on_device(slots, device)};
}

std::shared_ptr<PagedBatch> paged_rows(const Tensor& tables, const Tensor& lengths, std::int64_t longest, std::int64_t pool,
                                       std::int64_t page_size) {
  return std::make_shared<PagedBatch>(tables, lengths, longest, pool, page_size);
}

std::shared_ptr<PagedBatch> paged_batch(rust::Slice<const std::int64_t> rows, rust::Slice<const std::int64_t> past,
                                        rust::Slice<const std::int32_t> pages, std::int64_t page_size) {
  return std::make_shared<PagedBatch>(rows, past, pages, page_size);
}

void check_pages(const PagesView& pages, const Tensor& x, int64_t kv_heads, int64_t dim) {
  const PagedBatch& batch = *pages.batch;
  const std::array<int64_t, 3> row{batch.page_size(), kv_heads, dim};
  for (const Tensor* pool : {&pages.k, &pages.v}) {
    TORCH_CHECK(pool->dim() == 4 && pool->sizes().slice(1) == at::IntArrayRef(row) && pool->size(0) >= batch.pool() &&
                    pool->is_contiguous() && pool->device() == x.device() &&
                    (pool->scalar_type() == x.scalar_type() || (x.is_cpu() && x.scalar_type() == at::kFloat && fits_rows(*pool))),
                "paged attention: the pool is ", pool->sizes(), " ", pool->scalar_type(), ", expected at least ",
                batch.pool(), " pages of ", at::IntArrayRef(row), " ", x.scalar_type(), " on ", x.device());
  }
}

CpuPages::CpuPages(const PagesView& pages, int64_t heads, int64_t kv_heads, int64_t dim, const AttentionSpec& spec)
    : batch(*pages.batch), k(pages.k), v(pages.v), heads(heads), kv_heads(kv_heads), dim(dim), spec(spec) {}

void CpuPages::write(const PagedBatch::Sequence& sequence, int64_t position, const float* new_k, const float* new_v) const {
  const int64_t width = kv_heads * dim, at = batch.slot(sequence, position) * width;
  const auto put = [&](const Tensor& pool, const float* row) {
    switch (pool.scalar_type()) {
      case at::kBFloat16:
        std::copy_n(row, width, pool.mutable_data_ptr<at::BFloat16>() + at);
        break;
      case at::kHalf:
        std::copy_n(row, width, pool.mutable_data_ptr<at::Half>() + at);
        break;
      default:
        std::copy_n(row, width, pool.mutable_data_ptr<float>() + at);
    }
  };
  put(k, new_k);
  put(v, new_v);
}

void CpuPages::attend(const PagedBatch::Sequence& sequence, int64_t position, int64_t head, const float* q, float* o,
                      std::vector<float>& scores) const {
  const int64_t low = spec.window > 0 ? std::max<int64_t>(0, position + 1 - spec.window) : 0, group = heads / kv_heads;
  scores.resize(std::max<size_t>(scores.size(), 2 * (position + 1 - low + 16)));
  const CpuArray keys = cpu_array(k, head * dim), values = cpu_array(v, head * dim);
  cpu_kernels()->paged_attention({q + head * group * dim, keys.data, values.data, keys.type, batch.pages(sequence), batch.page_size(),
                                  kv_heads * dim, low, position + 1, dim, group, static_cast<float>(spec.scale),
                                  static_cast<float>(spec.softcap)},
                                 o + head * group * dim, scores.data());
}

namespace {

// Rows of f32 on the CPU, by kernels/cpu/rows.h: each row and key/value head by itself.
Tensor by_cpu_kernel(const Tensor& given_q, const Tensor& given_k, const Tensor& given_v, const PagesView& view,
                     const AttentionSpec& spec) {
  const PagedBatch& batch = *view.batch;
  const TokenRows q_rows(given_q), k_rows(given_k), v_rows(given_v);
  const int64_t n = q_rows.x.size(0), heads = q_rows.x.size(1), dim = q_rows.x.size(2), kv_heads = k_rows.x.size(1);
  const Tensor out = at::empty({n, heads * dim}, given_q.options());
  const CpuPages pages(view, heads, kv_heads, dim, spec);
  float* const to = out.mutable_data_ptr<float>();
  const float *const q = q_rows.x.const_data_ptr<float>(), *const k = k_rows.x.const_data_ptr<float>();
  const float* const v = v_rows.x.const_data_ptr<float>();
  std::vector<std::pair<const PagedBatch::Sequence*, int64_t>> rows;  // of the batch: the sequence, and the row's place in it
  int64_t keys = 0;
  for (const PagedBatch::Sequence& sequence : batch.sequences()) {
    for (int64_t row = 0; row < sequence.rows; ++row) {
      const int64_t from = sequence.first + row, position = sequence.past + row;
      pages.write(sequence, position, k + from * k_rows.stride, v + from * v_rows.stride);
      rows.emplace_back(&sequence, position);
      keys += spec.window > 0 ? std::min(spec.window, position + 1) : position + 1;
    }
  }
  const auto part = [&](int64_t begin, int64_t end) {
    std::vector<float> scores;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t row = task / kv_heads;
      const auto& [sequence, position] = rows[row];
      pages.attend(*sequence, position, task % kv_heads, q + row * q_rows.stride, to + row * heads * dim, scores);
    }
  };
  const int64_t tasks = n * kv_heads, task_work = std::max<int64_t>(1, 2 * heads / kv_heads * dim * keys / n);
  tasks * task_work < 2 * kRowThreadWork
      ? part(0, tasks)
      : at::parallel_for(0, tasks, std::max<int64_t>(1, kRowThreadWork / task_work), part);
  return out;
}

// One new row of each sequence of `singles`; undefined where the kernel cannot. q [n, H, D], k and v [n, K, D], not turned yet where cos is defined.
// `tail`, here and below: see attention_paged.
Tensor by_cuda_kernel(const Tensor& given_q, const Tensor& given_k, const Tensor& given_v, const PagesView& pages,
                      const PagedBatch::Singles& singles, const AttentionSpec& spec, int64_t tail = 0, const Tensor& cos = {},
                      const Tensor& sin = {}) {
  const Kernels* const kernels = kernels_for(given_q);
  if (kernels == nullptr || given_q.scalar_type() == at::kFloat) return {};
  const TokenRows q(given_q), k(given_k), v(given_v);
  const int64_t n = q.x.size(0), heads = q.x.size(1), dim = q.x.size(2), kv_heads = k.x.size(1);
  const Tensor out = at::empty({n, heads * dim + tail}, given_q.options());
  const KernelPaged paged{q.x.const_data_ptr(), k.x.const_data_ptr(), v.x.const_data_ptr(), pages.k.mutable_data_ptr(),
                          pages.v.mutable_data_ptr(), out.mutable_data_ptr(), singles.tables.const_data_ptr<int64_t>(),
                          singles.lengths.const_data_ptr<int64_t>(), cos.defined() ? cos.const_data_ptr<float>() : nullptr,
                          cos.defined() ? sin.const_data_ptr<float>() : nullptr, cos.defined() ? 2 * cos.size(1) : 0, n, heads, kv_heads, dim,
                          q.stride, k.stride, v.stride, heads * dim + tail, singles.tables.size(1), pages.batch->page_size(), spec.window,
                          singles.longest, static_cast<float>(spec.scale), static_cast<float>(spec.softcap), kernel_dtype(given_q)};
  const Launch launch(given_q);
  const int64_t floats = kernels->paged_attention_workspace(&paged);
  if (floats == 0) return {};
  const Tensor partial = at::empty({floats}, given_q.options().dtype(at::kFloat));
  auto* const arrived = static_cast<int32_t*>(launch.lasting_zeros("paged_attention", 4 * n * kv_heads));
  check_launch(kernels->paged_attention(&paged, partial.mutable_data_ptr<float>(), arrived, launch.stream()), "paged_attention");
  return out;
}

// By groups of sequences: those with one new row by the kernel, if it can; those that start; those that go on, with their keys
// copied together.
Tensor by_groups(const Tensor& q, const Tensor& k, const Tensor& v, const PagesView& pages, const AttentionSpec& spec, int64_t tail) {
  const PagedBatch& batch = *pages.batch;
  const at::Device device = q.device();
  const auto flat = [](const Tensor& pool) { return pool.flatten(0, 1); };  // [slots, K, D]
  flat(pages.k).index_copy_(0, batch.new_slots(device), k);
  flat(pages.v).index_copy_(0, batch.new_slots(device), v);
  const int64_t width = q.size(1) * q.size(2);
  const Tensor wide = at::empty({q.size(0), width + tail}, q.options()), out = wide.narrow(1, 0, width);
  const bool has_singles = std::any_of(batch.sequences().begin(), batch.sequences().end(), [](const auto& s) { return s.rows == 1; });
  bool singles_done = !has_singles;
  if (q.is_cuda() && has_singles && !batch.all_single()) {
    const PagedBatch::Singles& singles = batch.singles(device);
    const auto own = [&](const Tensor& x) { return x.index_select(0, singles.rows); };
    const Tensor by_kernel = by_cuda_kernel(own(q), own(k), own(v), pages, singles, spec);
    singles_done = by_kernel.defined();
    if (singles_done) out.index_copy_(0, singles.rows, by_kernel);
  }
  if (const PagedBatch::Starts& starts = batch.starts(device); starts.rows.count > 0) {
    const auto own = [&](const Tensor& x) { return starts.rows.of(x); };
    starts.rows.put(out, attention_of_prompts(own(q), own(k), own(v), *starts.segments, spec));
  }
  for (const PagedBatch::Continued& continued : batch.continued(!singles_done, device)) {
    const auto keys = [&](const Tensor& pool) { return flat(pool).index_select(0, continued.slots); };
    continued.rows.put(out, attention_behind(continued.rows.of(q), keys(pages.k), keys(pages.v), continued.keyed, spec));
  }
  return wide;
}

Tensor on_gpu(const Tensor& q, const Tensor& k, const Tensor& v, const PagesView& pages, const AttentionSpec& spec, int64_t tail,
              const Tensor& cos, const Tensor& sin) {
  const PagedBatch& batch = *pages.batch;
  if (batch.all_single()) {
    Tensor out = by_cuda_kernel(q, k, v, pages, batch.singles(q.device()), spec, tail, cos, sin);
    TORCH_CHECK(out.defined() || !batch.sequences().empty(), "no kernel reads the pages of ", q.size(1), " heads of ", q.size(2),
                " ", q.scalar_type(), " on this GPU");
    if (out.defined()) return out;
  }
  if (cos.defined()) return by_groups(rotate(q, cos, sin, false), rotate(k, cos, sin, false), v, pages, spec, tail);
  return by_groups(q, k, v, pages, spec, tail);
}

}  // namespace

bool attention_turns(const Tensor& rows, const PagesView& pages, const Tensor& cos) {
  return kernels_for(rows) != nullptr && rows.scalar_type() != at::kFloat && pages.batch->all_single() && cos.scalar_type() == at::kFloat &&
         cos.is_contiguous() && cos.size(1) % 8 == 0;
}

Tensor attention_paged(const Tensor& q, const Tensor& k, const Tensor& v, const PagesView& pages, const AttentionSpec& spec, int64_t tail,
                       const Tensor& cos, const Tensor& sin) {
  const PagedBatch& batch = *pages.batch;
  TORCH_CHECK(q.dim() == 3 && k.dim() == 3 && k.sizes() == v.sizes() && q.size(0) == batch.rows() &&
                  k.size(0) == batch.rows() && k.size(2) == q.size(2) && q.size(1) % k.size(1) == 0,
              "paged attention: q is ", q.sizes(), ", k ", k.sizes(), " and v ", v.sizes(), " for ", batch.rows(),
              " rows, expected [N, H, D] and twice [N, K, D]");
  check_pages(pages, q, k.size(1), k.size(2));
  TORCH_CHECK(!at::GradMode::is_enabled(), "paged attention has no backward");
  TORCH_CHECK(tail == 0 || q.is_cuda(), "paged attention: only a GPU leaves room in its rows");
  if (cpu_kernels_for(q) != nullptr) return by_cpu_kernel(q, k, v, pages, spec);
  return q.is_cuda() ? on_gpu(q, k, v, pages, spec, tail, cos, sin) : by_groups(q, k, v, pages, spec, 0);
}

}  // namespace ferrotune
