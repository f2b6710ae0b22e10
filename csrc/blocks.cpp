// The two ops of every decoder layer, each one autograd node with a derived backward.
//   attention_block: y = x + post(o(attention(rope(norms(qkv(norm(x)))))))
//   mlp_block:       y = x + post(down(act(gate) * up)),  [gate | up] = gate_up(norm(x))
// The backward walks the same functions the other way; each has its derivation in its own file. What it needs of the
// forward stands in `Kept`, and a BlockPolicy says of each tensor there whether it waits on the device, in the host's memory
// or nowhere: the backward fills in what is not there, but for the last product of the block, which nothing needs (unless a
// norm follows it). Dropout masks are functions of a key, so both runs draw the same.
// Without autograd the last product of more than 64 rows in 16 bits on a GPU adds itself, LoRA included, to an x that nobody else reads
// (linear_onto): no launch for the residual sum, and none for LoRA behind the product.
#include "ferrotune/csrc/attention.h"
#include "ferrotune/csrc/block_node.h"
#include "ferrotune/csrc/few_rows.h"
#include "ferrotune/csrc/linear.h"
#include "ferrotune/csrc/mlp_columns.h"
#include "ferrotune/csrc/pages.h"
#include "ferrotune/src/ffi.rs.h"

namespace ferrotune {

namespace {

struct Norm {
  Tensor weight;  // [C], or undefined for no norm
  double eps, offset;

  explicit Norm(const NormView& view) : weight(view.weight), eps(view.eps), offset(view.offset) {}

  // rstd is null where no backward will follow. `tail`: see linear_tail; `fp8`: see rms_norm_forward.
  Tensor forward(const Tensor& x, Tensor* rstd, int64_t tail = 0, const Fp8Rows& fp8 = {}) const {
    if (!weight.defined()) return x;
    if (rstd == nullptr && tail == 0 && !fp8.defined()) return rms_norm(x, weight, eps, offset);
    const auto [y, r] = rms_norm_forward(x, weight, eps, offset, tail, &fp8);
    if (rstd != nullptr) *rstd = r;
    return y;
  }

  // Plus `residual`, the gradient that reaches x around the norm, if there is one. `room`, `fp8`: see rms_norm_backward.
  Tensor backward(const Tensor& dy, const Tensor& x, const Tensor& rstd, Tensor& dweight, const Tensor& residual = {},
                  int64_t room = 0, const Fp8Rows& fp8 = {}) const {
    if (!weight.defined()) return residual.defined() ? dy + residual : dy;
    const auto [dx, dw] = rms_norm_backward(dy, x, weight, rstd, offset, residual, room, &fp8);
    dweight = dw;
    return dx;
  }
};

// l(norm(x)). normed is the input of l, or undefined where the backward does not need it; `room`: see linear_with_tail.
Tensor norm_linear(const Norm& norm, const Linear& l, const Tensor& x, Tensor* rstd, Tensor& normed, Tensor* z,
                   int64_t room = 0) {
  const int64_t tail = norm.weight.defined() ? linear_tail(x, l) : 0;
  Fp8Rows fp8 = norm.weight.defined() ? linear_fp8_rows(x, l, x.size(1)) : Fp8Rows{};
  Tensor y;
  if (tail > 0) {
    const Tensor wide = at::empty({x.size(0), x.size(1) + tail}, x.options());
    y = linear_with_tail(wide, l, z, room, [&](const LoraFold& fold) {
      return rms_norm_fold(wide, x, norm.weight, norm.eps, norm.offset, rstd, fold);
    });
    normed = wide.narrow(1, 0, x.size(1));
  } else {
    normed = norm.forward(x, rstd, 0, fp8);
    y = linear_forward(normed, l, z, std::move(fp8));
  }
  if (!l.needs_input()) normed = Tensor();
  return y;
}

// The tail for linear_backward: what l wants, if d has room for it.
int64_t tail_behind(const Tensor& d, const Linear& l) {
  const int64_t tail = linear_gradient_tail(d, l);
  return room_behind(d) >= tail ? tail : 0;
}

// The gradient of l's output, the last of a block, and that in e4m3: post's backward, or dy as it came.
std::tuple<Tensor, Fp8Rows> last_gradient(const Norm& post, const Linear& l, const Tensor& dy, const Tensor& out, const Tensor& rstd,
                                          Tensor& dweight) {
  if (!post.weight.defined()) return {dy, fp8_take(dy)};
  const Fp8Rows fp8 = linear_fp8_rows(dy, l, dy.size(1));
  return {post.backward(dy, out, rstd, dweight, {}, 0, fp8), fp8};
}

// A block's gradient: through `norm`, and dy around it. The block before it ends in a product like `last`, whose gradient this is
// then, unless a norm follows that.
Tensor block_gradient(const Norm& norm, const Norm& post, const Linear& last, const Tensor& d_normed, const Tensor& x, const Tensor& rstd,
                      Tensor& dweight, const Tensor& dy) {
  Fp8Rows fp8 = norm.weight.defined() && !post.weight.defined() ? linear_fp8_rows(x, last, x.size(1)) : Fp8Rows{};
  const Tensor dx = norm.backward(d_normed, x, rstd, dweight, dy, linear_gradient_tail(x, last), fp8);
  if (fp8.defined()) fp8_leave(dx, std::move(fp8));
  return dx;
}

struct AttentionBlock {
  Norm norm, q_norm, k_norm, post_norm;
  Linear qkv, o;
  Tensor cos, sin;
  PagesView pages;
  int64_t heads, kv_heads, head_dim;
  AttentionSpec spec;
  std::shared_ptr<Segments> segments;

