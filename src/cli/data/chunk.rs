use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use clap::Args;
use serde_json::json;

use super::args::{tokenizer, write};
use crate::data::{ChunkOptions, DOCUMENT_ENDINGS, Row, chunks, read_document};
use crate::error::Error;

/// Cuts documents into samples that overlap: rows of a column text, with source and chunk beside it.
#[derive(Args, Debug)]
#[command(
    after_help = "Example:\n  ferrotune data chunk --documents manual.pdf,notes/ --model DIR --chunk-size 2048 --overlap 128 --output texts.jsonl"
)]
pub struct ChunkArgs {
    /// Documents (txt, md, html, pdf, docx) or folders of them, comma-separated or repeated
    #[arg(long, value_name = "FILE|DIR", value_delimiter = ',', required = true)]
    pub documents: Vec<PathBuf>,
    /// Checkpoint whose tokenizer counts: a directory or a Hugging Face hub id
    #[arg(long, value_name = "DIR|ID")]
    pub model: String,
    /// Branch, tag or commit of a hub model
    #[arg(long)]
    pub revision: Option<String>,
    /// Tokens of a chunk at most
    #[arg(long, value_name = "TOKENS", default_value_t = 2048)]
    pub chunk_size: usize,
    /// Tokens that a chunk repeats of the one before
    #[arg(long, value_name = "TOKENS", default_value_t = 128)]
    pub overlap: usize,
    /// File to write
    #[arg(long, value_name = "FILE")]
    pub output: PathBuf,
}

/// Runs what the flags ask for.
pub fn run(args: ChunkArgs) -> Result<()> {
    let options = ChunkOptions { chunk_size: args.chunk_size, overlap: args.overlap };
    let tokenizer = tokenizer(&args.model, args.revision.as_deref()).context("--model")?;
    let mut documents = Vec::new();
    for path in &args.documents {
        documents.extend(files(path).context("--documents")?);
    }
    let rows = documents.into_iter().flat_map(|path| {
        let cut = || -> Result<Vec<Result<Row>>> {
            let text = read_document(&path)?;
            let ranges = chunks(&tokenizer, &text, &options)?.into_iter().zip(1..);
            let row = |range| json!({"text": &text[range], "source": path.display().to_string()});
            Ok(ranges
                .map(|(range, number)| {
                    let mut row = row(range);
                    row["chunk"] = json!(number);
                    Ok(serde_json::from_value(row)?)
                })
                .collect())
        };
        cut().unwrap_or_else(|error| vec![Err(error)])
    });
    write(&args.output, "cutting", rows)
}

/// The document itself, or those in a folder by name.
fn files(path: &Path) -> Result<Vec<PathBuf>> {
    if !path.is_dir() {
        return Ok(vec![path.to_owned()]);
    }
    let entries =
        std::fs::read_dir(path).with_context(|| format!("reading the folder {}", path.display()))?;
    let mut files: Vec<PathBuf> = entries.map(|entry| Ok(entry?.path())).collect::<Result<_>>()?;
    let known = |file: &PathBuf| {
        let ending = file.extension().and_then(|ending| ending.to_str()).unwrap_or_default().to_lowercase();
        file.is_file() && DOCUMENT_ENDINGS.contains(&ending.as_str())
    };
    files.retain(known);
    files.sort();
    if files.is_empty() {
        bail!(Error::Usage(format!("{}: no document ({})", path.display(), DOCUMENT_ENDINGS.join(", "))));
    }
    Ok(files)
}
