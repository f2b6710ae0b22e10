//! Bytes of a step.
//!
//! The peak is the largest sum, over the moments of a pass, of what is always there (weights, LoRA, gradients, optimizer), what
//! waits for the backward at that moment, and what the running block or the loss holds itself. Layer l's backward begins when
//! what layers after it kept is free again. Those of blocks are in `blocks.rs`;
//! tests/plan.rs sets the sums beside measured peaks.

use serde::Serialize;

use super::blocks::BlockBytes;
use super::rollout::RolloutMemory;
use super::{Layer, Linear, Work};
use crate::ops::Policy;
use crate::train::Optim;

/// Bytes at the peak, by what they are for.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Memory {
    pub weights: u64,
    /// LoRA in f32, and where memory is not short its copy in 16 bits.
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
    /// While completions are written, where the run does that.
    pub rollout: Option<RolloutMemory>,
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
/// Workspaces of cuBLAS that libtorch's allocator holds, for the thread of the forward and for that of the backward.
pub(super) const LIBRARIES: u64 = 64 << 20;
/// csrc/kernels.cpp, `lasting_zeros`, from the first decoding step on: 9.8 MiB for kernels/rows.cu where a GPU has 132 processors.
pub(super) const LASTING: u64 = 10 << 20;
/// What the allocator holds in pieces that are too small for anything, whatever the size of the model.
const PIECES: u64 = 160 << 20;

/// csrc/blocks.cpp: where a query sees as many keys, attention's output is quicker to fetch from the host than to compute.
pub(super) const KEYS_FOR_HOST: u64 = 2048;

impl Memory {
    /// Held by tensors at most.
    pub fn allocated(&self) -> u64 {
        self.training().max(self.rollout())
    }

    /// Held by tensors while a step runs.
    pub fn training(&self) -> u64 {
        let pages = self.rollout.map_or(0, |rollout| rollout.beside_training());
        self.always() + self.gradients + pages + self.kept + self.workspace
    }

    /// Held by tensors while completions are written; 0 where none are.
    pub fn rollout(&self) -> u64 {
        let Some(rollout) = self.rollout else { return 0 };
        let gradients = if rollout.stays { self.gradients } else { 0 };
        self.always() + gradients + rollout.kv_cache + rollout.graphs + rollout.workspace
    }

    fn always(&self) -> u64 {
        self.weights + self.lora + self.optimizer
    }

    /// What nvidia-smi will show for the process.
    pub fn device(&self) -> u64 {
        on_device(self.training(), self.kept + self.workspace).max(self.rollout_device())
    }

    pub(super) fn rollout_device(&self) -> u64 {
        self.rollout.map_or(0, |rollout| on_device(self.rollout(), rollout.workspace))
    }

    /// Of `room` on the device, what tensors that stay may take.
    pub(super) fn tensors_within(room: u64) -> u64 {
        (room as f64 / (1.0 + ENDS)) as u64
    }

    /// The part of [`device`](Memory::device) that no tensor holds.
    pub fn context(&self) -> u64 {
        self.device() - self.allocated()
    }

    /// What libtorch's allocator may hold of `device` bytes.
    pub fn allocator_limit(device: u64) -> u64 {
        device.saturating_sub(CONTEXT)
    }
}

/// What the process holds for `tensors`, `moving` bytes of which come and go.
fn on_device(tensors: u64, moving: u64) -> u64 {
    let lost = moving as f64 * GAPS + (tensors - moving) as f64 * ENDS;
    tensors + CONTEXT + PIECES + lost as u64
}

impl Work {
    /// The peak of a step under one policy a layer, and of a rollout between two steps.
    pub fn memory(&self, policies: &[Policy]) -> Memory {
        self.with_shared_prompts().memory_of_pass(policies)
    }

    fn memory_of_pass(&self, policies: &[Policy]) -> Memory {
        let blocks: Vec<BlockBytes> = (self.layers.iter().zip(policies))
            .flat_map(|(layer, policy)| self.block_bytes(layer, [&policy.attention, &policy.mlp]))
            .collect();
        let (outward, inward) = on_the_way(&blocks);
        let mut peak = (0, 0, Moment::Loss);
        let mut note = |kept: u64, workspace: u64, at: Moment| {
            if kept + workspace > peak.0 + peak.1 {
                peak = (kept, workspace, at);
            }
        };
        let mut kept = 0;
        for (block, leaving) in blocks.iter().zip(&outward) {
            note(kept, block.forward + leaving, Moment::Forward);
            kept += block.kept;
        }
        note(kept, self.loss() + outward[blocks.len()], Moment::Loss);
        for (block, coming) in blocks.iter().zip(&inward).rev() {
            note(kept, block.backward + coming, Moment::Backward);
            kept -= block.kept;
        }
        let (kept, workspace, at) = peak;
        let c = self.shape.c;
        let lora: u64 = self.layers.iter().flat_map(Layer::linears).map(Linear::lora).sum();
        let norms = self.layers.len() as u64
            * (2 * c * (2 + 2 * u64::from(self.shape.post_norms))
                + 4 * self.layers[0].d * u64::from(self.shape.qk_norm));
        Memory {
            weights: self.layers.iter().flat_map(Layer::linears).map(stored).sum::<u64>()
                + norms
                + self.embedding
                + self.head
                + self.beside,
            lora: lora * if Policy::spare_memory(policies) { 4 } else { 6 },
            gradients: lora * 4,
            optimizer: match self.optim {
                Optim::AdamwTorch => lora * 8,
                // Two bytes and two f32 for each 256 elements.
                Optim::Adamw8bit => lora * 2 + lora / 256 * 8,
            },
            kept,
            workspace: workspace
                + self.batches(self.tokens)
                + LIBRARIES
                + self.rollout.map_or(0, |_| LASTING),
            at,
            host: blocks.iter().flat_map(|block| &block.stashed).map(|bytes| bytes.next_power_of_two()).sum(),
            rollout: self.rollout.as_ref().map(|rollout| self.rollout_memory(rollout)),
        }
    }

