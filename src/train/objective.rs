//! What a run minimises.

use anyhow::Result;
use tch::Tensor;

use super::TrainingArguments;
use crate::data::Batch;
use crate::models::{Decoder, DeviceBatch, Input};
use crate::ops::Pass;

/// A loss over a batch, as a sum: the loop divides by the targets of the whole optimizer step, so that any split of the
/// same samples into micro-batches gives the same gradient.
pub trait Objective {
    /// The summed loss of `batch`, differentiable: a scalar. Reads nothing back from the device, so that a step can be
    /// recorded as a CUDA graph.
    fn loss_sum(&self, decoder: &Decoder, batch: &DeviceBatch, pass: Pass) -> Result<Tensor>;

    /// What the sum is divided by; 0 where it is divided already.
    fn targets(&self, batch: &Batch) -> usize {
        batch.num_targets()
    }

    /// More numbers on the micro-batches since the last call: names and values. Waits for the device.
    fn metrics(&self) -> Result<Vec<(String, f64)>> {
        Ok(Vec::new())
    }

    /// What `run.yaml` says of a run with these arguments.
    fn run_config(&self, arguments: TrainingArguments) -> Result<String> {
        arguments.to_yaml()
    }
}

/// Supervised fine-tuning: cross-entropy of the next token wherever its label is not -100.
pub struct Sft;

impl Objective for Sft {
    fn loss_sum(&self, decoder: &Decoder, batch: &DeviceBatch, pass: Pass) -> Result<Tensor> {
        decoder.batch_loss_sum(batch, pass)
    }
}

/// The batch on the decoder's device.
pub fn upload(decoder: &Decoder, batch: &Batch) -> Result<DeviceBatch> {
    decoder.upload(input(batch), &batch.labels)?.with_columns(&batch.columns)
}

/// The decoder's view of a batch.
pub fn input(batch: &Batch) -> Input<'_> {
    Input { input_ids: &batch.input_ids, position_ids: &batch.position_ids, cu_seqlens: &batch.cu_seqlens }
}
