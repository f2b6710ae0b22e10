#include "ferrotune/csrc/mlp_columns.h"

#include "ferrotune/csrc/cpu.h"
#include "ferrotune/csrc/lora.h"
#include "ferrotune/src/ffi.rs.h"

namespace ferrotune {

namespace {

// Llama-3.1-8B, 4096 rows, an H200: runs of 2048 take 321 ms a step and 35 MiB less than those of 3584, which take 317. Where
// rows are many, attention's backward needs more than either.
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
  // The LoRA of gate (half 0) or up (1), with its columns of z.
  struct Place {
    const Lora* lora;
    int64_t half, column, rank;
  };

  const Linear& linear;
  int64_t columns, in, tail;
  Tensor wide, x;  // [N, in + tail] and its first columns
  std::vector<Place> places;
  Tensor a, z;  // [rank, in], [N, rank]; undefined without LoRA

  GateUp(const Tensor& given, const Linear& l, int64_t run)
      : linear(l), columns(run), in(l.in()), tail(given.size(1) - l.in()), wide(given), x(given.narrow(1, 0, in)) {
    const auto dtype = given.scalar_type();
    TensorList as;
    int64_t rank = 0;
    for (size_t half = 0; half < 2; ++half) {
      const Lora& part = l.parts[half];
      if (!part.a.defined()) continue;
      places.push_back({&part, static_cast<int64_t>(half), rank, part.a.size(0)});
      as.push_back(part.a);
      rank += part.a.size(0);
    }
    if (places.empty()) return;
    const bool made = l.a_cast.defined() && l.a_cast.scalar_type() == dtype;
    a = made ? l.a_cast : at::cat(as, 0).to(dtype);
    if (tail == 0) {
      z = product(x, a.t());
    } else {
      z = wide.narrow(1, in, rank);
      product_into(z, x, a.t(), 1, false);
      wide.narrow(1, in + rank, tail - rank).zero_();
    }
  }

  int64_t runs() const { return nf4_part(linear, 0)->rows / columns; }

  Tensor b_of(const Place& place, int64_t run) const {
    return place.lora->b_in(x.scalar_type()).narrow(0, run * columns, columns);
  }

  // [2 columns, in + tail]: gate's rows, then up's; scale B in the tail.
  Tensor weight(int64_t run) const {
    const Tensor w = at::empty({2 * columns, in + tail}, x.options());
    const Nf4 gate = nf4_part(linear, 0)->some_rows(run * columns, columns);
    const Nf4 up = nf4_part(linear, 1)->some_rows(run * columns, columns);
    dequantize_into({&gate, &up}, w.narrow(1, 0, in));
    if (tail > 0) {
      const Tensor behind = w.narrow(1, in, tail).zero_();
      for (const Place& place : places) {
        Tensor block = behind.narrow(0, place.half * columns, columns).narrow(1, place.column, place.rank);
        at::mul_out(block, place.lora->b.narrow(0, run * columns, columns), at::scalar_tensor(place.lora->scale));
      }
    }
    return w;
  }

