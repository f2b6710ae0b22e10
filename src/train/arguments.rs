//! Everything a run can be told, in one flat struct: the flags of `ferrotune train`, the keys of `run.yaml` and
//! the fields below are the same words (TRL's, PEFT's and Unsloth's), with one list of defaults.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use clap::{Args, Command, FromArgMatches};
use serde::{Deserialize, Serialize};

use crate::data::DatasetFormat;
use crate::device;
use crate::error::Error;
use crate::io::adapter::{AdapterConfig, InitLoraWeights, Patterns, TargetModules};
use crate::train::schedule::SchedulerType;

mod values;

use values::target_modules;
pub use values::{BaseDtype, Dtype, EvalStrategy, GradientCheckpointing, Optim, Quant, Size};
pub(super) use values::{differences, fields, list};

const MODEL: &str = "Model";
const DATA: &str = "Data";
const LORA: &str = "LoRA";
const OPTIM: &str = "Optimisation";
const EVAL: &str = "Evaluation";
const OUTPUT: &str = "Output and checkpoints";
const MACHINE: &str = "Machine";

/// One training run. `TrainingArguments::default()` holds the defaults that `--help` shows.
#[derive(Debug, Clone, PartialEq, Args, Serialize, Deserialize)]
#[serde(default)]
pub struct TrainingArguments {
    /// Checkpoint to tune: a directory or a Hugging Face hub id
    #[arg(long, value_name = "DIR|ID", help_heading = MODEL, default_value = "", hide_default_value = true)]
    pub model: String,
    /// Branch, tag or commit of a hub model
    #[arg(long, help_heading = MODEL)]
    pub revision: Option<String>,
    /// Train every weight instead of a LoRA adapter
    #[arg(long, help_heading = MODEL)]
    pub full_finetuning: bool,
    /// Start from random weights: only config.json and the tokenizer are read (implies --full-finetuning)
    #[arg(long, help_heading = MODEL)]
    pub from_scratch: bool,
    /// Quantise the weights of the layers to 4 bits (NF4) while they load, and train LoRA on them (QLoRA); a checkpoint in
    /// 4 bits needs no flag
    #[arg(long, help_heading = MODEL)]
    pub load_in_4bit: bool,
    /// What load_in_4bit makes of them; dynamic-nf4 leaves those as they are whose quantisation costs the loss most a byte
    #[arg(long, help_heading = MODEL, value_enum, default_value_t = Quant::Nf4)]
    pub quant: Quant,
    /// Bytes that dynamic-nf4 may spend on them, as a share of the layers' bytes in NF4
    #[arg(long, value_name = "SHARE", help_heading = MODEL, default_value_t = 0.1)]
    pub quant_budget: f64,
    /// Data that dynamic-nf4 judges by: files, globs or a hub id [default: a text that comes with ferrotune]
    #[arg(long, value_name = "FILE|ID", help_heading = MODEL, value_delimiter = ',')]
    #[serde(deserialize_with = "list")]
    pub calibration_dataset: Vec<String>,
    /// Leave the embedding in the host's memory, from where each batch takes its rows
    #[arg(long, help_heading = MODEL)]
    pub offload_embedding: bool,
    /// Quantise the head to 4 bits (NF4); of a model whose head is its embedding, a copy of it
    #[arg(long, help_heading = MODEL)]
    pub nf4_head: bool,
    /// Type of weights and activations
    #[arg(long, help_heading = MODEL, value_enum, default_value_t = Dtype::Auto)]
    pub dtype: Dtype,
    /// Type of the frozen weights of the layers; fp8 is an experiment
    #[arg(long, help_heading = MODEL, value_enum, default_value_t = BaseDtype::Auto)]
    pub base_dtype: BaseDtype,
    /// Longest sample in tokens; what is beyond is cut off
    #[arg(long, help_heading = MODEL, default_value_t = 2048)]
    pub max_seq_length: usize,
    /// Keep fewer activations and compute them again in the backward pass: less memory, up to a third more time
    #[arg(long, help_heading = MODEL, value_enum, num_args = 0..=1, default_missing_value = "on", default_value_t = GradientCheckpointing::Auto)]
    pub use_gradient_checkpointing: GradientCheckpointing,
    /// Of the GPU at most, all that nvidia-smi shows for the process: 8GiB, 24GB, 500MiB [default: 92 % of what is free]
    #[arg(long, value_name = "SIZE", help_heading = MODEL)]
    pub max_memory: Option<Size>,
    /// Of the host at most, for activations that wait there [default: half of the available memory]
    #[arg(long, value_name = "SIZE", help_heading = MODEL)]
    pub max_host_memory: Option<Size>,

