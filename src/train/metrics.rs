//! What a run leaves to read: `metrics.jsonl`, TensorBoard events, the loss curve and `train_results.json`.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde::Serialize;
use serde_json::Value;

use crate::io::write_atomically;
use crate::train::observer::{
    CompletionRow, Completions, EvalMetrics, RunStart, StepMetrics, TrainObserver, TrainResults,
};
use crate::train::plot;
use crate::train::tensorboard::EventWriter;

/// One JSON object a step or evaluation.
pub const METRICS: &str = "metrics.jsonl";
/// The summary of the run.
pub const TRAIN_RESULTS: &str = "train_results.json";
/// The picture of the losses.
pub const LOSS_CURVE: &str = "loss.svg";
/// One JSON object a completion, where the model writes what it trains on.
pub const COMPLETIONS: &str = "completions.jsonl";
/// Folder of the TensorBoard event files.
pub const TENSORBOARD: &str = "runs";

/// Losses, or another metric, by step.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct LossHistory {
    /// (step, loss) of the training steps.
    pub train: Vec<(u64, f64)>,
    /// (step, eval_loss) of the evaluations.
    pub eval: Vec<(u64, f64)>,
}

/// Means of the objective's metrics over the steps since the last that was told of, each over the steps that had it.
#[derive(Debug, Default)]
pub struct WindowMeans {
    sums: BTreeMap<String, (f64, u64)>,
}

impl WindowMeans {
    /// Takes those of a step into account.
    pub fn add(&mut self, metrics: &BTreeMap<String, f64>) {
        for (name, value) in metrics {
            let (sum, count) = self.sums.entry(name.clone()).or_default();
            *sum += value;
            *count += 1;
        }
    }

    /// The means; a new window begins.
    pub fn take(&mut self) -> BTreeMap<String, f64> {
        let sums = std::mem::take(&mut self.sums);
        sums.into_iter().map(|(name, (sum, count))| (name, sum / count as f64)).collect()
    }
}

/// `metrics.jsonl`, open for appending.
#[derive(Debug)]
pub struct MetricsFile {
    file: File,
    path: PathBuf,
}

impl MetricsFile {
    /// Opens the file and drops the records of steps after `last_step`, which a resumed run does again, as well as a
    /// last line that a killed process left unfinished. The losses of what stays are returned.
    pub fn open(path: &Path, last_step: u64) -> Result<(Self, LossHistory)> {
        let (kept, history) = match fs::read_to_string(path) {
            Ok(text) => keep(&text, last_step),
            Err(error) if error.kind() == ErrorKind::NotFound => Default::default(),
            Err(error) => return Err(error).with_context(|| format!("reading {}", path.display())),
        };
        write_atomically(path, kept.as_bytes())?;
        let file = OpenOptions::new()
            .append(true)
            .open(path)
            .with_context(|| format!("opening {}", path.display()))?;
        Ok((Self { file, path: path.to_owned() }, history))
    }

    /// Adds one record, in one write.
    pub fn append(&mut self, record: &impl Serialize) -> Result<()> {
        let mut line = serde_json::to_vec(record)?;
        line.push(b'\n');
        self.file.write_all(&line).with_context(|| format!("writing {}", self.path.display()))
    }
}

fn keep(text: &str, last_step: u64) -> (String, LossHistory) {
    let mut kept = String::new();
    let mut history = LossHistory::default();
    for line in text.lines() {
        let Ok(record) = serde_json::from_str::<Value>(line) else { continue };
        let Some(step) = record["step"].as_u64().filter(|step| *step <= last_step) else { continue };
        if let Some(loss) = record["loss"].as_f64() {
            history.train.push((step, loss));
        }
        if let Some(loss) = record["eval_loss"].as_f64() {
            history.eval.push((step, loss));
        }
        kept.push_str(line);
        kept.push('\n');
    }
    (kept, history)
}

/// The course of `metric` in a metrics file, and of `eval_` with its name.
pub fn history_of(path: &Path, metric: &str) -> Result<LossHistory> {
    let text = fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))?;
    let mut history = LossHistory::default();
    let eval = format!("eval_{metric}");
    for record in text.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok()) {
        let Some(step) = record["step"].as_u64() else { continue };
        history.train.extend(record[metric].as_f64().map(|value| (step, value)));
        history.eval.extend(record[&eval].as_f64().map(|value| (step, value)));
    }
    Ok(history)
}

#[derive(Serialize)]
struct Numbered<'a> {
    step: u64,
    #[serde(flatten)]
    row: &'a CompletionRow,
}

/// Writes the run's records into its output folder. A disk that is full in the middle of the run costs records, not
/// the run.
#[derive(Debug)]
pub struct RunLog {
    output_dir: PathBuf,
    title: String,
    logging_steps: u64,
    /// Metrics of the objective that get a picture.
    plots: &'static [&'static str],
    open: Option<(MetricsFile, EventWriter)>,
    /// 0 for no file.
    completions_steps: u64,
    completions: Option<MetricsFile>,
    window: WindowMeans,
    history: LossHistory,
    total_steps: u64,
    has_warned: bool,
}

impl RunLog {
    /// A log of every `logging_steps`th step into `output_dir`; `title` stands over the loss curve.
    pub fn new(output_dir: &Path, title: &str, logging_steps: u64) -> Self {
        Self {
            output_dir: output_dir.to_owned(),
            title: title.to_owned(),
            logging_steps,
            plots: &[],
            open: None,
            completions_steps: 0,
            completions: None,
            window: WindowMeans::default(),
            history: LossHistory::default(),
            total_steps: 0,
            has_warned: false,
        }
    }

