//! Bytes of one block: what waits for its backward, and what it holds itself while it runs. The terms are those of
//! csrc/blocks.cpp and csrc/mlp_columns.cpp, stage by stage; widths are elements of an activation a row.

use super::{Layer, Linear, Work};
use crate::ops::{BlockPolicy, Place};

/// csrc/blocks.cpp: an MLP of twice as many rows, of which nothing but the input is kept, is worked on by tiles of these.
const TILE: u64 = 8192;
/// csrc/linear.h: columns behind and rows below a product's operands, for LoRA, in steps of these.
const TAIL: u64 = 64;
/// src/ops/fp8.rs: columns behind a weight in e4m3.
const FP8_ROOM: u64 = 192;

#[derive(Debug, Clone, Default)]
pub(super) struct BlockBytes {
    /// On the device, from its forward to its backward.
    pub kept: u64,
    /// While its forward runs: input and output, too.
    pub forward: u64,
    /// While its backward runs, beside what was kept: both gradients, too, and the input where it was at the host.
    pub backward: u64,
    /// Of each tensor that goes to the host, in their order.
    pub stashed: Vec<u64>,
    /// Of the gradients of its weights, where they train, in f32.
    pub gradients: u64,
}

fn device(place: Place, width: u64) -> u64 {
    if place == Place::Device { width } else { 0 }
}

fn absent(place: Place, width: u64) -> u64 {
    width - device(place, width)
}

impl Work {
    /// The attention and the MLP block of a layer.
    pub(super) fn block_bytes(&self, layer: &Layer, policies: [&BlockPolicy; 2]) -> [BlockBytes; 2] {
        [self.attention_bytes(layer, policies[0]), self.mlp_bytes(layer, policies[1])]
    }

    /// Columns behind the input of `linear`, rows below it and columns behind its gradient; weights that are not made for each
    /// product have room for one step.
    pub(super) fn tail(&self, linear: &Linear) -> u64 {
        if self.element == 4 || self.dropout || self.fp8 {
            return 0;
        }
        let tail = linear.rank().next_multiple_of(TAIL);
        if linear.in_4bit() || tail <= TAIL { tail } else { 0 }
    }

    /// The matrix that a product takes of a projection that is in 4 bits or trains in f32 beside activations of 16, with room below
    /// its rows and behind them.
    pub(super) fn made(&self, linear: &Linear, below: u64, tail: u64) -> u64 {
        let is_made = linear.in_4bit() || (linear.trained() && self.element < 4);
        if is_made { self.element * (linear.rows() + below) * (linear.columns + tail) } else { 0 }
    }

    /// csrc/linear.cpp, `dropout`: a hash of 8 bytes for each element of the input, and the same shifted.
    fn dropping(&self, linear: &Linear, rows: u64) -> u64 {
        if self.dropout && linear.rank() > 0 { 16 * rows * linear.columns } else { 0 }
    }

    /// csrc/fp8.h: `linear` in e4m3 twice, as it lies and transposed, with room for LoRA behind its rows, and its scale.
    pub(super) fn stored_in_e4m3(&self, linear: &Linear) -> u64 {
        let (rows, columns) = (linear.rows(), linear.columns);
        rows * (columns + FP8_ROOM) + columns * (rows + FP8_ROOM) + 4 * rows.max(columns)
    }

    /// Columns that LoRA takes behind both operands of a product in e4m3; 0 where it does not ride in it.
    pub(super) fn fp8_tail(&self, linear: &Linear) -> u64 {
        let tail = 3 * linear.rank().next_multiple_of(16);
        if self.fp8 && !self.dropout && tail <= FP8_ROOM { tail } else { 0 }
    }

    /// An input or a gradient of `linear` of so many columns in e4m3, with LoRA behind it and scales of its rows.
    fn rows_in_e4m3(&self, linear: &Linear, rows: u64, columns: u64) -> u64 {
        if self.fp8 { rows * (columns + self.fp8_tail(linear) + 4) } else { 0 }
    }

    /// What the gradient of the input of `linear` needs beside it; with dropout also that of one LoRA's input.
    fn input_gradient(&self, linear: &Linear, rows: u64, tail: u64) -> u64 {
        let made = self.made(linear, tail, 0);
        match self.dropping(linear, rows) {
            0 => made,
            dropping => made + self.element * rows * linear.columns + dropping,
        }
    }

    /// The second input of LoRA, where it does not lie behind the first.
    fn beside(&self, place: Place, linear: &Linear) -> u64 {
        if place == Place::Device && self.tail(linear) > 0 { 0 } else { linear.rank() }
    }

