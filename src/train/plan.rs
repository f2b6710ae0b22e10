//! What a LoRA step on a GPU will hold in memory at most, from the shape alone: no GPU, no weights.
//!
//! With N tokens of a forward pass, C hidden_size, F intermediate_size, H and K query and key/value heads of D elements, V words,
//! R the LoRA rank and 2 bytes an activation, the peak is
//! `weights + LoRA + gradients + optimizer + kept + max(one layer's backward, the loss)`,
//! where the first four follow from the parameters, `kept` is what csrc/blocks.cpp saves of each layer under the policy, and a
//! layer's backward holds the largest of its stages: gate and up with the input of their product, the activation's two sides
//! with one dequantised weight, and so on. tests/plan.rs sets it beside measured peaks.

use serde::Serialize;

use super::{GradientCheckpointing, Optim};
use crate::models::Config;

/// A forward pass of `rows` samples of `length` tokens, in 16 bits, LoRA of rank `r` on every linear layer.
#[derive(Debug, Clone, Copy)]
pub struct Work<'a> {
    pub config: &'a Config,
    pub rows: usize,
    pub length: usize,
    pub r: u32,
    pub load_in_4bit: bool,
    pub optim: Optim,
    pub use_gradient_checkpointing: GradientCheckpointing,
}

/// Bytes at the peak, by what they are for.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Memory {
    pub weights: u64,
    /// LoRA in f32, and its copy in 16 bits.
    pub lora: u64,
    pub gradients: u64,
    pub optimizer: u64,
    /// Activations that wait on the device for the backward pass.
    pub kept: u64,
    /// What one layer needs while its backward runs, or the loss: only one of them is there at a time.
    pub workspace: u64,
    pub loss: u64,
}

/// CUDA's context, the libraries' code and cuBLAS's workspaces, beside what the allocator holds, which is 2 % more than tensors
/// need: fitted to the runs of docs/gpu.md (H200, CUDA 13), where both together are 0.8 to 1.8 GiB, 4.4 of 85 GiB.
const CONTEXT: u64 = (6 << 30) / 5;
const UNUSED_SHARE: f64 = 0.02;
/// Workspaces of cuBLAS and cuDNN that libtorch's allocator holds.
const LIBRARIES: u64 = 100 << 20;

/// csrc/blocks.cpp: an MLP of twice as many rows is worked on by tiles of these.
const TILE: u64 = 8192;
/// csrc/cuda/host_stash.cpp: tensors that stay on the device while they are copied.
const ON_DEVICE: u64 = 4;
/// csrc/linear.h: columns behind gate and up for LoRA, in steps of these.
const TAIL: u64 = 64;

impl Memory {
    /// Held by tensors at most.
    pub fn allocated(&self) -> u64 {
        self.weights + self.lora + self.gradients + self.optimizer + self.kept + self.workspace.max(self.loss)
    }

    /// What nvidia-smi will show for the process.
    pub fn device(&self) -> u64 {
        self.context() + self.allocated()
    }

    /// The part of it that no tensor holds.
    pub fn context(&self) -> u64 {
        CONTEXT + (self.allocated() as f64 * UNUSED_SHARE) as u64
    }
}