    /// Training data: files, globs or a hub id, comma-separated or repeated (json, jsonl, csv, parquet; .gz and .zst of these)
    #[arg(long, value_name = "FILE|ID", help_heading = DATA, value_delimiter = ',')]
    #[serde(deserialize_with = "list")]
    pub dataset: Vec<String>,
    /// Split of a hub dataset to train on
    #[arg(long, help_heading = DATA, default_value = "train")]
    pub dataset_split: String,
    /// Shape of the records; recognised by their columns when not given
    #[arg(long, value_name = "FORMAT", help_heading = DATA)]
    pub dataset_format: Option<String>,
    /// Column that holds plain text to train on
    #[arg(long, value_name = "COLUMN", help_heading = DATA)]
    pub text_column: Option<String>,
    /// Text of a sample made from its columns, such as "Q: {question}\nA: {answer}"
    #[arg(long, value_name = "TEXT", help_heading = DATA)]
    pub template: Option<String>,
    /// Jinja chat template (a file or the text itself) instead of the tokenizer's own
    #[arg(long, value_name = "FILE|TEXT", help_heading = DATA)]
    pub chat_template: Option<String>,
    /// Put several samples into one sequence of max_seq_length tokens; they never see each other
    #[arg(long, help_heading = DATA)]
    pub packing: bool,
    /// Train only on the assistant's turns
    #[arg(long, alias = "train-on-responses-only", help_heading = DATA)]
    pub assistant_only_loss: bool,
    /// Train only on the completion of prompt/completion data [default: true where the data has that shape]
    #[arg(long, help_heading = DATA, num_args = 0..=1, default_missing_value = "true", require_equals = true)]
    pub completion_only_loss: Option<bool>,
    /// Go on although the chat template's end-of-turn token is never trained: the model may not learn to stop
    #[arg(long, help_heading = DATA)]
    pub allow_missing_eot: bool,
    /// Folder for tokenised data: a run with the same data, tokenizer, template and options reads it from there, and data may be larger than memory
    #[arg(long, value_name = "DIR", help_heading = DATA)]
    pub dataset_cache: Option<PathBuf>,

    /// LoRA rank
    #[arg(long, alias = "lora-r", help_heading = LORA, default_value_t = 16)]
    pub r: u32,
    /// LoRA scale: the update is multiplied by lora_alpha / r
    #[arg(long, help_heading = LORA, default_value_t = 16.0)]
    pub lora_alpha: f64,
    /// Share of a LoRA layer's inputs that is dropped
    #[arg(long, help_heading = LORA, default_value_t = 0.0)]
    pub lora_dropout: f64,
    /// Layers that get LoRA: all-linear, names such as q_proj,v_proj, or a regular expression for the whole module name
    #[arg(long, help_heading = LORA, default_value = "all-linear")]
    #[serde(deserialize_with = "target_modules")]
    pub target_modules: TargetModules,
    /// Layers that get none, even if target_modules names them
    #[arg(long, value_name = "NAMES", help_heading = LORA, value_delimiter = ',')]
    #[serde(deserialize_with = "list")]
    pub exclude_modules: Vec<String>,
    /// Modules trained in full and saved with the adapter, such as embed_tokens,lm_head
    #[arg(long, value_name = "NAMES", help_heading = LORA, value_delimiter = ',')]
    #[serde(deserialize_with = "list")]
    pub modules_to_save: Vec<String>,
    /// Decoder layers that get LoRA, such as 0,1,2 [default: all]
    #[arg(long, value_name = "NUMBERS", help_heading = LORA, value_delimiter = ',')]
    #[serde(deserialize_with = "list")]
    pub layers_to_transform: Vec<usize>,
    /// Scale by lora_alpha / sqrt(r) instead of lora_alpha / r
    #[arg(long, help_heading = LORA)]
    pub use_rslora: bool,
    /// Ranks of modules whose name ends in a pattern, as JSON: {"q_proj": 8}
    #[arg(long, value_name = "JSON", help_heading = LORA, default_value = "{}")]
    pub rank_pattern: Patterns<u32>,
    /// lora_alpha of modules whose name ends in a pattern, as JSON: {"q_proj": 32}
    #[arg(long, value_name = "JSON", help_heading = LORA, default_value = "{}")]
    pub alpha_pattern: Patterns<f64>,
    /// Start of A and B: true (A uniform, B zero), gaussian (A normal, B zero) or false (both random)
    #[arg(long, help_heading = LORA, default_value = "true")]
    pub init_lora_weights: InitLoraWeights,