    /// Where norms follow the blocks, the width of what they read.
    fn post(&self) -> u64 {
        if self.shape.post_norms { self.shape.c } else { 0 }
    }

    /// The width of `count` numbers in f32.
    fn width_of_f32(&self, count: u64) -> u64 {
        4 * count / self.element
    }

    fn attention_bytes(&self, layer: &Layer, policy: &BlockPolicy) -> BlockBytes {
        let (n, c, query, projected) = (self.tokens, self.shape.c, layer.query(), layer.qkv.rows());
        let (qkv, o) = (&layer.qkv, &layer.o);
        let (tail, o_tail, post) = (self.tail(qkv), self.tail(o), self.post());
        // Turned in place, but where they have norms.
        let qk = if self.shape.qk_norm { layer.turned() } else { 0 };
        let (turned, attended) = (projected + qk, query + self.width_of_f32(layer.h));
        let statistics = if self.shape.qk_norm { self.width_of_f32(layer.h + layer.k) } else { 0 };
        let bytes = |width: u64| self.element * n * width;
        let in_e4m3 = |linear: &Linear, columns: u64| self.rows_in_e4m3(linear, n, columns);
        // csrc/attention.cpp: where samples share rows, attention works on copies for each: q, k, v and its output; in the backward
        // also their gradients, and sums of those of k and v in f32.
        let copied = self.element * self.copied * (projected + query);
        let copied_backward =
            if self.copied > 0 { 2 * copied + 4 * (self.copied + n) * (projected - query) } else { 0 };
        let attended_rows = n.max(self.copied);

        let kept = device(policy.input, c)
            + device(policy.normed, c + tail)
            + device(policy.projected, turned + statistics + self.beside(policy.normed, qkv))
            + device(policy.inner, attended)
            + device(policy.output, post)
            + o.rank()
            + self.width_of_f32(1);

        let (qkv_made, o_made) = (self.made(qkv, 0, tail), self.made(o, 0, 0));
        let (qkv_dropping, o_dropping) = (self.dropping(qkv, n), self.dropping(o, n));
        let qkv_forward = |width: u64| {
            (bytes(width) + (qkv_made + in_e4m3(qkv, c)).max(bytes(2 * qk))).max(qkv_made + qkv_dropping)
        };
        let attending = copied + self.attention_forward_bytes(layer, attended_rows);
        let o_forward = (o_made + in_e4m3(o, query) + bytes(c).max(o_dropping)).max(bytes(2 * c + post));
        let forward = (bytes(2 * c + tail) + qkv_forward(projected))
            .max(bytes(2 * c + tail + turned + attended) + o_forward.max(attending));

        // What is filled in again, with the norm's output, which is then dropped; the gradient of o's input; attention; qkv's.
        let again = absent(policy.projected, turned);
        let normed = if again > 0 { c + tail } else { 0 };
        let held = again + absent(policy.inner, attended) + absent(policy.output, post);
        let output =
            if absent(policy.output, post) > 0 { (o_made + o_dropping).max(bytes(2 * c)) } else { 0 };
        let attending_again = if absent(policy.inner, attended) > 0 { attending } else { 0 };
        let fill = (bytes(normed) + if again > 0 { qkv_forward(again) } else { 0 })
            .max(bytes(held + normed) + output.max(attending_again));
        let (d_out, d_projected) = (post, projected + tail);
        // The gradient of o in e4m3, which the MLP's norm has written.
        let left = in_e4m3(o, c);
        let fill = fill + left;
        let attention = (bytes(held + d_out + query) + left + self.input_gradient(o, n, o_tail)).max(
            bytes(held + d_out + query + d_projected + qk)
                + self.attention_backward_bytes(layer, attended_rows)
                + copied_backward,
        );
        let last = bytes(absent(policy.output, post) + d_out + d_projected + qk);
        let used = bytes(device(policy.projected, turned) + device(policy.inner, attended));
        let with_normed = (last + bytes(absent(policy.normed, c)) + qkv_dropping).saturating_sub(used);
        let used = used + bytes(device(policy.normed, c + tail));
        let leaving = c + self.tail(&layer.down);
        let d_projected = self.input_gradient(qkv, n, tail) + in_e4m3(qkv, projected);
        let dx = bytes(leaving) + in_e4m3(&layer.down, c);
        let d_normed = (last + bytes(c) + d_projected.max(dx)).saturating_sub(used);
        let backward =
            bytes(absent(policy.input, c) + c + o_tail) + fill.max(attention).max(with_normed).max(d_normed);

        let at_host = |place: Place, bytes: u64| (place == Place::Host).then_some(n * bytes);
        let stashed = [
            at_host(policy.input, self.element * c),
            at_host(policy.inner, self.element * query),
            at_host(policy.inner, 4 * layer.h),
        ];
        // The log-sum-exp is that of the copies.
        let copied_lse = device(policy.inner, 4 * layer.h) * self.copied.saturating_sub(n);
        BlockBytes {
            kept: bytes(kept) + copied_lse,
            forward,
            backward,
            stashed: stashed.into_iter().flatten().collect(),
            gradients: of_weights([qkv, o]),
        }
    }