impl Work<'_> {
    pub fn memory(&self) -> Memory {
        let config = self.config;
        let layers = config.num_hidden_layers() as u64;
        let [c, f, v] = [config.hidden_size, config.intermediate_size, config.vocab_size].map(|n| n as u64);
        let spec = &config.layers[0].attention;
        let [h, k, d] = [spec.num_heads, spec.num_kv_heads, spec.head_dim].map(|n| n as u64);
        let (r, n) = (u64::from(self.r), (self.rows * self.length) as u64);
        let (query, key) = (h * d, k * d);
        let projected = query + 2 * key;

        // (rows, columns) of each LoRA part of a layer.
        let parts = if config.fused_projections {
            vec![(projected, c), (c, query), (2 * f, c), (c, f)]
        } else {
            vec![(query, c), (key, c), (key, c), (c, query), (f, c), (f, c), (c, f)]
        };
        let elements: u64 = parts.iter().map(|(rows, columns)| rows * columns).sum();
        let lora = layers * parts.iter().map(|(rows, columns)| r * (rows + columns)).sum::<u64>();
        let ranks = r * parts.len() as u64;
        let tail = (if config.fused_projections { r } else { 2 * r }).next_multiple_of(TAIL);

        let layer = if self.load_in_4bit {
            // 4 bits, 8 for each 64 elements' absmax, 32 for each 256 of these.
            elements / 2 + elements / 64 + elements / 64 / 256 * 4
        } else {
            2 * (elements + 2 * f * tail)
        };
        let norms = 2 * c * (2 + 2 * u64::from(config.post_norms)) + 4 * d * u64::from(config.qk_norm);
        let embeddings = 2 * v * c * (2 - u64::from(config.tie_word_embeddings));

        // Kept of a layer: what `Kept::visit` lists, and the inputs of both blocks. f32: rstd, log-sum-exp.
        let mut whole =
            2 * (2 * (2 * c) + ranks + projected + (query + key) + query + 2 * f + f) + 4 * (2 + h);
        whole += 2 * (tail - tail.min(ranks)) + 4 * c * u64::from(config.post_norms);
        let kept = n * match self.use_gradient_checkpointing {
            GradientCheckpointing::Off => layers * whole,
            GradientCheckpointing::On => layers * 2 * 2 * c,
            GradientCheckpointing::Unsloth => ON_DEVICE * 2 * c,
        };

        let recomputes = self.use_gradient_checkpointing != GradientCheckpointing::Off;
        let tiled = recomputes && n >= 2 * TILE;
        let rows = if tiled { TILE } else { n };
        let dequantised = |elements: u64| if self.load_in_4bit { 2 * elements } else { 0 };
        let (gate_up, down) = (dequantised(2 * f * (c + tail)), dequantised(f * c));
        let mlp = if tiled {
            gate_up + down + rows * 2 * (3 * f + 2 * c)
        } else if recomputes {
            // gate and up made again, or the gradient of their product beside them.
            (gate_up + rows * 2 * (2 * f + c + tail)).max(down + rows * 2 * (3 * f + c))
        } else {
            (down + rows * 2 * f).max(gate_up + rows * 2 * (2 * f + c))
        };
        let made_again = if recomputes { projected + (query + key) + query + c } else { 0 };
        let attention =
            dequantised(projected * c) + n * 2 * (made_again + projected + (query + key) + 2 * query);
        // Of the block: x, dy, dx.
        let workspace = mlp.max(attention) + n * 2 * 3 * c + LIBRARIES;

        // csrc/cross_entropy.cpp: f32 logits of a chunk; the hidden states and their gradient.
        let chunk = ((1 << 30) / (4 * v)).clamp(1, 1024).min(n);
        let loss = chunk * v * 4 + n * 2 * 2 * c + LIBRARIES;
        Memory {
            weights: layers * (layer + norms) + embeddings,
            lora: lora * 6,
            gradients: lora * 4,
            optimizer: match self.optim {
                Optim::AdamwTorch => lora * 8,
                // Two bytes and two f32 for each 256 elements.
                Optim::Adamw8bit => lora * 2 + lora / 256 * 8,
            },
            kept,
            workspace,
            loss,
        }
    }

    /// The longest samples, in steps of 256 tokens, whose step stays within `bytes` of the device; 0 if none does.
    pub fn longest(&self, bytes: u64) -> usize {
        let fits = |steps: usize| Work { length: 256 * steps, ..*self }.memory().device() <= bytes;
        let (mut fitting, mut above) = (0, 1);
        while above < 1 << 16 && fits(above) {
            (fitting, above) = (above, 2 * above);
        }
        while above - fitting > 1 {
            let middle = fitting.midpoint(above);
            if fits(middle) { fitting = middle } else { above = middle }
        }
        256 * fitting
    }
}
