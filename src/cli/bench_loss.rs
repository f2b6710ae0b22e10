//! `ferrotune bench loss`: what the loss part of GRPO and DPO takes beyond the hidden states.

use std::time::Instant;

use anyhow::Result;
use clap::Args;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::Serialize;
use tch::{Kind, Tensor};

use super::banner::table;
use super::format::{bytes, count};
use super::model_args::{MachineArgs, kind_of, name_of};
use crate::device;
use crate::ops::{self, Targets};
use crate::train::Dtype;

/// Measures log-probabilities and entropies of random words and the gradient of the hidden states, which is written over them.
#[derive(Debug, Args)]
pub struct BenchLossArgs {
    /// Rows, each with a word to predict
    #[arg(long, value_name = "N", default_value_t = 160_000)]
    pub tokens: usize,
    #[arg(long, value_name = "N", default_value_t = 4096)]
    pub hidden_size: usize,
    #[arg(long, value_name = "N", default_value_t = 128_256)]
    pub vocab_size: usize,
    #[arg(long, help = "Log-probabilities without entropies, as in DPO")]
    pub without_entropy: bool,
    #[arg(long, help = "Type of hidden states and head", value_enum, default_value_t = Dtype::Auto)]
    pub dtype: Dtype,
    #[command(flatten)]
    pub machine: MachineArgs,
    #[arg(long, help = "Print the report as JSON")]
    pub json: bool,
}

/// Sizes in bytes.
#[derive(Debug, Serialize)]
struct Report {
    device: String,
    dtype: &'static str,
    tokens: usize,
    hidden_size: usize,
    vocab_size: usize,
    hidden: u64,
    head: u64,
    /// Held at most beyond hidden states and head (CPU: by the resident set), and what all logits would be.
    beyond: u64,
    logits: u64,
    forward_seconds: f64,
    backward_seconds: f64,
}

pub fn run(args: &BenchLossArgs) -> Result<()> {
    let report = measure(args)?;
    super::show(&report, args.json, render)
}

fn measure(args: &BenchLossArgs) -> Result<Report> {
    for (flag, value) in
        [("--tokens", args.tokens), ("--hidden-size", args.hidden_size), ("--vocab-size", args.vocab_size)]
    {
        super::at_least(flag, value, 1)?;
    }
    let device = args.machine.init()?;
    let kind = kind_of(args.dtype, device, false);
    let (n, c, v) = (args.tokens as i64, args.hidden_size as i64, args.vocab_size as i64);
    tch::manual_seed(3407);
    let options = (kind, device);
    let weight = Tensor::f_zeros([v, c], options)?.f_normal_(0.0, 0.02)?;
    // The output of an op that keeps nothing of it, as a decoder's are: nobody else holds it.
    let shift = Tensor::f_zeros([0i64; 0], options)?.f_set_requires_grad(true)?;
    let hidden = Tensor::f_zeros([n, c], options)?.f_normal_(0.0, 1.0)?.f_add_(&shift)?;
    let mut random = ChaCha8Rng::seed_from_u64(3407);
    let labels: Vec<i64> = (0..n).map(|_| random.random_range(0..v)).collect();
    let targets = Targets::new(&labels, device)?;
    // A first small one: libraries' workspaces, and kernels that are chosen.
    pass(
        &hidden.f_narrow(0, 0, n.min(16))?.f_add_scalar(0.0)?,
        &weight,
        &Targets::new(&labels[..n.min(16) as usize], device)?,
        args,
    )?;
    device::synchronize(device)?;
    device::empty_cache(device)?;
    device::reset_peak_memory(device)?;
    let before = device::memory(device)?.allocated;

    let begun = Instant::now();
    let log_probs = forward(&hidden, &weight, &targets, args)?;
    device::synchronize(device)?;
    let forward_seconds = begun.elapsed().as_secs_f64();
    drop(hidden);
    log_probs.f_sum(log_probs.kind())?.f_backward()?;
    device::synchronize(device)?;
    let backward_seconds = begun.elapsed().as_secs_f64() - forward_seconds;
    let size =
        |rows: i64, columns: i64, kind: Kind| (rows * columns) as u64 * kind.elt_size_in_bytes() as u64;
    Ok(Report {
        device: device::describe(device),
        dtype: name_of(kind),
        tokens: args.tokens,
        hidden_size: args.hidden_size,
        vocab_size: args.vocab_size,
        hidden: size(n, c, kind),
        head: size(v, c, kind),
        beyond: device::memory(device)?.peak_allocated.saturating_sub(before),
        logits: size(n, v, Kind::Float),
        forward_seconds,
        backward_seconds,
    })
}

fn forward(hidden: &Tensor, weight: &Tensor, targets: &Targets, args: &BenchLossArgs) -> Result<Tensor> {
    if args.without_entropy {
        return ops::token_log_probs(hidden, weight, targets, 1.0, None);
    }
    Ok(ops::token_log_probs_and_entropy(hidden, weight, targets, 1.0, None)?.0)
}

fn pass(hidden: &Tensor, weight: &Tensor, targets: &Targets, args: &BenchLossArgs) -> Result<()> {
    let log_probs = forward(hidden, weight, targets, args)?;
    Ok(log_probs.f_sum(log_probs.kind())?.f_backward()?)
}

fn render(report: &Report) -> String {
    let rows = [
        ("machine", report.device.clone()),
        (
            "work",
            format!(
                "{} tokens, hidden size {}, {} words, {}",
                count(report.tokens as u64),
                report.hidden_size,
                count(report.vocab_size as u64),
                report.dtype
            ),
        ),
        (
            "memory",
            format!(
                "{} beyond hidden states ({}) and head ({}); all logits in f32 would be {}",
                bytes(report.beyond),
                bytes(report.hidden),
                bytes(report.head),
                bytes(report.logits)
            ),
        ),
        (
            "time",
            format!("{:.3} s forward, {:.3} s backward", report.forward_seconds, report.backward_seconds),
        ),
    ];
    table("ferrotune bench loss", &rows)
}