    fn mlp_bytes(&self, layer: &Layer, policy: &BlockPolicy) -> BlockBytes {
        let (n, c, f) = (self.tokens, self.shape.c, self.shape.f);
        let (gate_up, down) = (&layer.gate_up, &layer.down);
        let (tail, down_tail, post) = (self.tail(gate_up), self.tail(down), self.post());
        let rows = n.min(TILE);
        let (tiled, run) = (n >= 2 * TILE && !self.dropout, self.run_of_columns(layer, rows));
        let frugal = policy.projected == Place::Recompute && (tiled || run > 0);
        let bytes = |width: u64| self.element * n * width;

        let kept = device(policy.input, c)
            + if frugal {
                0
            } else {
                device(policy.normed, c + tail)
                    + device(policy.projected, 2 * f + tail + self.beside(policy.normed, gate_up))
                    + device(policy.inner, f + down_tail)
                    + device(policy.output, post)
                    + self.beside(policy.inner, down)
                    + self.width_of_f32(1)
            };

        let gradients = of_weights([gate_up, down]);
        let around = bytes(absent(policy.input, c) + c + if tiled { 0 } else { down_tail });
        let (forward, backward) = if !frugal {
            let forward = self.mlp_forward(layer, n, true);
            (bytes(c) + forward, around + self.mlp_backward(layer, policy, n, true))
        } else {
            // Weights in 4 bits are dequantised once for all tiles; those in training are cast for each product.
            let own = gate_up.trained();
            let (forward, backward) = if run > 0 {
                self.mlp_in_runs(layer, rows, run, if tiled { 0 } else { down_tail })
            } else {
                (
                    self.mlp_forward(layer, rows, own),
                    self.mlp_backward(layer, &BlockPolicy::RECOMPUTE, rows, own),
                )
            };
            // Of tiles, the whole output, the whole gradient, and the weights; gradients that are added to those of the first tile.
            let whole = if tiled { bytes(c) } else { 0 };
            let weights = if run > 0 || own {
                0
            } else {
                self.made(gate_up, tail, tail) + self.made(down, down_tail, down_tail)
            };
            (bytes(c) + whole + weights + forward, around + whole + weights + gradients + backward)
        };
        let stashed = if policy.input == Place::Host { vec![n * self.element * c] } else { Vec::new() };
        BlockBytes { kept: bytes(kept), forward, backward, stashed, gradients }
    }

    /// The norm's output, gate and up, the activation, the output and its sum with the input; `own`: the weights, too.
    fn mlp_forward(&self, layer: &Layer, rows: u64, own: bool) -> u64 {
        let (c, f) = (self.shape.c, self.shape.f);
        let (tail, down_tail) = (self.tail(&layer.gate_up), self.tail(&layer.down));
        let bytes = |width: u64| self.element * rows * width;
        let made = |linear, tail| if own { self.made(linear, 0, tail) } else { 0 };
        let (first, second) = (made(&layer.gate_up, tail), made(&layer.down, down_tail));
        let in_e4m3 = |linear: &Linear, columns: u64| self.rows_in_e4m3(linear, rows, columns);
        let second = second + in_e4m3(&layer.down, f);
        let out = (second + bytes(c).max(self.dropping(&layer.down, rows))).max(bytes(2 * c + self.post()));
        let gated = bytes(2 * f) + (first + in_e4m3(&layer.gate_up, c)).max(bytes(f + down_tail) + out);
        bytes(c + 2 * tail) + gated.max(first + self.dropping(&layer.gate_up, rows))
    }

