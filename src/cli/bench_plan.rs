//! `ferrotune bench plan`: whether plans keep their word. Steps of one model under many budgets, in one process: what was
//! predicted of each and what was measured.

use std::time::Instant;

use anyhow::{Result, bail};
use clap::Args;
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use serde::Serialize;

use super::bench::random_batch;
use super::budget::budget;
use super::cards;
use super::format::bytes;
use super::method_args::MethodArgs;
use super::model_args::{MachineArgs, kind_of};
use super::shapes::{RowsArgs, ShapeArgs, WeightsArgs};
use crate::device;
use crate::nn::LoadOptions;
use crate::train::plan::{Budget, Memory};
use crate::train::{BaseDtype, Sft, Size, Stepper};

/// Training under budgets from the least to what everything needs.
#[derive(Debug, Args)]
pub struct BenchPlanArgs {
    #[command(flatten)]
    pub shape: ShapeArgs,
    #[command(flatten)]
    pub rows: RowsArgs,
    #[command(flatten)]
    pub weights: WeightsArgs,
    #[command(flatten)]
    pub method: MethodArgs,
    /// Type of the frozen weights of the layers; fp8 is an experiment
    #[arg(long, value_enum, default_value_t = BaseDtype::Auto)]
    pub base_dtype: BaseDtype,
    /// Budgets, at equal distances
    #[arg(long, value_name = "N", default_value_t = 20)]
    pub budgets: usize,
    /// Steps that are timed under each
    #[arg(long, value_name = "N", default_value_t = 5)]
    pub steps: usize,
    /// Of the host at most [default: half of the available memory]
    #[arg(long, value_name = "SIZE")]
    pub max_host_memory: Option<Size>,
    #[command(flatten)]
    pub machine: MachineArgs,
    #[arg(long, help = "Print the report as JSON")]
    pub json: bool,
}

/// Sizes in bytes.
#[derive(Debug, Serialize)]
struct Row {
    max_memory: u64,
    predicted_device: u64,
    /// What libtorch's allocator held at most, and what the process took of the GPU beside that.
    measured_device: u64,
    /// Of it, what is not libtorch's allocator's.
    measured_context: u64,
    predicted_allocated: u64,
    measured_allocated: u64,
    predicted_host: u64,
    predicted_ms: f64,
    /// Median.
    measured_ms: f64,
}

/// Steps before the timed ones: two at once, one recorded, one more.
const WARM_UP: usize = 4;

pub fn run(args: BenchPlanArgs) -> Result<()> {
    super::at_least("--budgets", args.budgets, 2)?;
    super::at_least("--steps", args.steps, 1)?;
    args.method.check()?;
    let device = args.machine.init()?;
    if !device.is_cuda() {
        bail!("only a GPU's memory is planned");
    }
    let (name, config) = args.shape.config()?;
    let card = cards::of_gpu(device)?;
    let kind = kind_of(args.method.dtype, device, config.overflows_f16());
    let batch = (args.rows.batch, args.rows.seq);
    let mut work = args.method.work(&config, batch, &args.weights, kind, &card)?;
    let base_fp8 = args.base_dtype == BaseDtype::Fp8;
    if base_fp8 {
        work = work.in_fp8()?;
    }
    let arguments = args.method.arguments();
    let most = budget(None, args.max_host_memory, device)?;
    device::limit_memory(device, Memory::allocator_limit(most.device), most.host, work.tokens)?;
    let options = LoadOptions { base_fp8, ..args.weights.options(kind, device) };
    let model = args.method.model(config, &name, options, &arguments)?;
    let decoder = &model.decoder;
    let mut random = ChaCha8Rng::seed_from_u64(arguments.seed);
    let batch = random_batch(&mut random, args.rows.batch, &[args.rows.seq], decoder.config.vocab_size);

    let least = work.smallest(&card, most.host).memory.device();
    let everything = work.fastest(&card, Budget { device: u64::MAX, ..most });
    let top = everything.map_or(most.device, |plan| plan.memory.device()).min(most.device);
    let mut rows = Vec::new();
    for index in 0..args.budgets {
        let share = index as f64 / (args.budgets - 1) as f64;
        let budget = Budget { device: least + (top.saturating_sub(least) as f64 * share) as u64, ..most };
        let Some(plan) = work.fastest(&card, budget) else {
            bail!("nothing fits {} of the GPU", bytes(budget.device));
        };
        device::limit_memory(device, Memory::allocator_limit(budget.device), budget.host, work.tokens)?;
        device::empty_cache(device)?;
        device::reset_peak_memory(device)?;
        let mut stepper = Stepper::new(&Sft, &arguments, decoder)?.with_plan(plan.run(budget));
        let mut times = Vec::new();
        for step in 0..WARM_UP + args.steps {
            let before = Instant::now();
            stepper.run(decoder, std::slice::from_ref(&batch), step as u64, 1e-5)?;
            times.push(before.elapsed().as_secs_f64() * 1e3);
        }
        times.drain(..WARM_UP);
        times.sort_by(f64::total_cmp);
        let memory = device::memory(device)?;
        let process = device::process_memory(device).unwrap_or(memory.total - memory.free);
        let row = Row {
            max_memory: budget.device,
            predicted_device: plan.memory.device(),
            measured_device: process - memory.reserved + memory.peak_reserved,
            measured_context: process - memory.reserved,
            predicted_allocated: plan.memory.allocated(),
            measured_allocated: memory.peak_allocated,
            predicted_host: plan.memory.host,
            predicted_ms: plan.milliseconds,
            measured_ms: times[times.len() / 2],
        };
        if !args.json {
            print(&row);
        }
        rows.push(row);
    }
    if args.json {
        println!("{}", serde_json::to_string_pretty(&rows)?);
    }
    Ok(())
}

fn print(row: &Row) {
    println!(
        "{:>10} | of the GPU {:>10} predicted, {:>10} measured ({} CUDA) | allocated {:>10}, {:>10} | host {:>9} | {:7.1} ms, {:7.1} ms",
        bytes(row.max_memory),
        bytes(row.predicted_device),
        bytes(row.measured_device),
        bytes(row.measured_context),
        bytes(row.predicted_allocated),
        bytes(row.measured_allocated),
        bytes(row.predicted_host),
        row.predicted_ms,
        row.measured_ms
    );
}
