//! `ferrotune generate`: answers to one prompt, to a file of them, or to what is piped in.

use std::io::{self, IsTerminal, Read, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use clap::Args;
use serde_json::{Map, Value, json};

use super::format::{count, rate, seconds};
use super::model_args::ModelArgs;
use super::sampling_args::SamplingArgs;
use crate::data::Records;
use crate::error::Error;
use crate::generate::{Generation, SamplingParams};
use crate::io::write_atomically;
use crate::models::FastLanguageModel;

const MAX_NEW_TOKENS: usize = 256;
const EXAMPLES: &str = "Examples:
  ferrotune generate --model DIR --prompt 'Why is the sky blue?' --temperature 0.7
  ferrotune generate --model DIR --adapter runs/mine --prompt-file questions.jsonl --output answers.jsonl
  echo 'Once upon a time' | ferrotune generate --model DIR --raw --max-new-tokens 50";

/// Answers one prompt, a file of prompts, or what is piped in.
///
/// One answer is streamed to stdout as text; several are JSON lines: the prompt's fields with `completion`,
/// `finish_reason`, `prompt_tokens` and `completion_tokens`. The speed goes to stderr.
#[derive(Args, Debug)]
#[command(after_help = EXAMPLES)]
pub struct GenerateArgs {
    #[command(flatten)]
    pub model: ModelArgs,
    /// Prompt to answer [default: all of stdin is one prompt]
    #[arg(long, value_name = "TEXT", help_heading = "Prompt")]
    pub prompt: Option<String>,
    /// File of prompts: one a line, or a data file (json, jsonl, csv, parquet) whose rows have `prompt` or `messages`; a
    /// last message of the assistant is what is asked for, so it is left out
    #[arg(long, value_name = "FILE", help_heading = "Prompt", conflicts_with = "prompt")]
    pub prompt_file: Option<PathBuf>,
    /// Use the model's chat template, and fail if it has none [default: use it if there is one]
    #[arg(long, help_heading = "Prompt", conflicts_with = "raw")]
    pub chat: bool,
    /// Continue the plain text, without a chat template
    #[arg(long, help_heading = "Prompt")]
    pub raw: bool,
    /// System message before each prompt
    #[arg(long, value_name = "TEXT", help_heading = "Prompt", conflicts_with = "raw")]
    pub system: Option<String>,

    #[command(flatten)]
    pub sampling: SamplingArgs,
    /// Go on after tokens that end an answer, up to the longest answer
    #[arg(long, help_heading = "Output")]
    pub ignore_eos: bool,
    /// Answers to each prompt
    #[arg(long, value_name = "N", help_heading = "Output", default_value_t = 1)]
    pub num_return_sequences: usize,
    /// Write the answers to this file, as JSON lines
    #[arg(long, value_name = "FILE", help_heading = "Output")]
    pub output: Option<PathBuf>,
}

/// One thing to answer: the fields of its row, which go into the output, and its tokens.
struct Prompt {
    row: Map<String, Value>,
    input_ids: Vec<i64>,
}

/// Tokens and seconds of all answers.
#[derive(Default)]
struct Speed {
    prompt_tokens: usize,
    new_tokens: usize,
    prefill_seconds: f64,
    decode_seconds: f64,
}

/// Runs what the flags ask for.
pub fn run(args: GenerateArgs) -> Result<()> {
    if args.num_return_sequences == 0 {
        bail!(Error::Usage("--num-return-sequences is 0, expected at least 1".into()));
    }
    let rows = rows(&args)?;
    let model = args.model.load(None)?;
    let mut params = args.sampling.params(&model, MAX_NEW_TOKENS)?;
    if args.ignore_eos {
        params.stop_token_ids.clear();
    }
    let chat = uses_template(&args, &model)?;
    // All of them first: a bad row is found before an hour of answers.
    let prompts = rows
        .into_iter()
        .map(|(place, row)| prompt(&model, row, chat, args.system.as_deref()).context(place))
        .collect::<Result<Vec<_>>>()?;
    let speed = match answer(&args, &model, &prompts, &params) {
        // Whoever read our output has seen enough.
        Err(error) if is_broken_pipe(&error) => return Ok(()),
        speed => speed?,
    };
    eprintln!("{}", summary(&speed, &params));
    Ok(())
}

/// The rows to answer, each with the words that name it in errors.
fn rows(args: &GenerateArgs) -> Result<Vec<(String, Map<String, Value>)>> {
    let row = |prompt: &str| Map::from_iter([("prompt".to_string(), Value::from(prompt))]);
    if let Some(prompt) = &args.prompt {
        return Ok(vec![("--prompt".into(), row(prompt))]);
    }
    let Some(file) = &args.prompt_file else {
        if io::stdin().is_terminal() {
            let advice = "no prompt: give --prompt or --prompt-file, or pipe a text in (ferrotune chat talks to a model)";
            bail!(Error::Usage(advice.into()));
        }
        let mut prompt = String::new();
        io::stdin().read_to_string(&mut prompt).context("reading the prompt from stdin")?;
        // The line break is the shell's, not the user's.
        let prompt = prompt.strip_suffix('\n').unwrap_or(&prompt);
        return Ok(vec![("stdin".into(), row(prompt))]);
    };
    let shown = file.display().to_string();
    let rows: Vec<_> = if is_data(file) {
        Records::open(std::slice::from_ref(&shown))?
            .map(|record| record.map(|record| (record.place.to_string(), record.row)))
            .collect::<Result<_>>()?
    } else {
        let text =
            std::fs::read_to_string(file).with_context(|| format!("--prompt-file: reading {shown}"))?;
        let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
        lines.map(|(number, line)| (format!("{shown}, line {}", number + 1), row(line))).collect()
    };
    if rows.is_empty() {
        bail!("--prompt-file: {shown} has no prompts");
    }
    Ok(rows)
}

fn is_data(file: &Path) -> bool {
    let name = file.to_string_lossy().to_lowercase();
    let name = name.trim_end_matches(".gz").trim_end_matches(".zst");
    [".json", ".jsonl", ".csv", ".parquet"].iter().any(|ending| name.ends_with(ending))
}

/// Whether prompts go through the chat template.
fn uses_template(args: &GenerateArgs, model: &FastLanguageModel) -> Result<bool> {
    let has_template = model.tokenizer()?.chat_template().is_some();
    if (args.chat || args.system.is_some()) && !has_template {
        bail!("{}: the checkpoint has no chat template; leave out --chat and --system", model.dir.display());
    }
    Ok(has_template && !args.raw)
}

fn prompt(
    model: &FastLanguageModel,
    row: Map<String, Value>,
    chat: bool,
    system: Option<&str>,
) -> Result<Prompt> {
    let given = row
        .get("messages")
        .or_else(|| row.get("prompt"))
        .context("the row has neither prompt nor messages")?;
    let input_ids = match given {
        Value::String(text) if !chat => model.prompt_ids(text)?,
        Value::String(text) => {
            model.chat_ids(&with_system(system, vec![json!({"role": "user", "content": text})]))?
        }
        Value::Array(_) if !chat => bail!("the row holds messages, which need a chat template"),
        Value::Array(messages) => {
            let mut messages = messages.clone();
            messages.pop_if(|last| last["role"] == "assistant");
            if messages.is_empty() {
                bail!("the row holds no message to answer");
            }
            model.chat_ids(&with_system(system, messages))?
        }
        other => bail!("the prompt is {other}, expected a text or a list of messages"),
    };
    Ok(Prompt { row, input_ids })
}

fn with_system(system: Option<&str>, messages: Vec<Value>) -> Vec<Value> {
    let system = system.map(|text| json!({"role": "system", "content": text}));
    let own = messages.first().is_some_and(|first| first["role"] == "system");
    system.filter(|_| !own).into_iter().chain(messages).collect()
}

fn answer(
    args: &GenerateArgs,
    model: &FastLanguageModel,
    prompts: &[Prompt],
    params: &SamplingParams,
) -> Result<Speed> {
    let mut speed = Speed::default();
    let mut out = io::stdout();
    let streamed = args.output.is_none() && prompts.len() == 1 && args.num_return_sequences == 1;
    let mut lines = String::new();
    for Prompt { row, input_ids } in prompts {
        if streamed {
            let mut written = Ok(());
            let generation = model.generate(input_ids, params, |token| {
                if written.is_ok() {
                    written = out.write_all(token.text.as_bytes()).and_then(|()| out.flush());
                }
            })?;
            written.and_then(|()| writeln!(out)).context("writing to stdout")?;
            speed.add(&generation);
            continue;
        }
        let generations = model.generate_several(input_ids, params, args.num_return_sequences, |_, _| ())?;
        for generation in generations {
            speed.add(&generation);
            let line = json_line(row, generation);
            match args.output {
                Some(_) => lines += &line,
                None => out.write_all(line.as_bytes()).context("writing to stdout")?,
            }
        }
    }
    if let Some(file) = &args.output {
        write_atomically(file, lines.as_bytes())?;
    }
    Ok(speed)
}

fn json_line(row: &Map<String, Value>, generation: Generation) -> String {
    let mut row = row.clone();
    row.insert("completion".into(), generation.text.into());
    row.insert("finish_reason".into(), generation.finish_reason.name().into());
    row.insert("prompt_tokens".into(), generation.prompt_tokens.into());
    row.insert("completion_tokens".into(), generation.token_ids.len().into());
    format!("{}\n", Value::Object(row))
}

impl Speed {
    fn add(&mut self, generation: &Generation) {
        self.prompt_tokens += generation.prompt_tokens;
        self.new_tokens += generation.token_ids.len();
        self.prefill_seconds += generation.prefill_seconds;
        self.decode_seconds += generation.decode_seconds;
    }
}

/// `12 prompt tokens in 0.1s, 256 new tokens in 2.1s: 122 tokens/s, seed 17`
fn summary(speed: &Speed, params: &SamplingParams) -> String {
    let mut text = format!(
        "{} prompt tokens in {}, {} new tokens in {}: {} tokens/s",
        count(speed.prompt_tokens as u64),
        seconds(speed.prefill_seconds),
        count(speed.new_tokens as u64),
        seconds(speed.decode_seconds),
        rate(speed.new_tokens as f64 / speed.decode_seconds.max(1e-9)),
    );
    if params.temperature > 0.0 {
        text += &format!(", seed {}", params.seed);
    }
    text
}

fn is_broken_pipe(error: &anyhow::Error) -> bool {
    let is = |cause: &(dyn std::error::Error + 'static)| {
        cause.downcast_ref::<io::Error>().is_some_and(|error| error.kind() == io::ErrorKind::BrokenPipe)
    };
    error.chain().any(is)
}