    /// Samples (packs, with --packing) in one forward pass
    #[arg(long, value_name = "N", help_heading = OPTIM, default_value_t = 4)]
    pub per_device_train_batch_size: usize,
    /// Forward passes before the weights are updated
    #[arg(long, value_name = "N", help_heading = OPTIM, default_value_t = 2)]
    pub gradient_accumulation_steps: usize,
    /// Optimizer [default: adamw_8bit on weights in 4 bits, else adamw_torch]
    #[arg(long, help_heading = OPTIM, value_enum)]
    pub optim: Option<Optim>,
    /// Peak learning rate [default: 2e-4 for LoRA, 2e-5 for full fine-tuning]
    #[arg(long, value_name = "LR", help_heading = OPTIM)]
    pub learning_rate: Option<f64>,
    /// Passes over the data; a part of one is allowed
    #[arg(long, value_name = "N", help_heading = OPTIM, default_value_t = 3.0)]
    pub num_train_epochs: f64,
    /// Optimizer steps; overrides num_train_epochs
    #[arg(long, value_name = "N", help_heading = OPTIM)]
    pub max_steps: Option<u64>,
    /// Course of the learning rate after the warmup
    #[arg(long, help_heading = OPTIM, value_enum, default_value_t = SchedulerType::Linear)]
    pub lr_scheduler_type: SchedulerType,
    /// Share of all steps during which the learning rate rises to its peak
    #[arg(long, help_heading = OPTIM, default_value_t = 0.1)]
    pub warmup_ratio: f64,
    /// Steps of warmup; overrides warmup_ratio
    #[arg(long, value_name = "N", help_heading = OPTIM)]
    pub warmup_steps: Option<u64>,
    /// Share of all steps during which the wsd schedule falls to zero at the end
    #[arg(long, help_heading = OPTIM, default_value_t = 0.1)]
    pub lr_decay_ratio: f64,
    /// AdamW's decay of weight matrices (not of biases and norms)
    #[arg(long, help_heading = OPTIM, default_value_t = 0.001)]
    pub weight_decay: f64,
    #[arg(long, help = "AdamW's averaging of gradients", help_heading = OPTIM, default_value_t = 0.9)]
    pub adam_beta1: f64,
    #[arg(long, help = "AdamW's averaging of squared gradients", help_heading = OPTIM, default_value_t = 0.999)]
    pub adam_beta2: f64,
    #[arg(long, help = "AdamW's guard against division by zero", help_heading = OPTIM, default_value = "1e-8")]
    pub adam_epsilon: f64,
    /// Largest norm of the gradient; longer ones are scaled down, 0 turns that off
    #[arg(long, help_heading = OPTIM, default_value_t = 1.0)]
    pub max_grad_norm: f64,
    /// Seed of the weights' start, the data's order and dropout
    #[arg(long, help_heading = OPTIM, default_value_t = 3407)]
    pub seed: u64,

    /// Evaluation data: files, globs or a hub id
    #[arg(long, value_name = "FILE|ID", help_heading = EVAL, value_delimiter = ',')]
    #[serde(deserialize_with = "list")]
    pub eval_dataset: Vec<String>,
    /// Share of the training data set aside for evaluation, if there is no eval_dataset
    #[arg(long, value_name = "SHARE", help_heading = EVAL, default_value_t = 0.0)]
    pub test_size: f64,
    /// When to evaluate [default: steps if eval_steps is given, epoch if there is other evaluation data, else no]
    #[arg(long, help_heading = EVAL, value_enum)]
    pub eval_strategy: Option<EvalStrategy>,
    /// Steps between two evaluations
    #[arg(long, value_name = "N", help_heading = EVAL)]
    pub eval_steps: Option<u64>,
    /// Samples in one forward pass of the evaluation
    #[arg(long, value_name = "N", help_heading = EVAL, default_value_t = 4)]
    pub per_device_eval_batch_size: usize,
    /// Keep the checkpoint with the lowest evaluation loss and end with its weights
    #[arg(long, help_heading = EVAL)]
    pub load_best_model_at_end: bool,
    /// Stop after this many evaluations without a better loss
    #[arg(long, value_name = "N", help_heading = EVAL)]
    pub early_stopping_patience: Option<u64>,
    /// A loss is better only if it is lower by more than this
    #[arg(long, value_name = "LOSS", help_heading = EVAL, default_value_t = 0.0)]
    pub early_stopping_threshold: f64,

