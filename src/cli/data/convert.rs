use std::path::PathBuf;

use anyhow::Result;
use clap::Args;

use super::args::{SourceArgs, write};

/// Writes the rows of a dataset in the format of the output's ending.
///
/// Nothing is lost: a CSV cell that is no string holds its value as JSON, and Parquet refuses a column of several types.
#[derive(Args, Debug)]
#[command(after_help = "Example:\n  ferrotune data convert --dataset chats.json --output chats.parquet")]
pub struct ConvertArgs {
    #[command(flatten)]
    pub source: SourceArgs,
    /// File to write: .jsonl, .json or .csv (each also with .gz or .zst), or .parquet
    #[arg(long, value_name = "FILE")]
    pub output: PathBuf,
}

/// Runs what the flags ask for.
pub fn run(args: ConvertArgs) -> Result<()> {
    write(&args.output, "converting", args.source.records()?.map(|record| Ok(record?.row)))
}
