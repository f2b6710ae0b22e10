//! What `ferrotune dpo` can be told, in TRL's words.

use std::fmt;
use std::path::Path;

use anyhow::{Context, Result};
use clap::{Arg, Args, Command, FromArgMatches, ValueEnum};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::data::{PreferenceKind, PreferenceOptions};
use crate::error::Error;
use crate::train::arguments::list;
use crate::train::{BaseDtype, TrainingArguments};

const PREFERENCE: &str = "Preference";

/// What is minimised; formulas at [`PairLogProbs::loss`](super::PairLogProbs::loss) and [`Kto`](super::Kto).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum LossType {
    /// DPO
    Sigmoid,
    /// SLiC's hinge on DPO's log-ratios
    Hinge,
    /// Squared distance to a margin, of means over the tokens
    Ipo,
    /// DPO for labels of which a share, label_smoothing, is wrong
    Robust,
    /// Without a reference, of means over the tokens, with a margin
    Simpo,
    /// Without a reference: likelihood of the chosen, and an odds ratio
    Orpo,
    /// Without a reference: DPO's loss, and likelihood of the chosen
    Cpo,
    /// Completions with a label each instead of pairs
    Kto,
}

impl LossType {
    /// Whether it compares with the model as it was.
    pub fn has_reference(self) -> bool {
        matches!(self, LossType::Sigmoid | LossType::Hinge | LossType::Ipo | LossType::Robust | LossType::Kto)
    }

    /// Whether it takes means over a completion's tokens instead of sums.
    pub fn takes_means(self) -> bool {
        matches!(self, LossType::Ipo | LossType::Simpo | LossType::Orpo)
    }

    /// Whether label_smoothing has a place in it.
    fn smooths(self) -> bool {
        matches!(self, LossType::Robust | LossType::Cpo | LossType::Simpo)
    }
}

impl fmt::Display for LossType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let value = self.to_possible_value().expect("no variant is skipped");
        f.write_str(value.get_name())
    }
}

impl std::str::FromStr for LossType {
    type Err = String;

    fn from_str(text: &str) -> Result<LossType, String> {
        <LossType as ValueEnum>::from_str(text, false).map_err(|_| {
            let known: Vec<String> = LossType::value_variants().iter().map(LossType::to_string).collect();
            format!("unknown loss type {text:?}: expected one of {}", known.join(", "))
        })
    }
}

/// One preference run: the words of [`TrainingArguments`] and these.
#[derive(Debug, Clone, PartialEq, Args, Serialize, Deserialize)]
#[command(mut_args(of_preferences))]
#[serde(default)]
pub struct PreferenceArguments {
    /// Loss, or several, comma-separated
    #[arg(long, help_heading = PREFERENCE, value_enum, value_delimiter = ',', default_value = "sigmoid")]
    #[serde(deserialize_with = "list")]
    pub loss_type: Vec<LossType>,
    /// Weights of several losses [default: 1 each]
    #[arg(long, value_name = "NUMBERS", help_heading = PREFERENCE, value_delimiter = ',')]
    #[serde(deserialize_with = "list")]
    pub loss_weights: Vec<f64>,
    /// How closely the model stays at the reference; scale of the log-ratios
    #[arg(long, help_heading = PREFERENCE, default_value_t = 0.1)]
    pub beta: f64,
    /// Share of pairs whose labels are taken to be wrong (robust, cpo, simpo)
    #[arg(long, help_heading = PREFERENCE, default_value_t = 0.0)]
    pub label_smoothing: f64,
    /// Longest prompt with completion in tokens; what is beyond is cut off
    #[arg(long, value_name = "N", help_heading = PREFERENCE, default_value_t = 1024)]
    pub max_length: usize,
    /// Compute the reference's log-probabilities once, before training, instead of with the adapter off in every step
    /// [default: only where more than an adapter trains]
    #[arg(long, help_heading = PREFERENCE)]
    pub precompute_ref_log_probs: bool,
    /// Weight of the chosen completions' likelihood in cpo and simpo [default: 1 for cpo, 0 for simpo]
    #[arg(long, value_name = "WEIGHT", help_heading = PREFERENCE)]
    pub cpo_alpha: Option<f64>,
    /// Margin of simpo
    #[arg(long, help_heading = PREFERENCE, default_value_t = 0.5)]
    pub simpo_gamma: f64,
    /// Weight of kto's desirable completions
    #[arg(long, value_name = "WEIGHT", help_heading = PREFERENCE, default_value_t = 1.0)]
    pub desirable_weight: f64,
    /// Weight of kto's undesirable completions
    #[arg(long, value_name = "WEIGHT", help_heading = PREFERENCE, default_value_t = 1.0)]
    pub undesirable_weight: f64,