  struct Kept {
    Tensor rstd, normed, qkv_z;       // normed: the input of qkv
    Tensor projected;                 // [N, (H + 2K) D]: q, k and v; q and k turned where they have no norms
    Tensor q_rstd, k_rstd, qk;        // qk [N, H + K, D]: turned, where they have norms
    Tensor attended, lse, o_z;
    Tensor out, post_rstd;            // out: the input of post_norm

    // The second inputs of LoRA and the statistics are a hundredth of the rest, and dear to compute again.
    std::vector<Waiting> waiting(const BlockPolicy& policy) {
      // Behind normed, if that is where it lies, it would keep all of that.
      if (policy.normed != Place::Device && qkv_z.defined()) qkv_z = qkv_z.contiguous();
      return {{&rstd, Place::Device},          {&normed, policy.normed},      {&qkv_z, policy.projected},
              {&projected, policy.projected},  {&q_rstd, policy.projected},   {&k_rstd, policy.projected},
              {&qk, policy.projected},         {&attended, policy.inner},     {&lse, policy.inner},
              {&o_z, Place::Device},           {&out, policy.output},         {&post_rstd, policy.output}};
    }
  };

  // Attention's output goes to the host where that is quicker than to compute it again. A query that sees n keys costs 4 n
  // operations an element of its output, forward, and its way to the host and back 4 bytes: from 2048 keys on an H200 gains
  // by it (8B, 2 x 2048: 2 % of a step, 1 x 16,384: 7 %).
  bool inner_to_host() const {
    constexpr int64_t kKeys = 2048;
    int64_t keys = 0;
    for (const int64_t length : segments->lengths()) {
      keys += length * (spec.window > 0 ? std::min(length, spec.window) : length);
    }
    return keys >= kKeys * segments->rows();
  }

  // Whether a block of which only x is kept has a way of its own.
  bool has_frugal_way(const Tensor&) const { return false; }

  // The trainable tensors, in the order of the gradients; norms, then qkv, then o.
  std::vector<Tensor*> visit() {
    std::vector<Tensor*> tensors{&norm.weight, &q_norm.weight, &k_norm.weight, &post_norm.weight};
    qkv.visit(tensors);
    o.visit(tensors);
    return tensors;
  }

