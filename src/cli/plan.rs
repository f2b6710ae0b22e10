//! `ferrotune plan`: memory and time of a run before it starts, what its layers would keep, and what would make it fit.

use anyhow::{Result, bail};
use clap::Args;
use clap::builder::PossibleValuesParser;
use serde::Serialize;
use tch::Kind;

use super::banner::table;
use super::budget::rollout_line;
use super::cards;
use super::changes::changes;
use super::format::{bytes, count};
use super::method_args::MethodArgs;
use super::shapes::{ShapeArgs, WeightsArgs};
use crate::error::Error;
use crate::train::plan::{Budget, Card, Moment, Plan, Rollout};
use crate::train::{BaseDtype, Dtype, GradientCheckpointing, Size};

/// Predicts memory and time of training on a GPU: LoRA on every linear layer, or all weights; needs no GPU. With
/// --max-completion-length it is a GRPO run, whose rollouts are planned too.
#[derive(Debug, Args)]
pub struct PlanArgs {
    #[command(flatten)]
    pub shape: ShapeArgs,
    /// Samples of a forward pass
    #[arg(long, value_name = "N", default_value_t = 2)]
    pub per_device_train_batch_size: usize,
    /// Forward passes of a step
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub gradient_accumulation_steps: usize,
    /// Tokens of a sample
    #[arg(long, value_name = "N", default_value_t = 2048, conflicts_with = "max_completion_length")]
    pub max_seq_length: usize,
    /// In GRPO, tokens of a completion
    #[arg(long, value_name = "N", requires = "prompt")]
    pub max_completion_length: Option<usize>,
    /// In GRPO, tokens of the longest prompt
    #[arg(long, value_name = "N", requires = "max_completion_length")]
    pub prompt: Option<usize>,
    /// In GRPO, completions of each prompt
    #[arg(long, value_name = "N", default_value_t = 8, requires = "max_completion_length")]
    pub num_generations: usize,
    /// In GRPO, forward passes whose completions are written at once [default: gradient_accumulation_steps]
    #[arg(long, value_name = "N", requires = "max_completion_length")]
    pub steps_per_generation: Option<usize>,
    #[command(flatten)]
    pub method: MethodArgs,
    #[command(flatten)]
    pub weights: WeightsArgs,
    /// Type of the frozen weights of the layers; fp8 is an experiment
    #[arg(long, value_enum, default_value_t = BaseDtype::Auto)]
    pub base_dtype: BaseDtype,
    #[arg(long, help = "What is kept between forward and backward", value_enum, num_args = 0..=1, default_missing_value = "on", default_value_t = GradientCheckpointing::Auto)]
    pub use_gradient_checkpointing: GradientCheckpointing,
    /// Of the GPU, for this process: 8GiB, 24GB, 500MiB [default: no bound]
    #[arg(long, value_name = "SIZE")]
    pub max_memory: Option<Size>,
    /// Of the host, for activations that wait there [default: no bound]
    #[arg(long, value_name = "SIZE")]
    pub max_host_memory: Option<Size>,
    /// Whose rates predict the time [default: this machine's GPU if it was measured, else the first]
    #[arg(long, value_parser = PossibleValuesParser::new(cards::names()))]
    pub card: Option<String>,
    #[arg(long, help = "Print the plan as JSON")]
    pub json: bool,
}

impl PlanArgs {
    /// Tokens of a sample.
    fn sample(&self) -> usize {
        let both = self.prompt.zip(self.max_completion_length);
        both.map_or(self.max_seq_length, |(prompt, completion)| prompt + completion)
    }
}

/// Sizes in bytes.
#[derive(Debug, Serialize)]
struct Report {
    shape: String,
    card: Card,
    /// Where nothing fits, the one that needs least.
    #[serde(flatten)]
    plan: Plan,
    max_memory: Option<u64>,
    max_host_memory: Option<u64>,
    fits: bool,
    /// Where it does not fit.
    smallest_change: Option<String>,
    /// Where that is with another policy than auto, the smallest with auto.
    change_with_auto: Option<String>,
    /// The longest samples of this batch size that fit max_memory.
    longest: Option<u64>,
    others: Vec<Other>,
}

