//! `ferrotune bench`: how fast this machine trains a model of a given shape, and how fast it could.

use std::time::Instant;

use anyhow::Result;
use clap::{Args, Subcommand};
use indicatif::{ProgressBar, ProgressStyle};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::Serialize;
use tch::Device;

use super::banner::table;
use super::budget::{budget, plan_for, warn_without_gpu};
use super::cards;
use super::format::{bytes, percent, rate};
use super::method_args::MethodArgs;
use super::model_args::{MachineArgs, kind_of, name_of};
use super::progress::BARS;
use super::shapes::{RowsArgs, ShapeArgs, WeightsArgs};
use crate::data::Batch;
use crate::device;
use crate::models::Config;
use crate::nn::LoadOptions;
use crate::train::floor::{self, Floor};
use crate::train::kernel_times::KernelTimes;
use crate::train::plan::Plan;
use crate::train::{BaseDtype, GradientCheckpointing, Optim, RunPlan, Sft, Size, Stepper, TrainingArguments};

#[derive(Debug, Subcommand)]
pub enum BenchCommand {
    /// Steps of training on random weights and tokens: time, memory, where the time goes, and the floor beside it
    Train(BenchTrainArgs),
    /// The same steps under many budgets of memory, beside what was predicted of them
    Plan(super::bench_plan::BenchPlanArgs),
    /// Requests to the engine on random weights and prompts: tokens a second, time to the first token, where the time goes
    Generate(super::bench_generate::BenchGenerateArgs),
    /// Clients of a server that runs: tokens a second, time to the first token and between tokens
    Serve(super::bench_serve::BenchServeArgs),
    /// Steps of GRPO on random weights and prompts: time and memory of rollouts and training, beside what was predicted
    Grpo(Box<super::bench_grpo::BenchGrpoArgs>),
    /// Log-probabilities and their gradient, through the head alone: time, and memory beyond the hidden states
    Loss(super::bench_loss::BenchLossArgs),
}

/// Measures training, the step that `ferrotune train` runs.
#[derive(Debug, Args)]
pub struct BenchTrainArgs {
    #[command(flatten)]
    pub shape: ShapeArgs,
    #[command(flatten)]
    pub rows: RowsArgs,
    /// Lengths of the samples packed into each row, instead of one of --seq tokens
    #[arg(long, value_name = "N,N,..", value_delimiter = ',', conflicts_with = "seq")]
    pub packing: Vec<usize>,
    /// Forward passes in a step
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub gradient_accumulation_steps: usize,
    /// Steps that are timed
    #[arg(long, value_name = "N", default_value_t = 10)]
    pub steps: usize,
    /// Steps before them: kernels are chosen, workspaces made, repeating shapes recorded at the third
    #[arg(long, value_name = "N", default_value_t = 5)]
    pub warm_up: usize,
    /// Steps after them that say where the time goes
    #[arg(long, value_name = "N", default_value_t = 3)]
    pub profiled: usize,
    #[arg(long, help = "What is kept between forward and backward", value_enum, num_args = 0..=1, default_missing_value = "on", default_value_t = GradientCheckpointing::Off)]
    pub use_gradient_checkpointing: GradientCheckpointing,
    /// Of the GPU at most, all that nvidia-smi shows for the process [default: 92 % of what is free]
    #[arg(long, value_name = "SIZE")]
    pub max_memory: Option<Size>,
    /// Of the host at most, for activations that wait there [default: half of the available memory]
    #[arg(long, value_name = "SIZE")]
    pub max_host_memory: Option<Size>,
    #[arg(long, help = "Launch every kernel by itself, no CUDA graph: to compare with")]
    pub without_graphs: bool,
    #[command(flatten)]
    pub weights: WeightsArgs,
    #[command(flatten)]
    pub method: MethodArgs,
    /// Type of the frozen weights of the layers; fp8 is an experiment
    #[arg(long, value_enum, default_value_t = BaseDtype::Auto)]
    pub base_dtype: BaseDtype,
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
    base_dtype: BaseDtype,
    load_in_4bit: bool,
    offload_embedding: bool,
    nf4_head: bool,
    full_finetuning: bool,
    lora_dropout: f64,
    modules_to_save: Vec<String>,
    parameters: i64,
    batch: usize,
    sample_lengths: Vec<usize>,
    gradient_accumulation_steps: usize,
    use_gradient_checkpointing: GradientCheckpointing,
    deterministic: bool,
    optim: Optim,
    tokens_per_step: usize,
    /// Shapes that are launched as CUDA graphs.
    graphs: usize,
    /// Why others are not.
    not_recorded: Option<String>,
    steps: usize,
    seconds_to_first_step: f64,
    ms_per_step: f64,
    ms_per_step_min: f64,
    ms_per_step_max: f64,
    tokens_per_second: f64,
    /// The "60 steps of 2 x 4 x 2048" at this rate.
    minutes_per_60_steps_of_16384_tokens: f64,
    first_loss: f64,
    last_loss: f64,
    /// Held by tensors (CPU: resident set) before the first step, and at most since.
    model_memory: u64,
    peak_allocated: u64,
    /// Held by libtorch's allocator at most, graphs included.
    peak_reserved: u64,
    /// Of the device, CUDA's own memory included, at the end of the timed steps: in use by this process, where the driver
    /// tells, and by all of them.
    process_memory: Option<u64>,
    device_memory: u64,
    /// Of steps that are profiled and not timed; none on the CPU.
    gpu: Option<KernelTimes>,
    /// What was predicted, on a GPU.
    plan: Option<Plan>,
    floor: Floor,
    /// ms_per_step over the floor.
    over_floor: f64,
}

