#include "ferrotune/csrc/mlp_columns.h"

#include "ferrotune/csrc/cpu.h"
#include "ferrotune/csrc/lora.h"
#include "ferrotune/src/ffi.rs.h"

namespace ferrotune {

namespace {

// Of a run. Llama-3.1-8B, 4096 rows, an H200: runs of 2048 take 313.5 ms a step, of 3584 312.4 and 44 MiB more, of 7168 312.1 and
// 160 MiB more. Where rows are many, tiles of them need as much with either.
constexpr int64_t kMostColumns = 2048, kManyRows = 8192, kMostOfManyRows = 4096;
// The steps that keep rows of a run on 16 bytes.
constexpr int64_t kStep = 64;
// Below, the weights are all that matters, and decoding wants few launches.
constexpr int64_t kLeastRows = 256;

bool drops_inputs(const Linear& l) {
  return std::any_of(l.parts.begin(), l.parts.end(), [](const Lora& part) { return part.dropout > 0; });
}

const Nf4* nf4_part(const Linear& l, size_t part) { return std::get_if<Nf4>(&l.part_weights->parts[part]); }

// gate and up with what all runs share.
struct GateUp {
  const Linear& linear;
  int64_t columns, in, tail;
  Tensor wide, x;  // [N, in + tail] and its first columns
  LoraParts lora;
  Tensor z;  // [N, rank], behind x where there is a tail; undefined without LoRA
  std::vector<Tensor> rows_z;  // x A^T of each of lora_rows

  GateUp(const Tensor& given, const Linear& l, int64_t run)
      : linear(l), columns(run), in(l.in()), tail(given.size(1) - l.in()), wide(given), x(given.narrow(1, 0, in)),
        lora(l, given.scalar_type()) {
    for (const LoraRows& some : l.lora_rows) {
      rows_z.push_back(product(x.narrow(0, some.first, some.rows), some.a.to(x.scalar_type()).t()));
    }
    if (lora.places.empty()) return;
    z = tail > 0 ? wide.narrow(1, in, lora.rank) : at::empty({x.size(0), lora.rank}, x.options());
    product_into(z, x, lora.a.t(), 1, false);
  }

  int64_t runs() const { return nf4_part(linear, 0)->rows / columns; }
};

// The rows of gate, then of up, that belong to a run's columns: a projection of its own.
struct ColumnRun {
  Linear linear;
  LoraParts lora;
  Tensor weight;  // [2 columns + below, in + tail]: scale B in the tail, nothing in the rows below

  ColumnRun(const GateUp& all, int64_t run, int64_t below = 0)
      : linear(rows_of(all, run * all.columns)), lora(linear, all.x.scalar_type()),
        weight(linear.part_weights->joined(all.x.scalar_type(), all.tail, below)) {
    if (all.tail == 0) return;
    const Tensor behind = weight.narrow(0, 0, 2 * all.columns).narrow(1, all.in, all.tail);
    lora_fill_columns(all.wide.narrow(1, all.in, all.tail), behind, lora);
  }

  // [gate | up] of the run into y [N, 2 columns].
  void forward(const GateUp& all, Tensor y) const {
    const Tensor w = weight.narrow(0, 0, 2 * all.columns);
    product_into(y, all.wide, w.t(), 1, false);
    for (size_t i = 0; i < all.rows_z.size(); ++i) {
      const LoraRows& some = linear.lora_rows[i];
      product_into(y.narrow(0, some.first, some.rows).narrow(1, linear.first_row(some.part), all.columns), all.rows_z[i],
                   some.b.to(y.scalar_type()).t(), some.scale, true);
    }
    if (all.tail > 0) return;
    for (const auto& [part, row, column, rank] : lora.places) {
      product_into(y.narrow(1, row, part->rows), all.z.narrow(1, column, rank), part->b_in(y.scalar_type()).t(),
                   part->scale, true);
    }
  }

