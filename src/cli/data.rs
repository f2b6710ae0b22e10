//! `ferrotune data`: from a messy file to a training set that one can trust.

mod args;
mod chunk;
mod conversations;
mod convert;
mod inspect;
mod lint;
mod render;
mod select;

use anyhow::Result;
use clap::Subcommand;

/// Look at a dataset, check it, and make another one of it
#[derive(Subcommand, Debug)]
pub enum DataCommand {
    /// Show what a dataset holds: columns, roles, lengths, what is trained of it
    Inspect(inspect::InspectArgs),
    /// Check every row; fails if a row breaks a rule, and writes a cleaned file with --fix
    Lint(lint::LintArgs),
    /// Write a dataset in another format: .jsonl, .json, .csv, .parquet
    Convert(convert::ConvertArgs),
    /// Make conversations of a table
    #[command(name = "to-sharegpt")]
    ToShareGpt(conversations::ToShareGptArgs),
    /// Give conversations the roles and keys that chat templates read
    Standardize(conversations::StandardizeArgs),
    /// Render conversations to texts
    ApplyChatTemplate(render::ApplyArgs),
    /// Make token ids and labels in which only the answers are trained
    TrainOnResponsesOnly(render::ResponsesArgs),
    /// Set rows aside for evaluation
    Split(select::SplitArgs),
    /// Leave out rows that are the same, or nearly
    Dedup(select::DedupArgs),
    /// Mix datasets by weights
    Mix(select::MixArgs),
    /// Take some rows at random
    Sample(select::SampleRowsArgs),
    /// Shuffle files that may be larger than memory
    Shuffle(select::ShuffleArgs),
    /// Cut documents (txt, md, html, pdf, docx) into samples
    Chunk(chunk::ChunkArgs),
}

/// Runs what the flags ask for.
pub fn run(command: DataCommand) -> Result<()> {
    match command {
        DataCommand::Inspect(args) => inspect::run(args),
        DataCommand::Lint(args) => lint::run(args),
        DataCommand::Convert(args) => convert::run(args),
        DataCommand::ToShareGpt(args) => conversations::run_to_sharegpt(args),
        DataCommand::Standardize(args) => conversations::run_standardize(args),
        DataCommand::ApplyChatTemplate(args) => render::run_apply(args),
        DataCommand::TrainOnResponsesOnly(args) => render::run_responses(args),
        DataCommand::Split(args) => select::run_split(args),
        DataCommand::Dedup(args) => select::run_dedup(args),
        DataCommand::Mix(args) => select::run_mix(args),
        DataCommand::Sample(args) => select::run_sample(args),
        DataCommand::Shuffle(args) => select::run_shuffle(args),
        DataCommand::Chunk(args) => chunk::run(args),
    }
}