    #[command(flatten)]
    #[serde(flatten)]
    pub train: TrainingArguments,
}

impl Default for PreferenceArguments {
    /// What an empty command line gives.
    fn default() -> Self {
        let command = Self::augment_args(Command::new("defaults").no_binary_name(true));
        Self::from_arg_matches(&command.get_matches_from([""; 0])).expect("every field has a default")
    }
}

/// TRL's, of DPO, CPO, ORPO and KTO alike.
const LEARNING_RATE: f64 = 1e-6;

/// Words of [`TrainingArguments`] that mean nothing here.
const MEANINGLESS: [&str; 10] = [
    "max_seq_length",
    "packing",
    "assistant_only_loss",
    "completion_only_loss",
    "dataset_format",
    "text_column",
    "template",
    "allow_missing_eot",
    "dataset_cache",
    "lora_dropout",
];

/// A flag of [`TrainingArguments`] as it is here, with TRL's default.
fn of_preferences(arg: Arg) -> Arg {
    match arg.get_id().as_str() {
        "learning_rate" => arg.help("Peak learning rate [default: 1e-6]"),
        "per_device_train_batch_size" => {
            arg.default_value("8").help("Pairs (kto: examples) in one forward pass")
        }
        "per_device_eval_batch_size" => arg.default_value("8"),
        "gradient_accumulation_steps" => arg.default_value("1"),
        "weight_decay" | "warmup_ratio" => arg.default_value("0"),
        id if MEANINGLESS.contains(&id) => arg.hide(true),
        _ => arg,
    }
    .allow_negative_numbers(true)
}

impl PreferenceArguments {
    /// Each loss with its weight.
    pub fn losses(&self) -> impl Iterator<Item = (LossType, f64)> {
        let weights = self.loss_weights.iter().copied().chain(std::iter::repeat(1.0));
        self.loss_type.iter().copied().zip(weights)
    }

    /// Whether some loss is the given one.
    pub fn has(&self, loss: LossType) -> bool {
        self.loss_type.contains(&loss)
    }

    /// The weight of the mean negative log-likelihood of the chosen samples' targets: of completions for cpo and simpo, and of
    /// prompts too for orpo.
    pub fn nll_weights(&self) -> (f64, f64) {
        let (mut completions, mut whole) = (0.0, 0.0);
        for (loss, weight) in self.losses() {
            match loss {
                LossType::Cpo => completions += weight * self.cpo_alpha.unwrap_or(1.0),
                LossType::Simpo => completions += weight * self.cpo_alpha.unwrap_or(0.0),
                LossType::Orpo => whole += weight,
                _ => {}
            }
        }
        (completions, whole)
    }

    /// Whether some loss compares with the model as it was.
    pub fn has_reference(&self) -> bool {
        self.loss_type.iter().any(|loss| loss.has_reference())
    }

    /// Whether the reference's log-probabilities are computed before training: an adapter alone can be left out of a pass, other
    /// weights cannot.
    pub fn precomputes(&self) -> bool {
        let adapter_only = !self.train.trains_all_weights() && self.train.modules_to_save.is_empty();
        self.has_reference() && (self.precompute_ref_log_probs || !adapter_only)
    }

    /// How rows become samples.
    pub fn data(&self) -> PreferenceOptions {
        let kind = if self.has(LossType::Kto) { PreferenceKind::Labelled } else { PreferenceKind::Pairs };
        PreferenceOptions { kind, max_length: self.max_length, train_prompt: self.has(LossType::Orpo) }
    }

    /// The keys of this struct alone, without those of [`TrainingArguments`].
    fn own(&self) -> Map<String, Value> {
        let (Ok(Value::Object(mut all)), Ok(Value::Object(shared))) =
            (serde_json::to_value(self), serde_json::to_value(&self.train))
        else {
            unreachable!("both are structs of named fields");
        };
        all.retain(|key, _| !shared.contains_key(key));
        all
    }

    /// These keys as YAML.
    pub fn own_yaml(&self) -> Result<String> {
        serde_saphyr::to_string(&self.own()).context("writing the configuration as YAML")
    }

    /// Reads a `run.yaml`; `file` is named in errors.
    pub fn from_yaml(text: &str, file: &Path) -> Result<Self> {
        let options = serde_saphyr::options! { strict_booleans: true };
        serde_saphyr::from_str_with_options(text, options)
            .with_context(|| format!("{}: not a configuration", file.display()))
    }

