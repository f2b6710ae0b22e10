//! Some of a dataset's rows, or those of several.

use std::io::{Write, stdout};
use std::path::{Path, PathBuf, absolute};

use anyhow::{Context, Result, bail, ensure};
use clap::{Args, ValueEnum};

use super::args::{SourceArgs, write};
use crate::cli::format::count;
use crate::cli::sources;
use crate::data::{
    Dedup, Mix, RowOptions, RowStream, StoppingStrategy, StreamOptions, data_files, sample_rows, split_rows,
};
use crate::error::Error;

/// Sets rows aside for evaluation, chosen by the seed; both files keep the order of the rows.
#[derive(Args, Debug)]
#[command(
    after_help = "Example:\n  ferrotune data split --dataset chats.jsonl --test-size 0.1 --output train.jsonl --test-output test.jsonl"
)]
pub struct SplitArgs {
    #[command(flatten)]
    pub source: SourceArgs,
    /// Share (below 1) or number of the rows to set aside
    #[arg(long, value_name = "SHARE|N")]
    pub test_size: f64,
    /// Seed of the choice
    #[arg(long, default_value_t = 3407)]
    pub seed: u64,
    /// File of the other rows
    #[arg(long, value_name = "FILE")]
    pub output: PathBuf,
    /// File of the rows set aside
    #[arg(long, value_name = "FILE")]
    pub test_output: PathBuf,
}

/// Runs what the flags ask for.
pub fn run_split(args: SplitArgs) -> Result<()> {
    if !(args.test_size > 0.0 && args.test_size.is_finite()) {
        bail!(Error::Usage(format!("--test-size: {} is not above 0", args.test_size)));
    }
    let place = |path: &Path| absolute(path).with_context(|| path.display().to_string());
    if place(&args.output)? == place(&args.test_output)? {
        bail!(Error::Usage("--output and --test-output name one file".to_owned()));
    }
    let sources = args.source.files()?;
    let files = data_files(&sources).context("--dataset")?;
    // The dataset is read once for each output: the first must not take its place in between.
    for (flag, output) in [("--output", &args.output), ("--test-output", &args.test_output)] {
        let there = output.canonicalize().ok();
        if there.is_some() && files.iter().any(|file| file.canonicalize().ok() == there) {
            bail!(Error::Usage(format!("{flag}: {} is a file of the dataset itself", output.display())));
        }
    }
    let (train, test) = split_rows(&sources, args.test_size, args.seed)?;
    write(&args.output, "splitting", train)?;
    write(&args.test_output, "splitting", test)
}

/// Leaves out rows that say what an earlier row said, whatever their other columns.
#[derive(Args, Debug)]
#[command(after_help = "Example:\n  ferrotune data dedup --dataset chats.jsonl --near --output unique.jsonl")]
pub struct DedupArgs {
    #[command(flatten)]
    pub source: SourceArgs,
    /// Also leave out rows that are nearly the same, from this similarity (Jaccard, of three words in a row) on
    #[arg(long, value_name = "SHARE", num_args = 0..=1, default_missing_value = "0.8")]
    pub near: Option<f64>,
    /// Column that holds plain text
    #[arg(long, value_name = "COLUMN")]
    pub text_column: Option<String>,
    /// File to write
    #[arg(long, value_name = "FILE")]
    pub output: PathBuf,
}

/// Runs what the flags ask for.
pub fn run_dedup(args: DedupArgs) -> Result<()> {
    if let Some(share) = args.near
        && !(share > 0.0 && share <= 1.0)
    {
        bail!(Error::Usage(format!("--near: {share} is not between 0 and 1")));
    }
    let options = RowOptions { text_column: args.text_column.clone(), ..RowOptions::default() };
    let mut dedup = Dedup::new(options, args.near);
    let mut dropped = 0u64;
    let rows = args.source.records()?.filter_map(|record| {
        let new = record.and_then(|record| Ok(dedup.is_new(&record)?.then_some(record.row)));
        dropped += u64::from(matches!(new, Ok(None)));
        new.transpose()
    });
    let rows: Box<dyn Iterator<Item = _>> = Box::new(rows);
    write(&args.output, "comparing", rows)?;
    writeln!(stdout(), "{} rows left out", count(dropped)).context("writing to stdout")
}

/// When a mix ends.
#[derive(ValueEnum, Clone, Copy, Debug)]
#[value(rename_all = "snake_case")]
pub enum Strategy {
    /// When the first dataset has no more rows
    FirstExhausted,
    /// When all have been gone through; those that end earlier begin again
    AllExhausted,
}