  Tensor query_rows(const Tensor& projected) const {
    return projected.narrow(1, 0, heads * head_dim).view({projected.size(0), heads, head_dim});
  }
  Tensor key_rows(const Tensor& projected) const {
    return projected.narrow(1, heads * head_dim, kv_heads * head_dim).view({projected.size(0), kv_heads, head_dim});
  }
  // Query and key heads stand side by side.
  Tensor query_key_rows(const Tensor& projected) const {
    const int64_t both = heads + kv_heads;
    return projected.narrow(1, 0, both * head_dim).view({projected.size(0), both, head_dim});
  }
  Tensor value_rows(const Tensor& projected) const {
    const int64_t before = (heads + kv_heads) * head_dim;
    return projected.narrow(1, before, kv_heads * head_dim).view({projected.size(0), kv_heads, head_dim});
  }

  // Query and key heads as attention takes them.
  Tensor turned(const Kept& k) const { return k.qk.defined() ? k.qk : query_key_rows(k.projected); }

  void turn(const Tensor& x, Kept& k, bool keeps) const {
    if (!q_norm.weight.defined()) {
      const Tensor rows = query_key_rows(k.projected);
      // In place: nothing needs them as they were.
      rotate_into(rows, rows, cos, sin, false);
      return;
    }
    const Tensor q_normed = q_norm.forward(query_rows(k.projected), keeps ? &k.q_rstd : nullptr);
    const Tensor k_normed = k_norm.forward(key_rows(k.projected), keeps ? &k.k_rstd : nullptr);
    k.qk = at::empty({x.size(0), heads + kv_heads, head_dim}, x.options());
    rotate_into(k.qk.narrow(1, 0, heads), q_normed, cos, sin, false);
    rotate_into(k.qk.narrow(1, heads, kv_heads), k_normed, cos, sin, false);
  }

  // Of rows of k.projected that are not turned yet.
  Tensor attended_pages(const Tensor& x, Kept& k, int64_t tail = 0) const {
    if (!attention_turns(k.projected, pages, cos)) {
      turn(x, k, false);
      return attention_paged(turned(k).narrow(1, 0, heads), turned(k).narrow(1, heads, kv_heads), value_rows(k.projected), pages, spec,
                             tail);
    }
    Tensor q = query_rows(k.projected), key = key_rows(k.projected);
    if (q_norm.weight.defined()) q = q_norm.forward(q, nullptr), key = k_norm.forward(key, nullptr);
    return attention_paged(q, key, value_rows(k.projected), pages, spec, tail, cos, sin);
  }

  // `whole` is false where only Kept is wanted: the last product is then left out if nothing of Kept needs it. What is in Kept
  // already is not computed. `overwrites`, where nothing is kept: the result may be x, whose memory it takes.
  Tensor forward(const Tensor& x, Kept* kept, bool whole, bool overwrites = false) const {
    Kept unused;
    const bool keeps = kept != nullptr;
    Kept& k = keeps ? *kept : unused;
    if (!k.projected.defined()) {
      k.projected = norm_linear(norm, qkv, x, keeps ? &k.rstd : nullptr, k.normed, keeps ? &k.qkv_z : nullptr);
      if (!pages.batch) turn(x, k, keeps);
    }
    if (pages.batch) {
      const bool adds = overwrites && !post_norm.weight.defined() && linear_adds(x, o);
      k.attended = attended_pages(x, k, adds ? linear_tail(x, o) : 0);
      if (adds) return linear_onto(x, k.attended, o);
    } else if (!k.attended.defined()) {
      const Tensor q = turned(k).narrow(1, 0, heads), key = turned(k).narrow(1, heads, kv_heads);
      const Attended attended = attention_forward(q, key, value_rows(k.projected), *segments, spec);
      k.attended = attended.out;
      k.lse = attended.lse;
    }
    if (!whole && (k.out.defined() || !post_norm.weight.defined())) {
      if (!k.o_z.defined()) k.o_z = linear_z(k.attended, o);
      return {};
    }
    if (!keeps && !post_norm.weight.defined()) {
      if (const Tensor y = inference_linear(k.attended, o, x); y.defined()) return y;
    }
    k.out = linear_forward(k.attended, o, keeps ? &k.o_z : nullptr);
    const Tensor y = post_norm.forward(k.out, keeps ? &k.post_rstd : nullptr);
    if (!post_norm.weight.defined()) k.out = Tensor();
    return x + y;
  }