    /// What is filled in again; the gradient of the activation, after the activation is free; those of gate and up in their
    /// place; dx.
    fn mlp_backward(&self, layer: &Layer, policy: &BlockPolicy, rows: u64, own: bool) -> u64 {
        let (c, f, post) = (self.shape.c, self.shape.f, self.post());
        let (gate_up, down) = (&layer.gate_up, &layer.down);
        let (tail, down_tail) = (self.tail(gate_up), self.tail(down));
        let (first_dropping, second_dropping) = (self.dropping(gate_up, rows), self.dropping(down, rows));
        let bytes = |width: u64| self.element * rows * width;
        let made = |linear, tail| if own { self.made(linear, 0, tail) } else { 0 };
        let input_gradient = |linear, tail| if own { self.input_gradient(linear, rows, tail) } else { 0 };
        let gated = absent(policy.projected, 2 * f + tail);
        let normed = if gated > 0 { c + tail } else { absent(policy.normed, c) };
        let (inner, out) = (absent(policy.inner, f), absent(policy.output, post));
        let output = if out > 0 {
            (made(down, down_tail) + second_dropping).max(bytes(2 * c)) + bytes(down_tail)
        } else {
            0
        };
        let in_e4m3 = |linear: &Linear, columns: u64| self.rows_in_e4m3(linear, rows, columns);
        let first = made(gate_up, tail) + in_e4m3(gate_up, c);
        let gate_up_again =
            if gated > 0 { (bytes(gated) + first).max(first + first_dropping) } else { bytes(gated) };
        // The gradient of down in e4m3, which the norm of the block behind has written.
        let left = in_e4m3(down, c);
        let fill = left + (bytes(normed) + gate_up_again).max(bytes(normed + gated + inner + out) + output);
        let after = out + post;
        let dropped = left + bytes(normed + gated + after + inner) + second_dropping;
        let used = bytes(device(policy.inner, f + down_tail));
        let product =
            (left + bytes(normed + gated + after + f) + input_gradient(down, down_tail)).saturating_sub(used);
        let d_gated = in_e4m3(gate_up, 2 * f);
        let with_normed = (d_gated + bytes(normed + gated + after + f) + first_dropping).saturating_sub(used);
        let used = used + bytes(device(policy.normed, c + tail));
        let last = (input_gradient(gate_up, tail) + d_gated).max(bytes(c + down_tail) + in_e4m3(&layer.o, c));
        let last = (bytes(gated + after + f + c) + last).saturating_sub(used);
        fill.max(dropped).max(product).max(with_normed).max(last)
    }

    /// Forward and backward of `rows` in runs of `run` columns: the norm's output and the activation's, whole; of gate and up
    /// and their weight a run.
    fn mlp_in_runs(&self, layer: &Layer, rows: u64, run: u64, down_tail: u64) -> (u64, u64) {
        let (c, f) = (self.shape.c, self.shape.f);
        let tail = self.tail(&layer.gate_up);
        let bytes = |width: u64| self.element * rows * width;
        // G of all runs stands behind the last, and A below its weight.
        let folded = if tail > 0 { (f / run * layer.gate_up.rank()).next_multiple_of(TAIL) } else { 0 };
        let of_run = |below: u64| self.element * (2 * run + below) * (c + tail) + bytes(2 * run + below);
        let out = bytes(c) + self.made(&layer.down, 0, down_tail).max(bytes(c));
        let forward = of_run(0).max(out) + bytes(c + tail + f + down_tail);
        let gradients = self.made(&layer.down, down_tail, 0).max(bytes(c) + of_run(folded));
        (forward, bytes(c + tail + f) + gradients.max(bytes(2 * c + down_tail)))
    }

    /// csrc/mlp_columns.cpp: columns of a run, 0 where the MLP is worked on whole.
    fn run_of_columns(&self, layer: &Layer, rows: u64) -> u64 {
        const LEAST_ROWS: u64 = 256;
        let most = if rows < 8192 { 2048 } else { 4096 };
        let (f, c) = (self.shape.f, self.shape.c);
        let parts = &layer.gate_up.parts;
        let quantised = parts.len() == 2 && parts.iter().all(|part| part.module.nf4) && layer.down.in_4bit();
        if rows < LEAST_ROWS || !quantised || self.shape.post_norms || self.dropout {
            return 0;
        }
        let most = most.min(f / 2) / TAIL * TAIL;
        let run = (1..=most / TAIL).rev().map(|steps| steps * TAIL).find(|run| f % run == 0);
        run.filter(|run| run * c % NF4_BLOCK == 0).unwrap_or(0)
    }
}

fn of_weights(linears: [&Linear; 2]) -> u64 {
    linears.iter().filter(|linear| linear.trained()).map(|linear| 4 * linear.elements()).sum()
}

/// Elements that share a scale of scales: a run begins and ends with one.
const NF4_BLOCK: u64 = 64 * 256;
