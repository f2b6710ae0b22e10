//! `ferrotune bench grpo`: time and memory of GRPO on a model of a given shape, beside what was predicted.

use std::time::Instant;

use anyhow::{Result, bail};
use clap::Args;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::Serialize;
use serde_json::{Map, Value};
use tch::{Device, Kind};

use super::banner::table;
use super::budget::{budget, plan_for, warn_without_gpu};
use super::cards;
use super::format::{bytes, rate};
use super::method_args::MethodArgs;
use super::model_args::{MachineArgs, kind_of, name_of};
use super::shapes::{ShapeArgs, WeightsArgs};
use crate::device;
use crate::error::Error;
use crate::models::Config;
use crate::rewards::{Reward, Rewards, Sample};
use crate::train::grpo::{Grpo, GrpoArguments, Prompt, Prompts, Rollouts};
use crate::train::plan::{Plan, Rollout, RolloutMemory};
use crate::train::{
    GradientCheckpointing, Objective, RunPlan, Size, StepSource, Stepper, TrainingArguments, memory,
};

/// Measures GRPO: completions of one length (no stop token), a reward that costs nothing.
#[derive(Debug, Args)]
pub struct BenchGrpoArgs {
    #[command(flatten)]
    pub shape: ShapeArgs,
    /// Completions of each prompt
    #[arg(long, value_name = "N", default_value_t = 8)]
    pub num_generations: usize,
    /// Completions in one forward pass [default: num_generations]
    #[arg(long, value_name = "N")]
    pub per_device_train_batch_size: Option<usize>,
    /// Forward passes in a step, whose completions are written at once
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub gradient_accumulation_steps: usize,
    /// Tokens of each prompt
    #[arg(long, value_name = "N", default_value_t = 128)]
    pub prompt: usize,
    /// Tokens of each completion
    #[arg(long, value_name = "N", default_value_t = 256)]
    pub completion: usize,
    #[arg(
        long,
        help = "Factor of the divergence from the model without LoRA; 0 needs no reference",
        default_value_t = 0.0
    )]
    pub beta: f64,
    /// Steps that are timed
    #[arg(long, value_name = "N", default_value_t = 10)]
    pub steps: usize,
    /// Steps before them, the first of which is timed by itself
    #[arg(long, value_name = "N", default_value_t = 4)]
    pub warm_up: usize,
    #[arg(long, help = "What is kept between forward and backward", value_enum, num_args = 0..=1, default_missing_value = "on", default_value_t = GradientCheckpointing::Auto)]
    pub use_gradient_checkpointing: GradientCheckpointing,
    /// Of the GPU at most, all that nvidia-smi shows for the process [default: 92 % of what is free]
    #[arg(long, value_name = "SIZE")]
    pub max_memory: Option<Size>,
    /// Of the host at most, for activations that wait there [default: half of the available memory]
    #[arg(long, value_name = "SIZE")]
    pub max_host_memory: Option<Size>,
    #[command(flatten)]
    pub weights: WeightsArgs,
    #[command(flatten)]
    pub method: MethodArgs,
    #[command(flatten)]
    pub machine: MachineArgs,
    #[arg(long, help = "Print the report as JSON")]
    pub json: bool,
}

/// Sizes in bytes.
#[derive(Debug, Serialize)]
struct Report {
    shape: String,
    device: String,
    dtype: &'static str,
    load_in_4bit: bool,
    num_generations: usize,
    completions_per_step: usize,
    prompt_tokens: usize,
    completion_tokens: usize,
    steps: usize,
    /// From the start of the process to the end of the first step, and that step alone.
    seconds_to_first_step: f64,
    first_step_seconds: f64,
    /// Medians: of steps, of their rollouts (judging included) and of what follows.
    seconds_per_step: f64,
    rollout_seconds: f64,
    training_seconds: f64,
    /// New tokens of a rollout over its time, and all tokens of a step over that of its training.
    rollout_tokens_per_second: f64,
    training_tokens_per_second: f64,
    /// The largest in any step.
    sampling_logp_difference: f64,
    /// Micro-batch shapes that are launched as CUDA graphs.
    graphs: usize,
    model_memory: u64,
    /// Held by tensors at most (CPU: resident set).
    peak_allocated: u64,
    predicted_allocated: Option<u64>,
    /// Held by the process on a GPU at most, CUDA's own memory included.
    peak_process_memory: Option<u64>,
    predicted_process_memory: Option<u64>,
    rollout: Option<RolloutMemory>,
    plan: Option<Plan>,
}

/// The share of even token ids: of random completions never the same twice.
struct EvenIds;

impl Reward for EvenIds {
    fn name(&self) -> &str {
        "even_ids"
    }

