//! The plan of a training run: what it computes, from its files and flags, before its weights are read.

use std::collections::BTreeSet;
use std::path::Path;

use anyhow::{Context, Result};
use tch::Kind;

use super::budget::{budget, check_evaluation, plan_for, warn_without_gpu};
use super::cards;
use crate::device;
use crate::io::Weights;
use crate::io::adapter::text_module;
use crate::io::lora_spec::LoraSpec;
use crate::models::{Config, prefix_of, projections};
use crate::nn::LoadOptions;
use crate::train::plan::{Budget, Card, Module, Plan, Rollout, Work};
use crate::train::{RunPlan, TrainingArguments};

/// What a run was given and will keep to.
pub struct TrainPlan {
    pub plan: Plan,
    pub run: RunPlan,
    pub budget: Budget,
    pub card: Card,
}

/// What a run's micro-batches are at most.
#[derive(Debug, Clone, Copy)]
pub struct Sizes {
    /// Tokens of a sample.
    pub longest: usize,
    /// Tokens of a micro-batch.
    pub tokens: u64,
    /// Whether the loss is made of log-probabilities.
    pub log_probs: bool,
    /// What is written between steps.
    pub rollout: Option<Rollout>,
}

/// The plan of a run on `dir`, whose modules `dense` are not quantised; none on the CPU. The GPU is held to the budget from here on.
///
/// # Errors
/// The run cannot fit.
pub fn train_plan(
    args: &TrainingArguments,
    dir: &Path,
    options: LoadOptions,
    dense: &BTreeSet<String>,
    sizes: Sizes,
    eval_tokens: Option<u64>,
) -> Result<Option<TrainPlan>> {
    if !options.device.is_cuda() {
        warn_without_gpu(options.device, args.max_memory, args.max_host_memory);
        return Ok(None);
    }
    let budget = budget(args.max_memory, args.max_host_memory, options.device)?;
    let card = cards::of_gpu(options.device)?;
    let mut work = work(args, dir, options, dense, sizes)?;
    // The model is yet to come.
    work.beside = device::allocated(options.device)?;
    work.log_probs = sizes.log_probs;
    work.rollout = sizes.rollout;
    work.deterministic = args.deterministic.then_some(card.processors);
    let checkpointing = args.use_gradient_checkpointing;
    let (plan, run) = plan_for(&work, checkpointing, budget, (options.device, &card))?;
    if let Some(tokens) = eval_tokens {
        check_evaluation(&work, tokens, budget)?;
    }
    Ok(Some(TrainPlan { plan, run, budget, card }))
}

fn work(
    args: &TrainingArguments,
    dir: &Path,
    options: LoadOptions,
    dense: &BTreeSet<String>,
    sizes: Sizes,
) -> Result<Work> {
    let config = Config::from_dir(dir)?;
    let all = args.trains_all_weights();
    let mut work = if all {
        let none = |_: &str| Module { r: 0, nf4: false, trained: false };
        let work = Work::new(&config, (1, sizes.longest), args.optim_for(false), "model.", none);
        Work { from_scratch: args.from_scratch, ..work }
    } else {
        lora_work(args, &config, dir, options, dense, sizes.longest)?
    };
    if options.kind == Kind::Float {
        work = work.in_f32();
    }
    if options.base_fp8 {
        work = work.in_fp8()?;
    }
    work = if all {
        work.training_all()?
    } else {
        let work = work.with_embeddings(options.offload_embedding, options.nf4_head)?;
        work.saving(&args.modules_to_save).context("--modules-to-save")?
    };
    work.tokens = sizes.tokens;
    work.gradient_accumulation_steps = args.gradient_accumulation_steps as u64;
    Ok(work)
}

/// LoRA where the arguments have it, on samples of `longest` tokens.
fn lora_work(
    args: &TrainingArguments,
    config: &Config,
    dir: &Path,
    options: LoadOptions,
    dense: &BTreeSet<String>,
    longest: usize,
) -> Result<Work> {
    let weights = Weights::open(dir)?;
    let prefix = prefix_of(&weights)?;
    let spec = LoraSpec::new(&args.adapter_config(&args.model))?;
    let quantises = options.load_in_4bit && !weights.is_quantized();
    // A pattern may have been written for the names that transformers gives, or for the text model alone.
    let peft = if config.ignores_vision { "model.language_model." } else { "model." };
    let rank = |module: &str| -> Result<u64> {
        let name = format!("{peft}{}", module.strip_prefix(prefix).unwrap_or(module));
        let lora = match spec.for_module(&name)? {
            None => spec.for_module(&text_module(&name))?,
            found => found,
        };
        Ok(lora.map_or(0, |lora| u64::from(lora.r)))
    };
    let mut ranks = std::collections::HashMap::new();
    for layer in 0..config.num_hidden_layers() {
        for (module, _) in projections(config, layer, prefix).iter().flat_map(|(parts, _)| parts) {
            ranks.insert(module.clone(), rank(module).context("target_modules")?);
        }
    }
    let stored = |module: &str| {
        let weight = format!("{module}.weight");
        weights.names().any(|name| name.starts_with(&weight) && name.len() > weight.len())
    };
    let stored: BTreeSet<&str> = if weights.is_quantized() {
        ranks.keys().map(String::as_str).filter(|m| stored(m)).collect()
    } else {
        BTreeSet::new()
    };
    let module = |name: &str| Module {
        r: ranks.get(name).copied().unwrap_or(0),
        nf4: stored.contains(name) || (quantises && !dense.contains(name)),
        trained: false,
    };
    let optim = args.optim_for(quantises || weights.is_quantized());
    let work = Work::new(config, (1, longest), optim, prefix, module);
    Ok(Work { dropout: args.lora_dropout > 0.0, ..work })
}
