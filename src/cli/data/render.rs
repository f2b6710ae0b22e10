//! Conversations into the text and the labels that a model is trained on.

use std::io::{Write, stdout};
use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use clap::Args;
use serde_json::json;

use super::args::{SourceArgs, chat_template, tokenizer, write};
use crate::data::{Example, ExampleTemplate, Record, RenderOptions, ResponseMarkers, RowOptions, Tokenizer};
use crate::error::Error;

/// What Unsloth says where a conversation has no system message.
const DEFAULT_SYSTEM_MESSAGE: &str = "Below are some instructions that describe some tasks. Write responses that \
    appropriately complete each request.";

/// Which tokenizer and which chat template.
#[derive(Args, Debug, Clone)]
pub struct TemplateArgs {
    /// Checkpoint whose tokenizer and chat template are used: a directory or a Hugging Face hub id
    #[arg(long, value_name = "DIR|ID")]
    pub model: String,
    /// Branch, tag or commit of a hub model
    #[arg(long)]
    pub revision: Option<String>,
    /// Chat template instead of the tokenizer's own: a known format (chatml, llama-3, ..), a Jinja file, or the text itself
    #[arg(long, value_name = "NAME|FILE|TEXT", conflicts_with = "example_template")]
    pub chat_template: Option<String>,
    /// An example to make the template of: one turn or two alike, with {INPUT}, {OUTPUT} and perhaps {SYSTEM}
    #[arg(long, value_name = "TEXT")]
    pub example_template: Option<String>,
    /// System message of conversations without one, with --example-template
    #[arg(long, value_name = "TEXT", requires = "example_template", default_value = DEFAULT_SYSTEM_MESSAGE)]
    pub default_system_message: String,
}

impl TemplateArgs {
    fn tokenizer(&self) -> Result<Tokenizer> {
        let mut tokenizer = tokenizer(&self.model, self.revision.as_deref()).context("--model")?;
        if let Some(example) = &self.example_template {
            let eos = tokenizer
                .eos_token()
                .context("--example-template: the tokenizer has no eos_token to end answers")?;
            let template = ExampleTemplate::new(example, &eos.content)
                .and_then(|example| example.chat_template(&self.default_system_message))
                .context("--example-template")?;
            tokenizer.set_chat_template(template);
        }
        if let Some(template) = &self.chat_template {
            tokenizer.set_chat_template(chat_template(template)?);
        }
        Ok(tokenizer)
    }
}

/// Adds a column text: the conversation as the chat template renders it.
#[derive(Args, Debug)]
#[command(
    after_help = "Example:\n  ferrotune data apply-chat-template --dataset chats.jsonl --model DIR --output texts.jsonl"
)]
pub struct ApplyArgs {
    #[command(flatten)]
    pub source: SourceArgs,
    #[command(flatten)]
    pub template: TemplateArgs,
    /// End with the header of the assistant's next turn
    #[arg(long)]
    pub add_generation_prompt: bool,
    /// Keep the other columns
    #[arg(long)]
    pub keep_columns: bool,
    /// Print the Jinja template instead of reading a dataset's rows
    #[arg(long)]
    pub show_template: bool,
    /// File to write
    #[arg(long, value_name = "FILE", required_unless_present = "show_template")]
    pub output: Option<PathBuf>,
}

/// Runs what the flags ask for.
pub fn run_apply(args: ApplyArgs) -> Result<()> {
    let tokenizer = args.template.tokenizer()?;
    let template = tokenizer.chat_template().with_context(|| no_template(&tokenizer))?;
    let Some(output) = args.output.as_ref().filter(|_| !args.show_template) else {
        return writeln!(stdout(), "{}", template.source()).context("writing to stdout");
    };
    let rows = args.source.records()?.map(|record| {
        let record = record?;
        let text = render(&tokenizer, &record, args.add_generation_prompt)?;
        let mut row = if args.keep_columns { record.row } else { Default::default() };
        row.insert("text".to_owned(), text.into());
        Ok(row)
    });
    write(output, "rendering", rows)
}

fn no_template(tokenizer: &Tokenizer) -> String {
    format!(
        "{} has no chat template: give one with --chat-template or --example-template",
        tokenizer.dir().display()
    )
}

