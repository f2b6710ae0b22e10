//! Where a run's micro-batches come from.

use std::collections::BTreeMap;
use std::fmt;

use anyhow::{Context, Result};
use serde_json::Value;

use super::observer::Completions;
use crate::data::{Batch, BatchStream};
use crate::models::FastLanguageModel;

/// The next step was not made, or an evaluation not ended, as the run was asked to stop: the source stands where it stood.
#[derive(Debug)]
pub struct Interrupted;

impl fmt::Display for Interrupted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("asked to stop")
    }
}

impl std::error::Error for Interrupted {}

/// What an evaluation found.
#[derive(Debug, Clone, Default)]
pub struct Evaluation {
    /// Mean over the target tokens, nats, where it is a loss that counts.
    pub loss: Option<f64>,
    pub tokens: usize,
    pub samples: usize,
    /// Means by name.
    pub means: BTreeMap<String, f64>,
}

/// The micro-batches of one optimizer step after another, from any cursor on.
pub trait StepSource {
    /// Optimizer steps in one pass over the data, each of `accumulation` micro-batches.
    fn steps_per_epoch(&self, accumulation: u64) -> u64;

    /// The micro-batches of the next step, at least one; fewer than `accumulation` at the end of an epoch. The model is as it
    /// will be when the step runs.
    ///
    /// # Errors
    /// [`Interrupted`], where it takes long and heeds that the run was asked to stop.
    fn next_step(&mut self, model: &FastLanguageModel, accumulation: u64) -> Result<Vec<Batch>>;

    /// Whether the device should be left to it while it makes the next step's micro-batches.
    fn needs_device(&self) -> bool {
        false
    }

    /// Where the source stands, as JSON: the steps that follow a [`seek`](StepSource::seek) to here are those that follow now.
    fn cursor(&self) -> Result<Value>;

    /// Goes to `cursor`.
    ///
    /// # Errors
    /// It is not one of this source and its data.
    fn seek(&mut self, cursor: &Value) -> Result<()>;

    /// Passes over the data so far, with the part of the present one.
    fn epoch(&self) -> f64;

    /// Whether the last step was the last one of an epoch.
    fn is_epoch_end(&self) -> bool;

    /// More numbers on the last step, whose forward and backward took `training_seconds`: finite ones, by name.
    fn metrics(&mut self, _training_seconds: f64) -> BTreeMap<String, f64> {
        BTreeMap::new()
    }

    /// Whether it holds data out that [`evaluate`](StepSource::evaluate) asks the model about.
    fn evaluates(&self) -> bool {
        false
    }

    /// How the model does on the data that the source holds out.
    ///
    /// # Errors
    /// [`Interrupted`], where the run was asked to stop before all of it was judged.
    fn evaluate(&mut self, _model: &FastLanguageModel) -> Result<Evaluation> {
        Ok(Evaluation::default())
    }

    /// The texts that the last step was made of, or a part of them, where the model wrote them.
    fn completions(&self) -> Option<Completions<'_>> {
        None
    }
}

impl StepSource for BatchStream {
    fn steps_per_epoch(&self, accumulation: u64) -> u64 {
        self.batches_per_epoch().div_ceil(accumulation)
    }

    fn next_step(&mut self, _model: &FastLanguageModel, accumulation: u64) -> Result<Vec<Batch>> {
        let mut batches = Vec::with_capacity(accumulation as usize);
        while batches.len() < accumulation as usize {
            match self.next_batch()? {
                Some(batch) => batches.push(batch),
                None if batches.is_empty() => continue,
                None => break,
            }
        }
        Ok(batches)
    }

    fn cursor(&self) -> Result<Value> {
        Ok(serde_json::to_value(BatchStream::cursor(self))?)
    }

    fn seek(&mut self, cursor: &Value) -> Result<()> {
        let cursor = serde_json::from_value(cursor.clone()).context("not a place in a dataset")?;
        BatchStream::seek(self, &cursor)
    }

    fn epoch(&self) -> f64 {
        BatchStream::cursor(self).epoch as f64 + self.epoch_share()
    }

    fn is_epoch_end(&self) -> bool {
        BatchStream::is_epoch_end(self)
    }
}
