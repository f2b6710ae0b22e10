//! The run as it goes: a bar on a terminal, plain lines on a pipe.

use std::collections::BTreeMap;
use std::io::{self, IsTerminal, Write};
use std::path::Path;
use std::sync::LazyLock;
use std::time::{Duration, Instant};

use anyhow::Result;
use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::format::{bytes, rate, seconds};
use crate::train::metrics::WindowMeans;
use crate::train::observer::{EvalMetrics, RunStart, StepMetrics, TrainObserver, TrainResults};

/// The terminal's bars. One process has one terminal: whoever writes to it must know of the bars.
pub(super) static BARS: LazyLock<MultiProgress> =
    LazyLock::new(|| MultiProgress::with_draw_target(ProgressDrawTarget::stdout()));

/// Writes to stderr without tearing a bar: for log lines.
pub fn log_writer() -> impl Write {
    struct BesideBars;
    impl Write for BesideBars {
        fn write(&mut self, text: &[u8]) -> io::Result<usize> {
            BARS.suspend(|| io::stderr().write(text))
        }
        fn flush(&mut self) -> io::Result<()> {
            io::stderr().flush()
        }
    }
    BesideBars
}

/// A line on stdout that stays. A reader that went away is no reason to end a run.
pub(super) fn line(text: &str) {
    let print = || {
        let mut stdout = io::stdout().lock();
        let _ = writeln!(stdout, "{text}").and_then(|()| stdout.flush());
    };
    BARS.suspend(print);
}

/// Shows a training run on stdout.
#[derive(Debug)]
pub struct Progress {
    logging_steps: u64,
    /// Metrics of the objective that are shown, with their labels.
    shown: &'static [(&'static str, &'static str)],
    total_steps: u64,
    start_step: u64,
    started: Instant,
    bar: Option<ProgressBar>,
    /// On a pipe, of the steps since the last line.
    window: WindowMeans,
}

impl Progress {
    /// On a pipe, every `logging_steps`th step is a line.
    pub fn new(logging_steps: u64) -> Self {
        Self {
            logging_steps,
            shown: &[],
            total_steps: 0,
            start_step: 0,
            started: Instant::now(),
            bar: None,
            window: WindowMeans::default(),
        }
    }

    /// The same, showing metrics of the objective: `(name, label)`.
    pub fn showing(mut self, metrics: &'static [(&'static str, &'static str)]) -> Self {
        self.shown = metrics;
        self
    }

    /// ` | label number` for each metric that is shown.
    fn objective(&self, metrics: &BTreeMap<String, f64>, prefix: &str) -> String {
        let number = |&(name, label): &(&str, &str)| {
            metrics.get(&format!("{prefix}{name}")).map(|value| format!(" | {label} {value:.3}"))
        };
        self.shown.iter().filter_map(number).collect()
    }

    /// From the mean time of the steps so far.
    fn eta(&self, step: u64) -> String {
        let done = step.saturating_sub(self.start_step).max(1);
        let left = self.total_steps.saturating_sub(step);
        seconds(self.started.elapsed().as_secs_f64() / done as f64 * left as f64)
    }
}

impl TrainObserver for Progress {
    fn on_start(&mut self, start: &RunStart) -> Result<()> {
        (self.total_steps, self.start_step) = (start.total_steps, start.start_step);
        self.started = Instant::now();
        if start.start_step > 0 {
            line(&format!("continues after step {} of {}", start.start_step, start.total_steps));
        }
        if io::stdout().is_terminal() {
            let style = ProgressStyle::with_template("{bar:20.cyan/blue} {pos}/{len} {wide_msg}")?;
            let bar = BARS.add(ProgressBar::new(start.total_steps).with_style(style));
            bar.set_position(start.start_step);
            self.bar = Some(bar);
        }
        Ok(())
    }