    fn score(&mut self, samples: &[Sample]) -> Vec<Result<Option<f64>>> {
        let share =
            |ids: &[i64]| ids.iter().filter(|id| *id % 2 == 0).count() as f64 / ids.len().max(1) as f64;
        samples.iter().map(|sample| Ok(Some(share(sample.completion_ids)))).collect()
    }
}

pub fn run(args: &BenchGrpoArgs) -> Result<()> {
    let report = measure(args)?;
    super::show(&report, args.json, render)
}

fn measure(args: &BenchGrpoArgs) -> Result<Report> {
    let start = Instant::now();
    let (name, config) = args.shape.config()?;
    let arguments = arguments(args, &config)?;
    let training = &arguments.training;
    let device = args.machine.init()?;
    warn_without_gpu(device, args.max_memory, args.max_host_memory);
    let kind = kind_of(args.method.dtype, device, config.overflows_f16());
    let planned = plan(args, &arguments, &config, (device, kind))?;
    let model = args.method.model(config, &name, args.weights.options(kind, device), training)?;
    let model_memory = device::memory(device)?.allocated;

    let rollout = planned.as_ref().and_then(|(plan, _)| plan.memory.rollout);
    let kv = rollout.map_or(u64::MAX, |rollout| rollout.kv_cache);
    let rewards = Rewards::new(vec![(Box::new(EvenIds), 1.0)]);
    let prompts = prompts(args, &arguments, model.decoder.config.vocab_size);
    let mut source = Rollouts::new(&arguments, prompts, rewards, Vec::new(), kv)?;
    if rollout.is_some_and(|rollout| rollout.stays) {
        source = source.keeping_its_engine();
    }
    let objective = Grpo::new(&arguments);
    let mut stepper = Stepper::new(&objective, training, &model.decoder)?;
    if let Some((_, run)) = &planned {
        stepper = stepper.with_plan(run.clone());
    }
    let mut times: Vec<[f64; 2]> = Vec::new();
    let (mut seconds_to_first_step, mut sampling_logp_difference) = (0.0, 0.0f64);
    for step in 0..args.warm_up + args.steps {
        let began = Instant::now();
        if source.needs_device() {
            stepper.give_way(&model.decoder)?;
        }
        let batches = source.next_step(&model, training.gradient_accumulation_steps as u64)?;
        let written = began.elapsed().as_secs_f64();
        stepper.run(&model.decoder, &batches, step as u64, 1e-5)?;
        let measured = objective.measured()?;
        times.push([written, began.elapsed().as_secs_f64() - written]);
        if step == 0 {
            seconds_to_first_step = start.elapsed().as_secs_f64();
        }
        let differences = measured.iter().filter(|one| one.name == "sampling/sampling_logp_difference/max");
        sampling_logp_difference = differences.map(|one| one.sum).fold(sampling_logp_difference, f64::max);
    }
    let first_step_seconds: f64 = times[0].iter().sum();
    let timed = &times[args.warm_up..];
    let median = |of: &dyn Fn(&[f64; 2]) -> f64| {
        let mut values: Vec<f64> = timed.iter().map(of).collect();
        values.sort_by(f64::total_cmp);
        values[values.len() / 2]
    };
    let (rollout_seconds, training_seconds) = (median(&|time| time[0]), median(&|time| time[1]));
    let completions = arguments.generation_batch_size();
    Ok(Report {
        shape: name,
        device: device::describe(device),
        dtype: name_of(kind),
        load_in_4bit: args.weights.load_in_4bit,
        num_generations: args.num_generations,
        completions_per_step: completions,
        prompt_tokens: args.prompt,
        completion_tokens: args.completion,
        steps: args.steps,
        seconds_to_first_step,
        first_step_seconds,
        seconds_per_step: median(&|time| time[0] + time[1]),
        rollout_seconds,
        training_seconds,
        rollout_tokens_per_second: (completions * args.completion) as f64 / rollout_seconds,
        training_tokens_per_second: (completions * (args.prompt + args.completion)) as f64 / training_seconds,
        sampling_logp_difference,
        graphs: stepper.graphs(),
        model_memory,
        peak_allocated: device::memory(device)?.peak_allocated,
        predicted_allocated: planned.as_ref().map(|(plan, _)| plan.memory.allocated()),
        peak_process_memory: memory::process_peak(device),
        predicted_process_memory: planned.as_ref().map(|(plan, _)| plan.memory.device()),
        rollout,
        plan: planned.map(|(plan, _)| plan),
    })
}