    /// Folder for the adapter or model, the checkpoints, metrics and the loss curve
    #[arg(long, value_name = "DIR", help_heading = OUTPUT, default_value = "outputs")]
    pub output_dir: PathBuf,
    /// Replace the run that is already in output_dir
    #[arg(long, help_heading = OUTPUT)]
    pub overwrite_output_dir: bool,
    /// Continue a run: auto takes the newest whole checkpoint in output_dir (or starts anew), or name one
    #[arg(long, value_name = "auto|DIR", help_heading = OUTPUT, num_args = 0..=1, default_missing_value = "auto")]
    pub resume_from_checkpoint: Option<String>,
    /// Steps between two checkpoints; 0 saves only at the end
    #[arg(long, value_name = "N", help_heading = OUTPUT, default_value_t = 500)]
    pub save_steps: u64,
    /// Checkpoints to keep; the best and the last are never deleted [default: all]
    #[arg(long, value_name = "N", help_heading = OUTPUT)]
    pub save_total_limit: Option<usize>,
    /// Steps between two lines of metrics
    #[arg(long, value_name = "N", help_heading = OUTPUT, default_value_t = 1)]
    pub logging_steps: u64,
    /// Load everything, show one decoded sample with its mask, and stop
    #[arg(long, help_heading = OUTPUT)]
    pub dry_run: bool,

    /// auto (a GPU when there is one), cpu, cuda, cuda:1, ..
    #[arg(long, help_heading = MACHINE, default_value = "auto")]
    pub device: String,
    /// Repeat a run bit for bit on a GPU, resumed or not, with slower attention; on the CPU every run does
    #[arg(long, help_heading = MACHINE)]
    pub deterministic: bool,
    /// Answer requests on this address, as ferrotune serve does, from the weights being trained; for at most half of the time
    #[arg(long, value_name = "ADDR", help_heading = MACHINE)]
    pub serve: Option<SocketAddr>,
    /// CPU threads [default: all cores]; a run is reproducible to the bit only with the same number
    #[arg(long, value_name = "N", help_heading = MACHINE)]
    pub threads: Option<usize>,
}

impl Default for TrainingArguments {
    /// What an empty command line gives: the `default_value`s above are the only list of defaults.
    fn default() -> Self {
        let command = Self::augment_args(Command::new("defaults").no_binary_name(true));
        Self::from_arg_matches(&command.get_matches_from([""; 0])).expect("every field has a default")
    }
}

impl TrainingArguments {
    /// Whether every weight is trained, rather than an adapter.
    pub fn trains_all_weights(&self) -> bool {
        self.full_finetuning || self.from_scratch
    }

    /// `optim`, or its default for such weights.
    pub fn optim_for(&self, weights_in_4bit: bool) -> Optim {
        self.optim.unwrap_or(if weights_in_4bit { Optim::Adamw8bit } else { Optim::AdamwTorch })
    }

    /// The arguments as YAML, every key with its value: what `--config` reads.
    pub fn to_yaml(&self) -> Result<String> {
        serde_saphyr::to_string(self).context("writing the configuration as YAML")
    }

    /// Reads what [`to_yaml`](Self::to_yaml) wrote; `file` is named in errors.
    pub fn from_yaml(text: &str, file: &Path) -> Result<Self> {
        let options = serde_saphyr::options! { strict_booleans: true };
        serde_saphyr::from_str_with_options(text, options)
            .with_context(|| format!("{}: not a configuration", file.display()))
    }

    /// Samples in one optimizer step.
    pub fn effective_batch_size(&self) -> usize {
        self.per_device_train_batch_size * self.gradient_accumulation_steps
    }

