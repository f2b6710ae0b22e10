//! What a GRPO run can be told: the words of TRL's GRPOConfig beside those of a training run.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::{Args, Command, FromArgMatches, ValueEnum};
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::{Map, Value};

use crate::error::Error;
use crate::rewards::RewardSpec;
use crate::train::arguments::{differences, fields, list};
use crate::train::{BaseDtype, Size, TrainingArguments};

const ROLLOUTS: &str = "Rollouts";
const REWARDS: &str = "Rewards";
const LOSS: &str = "GRPO";
const OUTPUT: &str = "Output and checkpoints";

/// How tokens' losses are averaged, and what they are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "snake_case")]
#[value(rename_all = "snake_case")]
pub enum LossType {
    /// Mean over each completion, then over completions; long ones count less a token
    Grpo,
    /// Mean over the tokens of a step
    Bnpo,
    /// Sum over tokens, divided by max_completion_length for each completion
    DrGrpo,
    /// Mean over the tokens of the generation batch
    Dapo,
    /// As dapo, with a clipped ratio as a factor that is not differentiated
    Cispo,
    /// As grpo, with a sigmoid in place of the clipping
    Sapo,
    /// Mean over completions of the sum over tokens
    Luspo,
}

/// What a ratio of probabilities belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum ImportanceSamplingLevel {
    Token,
    /// The whole completion (GSPO, arXiv:2507.18071)
    Sequence,
}

/// What rewards are divided by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum ScaleRewards {
    /// The standard deviation of each group
    #[value(alias = "true")]
    #[serde(alias = "true")]
    Group,
    /// That of the generation batch
    Batch,
    /// Nothing
    #[value(alias = "false")]
    #[serde(alias = "false")]
    None,
}

/// As TRL writes it, true and false as well.
fn scale_rewards<'de, D: Deserializer<'de>>(deserializer: D) -> Result<ScaleRewards, D::Error> {
    let value = match Value::deserialize(deserializer)? {
        Value::Bool(scale) => Value::String(scale.to_string()),
        value => value,
    };
    ScaleRewards::deserialize(value).map_err(serde::de::Error::custom)
}

/// What the sampler's probabilities may change.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "snake_case")]
#[value(rename_all = "snake_case")]
pub enum ImportanceSamplingMode {
    /// Ratios of tokens, cut to the clip range
    TokenTruncate,
    /// Ratios of tokens, 0 outside of it
    TokenMask,
    /// The ratio of the completion, cut to the clip range
    SequenceTruncate,
    /// The ratio of the completion, 0 outside of it
    SequenceMask,
}

/// One GRPO run. [`GrpoArguments::default`] holds the defaults that `--help` shows; those of [`TrainingArguments`] that TRL's
/// GRPOConfig has otherwise are TRL's here.
#[derive(Debug, Clone, PartialEq, Args, Serialize, Deserialize)]
#[serde(default)]
#[command(
    mut_arg("per_device_train_batch_size", |arg| arg.default_value("8").help("Completions in one forward pass")),
    mut_arg("gradient_accumulation_steps", |arg| arg.default_value("1")),
    mut_arg("learning_rate", |arg| arg.help("Peak learning rate [default: 1e-6]")),
    mut_arg("weight_decay", |arg| arg.default_value("0")),
    mut_arg("warmup_ratio", |arg| arg.default_value("0")),
    mut_arg("dataset", |arg| arg.help("Prompts: files, globs or a hub id, comma-separated or repeated")),
    mut_arg("eval_dataset", |arg| arg.help("Prompts that evaluations ask about: their mean reward, one answer each")),
    mut_arg("max_seq_length", |arg| arg.help("Longest prompt and completion together, in tokens; prompts that leave no room are left out")),
    mut_args(|arg| { let hidden = NOT_OURS.contains(&arg.get_id().as_str()); arg.hide(hidden).allow_negative_numbers(true) })
)]
pub struct GrpoArguments {
    #[command(flatten)]
    #[serde(flatten)]
    pub training: TrainingArguments,

