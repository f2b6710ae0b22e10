//! `ferrotune data`: from a messy file to a training set that one can trust.

mod args;
mod convert;
mod inspect;
mod lint;

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
}

/// Runs what the flags ask for.
pub fn run(command: DataCommand) -> Result<()> {
    match command {
        DataCommand::Inspect(args) => inspect::run(args),
        DataCommand::Lint(args) => lint::run(args),
        DataCommand::Convert(args) => convert::run(args),
    }
}
