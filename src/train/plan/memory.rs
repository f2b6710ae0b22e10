//! Bytes of a step.
//!
//! The peak is the largest sum, over the moments of a step, of what is always there (weights, LoRA with its gradients, optimizer),
//! what waits for the backward at that moment, and what the running block or the loss holds itself. Layer l's backward begins when
//! what layers after it kept is free again. Those of blocks are in `blocks.rs`; tests/plan.rs sets the sums beside measured peaks.
//!
//! Gradients of whole weights are as large as these: they are counted from where a pass makes them. Where the passes of a step add
//! to them, they are there throughout, with those of the running block beside them.

use serde::Serialize;

use super::blocks::BlockBytes;
use super::rollout::RolloutMemory;
use super::{Layer, Linear, Work};
use crate::ops::Policy;
use crate::train::Optim;

/// Bytes at the peak, by what they are for.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Memory {
    /// What is frozen.
    pub weights: u64,
    /// Weights in training, in f32.
    pub trained: u64,
    /// LoRA in f32, and where memory is not short its copy in 16 bits.
    pub lora: u64,
    /// Those that are there at the peak.
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
    /// Of gradients, what is not there at the peak, but would be if recorded steps of several shapes held them.
    #[serde(skip)]
    pub(super) other_gradients: u64,
    /// What the allocator holds in small pieces.
    #[serde(skip)]
    pieces: u64,
}

