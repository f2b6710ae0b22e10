//! Rewards: what a completion is worth, as a number.

use anyhow::Result;
use serde_json::{Map, Value};

/// One completion to be judged.
pub struct Sample<'a> {
    /// A string, or a conversation (an array of `{"role", "content"}`).
    pub prompt: &'a Value,
    pub completion: &'a str,
    pub completion_ids: &'a [i64],
    /// The completion ended at the longest length, not at a stop token.
    pub truncated: bool,
    /// The dataset row's other columns, such as `answer`.
    pub columns: &'a Map<String, Value>,
}

/// A function from completions to numbers.
pub trait Reward {
    /// How metrics and tables call it.
    fn name(&self) -> &str;

    /// One result a sample, in order: a number, None where it does not apply, or what went wrong with that sample.
    fn score(&mut self, samples: &[Sample]) -> Vec<Result<Option<f64>>>;
}
