//! The training loop.

use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use anyhow::{Context, Result};
use serde_json::Value;
use tch::Tensor;

use super::checkpoint::{self, Checkpoint, Checkpoints, OPTIMIZER, RUN_CONFIG, TrainerState};
use super::memory;
use super::objective::{Objective, input, means};
use super::observer::{EvalMetrics, RunStart, StepMetrics, StopReason, TrainObserver, TrainResults};
use super::optim::AdamW;
use super::source::{Evaluation, Interrupted, StepSource};
use super::step::{RunPlan, Stepper};
use super::{BestMetric, EvalStrategy, Schedule, TrainingArguments};
use crate::data::{Batch, BatchStream};
use crate::io::{Weights, write_atomically};
use crate::models::{Decoder, FastLanguageModel};
use crate::ops::Pass;

/// A model, its data and the words that say how to train it.
///
/// ```
/// use std::sync::{Arc, atomic::AtomicBool};
/// use ferrotune::data::{BatchOptions, BatchStream, DatasetOptions, prepare};
/// use ferrotune::train::{Sft, Trainer, TrainingArguments, observer::TrainObserver};
/// use ferrotune::{device, models::FastLanguageModel};
/// # fn main() -> anyhow::Result<()> {
/// # let output_dir = std::env::temp_dir().join(format!("ferrotune-doc-{}", std::process::id()));
/// let device = device::init(device::Choice::Cpu, None)?;
/// let mut model = FastLanguageModel::from_pretrained("examples/tiny/model".as_ref(), tch::Kind::Float, device)?;
/// let arguments = TrainingArguments {
///     model: "examples/tiny/model".into(),
///     dataset: vec!["examples/tiny/train.jsonl".into()],
///     max_steps: Some(3),
///     output_dir: output_dir.clone(),
///     ..TrainingArguments::default()
/// }
/// .resolved()?;
/// model.get_peft_model(arguments.adapter_config("examples/tiny/model"), arguments.seed)?;
/// let (data, _report) = prepare(&arguments.dataset, model.tokenizer()?, &DatasetOptions::default())?;
/// let options = BatchOptions { batch_size: 4, max_seq_length: 256, packing: false, shuffle: true, seed: 3407 };
/// let mut observer: Vec<Box<dyn TrainObserver>> = vec![]; // progress bars, metrics files
/// let trainer = Trainer {
///     model: &mut model,
///     objective: &Sft,
///     arguments: &arguments,
///     train: Box::new(BatchStream::new(Arc::new(data), options)?),
///     eval: None,
///     observer: &mut observer,
///     plan: None,
///     stop: &AtomicBool::new(false),
/// };
/// let results = trainer.run(None)?;
/// assert_eq!(results.global_step, 3);
/// model.save_trained(&output_dir)?; // an adapter that peft loads
/// # std::fs::remove_dir_all(&output_dir)?;
/// # Ok(())
/// # }
/// ```
pub struct Trainer<'a> {
    pub model: &'a mut FastLanguageModel,
    pub objective: &'a dyn Objective,
    /// Resolved: every choice made.
    pub arguments: &'a TrainingArguments,
    pub train: Box<dyn StepSource + 'a>,
    pub eval: Option<BatchStream>,
    pub observer: &'a mut dyn TrainObserver,
    /// What each layer keeps for the backward; without one, what `arguments.use_gradient_checkpointing` says.
    pub plan: Option<RunPlan>,
    /// Set from outside: save and stop after the present step.
    pub stop: &'a AtomicBool,
}

/// Where the loop stands between two optimizer steps.
#[derive(Clone)]
struct Progress {
    step: u64,
    num_tokens: u64,
    best: BestMetric,
}

