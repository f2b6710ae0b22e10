//! Bytes of one block: what waits for its backward, and what it holds itself while it runs. The terms are those of
//! csrc/blocks.cpp and csrc/mlp_columns.cpp, stage by stage; widths are elements of 2 bytes a row, f32 counts twice.

use super::memory::made;
use super::{Layer, Linear, Work};
use crate::ops::{BlockPolicy, Place};

/// csrc/blocks.cpp: an MLP of twice as many rows, of which nothing but the input is kept, is worked on by tiles of these.
const TILE: u64 = 8192;
/// csrc/linear.h: columns behind and rows below a product's operands, for LoRA, in steps of these.
const TAIL: u64 = 64;

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
}

fn device(place: Place, width: u64) -> u64 {
    if place == Place::Device { width } else { 0 }
}

fn absent(place: Place, width: u64) -> u64 {
    width - device(place, width)
}

/// The second input of LoRA, where it does not lie behind the first.
fn beside(place: Place, linear: &Linear) -> u64 {
    if place == Place::Device && tail_of(linear) > 0 { 0 } else { linear.rank() }
}

/// csrc/attention_fused.cpp: groups of heads whose backward goes one after the other, so that its sums stay small.
fn head_groups(rows: u64, layer: &Layer) -> u64 {
    const MOST_BYTES: u64 = 256 << 20;
    let mut groups = 1;
    while 8 * rows * layer.query() > groups * MOST_BYTES && layer.k.is_multiple_of(2 * groups) {
        groups *= 2;
    }
    groups
}

/// Columns behind the input of `linear`, rows below it and columns behind its gradient; 16-bit weights have room for one step.
pub(super) fn tail_of(linear: &Linear) -> u64 {
    let tail = linear.rank().next_multiple_of(TAIL);
    if linear.made() || tail <= TAIL { tail } else { 0 }
}

impl Work {
    /// The attention and the MLP block of a layer.
    pub(super) fn block_bytes(&self, layer: &Layer, policies: [&BlockPolicy; 2]) -> [BlockBytes; 2] {
        [self.attention_bytes(layer, policies[0]), self.mlp_bytes(layer, policies[1])]
    }

    /// Where norms follow the blocks, the width of what they read.
    fn post(&self) -> u64 {
        if self.shape.post_norms { self.shape.c } else { 0 }
    }