/// Mixes datasets: each row is the next one of a dataset drawn by its weight.
#[derive(Args, Debug)]
#[command(
    after_help = "Example:\n  ferrotune data mix --dataset chats.jsonl,code.jsonl --weights 0.7,0.3 --output mixed.jsonl"
)]
pub struct MixArgs {
    #[command(flatten)]
    pub source: SourceArgs,
    /// Weight of each dataset, in their order
    #[arg(long, value_name = "NUMBERS", value_delimiter = ',', required = true)]
    pub weights: Vec<f64>,
    /// When to stop
    #[arg(long, value_enum, default_value_t = Strategy::FirstExhausted)]
    pub stopping_strategy: Strategy,
    /// Rows to write at most
    #[arg(long, value_name = "N")]
    pub rows: Option<usize>,
    /// Seed of the draws
    #[arg(long, default_value_t = 3407)]
    pub seed: u64,
    /// File to write
    #[arg(long, value_name = "FILE")]
    pub output: PathBuf,
}

/// Runs what the flags ask for.
pub fn run_mix(args: MixArgs) -> Result<()> {
    let datasets = &args.source.dataset;
    if datasets.len() != args.weights.len() {
        bail!(Error::Usage(format!(
            "--weights: {} weights for {} datasets: give one for each",
            args.weights.len(),
            datasets.len()
        )));
    }
    let files = |name: &String| {
        sources::dataset_files(std::slice::from_ref(name), &args.source.dataset_split).context("--dataset")
    };
    let datasets = datasets
        .iter()
        .zip(&args.weights)
        .map(|(name, weight)| Ok((files(name)?, *weight)))
        .collect::<Result<_>>()?;
    let strategy = match args.stopping_strategy {
        Strategy::FirstExhausted => StoppingStrategy::FirstExhausted,
        Strategy::AllExhausted => StoppingStrategy::AllExhausted,
    };
    let mix = Mix::new(datasets, args.seed, strategy)?;
    write(&args.output, "mixing", mix.take(args.rows.unwrap_or(usize::MAX)))
}

/// Takes some rows, chosen by the seed, in their order.
#[derive(Args, Debug)]
#[command(
    after_help = "Example:\n  ferrotune data sample --dataset chats.jsonl --rows 1000 --output some.jsonl"
)]
pub struct SampleRowsArgs {
    #[command(flatten)]
    pub source: SourceArgs,
    /// How many
    #[arg(long, value_name = "N")]
    pub rows: usize,
    /// Seed of the choice
    #[arg(long, default_value_t = 3407)]
    pub seed: u64,
    /// File to write
    #[arg(long, value_name = "FILE")]
    pub output: PathBuf,
}

/// Runs what the flags ask for.
pub fn run_sample(args: SampleRowsArgs) -> Result<()> {
    write(&args.output, "choosing", sample_rows(&args.source.files()?, args.rows, args.seed)?)
}

/// Shuffles files that may be larger than memory, or one rank's share of them.
///
/// Blocks of 1024 lines (or row groups) are drawn from all over the files, and those in memory shuffled with each other.
#[derive(Args, Debug)]
#[command(
    after_help = "Example:\n  ferrotune data shuffle --dataset big.jsonl --seed 1 --rank 0 --world-size 4 --output part0.jsonl"
)]
pub struct ShuffleArgs {
    #[command(flatten)]
    pub source: SourceArgs,
    /// Seed of the order
    #[arg(long, default_value_t = 3407)]
    pub seed: u64,
    /// Rows in memory
    #[arg(long, value_name = "N", default_value_t = 65_536)]
    pub buffer_rows: usize,
    /// Which share to write, from 0 on
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub rank: u64,
    /// Shares in all: of one size, with other rows each; what does not divide is left out
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub world_size: u64,
    /// File to write
    #[arg(long, value_name = "FILE")]
    pub output: PathBuf,
}

/// Runs what the flags ask for.
pub fn run_shuffle(args: ShuffleArgs) -> Result<()> {
    let (rank, world_size) = (args.rank, args.world_size);
    ensure!(rank < world_size, "--rank {rank}: expected one below --world-size, which is {world_size}");
    ensure!(args.buffer_rows > 0, "--buffer-rows 0: expected at least 1");
    let options = StreamOptions {
        seed: Some(args.seed),
        buffer_rows: args.buffer_rows,
        rank: args.rank,
        world_size: args.world_size,
    };
    let mut stream = RowStream::open(&args.source.files()?, options).context("--dataset")?;
    let rows =
        std::iter::from_fn(|| stream.next_row().map(|record| record.map(|record| record.row)).transpose());
    write(&args.output, "shuffling", rows)
}