pub fn run(command: BenchCommand) -> Result<()> {
    let args = match command {
        BenchCommand::Train(args) => args,
        BenchCommand::Plan(args) => return super::bench_plan::run(args),
        BenchCommand::Generate(args) => return super::bench_generate::run(&args),
        BenchCommand::Serve(args) => return super::bench_serve::run(&args),
        BenchCommand::Grpo(args) => return super::bench_grpo::run(&args),
        BenchCommand::Loss(args) => return super::bench_loss::run(&args),
    };
    let report = measure(&args)?;
    super::show(&report, args.json, render)
}

fn measure(args: &BenchTrainArgs) -> Result<Report> {
    let start = Instant::now();
    let (name, config) = args.shape.config()?;
    let sample_lengths = if args.packing.is_empty() { vec![args.rows.seq] } else { args.packing.clone() };
    for (flag, value, least) in [
        ("--batch", args.rows.batch, 1),
        ("--steps", args.steps, 1),
        ("--warm-up", args.warm_up, 1),
        ("--gradient-accumulation-steps", args.gradient_accumulation_steps, 1),
        (
            if args.packing.is_empty() { "--seq" } else { "--packing" },
            sample_lengths.iter().copied().min().unwrap_or(0),
            2,
        ),
    ] {
        super::at_least(flag, value, least)?;
    }
    args.method.check()?;
    let device = args.machine.init()?;
    warn_without_gpu(device, args.max_memory, args.max_host_memory);
    let arguments = TrainingArguments {
        use_gradient_checkpointing: args.use_gradient_checkpointing,
        ..args.method.arguments()
    };
    let planned = plan(args, &config, device)?;
    let bar = ProgressBar::new((args.warm_up + args.steps + args.profiled) as u64)
        .with_style(ProgressStyle::with_template("{bar:20.cyan/blue} {pos}/{len} {wide_msg}")?);
    let bar = BARS.add(bar);
    bar.set_message("random weights");
    let kind = kind_of(args.method.dtype, device, config.overflows_f16());
    let base_fp8 = args.base_dtype == BaseDtype::Fp8;
    let options = LoadOptions { base_fp8, ..args.weights.options(kind, device) };
    let model = args.method.model(config, &name, options, &arguments)?;
    let decoder = &model.decoder;
    let model_memory = device::memory(device)?.allocated;

    let mut stepper = Stepper::new(&Sft, &arguments, decoder)?;
    if args.without_graphs {
        stepper = stepper.without_graphs();
    }
    if let Some((_, run)) = &planned {
        stepper = stepper.with_plan(run.clone());
    }
    let mut random = ChaCha8Rng::seed_from_u64(arguments.seed);
    let mut step = |number: usize| {
        let batches: Vec<Batch> = (0..args.gradient_accumulation_steps)
            .map(|_| random_batch(&mut random, args.rows.batch, &sample_lengths, decoder.config.vocab_size))
            .collect();
        stepper.run(decoder, &batches, number as u64, 1e-4)
    };
    bar.set_message("warm-up");
    let mut first_loss = f64::NAN;
    let mut seconds_to_first_step = f64::NAN;
    for number in 0..args.warm_up {
        let outcome = step(number)?;
        if number == 0 {
            (first_loss, seconds_to_first_step) = (outcome.loss, start.elapsed().as_secs_f64());
        }
        bar.inc(1);
    }
    bar.set_message("timed");
    let (mut times, mut last_loss) = (Vec::new(), f64::NAN);
    for number in 0..args.steps {
        let before = Instant::now();
        last_loss = step(args.warm_up + number)?.loss;
        times.push(before.elapsed().as_secs_f64() * 1e3);
        bar.inc(1);
    }
    let (memory, process_memory) = (device::memory(device)?, device::process_memory(device));
    bar.set_message("profiled");
    let gpu = if device.is_cuda() && args.profiled > 0 {
        let activities = device::profile(device, || {
            (0..args.profiled).try_for_each(|number| step(args.warm_up + args.steps + number).map(drop))
        })?;
        Some(KernelTimes::new(&activities, args.profiled))
    } else {
        None
    };
    let (graphs, not_recorded) = (stepper.graphs(), stepper.not_recorded().map(str::to_string));
    drop(stepper);
    if planned.is_some() {
        // What the floor is measured on is no part of the run.
        device::limit_memory(device, u64::MAX >> 8, u64::MAX, 0)?;
    }
    let batch = random_batch(&mut random, args.rows.batch, &sample_lengths, decoder.config.vocab_size);
    let work = floor::Work {
        config: &decoder.config,
        cu_seqlens: &batch.cu_seqlens,
        load_in_4bit: args.weights.load_in_4bit,
        trains_all: args.method.full_finetuning,
        kind,
        device,
    };
    let mut floor =
        floor::measure(&work, &mut |term| bar.set_message(format!("floor of this machine: {term}")))?;
    floor.scale(args.gradient_accumulation_steps);
    bar.finish_and_clear();

    times.sort_by(f64::total_cmp);
    let ms_per_step = times[times.len() / 2];
    let tokens_per_step = batch.tokens() * args.gradient_accumulation_steps;
    let tokens_per_second = tokens_per_step as f64 / ms_per_step * 1e3;
    Ok(Report {
        shape: name,
        device: device::describe(device),
        dtype: name_of(kind),
        base_dtype: args.base_dtype,
        load_in_4bit: args.weights.load_in_4bit,
        offload_embedding: args.weights.offload_embedding,
        nf4_head: args.weights.nf4_head,
        full_finetuning: args.method.full_finetuning,
        lora_dropout: args.method.lora_dropout,
        modules_to_save: args.method.modules_to_save.clone(),
        parameters: decoder.num_parameters(),
        batch: args.rows.batch,
        sample_lengths,
        gradient_accumulation_steps: args.gradient_accumulation_steps,
        use_gradient_checkpointing: args.use_gradient_checkpointing,
        deterministic: args.method.deterministic,
        optim: arguments.optim_for(decoder.is_quantized()),
        tokens_per_step,
        graphs,
        not_recorded,
        steps: args.steps,
        seconds_to_first_step,
        ms_per_step,
        ms_per_step_min: times[0],
        ms_per_step_max: times[times.len() - 1],
        tokens_per_second,
        minutes_per_60_steps_of_16384_tokens: 60.0 * 16384.0 / tokens_per_second / 60.0,
        first_loss,
        last_loss,
        model_memory,
        peak_allocated: memory.peak_allocated,
        peak_reserved: memory.peak_reserved,
        process_memory,
        device_memory: memory.total - memory.free,
        gpu,
        over_floor: ms_per_step / floor.ms,
        plan: planned.map(|(plan, _)| plan),
        floor,
    })
}

