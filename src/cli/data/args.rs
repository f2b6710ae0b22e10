//! The flags that the data commands share: which rows, how they are understood, how they become tokens.

use std::io::{self, Write};
use std::path::Path;

use anyhow::{Context, Result, bail};
use clap::Args;

use crate::cli::format::count;
pub use crate::cli::progress::RowProgress;
use crate::cli::sources;
use crate::data::{
    ChatTemplate, DatasetOptions, NAMED_TEMPLATES, Records, Row, RowOptions, Tokenizer, output_format,
    write_rows,
};
use crate::models::FastLanguageModel;

/// Where rows come from.
#[derive(Args, Debug, Clone)]
pub struct SourceArgs {
    /// Files, globs or a hub id, comma-separated or repeated (json, jsonl, csv, parquet; .gz and .zst of these)
    #[arg(long, value_name = "FILE|ID", value_delimiter = ',', required = true)]
    pub dataset: Vec<String>,
    /// Split of a hub dataset
    #[arg(long, default_value = "train")]
    pub dataset_split: String,
}

impl SourceArgs {
    /// The data files, downloaded if need be.
    pub fn files(&self) -> Result<Vec<String>> {
        sources::dataset_files(&self.dataset, &self.dataset_split).context("--dataset")
    }

    /// Their records.
    pub fn records(&self) -> Result<Records> {
        Records::open(&self.files()?).context("--dataset")
    }
}

/// How rows become samples: the words of `ferrotune train`.
#[derive(Args, Debug, Clone)]
pub struct SampleArgs {
    /// Shape of the records; recognised by their columns when not given
    #[arg(long, value_name = "FORMAT")]
    pub dataset_format: Option<String>,
    /// Column that holds plain text to train on
    #[arg(long, value_name = "COLUMN")]
    pub text_column: Option<String>,
    /// Text of a sample made from its columns, such as "Q: {question}\nA: {answer}"
    #[arg(long, value_name = "TEXT", conflicts_with = "text_column")]
    pub template: Option<String>,
    /// Checkpoint whose tokenizer and chat template are used: a directory or a Hugging Face hub id
    #[arg(long, value_name = "DIR|ID")]
    pub model: Option<String>,
    /// Branch, tag or commit of a hub model
    #[arg(long)]
    pub revision: Option<String>,
    /// Chat template instead of the tokenizer's own: a known format (chatml, llama-3, ..), a Jinja file, or the text itself
    #[arg(long, value_name = "NAME|FILE|TEXT", requires = "model")]
    pub chat_template: Option<String>,
    /// Longest sample in tokens; what is beyond is cut off
    #[arg(long, default_value_t = 2048)]
    pub max_seq_length: usize,
    /// Train only on the assistant's turns
    #[arg(long, alias = "train-on-responses-only")]
    pub assistant_only_loss: bool,
    /// Train only on the completion of prompt/completion data [default: true where the data has that shape]
    #[arg(long, num_args = 0..=1, default_missing_value = "true", require_equals = true)]
    pub completion_only_loss: Option<bool>,
}

impl SampleArgs {
    /// The options of the training to come.
    pub fn options(&self) -> Result<DatasetOptions> {
        let format =
            self.dataset_format.as_deref().map(str::parse).transpose().context("--dataset-format")?;
        Ok(DatasetOptions {
            rows: RowOptions {
                dataset_format: format,
                text_column: self.text_column.clone(),
                template: self.template.clone(),
            },
            max_seq_length: self.max_seq_length,
            assistant_only_loss: self.assistant_only_loss,
            completion_only_loss: self.completion_only_loss.unwrap_or(true),
            ..DatasetOptions::default()
        })
    }

    /// The tokenizer of `--model` with the chat template asked for, if there is a `--model`.
    pub fn tokenizer(&self) -> Result<Option<Tokenizer>> {
        let Some(model) = &self.model else { return Ok(None) };
        let mut tokenizer = tokenizer(model, self.revision.as_deref()).context("--model")?;
        if let Some(template) = &self.chat_template {
            tokenizer.set_chat_template(chat_template(template)?);
        }
        Ok(Some(tokenizer))
    }
}

/// The tokenizer of the checkpoint `model`, which may have no other files.
pub fn tokenizer(model: &str, revision: Option<&str>) -> Result<Tokenizer> {
    let dir = sources::tokenizer_dir(model, revision)?;
    match dir.join("config.json").is_file() {
        true => FastLanguageModel::tokenizer_of(&dir),
        false => Tokenizer::from_dir(&dir),
    }
}

/// The template that `--chat-template` means: a known format's, a file, or the Jinja text itself.
pub fn chat_template(given: &str) -> Result<ChatTemplate> {
    if let Some(known) = NAMED_TEMPLATES.iter().find(|template| template.name == given) {
        return ChatTemplate::new(known.jinja, known.name);
    }
    match Path::new(given) {
        path if path.is_file() => ChatTemplate::from_file(path),
        _ if given.contains("{{") || given.contains("{%") => ChatTemplate::new(given, "--chat-template"),
        _ => bail!(
            "--chat-template: {given} is no file, no Jinja text and none of the known formats: {}",
            NAMED_TEMPLATES.iter().map(|template| template.name).collect::<Vec<_>>().join(", ")
        ),
    }
}

/// Writes `rows` to `path` with a bar, and says how many there are.
pub fn write(path: &Path, doing: &'static str, rows: impl Iterator<Item = Result<Row>>) -> Result<()> {
    output_format(path).context("--output")?;
    let progress = RowProgress::new(doing)?;
    let rows = write_rows(path, rows.inspect(|_| progress.add_one()))?;
    drop(progress);
    writeln!(io::stdout(), "{} rows -> {}", count(rows), path.display()).context("writing to stdout")
}