/// A conversation's text; a text stays as it is.
fn render(tokenizer: &Tokenizer, record: &Record, add_generation_prompt: bool) -> Result<String> {
    let place = || record.place.to_string();
    match RowOptions::default().example(&record.row, true).with_context(place)? {
        Example::Text(text) => Ok(text),
        Example::PromptCompletion { .. } => {
            bail!("{}: prompt and completion are texts: there is no conversation to render", place())
        }
        Example::Tokens { .. } => bail!("{}: the row is tokens already", place()),
        Example::Conversation(conversation) => {
            let template = tokenizer.chat_template().with_context(|| no_template(tokenizer))?;
            let options = RenderOptions {
                tools: conversation.tools.as_ref(),
                variables: Some(&conversation.variables),
                add_generation_prompt,
                ..Default::default()
            };
            template.render(&conversation.messages, &options).with_context(place)
        }
    }
}

/// Writes token ids with labels that are -100 but for the assistant's answers: a dataset that ferrotune train takes.
///
/// Answers are found by the markers around them, in rendered texts as well as in conversations; the markers are read off the
/// chat template if not given. (ferrotune train --assistant-only-loss needs no such file for conversations.)
#[derive(Args, Debug)]
#[command(
    after_help = "Example:\n  ferrotune data train-on-responses-only --dataset texts.jsonl --model DIR --output labels.parquet"
)]
pub struct ResponsesArgs {
    #[command(flatten)]
    pub source: SourceArgs,
    #[command(flatten)]
    pub template: TemplateArgs,
    /// What begins a question, such as '<|im_start|>user\n' (\n is a line break)
    #[arg(long, value_name = "TEXT", requires = "response_part")]
    pub instruction_part: Option<String>,
    /// What begins an answer
    #[arg(long, value_name = "TEXT", requires = "instruction_part")]
    pub response_part: Option<String>,
    /// Only the last answer of a row
    #[arg(long)]
    pub last_response_only: bool,
    /// File to write
    #[arg(long, value_name = "FILE")]
    pub output: PathBuf,
}

/// Runs what the flags ask for.
pub fn run_responses(args: ResponsesArgs) -> Result<()> {
    let tokenizer = args.template.tokenizer()?;
    let unescaped = |text: &str| text.replace("\\n", "\n");
    let markers = match (&args.instruction_part, &args.response_part) {
        (Some(instruction), Some(response)) => ResponseMarkers {
            instruction_part: unescaped(instruction),
            response_part: unescaped(response),
            eos_token: tokenizer.eos_token().map(|token| token.content.clone()),
        },
        _ => ResponseMarkers::detect(&tokenizer)?,
    };
    if markers.instruction_part.is_empty() || markers.response_part.is_empty() {
        bail!(Error::Usage("--instruction-part and --response-part must not be empty".to_owned()));
    }
    let (mut masked, mut kept) = (0u64, 0u64);
    let rows = args.source.records()?.filter_map(|record| {
        let row = record.and_then(|record| {
            let text = render(&tokenizer, &record, false)?;
            markers
                .encode(&tokenizer, &text, args.last_response_only)
                .with_context(|| record.place.to_string())
        });
        let (ids, trained) = match row {
            Ok(row) => row,
            Err(error) => return Some(Err(error)),
        };
        if !trained.contains(&true) {
            masked += 1;
            return None;
        }
        kept += 1;
        let labels: Vec<i64> = ids
            .iter()
            .zip(&trained)
            .map(|(id, trained)| if *trained { i64::from(*id) } else { -100 })
            .collect();
        let mut row = crate::data::Row::new();
        row.insert("input_ids".to_owned(), json!(ids));
        row.insert("labels".to_owned(), json!(labels));
        Some(Ok(row))
    });
    let rows: Box<dyn Iterator<Item = _>> = Box::new(rows);
    let result = write(&args.output, "masking", rows);
    result?;
    let ResponseMarkers { instruction_part, response_part, .. } = &markers;
    writeln!(
        stdout(),
        "markers {instruction_part:?} and {response_part:?}; {masked} rows dropped, in which no answer was found"
    )?;
    if kept == 0 {
        bail!(
            "all labels of all rows are masked: give the markers with --instruction-part and --response-part"
        );
    }
    Ok(())
}
