//! What a run minimises.

use std::collections::BTreeMap;

use anyhow::Result;
use tch::Tensor;

use crate::data::Batch;
use crate::models::{Decoder, DeviceBatch, Input};
use crate::ops::Pass;

/// A loss over a batch, as a sum: the loop divides by the targets of the whole optimizer step, so that any split of the
/// same samples into micro-batches gives the same gradient.
pub trait Objective {
    /// The summed loss of `batch`, differentiable: a scalar. Reads nothing back from the device, so that a step can be
    /// recorded as a CUDA graph.
    fn loss_sum(&self, decoder: &Decoder, batch: &DeviceBatch, pass: Pass) -> Result<Tensor>;

    /// What the sum is divided by.
    fn targets(&self, batch: &Batch) -> usize {
        batch.num_targets()
    }

    /// The batch on the decoder's device, with what the loss reads beside it.
    fn upload(&self, decoder: &Decoder, batch: &Batch) -> Result<DeviceBatch> {
        upload(decoder, batch)
    }

    /// Before the passes over the micro-batches of a step: what the loss of each takes from all of them.
    fn start_step(&self, _decoder: &Decoder, _batches: &[Batch]) -> Result<()> {
        Ok(())
    }

    /// What the passes since [`start_step`](Objective::start_step) measured beside the loss; reads from the device.
    fn measured(&self) -> Result<Vec<Measured>> {
        Ok(Vec::new())
    }

    /// Its part of the run's configuration: lines of YAML.
    fn config(&self) -> Result<String> {
        Ok(String::new())
    }
}

/// A sum over some samples or tokens, and their number: its mean is a metric.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Measured {
    /// In TRL's words.
    pub name: &'static str,
    pub sum: f64,
    pub count: f64,
}

/// Means by name, of sums that may come from several batches; without those of nothing.
pub fn means(measured: impl IntoIterator<Item = Measured>) -> BTreeMap<String, f64> {
    let mut sums: BTreeMap<&str, (f64, f64)> = BTreeMap::new();
    for Measured { name, sum, count } in measured {
        let total = sums.entry(name).or_default();
        *total = (total.0 + sum, total.1 + count);
    }
    let some = sums.into_iter().filter(|(_, (_, count))| *count > 0.0);
    some.map(|(name, (sum, count))| (name.to_owned(), sum / count)).collect()
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
    decoder.upload(input(batch), &batch.labels)
}

/// The decoder's view of a batch.
pub fn input(batch: &Batch) -> Input<'_> {
    Input {
        input_ids: &batch.input_ids,
        position_ids: &batch.position_ids,
        cu_seqlens: &batch.cu_seqlens,
        prefixes: &batch.prefixes,
    }
}
