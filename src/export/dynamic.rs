//! Dynamic 4-bit: NF4 everywhere but where it costs most a byte.
//!
//! The loss of a text after quantising module m alone, to second order, with `E = NF4(W) - W` and `G_s` the gradient of the
//! summed cross-entropy of sample s towards W:
//!
//! ```text
//! dL = sum_s <G_s, E> + 1/2 E^T H E
//! ```
//!
//! Near a minimum the first term is small and its sign is noise: with n tokens its estimate is off by about
//! sqrt(2 score / n), more than the whole effect of a module for any affordable n. The Hessian H of a cross-entropy is, where
//! the model fits the text, the Fisher matrix `sum_s G_s G_s^T`; so a module's score is
//!
//! ```text
//! score = 1/2 sum_s <G_s, E>^2 / targets         (nats a token, never negative)
//! ```
//!
//! Interactions between modules are left out. What was tried beside it: docs/numerics.md. The budget goes to the modules
//! with the highest score for each byte that 16 bits cost more, one after another, as long as they fit.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};
use tch::{Device, Kind};

use crate::data::{Batch, IGNORE_INDEX, TokenDataset, Tokenizer};
use crate::error::Error;
use crate::io::{Weights, write_atomically};
use crate::models::{FastLanguageModel, Nf4Sensitivity};
use crate::nn::LoadOptions;
use crate::ops::nf4_bytes;

/// Stands beside the weights of a checkpoint that a plan quantised.
pub const DYNAMIC_PLAN: &str = "dynamic_nf4.json";
/// Paragraphs of prose, talk, mathematics, code and data in four languages, written for this.
pub(super) const CALIBRATION_TEXT: &str = include_str!("calibration.txt");
/// Tokens of a sample at most: of a dataset, many short samples say more about the Fisher matrix than a few long ones.
const SAMPLE: usize = 512;
/// Samples of a dataset that are used: the first ones.
const SAMPLES: usize = 256;

/// The text that modules are judged by.
pub struct Calibration {
    /// Where it is from.
    pub source: String,
    pub samples: Vec<Batch>,
}