impl Trainer<'_> {
    /// Trains, and leaves the weights of the last (or best) step in the model. `resume` continues a checkpoint.
    pub fn run(mut self, resume: Option<&Checkpoint>) -> Result<TrainResults> {
        let args = self.arguments;
        let checkpoints = Checkpoints::open(&args.output_dir, args.save_total_limit)?;
        if args.overwrite_output_dir && resume.is_none() {
            checkpoints.clear()?;
        }
        let accumulation = args.gradient_accumulation_steps as u64;
        let steps_per_epoch = self.train.steps_per_epoch(accumulation).max(1);
        let total_steps =
            args.max_steps.unwrap_or((steps_per_epoch as f64 * args.num_train_epochs).ceil() as u64).max(1);
        let schedule = self.schedule(total_steps);
        let mut stepper = Stepper::new(self.objective, args, &self.model.decoder)?;
        let predicted = self.plan.as_ref().map(|plan| plan.predicted);
        if let Some(plan) = self.plan.take() {
            stepper = stepper.with_plan(plan);
        }
        self.check_disk(&stepper.optimizer)?;
        let mut at = Progress { step: 0, num_tokens: 0, best: BestMetric::default() };
        if let Some(checkpoint) = resume {
            at = self.restore(checkpoint, &mut stepper.optimizer, total_steps)?;
        }
        write_atomically(&args.output_dir.join(RUN_CONFIG), self.config(&stepper.optimizer)?.as_bytes())?;
        let device = self.model.decoder.device;
        let model_memory = memory::in_use(device);
        self.observer.on_start(&RunStart {
            total_steps,
            start_step: at.step,
            num_train_epochs: total_steps as f64 / steps_per_epoch as f64,
        })?;

        let mut clock = Clock::start();
        let (first_step, first_tokens) = (at.step, at.num_tokens);
        let (mut samples, mut loss_sum, mut final_loss) = (0u64, 0.0, f64::NAN);
        let mut reason = StopReason::Done;
        while at.step < total_steps {
            let before = self.train.cursor()?;
            if self.train.needs_device() {
                stepper.give_way(&self.model.decoder)?;
            }
            let batches = match self.train.next_step(self.model, accumulation) {
                Err(error) if error.is::<Interrupted>() => {
                    reason = StopReason::Interrupted;
                    if at.step > first_step {
                        clock.pausing(|| {
                            self.save(&checkpoints, &stepper.optimizer, &at, before, total_steps)
                        })?;
                    }
                    break;
                }
                batches => batches?,
            };
            let learning_rate = schedule.at(at.step);
            let began = Instant::now();
            let outcome = stepper.run(&self.model.decoder, &batches, at.step, learning_rate)?;
            let mut more = means(self.objective.measured()?);
            more.extend(self.train.metrics(began.elapsed().as_secs_f64()));
            if outcome.overflowed() {
                self.observer.on_warning(&format!(
                    "step {}: the gradient overflowed in f16 and was not applied; the loss scale is {} now",
                    at.step + 1,
                    outcome.loss_scale.unwrap_or_default()
                ))?;
            } else if !outcome.is_finite() {
                let optimizer = &mut stepper.optimizer;
                return Err(self.non_finite(&checkpoints, optimizer, &at, before, &batches, total_steps));
            }

            at.step += 1;
            let tokens: usize = batches.iter().map(Batch::tokens).sum();
            let step_samples: usize = batches.iter().map(Batch::samples).sum();
            at.num_tokens += tokens as u64;
            samples += step_samples as u64;
            loss_sum += outcome.loss;
            final_loss = outcome.loss;
            let (tokens_per_second, samples_per_second) = clock.step(tokens, step_samples);
            self.observer.on_step(&StepMetrics {
                step: at.step,
                epoch: self.train.epoch(),
                loss: outcome.loss,
                grad_norm: outcome.grad_norm,
                loss_scale: outcome.loss_scale,
                learning_rate,
                num_tokens: at.num_tokens,
                tokens_per_second,
                samples_per_second,
                memory: memory::in_use(device),
                objective: more,
            })?;
            if let Some(completions) = self.train.completions() {
                self.observer.on_completions(at.step, &completions)?;
            }

            let last = at.step == total_steps;
            let mut save = last || (args.save_steps > 0 && at.step.is_multiple_of(args.save_steps));
            if self.evaluates_after(at.step, last) {
                if self.train.evaluates() {
                    stepper.give_way(&self.model.decoder)?;
                }
                let is_best = clock.pausing(|| self.evaluate(&mut at))?;
                save |= is_best && args.load_best_model_at_end;
                if at.best.should_stop(args.early_stopping_patience) {
                    reason = StopReason::EarlyStopping;
                }
            }
            if self.stop.load(Ordering::Relaxed) && !last {
                reason = StopReason::Interrupted;
            }
            let ends = last || reason != StopReason::Done;
            clock.pausing(|| self.observer.between_steps(self.model, ends))?;
            if save || reason != StopReason::Done {
                let cursor = self.train.cursor()?;
                clock.pausing(|| self.save(&checkpoints, &stepper.optimizer, &at, cursor, total_steps))?;
            }
            if reason != StopReason::Done {
                break;
            }
        }

        if args.load_best_model_at_end && reason != StopReason::Interrupted {
            self.load_best(&at)?;
        }
        let runtime = clock.seconds();
        let steps = at.step - first_step;
        let (peak_memory, device_memory) = (memory::peak(device), memory::total(device));
        let results = TrainResults {
            stop_reason: reason,
            global_step: at.step,
            epoch: self.train.epoch(),
            train_runtime: runtime,
            train_samples_per_second: samples as f64 / runtime,
            train_steps_per_second: steps as f64 / runtime,
            train_tokens_per_second: (at.num_tokens - first_tokens) as f64 / runtime,
            num_tokens: at.num_tokens,
            train_loss: if steps > 0 { loss_sum / steps as f64 } else { f64::NAN },
            final_loss,
            best_metric: at.best.best_metric,
            best_step: at.best.best_step,
            model_memory,
            peak_memory,
            predicted_peak_memory: predicted.map(|predicted| predicted.allocated),
            peak_process_memory: memory::process_peak(device),
            predicted_process_memory: predicted.map(|predicted| predicted.device),
            device_memory,
            device_memory_share: peak_memory as f64 / device_memory.max(1) as f64,
        };
        self.observer.on_end(&results)?;
        Ok(results)
    }

    /// Evaluates; true if the loss is the lowest so far. An evaluation that is cut off is not told of.
    fn evaluate(&mut self, at: &mut Progress) -> Result<bool> {
        let start = Instant::now();
        let epoch = self.train.epoch();
        let found = if self.train.evaluates() {
            match self.train.evaluate(self.model) {
                Err(error) if error.is::<Interrupted>() => return Ok(false),
                found => found?,
            }
        } else {
            let Some(eval) = &mut self.eval else { return Ok(false) };
            loss_on(eval, self.objective, &self.model.decoder)?
        };
        let threshold = self.arguments.early_stopping_threshold;
        let is_best = found.loss.is_some_and(|loss| at.best.update(at.step, loss, threshold));
        let eval_runtime = start.elapsed().as_secs_f64();
        self.observer.on_eval(&EvalMetrics {
            step: at.step,
            epoch,
            eval_loss: found.loss,
            eval_runtime,
            eval_samples_per_second: found.samples as f64 / eval_runtime,
            eval_tokens_per_second: found.tokens as f64 / eval_runtime,
            is_best,
            objective: found.means.into_iter().map(|(name, mean)| (format!("eval_{name}"), mean)).collect(),
        })?;
        Ok(is_best)
    }

    fn evaluates_after(&self, step: u64, last: bool) -> bool {
        if self.eval.is_none() && !self.train.evaluates() {
            return false;
        }
        match self.arguments.eval_strategy {
            None | Some(EvalStrategy::No) => false,
            Some(EvalStrategy::Steps) => {
                last || self.arguments.eval_steps.is_some_and(|every| step.is_multiple_of(every.max(1)))
            }
            Some(EvalStrategy::Epoch) => last || self.train.is_epoch_end(),
        }
    }

    /// Writes a checkpoint. A full disk costs the checkpoint, not the run.
    fn save(
        &mut self,
        checkpoints: &Checkpoints,
        optimizer: &AdamW,
        at: &Progress,
        cursor: Value,
        total_steps: u64,
    ) -> Result<()> {
        let args = self.arguments;
        let state = TrainerState {
            global_step: at.step,
            max_steps: total_steps,
            epoch: self.train.epoch(),
            cursor,
            seed: args.seed,
            threads: tch::get_num_threads() as usize,
            num_tokens: at.num_tokens,
            template_now: self.model.tokenizer().ok().and_then(|tokenizer| tokenizer.template_now()),
            best: at.best.clone(),
            ..TrainerState::default()
        };
        let config = self.config(optimizer)?;
        let model = &*self.model;
        let saved = checkpoints.save(&state, |folder: &Path| {
            model.save_trained(folder)?;
            crate::io::write_safetensors(&folder.join(OPTIMIZER), &optimizer.state())?;
            write_atomically(&folder.join(RUN_CONFIG), config.as_bytes())
        });
        match saved {
            Ok(folder) => self.observer.on_checkpoint(at.step, &folder),
            Err(error) if checkpoint::is_disk_full(&error) => {
                let message =
                    format!("{error:#}: the checkpoint before stays, training goes on without this one");
                self.observer.on_warning(&message)
            }
            Err(error) => Err(error),
        }
    }

    /// The effective configuration.
    fn config(&self, optimizer: &AdamW) -> Result<String> {
        let own = TrainingArguments { optim: Some(optimizer.optim()), ..self.arguments.clone() }.to_yaml()?;
        Ok(own + &self.objective.config()?)
    }

    /// Puts a checkpoint's weights, moments, data cursor and counters in place.
    fn restore(&mut self, from: &Checkpoint, optimizer: &mut AdamW, total_steps: u64) -> Result<Progress> {
        let folder = from.folder.display();
        let state = &from.state;
        let threads = tch::get_num_threads() as usize;
        if state.threads != threads {
            self.observer.on_warning(&format!(
                "{folder} was written with {} CPU threads, now {threads}: the run continues, but not to the bit \
                 (--threads {} does)",
                state.threads, state.threads
            ))?;
        }
        if state.max_steps != total_steps {
            self.observer.on_warning(&format!(
                "{folder} belongs to a run of {} steps, this one has {total_steps}: the learning rate follows the \
                 new length",
                state.max_steps
            ))?;
        }
        self.model.load_trained(&from.folder)?;
        let path = from.folder.join(OPTIMIZER);
        let moments = read_all(&path)?;
        optimizer.load_state(moments, &path.display().to_string())?;
        self.train
            .seek(&state.cursor)
            .with_context(|| format!("resuming from {folder}: the data cursor in trainer_state.json"))?;
        Ok(Progress { step: state.global_step, num_tokens: state.num_tokens, best: state.best.clone() })
    }

    /// Saves the state before the step, finds the first module that goes wrong, and says both.
    fn non_finite(
        &mut self,
        checkpoints: &Checkpoints,
        optimizer: &mut AdamW,
        at: &Progress,
        before: Value,
        batches: &[Batch],
        total_steps: u64,
    ) -> anyhow::Error {
        let culprit = batches
            .iter()
            .find_map(|batch| self.model.decoder.first_non_finite(input(batch), &batch.labels).transpose())
            .unwrap_or_else(|| Ok(self.first_non_finite_gradient()));
        let saved =
            optimizer.zero_grad().and_then(|()| self.save(checkpoints, optimizer, at, before, total_steps));
        let culprit = culprit.unwrap_or_else(|error| format!("a module that could not be found ({error:#})"));
        let kept = match saved {
            Ok(()) => format!(
                "the state before it is in {}",
                self.arguments.output_dir.join(format!("checkpoint-{}", at.step)).display()
            ),
            Err(error) => format!("saving the state before it failed too: {error:#}"),
        };
        anyhow::anyhow!(
            "step {}: loss or gradient is not finite and was not applied; the first non-finite value is in {culprit}; \
             {kept}. Usual causes: a learning rate that is too high, or weights that overflow in this --dtype",
            at.step + 1
        )
    }

    fn first_non_finite_gradient(&self) -> String {
        let finite = |tensor: &Tensor| tensor.isfinite().all().int64_value(&[]) == 1;
        // The backward runs from the last layer to the first.
        let parameters = self.model.decoder.trainable();
        let bad = parameters.iter().rev().find(|param| {
            let grad = param.tensor.grad();
            grad.defined() && !finite(&grad)
        });
        bad.map_or("the sum of all gradients".into(), |param| format!("the gradient of {}", param.name))
    }

    fn load_best(&mut self, at: &Progress) -> Result<()> {
        let Some(step) = at.best.best_step.filter(|&step| step != at.step) else { return Ok(()) };
        let folder: PathBuf = self.arguments.output_dir.join(format!("checkpoint-{step}"));
        if !folder.is_dir() {
            return self.observer.on_warning(&format!(
                "the checkpoint of the best evaluation ({}) was not saved: the weights of the last step are kept",
                folder.display()
            ));
        }
        self.model.load_trained(&folder)
    }

    fn check_disk(&mut self, optimizer: &AdamW) -> Result<()> {
        let elements: usize = optimizer.params().iter().map(|param| param.tensor.numel()).sum();
        // Weights in f32, and their moments.
        let bytes = 4 * elements as u64 + optimizer.state_bytes();
        let kept = self.arguments.save_total_limit.unwrap_or(2) as u64;
        match checkpoint::check_free_space(&self.arguments.output_dir, bytes, kept)? {
            Some(warning) => self.observer.on_warning(&warning),
            None => Ok(()),
        }
    }

    fn schedule(&self, total_steps: u64) -> Schedule {
        let args = self.arguments;
        let learning_rate = args.learning_rate.unwrap_or(2e-4);
        let warmup = (args.warmup_steps, args.warmup_ratio);
        Schedule::new(args.lr_scheduler_type, learning_rate, total_steps, warmup, args.lr_decay_ratio)
    }
}