/// The plan of these steps on a GPU.
fn plan(args: &BenchTrainArgs, config: &Config, device: Device) -> Result<Option<(Plan, RunPlan)>> {
    if !device.is_cuda() {
        return Ok(None);
    }
    let (tokens, sample) = match args.packing.iter().max() {
        Some(longest) => (args.rows.batch * args.packing.iter().sum::<usize>(), *longest),
        None => (args.rows.batch * args.rows.seq, args.rows.seq),
    };
    let card = cards::of_gpu(device)?;
    let kind = kind_of(args.method.dtype, device, config.overflows_f16());
    let mut work = args.method.work(config, (1, sample), &args.weights, kind, &card)?;
    if args.base_dtype == BaseDtype::Fp8 {
        work = work.in_fp8()?;
    }
    work.tokens = tokens as u64;
    work.gradient_accumulation_steps = args.gradient_accumulation_steps as u64;
    let budget = budget(args.max_memory, args.max_host_memory, device)?;
    plan_for(&work, args.use_gradient_checkpointing, budget, (device, &card)).map(Some)
}

/// Rows of samples of `lengths` with random tokens, every one of them a target.
pub(super) fn random_batch(
    random: &mut ChaCha8Rng,
    rows: usize,
    lengths: &[usize],
    vocab_size: i64,
) -> Batch {
    let samples: Vec<Vec<i64>> = (0..rows)
        .flat_map(|_| lengths)
        .map(|&length| (0..length).map(|_| random.random_range(0..vocab_size)).collect())
        .collect();
    Batch::from_samples(samples.iter().map(|sample| (&sample[..], &sample[..])))
}

