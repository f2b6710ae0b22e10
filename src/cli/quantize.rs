//! `ferrotune quantize`: a checkpoint in 4 bits that transformers + bitsandbytes loads as well.

use std::io::{Write, stdout};
use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};

use super::format::bytes;
use super::model_args::{MachineArgs, kind_of};
use super::progress::BARS;
use super::quant_args::{QuantArgs, table};
use super::sources;
use crate::export;
use crate::train::Dtype;

/// Writes a checkpoint with every projection of its layers in 4 bits (NF4, double quantisation), as bitsandbytes does.
///
/// --quant dynamic-nf4 keeps those projections as they are whose quantisation costs the loss of a text most a byte: it prints them, and writes
/// the scores of all into dynamic_nf4.json beside the weights. Embeddings, head and norms stay as they are. The bytes are the same on every device. Every command loads the result without a flag, and so does transformers
/// with bitsandbytes.
#[derive(Args, Debug)]
#[command(after_help = "Example:\n  ferrotune quantize --model DIR --output-dir DIR-nf4\n  \
    ferrotune quantize --model DIR --quant dynamic-nf4 --calibration-dataset chats.jsonl --output-dir DIR-dynamic")]
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
    pub quant: QuantArgs,
    #[command(flatten)]
    pub machine: MachineArgs,
}

/// Runs what the flags ask for.
pub fn run(args: QuantizeArgs) -> Result<()> {
    let device = args.machine.init()?;
    let folder = sources::model_dir(&args.model, args.revision.as_deref()).context("--model")?;
    // Never in f16: what is judged is small.
    let plan = args.quant.plan(&folder, (kind_of(Dtype::Auto, device, true), device))?;
    if let Some(plan) = &plan {
        write!(stdout(), "{}", table(plan)).context("writing to stdout")?;
    }
    let style = ProgressStyle::with_template(
        "quantising {bar:20.cyan/blue} {binary_bytes}/{binary_total_bytes} {binary_bytes_per_sec} ETA {eta}",
    )?;
    let bar = BARS.add(ProgressBar::new(0).with_style(style));
    let sizes = export::quantize(&folder, &args.output_dir, device, plan.as_ref(), |read, all| {
        bar.set_length(all);
        bar.set_position(read);
    });
    bar.finish_and_clear();
    let sizes = sizes?;
    let (before, after) = (bytes(sizes.before), bytes(sizes.after));
    writeln!(stdout(), "{}: {before} became {after}", args.output_dir.display()).context("writing to stdout")
}