 private:
  static Linear rows_of(const GateUp& all, int64_t first) {
    Linear some = all.linear;
    some.a_cast = all.lora.a;
    some.part_weights = c10::make_intrusive<PartWeights>();
    some.part_weights->rows = 2 * all.columns;
    some.part_weights->in = all.in;
    for (size_t half = 0; half < 2; ++half) {
      some.part_weights->parts.emplace_back(nf4_part(all.linear, half)->some_rows(first, all.columns));
      Lora& part = some.parts[half];
      part.rows = all.columns;
      if (!part.b.defined()) continue;
      // A part of a leaf forgets, where autograd does not look, that the leaf trains.
      part.b = part.b.detach().narrow(0, first, part.rows).set_requires_grad(part.b.requires_grad());
      if (part.b_cast.defined()) part.b_cast = part.b_cast.narrow(0, first, part.rows);
    }
    for (LoraRows& rows : some.lora_rows) rows.b = rows.b.narrow(0, first, all.columns);
    return some;
  }
};

// dY [W_down; A] of down, with G = s dY B behind dY where there is room for it.
struct DownGradient {
  LoraParts lora;
  Tensor g;          // [N, R]; undefined without LoRA
  Tensor d_product;  // [N, F]

  DownGradient(const Tensor& dy, const Linear& down, int64_t tail) : lora(down, dy.scalar_type()) {
    const auto dtype = dy.scalar_type();
    const int64_t n = dy.size(0), rows = down.rows();
    Tensor wide;
    if (tail > 0) wide = dy.as_strided({n, rows + tail}, {dy.stride(0), 1});
    if (!lora.places.empty()) {
      const Lora& part = *lora.places[0].lora;
      g = tail > 0 ? wide.narrow(1, rows, lora.rank) : at::empty({n, lora.rank}, dy.options());
      product_into(g, dy, part.b_in(dtype), part.scale, false);
    }
    if (tail > 0) {
      wide.narrow(1, rows + lora.rank, tail - lora.rank).zero_();
      const Tensor w = down.part_weights->joined(dtype, 0, tail);
      lora_fill_rows(w.narrow(0, rows, tail), lora);
      d_product = at::mm(wide, w);
      return;
    }
    d_product = product(dy, down.dense(dtype));
    if (g.defined()) product_into(d_product, g, lora.a, 1, true);
  }