    /// Token ids, labels, angles and an offloaded embedding's rows, of a recorded batch and of the next; of completions six numbers a
    /// token beside them, and some twenty that the loss is made of (train/grpo/loss.rs).
    fn batches(&self, tokens: u64) -> u64 {
        let rows = if self.embedding == 0 { 2 * self.shape.c } else { 0 };
        let numbers = if self.rollout.is_some() { 4 * (6 + 10) } else { 0 };
        2 * tokens * (16 + 4 * self.layers[0].d * self.shape.ropes + rows + numbers)
    }

    /// Of the device, for forward passes of `tokens` without a backward.
    pub fn evaluation(&self, tokens: u64) -> u64 {
        let work = Work { tokens, ..self.clone() };
        let policies = vec![Policy::RECOMPUTE; work.layers.len()];
        let bytes = (work.layers.iter().zip(&policies))
            .flat_map(|(layer, policy)| work.block_bytes(layer, [&policy.attention, &policy.mlp]));
        let running = bytes.map(|block| block.forward).max().unwrap_or(0).max(work.loss());
        let training = work.memory(&policies);
        let workspace = running + self.batches(tokens) + LIBRARIES;
        Memory { kept: 0, workspace, rollout: None, ..training }.device()
    }

    /// What waits on the device of all layers under the same policy.
    pub(super) fn kept(&self, policy: &Policy) -> u64 {
        let blocks =
            self.layers.iter().flat_map(|layer| self.block_bytes(layer, [&policy.attention, &policy.mlp]));
        blocks.map(|block| block.kept).sum()
    }

    fn loss(&self) -> u64 {
        let (c, v, n) = (self.shape.c, self.shape.v, self.tokens);
        // csrc/cross_entropy.cpp: f32 logits of a chunk; the last layer's output, the hidden states and their gradient. A head in
        // 4 bits is dequantised in runs of words, and a chunk's gradient summed in f32.
        let most = if self.nf4_head { 1024 } else { 512 };
        // csrc/log_probs.cpp: half of it.
        let chunk = ((1 << 29) / (4 * v)).clamp(1, most) / if self.log_probs { 2 } else { 1 };
        let chunk = chunk.clamp(1, n);
        let head = if self.nf4_head { v.min(8192) * c * 2 + chunk * c * 4 } else { 0 };
        chunk * v * 4 + head + n * 2 * 3 * c
    }
}

/// csrc/cuda/host_stash.cpp: bytes on the device that are on their way out while each block's forward runs, and the loss after
/// them, and on their way in while each block's backward does. The last three that went out are still there, and a backward
/// starts the copies of three tensors, its own among them.
fn on_the_way(blocks: &[BlockBytes]) -> (Vec<u64>, Vec<u64>) {
    const AT_ONCE: usize = 3;
    let mut sent: Vec<u64> = Vec::new();
    let mut outward = Vec::new();
    for block in blocks {
        outward.push(sent.iter().rev().take(AT_ONCE).sum());
        sent.extend(&block.stashed);
    }
    outward.push(sent.iter().rev().take(AT_ONCE).sum());
    let (mut end, mut here) = (sent.len(), sent.len().saturating_sub(AT_ONCE));
    let mut inward = vec![0; blocks.len()];
    for (block, coming) in blocks.iter().zip(&mut inward).rev() {
        end -= block.stashed.len();
        if !block.stashed.is_empty() {
            here = here.min(end.saturating_sub((AT_ONCE + 1).saturating_sub(block.stashed.len())));
        }
        *coming = sent[here.min(end)..end].iter().sum();
    }
    (outward, inward)
}

/// 4 bits, 8 for each 64 elements' absmax, 32 for each 256 of these.
pub(super) fn in_nf4(elements: u64) -> u64 {
    elements / 2 + elements / 64 + elements / 64 / 256 * 4
}

/// A projection's weight at rest. In 16 bits it has room for LoRA behind its rows and below them (nn/linear.rs).
fn stored(linear: &Linear) -> u64 {
    const ROOM: u64 = 64;
    let columns = linear.columns;
    if !linear.made() {
        return 2 * (linear.rows() + ROOM) * (columns + ROOM);
    }
    let part = |part: &super::Part| {
        let elements = part.rows * columns;
        if part.module.nf4 { in_nf4(elements) } else { 2 * elements }
    };
    linear.parts.iter().map(part).sum()
}

/// The 16-bit matrix that a product takes of a projection in 4 bits, with room below its rows and behind them.
pub(super) fn made(linear: &Linear, below: u64, tail: u64) -> u64 {
    if linear.made() { 2 * (linear.rows() + below) * (linear.columns + tail) } else { 0 }
}
