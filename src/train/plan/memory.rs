//! Bytes of a step.
//!
//! The peak is the largest sum, over the moments of a pass, of what is always there (weights, LoRA, gradients, optimizer), what
//! waits for the backward at that moment, and what the running block or the loss holds itself. Layer l's backward begins when
//! what layers after it kept is free again. Each moment's terms are those of csrc/blocks.cpp and csrc/cross_entropy.cpp;
//! tests/plan.rs sets the sums beside measured peaks.

use serde::Serialize;

use super::{Layer, Linear, Work};
use crate::ops::{Place, Policy};
use crate::train::Optim;

/// Bytes at the peak, by what they are for.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Memory {
    pub weights: u64,
    /// LoRA in f32, and its copy in 16 bits.
    pub lora: u64,
    pub gradients: u64,
    pub optimizer: u64,
    /// Activations that wait on the device for the backward pass.
    pub kept: u64,
    /// What runs at the peak needs itself.
    pub workspace: u64,
    pub at: Moment,
    /// Pinned memory of the host, in buffers of powers of two.
    pub host: u64,
}

/// What runs while memory is highest.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Moment {
    Forward,
    Loss,
    Backward,
}

/// CUDA's context, the libraries' code and their own memory: at most 0.82 GiB in the runs of docs/gpu.md (H200, CUDA 13).
pub(super) const CONTEXT: u64 = 870 << 20;
/// What the allocator, once it is bounded (csrc/cuda/limit.cpp), holds more than tensors need: gaps between activations that come
/// and go, and the ends of what stays. Fitted to the same runs.
const GAPS: f64 = 0.05;
const ENDS: f64 = 0.01;
/// Workspaces of cuBLAS and cuDNN that libtorch's allocator holds, for the thread of the forward and for that of the backward.
const LIBRARIES: u64 = 160 << 20;
/// What the allocator holds in pieces that are too small for anything, whatever the size of the model.
const PIECES: u64 = 64 << 20;

/// csrc/blocks.cpp: an MLP of twice as many rows, of which nothing but the input is kept, is worked on by tiles of these.
const TILE: u64 = 8192;
/// csrc/linear.h: columns behind gate and up for LoRA, in steps of these.
const TAIL: u64 = 64;
/// csrc/blocks.cpp: where a query sees as many keys, attention's output is quicker to fetch from the host than to compute.
pub(super) const KEYS_FOR_HOST: u64 = 2048;

impl Memory {
    /// Held by tensors at most.
    pub fn allocated(&self) -> u64 {
        self.weights + self.lora + self.gradients + self.optimizer + self.kept + self.workspace
    }

    /// What nvidia-smi will show for the process.
    pub fn device(&self) -> u64 {
        self.context() + self.allocated()
    }

    /// The part of it that no tensor holds.
    pub fn context(&self) -> u64 {
        let moving = self.kept + self.workspace;
        let staying = self.allocated() - moving;
        CONTEXT + PIECES + (moving as f64 * GAPS + staying as f64 * ENDS) as u64
    }

    /// What libtorch's allocator may hold of `device` bytes.
    pub fn allocator_limit(device: u64) -> u64 {
        device.saturating_sub(CONTEXT)
    }
}

/// What one layer adds to a pass.
struct LayerBytes {
    /// On the device, from its forward to its backward.
    kept: u64,
    /// While its forward and its backward run.
    forward: u64,
    backward: u64,
    host: u64,
}

