use std::io::{Write, stdout};
use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::Args;

use super::args::{RowProgress, SourceArgs};
use crate::cli::format::count;
use crate::data::{output_format, write_rows};

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
    output_format(&args.output).context("--output")?;
    let progress = RowProgress::new("converting")?;
    let rows = args.source.records()?.inspect(|_| progress.add_one()).map(|record| Ok(record?.row));
    let rows = write_rows(&args.output, rows)?;
    drop(progress);
    writeln!(stdout(), "{} rows -> {}", count(rows), args.output.display()).context("writing to stdout")
}