    /// The same, also drawing `metrics` of the objective: `rewards/margins` into `rewards_margins.svg`.
    pub fn plotting(self, metrics: &'static [&'static str]) -> Self {
        Self { plots: metrics, ..self }
    }

    /// The same with a file of the completions of every `steps`th step; 0 for none.
    pub fn with_completions(self, steps: u64) -> Self {
        Self { completions_steps: steps, ..self }
    }

    fn lost(&mut self, step: u64, error: anyhow::Error) {
        if !std::mem::replace(&mut self.has_warned, true) {
            tracing::warn!("metrics of step {step} are lost: {error:#}");
        }
    }

    fn record(&mut self, step: u64, record: &impl Serialize, scalars: &[(&str, f64)]) {
        let Some((metrics, events)) = &mut self.open else { return };
        let written = metrics.append(record).and_then(|()| events.scalars(step, scalars));
        if let Err(error) = written {
            self.lost(step, error);
        }
    }

    fn draw(&self) -> Result<()> {
        if self.history.train.is_empty() {
            return Ok(());
        }
        let picture = plot::loss_curve(&self.title, &self.history)?;
        write_atomically(&self.output_dir.join(LOSS_CURVE), picture.as_bytes())?;
        for metric in self.plots {
            let history = history_of(&self.output_dir.join(METRICS), metric)?;
            let picture = plot::curve(&self.title, metric, &history)?;
            let name = format!("{}.svg", metric.replace('/', "_"));
            write_atomically(&self.output_dir.join(name), picture.as_bytes())?;
        }
        Ok(())
    }
}

impl TrainObserver for RunLog {
    fn on_start(&mut self, start: &RunStart) -> Result<()> {
        fs::create_dir_all(&self.output_dir)
            .with_context(|| format!("creating {}", self.output_dir.display()))?;
        self.total_steps = start.total_steps;
        let (metrics, history) = MetricsFile::open(&self.output_dir.join(METRICS), start.start_step)?;
        let first_step = if start.start_step > 0 { start.start_step + 1 } else { 0 };
        let events = EventWriter::create(&self.output_dir.join(TENSORBOARD), first_step)?;
        self.open = Some((metrics, events));
        if self.completions_steps > 0 {
            self.completions =
                Some(MetricsFile::open(&self.output_dir.join(COMPLETIONS), start.start_step)?.0);
        }
        self.history = history;
        Ok(())
    }

    fn on_step(&mut self, metrics: &StepMetrics) -> Result<()> {
        self.window.add(&metrics.objective);
        if !metrics.step.is_multiple_of(self.logging_steps) && metrics.step != self.total_steps {
            return Ok(());
        }
        let metrics = &StepMetrics { objective: self.window.take(), ..metrics.clone() };
        self.history.train.push((metrics.step, metrics.loss));
        let mut scalars = vec![
            ("train/loss", metrics.loss),
            ("train/learning_rate", metrics.learning_rate),
            ("train/grad_norm", metrics.grad_norm),
            ("train/epoch", metrics.epoch),
            ("train/tokens_per_second", metrics.tokens_per_second),
            ("train/samples_per_second", metrics.samples_per_second),
            ("train/memory", metrics.memory as f64),
        ];
        scalars.extend(metrics.loss_scale.map(|scale| ("train/loss_scale", scale)));
        let names: Vec<String> = metrics.objective.keys().map(|name| format!("train/{name}")).collect();
        scalars.extend(names.iter().map(String::as_str).zip(metrics.objective.values().copied()));
        self.record(metrics.step, metrics, &scalars);
        Ok(())
    }

    fn on_completions(&mut self, step: u64, completions: &Completions) -> Result<()> {
        if !completions.are_due(step, self.completions_steps) {
            return Ok(());
        }
        let Some(file) = &mut self.completions else { return Ok(()) };
        let written = completions.rows.iter().try_for_each(|row| file.append(&Numbered { step, row }));
        if let Err(error) = written {
            self.lost(step, error);
        }
        Ok(())
    }

    fn on_eval(&mut self, metrics: &EvalMetrics) -> Result<()> {
        self.history.eval.extend(metrics.eval_loss.map(|loss| (metrics.step, loss)));
        let mut scalars: Vec<(&str, f64)> =
            metrics.eval_loss.map(|loss| ("eval/loss", loss)).into_iter().collect();
        scalars.push(("eval/tokens_per_second", metrics.eval_tokens_per_second));
        let name = |key: &String| format!("eval/{}", key.strip_prefix("eval_").unwrap_or(key));
        let names: Vec<String> = metrics.objective.keys().map(name).collect();
        scalars.extend(names.iter().map(String::as_str).zip(metrics.objective.values().copied()));
        self.record(metrics.step, metrics, &scalars);
        Ok(())
    }

    fn on_checkpoint(&mut self, _step: u64, _folder: &Path) -> Result<()> {
        // A run that is killed later leaves a curve up to here.
        if let Err(error) = self.draw() {
            tracing::warn!("the loss curve was not drawn: {error:#}");
        }
        Ok(())
    }

    fn on_end(&mut self, results: &TrainResults) -> Result<()> {
        self.draw()?;
        write_atomically(&self.output_dir.join(TRAIN_RESULTS), &serde_json::to_vec_pretty(results)?)
    }
}
