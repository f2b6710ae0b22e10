//! What the training loop tells the outside: progress, metrics, checkpoints.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::Result;
use serde::{Deserialize, Serialize};

use crate::models::FastLanguageModel;

/// Known before the first step.
#[derive(Debug, Clone, Default)]
pub struct RunStart {
    /// Optimizer steps of the whole run.
    pub total_steps: u64,
    /// Steps done by the run that this one continues, 0 for a new one.
    pub start_step: u64,
    /// Passes over the data.
    pub num_train_epochs: f64,
}

/// One optimizer step; serialised, a line of `metrics.jsonl` in the words of transformers' log.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct StepMetrics {
    /// Optimizer steps done, this one included.
    pub step: u64,
    /// Passes over the data, with the part of the present one.
    pub epoch: f64,
    /// Mean over the target tokens of the step, nats.
    pub loss: f64,
    /// Before clipping, 2-norm over all trained tensors.
    pub grad_norm: f64,
    /// In f16, the scale of the next step's loss; halved where grad_norm was not finite, and the step left out.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub loss_scale: Option<f64>,
    pub learning_rate: f64,
    /// Tokens seen so far in the run, prompts included.
    pub num_tokens: u64,
    pub tokens_per_second: f64,
    pub samples_per_second: f64,
    /// In use by tensors on the device (CPU: the process's resident memory), bytes.
    pub memory: u64,
    /// What the objective and the source of the data measured, in TRL's words: `rewards/margins`, `reward`, ..
    #[serde(flatten)]
    pub objective: BTreeMap<String, f64>,
}

/// Texts that the model wrote for this step or one before, and what they are worth.
#[derive(Debug, Clone, Copy)]
pub struct Completions<'a> {
    /// Steps that were made with them, this one included.
    pub steps: u64,
    /// Names of the rewards.
    pub rewards: &'a [String],
    pub rows: &'a [CompletionRow],
}

impl Completions<'_> {
    /// Whether they are told of at `step` by who does so every `every` steps: each time the newest ones, and none twice.
    pub fn are_due(&self, step: u64, every: u64) -> bool {
        every > 0 && step.is_multiple_of(every) && self.steps <= every
    }
}

/// One of them; a line of `completions.jsonl`, with the step.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct CompletionRow {
    /// The prompt as the model saw it.
    pub prompt: String,
    pub completion: String,
    /// Each reward's number, None where it does not apply or failed.
    pub rewards: Vec<Option<f64>>,
    /// Their weighted sum.
    pub reward: Option<f64>,
    pub advantage: f64,
    /// What went wrong with which reward.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub errors: Vec<String>,
}

/// One evaluation.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct EvalMetrics {
    pub step: u64,
    pub epoch: f64,
    /// Mean over the target tokens of the evaluation set, nats; none where the model is judged by what it writes.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub eval_loss: Option<f64>,
    /// Seconds.
    pub eval_runtime: f64,
    pub eval_samples_per_second: f64,
    pub eval_tokens_per_second: f64,
    /// Whether it is the lowest loss so far.
    #[serde(default)]
    pub is_best: bool,
    /// What the objective measured: `eval_rewards/margins`, ..
    #[serde(flatten)]
    pub objective: BTreeMap<String, f64>,
}

/// Why a run ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, Default)]
#[serde(rename_all = "snake_case")]
pub enum StopReason {
    #[default]
    Done,
    EarlyStopping,
    Interrupted,
    NonFiniteGradient,
}

