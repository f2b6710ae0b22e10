//! The flags that say how layers become 4 bits, and what they plan.

use std::fmt::Write as _;
use std::path::Path;

use anyhow::{Context, Result, bail};
use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};
use tch::{Device, Kind};

use super::format::{bytes, percent};
use super::progress::BARS;
use super::sources;
use crate::data::{DatasetOptions, prepare};
use crate::error::Error;
use crate::export::{Calibration, DynamicPlan};
use crate::nn::LoadOptions;
use crate::train::Quant;

/// How layers become 4 bits.
#[derive(Args, Debug, Clone)]
pub struct QuantArgs {
    /// nf4: every projection of the layers; dynamic-nf4: those whose quantisation costs the loss most a byte stay as they are
    #[arg(long, value_enum, default_value_t = Quant::Nf4)]
    pub quant: Quant,
    /// Bytes that dynamic-nf4 may spend on them, as a share of the layers' bytes in NF4
    #[arg(long, value_name = "SHARE", default_value_t = 0.1)]
    pub quant_budget: f64,
    /// Data that dynamic-nf4 judges by: files, globs or a hub id; of conversations, the assistant's turns [default: a text
    /// that comes with ferrotune]
    #[arg(long, value_name = "FILE|ID", value_delimiter = ',')]
    pub calibration_dataset: Vec<String>,
}

impl QuantArgs {
    /// The plan for loading the checkpoint in `dir`.
    pub fn plan_to_load(&self, dir: &Path, options: LoadOptions) -> Result<Option<DynamicPlan>> {
        if self.quant == Quant::DynamicNf4 && !options.load_in_4bit {
            bail!(Error::Usage("--quant dynamic-nf4 says how --load-in-4bit loads: give both".to_string()));
        }
        self.plan(dir, (options.kind, options.device))
    }

    /// The plan of `--quant dynamic-nf4` for the checkpoint in `dir`, judged in `kind` on `device`.
    pub fn plan(&self, dir: &Path, (kind, device): (Kind, Device)) -> Result<Option<DynamicPlan>> {
        if self.quant == Quant::Nf4 {
            return Ok(None);
        }
        let style =
            ProgressStyle::with_template("judging the layers {bar:20.cyan/blue} {pos}/{len} ETA {eta}")?;
        let bar = BARS.add(ProgressBar::new(0).with_style(style));
        let calibrate = |tokenizer: &_| {
            if self.calibration_dataset.is_empty() {
                return Calibration::shipped(tokenizer);
            }
            let files = sources::dataset_files(&self.calibration_dataset, "train")?;
            let options = DatasetOptions {
                assistant_only_loss: true,
                allow_missing_eot: true,
                ..DatasetOptions::default()
            };
            let (data, _) = prepare(&files, tokenizer, &options).context("--calibration-dataset")?;
            Ok(Calibration::of_dataset(self.calibration_dataset.join(", "), &data))
        };
        let plan =
            DynamicPlan::of_checkpoint(dir, (kind, device), self.quant_budget, calibrate, |done, all| {
                bar.set_length(all as u64);
                bar.set_position(done as u64);
            });
        bar.finish_and_clear();
        plan.map(Some)
    }
}

/// The modules in the order in which the budget went to them: all that are kept, and the first that are not.
pub fn table(plan: &DynamicPlan) -> String {
    const SHOWN: usize = 5;
    let mut modules: Vec<_> = plan.modules.iter().collect();
    modules.sort_by(|a, b| b.score_per_byte().total_cmp(&a.score_per_byte()));
    let all: f64 = modules.iter().map(|module| module.score).sum();
    let rest = modules.iter().filter(|module| !module.kept).take(SHOWN);
    let shown: Vec<_> = modules.iter().filter(|module| module.kept).chain(rest).collect();
    let width = shown.iter().map(|module| module.module.len()).max().unwrap_or(0);
    let mut text = format!(
        "dynamic-nf4 by {} ({} targets, loss {:.4}):\n  {:width$}  {:>10}  {:>9}  {:>10}\n",
        plan.calibration.source,
        plan.calibration.targets,
        plan.calibration.loss,
        "module",
        "extra",
        "of score",
        "nats/token"
    );
    for module in &shown {
        let _ = writeln!(
            text,
            "  {:width$}  {:>10}  {:>9}  {:>10.2e}  {}",
            module.module,
            small_bytes(module.extra_bytes()),
            percent(module.score / all.max(f64::MIN_POSITIVE)),
            module.score,
            if module.kept { "kept" } else { "4 bits" }
        );
    }
    let hidden = modules.len() - shown.len();
    if hidden > 0 {
        let _ = writeln!(text, "  and {hidden} more in 4 bits");
    }
    let more = plan.bytes as f64 / plan.nf4_bytes as f64 - 1.0;
    let _ = writeln!(
        text,
        "  {} of {} modules kept: {} instead of {} of NF4 (+{})",
        plan.kept().len(),
        plan.modules.len(),
        small_bytes(plan.bytes),
        small_bytes(plan.nf4_bytes),
        percent(more)
    );
    text
}

/// Single modules of small models are less than [`bytes`] shows.
fn small_bytes(count: u64) -> String {
    if count < 10 << 20 { format!("{:.1} KiB", count as f64 / 1024.0) } else { bytes(count) }
}
