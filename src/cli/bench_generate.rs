//! `ferrotune bench generate`: how fast this machine generates with a model of a given shape.

use std::time::Instant;

use anyhow::Result;
use clap::Args;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::Serialize;

use super::banner::table;
use super::engine_args::batched_tokens;
use super::format::{bytes, percent, rate};
use super::model_args::{MachineArgs, kind_of, name_of};
use super::shapes::{ShapeArgs, WeightsArgs};
use crate::device;
use crate::generate::{Engine, EngineOptions, EventKind, KvBudget, Request, SamplingParams};
use crate::io::adapter::InitLoraWeights;
use crate::models::FastLanguageModel;
use crate::nn::PAGE_SIZE;
use crate::train::kernel_times::KernelTimes;
use crate::train::{Dtype, TrainingArguments};

/// Measures generation: LoRA on every linear layer, unmerged, the engine that `ferrotune generate` and `serve` run.
#[derive(Debug, Args)]
pub struct BenchGenerateArgs {
    #[command(flatten)]
    pub shape: ShapeArgs,
    /// Sequences that are decoded at once
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub batch: usize,
    /// Requests in all; more than --batch wait for a place [default: --batch]
    #[arg(long, value_name = "N")]
    pub requests: Option<usize>,
    /// Tokens of one pass, those of prompts and those that are decoded beside them [default: 8192 on a GPU with 32 GiB free, else 2048]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub max_num_batched_tokens: Option<u32>,
    /// Tokens of each prompt
    #[arg(long, value_name = "N", default_value_t = 128)]
    pub prompt: usize,
    /// Tokens of each answer
    #[arg(long, value_name = "N", default_value_t = 256)]
    pub new: usize,
    #[arg(long, help = "Sampling temperature; 0 takes the likeliest token", default_value_t = 1.0)]
    pub temperature: f64,
    #[arg(
        long,
        help = "Keep the likeliest tokens that together reach this probability",
        default_value_t = 1.0
    )]
    pub top_p: f64,
    #[command(flatten)]
    pub weights: WeightsArgs,
    #[arg(long, help = "LoRA rank; 0 for none", default_value_t = 16)]
    pub r: u32,
    #[arg(long, help = "Type of weights and activations", value_enum, default_value_t = Dtype::Auto)]
    pub dtype: Dtype,
    /// Steps of decoding after the timed requests that say where the time goes
    #[arg(long, value_name = "N", default_value_t = 8)]
    pub profiled: usize,
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
    r: u32,
    batch: usize,
    requests: usize,
    prompt_tokens: usize,
    new_tokens: usize,
    /// New tokens of all requests over the time from the first request to the last token.
    tokens_per_second: f64,
    /// Of steps that read no prompt.
    decode_tokens_per_second: f64,
    ms_per_decode_step: f64,
    prompt_tokens_per_second: f64,
    /// From the submission of all to the first token of each.
    first_token_ms_p50: f64,
    first_token_ms_p99: f64,
    model_memory: u64,
    kv_bytes_per_token: usize,
    /// Weights without the embedding, and keys and values of half the answer, over the time of a step of decoding.
    decode_gigabytes_per_second: f64,
    peak_allocated: u64,
    process_memory: Option<u64>,
    gpu: Option<KernelTimes>,
}

pub fn run(args: &BenchGenerateArgs) -> Result<()> {
    let report = measure(args)?;
    super::show(&report, args.json, render)
}