    /// Column that holds the prompt, a text or a list of messages; the others go to the rewards
    #[arg(long, value_name = "COLUMN", help_heading = ROLLOUTS, default_value = "prompt")]
    pub prompt_column: String,
    /// Makes a conversation of a prompt: a system message of this text before it
    #[arg(long, value_name = "TEXT", help_heading = ROLLOUTS)]
    pub system_prompt: Option<String>,
    /// Completions of each prompt, a group
    #[arg(long, value_name = "N", help_heading = ROLLOUTS, default_value_t = 8)]
    pub num_generations: usize,
    /// Tokens of a completion at most
    #[arg(long, value_name = "N", help_heading = ROLLOUTS, default_value_t = 512)]
    pub max_completion_length: usize,
    /// Micro-batches that are generated at once [default: gradient_accumulation_steps]
    #[arg(long, value_name = "N", help_heading = ROLLOUTS)]
    pub steps_per_generation: Option<usize>,
    /// Steps on each completion
    #[arg(long, value_name = "N", help_heading = ROLLOUTS, default_value_t = 1)]
    pub num_iterations: usize,
    #[arg(long, help = "Logits are divided by it, in sampling and in the loss", help_heading = ROLLOUTS, default_value_t = 1.0)]
    pub temperature: f64,
    /// Sample from the likeliest tokens that together reach this probability; the loss takes all
    #[arg(long, help_heading = ROLLOUTS, default_value_t = 1.0)]
    pub top_p: f64,
    /// Sample from so many of the likeliest tokens; 0 for all
    #[arg(long, help_heading = ROLLOUTS, default_value_t = 0)]
    pub top_k: usize,
    /// Sample from tokens at least this fraction as likely as the likeliest
    #[arg(long, help_heading = ROLLOUTS, default_value_t = 0.0)]
    pub min_p: f64,
    /// Divides or multiplies the logits of tokens that have occurred; 1 is off
    #[arg(long, help_heading = ROLLOUTS, default_value_t = 1.0)]
    pub repetition_penalty: f64,
    /// Of the answers to held-out prompts (--eval-dataset); 0 takes the likeliest tokens
    #[arg(long, help_heading = ROLLOUTS, default_value_t = 0.0)]
    pub eval_temperature: f64,
    /// Memory for keys and values while completions are written, such as 4GiB [default: what they need, up to a quarter of the
    /// host's free memory, 85 % of a GPU's]
    #[arg(long, value_name = "SIZE", help_heading = ROLLOUTS)]
    pub kv_cache_memory: Option<Size>,

    /// What completions are judged by: exact, numeric, regex:PATTERN, format:think-answer, length:MAX, keyword:WORD, json,
    /// repetition, command:LINE, http://.., model:PATH; several with a space between
    #[arg(long, value_name = "REWARD", help_heading = REWARDS, alias = "reward", num_args = 1..)]
    #[serde(deserialize_with = "list")]
    pub reward_funcs: Vec<RewardSpec>,
    /// Their weights, in order [default: 1 each]
    #[arg(long, value_name = "NUMBER", help_heading = REWARDS, num_args = 1.., value_delimiter = ',', allow_negative_numbers = true)]
    #[serde(deserialize_with = "list")]
    pub reward_weights: Vec<f64>,
    /// A reward model: a TorchScript file, or a folder with a sequence-classification checkpoint
    #[arg(long, value_name = "PATH", help_heading = REWARDS)]
    pub reward_model: Option<String>,
    /// Seconds that a command or a server may take for one completion
    #[arg(long, value_name = "SECONDS", help_heading = REWARDS, default_value_t = 30.0)]
    pub reward_timeout: f64,