fn arguments(args: &BenchGrpoArgs, config: &Config) -> Result<GrpoArguments> {
    args.method.check()?;
    let rows = args.per_device_train_batch_size.unwrap_or(args.num_generations);
    let context = config.max_position_embeddings.max(0) as usize;
    for (flag, value, least) in [
        ("--num-generations", args.num_generations, 2),
        ("--per-device-train-batch-size", rows, 1),
        ("--gradient-accumulation-steps", args.gradient_accumulation_steps, 1),
        ("--prompt", args.prompt, 1),
        ("--completion", args.completion, 1),
        ("--steps", args.steps, 1),
        ("--warm-up", args.warm_up, 1),
    ] {
        super::at_least(flag, value, least)?;
    }
    if args.prompt + args.completion > context {
        bail!(Error::Usage(format!("--prompt and --completion: the model's context is {context} tokens")));
    }
    let arguments = GrpoArguments {
        training: TrainingArguments {
            per_device_train_batch_size: rows,
            gradient_accumulation_steps: args.gradient_accumulation_steps,
            use_gradient_checkpointing: args.use_gradient_checkpointing,
            ..args.method.arguments()
        },
        num_generations: args.num_generations,
        max_completion_length: args.completion,
        beta: args.beta,
        ..GrpoArguments::default()
    };
    let completions = arguments.generation_batch_size();
    if !completions.is_multiple_of(args.num_generations) {
        bail!(Error::Usage(format!(
            "--num-generations {}: the {completions} completions of a step must be whole groups",
            args.num_generations
        )));
    }
    Ok(arguments)
}

/// Random ones, enough for all steps.
fn prompts(args: &BenchGrpoArgs, arguments: &GrpoArguments, vocab_size: i64) -> Prompts {
    let mut random = ChaCha8Rng::seed_from_u64(arguments.training.seed);
    let count = (args.warm_up + args.steps) * arguments.generation_batch_size() / args.num_generations;
    let prompt = |_| Prompt {
        value: Value::String(String::new()),
        text: String::new(),
        ids: (0..args.prompt).map(|_| random.random_range(0..vocab_size)).collect(),
        columns: Map::new(),
    };
    Prompts { rows: (0..count).map(prompt).collect(), left_out: 0 }
}

fn plan(
    args: &BenchGrpoArgs,
    arguments: &GrpoArguments,
    config: &Config,
    (device, kind): (Device, Kind),
) -> Result<Option<(Plan, RunPlan)>> {
    if !device.is_cuda() {
        return Ok(None);
    }
    let card = cards::of_gpu(device)?;
    let batch = (arguments.training.per_device_train_batch_size, args.prompt + args.completion);
    let rollout = Rollout::new(
        arguments.generation_batch_size() as u64,
        args.num_generations as u64,
        args.prompt as u64,
        None,
    );
    let mut work = args.method.work(config, batch, &args.weights, kind, &card)?.with_rollout(rollout);
    work.gradient_accumulation_steps = args.gradient_accumulation_steps as u64;
    let budget = budget(args.max_memory, args.max_host_memory, device)?;
    plan_for(&work, args.use_gradient_checkpointing, budget, (device, &card)).map(Some)
}

fn render(report: &Report) -> String {
    let beside = |predicted: Option<u64>| {
        predicted.map_or(String::new(), |predicted| format!(" ({} predicted)", bytes(predicted)))
    };
    let mut rows = vec![
        ("machine", report.device.clone()),
        (
            "work",
            format!(
                "{} completions of {} + {} tokens a step, {} of each prompt, {}{}",
                report.completions_per_step,
                report.prompt_tokens,
                report.completion_tokens,
                report.num_generations,
                report.dtype,
                if report.load_in_4bit { ", 4-bit weights" } else { "" }
            ),
        ),
        (
            "step",
            format!(
                "{:.3} s: {:.3} s rollout, {:.3} s training",
                report.seconds_per_step, report.rollout_seconds, report.training_seconds
            ),
        ),
        (
            "first step",
            format!(
                "{:.2} s; it ended {:.2} s after the start",
                report.first_step_seconds, report.seconds_to_first_step
            ),
        ),
        (
            "speed",
            format!(
                "{} tokens/s of rollout, {} tokens/s of training",
                rate(report.rollout_tokens_per_second),
                rate(report.training_tokens_per_second)
            ),
        ),
        (
            "memory",
            format!(
                "{} peak allocated{}, {} of them the model",
                bytes(report.peak_allocated),
                beside(report.predicted_allocated),
                bytes(report.model_memory)
            ),
        ),
    ];
    if let Some(process) = report.peak_process_memory {
        let text = format!("{} of the device{}", bytes(process), beside(report.predicted_process_memory));
        rows.push(("", text));
    }
    if let Some(line) = report.plan.as_ref().and_then(|plan| super::budget::rollout_line(&plan.memory)) {
        rows.push(("rollout", line));
    }
    rows.push((
        "sampler",
        format!("differs from the trainer by {:.2e} at most", report.sampling_logp_difference),
    ));
    table(&format!("ferrotune bench grpo: {}", report.shape), &rows)
}