fn measure(args: &BenchGenerateArgs) -> Result<Report> {
    let (name, config) = args.shape.config()?;
    let requests = args.requests.unwrap_or(args.batch);
    for (flag, value) in
        [("--batch", args.batch), ("--requests", requests), ("--prompt", args.prompt), ("--new", args.new)]
    {
        super::at_least(flag, value, 1)?;
    }
    let device = args.machine.init()?;
    let kind = kind_of(args.dtype, device, config.overflows_f16());
    let options = args.weights.options(kind, device);
    let arguments = TrainingArguments {
        r: args.r,
        init_lora_weights: InitLoraWeights::Random,
        ..TrainingArguments::default()
    };
    let mut model = FastLanguageModel::untrained(config, options, arguments.seed)?;
    if args.r > 0 {
        model.get_peft_model(arguments.adapter_config(&name), arguments.seed)?;
        model.for_inference()?;
    }
    let decoder = &model.decoder;
    device::synchronize(device)?;
    device::empty_cache(device)?;
    device::reset_peak_memory(device)?;
    let model_memory = device::memory(device)?.allocated;

    let tokens = (args.prompt + args.new).next_multiple_of(PAGE_SIZE);
    let kv_budget = KvBudget::Tokens(args.batch * tokens);
    let max_num_batched_tokens = batched_tokens(args.max_num_batched_tokens, device)?;
    let options = EngineOptions { max_num_batched_tokens, ..EngineOptions::new(kv_budget, args.batch) };
    let mut engine = Engine::new(decoder, options)?;
    let mut random = ChaCha8Rng::seed_from_u64(3407);
    let params = SamplingParams {
        temperature: args.temperature,
        top_p: args.top_p,
        max_new_tokens: args.new,
        ..SamplingParams::default()
    };
    let mut prompts = |count: usize| -> Vec<Vec<i64>> {
        let vocab = decoder.config.vocab_size;
        (0..count).map(|_| (0..args.prompt).map(|_| random.random_range(0..vocab)).collect()).collect()
    };
    // Kernels are chosen, workspaces made and graphs recorded.
    for prompt in prompts(args.batch) {
        engine.submit(decoder, Request::new(&prompt, &params))?;
    }
    while !engine.is_idle() {
        engine.step(decoder)?;
    }
    let before = engine.stats();
    let prompts_timed = prompts(requests);
    device::synchronize(device)?;
    let start = Instant::now();
    for prompt in &prompts_timed {
        engine.submit(decoder, Request::new(prompt, &params))?;
    }
    let mut first_tokens = vec![];
    let mut seen = std::collections::HashSet::new();
    while !engine.is_idle() {
        for event in engine.step(decoder)? {
            match event.kind {
                EventKind::Token(_) if seen.insert(event.request) => {
                    first_tokens.push(start.elapsed().as_secs_f64() * 1e3);
                }
                EventKind::Failed(error) => return Err(error),
                _ => (),
            }
        }
    }
    let seconds = start.elapsed().as_secs_f64();
    let stats = engine.stats();
    let decode_seconds = stats.decode_seconds - before.decode_seconds;
    let decode_tokens = (stats.decode_tokens - before.decode_tokens) as f64;
    let prompt_tokens = (stats.prompt_tokens - before.prompt_tokens) as f64;
    let (memory, process_memory) = (device::memory(device)?, device::process_memory(device));
    let gpu = if device.is_cuda() && args.profiled > 0 {
        for prompt in prompts(args.batch) {
            engine.submit(decoder, Request::new(&prompt, &params))?;
        }
        while engine.stats().decode_seconds <= stats.decode_seconds && !engine.is_idle() {
            engine.step(decoder)?;
        }
        let work = || (0..args.profiled).try_for_each(|_| engine.step(decoder).map(drop));
        Some(KernelTimes::new(&device::profile(device, work)?, args.profiled))
    } else {
        None
    };
    first_tokens.sort_by(f64::total_cmp);
    let quantile = |q: f64| first_tokens[((first_tokens.len() - 1) as f64 * q).round() as usize];
    let ms_per_decode_step = decode_seconds * 1e3 / (decode_tokens / args.batch.min(requests) as f64);
    let embedding = if decoder.config.tie_word_embeddings || decoder.offloads_embedding() {
        0
    } else {
        (decoder.config.vocab_size * decoder.config.hidden_size) as u64 * kind.elt_size_in_bytes() as u64
    };
    let cached = args.batch.min(requests) * (args.prompt + args.new / 2) * decoder.kv_bytes_per_token();
    let moved = (model_memory - embedding) as f64 + cached as f64;
    Ok(Report {
        shape: name,
        device: device::describe(device),
        dtype: name_of(kind),
        load_in_4bit: args.weights.load_in_4bit,
        r: args.r,
        batch: args.batch,
        requests,
        prompt_tokens: args.prompt,
        new_tokens: args.new,
        tokens_per_second: (requests * args.new) as f64 / seconds,
        decode_tokens_per_second: decode_tokens / decode_seconds,
        ms_per_decode_step,
        prompt_tokens_per_second: prompt_tokens / (stats.prefill_seconds - before.prefill_seconds),
        first_token_ms_p50: quantile(0.5),
        first_token_ms_p99: quantile(0.99),
        model_memory,
        kv_bytes_per_token: decoder.kv_bytes_per_token(),
        decode_gigabytes_per_second: moved / ms_per_decode_step / 1e6,
        peak_allocated: memory.peak_allocated,
        process_memory,
        gpu,
    })
}

fn render(report: &Report) -> String {
    let title = format!(
        "{} {} LoRA r {}",
        report.shape,
        if report.load_in_4bit { "NF4" } else { report.dtype },
        report.r
    );
    let mut rows = vec![
        ("device", report.device.clone()),
        (
            "requests",
            format!(
                "{} of {} + {} tokens, {} at once",
                report.requests, report.prompt_tokens, report.new_tokens, report.batch
            ),
        ),
        ("all", format!("{} tokens/s", rate(report.tokens_per_second))),
        (
            "decoding",
            format!(
                "{} tokens/s, {:.3} ms a step, {:.0} GB/s",
                rate(report.decode_tokens_per_second),
                report.ms_per_decode_step,
                report.decode_gigabytes_per_second
            ),
        ),
        ("prompts", format!("{} tokens/s", rate(report.prompt_tokens_per_second))),
        (
            "first token",
            format!(
                "{:.1} ms in the middle, {:.1} ms at 99 %",
                report.first_token_ms_p50, report.first_token_ms_p99
            ),
        ),
        (
            "memory",
            format!("{} weights, {} at most", bytes(report.model_memory), bytes(report.peak_allocated)),
        ),
    ];
    if let Some(gpu) = &report.gpu {
        rows.push((
            "a step",
            format!(
                "{:.3} ms busy, {} idle, {:.0} launches",
                gpu.busy_ms,
                percent(gpu.idle_share),
                gpu.launches
            ),
        ));
        for share in gpu.kernels.iter().take(12) {
            rows.push((
                "",
                format!(
                    "{:8.3} ms {:6.1}x {}",
                    share.ms,
                    share.calls,
                    &share.name.chars().take(90).collect::<String>()
                ),
            ));
        }
    }
    table(&title, &rows)
}