    /// What a token's loss is and how losses are averaged
    #[arg(long, help_heading = LOSS, value_enum, default_value_t = LossType::Dapo)]
    pub loss_type: LossType,
    /// Factor of the divergence from the reference, the model without LoRA; 0 needs no reference
    #[arg(long, help_heading = LOSS, default_value_t = 0.0)]
    pub beta: f64,
    /// Multiply that divergence by the ratio of probabilities
    #[arg(long, help_heading = LOSS, num_args = 0..=1, default_missing_value = "true", require_equals = true, default_value_t = true, action = clap::ArgAction::Set)]
    pub use_bias_correction_kl: bool,
    /// Ratios below 1 - epsilon are clipped, and those above 1 + epsilon_high
    #[arg(long, help_heading = LOSS, default_value_t = 0.2)]
    pub epsilon: f64,
    /// [default: epsilon]; of cispo, the largest ratio itself
    #[arg(long, help_heading = LOSS)]
    pub epsilon_high: Option<f64>,
    /// Also bounds the ratios of completions that are worse than their group
    #[arg(long, help_heading = LOSS)]
    pub delta: Option<f64>,
    /// Whose ratio of probabilities it is; sequence is GSPO
    #[arg(long, help_heading = LOSS, value_enum, default_value_t = ImportanceSamplingLevel::Token)]
    pub importance_sampling_level: ImportanceSamplingLevel,
    /// What rewards are divided by once the mean of their group is taken off
    #[arg(long, help_heading = LOSS, value_enum, default_value_t = ScaleRewards::Group)]
    #[serde(deserialize_with = "scale_rewards")]
    pub scale_rewards: ScaleRewards,
    /// Completions that reached max_completion_length count nothing
    #[arg(long, help_heading = LOSS)]
    pub mask_truncated_completions: bool,
    /// Only this share of a step's tokens, those of the highest entropy, is trained (arXiv:2506.01939)
    #[arg(long, value_name = "SHARE", help_heading = LOSS, default_value_t = 1.0)]
    pub top_entropy_quantile: f64,
    /// Completions that are worse than their group count nothing where the mean of `log pi_sampler - log pi` over their tokens is above
    /// this (arXiv:2512.02556) [default: all count]
    #[arg(long, help_heading = LOSS)]
    pub off_policy_mask_threshold: Option<f64>,
    /// Temperature of sapo's sigmoid where the advantage is negative
    #[arg(long, help_heading = LOSS, default_value_t = 1.05)]
    pub sapo_temperature_neg: f64,
    /// The same where it is positive
    #[arg(long, help_heading = LOSS, default_value_t = 1.0)]
    pub sapo_temperature_pos: f64,
    /// Weigh by the ratio of the trainer's to the sampler's probabilities
    #[arg(long, help_heading = LOSS, alias = "vllm-importance-sampling-correction")]
    pub importance_sampling_correction: bool,
    /// Ratios of what, and what becomes of those outside of the clip range
    #[arg(long, help_heading = LOSS, value_enum, alias = "vllm-importance-sampling-mode", default_value_t = ImportanceSamplingMode::SequenceMask)]
    pub importance_sampling_mode: ImportanceSamplingMode,
    /// The lower end of the clip range
    #[arg(long, help_heading = LOSS, alias = "vllm-importance-sampling-clip-min")]
    pub importance_sampling_clip_min: Option<f64>,
    /// The upper end of the clip range
    #[arg(long, help_heading = LOSS, alias = "vllm-importance-sampling-clip-max", default_value = "3")]
    pub importance_sampling_clip_max: Option<f64>,

    /// Steps between two tables of completions, on screen and in completions.jsonl; 0 for none
    #[arg(long, value_name = "N", help_heading = OUTPUT, default_value_t = 10)]
    pub log_completions_steps: u64,
    /// Completions of a table on screen; the file has all
    #[arg(long, value_name = "N", help_heading = OUTPUT, default_value_t = 4)]
    pub num_completions_to_print: usize,
}

/// Arguments of a training run that have no meaning here, by their keys.
const NOT_OURS: [&str; 14] = [
    "packing",
    "text_column",
    "template",
    "dataset_format",
    "assistant_only_loss",
    "completion_only_loss",
    "allow_missing_eot",
    "dataset_cache",
    "test_size",
    "per_device_eval_batch_size",
    "load_best_model_at_end",
    "early_stopping_patience",
    "early_stopping_threshold",
    "serve",
];

