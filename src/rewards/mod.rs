//! Rewards: what a completion is worth, as a number.

mod command;
mod http;
mod judge;
mod numbers;
mod reward_model;
mod rules;
mod spec;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Result, anyhow, ensure};
use serde_json::{Map, Value};

pub use command::Command;
pub use http::Http;
pub use numbers::{Number, stated_number};
pub use reward_model::{RewardModel, TorchScriptReward};
pub use rules::{Exact, Format, Json, Keyword, Length, Numeric, Regex, Repetition};
pub use spec::{RewardOptions, RewardSpec, build};

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

/// Raised by whoever wants a wait for commands and servers to end.
#[derive(Debug, Clone, Default)]
pub struct Stop(pub Arc<AtomicBool>);

impl Stop {
    /// Whether it was raised.
    pub fn is_raised(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }

    fn check(&self) -> Result<()> {
        ensure!(!self.is_raised(), "not judged: the run was asked to stop");
        Ok(())
    }
}

/// A function from completions to numbers.
pub trait Reward {
    /// How metrics and tables call it.
    fn name(&self) -> &str;

    /// One result a sample, in order: a number, None where it does not apply, or what went wrong with that sample.
    fn score(&mut self, samples: &[Sample]) -> Vec<Result<Option<f64>>>;

    /// How often something that the reward talks to was started again.
    fn restarts(&self) -> u64 {
        0
    }
}

/// Several rewards and their weights.
pub struct Rewards {
    rewards: Vec<(Box<dyn Reward>, f64)>,
    names: Vec<String>,
}

/// What [`Rewards::score`] gives, for S samples and K rewards.
#[derive(Debug, Default)]
pub struct Scores {
    /// `[S][K]`: each reward's number, before the weight; None where it does not apply or failed.
    pub values: Vec<Vec<Option<f64>>>,
    /// `[S]`: `sum_k w_k r_k` over the rewards that gave a number; None if none did, and where one failed: beside samples that have all
    /// of theirs a sum without one would say that this sample is worse, or better.
    pub total: Vec<Option<f64>>,
    pub failures: Vec<Failure>,
}

/// A reward that gave no number where it should have.
#[derive(Debug)]
pub struct Failure {
    /// The sample's place among those that were scored.
    pub sample: usize,
    /// The reward's name.
    pub reward: String,
    pub error: anyhow::Error,
}

impl Scores {
    /// What went wrong with a sample: the reward and why.
    pub fn errors_of(&self, sample: usize) -> impl Iterator<Item = String> {
        let own = self.failures.iter().filter(move |failure| failure.sample == sample);
        own.map(|failure| format!("{}: {:#}", failure.reward, failure.error))
    }
}

impl Rewards {
    /// Rewards with their weights. A name that comes again gets a number.
    pub fn new(rewards: Vec<(Box<dyn Reward>, f64)>) -> Rewards {
        let mut names: Vec<String> = Vec::new();
        for (reward, _) in &rewards {
            let again = names.iter().filter(|name| name.split('#').next() == Some(reward.name())).count();
            names.push(match again {
                0 => reward.name().to_owned(),
                again => format!("{}#{}", reward.name(), again + 1),
            });
        }
        Rewards { rewards, names }
    }

    /// One name a reward, no two the same.
    pub fn names(&self) -> &[String] {
        &self.names
    }

    /// How often processes behind the rewards were started again, all together.
    pub fn restarts(&self) -> u64 {
        self.rewards.iter().map(|(reward, _)| reward.restarts()).sum()
    }

    /// Judges `samples`. A reward that fails, or gives what is not finite, costs that sample, and stands in [`Scores::failures`].
    pub fn score(&mut self, samples: &[Sample]) -> Scores {
        let mut scores = Scores {
            values: vec![Vec::new(); samples.len()],
            total: vec![None; samples.len()],
            failures: vec![],
        };
        for ((reward, weight), name) in self.rewards.iter_mut().zip(&self.names) {
            let mut results = reward.score(samples).into_iter();
            for (sample, values) in scores.values.iter_mut().enumerate() {
                let result =
                    results.next().unwrap_or_else(|| Err(anyhow!("it gave fewer results than samples")));
                let value = result.and_then(finite).unwrap_or_else(|error| {
                    scores.failures.push(Failure { sample, reward: name.clone(), error });
                    None
                });
                if let Some(value) = value {
                    *scores.total[sample].get_or_insert(0.0) += *weight * value;
                }
                values.push(value);
            }
        }
        for failure in &scores.failures {
            scores.total[failure.sample] = None;
        }
        scores
    }
}

fn finite(value: Option<f64>) -> Result<Option<f64>> {
    match value {
        Some(value) if !value.is_finite() => Err(anyhow!("it gave {value}, expected a finite number")),
        value => Ok(value),
    }
}
