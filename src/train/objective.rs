//! What a run minimises.

use anyhow::Result;
use tch::Tensor;

use crate::data::Batch;
use crate::models::{Decoder, Input};
use crate::ops::Pass;

/// A loss over a batch, as a sum: the loop divides by the targets of the whole optimizer step, so that any split of the
/// same samples into micro-batches gives the same gradient.
pub trait Objective {
    /// The summed loss of `batch`, differentiable: a scalar.
    fn loss_sum(&self, decoder: &Decoder, batch: &Batch, pass: Pass) -> Result<Tensor>;

    /// What the sum is divided by.
    fn targets(&self, batch: &Batch) -> usize {
        batch.num_targets()
    }
}

/// Supervised fine-tuning: cross-entropy of the next token wherever its label is not -100.
pub struct Sft;

impl Objective for Sft {
    fn loss_sum(&self, decoder: &Decoder, batch: &Batch, pass: Pass) -> Result<Tensor> {
        decoder.loss_sum(input(batch), &batch.labels, pass)
    }
}

/// The decoder's view of a batch.
pub fn input(batch: &Batch) -> Input<'_> {
    Input { input_ids: &batch.input_ids, position_ids: &batch.position_ids, cu_seqlens: &batch.cu_seqlens }
}