impl Default for GrpoArguments {
    /// What an empty command line gives.
    fn default() -> Self {
        let command = Self::augment_args(Command::new("defaults").no_binary_name(true));
        Self::from_arg_matches(&command.get_matches_from([""; 0])).expect("every field has a default")
    }
}

impl GrpoArguments {
    /// The keys that are not those of every training run, as YAML: the rest of what `--config` reads.
    pub(super) fn own_yaml(&self) -> Result<String> {
        let mut own = fields(self);
        own.retain(|key, _| !fields(&self.training).contains_key(key));
        serde_saphyr::to_string(&own).context("writing the configuration as YAML")
    }

    /// Reads a `run.yaml`, or some of its keys; `file` is named in errors.
    pub fn from_yaml(text: &str, file: &Path) -> Result<Self> {
        let options = serde_saphyr::options! { strict_booleans: true };
        let wrong = || format!("{}: not a configuration", file.display());
        let given: Map<String, Value> =
            serde_saphyr::from_str_with_options(text, options).with_context(wrong)?;
        // Not what serde takes for a missing key: that is the default of `ferrotune train`.
        let mut all = fields(&Self::default());
        all.extend(given);
        serde_json::from_value(Value::Object(all)).with_context(wrong)
    }

    /// The keys whose values differ, as [`TrainingArguments::differences`] gives them.
    pub fn differences(&self, other: &Self) -> Vec<String> {
        differences(self, other)
    }

    /// The upper end of the clipping, above 1; of cispo, the largest ratio.
    pub fn epsilon_high(&self) -> f64 {
        self.epsilon_high.unwrap_or(self.epsilon)
    }

    /// Micro-batches of a generation batch.
    pub fn steps_per_generation(&self) -> usize {
        self.steps_per_generation.unwrap_or(self.training.gradient_accumulation_steps)
    }

    /// Completions of a generation batch.
    pub fn generation_batch_size(&self) -> usize {
        self.training.per_device_train_batch_size * self.steps_per_generation()
    }

    /// Whether steps follow on completions of older weights, so that their log-probabilities must be known from before.
    pub fn is_off_policy(&self) -> bool {
        self.num_iterations > 1 || self.steps_per_generation() != self.training.gradient_accumulation_steps
    }

    /// The rewards by name, with the reward model as the last one.
    pub fn rewards(&self) -> Vec<RewardSpec> {
        let model = self.reward_model.as_deref().map(|path| RewardSpec::model(Path::new(path)));
        self.reward_funcs.iter().cloned().chain(model).collect()
    }

    /// The same run with every choice that depends on another one made.
    ///
    /// # Errors
    /// [`Error::Usage`] naming the flag, for values that make no sense alone or together.
    pub fn resolved(mut self) -> Result<Self> {
        self.training.learning_rate.get_or_insert(1e-6);
        self.check()?;
        self.training = self.training.resolved()?;
        Ok(self)
    }