    fn on_step(&mut self, metrics: &StepMetrics) -> Result<()> {
        let eta = self.eta(metrics.step);
        let speed = speed(metrics);
        self.window.add(&metrics.objective);
        let is_due = metrics.step.is_multiple_of(self.logging_steps) || metrics.step == self.total_steps;
        let objective = match self.bar.is_none() && is_due {
            true => self.window.take(),
            false => metrics.objective.clone(),
        };
        let numbers = format!(
            "{}loss {:.4}{} | lr {:.2e} | grad norm {:.3} | {speed} tokens/s | {}",
            rewards(&objective, ""),
            metrics.loss,
            self.objective(&objective, ""),
            metrics.learning_rate,
            metrics.grad_norm,
            bytes(metrics.memory)
        );
        match &self.bar {
            Some(bar) => {
                bar.set_message(format!("ETA {eta} | {numbers}"));
                bar.set_position(metrics.step);
            }
            None if is_due => {
                let (step, total, epoch) = (metrics.step, self.total_steps, metrics.epoch);
                line(&format!("step {step}/{total} | epoch {epoch:.2} | {numbers} | ETA {eta}"));
            }
            None => {}
        }
        Ok(())
    }

    fn on_eval(&mut self, metrics: &EvalMetrics) -> Result<()> {
        let best = if metrics.is_best { " (the best so far)" } else { "" };
        let took = seconds(metrics.eval_runtime);
        line(&format!(
            "evaluation after step {}: {}{}{}{best}, {took}",
            metrics.step,
            rewards(&metrics.objective, "eval_").trim_end_matches(" | "),
            metrics.eval_loss.map_or(String::new(), |loss| format!("loss {loss:.4}")),
            self.objective(&metrics.objective, "eval_")
        ));
        Ok(())
    }

    fn on_checkpoint(&mut self, _step: u64, folder: &Path) -> Result<()> {
        line(&format!("saved {}", folder.display()));
        Ok(())
    }

    fn on_warning(&mut self, message: &str) -> Result<()> {
        BARS.suspend(|| {
            let _ = writeln!(io::stderr(), "warning: {message}");
        });
        Ok(())
    }

    fn on_end(&mut self, _results: &TrainResults) -> Result<()> {
        if let Some(bar) = self.bar.take() {
            bar.finish_and_clear();
        }
        Ok(())
    }
}

impl Drop for Progress {
    /// A run that ends with an error leaves no half-drawn bar behind.
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

/// The mean reward and each reward's, where there are any.
fn rewards(metrics: &BTreeMap<String, f64>, prefix: &str) -> String {
    let Some(reward) = metrics.get(&format!("{prefix}reward")) else { return String::new() };
    let each = metrics.iter().filter_map(|(name, value)| {
        let name = name.strip_prefix(prefix)?.strip_prefix("rewards/")?.strip_suffix("/mean")?;
        Some(format!("{name} {value:.3}"))
    });
    format!("reward {reward:.3} ({}) | ", each.collect::<Vec<_>>().join(", "))
}

/// Tokens/s; of the rollout and of training, where there is one.
fn speed(metrics: &StepMetrics) -> String {
    let known = |name: &str| metrics.objective.get(name).map(|speed| rate(*speed));
    match (known("rollout_tokens_per_second"), known("training_tokens_per_second")) {
        (Some(rollout), Some(training)) => format!("{rollout} + {training}"),
        (_, training) => training.unwrap_or_else(|| rate(metrics.tokens_per_second)),
    }
}

/// Rows as they go by, on a terminal.
pub struct RowProgress(ProgressBar);

impl RowProgress {
    /// `doing` says what happens to them.
    pub fn new(doing: &'static str) -> Result<RowProgress> {
        if !io::stderr().is_terminal() {
            return Ok(RowProgress(ProgressBar::hidden()));
        }
        let style = ProgressStyle::with_template("{spinner} {msg} {human_pos} rows, {per_sec}, {elapsed}")?;
        let bar = BARS.add(ProgressBar::no_length().with_style(style).with_message(doing));
        bar.enable_steady_tick(Duration::from_millis(200));
        Ok(RowProgress(bar))
    }

    /// `rows` rows are done.
    pub fn set(&self, rows: u64) {
        self.0.set_position(rows);
    }

    /// One more row is done.
    pub fn add_one(&self) {
        self.0.inc(1);
    }
}

impl Drop for RowProgress {
    fn drop(&mut self) {
        self.0.finish_and_clear();
    }
}