fn render(report: &Report) -> String {
    let ms = |value: f64| format!("{value:.1} ms");
    let mut lines = vec![
        ("machine", report.device.clone()),
        (
            "work",
            format!(
                "{} x {:?} tokens, {} passes a step, {}, {}{}{}{}{}{}{}",
                report.batch,
                report.sample_lengths,
                report.gradient_accumulation_steps,
                report.optim,
                report.dtype,
                if report.base_dtype == BaseDtype::Fp8 { ", fp8 weights" } else { "" },
                if report.load_in_4bit { ", 4-bit weights" } else { "" },
                if report.nf4_head { ", 4-bit head" } else { "" },
                if report.offload_embedding { ", embedding in the host's memory" } else { "" },
                match report.use_gradient_checkpointing {
                    GradientCheckpointing::Off => "",
                    GradientCheckpointing::On => ", gradient checkpointing",
                    GradientCheckpointing::Unsloth => ", gradient checkpointing in the host's memory",
                    GradientCheckpointing::Auto => ", planned",
                },
                if report.deterministic { ", deterministic" } else { "" }
            ),
        ),
        (
            "step",
            format!(
                "{} ({} to {}), {} tokens/s",
                ms(report.ms_per_step),
                ms(report.ms_per_step_min),
                ms(report.ms_per_step_max),
                rate(report.tokens_per_second)
            ),
        ),
        (
            "memory",
            format!(
                "{} peak allocated, {} of them the model; {} of the device",
                bytes(report.peak_allocated),
                bytes(report.model_memory),
                bytes(report.process_memory.unwrap_or(report.device_memory))
            ),
        ),
    ];
    if let Some(plan) = &report.plan {
        lines.push((
            "plan",
            format!(
                "{} allocated, {} of the device and {:.0} ms predicted; {} at the host",
                bytes(plan.memory.allocated()),
                bytes(plan.memory.device()),
                plan.milliseconds,
                bytes(plan.memory.host)
            ),
        ));
    }
    if let Some(gpu) = &report.gpu {
        lines.push((
            "GPU idle",
            format!(
                "{}, of them {} waiting for the host; {:.0} launches a step",
                percent(gpu.idle_share),
                percent(gpu.waiting_share),
                gpu.launches
            ),
        ));
        for kind in &gpu.kinds {
            lines.push(("", format!("{:26} {:>9}  {:6.0} calls", kind.name, ms(kind.ms), kind.calls)));
        }
    }
    lines.push(("floor", format!("{}; the step takes {:.2} of it", ms(report.floor.ms), report.over_floor)));
    for term in &report.floor.terms {
        lines.push(("", format!("{:30} {:>9}  {:4} x {}", term.name, ms(term.ms), term.calls, term.shape)));
    }
    table(&format!("ferrotune bench train: {}", report.shape), &lines)
}