/// Mean loss over an evaluation set.
fn loss_on(eval: &mut BatchStream, objective: &dyn Objective, decoder: &Decoder) -> Result<Evaluation> {
    let _no_grad = tch::no_grad_guard();
    let (mut loss, mut targets, mut measured) = (0.0, 0, Vec::new());
    let mut found = Evaluation::default();
    while let Some(batch) = eval.next_batch()? {
        objective.start_step(decoder, std::slice::from_ref(&batch))?;
        let on_device = objective.upload(decoder, &batch)?;
        loss += objective.loss_sum(decoder, &on_device, Pass::INFERENCE)?.f_double_value(&[])?;
        measured.extend(objective.measured()?);
        targets += objective.targets(&batch);
        found.tokens += batch.tokens();
        found.samples += batch.samples();
    }
    found.loss = Some(loss / targets.max(1) as f64);
    found.means = means(measured).into_iter().collect();
    Ok(found)
}

/// Tensors of a safetensors file by name.
pub(crate) fn read_all(path: &Path) -> Result<std::collections::HashMap<String, Tensor>> {
    let weights = Weights::open_files(&[path.to_path_buf()])?;
    weights.names().map(|name| Ok((name.to_string(), weights.get(name)?))).collect()
}

/// Time spent training, evaluation and saving apart, and the speed of the last steps.
struct Clock {
    start: Instant,
    paused: f64,
    /// (seconds, tokens, samples) of the last steps.
    recent: VecDeque<(f64, usize, usize)>,
    last: f64,
}

impl Clock {
    fn start() -> Clock {
        Clock { start: Instant::now(), paused: 0.0, recent: VecDeque::new(), last: 0.0 }
    }

    fn seconds(&self) -> f64 {
        self.start.elapsed().as_secs_f64() - self.paused
    }

    fn pausing<T>(&mut self, work: impl FnOnce() -> T) -> T {
        let before = Instant::now();
        let result = work();
        self.paused += before.elapsed().as_secs_f64();
        result
    }

    /// Notes a step; tokens/s and samples/s over the last 20.
    fn step(&mut self, tokens: usize, samples: usize) -> (f64, f64) {
        let now = self.seconds();
        self.recent.push_back((now - self.last, tokens, samples));
        self.last = now;
        if self.recent.len() > 20 {
            self.recent.pop_front();
        }
        let seconds: f64 = self.recent.iter().map(|step| step.0).sum::<f64>().max(1e-9);
        let tokens: usize = self.recent.iter().map(|step| step.1).sum();
        let samples: usize = self.recent.iter().map(|step| step.2).sum();
        (tokens as f64 / seconds, samples as f64 / seconds)
    }
}