/// What runs while memory is highest.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Moment {
    Forward,
    Loss,
    Backward,
    /// The end of the backward pass, where the gradient of the embedding is made.
    Embedding,
    Update,
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
/// What the allocator holds in pieces that are too small for anything, whatever the size of the model; and the same where no step
/// is recorded, so that there are no pieces of graphs.
const PIECES: u64 = 160 << 20;
const PIECES_UNRECORDED: u64 = 96 << 20;

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
        self.weights + self.trained + self.lora + self.optimizer
    }

    /// What nvidia-smi will show for the process.
    pub fn device(&self) -> u64 {
        self.on_device(self.training(), self.kept + self.workspace).max(self.rollout_device())
    }

    pub(super) fn rollout_device(&self) -> u64 {
        self.rollout.map_or(0, |rollout| self.on_device(self.rollout(), rollout.workspace))
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

    /// What the process holds for `tensors`, `moving` bytes of which come and go.
    fn on_device(&self, tensors: u64, moving: u64) -> u64 {
        let lost = moving as f64 * GAPS + (tensors - moving) as f64 * ENDS;
        tensors + CONTEXT + self.pieces + lost as u64
    }
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
        let elements = self.elements();
        // Small ones are there throughout.
        let small = 4 * (elements.lora + elements.vectors);
        let all = small + 4 * elements.matrices();
        let of_words = 4 * self.shape.v * self.shape.c;
        let (of_head, of_embedding) =
            (if self.trained.head { of_words } else { 0 }, if self.trained.embedding { of_words } else { 0 });
        // One of both, where it is the embedding and the head, waits for its second part.
        let shared = if self.head == 0 { of_head } else { 0 };
        let adds = self.adds_to_gradients();

        let mut peak = Peak { kept: 0, workspace: 0, gradients: 0, at: Moment::Update };
        let mut note = |kept: u64, workspace: u64, gradients: u64, at: Moment| {
            if kept + workspace + gradients > peak.kept + peak.workspace + peak.gradients {
                peak = Peak { kept, workspace, gradients, at };
            }
        };
        // Made by the pass so far: in their place, or to be added to what is there.
        let mut made = 0;
        let there = |made: u64| if adds { all } else { small + made };
        let fresh = |made: u64| if adds { made } else { 0 };
        let mut kept = 0;
        for (block, leaving) in blocks.iter().zip(&outward) {
            note(kept, block.forward + leaving, there(made), Moment::Forward);
            kept += block.kept;
        }
        made += of_head;
        note(kept, self.loss() + outward[blocks.len()] + fresh(of_head), there(made), Moment::Loss);
        for (block, coming) in blocks.iter().zip(&inward).rev() {
            made += block.gradients;
            let workspace = block.backward + coming + fresh(block.gradients + shared);
            note(kept, workspace, there(made), Moment::Backward);
            kept -= block.kept;
        }
        if self.trained.embedding {
            // In f32 as its rows are; beside what waits.
            let rows = self.tokens * self.shape.c * (4 + self.element);
            let beside = if adds { shared + of_embedding } else { shared };
            made += of_embedding - shared;
            note(0, rows + beside, there(made), Moment::Embedding);
        }
        note(0, 0, all, Moment::Update);

        let frozen = |matrix: u64, trains: bool| if trains { 0 } else { matrix };
        let norms = if self.trained.layers { 0 } else { self.element * elements.norms };
        Memory {
            weights: (self.layers.iter().flat_map(Layer::linears))
                .map(|linear| self.stored(linear))
                .sum::<u64>()
                + norms
                + frozen(self.embedding, self.trained.embedding)
                + frozen(self.head, self.trained.head)
                + self.beside,
            trained: 4 * (elements.matrices() + elements.vectors),
            lora: elements.lora * if self.element == 4 || Policy::spare_memory(policies) { 4 } else { 6 },
            gradients: peak.gradients,
            optimizer: self.moments(&elements),
            kept: peak.kept,
            workspace: peak.workspace
                + self.batches(self.tokens)
                + LIBRARIES
                + self.rollout.map_or(0, |_| LASTING),
            at: peak.at,
            host: blocks.iter().flat_map(|block| &block.stashed).map(|bytes| bytes.next_power_of_two()).sum(),
            rollout: self.rollout.as_ref().map(|rollout| self.rollout_memory(rollout)),
            other_gradients: all - peak.gradients.min(all),
            pieces: if self.dropout { PIECES_UNRECORDED } else { PIECES },
        }
    }

    /// Whether a pass finds gradients that it adds to.
    fn adds_to_gradients(&self) -> bool {
        self.gradient_accumulation_steps > 1 || self.rollout.is_some()
    }

    pub(super) fn elements(&self) -> Elements {
        let linears = || self.layers.iter().flat_map(Layer::linears);
        let c = self.shape.c;
        let norms = self.layers.iter().map(|layer| {
            c * (2 + 2 * u64::from(self.shape.post_norms)) + 2 * layer.d * u64::from(self.shape.qk_norm)
        });
        let norms = norms.sum::<u64>() + c;
        let words = self.shape.v * c;
        // The embedding's gradient is zero but for few rows, for which 8 bits are too coarse (train/optim.rs).
        let head = if self.trained.head && self.head > 0 { words } else { 0 };
        Elements {
            lora: linears().map(Linear::lora).sum(),
            projections: head
                + linears().filter(|linear| linear.trained()).map(Linear::elements).sum::<u64>(),
            embedding: if self.trained.embedding { words } else { 0 },
            norms,
            vectors: if self.trained.layers { norms } else { 0 },
        }
    }

    /// AdamW's.
    fn moments(&self, elements: &Elements) -> u64 {
        let in_8bit = |elements: u64| elements * 2 + elements / 256 * 8;
        let large = elements.lora + elements.projections;
        let full = elements.embedding + elements.vectors;
        match self.optim {
            Optim::AdamwTorch => 8 * (large + full),
            Optim::Adamw8bit => in_8bit(large) + 8 * full,
        }
    }

    /// A projection's weight at rest, where it is frozen. In 16 bits it has room for LoRA behind its rows and below them
    /// (nn/linear.rs).
    fn stored(&self, linear: &Linear) -> u64 {
        const ROOM: u64 = 64;
        let columns = linear.columns;
        if linear.trained() {
            return 0;
        }
        if self.fp8 {
            return self.stored_in_e4m3(linear);
        }
        if !linear.in_4bit() {
            let room = if self.element < 4 { ROOM } else { 0 };
            return self.element * (linear.rows() + room) * (columns + room);
        }
        let part = |part: &super::Part| {
            let elements = part.rows * columns;
            if part.module.nf4 { in_nf4(elements) } else { self.element * elements }
        };
        linear.parts.iter().map(part).sum()
    }

    /// Token ids, labels, angles and an offloaded embedding's rows, of a recorded batch and of the next; of completions six numbers a
    /// token beside them, and some twenty that the loss is made of (train/grpo/loss.rs).
    fn batches(&self, tokens: u64) -> u64 {
        let rows = if self.embedding == 0 { self.element * self.shape.c } else { 0 };
        let numbers = if self.rollout.is_some() { 4 * (6 + 10) } else { 0 };
        2 * tokens * (16 + 4 * self.layers[0].d * self.shape.ropes + rows + numbers)
    }

    /// Of the device, for forward passes of `tokens` without a backward.
    pub fn evaluation(&self, tokens: u64) -> u64 {
        let work = Work { tokens, dropout: false, ..self.clone() };
        let policies = vec![Policy::RECOMPUTE; work.layers.len()];
        let bytes = (work.layers.iter().zip(&policies))
            .flat_map(|(layer, policy)| work.block_bytes(layer, [&policy.attention, &policy.mlp]));
        let running = bytes.map(|block| block.forward).max().unwrap_or(0).max(work.loss());
        let training = work.memory(&policies);
        let workspace = running + self.batches(tokens) + LIBRARIES;
        // Gradients are those of the step before.
        let gradients = training.gradients + training.other_gradients;
        Memory { kept: 0, workspace, gradients, rollout: None, ..training }.device()
    }

    /// What waits on the device of all layers under the same policy.
    pub(super) fn kept(&self, policy: &Policy) -> u64 {
        let blocks =
            self.layers.iter().flat_map(|layer| self.block_bytes(layer, [&policy.attention, &policy.mlp]));
        blocks.map(|block| block.kept).sum()
    }

    /// Rows whose logits stand in memory at once (csrc/cross_entropy.cpp; half of them in csrc/log_probs.cpp).
    pub(super) fn loss_chunk(&self) -> u64 {
        let most = if self.nf4_head { 1024 } else { 512 };
        let chunk = ((1 << 29) / (4 * self.shape.v)).clamp(1, most) / if self.log_probs { 2 } else { 1 };
        chunk.clamp(1, self.tokens)
    }

    fn loss(&self) -> u64 {
        let (c, v, n) = (self.shape.c, self.shape.v, self.tokens);
        // f32 logits of a chunk; the last layer's output, the hidden states and their gradient. A head in 4 bits is dequantised in runs
        // of words, and a chunk's gradient summed in f32.
        let chunk = self.loss_chunk();
        let head = match () {
            () if self.nf4_head => v.min(8192) * c * self.element + chunk * c * 4,
            // A head in training is cast.
            () if self.trained.head && self.element < 4 => v * c * self.element,
            () => 0,
        };
        chunk * v * 4 + head + n * self.element * 3 * c
    }
}

/// Of what a run trains, and of norms.
pub(super) struct Elements {
    pub lora: u64,
    /// Projections, and a head that is not the embedding.
    pub projections: u64,
    pub embedding: u64,
    norms: u64,
    /// The norms, if they train.
    vectors: u64,
}

impl Elements {
    /// In training, LoRA apart.
    pub fn matrices(&self) -> u64 {
        self.projections + self.embedding
    }
}

/// A moment of a step, in bytes.
struct Peak {
    kept: u64,
    workspace: u64,
    gradients: u64,
    at: Moment,
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
