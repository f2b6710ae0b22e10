//! The learning rate as a pure function of the step, equal to transformers' `get_scheduler`.

use std::f64::consts::PI;

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

/// Course of the learning rate; transformers' names.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "snake_case")]
#[value(rename_all = "snake_case")]
pub enum SchedulerType {
    /// Warmup, then a straight line to zero
    Linear,
    /// Warmup, then half a cosine to zero
    Cosine,
    /// The peak from the first step on, no warmup
    Constant,
    /// Warmup, then the peak
    ConstantWithWarmup,
    /// Warmup, the peak, then half a cosine to zero over the last lr_decay_ratio of the steps
    #[value(alias = "warmup_stable_decay")]
    #[serde(alias = "warmup_stable_decay")]
    Wsd,
}

/// A learning-rate schedule over a known number of optimizer steps.
///
/// With step s, W warmup steps, S steps in all, D decay steps:
/// - warmup (all but `constant`): `s / W` for s < W
/// - `linear`: `(S - s) / (S - W)`
/// - `cosine`: `(1 + cos(pi (s - W) / (S - W))) / 2`
/// - `wsd`: 1 until S - D, then `(1 + cos(pi (s - (S - D)) / D)) / 2`
///
/// each times [`learning_rate`](Self::learning_rate). As in transformers, s counts from 0: with a warmup the first
/// update has a learning rate of 0.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Schedule {
    pub kind: SchedulerType,
    /// The peak.
    pub learning_rate: f64,
    pub total_steps: u64,
    pub warmup_steps: u64,
    /// Length of `wsd`'s last part.
    pub decay_steps: u64,
}

impl Schedule {
    /// The schedule of `total_steps` steps whose warmup and decay are shares of them, rounded up;
    /// `warmup_steps`, where given, goes before `warmup_ratio`.
    pub fn new(
        kind: SchedulerType,
        learning_rate: f64,
        total_steps: u64,
        (warmup_steps, warmup_ratio): (Option<u64>, f64),
        decay_ratio: f64,
    ) -> Self {
        let share = |ratio: f64| (total_steps as f64 * ratio).ceil() as u64;
        let warmup_steps = warmup_steps.unwrap_or_else(|| share(warmup_ratio));
        let decay_steps = share(decay_ratio).min(total_steps.saturating_sub(warmup_steps));
        Self { kind, learning_rate, total_steps, warmup_steps, decay_steps }
    }

    /// The learning rate of the update number `step`, counted from 0.
    pub fn at(&self, step: u64) -> f64 {
        self.learning_rate * self.factor(step)
    }

    fn factor(&self, step: u64) -> f64 {
        if self.kind == SchedulerType::Constant {
            return 1.0;
        }
        if step < self.warmup_steps {
            return step as f64 / self.warmup_steps as f64;
        }
        let after_warmup = |steps: u64| steps.saturating_sub(self.warmup_steps) as f64;
        let half_cosine = |progress: f64| (0.5 * (1.0 + (PI * progress).cos())).max(0.0);
        match self.kind {
            SchedulerType::Constant | SchedulerType::ConstantWithWarmup => 1.0,
            SchedulerType::Linear => {
                self.total_steps.saturating_sub(step) as f64 / after_warmup(self.total_steps).max(1.0)
            }
            SchedulerType::Cosine => {
                half_cosine(after_warmup(step) / after_warmup(self.total_steps).max(1.0))
            }
            SchedulerType::Wsd => match self.total_steps.saturating_sub(self.decay_steps) {
                decay_start if step < decay_start => 1.0,
                _ if step >= self.total_steps => 0.0,
                decay_start => half_cosine((step - decay_start) as f64 / self.decay_steps as f64),
            },
        }
    }
}
