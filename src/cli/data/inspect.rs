use std::collections::BTreeMap;
use std::io::{IsTerminal, Write, stdout};
use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::Args;

use super::args::{RowProgress, SampleArgs, SourceArgs};
use crate::cli::banner::table;
use crate::cli::format::{count, percent};
use crate::data::{Histogram, Inspection, TokenCounts, Tokenizer, inspect, preview};
use crate::io::write_atomically;

/// Shows what a dataset holds.
///
/// With --model also what its tokenizer makes of the rows: lengths, what is cut off, what is trained, and the first
/// samples with what is trained marked.
#[derive(Args, Debug)]
#[command(
    after_help = "Example:\n  ferrotune data inspect --dataset chats.jsonl --model DIR --assistant-only-loss"
)]
pub struct InspectArgs {
    #[command(flatten)]
    pub source: SourceArgs,
    #[command(flatten)]
    pub sample: SampleArgs,
    /// Samples to show
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub examples: usize,
    /// Write the histogram of lengths as a picture, too
    #[arg(long, value_name = "FILE.svg")]
    pub histogram: Option<PathBuf>,
}

/// Runs what the flags ask for.
pub fn run(args: InspectArgs) -> Result<()> {
    let tokenizer = args.sample.tokenizer()?;
    let options = args.sample.options()?;
    let progress = RowProgress::new("reading")?;
    let found = inspect(args.source.records()?, tokenizer.as_ref(), &options, args.examples, &mut |rows| {
        progress.set(rows);
    })?;
    drop(progress);
    let mut out = stdout().lock();
    write!(out, "{}", table(&args.source.dataset.join(", "), &facts(&found)))?;
    let (lengths, unit) = match &found.tokens {
        Some(tokens) => (&tokens.lengths, "tokens"),
        None => (&found.characters, "characters"),
    };
    write!(out, "\n{}", bars(lengths, unit))?;
    if let Some(tokens) = &found.tokens {
        write!(out, "\n{}", table("With this tokenizer", &token_facts(tokens, options.max_seq_length)))?;
    }
    if let (Some(tokens), Some(tokenizer)) = (&found.tokens, &tokenizer) {
        show_examples(&mut out, tokenizer, tokens)?;
    }
    if let Some(path) = &args.histogram {
        let title = format!("{unit} of a row: {}", args.source.dataset.join(", "));
        write_atomically(path, lengths.picture(&title, options.max_seq_length)?.as_bytes())?;
        writeln!(out, "\nthe histogram is in {}", path.display())?;
    }
    out.flush().context("writing to stdout")
}

fn facts(found: &Inspection) -> Vec<(&'static str, String)> {
    let mut facts = vec![("rows", count(found.rows))];
    if let Some((rows, reason)) = &found.broken {
        facts.push(("broken", format!("{}; the first: {reason}", count(*rows))));
    }
    facts.push(("shape", by_count(&found.formats)));
    for (at, (name, holds)) in found.columns.iter().enumerate() {
        facts.push((if at == 0 { "columns" } else { "" }, format!("{name}: {holds}")));
    }
    if !found.roles.is_empty() {
        facts.push(("roles", by_count(&found.roles)));
        let turns = &found.turns;
        facts.push(("messages", format!("{:.1} a row, {} at most", turns.mean(), turns.max())));
    }
    if !found.images.is_empty() {
        facts.push(("pictures", by_count(&found.images)));
    }
    facts
}

/// The most frequent first, the tenth and later ones as a number.
fn by_count(counts: &BTreeMap<String, u64>) -> String {
    const SHOWN: usize = 9;
    let mut sorted: Vec<(&String, &u64)> = counts.iter().collect();
    sorted.sort_by_key(|(_, count)| std::cmp::Reverse(**count));
    let mut shown: Vec<String> =
        sorted.iter().take(SHOWN).map(|(name, number)| format!("{name} {}", count(**number))).collect();
    if sorted.len() > SHOWN {
        shown.push(format!("and {} others", sorted.len() - SHOWN));
    }
    shown.join(", ")
}

fn token_facts(tokens: &TokenCounts, max_seq_length: usize) -> Vec<(&'static str, String)> {
    let rows = tokens.lengths.count().max(1) as f64;
    let of_rows = |number: u64| format!("{} rows ({})", count(number), percent(number as f64 / rows));
    let trained = percent(tokens.trained as f64 / tokens.kept.max(1) as f64);
    vec![
        ("tokens", count(tokens.lengths.total())),
        ("truncated", format!("{} are longer than {max_seq_length}", of_rows(tokens.truncated))),
        ("trained", format!("{} tokens ({trained} of what is kept)", count(tokens.trained))),
    ]
}

/// The histogram in text.
fn bars(lengths: &Histogram, unit: &str) -> String {
    let title = format!(
        "{unit} of a row: mean {:.0}, median {}, 95 % up to {}, longest {}",
        lengths.mean(),
        count(lengths.quantile(0.5) as u64),
        count(lengths.quantile(0.95) as u64),
        count(lengths.max() as u64)
    );
    let bins = lengths.bins(12);
    let highest = bins.iter().map(|bin| bin.2).max().unwrap_or(0).max(1);
    let mut text = format!("{title}\n");
    for (from, to, number) in bins {
        let bar = "█".repeat((number * 50).div_ceil(highest) as usize);
        let range = format!("{}..{}", count(from as u64), count(to as u64));
        text.push_str(&format!("  {range:>16}  {bar} {}\n", count(number)));
    }
    text
}

fn show_examples(out: &mut impl Write, tokenizer: &Tokenizer, tokens: &TokenCounts) -> Result<()> {
    let (on, off) = if stdout().is_terminal() { ("\x1b[1;32m", "\x1b[0m") } else { ("[[", "]]") };
    for sample in 0..tokens.examples.len() {
        writeln!(out, "\nSample {}; {on}what is trained{off} is marked:\n", sample + 1)?;
        for span in preview(tokenizer, &tokens.examples, sample)? {
            match span.trained {
                true => write!(out, "{on}{}{off}", span.text)?,
                false => write!(out, "{}", span.text)?,
            }
        }
        writeln!(out)?;
    }
    Ok(())
}