    fn check(&self) -> Result<()> {
        let refuse = |wrong: bool, message: String| match wrong {
            true => Err(Error::Usage(message)),
            false => Ok(()),
        };
        refuse(
            self.training.base_dtype != BaseDtype::Auto,
            "--base-dtype is for `ferrotune train`".to_owned(),
        )?;
        let default = fields(&TrainingArguments::default());
        let given = fields(&self.training);
        for key in NOT_OURS {
            refuse(
                given.get(key) != default.get(key),
                format!("--{}: has no meaning in grpo", key.replace('_', "-")),
            )?;
        }
        let positive =
            |flag: &str, value: usize| refuse(value == 0, format!("--{flag} 0: must be at least 1"));
        positive("max-completion-length", self.max_completion_length)?;
        positive("num-iterations", self.num_iterations)?;
        positive("steps-per-generation", self.steps_per_generation())?;
        positive("gradient-accumulation-steps", self.training.gradient_accumulation_steps)?;
        positive("per-device-train-batch-size", self.training.per_device_train_batch_size)?;
        refuse(
            self.num_generations < 2,
            format!("--num-generations {}: a group needs at least 2", self.num_generations),
        )?;
        let batch = self.generation_batch_size();
        refuse(
            !batch.is_multiple_of(self.num_generations),
            format!(
                "--num-generations {}: the {batch} completions that are generated at once (--per-device-train-batch-size times \
                 --steps-per-generation, by default --gradient-accumulation-steps) must be whole groups",
                self.num_generations
            ),
        )?;
        let (steps, accumulation) = (self.steps_per_generation(), self.training.gradient_accumulation_steps);
        refuse(
            !steps.is_multiple_of(accumulation),
            format!(
                "--steps-per-generation {steps}: must be a multiple of --gradient-accumulation-steps {accumulation}"
            ),
        )?;
        for (flag, value, least) in [
            ("temperature", self.temperature, f64::MIN_POSITIVE),
            ("eval-temperature", self.eval_temperature, 0.0),
            ("beta", self.beta, 0.0),
            ("epsilon", self.epsilon, 0.0),
            ("epsilon-high", self.epsilon_high(), 0.0),
            ("delta", self.delta.unwrap_or(1.0), f64::MIN_POSITIVE),
            ("off-policy-mask-threshold", self.off_policy_mask_threshold.unwrap_or(1.0), f64::MIN_POSITIVE),
            ("repetition-penalty", self.repetition_penalty, f64::MIN_POSITIVE),
            ("sapo-temperature-neg", self.sapo_temperature_neg, f64::MIN_POSITIVE),
            ("sapo-temperature-pos", self.sapo_temperature_pos, f64::MIN_POSITIVE),
            ("reward-timeout", self.reward_timeout, f64::MIN_POSITIVE),
        ] {
            let expected = if least > 0.0 { "above 0" } else { "0 or more" };
            refuse(
                !(value.is_finite() && value >= least),
                format!("--{flag} {value}: must be a finite number {expected}"),
            )?;
        }
        for (flag, value, least) in [
            ("top-p", self.top_p, f64::MIN_POSITIVE),
            ("min-p", self.min_p, 0.0),
            ("top-entropy-quantile", self.top_entropy_quantile, f64::MIN_POSITIVE),
        ] {
            refuse(
                !(least..=1.0).contains(&value),
                format!(
                    "--{flag} {value}: must be {} and at most 1",
                    if least > 0.0 { "above 0" } else { "at least 0" }
                ),
            )?;
        }
        refuse(
            Duration::try_from_secs_f64(self.reward_timeout).is_err(),
            format!("--reward-timeout {}: too long", self.reward_timeout),
        )?;
        let (rewards, weights) = (self.rewards().len(), self.reward_weights.len());
        refuse(
            weights != 0 && weights != rewards,
            format!("--reward-weights: {weights} weights for {rewards} rewards"),
        )?;
        refuse(
            self.reward_model.as_deref().is_some_and(|path| !Path::new(path).exists()),
            format!(
                "--reward-model {}: no such file or folder",
                self.reward_model.as_deref().unwrap_or_default()
            ),
        )?;
        refuse(
            self.importance_sampling_clip_max.is_some_and(|max| !(max.is_finite() && max > 0.0)),
            "--importance-sampling-clip-max: must be a finite number above 0".to_owned(),
        )?;
        let (min, max) = (self.importance_sampling_clip_min, self.importance_sampling_clip_max);
        refuse(
            min.is_some_and(|min| max.is_some_and(|max| min >= max)),
            "--importance-sampling-clip-min: must be below --importance-sampling-clip-max".to_owned(),
        )?;
        refuse(
            self.rewards().is_empty(),
            "--reward-funcs is missing: name what completions are judged by, such as exact or format:think-answer".to_owned(),
        )?;
        refuse(
            self.training.eval_steps.is_some() && self.training.eval_dataset.is_empty(),
            "--eval-steps: --eval-dataset is missing, the prompts to ask".to_owned(),
        )?;
        let trains_more = self.training.trains_all_weights() || !self.training.modules_to_save.is_empty();
        refuse(
            self.beta != 0.0 && trains_more,
            "--beta: the reference is the model without its LoRA, and with --full-finetuning or --modules-to-save there would have \
             to be a second copy; leave out one of them"
                .to_owned(),
        )?;
        Ok(())
    }
}
