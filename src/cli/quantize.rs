//! `ferrotune quantize`: a checkpoint in 4 bits that transformers + bitsandbytes loads as well.

use std::io::{Write, stdout};
use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};

use super::format::bytes;
use super::model_args::MachineArgs;
use super::progress::BARS;
use super::sources;
use crate::export;

/// Writes a checkpoint with every projection of its layers in 4 bits (NF4, double quantisation), as bitsandbytes does.
///
/// Embeddings, head and norms stay as they are. The bytes are the same on every device. Every command loads the result without a flag, and so does transformers
/// with bitsandbytes.
#[derive(Args, Debug)]
#[command(after_help = "Example:\n  ferrotune quantize --model DIR --output-dir DIR-nf4")]
pub struct QuantizeArgs {
    /// Checkpoint to quantise: a directory or a Hugging Face hub id
    #[arg(long, value_name = "DIR|ID")]
    pub model: String,
    /// Branch, tag or commit of a hub model
    #[arg(long)]
    pub revision: Option<String>,
    /// Folder for the quantised checkpoint; it must be new or empty
    #[arg(long, value_name = "DIR")]
    pub output_dir: PathBuf,
    #[command(flatten)]
    pub machine: MachineArgs,
}

/// Runs what the flags ask for.
pub fn run(args: QuantizeArgs) -> Result<()> {
    let device = args.machine.init()?;
    let folder = sources::model_dir(&args.model, args.revision.as_deref()).context("--model")?;
    let style = ProgressStyle::with_template(
        "quantising {bar:20.cyan/blue} {binary_bytes}/{binary_total_bytes} {binary_bytes_per_sec} ETA {eta}",
    )?;
    let bar = BARS.add(ProgressBar::new(0).with_style(style));
    let sizes = export::quantize(&folder, &args.output_dir, device, |read, all| {
        bar.set_length(all);
        bar.set_position(read);
    });
    bar.finish_and_clear();
    let sizes = sizes?;
    let (before, after) = (bytes(sizes.before), bytes(sizes.after));
    writeln!(stdout(), "{}: {before} became {after}", args.output_dir.display()).context("writing to stdout")
}