/// Which modules keep 16 bits, and why.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct DynamicPlan {
    /// The share of the NF4 bytes that may be spent on top.
    pub budget: f64,
    pub calibration: CalibrationReport,
    /// Bytes of all modules in NF4.
    pub nf4_bytes: u64,
    /// Bytes of all modules as planned.
    pub bytes: u64,
    /// All projections of the layers, in the model's order. Nothing else is ever quantised.
    pub modules: Vec<PlannedModule>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct CalibrationReport {
    pub source: String,
    pub samples: usize,
    pub targets: usize,
    /// Mean cross-entropy before.
    pub loss: f64,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PlannedModule {
    /// Its name in the checkpoint.
    pub module: String,
    /// Its name in the model that transformers makes of the checkpoint.
    pub loaded_as: String,
    pub shape: [i64; 2],
    /// Nats a token that quantising it alone costs.
    pub score: f64,
    pub nf4_bytes: u64,
    /// Bytes as the checkpoint has it.
    pub kept_bytes: u64,
    /// Whether it stays as the checkpoint has it.
    pub kept: bool,
}

impl Calibration {
    /// The text that comes with ferrotune, a paragraph a sample.
    pub fn shipped(tokenizer: &Tokenizer) -> Result<Calibration> {
        let mut data = TokenDataset::new();
        for paragraph in CALIBRATION_TEXT.split("\n\n") {
            let ids = tokenizer.encode(paragraph.trim_end(), true)?;
            data.push(&ids, &vec![true; ids.len()]);
        }
        Ok(Calibration::of_dataset("shipped text".to_string(), &data))
    }

    /// The first samples of a dataset, with its labels.
    pub fn of_dataset(source: String, data: &TokenDataset) -> Calibration {
        let sample = |index: usize| {
            let ids: Vec<i64> = data.ids(index).iter().take(SAMPLE).map(|&id| i64::from(id)).collect();
            let trained = data.trained(index);
            let labels: Vec<i64> = ids
                .iter()
                .zip(trained)
                .map(|(&id, trained)| if trained { id } else { IGNORE_INDEX })
                .collect();
            Batch::from_samples([(&ids[..], &labels[..])])
        };
        let samples = (0..data.len().min(SAMPLES)).map(sample).filter(|batch| batch.num_targets() > 0);
        Calibration { source, samples: samples.collect() }
    }
}

impl DynamicPlan {
    /// Judges the modules of the checkpoint in `dir`, loaded in `kind` on `device` and dropped again. `calibrate` makes the
    /// text with the checkpoint's tokenizer; `progress` hears the samples done and those to do.
    pub fn of_checkpoint(
        dir: &Path,
        (kind, device): (Kind, Device),
        budget: f64,
        calibrate: impl FnOnce(&Tokenizer) -> Result<Calibration>,
        mut progress: impl FnMut(usize, usize),
    ) -> Result<DynamicPlan> {
        if !(budget.is_finite() && budget >= 0.0) {
            bail!(Error::Usage(format!("--quant-budget {budget}: must be a finite number, 0 or more")));
        }
        let weights = Weights::open(dir)?;
        if weights.is_quantized() {
            bail!(Error::Usage(format!("{} is quantised already", dir.display())));
        }
        let options = LoadOptions::new(kind, device);
        let model = FastLanguageModel::from_pretrained_with(dir, options)?;
        let Calibration { source, samples } = calibrate(model.tokenizer()?)?;
        let measured = model.decoder.nf4_sensitivity(&samples, |done| progress(done, samples.len()))?;
        let stored = |module: &str| weights.with_bytes(&format!("{module}.weight"), |bytes| Ok(bytes.len()));
        let mut modules = Vec::new();
        for (module, (_, rows, in_features)) in measured.modules.iter().zip(model.decoder.linear_modules()) {
            modules.push(PlannedModule {
                module: module.module.clone(),
                loaded_as: model.decoder.peft_module(&module.module),
                shape: [rows, in_features],
                score: score(&module.changes, &measured),
                nf4_bytes: nf4_bytes([rows, in_features]),
                kept_bytes: stored(&module.module)? as u64,
                kept: false,
            });
        }
        let calibration = CalibrationReport {
            source,
            samples: samples.len(),
            targets: measured.targets,
            loss: measured.loss,
        };
        Ok(DynamicPlan::choose(modules, budget, calibration))
    }

    /// Spends the budget. Equal scores go by the model's order.
    pub fn choose(
        mut modules: Vec<PlannedModule>,
        budget: f64,
        calibration: CalibrationReport,
    ) -> DynamicPlan {
        let nf4_bytes: u64 = modules.iter().map(|module| module.nf4_bytes).sum();
        let most = nf4_bytes + (budget * nf4_bytes as f64) as u64;
        let mut bytes = nf4_bytes;
        let mut order: Vec<usize> = (0..modules.len()).collect();
        order.sort_by(|&a, &b| modules[b].score_per_byte().total_cmp(&modules[a].score_per_byte()));
        for index in order {
            let module = &mut modules[index];
            module.kept = module.score > 0.0 && bytes + module.extra_bytes() <= most;
            bytes += if module.kept { module.extra_bytes() } else { 0 };
        }
        DynamicPlan { budget, calibration, nf4_bytes, bytes, modules }
    }

    /// Reads the plan beside a checkpoint's weights.
    pub fn load(dir: &Path) -> Result<DynamicPlan> {
        let path = dir.join(DYNAMIC_PLAN);
        let text = fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
        serde_json::from_str(&text).with_context(|| format!("parsing {}", path.display()))
    }

    pub fn save(&self, dir: &Path) -> Result<()> {
        write_atomically(&dir.join(DYNAMIC_PLAN), &serde_json::to_vec_pretty(self)?)
    }

    /// The modules that are not quantised, by their names in the checkpoint.
    pub fn kept(&self) -> BTreeSet<String> {
        self.modules.iter().filter(|module| module.kept).map(|module| module.module.clone()).collect()
    }
}

impl PlannedModule {
    /// What keeping it costs.
    pub fn extra_bytes(&self) -> u64 {
        self.kept_bytes.saturating_sub(self.nf4_bytes)
    }

    pub fn score_per_byte(&self) -> f64 {
        self.score / self.extra_bytes().max(1) as f64
    }
}

fn score(changes: &[f64], measured: &Nf4Sensitivity) -> f64 {
    0.5 * changes.iter().map(|change| change * change).sum::<f64>() / measured.targets as f64
}