/// The same work with another word for --use-gradient-checkpointing.
#[derive(Debug, Serialize)]
struct Other {
    use_gradient_checkpointing: GradientCheckpointing,
    peak_device: u64,
    host: u64,
    ms_per_step: f64,
}

pub fn run(args: PlanArgs) -> Result<()> {
    for (flag, value) in [
        ("--per-device-train-batch-size", args.per_device_train_batch_size),
        ("--gradient-accumulation-steps", args.gradient_accumulation_steps),
        ("--max-seq-length", args.max_seq_length),
        ("--num-generations", args.num_generations),
        ("--max-completion-length", args.max_completion_length.unwrap_or(1)),
        ("--prompt", args.prompt.unwrap_or(1)),
        ("--steps-per-generation", args.steps_per_generation.unwrap_or(1)),
    ] {
        if value == 0 {
            bail!(Error::Usage(format!("{flag}: 0, expected at least 1")));
        }
    }
    args.method.check()?;
    let (shape, config) = args.shape.config()?;
    let card = cards::named(args.card.as_deref())?;
    let batch = (args.per_device_train_batch_size, args.sample());
    let kind = if args.method.dtype == Dtype::F32 { Kind::Float } else { Kind::BFloat16 };
    let mut work = args.method.work(&config, batch, &args.weights, kind, &card)?;
    work.gradient_accumulation_steps = args.gradient_accumulation_steps as u64;
    if let Some(rollout) = rollout(&args)? {
        work = work.with_rollout(rollout);
    }
    if args.base_dtype == BaseDtype::Fp8 {
        cards::check_fp8(&card)?;
        work = work.in_fp8()?;
    }
    let bound = |size: Option<Size>| size.map_or(u64::MAX, |size| size.0);
    let budget = Budget { device: bound(args.max_memory), host: bound(args.max_host_memory) };
    let checkpointing = args.use_gradient_checkpointing;
    let fitting = work.chosen(checkpointing, &card, budget);
    let changes = fitting.is_none().then(|| changes(&work, checkpointing, budget, &card));
    let fits = fitting.is_some();
    let plan = fitting.unwrap_or_else(|| work.least(checkpointing, &card, budget.host));
    use GradientCheckpointing::{Off, On, Unsloth};
    let other = |word: GradientCheckpointing| {
        let plan = work.least_uniform_plan(word.policy(), &card);
        Other {
            use_gradient_checkpointing: word,
            peak_device: plan.memory.device(),
            host: plan.memory.host,
            ms_per_step: plan.milliseconds,
        }
    };
    let report = Report {
        others: [Off, On, Unsloth].map(other).into(),
        smallest_change: changes.as_ref().map(|changes| changes.smallest.clone()),
        change_with_auto: changes.and_then(|changes| changes.with_auto),
        longest: args.max_memory.map(|_| work.longest(checkpointing, budget, &card)),
        max_memory: args.max_memory.map(|size| size.0),
        max_host_memory: args.max_host_memory.map(|size| size.0),
        shape,
        card,
        plan,
        fits,
    };
    super::show(&report, args.json, |report| render(report, &args))?;
    if !fits {
        bail!("the run does not fit --max-memory and --max-host-memory");
    }
    Ok(())
}

/// What a GRPO run writes between two steps.
fn rollout(args: &PlanArgs) -> Result<Option<Rollout>> {
    let Some(prompt) = args.prompt else { return Ok(None) };
    let steps = args.steps_per_generation.unwrap_or(args.gradient_accumulation_steps);
    let sequences = args.per_device_train_batch_size * steps;
    if !sequences.is_multiple_of(args.num_generations) {
        bail!(Error::Usage(format!(
            "--num-generations {}: the {sequences} completions that are written at once must be whole groups: give a \
             --per-device-train-batch-size that is a multiple of it",
            args.num_generations
        )));
    }
    Ok(Some(Rollout::new(sequences as u64, args.num_generations as u64, prompt as u64, None)))
}

fn word(checkpointing: GradientCheckpointing) -> &'static str {
    match checkpointing {
        GradientCheckpointing::Off => "--use-gradient-checkpointing off",
        GradientCheckpointing::On => "--use-gradient-checkpointing on",
        GradientCheckpointing::Unsloth => "--use-gradient-checkpointing unsloth",
        GradientCheckpointing::Auto => "--use-gradient-checkpointing auto",
    }
}