  Tensor forward_only(const Tensor& x, bool overwrites = false) const {
    if (!pages.batch || !is_few_rows(x)) return forward(x, nullptr, true, overwrites);
    Kept k;
    k.projected = few_rows_linear(norm.forward(x, nullptr), qkv);
    const Tensor attended = attended_pages(x, k);
    return post_norm.weight.defined() ? x + post_norm.forward(few_rows_linear(attended, o), nullptr) : few_rows_linear(attended, o, x);
  }

  Tensor completed_backward(const Tensor& dy, const Tensor& x, Kept& kept, bool need_dx, Tensor* grads) const {
    const bool waited = kept.normed.defined();
    forward(x, &kept, false);
    // Made a third time, after attention's backward, which needs most memory: 16 us where it is 32 MiB (H200). qkv_z may stand
    // behind it, and would hold its memory.
    if (!waited && norm.weight.defined() && kept.normed.defined()) {
      kept.normed = Tensor();
      if (kept.qkv_z.defined()) kept.qkv_z = kept.qkv_z.contiguous();
    }
    return backward(dy, x, kept, need_dx, grads);
  }

  Tensor backward(const Tensor& dy, const Tensor& x, Kept& k, bool need_dx, Tensor* grads) const {
    Tensor *const qkv_grads = grads + 4, *const o_grads = qkv_grads + 2 + 2 * qkv.parts.size();
    auto [d_out, d_out_rows] = last_gradient(post_norm, o, dy, k.out, k.post_rstd, grads[3]);
    Tensor d_attended = linear_backward(d_out, k.attended, k.o_z, o, true, o_grads, tail_behind(d_out, o), std::move(d_out_rows));
    const Tensor q = turned(k).narrow(1, 0, heads), key = turned(k).narrow(1, heads, kv_heads);
    const int64_t rows = k.projected.size(1), tail = linear_gradient_tail(x, qkv);
    const Tensor d_projected = at::empty({x.size(0), rows + tail}, x.options()).narrow(1, 0, rows);
    const bool normed = q_norm.weight.defined();
    const Tensor d_qk = normed ? at::empty(k.qk.sizes(), k.qk.options()) : query_key_rows(d_projected);
    const Tensor dq = d_qk.narrow(1, 0, heads), dk = d_qk.narrow(1, heads, kv_heads);
    attention_backward(d_attended, q, key, value_rows(k.projected), {k.attended, k.lse}, *segments, spec, dq, dk,
                       value_rows(d_projected));
    rotate_into(d_qk, d_qk, cos, sin, true);
    if (normed) {
      query_rows(d_projected).copy_(q_norm.backward(dq, query_rows(k.projected), k.q_rstd, grads[1]));
      key_rows(d_projected).copy_(k_norm.backward(dk, key_rows(k.projected), k.k_rstd, grads[2]));
    }
    k.projected = k.qk = k.attended = k.lse = d_attended = Tensor();
    const bool need_normed = need_dx || norm.weight.requires_grad();
    if (!k.normed.defined() && qkv.needs_input()) k.normed = norm.forward(x, nullptr);
    const Tensor d_normed = linear_backward(d_projected, std::move(k.normed), k.qkv_z, qkv, need_normed, qkv_grads, tail);
    if (!need_normed) return {};
    return block_gradient(norm, post_norm, o, d_normed, x, k.rstd, grads[0], dy);
  }
};

struct MlpBlock {
  Norm norm, post_norm;
  Linear gate_up, down;
  Activation activation;