  // [gate | up] of the run, [N, 2 columns].
  Tensor gated(const Tensor& weight, int64_t run) const {
    Tensor y = product(wide, weight.t());
    if (tail == 0) {
      for (const Place& place : places) {
        product_into(y.narrow(1, place.half * columns, columns), z.narrow(1, place.column, place.rank),
                     b_of(place, run).t(), place.lora->scale, true);
      }
    }
    return y;
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

Tensor mlp_product(const Tensor& x, const Linear& gate_up, Activation activation, int64_t columns) {
  const GateUp shared(x, gate_up, columns);
  const Tensor y = at::empty({x.size(0), shared.runs() * columns}, x.options());
  for (int64_t run = 0; run < shared.runs(); ++run) {
    const Tensor w = shared.weight(run);
    swiglu_forward_into(y.narrow(1, run * columns, columns), shared.gated(w, run), activation);
  }
  return y;
}

// The gradients of LoRA are those of linear_backward: with G = s dY B, dA = G^T X and dB = s dY^T Z, for down of its whole
// matrices, for gate and up of sums over the runs (G) and run by run (dB).
Tensor mlp_columns_backward(const Tensor& dy, Tensor given, const Linear& gate_up, const Linear& down,
                            Activation activation, int64_t columns, bool need_dx, Tensor* gate_up_grads,
                            Tensor* down_grads, int64_t tail) {
  const auto dtype = dy.scalar_type();
  const Lora& lora = down.parts[0];
  const int64_t n = dy.size(0), rows = down.rows();
  // dproduct, and behind the run that is worked on product.
  Tensor y, down_a, down_g;
  if (tail > 0) {
    const LoraParts parts(down, dtype);
    const Tensor wide = dy.as_strided({n, rows + tail}, {dy.stride(0), 1}), room = wide.narrow(1, rows, tail);
    down_a = parts.a;
    down_g = room.narrow(1, 0, parts.rank);
    product_into(down_g, dy, lora.b_in(dtype), lora.scale, false);
    room.narrow(1, parts.rank, tail - parts.rank).zero_();
    const Tensor w = down.part_weights->joined(dtype, 0, tail);
    lora_fill_rows(w.narrow(0, rows, tail), parts);
    y = at::mm(wide, w);
  } else {
    y = product(dy, down.dense(dtype));
  }
  if (tail == 0 && lora.a.defined()) {
    const bool made = down.a_cast.defined() && down.a_cast.scalar_type() == dtype;
    down_a = made ? down.a_cast : lora.a.to(dtype);
    down_g = at::empty({n, lora.a.size(0)}, dy.options());
    product_into(down_g, dy, lora.b_in(dtype), lora.scale, false);
    product_into(y, down_g, down_a, 1, true);
  }

  const GateUp shared(given, gate_up, columns);
  given = Tensor();
  const auto places = shared.places;
  const bool wide = dtype == at::kHalf || dtype == at::kBFloat16;  // sums over runs in f32
  const auto options = dy.options().dtype(wide ? at::kFloat : dtype);
  // With a tail, g has its columns: [dgate_j | dup_j] times scale B behind the weight is G of both.
  Tensor g, dx;
  if (!places.empty()) g = at::empty({dy.size(0), shared.tail > 0 ? shared.tail : shared.a.size(0)}, options);
  Tensor* const lora_grads = gate_up_grads + 2;
  for (const auto& place : places) {
    const Tensor& b = place.lora->b;
    if (b.requires_grad()) lora_grads[2 * place.half + 1] = at::empty(b.sizes(), b.options().requires_grad(false));
  }
  for (int64_t run = 0; run < shared.runs(); ++run) {
    const Tensor w = shared.weight(run), gated = shared.gated(w, run);
    swiglu_backward_in_place(y.narrow(1, run * columns, columns), gated, activation);
    if (need_dx) {
      if (run == 0) dx = at::empty(shared.x.sizes(), dy.options());
      product_into(dx, gated, w.narrow(1, 0, shared.in), 1, run > 0);
    }
    if (shared.tail > 0 && !places.empty()) product_as(g, gated, w.narrow(1, shared.in, shared.tail), 1, run > 0);
    for (const auto& place : places) {
      const Tensor half = gated.narrow(1, place.half * columns, columns);
      if (shared.tail == 0) {
        product_as(g.narrow(1, place.column, place.rank), half, shared.b_of(place, run), place.lora->scale, run > 0);
      }
      const Tensor& db = lora_grads[2 * place.half + 1];
      if (!db.defined()) continue;
      product_as(db.narrow(0, run * columns, columns), half.t(), shared.z.narrow(1, place.column, place.rank),
               place.lora->scale, false);
    }
  }
  if (!places.empty()) {
    const Tensor all = g.narrow(1, 0, shared.a.size(0)).to(dtype);
    const Tensor& any = places[0].lora->a;
    const Tensor da = at::empty(shared.a.sizes(), any.options().requires_grad(false));
    product_as(da, all.t(), shared.x, 1, false);
    for (const auto& place : places) {
      if (place.lora->a.requires_grad()) lora_grads[2 * place.half] = da.narrow(0, place.column, place.rank);
    }
    if (need_dx) product_into(dx, all, shared.a, 1, true);
  }
  if (lora.a.defined()) {
    const auto gradient = [&](const Tensor& of, const Tensor& left, const Tensor& right, double scale) {
      if (!of.requires_grad()) return Tensor();
      const Tensor out = at::empty(of.sizes(), of.options().requires_grad(false));
      product_as(out, left, right, scale, false);
      return out;
    };
    down_grads[2] = gradient(lora.a, down_g.t(), y, 1);
    down_grads[3] = gradient(lora.b, dy.t(), product(y, down_a.t()), lora.scale);
  }
  return dx;
}

}  // namespace ferrotune
