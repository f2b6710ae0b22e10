//! What trains of a shape, and how: the words of `ferrotune train` that decide time and memory.

use anyhow::{Result, bail};
use clap::Args;
use tch::{Device, Kind};

use super::shapes::WeightsArgs;
use crate::error::Error;
use crate::io::adapter::InitLoraWeights;
use crate::models::{Config, FastLanguageModel};
use crate::nn::LoadOptions;
use crate::train::plan::{Card, Work};
use crate::train::{Dtype, Optim, TrainingArguments};

/// LoRA on every linear layer, or all weights.
#[derive(Debug, Args)]
pub struct MethodArgs {
    #[arg(long, help = "Train all weights instead of a LoRA adapter")]
    pub full_finetuning: bool,
    #[arg(long, help = "LoRA rank", default_value_t = 16)]
    pub r: u32,
    #[arg(long, help = "Share of LoRA's inputs that is dropped", default_value_t = 0.0)]
    pub lora_dropout: f64,
    /// Trained copies beside LoRA: embed_tokens, lm_head
    #[arg(long, value_name = "NAMES", value_delimiter = ',')]
    pub modules_to_save: Vec<String>,
    /// Optimizer [default: adamw_8bit on weights in 4 bits, else adamw_torch]
    #[arg(long, value_enum)]
    pub optim: Option<Optim>,
    #[arg(long, help = "Type of weights and activations", value_enum, default_value_t = Dtype::Auto)]
    pub dtype: Dtype,
    #[arg(long, help = "The kernels that repeat a run bit for bit")]
    pub deterministic: bool,
}

impl MethodArgs {
    /// # Errors
    /// [`Error::Usage`] naming the flag.
    pub fn check(&self) -> Result<()> {
        if self.r == 0 {
            bail!(Error::Usage("--r: 0, expected at least 1".into()));
        }
        if !(0.0..1.0).contains(&self.lora_dropout) {
            bail!(Error::Usage(format!(
                "--lora-dropout {}: must be at least 0 and below 1",
                self.lora_dropout
            )));
        }
        Ok(())
    }

    /// Those of a benchmark. Both matrices of LoRA are random: with B zero half of the gradients would be zeros, on which a GPU
    /// runs faster.
    pub fn arguments(&self) -> TrainingArguments {
        TrainingArguments {
            full_finetuning: self.full_finetuning,
            r: self.r,
            lora_dropout: self.lora_dropout,
            modules_to_save: self.modules_to_save.clone(),
            optim: self.optim,
            dtype: self.dtype,
            deterministic: self.deterministic,
            init_lora_weights: InitLoraWeights::Random,
            learning_rate: Some(1e-4),
            ..TrainingArguments::default()
        }
    }

    /// A step on `rows` samples of `length` tokens a pass, on a GPU such as `card`, in f32 or in 16 bits.
    pub fn work(
        &self,
        config: &Config,
        (rows, length): (usize, usize),
        weights: &WeightsArgs,
        kind: Kind,
        card: &Card,
    ) -> Result<Work> {
        let mut work = Work::uniform(config, (rows, length), self.r, weights.load_in_4bit, self.optim);
        if kind == Kind::Float {
            work = work.in_f32();
        }
        work = work.with_embeddings(weights.offload_embedding, weights.nf4_head)?;
        work.deterministic = self.deterministic.then_some(card.processors);
        if self.full_finetuning {
            return work.training_all();
        }
        work.dropout = self.lora_dropout > 0.0;
        work.saving(&self.modules_to_save)
    }

    /// A model of random weights, ready to train.
    pub fn model(
        &self,
        config: Config,
        name: &str,
        options: LoadOptions,
        arguments: &TrainingArguments,
    ) -> Result<FastLanguageModel> {
        let mut model = FastLanguageModel::untrained(config, options, arguments.seed)?;
        match self.full_finetuning {
            true => model.train_all()?,
            false => model.get_peft_model(arguments.adapter_config(name), arguments.seed)?,
        }
        let device: Device = options.device;
        crate::device::synchronize(device)?;
        crate::device::empty_cache(device)?;
        crate::device::reset_peak_memory(device)?;
        Ok(model)
    }
}