impl Work {
    /// The peak of a step under one policy a layer.
    pub fn memory(&self, policies: &[Policy]) -> Memory {
        let layers: Vec<LayerBytes> =
            self.layers.iter().zip(policies).map(|(layer, policy)| self.layer_bytes(layer, policy)).collect();
        let on_the_way = self.on_the_way(policies);
        let mut peak = (0, 0, Moment::Loss);
        let mut note = |kept: u64, workspace: u64, at: Moment| {
            if kept + workspace > peak.0 + peak.1 {
                peak = (kept, workspace, at);
            }
        };
        let mut kept = 0;
        for layer in &layers {
            note(kept, layer.forward + on_the_way, Moment::Forward);
            kept += layer.kept;
        }
        note(kept, self.loss() + on_the_way, Moment::Loss);
        for layer in layers.iter().rev() {
            note(kept, layer.backward + on_the_way, Moment::Backward);
            kept -= layer.kept;
        }
        let (kept, workspace, at) = peak;
        let (c, n) = (self.shape.c, self.tokens);
        let lora: u64 = self.layers.iter().flat_map(Layer::linears).map(Linear::lora).sum();
        // Token ids, labels and angles, of a recorded batch and of the next.
        let batch = 2 * n * (16 + 4 * self.layers[0].d * self.shape.ropes);
        let norms = self.layers.len() as u64
            * (2 * c * (2 + 2 * u64::from(self.shape.post_norms))
                + 4 * self.layers[0].d * u64::from(self.shape.qk_norm));
        Memory {
            weights: self.layers.iter().flat_map(Layer::linears).map(|l| stored(l, c)).sum::<u64>()
                + norms
                + self.embedding
                + self.head,
            lora: lora * 6,
            gradients: lora * 4,
            optimizer: match self.optim {
                Optim::AdamwTorch => lora * 8,
                // Two bytes and two f32 for each 256 elements.
                Optim::Adamw8bit => lora * 2 + lora / 256 * 8,
            },
            kept,
            workspace: workspace + batch + LIBRARIES,
            at,
            host: layers.iter().map(|layer| layer.host).sum(),
        }
    }

    /// Tensors that are being copied to the host or back: those of about one layer (csrc/cuda/host_stash.cpp).
    fn on_the_way(&self, policies: &[Policy]) -> u64 {
        let (c, n) = (self.shape.c, self.tokens);
        let of = |(layer, policy): (&Layer, &Policy)| {
            let at_host = |place, bytes| if place == Place::Host { bytes } else { 0 };
            let inner = at_host(policy.attention.inner, 2 * layer.query() + 4 * layer.h);
            n * (at_host(policy.attention.input, 2 * c) + at_host(policy.mlp.input, 2 * c) + inner)
        };
        self.layers.iter().zip(policies).map(of).max().unwrap_or(0)
    }

    /// Of the device, for forward passes of `tokens` without a backward.
    pub fn evaluation(&self, tokens: u64) -> u64 {
        let work = Work { tokens, ..self.clone() };
        let policies = vec![Policy::RECOMPUTE; work.layers.len()];
        let bytes =
            work.layers.iter().zip(&policies).map(|(layer, policy)| work.layer_bytes(layer, policy).forward);
        let running = bytes.max().unwrap_or(0).max(work.loss());
        let training = work.memory(&policies);
        let workspace = running + 2 * tokens * (16 + 4 * self.layers[0].d * self.shape.ropes) + LIBRARIES;
        Memory { kept: 0, workspace, ..training }.device()
    }

    /// What waits on the device of all layers under the same policy.
    pub(super) fn kept(&self, policy: &Policy) -> u64 {
        self.layers.iter().map(|layer| self.layer_bytes(layer, policy).kept).sum()
    }

    fn loss(&self) -> u64 {
        let (c, v, n) = (self.shape.c, self.shape.v, self.tokens);
        // f32 logits of a chunk; the last layer's output, the hidden states and their gradient.
        let chunk = ((1 << 30) / (4 * v)).clamp(1, 1024).min(n);
        chunk * v * 4 + n * 2 * 3 * c
    }