  struct Kept {
    Tensor rstd, normed, gate_up_z;  // normed: the input of gate_up
    Tensor gated;                    // [N, 2F]: gate and up
    Tensor product, down_z;          // product [N, F]: the input of down
    Tensor out, post_rstd;           // out: the input of post_norm

    std::vector<Waiting> waiting(const BlockPolicy& policy) {
      // Behind normed or product, if that is where they lie, they would keep all of that.
      if (policy.normed != Place::Device && gate_up_z.defined()) gate_up_z = gate_up_z.contiguous();
      if (policy.inner != Place::Device && down_z.defined()) down_z = down_z.contiguous();
      return {{&rstd, Place::Device},    {&normed, policy.normed}, {&gate_up_z, policy.projected},
              {&gated, policy.projected}, {&product, policy.inner}, {&down_z, Place::Device},
              {&out, policy.output},     {&post_rstd, policy.output}};
    }
  };

  // Whether down can add itself to x.
  bool adds(const Tensor& x) const { return !post_norm.weight.defined() && linear_adds(x, down); }

  // Twice the bytes that x has, and read from gated at the rate of memory.
  bool inner_to_host() const { return false; }

  std::vector<Tensor*> visit() {
    std::vector<Tensor*> tensors{&norm.weight, &post_norm.weight};
    gate_up.visit(tensors);
    down.visit(tensors);
    return tensors;
  }

  // As AttentionBlock::forward.
  Tensor forward(const Tensor& x, Kept* kept, bool whole, bool overwrites = false) const {
    Kept unused;
    const bool keeps = kept != nullptr;
    Kept& k = keeps ? *kept : unused;
    if (!k.gated.defined()) {
      // The backward may put the gradient of gated into its memory.
      const int64_t room = keeps ? linear_gradient_tail(x, gate_up) : 0;
      k.gated = norm_linear(norm, gate_up, x, keeps ? &k.rstd : nullptr, k.normed, keeps ? &k.gate_up_z : nullptr, room);
    } else if (gate_up.needs_input() && !k.normed.defined()) {
      k.normed = norm.forward(x, &k.rstd);
    }
    const bool last = whole || (post_norm.weight.defined() && !k.out.defined());
    const int64_t tail = last ? linear_tail(x, down) : 0;
    Fp8Rows fp8 = last ? linear_fp8_rows(x, down, down.in()) : Fp8Rows{};
    if (last || (down.needs_input() && !k.product.defined())) {
      const bool plain = !keeps && tail == 0 && !fp8.defined();
      k.product = plain ? swiglu(k.gated, activation) : swiglu_forward(k.gated, activation, tail, &fp8);
    }
    if (!last) {
      if (!k.down_z.defined() && k.product.defined()) k.down_z = linear_z(k.product, down);
      return {};
    }
    if (overwrites && adds(x)) return linear_onto(x, k.product, down);
    Tensor* const z = keeps ? &k.down_z : nullptr;
    k.out = tail > 0 ? linear_with_tail(k.product, down, z) : linear_forward(k.product, down, z, std::move(fp8));
    if (tail > 0) k.product = k.product.narrow(1, 0, down.in());
    if (!down.needs_input()) k.product = Tensor();
    const Tensor y = post_norm.forward(k.out, keeps ? &k.post_rstd : nullptr);
    if (!post_norm.weight.defined()) k.out = Tensor();
    return x + y;
  }