fn milliseconds(ms: f64) -> String {
    format!("{} ms a step", count(ms.round() as u64))
}

fn render(report: &Report, args: &PlanArgs) -> String {
    let memory = &report.plan.memory;
    let at = match memory.at {
        Moment::Forward => "the forward pass",
        Moment::Loss => "the loss",
        Moment::Backward => "the backward pass of a layer",
        Moment::Embedding => "the embedding's gradient",
        Moment::Update => "the update",
    };
    let some = |size: u64| if size > 0 { bytes(size) } else { String::new() };
    let mut rows = vec![
        ("weights", bytes(memory.weights)),
        ("trained in f32", some(memory.trained)),
        ("LoRA", some(memory.lora)),
        ("gradients", bytes(memory.gradients)),
        ("optimizer", bytes(memory.optimizer)),
        ("kept", bytes(memory.kept)),
        ("workspace", format!("{}, of {at}", bytes(memory.workspace))),
        ("context", bytes(memory.context())),
        ("peak", format!("{} of the GPU, {} allocated", bytes(memory.device()), bytes(memory.allocated()))),
        ("at the host", bytes(memory.host)),
        ("rollout", rollout_line(memory).unwrap_or_default()),
        ("time", format!("{}, by the rates of {}", milliseconds(report.plan.milliseconds), report.card.name)),
    ];
    rows.retain(|(_, text)| !text.is_empty());
    rows.extend(report.plan.lines().into_iter().map(|(name, places)| ("keeps", format!("{name} {places}"))));
    let title = format!(
        "Plan: {}, {} x {} tokens{}, {} passes a step, {}, {}",
        report.shape,
        args.per_device_train_batch_size,
        count(args.sample() as u64),
        args.max_completion_length.map_or(String::new(), |length| format!(
            ", {} of them a completion, {} of each prompt",
            count(length as u64),
            args.num_generations
        )),
        args.gradient_accumulation_steps,
        what(args).join(", "),
        word(args.use_gradient_checkpointing)
    );
    let mut text = table(&title, &rows);
    let others: Vec<(&str, String)> = report
        .others
        .iter()
        .map(|other| {
            let at_host =
                if other.host > 0 { format!(", {} at the host", bytes(other.host)) } else { String::new() };
            let text = format!("{}{at_host}, {}", bytes(other.peak_device), milliseconds(other.ms_per_step));
            (word(other.use_gradient_checkpointing), text)
        })
        .collect();
    text.push_str(&table("\nWith one policy for all layers", &others));
    if let (Some(budget), Some(longest)) = (report.max_memory, report.longest) {
        text.push_str(&match longest {
            0 => format!("\nNo length fits {}\n", bytes(budget)),
            longest => format!("\nWithin {} fit up to {} tokens a sample\n", bytes(budget), count(longest)),
        });
    }
    if let Some(change) = &report.smallest_change {
        text.push_str(&format!("\nIt does not fit; the smallest change that does: {change}\n"));
    }
    if let Some(change) = &report.change_with_auto {
        text.push_str(&format!("or: {change}\n"));
    }
    text
}

/// What trains, on which weights.
fn what(args: &PlanArgs) -> Vec<String> {
    let MethodArgs { full_finetuning, r, lora_dropout, modules_to_save, dtype, deterministic, .. } =
        &args.method;
    let mut words = match full_finetuning {
        true => vec!["all weights".to_string()],
        false => vec![format!("r {r}")],
    };
    let mut add = |holds: bool, text: String| {
        if holds {
            words.push(text);
        }
    };
    add(!full_finetuning && *lora_dropout > 0.0, format!("dropout {lora_dropout}"));
    add(
        !full_finetuning && !modules_to_save.is_empty(),
        format!("trained {}", modules_to_save.join(" and ")),
    );
    add(*dtype == Dtype::F32, "f32".into());
    add(*deterministic, "deterministic".into());
    add(args.base_dtype == BaseDtype::Fp8, "fp8 weights".into());
    add(args.weights.load_in_4bit, "4-bit weights".into());
    add(args.weights.nf4_head, "4-bit head".into());
    add(args.weights.offload_embedding, "embedding in the host's memory".into());
    words
}
