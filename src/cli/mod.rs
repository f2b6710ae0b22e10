//! The `ferrotune` command: flags, progress bars, exit codes.

mod answers;
pub mod banner;
pub mod bench;
mod bench_generate;
mod bench_grpo;
mod bench_loss;
mod bench_plan;
mod bench_serve;
mod budget;
mod cards;
mod changes;
pub mod chat;
mod completions;
pub mod config_file;
pub mod data;
pub mod doctor;
pub mod dpo;
pub mod engine_args;
pub mod export;
pub mod format;
pub mod generate;
pub mod grpo;
pub mod hub_env;
mod method_args;
pub mod model_args;
pub mod plan;
pub mod progress;
pub mod push;
mod quant_args;
pub mod quantize;
mod resume;
pub mod sampling_args;
pub mod score;
pub mod selftest;
pub mod serve;
mod shapes;
pub mod signals;
mod sources;
pub mod train;
mod train_banner;
mod train_plan;
pub mod train_serve;

use std::process::ExitCode;

use anyhow::{Result, bail};
use clap::{Parser, Subcommand};
use serde::Serialize;
use tracing_subscriber::EnvFilter;

use crate::error::Error;
use crate::train::TrainingArguments;
use crate::train::grpo::GrpoArguments;
use crate::train::preference::PreferenceArguments;
use config_file::Configured;

/// Fine-tune and run Hugging Face language models
#[derive(Parser)]
#[command(name = "ferrotune", version, arg_required_else_help = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Tune a checkpoint on a dataset: LoRA, or all weights with --full-finetuning
    Train(Box<Configured<TrainingArguments>>),
    /// Tune a checkpoint on preferences: DPO and its family on pairs, KTO on labelled completions
    Dpo(Box<Configured<PreferenceArguments>>),
    /// Let a model answer prompts and learn from the rewards of its answers (GRPO)
    Grpo(Box<Configured<GrpoArguments>>),
    /// Answer one prompt, a file of prompts, or what is piped in
    Generate(generate::GenerateArgs),
    /// Talk to a model in the terminal
    Chat(chat::ChatArgs),
    /// Serve a model over HTTP, as OpenAI's API does
    Serve(serve::ServeArgs),
    /// Print how likely a model finds each token of a text, as JSON
    Score(score::ScoreArgs),
    /// Measure this machine on a model's shape, beside the least time it could take
    #[command(subcommand)]
    Bench(bench::BenchCommand),
    /// Look at a dataset, check it, and make another one of it
    #[command(subcommand)]
    Data(data::DataCommand),
    /// Predict memory and time of a training run, without a GPU, and what would make it fit
    Plan(plan::PlanArgs),
    /// Write a tuned model as other programs read it: merged, in 16 or 4 bits
    Export(export::ExportArgs),
    /// Upload a folder to the Hugging Face hub
    Push(push::PushArgs),
    /// Write a checkpoint in 4 bits, as bitsandbytes does
    Quantize(quantize::QuantizeArgs),
    /// What this machine has, lacks, and how to mend it
    Doctor(doctor::DoctorArgs),
    /// Check every fused op against its reference on this machine, with its speed
    Selftest(selftest::SelftestArgs),
}

/// The report as JSON, or as `render` shows it.
fn show<R: Serialize>(report: &R, json: bool, render: impl FnOnce(&R) -> String) -> Result<()> {
    if json {
        println!("{}", serde_json::to_string_pretty(report)?);
    } else {
        print!("{}", render(report));
    }
    Ok(())
}

/// # Errors
/// Usage: a flag's value below the least that makes sense.
fn at_least(flag: &str, value: usize, least: usize) -> Result<()> {
    if value < least {
        bail!(Error::Usage(format!("{flag} is {value}, expected at least {least}")));
    }
    Ok(())
}

/// Runs the command line and returns the process's exit code: 0 done, 1 failed, 2 usage, 130 interrupted.
pub fn run() -> ExitCode {
    let filter = EnvFilter::try_from_env("FERROTUNE_LOG").unwrap_or_else(|_| EnvFilter::new("warn"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(progress::log_writer)
        .without_time()
        .with_target(false)
        .init();
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(message) => message.exit(),
    };
    crate::device::keep_freed_memory();
    let result = match cli.command {
        Command::Train(arguments) => train::run(arguments.0),
        Command::Dpo(arguments) => dpo::run(arguments.0),
        Command::Grpo(arguments) => grpo::run(arguments.0),
        Command::Generate(arguments) => generate::run(arguments),
        Command::Chat(arguments) => chat::run(arguments),
        Command::Serve(arguments) => serve::run(arguments),
        Command::Score(arguments) => score::run(arguments),
        Command::Bench(command) => bench::run(command),
        Command::Data(command) => data::run(command),
        Command::Plan(arguments) => plan::run(arguments),
        Command::Export(arguments) => export::run(arguments),
        Command::Push(arguments) => push::run(&arguments),
        Command::Quantize(arguments) => quantize::run(arguments),
        Command::Doctor(arguments) => doctor::run(arguments),
        Command::Selftest(arguments) => selftest::run(arguments),
    };
    let Err(error) = result else { return ExitCode::SUCCESS };
    eprintln!("error: {error:#}");
    match error.downcast_ref() {
        Some(Error::Usage(_)) => ExitCode::from(2),
        Some(Error::Interrupted(_)) => ExitCode::from(130),
        _ => ExitCode::FAILURE,
    }
}