    fn attention_bytes(&self, layer: &Layer, policy: &BlockPolicy) -> BlockBytes {
        let (n, c, query, projected) = (self.tokens, self.shape.c, layer.query(), layer.qkv.rows());
        let (tail, o_tail, post) = (tail_of(&layer.qkv), tail_of(&layer.o), self.post());
        // Turned in place, but where they have norms.
        let qk = if self.shape.qk_norm { layer.turned() } else { 0 };
        let (turned, attended) = (projected + qk, query + 2 * layer.h);
        let statistics = if self.shape.qk_norm { 2 * (layer.h + layer.k) } else { 0 };
        let bytes = |width: u64| 2 * n * width;
        // csrc/attention.cpp: where samples share rows, attention works on copies for each: q, k, v and its output; in the backward
        // also their gradients, and sums of those of k and v in f32.
        let copied = 2 * self.copied * (projected + query);
        let copied_backward =
            if self.copied > 0 { 2 * copied + 4 * (self.copied + n) * (projected - query) } else { 0 };
        let attended_rows = n.max(self.copied);

        let kept = device(policy.input, c)
            + device(policy.normed, c + tail)
            + device(policy.projected, turned + statistics + beside(policy.normed, &layer.qkv))
            + device(policy.inner, attended)
            + device(policy.output, post)
            + layer.o.rank()
            + 2;

        let qkv_forward = made(&layer.qkv, 0, tail).max(bytes(2 * qk));
        let forward = (bytes(2 * c + tail + projected) + qkv_forward).max(
            bytes(2 * c + tail + turned + attended)
                + (bytes(c) + made(&layer.o, 0, 0)).max(bytes(2 * c + post)).max(copied),
        );

        // What is filled in again, with the norm's output, which is then dropped; the gradient of o's input; attention; qkv's.
        let again = absent(policy.projected, turned);
        let normed = if again > 0 { c + tail } else { 0 };
        let held = again + absent(policy.inner, attended) + absent(policy.output, post);
        let output = if absent(policy.output, post) > 0 { made(&layer.o, 0, 0).max(bytes(2 * c)) } else { 0 };
        let fill = (bytes(again + normed) + if again > 0 { qkv_forward } else { 0 })
            .max(bytes(held + normed) + output);
        // cuDNN sums dq in f32, and dk where heads share keys; FlashAttention-2, for windows, dk and dv of every head.
        let shared = if layer.window.is_some() || layer.k < layer.h { 2 * query } else { 0 };
        let groups = head_groups(attended_rows, layer);
        let (d_out, d_projected) = (post, projected + tail);
        let attention = (bytes(held + d_out + query) + made(&layer.o, o_tail, 0)).max(
            bytes(held + d_out + query + d_projected + qk)
                + 2 * attended_rows * (2 * query + shared) / groups
                + copied_backward,
        );
        let last = bytes(absent(policy.output, post) + d_out + d_projected + qk);
        let used = bytes(device(policy.projected, turned) + device(policy.inner, attended));
        let with_normed = (last + bytes(absent(policy.normed, c))).saturating_sub(used);
        let used = used + bytes(device(policy.normed, c + tail));
        let leaving = c + tail_of(&layer.down);
        let d_normed = (last + bytes(c) + made(&layer.qkv, tail, 0).max(bytes(leaving))).saturating_sub(used);
        let backward =
            bytes(absent(policy.input, c) + c + o_tail) + fill.max(attention).max(with_normed).max(d_normed);

        let at_host = |place: Place, bytes: u64| (place == Place::Host).then_some(n * bytes);
        let stashed = [
            at_host(policy.input, 2 * c),
            at_host(policy.inner, 2 * query),
            at_host(policy.inner, 4 * layer.h),
        ];
        // The log-sum-exp is that of the copies.
        let copied_lse = device(policy.inner, 4 * layer.h) * self.copied.saturating_sub(n);
        let kept = bytes(kept) + copied_lse;
        BlockBytes { kept, forward, backward, stashed: stashed.into_iter().flatten().collect() }
    }

    fn mlp_bytes(&self, layer: &Layer, policy: &BlockPolicy) -> BlockBytes {
        let (n, c, f) = (self.tokens, self.shape.c, self.shape.f);
        let (gate_up, down) = (&layer.gate_up, &layer.down);
        let (tail, down_tail, post) = (tail_of(gate_up), tail_of(down), self.post());
        let rows = n.min(TILE);
        let (tiled, run) = (n >= 2 * TILE, self.run_of_columns(layer, rows));
        let frugal = policy.projected == Place::Recompute && (tiled || run > 0);
        let bytes = |width: u64| 2 * n * width;

        let kept = device(policy.input, c)
            + if frugal {
                0
            } else {
                device(policy.normed, c + tail)
                    + device(policy.projected, 2 * f + tail + beside(policy.normed, gate_up))
                    + device(policy.inner, f + down_tail)
                    + device(policy.output, post)
                    + beside(policy.inner, down)
                    + 2
            };

        let around = bytes(absent(policy.input, c) + c + if tiled { 0 } else { down_tail });
        let (forward, backward) = if !frugal {
            let forward = self.mlp_forward(layer, n, true);
            (bytes(c) + forward, around + self.mlp_backward(layer, policy, n, true))
        } else {
            let (forward, backward) = if run > 0 {
                self.mlp_in_runs(layer, rows, run, if tiled { 0 } else { down_tail })
            } else {
                (
                    self.mlp_forward(layer, rows, false),
                    self.mlp_backward(layer, &BlockPolicy::RECOMPUTE, rows, false),
                )
            };
            // Of tiles, the whole output, the whole gradient, and weights that are dequantised once.
            let whole = if tiled { bytes(c) } else { 0 };
            let weights =
                if run > 0 { 0 } else { made(gate_up, tail, tail) + made(down, down_tail, down_tail) };
            (bytes(c) + whole + weights + forward, around + whole + weights + backward)
        };
        let stashed = if policy.input == Place::Host { vec![n * 2 * c] } else { Vec::new() };
        BlockBytes { kept: bytes(kept), forward, backward, stashed }
    }

