//! `ferrotune plan`: the memory of a run before it starts, and what would make it fit.

use anyhow::{Result, bail};
use clap::Args;
use serde::Serialize;

use super::banner::table;
use super::format::{bytes, count};
use super::shapes::ShapeArgs;
use crate::error::Error;
use crate::train::plan::{Memory, Work};
use crate::train::{GradientCheckpointing, Optim};

/// Predicts the memory of LoRA training on a GPU in bf16, every linear layer tuned; needs no GPU.
#[derive(Debug, Args)]
pub struct PlanArgs {
    #[command(flatten)]
    pub shape: ShapeArgs,
    /// Samples of a forward pass
    #[arg(long, value_name = "N", default_value_t = 2)]
    pub per_device_train_batch_size: usize,
    /// Tokens of a sample
    #[arg(long, value_name = "N", default_value_t = 2048)]
    pub max_seq_length: usize,
    #[arg(long, help = "LoRA rank", default_value_t = 16)]
    pub r: u32,
    #[arg(long, help = "Quantise the weights of the layers to NF4")]
    pub load_in_4bit: bool,
    #[arg(long, help = "What is kept between forward and backward", value_enum, num_args = 0..=1, default_missing_value = "on", default_value_t = GradientCheckpointing::Off)]
    pub use_gradient_checkpointing: GradientCheckpointing,
    #[arg(long, help = "Optimizer [default: adamw_8bit with 4-bit weights, else adamw_torch]", value_enum)]
    pub optim: Option<Optim>,
    /// Of the GPU, for this process: 8GiB, 24GB, 500MiB
    #[arg(long, value_name = "SIZE", value_parser = super::format::parse_bytes)]
    pub max_memory: Option<u64>,
    #[arg(long, help = "Print the plan as JSON")]
    pub json: bool,
}

/// Sizes in bytes.
#[derive(Debug, Serialize)]
struct Plan {
    shape: String,
    memory: Memory,
    peak_allocated: u64,
    peak_device: u64,
    max_memory: Option<u64>,
    fits: Option<bool>,
    others: Vec<Other>,
}

/// The same work with other flags.
#[derive(Debug, Serialize)]
struct Other {
    load_in_4bit: bool,
    use_gradient_checkpointing: GradientCheckpointing,
    peak_device: u64,
    /// The longest samples of this batch size that fit max_memory.
    longest: Option<usize>,
}

pub fn run(args: PlanArgs) -> Result<()> {
    for (flag, value) in [
        ("--per-device-train-batch-size", args.per_device_train_batch_size),
        ("--max-seq-length", args.max_seq_length),
        ("--r", args.r as usize),
    ] {
        if value == 0 {
            bail!(Error::Usage(format!("{flag}: 0, expected at least 1")));
        }
    }
    let (shape, config) = args.shape.config()?;
    let work = |load_in_4bit, use_gradient_checkpointing| Work {
        config: &config,
        rows: args.per_device_train_batch_size,
        length: args.max_seq_length,
        r: args.r,
        load_in_4bit,
        optim: args.optim.unwrap_or(if load_in_4bit { Optim::Adamw8bit } else { Optim::AdamwTorch }),
        use_gradient_checkpointing,
    };
    let memory = work(args.load_in_4bit, args.use_gradient_checkpointing).memory();
    // From the least change to the largest: recomputation costs time, the host's memory and the bus a little more, 4 bits
    // change the weights.
    let all = [false, true].into_iter().flat_map(|load_in_4bit| {
        use GradientCheckpointing::{Off, On, Unsloth};
        [Off, On, Unsloth].map(|checkpointing| (load_in_4bit, checkpointing))
    });
    let others = all
        .map(|(load_in_4bit, use_gradient_checkpointing)| {
            let work = work(load_in_4bit, use_gradient_checkpointing);
            Other {
                load_in_4bit,
                use_gradient_checkpointing,
                peak_device: work.memory().device(),
                longest: args.max_memory.map(|budget| work.longest(budget)),
            }
        })
        .collect();
    let plan = Plan {
        shape,
        memory,
        peak_allocated: memory.allocated(),
        peak_device: memory.device(),
        max_memory: args.max_memory,
        fits: args.max_memory.map(|budget| memory.device() <= budget),
        others,
    };
    if args.json {
        println!("{}", serde_json::to_string_pretty(&plan)?);
    } else {
        print!("{}", render(&plan, &args));
    }
    match plan.fits {
        Some(false) => bail!("the run does not fit --max-memory"),
        _ => Ok(()),
    }
}

fn flags(other: &Other) -> String {
    let word = match other.use_gradient_checkpointing {
        GradientCheckpointing::Off => "off",
        GradientCheckpointing::On => "on",
        GradientCheckpointing::Unsloth => "unsloth",
    };
    let quantised = if other.load_in_4bit { " --load-in-4bit" } else { "" };
    format!("--use-gradient-checkpointing {word}{quantised}")
}

fn render(plan: &Plan, args: &PlanArgs) -> String {
    let memory = &plan.memory;
    let larger = |ours: u64, other: u64| if ours >= other { "" } else { ", not at the same time" };
    let rows = [
        ("weights", bytes(memory.weights)),
        ("LoRA", bytes(memory.lora)),
        ("gradients", bytes(memory.gradients)),
        ("optimizer", bytes(memory.optimizer)),
        ("kept", bytes(memory.kept)),
        ("workspace", format!("{}{}", bytes(memory.workspace), larger(memory.workspace, memory.loss))),
        ("loss", format!("{}{}", bytes(memory.loss), larger(memory.loss, memory.workspace))),
        ("context", bytes(memory.context())),
        ("peak", format!("{} of the GPU, {} allocated", bytes(plan.peak_device), bytes(plan.peak_allocated))),
    ];
    let title = format!(
        "Plan: {}, {} x {} tokens, r {}",
        plan.shape,
        args.per_device_train_batch_size,
        count(args.max_seq_length as u64),
        args.r
    );
    let mut text = table(&title, &rows);
    let others: Vec<(String, String)> = plan
        .others
        .iter()
        .map(|other| {
            let longest = match other.longest {
                Some(0) => ", no length fits".to_string(),
                Some(longest) => format!(", up to {} tokens a sample", count(longest as u64)),
                None => String::new(),
            };
            (flags(other), format!("{}{longest}", bytes(other.peak_device)))
        })
        .collect();
    let rows: Vec<(&str, String)> = others.iter().map(|(flags, text)| (&flags[..], text.clone())).collect();
    text.push_str(&table("\nWith other flags", &rows));
    if let (Some(budget), Some(false)) = (plan.max_memory, plan.fits) {
        // In the order of the list, from what is given on.
        let given = |other: &&Other| !args.load_in_4bit || other.load_in_4bit;
        let fitting = plan.others.iter().filter(given).find(|other| other.peak_device <= budget);
        text.push_str(&match fitting {
            Some(other) => {
                format!("\nIt does not fit {}; the smallest change that does: {}\n", bytes(budget), flags(other))
            }
            None => format!(
                "\nIt does not fit {}, and no flag changes that: take shorter samples, fewer of them, or a smaller model\n",
                bytes(budget)
            ),
        });
    }
    text
}