    /// `bytes` of each row.
    fn layer_bytes(&self, layer: &Layer, policy: &Policy) -> LayerBytes {
        let (n, c, f) = (self.tokens, self.shape.c, self.shape.f);
        let (query, projected) = (layer.query(), layer.qkv.rows());
        let device = |place: Place, elements: u64| if place == Place::Device { elements } else { 0 };
        let absent = |place: Place, elements: u64| if place == Place::Device { 0 } else { elements };
        let qk_copy = if self.shape.qk_norm { layer.turned() } else { 0 };
        // Log-sum-exp and statistics in f32 count twice.
        let attended = query + 2 * layer.h;
        let (qkv, output) =
            (projected + qk_copy + layer.qkv.rank(), if self.shape.post_norms { c } else { 0 });
        let tail = tail_of(&layer.gate_up);

        let a = &policy.attention;
        let attention_kept = device(a.input, c)
            + device(a.normed, c)
            + device(a.projected, qkv)
            + device(a.inner, attended)
            + device(a.output, output)
            + layer.o.rank()
            + 2;
        let m = &policy.mlp;
        // Under a kept norm output the second input of gate and up lies behind it.
        let behind =
            if m.normed == Place::Device { tail.max(layer.gate_up.rank()) } else { layer.gate_up.rank() };
        let tiled = n >= 2 * TILE && m.projected == Place::Recompute;
        let mlp_kept = device(m.input, c)
            + if tiled {
                0
            } else {
                device(m.normed, c)
                    + device(m.projected, 2 * f + behind)
                    + device(m.inner, f)
                    + device(m.output, output)
                    + layer.down.rank()
                    + 2
            };

        // The attention block's backward, stage by stage: what is filled in again, the gradient of o's input, attention with
        // the sums of dq in f32 (FlashAttention-2, for windows, sums dk and dv of every query head as well), qkv's.
        let again = absent(a.normed, c) + absent(a.projected, qkv) + absent(a.inner, attended);
        let summed = if layer.window.is_some() { 4 * query } else { 2 * query };
        let attention = (2 * n * (absent(a.normed, c) + absent(a.projected, qkv)) + made(&layer.qkv, 0))
            .max(2 * n * (again + query) + made(&layer.o, 0))
            .max(2 * n * (again + query + projected + qk_copy + summed))
            .max(2 * n * (projected + c) + made(&layer.qkv, 0));
        let (wide, narrow) = (made(&layer.gate_up, tail), made(&layer.gate_up, 0));
        let down = made(&layer.down, 0);
        let rows = n.min(TILE);
        let mlp = if tiled {
            wide + down + 2 * rows * (3 * f + 2 * c)
        } else {
            let (normed, gated) = (absent(m.normed, c), absent(m.projected, 2 * f));
            let inner = absent(m.inner, f);
            let wide_normed = if gated > 0 { c + tail } else { normed };
            let filled = 2 * n * (wide_normed + gated) + if gated > 0 { wide } else { 0 };
            // The product of the activation is free before its gradient is made.
            filled
                .max(2 * n * (wide_normed + gated + f))
                .max(2 * n * (wide_normed + gated + inner) + down)
                .max((2 * n * (gated + c) + narrow).saturating_sub(2 * n * device(m.inner, f)))
        };
        // x, where it was at the host, the gradient that arrives and the one that leaves.
        let around = |input: Place| 2 * n * (2 * c + absent(input, c));
        let backward = (attention + around(a.input)).max(mlp + around(m.input));
        let attention = 2 * n * (2 * c + qkv + query) + made(&layer.qkv, 0).max(made(&layer.o, 0));
        let mlp = if tiled {
            wide + down + 2 * rows * (3 * f + 3 * c)
        } else {
            (2 * n * (c + tail + 2 * f) + wide).max(2 * n * (2 * c + tail + 3 * f) + down)
        };
        let forward = attention.max(mlp) + 2 * n * 2 * c;

        let pinned =
            |place: Place, bytes: u64| if place == Place::Host { (n * bytes).next_power_of_two() } else { 0 };
        let host = pinned(a.input, 2 * c)
            + pinned(m.input, 2 * c)
            + pinned(a.inner, 2 * query)
            + pinned(a.inner, 4 * layer.h);
        LayerBytes { kept: 2 * n * (attention_kept + mlp_kept), forward, backward, host }
    }
}

/// Columns behind the input of gate and up.
pub(super) fn tail_of(gate_up: &Linear) -> u64 {
    gate_up.rank().next_multiple_of(TAIL)
}

/// 4 bits, 8 for each 64 elements' absmax, 32 for each 256 of these.
pub(super) fn in_nf4(elements: u64) -> u64 {
    elements / 2 + elements / 64 + elements / 64 / 256 * 4
}

/// A projection's weight at rest. In 16 bits gate and up have room for LoRA behind their rows (nn/linear.rs).
fn stored(linear: &Linear, c: u64) -> u64 {
    let columns = linear.columns;
    if !linear.made() {
        let room = if linear.rows() >= 2 * columns && columns == c { TAIL } else { 0 };
        return 2 * linear.rows() * (columns + room);
    }
    let part = |part: &super::Part| {
        let elements = part.rows * columns;
        if part.module.nf4 { in_nf4(elements) } else { 2 * elements }
    };
    linear.parts.iter().map(part).sum()
}

/// The 16-bit matrix that a product takes of a projection in 4 bits.
fn made(linear: &Linear, tail: u64) -> u64 {
    if linear.made() { 2 * linear.rows() * (linear.columns + tail) } else { 0 }
}