  // Nobody else will read what is kept: its memory is used again.
  Tensor backward(const Tensor& dy, const Tensor& x, Kept& k, bool need_dx, Tensor* grads) const {
    Tensor *const gate_up_grads = grads + 2, *const down_grads = gate_up_grads + 2 + 2 * gate_up.parts.size();
    auto [d_out, d_out_rows] = last_gradient(post_norm, down, dy, k.out, k.post_rstd, grads[1]);
    const Tensor d_product = linear_backward(d_out, std::move(k.product), k.down_z, down, true, down_grads,
                                             tail_behind(d_out, down), std::move(d_out_rows));
    const int64_t tail = linear_gradient_tail(x, gate_up);
    const bool in_place = k.gated.stride(0) >= k.gated.size(1) + tail;
    const bool need_normed = need_dx || norm.weight.requires_grad();
    Fp8Rows d_gated_rows = need_normed ? linear_fp8_rows(x, gate_up, gate_up.rows()) : Fp8Rows{};
    const Tensor d_gated = swiglu_backward(d_product, k.gated, activation, in_place, tail, &d_gated_rows);
    const Tensor d_normed = linear_backward(d_gated, std::move(k.normed), k.gate_up_z, gate_up, need_normed, gate_up_grads, tail,
                                            std::move(d_gated_rows));
    if (!need_normed) return {};
    return block_gradient(norm, post_norm, down, d_normed, x, k.rstd, grads[0], dy);
  }

  // A long batch is worked on kTile rows at a time, so that its [N, 2F] tensors do not grow with it.
  static constexpr int64_t kTile = 8192;

  // Dropout's masks and LoRA of single rows count the rows of the whole batch.
  bool in_tiles(const Tensor& x) const {
    const auto drops = [](const Lora& part) { return part.dropout > 0; };
    return x.size(0) >= 2 * kTile && gate_up.lora_rows.empty() && down.lora_rows.empty() &&
           std::none_of(gate_up.parts.begin(), gate_up.parts.end(), drops) &&
           std::none_of(down.parts.begin(), down.parts.end(), drops);
  }

  // Columns of a run of mlp_columns.h, or 0. Its product is not kept, and post_norm's backward would need what follows it.
  int64_t columns(const Tensor& x) const { return post_norm.weight.defined() ? 0 : mlp_columns(x, gate_up, down); }

  int64_t tail(const Tensor& x) const { return norm.weight.defined() ? linear_tail(x, gate_up) : 0; }

  // Whether a block of which only x is kept has a way of its own.
  bool has_frugal_way(const Tensor& x) const { return in_tiles(x) || columns(x) > 0; }

  // Calls body(block, first row, rows); the weights of that block are dequantised once for all tiles, or in runs of columns
  // for each.
  template <typename Body>
  void each_tile(const Tensor& x, const Body& body) const {
    MlpBlock block = *this;
    if (columns(x) == 0) {
      block.gate_up.dequantize(x.scalar_type(), tail(x));
      block.down.dequantize(x.scalar_type(), linear_tail(x, down));
    }
    for (int64_t first = 0; first < x.size(0); first += kTile) body(block, first, std::min(kTile, x.size(0) - first));
  }

  // Of as many rows as are worked on at once.
  Tensor tile_forward(const Tensor& x, bool overwrites) const {
    const int64_t run = columns(x);
    if (run == 0) return forward(x, nullptr, true, overwrites);
    const int64_t room = linear_tail(x, down);
    const Tensor product = mlp_product(norm.forward(x, nullptr, tail(x)), gate_up, activation, run, room);
    if (overwrites && adds(x)) return linear_onto(x, product, down);
    return x + (room > 0 ? linear_with_tail(product, down, nullptr) : linear_forward(product, down, nullptr));
  }