    /// The adapter that these arguments ask for, on `base_model`.
    pub fn adapter_config(&self, base_model: &str) -> AdapterConfig {
        AdapterConfig {
            base_model_name_or_path: Some(base_model.to_owned()),
            revision: self.revision.clone(),
            r: self.r,
            lora_alpha: self.lora_alpha,
            lora_dropout: self.lora_dropout,
            target_modules: self.target_modules.clone(),
            exclude_modules: (!self.exclude_modules.is_empty())
                .then(|| TargetModules::Suffixes(self.exclude_modules.clone())),
            modules_to_save: (!self.modules_to_save.is_empty()).then(|| self.modules_to_save.clone()),
            layers_to_transform: (!self.layers_to_transform.is_empty())
                .then(|| self.layers_to_transform.clone()),
            use_rslora: self.use_rslora,
            rank_pattern: self.rank_pattern.clone(),
            alpha_pattern: self.alpha_pattern.clone(),
            init_lora_weights: self.init_lora_weights,
            ..AdapterConfig::default()
        }
    }

    /// The same run with every choice that depends on another one made (learning rate, when to evaluate).
    ///
    /// # Errors
    /// [`Error::Usage`] naming the flag, for values that make no sense alone or together.
    pub fn resolved(mut self) -> Result<Self> {
        self.full_finetuning = self.trains_all_weights();
        self.learning_rate.get_or_insert(if self.full_finetuning { 2e-5 } else { 2e-4 });
        let has_eval_data = !self.eval_dataset.is_empty() || self.test_size > 0.0;
        self.eval_strategy.get_or_insert(match (has_eval_data, self.eval_steps) {
            (false, _) => EvalStrategy::No,
            (true, Some(_)) => EvalStrategy::Steps,
            (true, None) => EvalStrategy::Epoch,
        });
        self.check(has_eval_data)?;
        Ok(self)
    }

