// The MLP on 4-bit weights in runs of its F inner columns, for a forward that keeps nothing and a backward that computes it
// again. With j a run of columns of gate, up and product,
//   [gate_j | up_j] = X [W_gate,j | W_up,j]^T     product_j = act(gate_j) up_j     y = product W_down^T
//   dproduct = dY W_down      dX = sum_j [dgate_j | dup_j] [W_gate,j | W_up,j]
// so that gate and up, [N, 2F], and their weight, [2F, C], never stand in memory as a whole, and the weight is dequantised
// once for both products of the backward. dproduct [N, F] does; product takes its place, run by run.
//
// Llama-3.1-8B, 4096 rows, bf16: 32 MiB of gate and up and as much of their weight, where they were 224 and 228.
#pragma once

#include "ferrotune/csrc/linear.h"

namespace ferrotune {

// Columns of a run, or 0 where the MLP is worked on whole: weights that are not in 4 bits, dropout, few rows.
int64_t mlp_columns(const Tensor& x, const Linear& gate_up, const Linear& down);

// act(gate) up, [N, F], in rows with room for `room` columns more, of x [N, C], or [N, C + tail] where linear_tail gives one: the
// tail is written.
Tensor mlp_product(const Tensor& x, const Linear& gate_up, Activation activation, int64_t columns, int64_t room);

// dX (undefined if not wanted) from x as above and dy, the gradient of down's output; into the two lists the gradients of
// what trains, in the order of Linear::visit. `down_tail`: that of linear_backward, for down.
Tensor mlp_columns_backward(const Tensor& dy, Tensor x, const Linear& gate_up, const Linear& down, Activation activation,
                            int64_t columns, bool need_dx, Tensor* gate_up_grads, Tensor* down_grads,
                            int64_t down_tail);

}  // namespace ferrotune
