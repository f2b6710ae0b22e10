//! The best evaluation so far, and whether to go on.

use serde::{Deserialize, Serialize};

/// Keeps the lowest evaluation loss and counts the evaluations since. Part of a checkpoint.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct BestMetric {
    /// The lowest evaluation loss so far.
    pub best_metric: Option<f64>,
    /// The step at which it was seen.
    pub best_step: Option<u64>,
    /// Evaluations in a row that were not better by more than the threshold.
    pub evaluations_without_improvement: u64,
}

impl BestMetric {
    /// Takes note of the evaluation loss of `step`; true if it is the lowest so far. As in transformers'
    /// `EarlyStoppingCallback`, a loss that is lower by at most `threshold` is the best one but does not reset
    /// the count. NaN is never better.
    pub fn update(&mut self, step: u64, loss: f64, threshold: f64) -> bool {
        let is_best = self.best_metric.map_or(loss.is_finite(), |best| loss < best);
        let improves = is_best && self.best_metric.is_none_or(|best| best - loss > threshold);
        self.evaluations_without_improvement =
            if improves { 0 } else { self.evaluations_without_improvement + 1 };
        if is_best {
            (self.best_metric, self.best_step) = (Some(loss), Some(step));
        }
        is_best
    }

    /// Whether `patience` evaluations in a row brought no improvement.
    pub fn should_stop(&self, patience: Option<u64>) -> bool {
        patience.is_some_and(|patience| self.evaluations_without_improvement >= patience)
    }
}