/// `train_results.json`, in transformers' words; memory in bytes.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct TrainResults {
    pub stop_reason: StopReason,
    /// Optimizer steps done.
    pub global_step: u64,
    pub epoch: f64,
    /// Seconds of this process's training.
    pub train_runtime: f64,
    /// Of this process: a resumed run counts from its checkpoint.
    pub train_samples_per_second: f64,
    pub train_steps_per_second: f64,
    pub train_tokens_per_second: f64,
    /// Tokens of the whole run.
    pub num_tokens: u64,
    /// Mean loss over the steps of this process.
    pub train_loss: f64,
    /// Loss of the last step.
    pub final_loss: f64,
    /// Lowest evaluation loss and its step.
    pub best_metric: Option<f64>,
    pub best_step: Option<u64>,
    /// After the model was loaded, before the first step.
    pub model_memory: u64,
    /// The highest during training, the model included; and what the plan of a run on a GPU said.
    pub peak_memory: u64,
    #[serde(default)]
    pub predicted_peak_memory: Option<u64>,
    /// The same of the whole process on a GPU, CUDA's own memory included.
    #[serde(default)]
    pub peak_process_memory: Option<u64>,
    #[serde(default)]
    pub predicted_process_memory: Option<u64>,
    /// The device's memory (CPU: the machine's).
    pub device_memory: u64,
    /// peak_memory / device_memory.
    pub device_memory_share: f64,
}

impl TrainResults {
    /// What training took beyond the model itself, bytes.
    pub fn training_memory(&self) -> u64 {
        self.peak_memory.saturating_sub(self.model_memory)
    }
}

/// Gets told what the loop does; every method may be left out. An error ends the run.
pub trait TrainObserver {
    fn on_start(&mut self, _start: &RunStart) -> Result<()> {
        Ok(())
    }
    /// After every optimizer step.
    fn on_step(&mut self, _metrics: &StepMetrics) -> Result<()> {
        Ok(())
    }
    /// After every optimizer step: the weights stay as they are until it returns. `last` is after the last one.
    fn between_steps(&mut self, _model: &FastLanguageModel, _last: bool) -> Result<()> {
        Ok(())
    }
    /// After each [`on_step`](TrainObserver::on_step), where the model writes the texts that it trains on.
    fn on_completions(&mut self, _step: u64, _completions: &Completions) -> Result<()> {
        Ok(())
    }
    fn on_eval(&mut self, _metrics: &EvalMetrics) -> Result<()> {
        Ok(())
    }
    /// After a checkpoint is whole on disk.
    fn on_checkpoint(&mut self, _step: u64, _folder: &Path) -> Result<()> {
        Ok(())
    }
    /// Something the user should know of, and the run goes on.
    fn on_warning(&mut self, _message: &str) -> Result<()> {
        Ok(())
    }
    fn on_end(&mut self, _results: &TrainResults) -> Result<()> {
        Ok(())
    }
}

/// Tells each in turn.
impl TrainObserver for Vec<Box<dyn TrainObserver>> {
    fn on_start(&mut self, start: &RunStart) -> Result<()> {
        self.iter_mut().try_for_each(|observer| observer.on_start(start))
    }
    fn on_step(&mut self, metrics: &StepMetrics) -> Result<()> {
        self.iter_mut().try_for_each(|observer| observer.on_step(metrics))
    }
    fn between_steps(&mut self, model: &FastLanguageModel, last: bool) -> Result<()> {
        self.iter_mut().try_for_each(|observer| observer.between_steps(model, last))
    }
    fn on_completions(&mut self, step: u64, completions: &Completions) -> Result<()> {
        self.iter_mut().try_for_each(|observer| observer.on_completions(step, completions))
    }
    fn on_eval(&mut self, metrics: &EvalMetrics) -> Result<()> {
        self.iter_mut().try_for_each(|observer| observer.on_eval(metrics))
    }
    fn on_checkpoint(&mut self, step: u64, folder: &Path) -> Result<()> {
        self.iter_mut().try_for_each(|observer| observer.on_checkpoint(step, folder))
    }
    fn on_warning(&mut self, message: &str) -> Result<()> {
        self.iter_mut().try_for_each(|observer| observer.on_warning(message))
    }
    fn on_end(&mut self, results: &TrainResults) -> Result<()> {
        self.iter_mut().try_for_each(|observer| observer.on_end(results))
    }
}
