//! How a forward pass runs: with or without LoRA, what it keeps for the backward, which elements it drops.

use std::ops::Range;

use super::lora_casts::LinearCast;
use super::{Linear, Lora, LoraCasts, Policy};
use crate::ffi::{self, bridge};

/// Names one draw of dropout masks; with the module's number it is the key of the counter-based generator.
#[derive(Debug, Clone, Copy, Default)]
pub struct DropoutKey(pub u64);

impl DropoutKey {
    /// The key of micro-batch `micro_batch` of optimizer step `step`.
    pub fn new(seed: u64, step: u64, micro_batch: u64) -> DropoutKey {
        DropoutKey(mix(mix(mix(seed) ^ step) ^ micro_batch))
    }

    pub(super) fn module(self, layer: usize, module: usize) -> u64 {
        mix(self.0 ^ ((layer as u64) << 8 | module as u64))
    }
}

/// SplitMix64's finaliser: every bit of the input changes half of the output's.
fn mix(mut x: u64) -> u64 {
    x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// The LoRA of an adapter that stands beside the model: of each layer qkv, o, gate_up and down, of each of their parts.
#[derive(Debug, Default)]
pub struct LoraSet(pub Vec<Vec<Option<Lora>>>);

/// Neighbouring rows of a batch with one adapter.
#[derive(Debug, Clone)]
pub struct LoraRun<'a> {
    pub rows: Range<usize>,
    /// None for the model's own.
    pub adapter: Option<&'a LoraSet>,
}

/// How a block runs in this pass.
#[derive(Debug, Clone, Copy)]
pub struct Pass<'a> {
    /// What each layer keeps for the backward; the last one stands for all layers after it.
    pub policies: &'a [Policy],
    /// `Some` in training: LoRA dropout is on, with this key.
    pub dropout: Option<DropoutKey>,
    /// LoRA is left out: the base model, for instance as reference in preference training.
    pub without_lora: bool,
    /// LoRA in the dtype of the products, of this decoder; else each product makes its own.
    pub casts: Option<&'a LoraCasts>,
    /// In inference, the adapters of the rows, which all have one; empty where every row has the model's own.
    pub lora: &'a [LoraRun<'a>],
}

impl Pass<'_> {
    /// Inference: LoRA on, no dropout.
    pub const INFERENCE: Pass<'static> =
        Pass { policies: &[Policy::KEEP], dropout: None, without_lora: false, casts: None, lora: &[] };
}

impl<'a> Pass<'a> {
    pub(super) fn policy(&self, layer: usize) -> Policy {
        self.policies.get(layer).or(self.policies.last()).copied().unwrap_or(Policy::KEEP)
    }

    /// Of the linear `index` (qkv, o, gate_up, down) of a layer.
    pub(super) fn cast(&self, layer: usize, index: usize) -> Option<&'a LinearCast> {
        let casts = self.casts.filter(|_| !self.without_lora && self.lora.is_empty());
        casts.map(|casts| casts.linear(layer, index))
    }

    /// What the runs put on the linear `index` of a layer.
    pub(super) fn lora_rows(
        &self,
        linear: &'a Linear,
        layer: usize,
        index: usize,
    ) -> Vec<bridge::LoraRowsView<'a>> {
        let mut views = Vec::new();
        for run in self.lora.iter().filter(|_| !self.without_lora) {
            for (part, own) in linear.parts.iter().enumerate() {
                let lora = match run.adapter {
                    Some(set) => set.0[4 * layer + index][part].as_ref(),
                    None => own.lora.as_ref(),
                };
                let Some(lora) = lora else { continue };
                views.push(bridge::LoraRowsView {
                    first: run.rows.start as i64,
                    rows: run.rows.len() as i64,
                    part: part as i64,
                    lora_a: ffi::borrow(&lora.a),
                    lora_b: ffi::borrow(&lora.b),
                    scale: lora.scale,
                });
            }
        }
        views
    }
}