    /// The norm's output, gate and up, the activation, the output and its sum with the input; `own`: the weights, too.
    fn mlp_forward(&self, layer: &Layer, rows: u64, own: bool) -> u64 {
        let (c, f) = (self.shape.c, self.shape.f);
        let (tail, down_tail) = (tail_of(&layer.gate_up), tail_of(&layer.down));
        let bytes = |width: u64| 2 * rows * width;
        let made = |linear, tail| if own { made(linear, 0, tail) } else { 0 };
        let out = (bytes(c) + made(&layer.down, down_tail)).max(bytes(2 * c + self.post()));
        bytes(c + 2 * tail + 2 * f) + made(&layer.gate_up, tail).max(bytes(f + down_tail) + out)
    }

    /// What is filled in again; the gradient of the activation, after the activation is free; those of gate and up in their
    /// place; dx.
    fn mlp_backward(&self, layer: &Layer, policy: &BlockPolicy, rows: u64, own: bool) -> u64 {
        let (c, f, post) = (self.shape.c, self.shape.f, self.post());
        let (gate_up, down) = (&layer.gate_up, &layer.down);
        let (tail, down_tail) = (tail_of(gate_up), tail_of(down));
        let bytes = |width: u64| 2 * rows * width;
        let made = |linear, below, tail| if own { made(linear, below, tail) } else { 0 };
        let gated = absent(policy.projected, 2 * f + tail);
        let normed = if gated > 0 { c + tail } else { absent(policy.normed, c) };
        let out = absent(policy.output, post);
        let output = if out > 0 { made(down, 0, down_tail).max(bytes(2 * c)) + bytes(down_tail) } else { 0 };
        let fill = (bytes(normed + gated) + if gated > 0 { made(gate_up, 0, tail) } else { 0 })
            .max(bytes(normed + gated + absent(policy.inner, f) + out) + output);
        let after = out + post;
        let used = bytes(device(policy.inner, f + down_tail));
        let product = (bytes(normed + gated + after + f) + made(down, down_tail, 0)).saturating_sub(used);
        let used = used + bytes(device(policy.normed, c + tail));
        let last = made(gate_up, tail, 0).max(bytes(c + down_tail));
        fill.max(product).max((bytes(gated + after + f + c) + last).saturating_sub(used))
    }

    /// Forward and backward of `rows` in runs of `run` columns: the norm's output and the activation's, whole; of gate and up
    /// and their weight a run.
    fn mlp_in_runs(&self, layer: &Layer, rows: u64, run: u64, down_tail: u64) -> (u64, u64) {
        let (c, f) = (self.shape.c, self.shape.f);
        let tail = tail_of(&layer.gate_up);
        let bytes = |width: u64| 2 * rows * width;
        // G of all runs stands behind the last, and A below its weight.
        let folded = if tail > 0 { (f / run * layer.gate_up.rank()).next_multiple_of(TAIL) } else { 0 };
        let of_run = |below: u64| 2 * (2 * run + below) * (c + tail) + bytes(2 * run + below);
        let out = bytes(c) + made(&layer.down, 0, down_tail).max(bytes(c));
        let forward = of_run(0).max(out) + bytes(c + tail + f + down_tail);
        let gradients = made(&layer.down, down_tail, 0).max(bytes(c) + of_run(folded));
        (forward, bytes(c + tail + f) + gradients.max(bytes(2 * c + down_tail)))
    }

    /// csrc/mlp_columns.cpp: columns of a run, 0 where the MLP is worked on whole.
    fn run_of_columns(&self, layer: &Layer, rows: u64) -> u64 {
        const LEAST_ROWS: u64 = 256;
        let most = if rows < 8192 { 2048 } else { 4096 };
        let (f, c) = (self.shape.f, self.shape.c);
        let parts = &layer.gate_up.parts;
        let quantised = parts.len() == 2 && parts.iter().all(|part| part.module.nf4) && layer.down.made();
        if rows < LEAST_ROWS || !quantised || self.shape.post_norms {
            return 0;
        }
        let most = most.min(f / 2) / TAIL * TAIL;
        let run = (1..=most / TAIL).rev().map(|steps| steps * TAIL).find(|run| f % run == 0);
        run.filter(|run| run * c % NF4_BLOCK == 0).unwrap_or(0)
    }
}

/// Elements that share a scale of scales: a run begins and ends with one.
const NF4_BLOCK: u64 = 64 * 256;
