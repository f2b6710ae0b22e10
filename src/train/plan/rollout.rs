//! Bytes while completions are written: what a GRPO run does between its steps, on the weights in training.
//!
//! Keys and values of all sequences, the logits of recorded decoding steps, and the pass that holds most itself: reading the
//! prompts. Fewer keys and values only mean that sequences wait for each other, so a small budget takes of them first.

use serde::Serialize;

use super::memory::{LASTING, LIBRARIES};
use super::{Budget, Layer, Memory, Work};
use crate::generate::{MOST_PROMPT_ROWS, pages_of_samples, recorded_rows};
use crate::nn::PAGE_SIZE;
use crate::ops::Policy;

/// The completions of a generation batch, all of them as long as they may be.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Rollout {
    /// Completions that are written at once, and of each prompt.
    pub sequences: u64,
    pub num_generations: u64,
    /// Tokens of the longest prompt; what is left of [`Work::sample`] is the completion.
    pub prompt: u64,
    /// Bytes of keys and values at most.
    kv: u64,
    stays: bool,
}

/// What it takes, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct RolloutMemory {
    /// Pages of keys and values.
    pub kv_cache: u64,
    /// Logits that recorded decoding steps leave.
    pub graphs: u64,
    /// What the pass that needs most holds itself.
    pub workspace: u64,
    /// Whether pages and recorded steps stay while the model trains; else they are given back before each step, and the gradients
    /// before each rollout.
    pub stays: bool,
}

impl Rollout {
    /// `sequences` completions, `num_generations` for each prompt of up to `prompt` tokens; `kv_cache_memory` bounds their keys and
    /// values.
    pub fn new(sequences: u64, num_generations: u64, prompt: u64, kv_cache_memory: Option<u64>) -> Rollout {
        Rollout { sequences, num_generations, prompt, kv: kv_cache_memory.unwrap_or(u64::MAX), stays: false }
    }
}

impl RolloutMemory {
    /// What stands in memory beside a step.
    pub(super) fn beside_training(&self) -> u64 {
        if self.stays { self.kv_cache + self.graphs } else { 0 }
    }
}

impl Work {
    /// The same, with rollouts between its steps.
    pub fn with_rollout(self, rollout: Rollout) -> Work {
        Work { log_probs: true, rollout: Some(rollout), ..self }
    }

    /// A pass in which completions of a prompt share its rows, but for the last: where completions come in their order, those of a
    /// pass belong to few prompts.
    pub(super) fn with_shared_prompts(&self) -> Work {
        let rows = self.tokens / self.sample.max(1);
        let of_step = rows * self.gradient_accumulation_steps;
        let Some(rollout) = self.rollout.filter(|rollout| self.alike && rollout.sequences == of_step) else {
            return self.clone();
        };
        let each = rollout.num_generations;
        let begun = if rows.is_multiple_of(each) || each.is_multiple_of(rows.max(1)) { 0 } else { 1 };
        let prompts = rows.div_ceil(each) + begun;
        let own = self.sample.saturating_sub(rollout.prompt) + 1;
        let tokens = prompts * rollout.prompt.saturating_sub(1) + rows * own;
        if tokens >= self.tokens || rollout.prompt < 2 {
            return self.clone();
        }
        Work { tokens, copied: self.tokens, ..self.clone() }
    }

    /// The ways in which rollouts go together with steps within `budget`, the fastest first.
    pub(super) fn within(&self, budget: Budget) -> Vec<Work> {
        let Some(rollout) = self.rollout else { return vec![self.clone()] };
        let with = |kv: u64, stays| Work { rollout: Some(Rollout { kv, stays, ..rollout }), ..self.clone() };
        let room = budget.device.saturating_sub(with(0, false).rollout_device());
        let kv = Memory::tensors_within(room).max(self.least_kv());
        vec![with(rollout.kv, true), with(rollout.kv.min(kv), false)]
    }

    /// The same with the fewest pages that it can work with.
    pub(super) fn with_least_rollout(&self) -> Work {
        let least =
            |rollout: Rollout| Rollout { kv: rollout.kv.min(self.least_kv()), stays: false, ..rollout };
        Work { rollout: self.rollout.map(least), ..self.clone() }
    }

    fn rollout_device(&self) -> u64 {
        self.memory(&vec![Policy::KEEP; self.layers.len()]).rollout_device()
    }

    fn page_bytes(&self) -> u64 {
        let token: u64 = self.layers.iter().map(|layer| 2 * self.element * layer.k * layer.d).sum();
        PAGE_SIZE as u64 * token
    }

    /// One sequence after the other.
    fn least_kv(&self) -> u64 {
        self.sample.div_ceil(PAGE_SIZE as u64) * self.page_bytes()
    }

    /// Of attention on pieces of prompts, of which there are `all` tokens: their keys and values copied together out of the pages
    /// (csrc/pages.cpp). Where scores are capped also those of 256 queries of a prompt, in 16 bits twice and in f32, its keys and values
    /// for each query head, and the mask (csrc/attention.cpp).
    fn behind_bytes(&self, all: u64, prompt: u64) -> u64 {
        const KEYS_TOGETHER: u64 = 1 << 15;
        const QUERIES: u64 = 256;
        let keys = all.min(prompt.max(KEYS_TOGETHER));
        let of_layer = |layer: &Layer| {
            let copied = 2 * self.element * layer.k * layer.d * keys;
            let capped =
                (8 * layer.h * QUERIES + 2 * self.element * layer.h * layer.d + 9 * QUERIES) * prompt;
            copied + if layer.softcap { capped } else { 0 }
        };
        self.layers.iter().map(of_layer).max().unwrap_or(0)
    }

    pub(super) fn rollout_memory(&self, rollout: &Rollout) -> RolloutMemory {
        let Rollout { sequences, num_generations, prompt, kv, stays } = *rollout;
        let groups = sequences.div_ceil(num_generations.max(1));
        let [tokens, completion, each] =
            [prompt, self.sample.saturating_sub(prompt), num_generations].map(|n| n as usize);
        let wanted = groups * pages_of_samples(tokens, completion, each) as u64 * self.page_bytes();
        let words = 4 * self.shape.v;
        let recorded = if self.embedding == 0 {
            0
        } else {
            recorded_rows(sequences as usize, tokens + 1..=self.sample as usize) as u64
        };
        // Prompts a piece at a time; logits of their ends, and a row of them for each sample.
        let rows = (groups * prompt).clamp(1, MOST_PROMPT_ROWS as u64).max(sequences);
        let sample = prompt.clamp(1, rows);
        let pass = Work { tokens: rows, sample, rollout: None, dropout: false, ..self.clone() };
        let blocks = (pass.layers.iter()).flat_map(|layer| {
            pass.block_bytes(layer, [&Policy::RECOMPUTE.attention, &Policy::RECOMPUTE.mlp])
        });
        let running = blocks.map(|block| block.forward).max().unwrap_or(0);
        let behind = if groups * prompt > MOST_PROMPT_ROWS as u64 {
            self.behind_bytes(groups * prompt, prompt)
        } else {
            0
        };
        RolloutMemory {
            kv_cache: wanted.min(kv),
            graphs: recorded * words,
            workspace: running + behind + (groups + sequences) * words + LIBRARIES + LASTING,
            stays,
        }
    }
}
