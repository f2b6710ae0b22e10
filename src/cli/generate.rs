//! `ferrotune generate`: answers to one prompt, to a file of them, or to what is piped in.

use std::collections::BTreeMap;
use std::io::{self, IsTerminal, Read, Write};
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use clap::Args;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde_json::{Map, Value, json};

use super::answers::AnswerFile;
use super::engine_args::EngineArgs;
use super::format::{count, rate, seconds};
use super::model_args::ModelArgs;
use super::sampling_args::SamplingArgs;
use crate::data::Records;
use crate::error::Error;
use crate::generate::{Engine, EngineOptions, EngineStats, Generation, Request, SamplingParams};
use crate::models::FastLanguageModel;

const MAX_NEW_TOKENS: usize = 256;
/// To one prompt.
const MOST_ANSWERS: usize = 65_536;
/// What an answer puts into its row.
const OUTPUT_FIELDS: [&str; 4] = ["completion", "finish_reason", "prompt_tokens", "completion_tokens"];
const EXAMPLES: &str = "Examples:
  ferrotune generate --model DIR --prompt 'Why is the sky blue?' --temperature 0.7
  ferrotune generate --model DIR --adapter runs/mine --prompt-file questions.jsonl --output answers.jsonl
  echo 'Once upon a time' | ferrotune generate --model DIR --raw --max-new-tokens 50";

/// Answers one prompt, a file of prompts, or what is piped in.
///
/// One answer is streamed to stdout as text; several are JSON lines: the prompt's fields with `completion`,
/// `finish_reason`, `prompt_tokens` and `completion_tokens` (fields of these names are replaced). The speed goes to stderr.
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
    #[arg(long, visible_alias = "n", value_name = "N", help_heading = "Output", default_value_t = 1)]
    pub num_return_sequences: usize,
    /// Write the answers to this file, as JSON lines. They grow in FILE.unfinished, where the same command again goes on; once they
    /// are whole FILE is replaced
    #[arg(long, value_name = "FILE", help_heading = "Output")]
    pub output: Option<PathBuf>,
    #[command(flatten)]
    pub engine: EngineArgs,
}

/// One thing to answer: the fields of its row, which go into the output, and its tokens.
struct Prompt {
    row: Map<String, Value>,
    input_ids: Vec<i64>,
}

/// Runs what the flags ask for.
pub fn run(args: GenerateArgs) -> Result<()> {
    if !(1..=MOST_ANSWERS).contains(&args.num_return_sequences) {
        let n = args.num_return_sequences;
        bail!(Error::Usage(format!("--num-return-sequences (--n) is {n}, expected 1 to {MOST_ANSWERS}")));
    }
    if let (Some(output), Some(prompts)) = (&args.output, &args.prompt_file)
        && let (Ok(output), Ok(prompts)) = (output.canonicalize(), prompts.canonicalize())
        && output == prompts
    {
        bail!(Error::Usage("--output is the file of --prompt-file: name another one".into()));
    }
    let rows = rows(&args)?;
    let mut model = args.model.load(None)?;
    model.for_inference()?;
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
    let started = Instant::now();
    let stats = match answer(&args, &model, &prompts, &mut params) {
        // Whoever read our output has seen enough.
        Err(error) if is_broken_pipe(&error) => return Ok(()),
        stats => stats?,
    };
    eprintln!("{}", summary(&stats, started.elapsed().as_secs_f64(), &params));
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
    let context = model.decoder.config.max_position_embeddings as usize;
    if input_ids.len() >= context {
        bail!("the prompt has {} tokens, the model's context is {context}: shorten it", input_ids.len());
    }
    Ok(Prompt { row, input_ids })
}

fn with_system(system: Option<&str>, messages: Vec<Value>) -> Vec<Value> {
    let system = system.map(|text| json!({"role": "system", "content": text}));
    let own = messages.first().is_some_and(|first| first["role"] == "system");
    system.filter(|_| !own).into_iter().chain(messages).collect()
}

/// Answers all prompts, side by side; returns what the engine did.
fn answer(
    args: &GenerateArgs,
    model: &FastLanguageModel,
    prompts: &[Prompt],
    params: &mut SamplingParams,
) -> Result<EngineStats> {
    let n = args.num_return_sequences;
    let options = args.engine.options(&model.decoder)?;
    let mut engine = Engine::new(
        &model.decoder,
        EngineOptions {
            // A short job needs little.
            max_num_seqs: options.max_num_seqs.max(n).min(n.saturating_mul(prompts.len())),
            ..options
        },
    )?;
    let mut out = io::stdout();
    if args.output.is_none() && prompts.len() == 1 && n == 1 {
        for token in engine.stream(model, &prompts[0].input_ids, params)? {
            let text = token?.text;
            out.write_all(text.as_bytes()).and_then(|()| out.flush()).context("writing to stdout")?;
        }
        writeln!(out).context("writing to stdout")?;
        return Ok(engine.stats());
    }
    let (mut file, done) = match &args.output {
        Some(path) => {
            let (file, done) = resume(args, path, prompts, params)?;
            (Some(file), done)
        }
        None => (None, 0),
    };
    let bar = answer_bar(prompts.len(), done)?;
    let requests = prompts[done..].iter().map(|prompt| Ok(Request::samples(&prompt.input_ids, params, n)));
    // Answers end in any order and are written in that of the prompts.
    let mut waiting: BTreeMap<usize, String> = BTreeMap::new();
    let mut next = 0;
    let ahead = 2 * options.max_num_seqs;
    engine.run_each(model, requests, ahead, &mut |_, _, _| (), &mut |at, generations| {
        let row = &prompts[done + at].row;
        waiting.insert(at, generations.into_iter().map(|generation| json_line(row, generation)).collect());
        bar.inc(1);
        while let Some(lines) = waiting.remove(&next) {
            next += 1;
            match &mut file {
                Some(file) => file.push(&lines)?,
                None => out.write_all(lines.as_bytes()).context("writing to stdout")?,
            }
        }
        Ok(())
    })?;
    bar.finish_and_clear();
    if let Some(file) = file {
        file.finish()?;
    }
    Ok(engine.stats())
}