  // Into the gradients of down, from its input and dy: dA = G^T X and dB = s dY^T X A^T.
  void weights(const Tensor& dy, const Tensor& product_of_mlp, Tensor* grads) const {
    if (!g.defined()) return;
    const Lora& part = *lora.places[0].lora;
    if (part.a.requires_grad()) grads[2] = weight_gradient(g.t(), product_of_mlp, 1, part.a.scalar_type());
    if (part.b.requires_grad()) {
      grads[3] = weight_gradient(dy.t(), product(product_of_mlp, lora.a.t()), part.scale, part.b.scalar_type());
    }
  }
};

}  // namespace

int64_t mlp_columns(const Tensor& x, const Linear& gate_up, const Linear& down) {
  if (x.size(0) < kLeastRows || !gate_up.part_weights || !down.part_weights || gate_up.parts.size() != 2 ||
      down.parts.size() != 1 || gate_up.bias.defined() || down.bias.defined() || drops_inputs(gate_up) || drops_inputs(down)) {
    return 0;
  }
  const Nf4 *const gate = nf4_part(gate_up, 0), *const up = nf4_part(gate_up, 1);
  if (gate == nullptr || up == nullptr || gate->rows != up->rows) return 0;
  const int64_t most = x.size(0) < kManyRows ? kMostColumns : kMostOfManyRows;
  for (int64_t columns = std::min(most, gate->rows / 2) / kStep * kStep; columns > 0; columns -= kStep) {
    if (gate->rows % columns == 0) return gate->splits_at(columns) && up->splits_at(columns) ? columns : 0;
  }
  return 0;
}

Tensor mlp_product(const Tensor& x, const Linear& gate_up, Activation activation, int64_t columns, int64_t room) {
  const GateUp all(x, gate_up, columns);
  const Tensor y = at::empty({x.size(0), all.runs() * columns + room}, x.options());
  const Tensor gated = at::empty({x.size(0), 2 * columns}, x.options());
  for (int64_t j = 0; j < all.runs(); ++j) {
    ColumnRun(all, j).forward(all, gated);
    swiglu_forward_into(y.narrow(1, j * columns, columns), gated, activation);
  }
  return y;
}

// With G_j = s [dgate_j | dup_j] B_j, LoRA's terms for gate and up are
//   dX += sum_j G_j A      dA = sum_j G_j^T X      dB_j = s [dgate_j | dup_j]^T Z
// All G_j stand side by side. Where products have tails, they stand behind the last run, and below its weight A as often: LoRA's
// part of dX is then in that product.
Tensor mlp_columns_backward(const Tensor& dy, Tensor given, const Linear& gate_up, const Linear& down,
                            Activation activation, int64_t columns, bool need_dx, Tensor* gate_up_grads,
                            Tensor* down_grads, int64_t down_tail) {
  constexpr int64_t kMultiple = 64;  // see linear_tail
  const DownGradient of_down(dy, down, down_tail);
  const Tensor& y = of_down.d_product;  // and behind the run that is worked on, product

  const GateUp all(given, gate_up, columns);
  given = Tensor();
  const int64_t n = dy.size(0), rank = all.lora.rank, ranks = all.runs() * rank;
  const int64_t folded = all.tail > 0 ? (ranks + kMultiple - 1) / kMultiple * kMultiple : 0;
  const Tensor wide = at::empty({n, 2 * columns + (folded > 0 ? folded : ranks)}, dy.options());
  const Tensor gated = wide.narrow(1, 0, 2 * columns), g = wide.narrow(1, 2 * columns, ranks);
  if (folded > ranks) wide.narrow(1, 2 * columns + ranks, folded - ranks).zero_();
  const Tensor repeated_a = rank > 0 ? all.lora.a.repeat({all.runs(), 1}) : Tensor();

  Tensor* const lora_grads = gate_up_grads + 2;
  std::vector<Tensor> db;
  for (const auto& place : all.lora.places) {
    const Tensor& b = place.lora->b;
    db.push_back(b.requires_grad() ? at::empty(b.sizes(), b.options().requires_grad(false)) : Tensor());
    lora_grads[2 * (place.lora - gate_up.parts.data()) + 1] = db.back();
  }
  const Tensor dx = need_dx ? at::empty(all.x.sizes(), dy.options()) : Tensor();
  for (int64_t j = 0; j < all.runs(); ++j) {
    const ColumnRun run(all, j, folded);
    run.forward(all, gated);
    swiglu_backward_in_place(y.narrow(1, j * columns, columns), gated, activation);
    std::vector<Tensor> some_db;
    for (const Tensor& whole : db) some_db.push_back(whole.defined() ? whole.narrow(0, j * columns, columns) : Tensor());
    if (rank > 0) lora_gradients_into(gated, all.z, run.lora, g.narrow(1, j * rank, rank), some_db);
    if (!need_dx) continue;
    const bool last = j + 1 == all.runs() && folded > 0;
    const int64_t inner = 2 * columns + (last ? folded : 0);
    const Tensor w = run.weight.narrow(1, 0, all.in).narrow(0, 0, inner);
    if (last) {
      w.narrow(0, 2 * columns, ranks).copy_(repeated_a);
      if (folded > ranks) w.narrow(0, 2 * columns + ranks, folded - ranks).zero_();
    }
    product_into(dx, wide.narrow(1, 0, inner), w, 1, j > 0);
  }
  if (rank > 0) {
    if (need_dx && folded == 0) product_into(dx, g, repeated_a, 1, true);
    const Tensor da = weight_gradient(g.t(), all.x, 1, all.lora.places[0].lora->a.scalar_type())
                          .view({all.runs(), rank, all.in})
                          .sum(0);
    for (const auto& [part, row, column, part_rank] : all.lora.places) {
      if (part->a.requires_grad()) lora_grads[2 * (part - gate_up.parts.data())] = da.narrow(0, column, part_rank);
    }
  }
  of_down.weights(dy, y, down_grads);
  return dx;
}

}  // namespace ferrotune