  Tensor tile_backward(const Tensor& dy, const Tensor& x, Kept& kept, bool need_dx, Tensor* grads) const {
    const int64_t run = columns(x);
    if (run == 0) {
      forward(x, &kept, false);
      return backward(dy, x, kept, need_dx, grads);
    }
    Tensor *const gate_up_grads = grads + 2, *const down_grads = gate_up_grads + 2 + 2 * gate_up.parts.size();
    const bool need_normed = need_dx || norm.weight.requires_grad();
    const Tensor d_normed =
        mlp_columns_backward(dy, norm.forward(x, &kept.rstd, tail(x)), gate_up, down, activation, run, need_normed,
                             gate_up_grads, down_grads, tail_behind(dy, down));
    if (!need_normed) return {};
    return norm.backward(d_normed, x, kept.rstd, grads[0], dy, linear_gradient_tail(x, down));
  }

  Tensor forward_only(const Tensor& x, bool overwrites = false) const {
    if (is_few_rows(x)) {
      const Tensor product = swiglu(few_rows_linear(norm.forward(x, nullptr), gate_up), activation);
      return post_norm.weight.defined() ? x + post_norm.forward(few_rows_linear(product, down), nullptr)
                                        : few_rows_linear(product, down, x);
    }
    if (!in_tiles(x)) return tile_forward(x, overwrites);
    const Tensor y = overwrites ? x : at::empty_like(x);
    each_tile(x, [&](const MlpBlock& block, int64_t first, int64_t rows) {
      const Tensor some_x = x.narrow(0, first, rows), some_y = overwrites ? some_x : y.narrow(0, first, rows);
      some_y.copy_(block.tile_forward(some_x, overwrites));  // does nothing where that is some_y
    });
    return y;
  }

  Tensor completed_backward(const Tensor& dy, const Tensor& x, Kept& kept, bool need_dx, Tensor* grads) const {
    if (kept.gated.defined() || !has_frugal_way(x)) {
      forward(x, &kept, false);
      return backward(dy, x, kept, need_dx, grads);
    }
    if (!in_tiles(x)) return tile_backward(dy, x, kept, need_dx, grads);
    Tensor dx;
    each_tile(x, [&](MlpBlock& block, int64_t first, int64_t rows) {
      Kept k;
      std::vector<Tensor> found(block.visit().size());
      const Tensor some_x = x.narrow(0, first, rows);
      const Tensor some_dx = block.tile_backward(dy.narrow(0, first, rows), some_x, k, need_dx, found.data());
      if (some_dx.defined()) {
        if (!dx.defined()) dx = at::empty_like(x);
        dx.narrow(0, first, rows).copy_(some_dx);
      }
      for (size_t i = 0; i < found.size(); ++i) {
        if (first == 0) {
          grads[i] = found[i];
        } else if (found[i].defined()) {
          grads[i].add_(found[i]);
        }
      }
    });
    return dx;
  }
};

}  // namespace

std::unique_ptr<Tensor> attention_block(const Tensor& x, const NormView& norm, const LinearView& qkv,
                                        const LinearView& o, const NormView& post_norm,
                                        const AttentionView& attention, BlockPolicy policy, bool overwrites) {
  AttentionBlock block{Norm(norm),
                       Norm(attention.q_norm),
                       Norm(attention.k_norm),
                       Norm(post_norm),
                       Linear(qkv),
                       Linear(o),
                       attention.cos,
                       attention.sin,
                       PagesView{attention.pages_k, attention.pages_v, attention.pages},
                       attention.num_heads,
                       attention.num_kv_heads,
                       attention.head_dim,
                       AttentionSpec{attention.scale, attention.softcap, attention.window},
                       attention.segments};
  return std::make_unique<Tensor>(run(std::move(block), x, policy, overwrites));
}

std::unique_ptr<Tensor> mlp_block(const Tensor& x, const NormView& norm, const LinearView& gate_up,
                                  const LinearView& down, const NormView& post_norm, Activation activation,
                                  BlockPolicy policy, bool overwrites) {
  MlpBlock block{Norm(norm), Norm(post_norm), Linear(gate_up), Linear(down), activation};
  return std::make_unique<Tensor>(run(std::move(block), x, policy, overwrites));
}

}  // namespace ferrotune