    fn check(&self, has_eval_data: bool) -> Result<()> {
        let refuse = |wrong: bool, message: &str| match wrong {
            true => Err(Error::Usage(message.to_owned())),
            false => Ok(()),
        };
        let share = |flag: &str, value: f64, below_one: bool| {
            let fits = (0.0..=1.0).contains(&value) && !(below_one && value == 1.0);
            let range = if below_one { "at least 0 and below 1" } else { "between 0 and 1" };
            refuse(!fits, &format!("--{flag} {value}: must be {range}"))
        };
        let positive =
            |flag: &str, value: usize| refuse(value == 0, &format!("--{flag} 0: must be at least 1"));
        let finite = |flag: &str, value: f64| {
            refuse(
                !(value.is_finite() && value >= 0.0),
                &format!("--{flag} {value}: must be a finite number, 0 or more"),
            )
        };

        refuse(self.model.is_empty(), "--model is missing: give a checkpoint directory or a hub id")?;
        refuse(self.dataset.is_empty(), "--dataset is missing: give a file, a glob or a hub id")?;
        positive("max-seq-length", self.max_seq_length)?;
        positive("per-device-train-batch-size", self.per_device_train_batch_size)?;
        positive("per-device-eval-batch-size", self.per_device_eval_batch_size)?;
        positive("gradient-accumulation-steps", self.gradient_accumulation_steps)?;
        positive("logging-steps", self.logging_steps as usize)?;
        positive("threads", self.threads.unwrap_or(1))?;
        positive("save-total-limit", self.save_total_limit.unwrap_or(1))?;
        positive("eval-steps", self.eval_steps.unwrap_or(1) as usize)?;
        positive("max-steps", self.max_steps.unwrap_or(1) as usize)?;
        positive("early-stopping-patience", self.early_stopping_patience.unwrap_or(1) as usize)?;
        refuse(
            !(self.num_train_epochs.is_finite() && self.num_train_epochs > 0.0),
            &format!("--num-train-epochs {}: must be above 0", self.num_train_epochs),
        )?;
        for (flag, value) in [
            ("learning-rate", self.learning_rate.unwrap_or(0.0)),
            ("weight-decay", self.weight_decay),
            ("adam-epsilon", self.adam_epsilon),
            ("max-grad-norm", self.max_grad_norm),
            ("early-stopping-threshold", self.early_stopping_threshold),
            ("quant-budget", self.quant_budget),
        ] {
            finite(flag, value)?;
        }
        share("warmup-ratio", self.warmup_ratio, false)?;
        share("lr-decay-ratio", self.lr_decay_ratio, false)?;
        share("lora-dropout", self.lora_dropout, true)?;
        share("adam-beta1", self.adam_beta1, true)?;
        share("adam-beta2", self.adam_beta2, true)?;
        share("test-size", self.test_size, true)?;
        let readable = |flag: &str, found: Result<()>| match found {
            Err(error) => Err(Error::Usage(format!("--{flag}: {error:#}"))),
            Ok(()) => Ok(()),
        };
        let format = self.dataset_format.as_deref().map(str::parse::<DatasetFormat>).transpose();
        readable("dataset-format", format.map(drop))?;
        readable("device", self.device.parse::<device::Choice>().map(drop))?;
        refuse(
            self.test_size > 0.0 && !self.eval_dataset.is_empty(),
            "--test-size and --eval-dataset: give one of them",
        )?;
        refuse(
            self.text_column.is_some() && self.template.is_some(),
            "--text-column and --template: give one of them",
        )?;
        refuse(
            self.load_in_4bit && self.trains_all_weights(),
            "--load-in-4bit and --full-finetuning: 4-bit weights do not train; leave one of them out",
        )?;
        let base_fp8 = self.base_dtype == BaseDtype::Fp8;
        refuse(
            base_fp8 && self.load_in_4bit,
            "--base-dtype fp8 and --load-in-4bit: weights are in one of them; leave the other out",
        )?;
        refuse(
            base_fp8 && self.trains_all_weights(),
            "--base-dtype fp8 and --full-finetuning: weights in fp8 do not train; leave one of them out",
        )?;
        refuse(
            (self.offload_embedding || self.nf4_head) && self.trains_all_weights(),
            "--offload-embedding, --nf4-head and --full-finetuning: an embedding in the host's memory and a head in 4 bits do \
             not train; leave them out",
        )?;
        refuse(
            self.quant == Quant::DynamicNf4 && !self.load_in_4bit,
            "--quant dynamic-nf4 says how --load-in-4bit loads: give both",
        )?;
        refuse(
            self.overwrite_output_dir && self.resume_from_checkpoint.is_some(),
            "--overwrite-output-dir and --resume-from-checkpoint: give one of them",
        )?;

        let evaluates = self.eval_strategy != Some(EvalStrategy::No);
        refuse(
            evaluates && !has_eval_data,
            "--eval-strategy needs evaluation data: give --eval-dataset or --test-size",
        )?;
        refuse(
            self.eval_strategy == Some(EvalStrategy::Steps) && self.eval_steps.is_none(),
            "--eval-strategy steps needs --eval-steps",
        )?;
        refuse(
            self.load_best_model_at_end && !evaluates,
            "--load-best-model-at-end needs an evaluation: give --eval-dataset or --test-size",
        )?;
        refuse(
            self.early_stopping_patience.is_some() && !evaluates,
            "--early-stopping-patience needs an evaluation: give --eval-dataset or --test-size",
        )?;
        if !self.trains_all_weights() {
            self.adapter_config(&self.model).check()?;
        }
        Ok(())
    }

    /// What is allowed but most likely a mistake, one sentence each.
    pub fn warnings(&self) -> Vec<String> {
        let mut warnings = Vec::new();
        if let Some(rate) = self.learning_rate
            && !(1e-7..=1.0).contains(&rate)
        {
            let course =
                if rate > 1.0 { "the loss will most likely diverge" } else { "the model will hardly change" };
            warnings.push(format!("--learning-rate {rate}: {course} (usual: 1e-5 to 1e-3)"));
        }
        if self.trains_all_weights() {
            let defaults = Self::default();
            let lora_is_set = self.r != defaults.r
                || self.lora_alpha != defaults.lora_alpha
                || self.target_modules != defaults.target_modules
                || !self.modules_to_save.is_empty();
            if lora_is_set {
                warnings
                    .push("full fine-tuning trains every weight: the LoRA settings are not used".to_owned());
            }
        }
        if self.warmup_steps.is_some_and(|warmup| self.max_steps.is_some_and(|total| warmup >= total)) {
            warnings.push(
                "--warmup-steps is not below --max-steps: the peak learning rate is never reached".to_owned(),
            );
        }
        warnings
    }

    /// The keys whose values differ, as `key: ours -> theirs`; what names a place or a moment rather than the run
    /// (`output_dir`, `resume_from_checkpoint`, ..) is left out.
    pub fn differences(&self, other: &Self) -> Vec<String> {
        differences(self, other)
    }
}