    /// The same of them as [`TrainingArguments::differences`].
    pub fn own_differences(&self, other: &Self) -> Vec<String> {
        let theirs = other.own();
        let pairs = self
            .own()
            .into_iter()
            .map(|(key, ours)| (ours, theirs.get(&key).cloned().unwrap_or_default(), key));
        pairs
            .filter(|(ours, theirs, _)| ours != theirs)
            .map(|(ours, theirs, key)| format!("{key}: {ours} -> {theirs}"))
            .collect()
    }

    /// The same run with every choice that depends on another one made.
    ///
    /// # Errors
    /// [`Error::Usage`] naming the flag, for values that make no sense alone or together, and for words of `ferrotune train` that
    /// mean nothing here.
    pub fn resolved(mut self) -> Result<Self> {
        self.train.learning_rate.get_or_insert(LEARNING_RATE);
        self.train = self.train.resolved()?;
        self.check()?;
        Ok(self)
    }

    fn check(&self) -> Result<()> {
        let refuse = |wrong: bool, message: &str| match wrong {
            true => Err(Error::Usage(message.to_owned())),
            false => Ok(()),
        };
        refuse(self.train.base_dtype != BaseDtype::Auto, "--base-dtype is for `ferrotune train`")?;
        refuse(self.loss_type.is_empty(), "--loss-type is empty")?;
        refuse(
            !self.loss_weights.is_empty() && self.loss_weights.len() != self.loss_type.len(),
            &format!("--loss-weights: {} for {} losses", self.loss_weights.len(), self.loss_type.len()),
        )?;
        refuse(
            self.has(LossType::Kto) && self.loss_type.len() > 1,
            "--loss-type kto takes single completions, the others take pairs: give it alone",
        )?;
        refuse(
            !(self.beta.is_finite() && self.beta > 0.0),
            &format!("--beta {}: must be above 0", self.beta),
        )?;
        refuse(
            !(0.0..0.5).contains(&self.label_smoothing),
            &format!("--label-smoothing {}: must be at least 0 and below 0.5", self.label_smoothing),
        )?;
        refuse(
            self.label_smoothing > 0.0 && !self.loss_type.iter().any(|loss| loss.smooths()),
            "--label-smoothing is a word of the losses robust, cpo and simpo",
        )?;
        let default = Self::default();
        for (flag, given, losses) in [
            ("cpo-alpha", self.cpo_alpha.is_some(), &[LossType::Cpo, LossType::Simpo][..]),
            ("simpo-gamma", self.simpo_gamma != default.simpo_gamma, &[LossType::Simpo]),
            ("desirable-weight", self.desirable_weight != default.desirable_weight, &[LossType::Kto]),
            ("undesirable-weight", self.undesirable_weight != default.undesirable_weight, &[LossType::Kto]),
        ] {
            let names: Vec<String> = losses.iter().map(LossType::to_string).collect();
            refuse(
                given && !losses.iter().any(|loss| self.has(*loss)),
                &format!("--{flag} is a word of --loss-type {}", names.join(" and ")),
            )?;
        }
        refuse(
            self.precompute_ref_log_probs && !self.has_reference(),
            "--precompute-ref-log-probs: none of these losses has a reference",
        )?;
        refuse(self.max_length < 2, &format!("--max-length {}: must be at least 2", self.max_length))?;
        for (flag, value) in [
            ("cpo-alpha", self.cpo_alpha.unwrap_or(0.0)),
            ("simpo-gamma", self.simpo_gamma),
            ("desirable-weight", self.desirable_weight),
            ("undesirable-weight", self.undesirable_weight),
        ]
        .into_iter()
        .chain(self.loss_weights.iter().map(|weight| ("loss-weights", *weight)))
        {
            refuse(
                !(value.is_finite() && value >= 0.0),
                &format!("--{flag} {value}: must be a finite number, 0 or more"),
            )?;
        }
        let fields = |arguments: &TrainingArguments| serde_json::to_value(arguments).unwrap_or_default();
        let (given, defaults) = (fields(&self.train), fields(&TrainingArguments::default()));
        for key in MEANINGLESS {
            let instead = match key {
                "max_seq_length" => "use --max-length",
                "packing" => "batches have no padding without it",
                "lora_dropout" => "log-probabilities are compared without dropout",
                "dataset_cache" => "tokens stay in memory",
                "allow_missing_eot" => "the end of turns is not checked",
                _ => "the completion is trained, of the columns chosen and rejected, or completion and label",
            };
            let flag = key.replace('_', "-");
            refuse(
                given[key] != defaults[key],
                &format!("--{flag} means nothing in preference training: {instead}"),
            )?;
        }
        Ok(())
    }
}