/// The file of `--output`, and how many prompts are answered in it: by a run with the same prompts and settings that did not
/// come to its end. A seed that was not given is that run's.
fn resume(
    args: &GenerateArgs,
    path: &Path,
    prompts: &[Prompt],
    params: &mut SamplingParams,
) -> Result<(AnswerFile, usize)> {
    let n = args.num_return_sequences;
    let settings = |seed: u64| {
        let params = SamplingParams { seed, ..params.clone() };
        json!({"model": args.model.model, "adapter": args.model.adapter, "n": n, "seed": seed, "params": format!("{params:?}")})
    };
    let file = AnswerFile::open(path, settings(params.seed), n)?;
    let (begun, rows) = (&file.begun, &file.rows);
    let shown = file.beside().display().to_string();
    let seed = begun["seed"].as_u64().filter(|_| args.sampling.seed.is_none()).unwrap_or(params.seed);
    if *begun != settings(seed) {
        bail!(
            "--output: {shown} was begun with other settings ({begun}): run the same command again, or remove the file to \
             start anew"
        );
    }
    params.seed = seed;
    let done = rows.len() / n;
    for (at, (row, prompt)) in rows.chunks(n).zip(prompts).enumerate() {
        let same = |row: &Map<String, Value>| {
            let mut given = prompt.row.iter().filter(|(key, _)| !OUTPUT_FIELDS.contains(&key.as_str()));
            given.all(|(key, value)| row.get(key) == Some(value))
        };
        if !row.iter().all(same) {
            bail!("--output: {shown} answers other prompts, from row {} on: remove it to start anew", at + 1);
        }
    }
    if done > prompts.len() {
        bail!(
            "--output: {shown} holds {} answers to {} prompts: remove it to start anew",
            rows.len(),
            prompts.len()
        );
    }
    if done > 0 {
        eprintln!("continues after row {done} of {}", prompts.len());
    }
    Ok((file, done))
}

/// On a terminal.
fn answer_bar(prompts: usize, done: usize) -> Result<ProgressBar> {
    if !io::stderr().is_terminal() {
        return Ok(ProgressBar::hidden());
    }
    let style = ProgressStyle::with_template("{bar:20.cyan/blue} {pos}/{len} answered, ETA {eta}")?;
    let bar = ProgressBar::with_draw_target(Some(prompts as u64), ProgressDrawTarget::stderr());
    bar.set_position(done as u64);
    bar.reset_eta();
    Ok(bar.with_style(style))
}

fn json_line(row: &Map<String, Value>, generation: Generation) -> String {
    let mut row = row.clone();
    let values: [Value; 4] = [
        generation.text.into(),
        generation.finish_reason.name().into(),
        generation.prompt_tokens.into(),
        generation.token_ids.len().into(),
    ];
    row.extend(OUTPUT_FIELDS.map(str::to_owned).into_iter().zip(values));
    format!("{}\n", Value::Object(row))
}

/// `12 prompt tokens in 0.1s, 256 new tokens in 2.1s: 122 tokens/s, seed 17`; the rate is that of the steps that only chose
/// tokens, where prompts were not read beside all of them.
fn summary(stats: &EngineStats, elapsed: f64, params: &SamplingParams) -> String {
    let (prompt, new) = (count(stats.prompt_tokens + stats.found_tokens), count(stats.new_tokens));
    let mut text = if 2 * stats.decode_tokens > stats.new_tokens {
        format!(
            "{prompt} prompt tokens in {}, {new} new tokens in {}: {} tokens/s",
            seconds(stats.prefill_seconds),
            seconds(stats.decode_seconds),
            rate(stats.decode_tokens as f64 / stats.decode_seconds.max(1e-9)),
        )
    } else {
        let speed = rate(stats.new_tokens as f64 / elapsed.max(1e-9));
        format!("{prompt} prompt tokens and {new} new tokens in {}: {speed} new tokens/s", seconds(elapsed))
    };
    if params.temperature > 0.0 {
        text += &format!(", seed {}", params.seed);
    }
    text
}

/// Whether whoever read the output has left.
pub(super) fn is_broken_pipe(error: &anyhow::Error) -> bool {
    let is = |cause: &(dyn std::error::Error + 'static)| {
        cause.downcast_ref::<io::Error>().is_some_and(|error| error.kind() == io::ErrorKind::BrokenPipe)
    };
    error.chain().any(is)
}
