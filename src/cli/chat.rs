//! `ferrotune chat`: a conversation in the terminal.

use std::io::{BufRead, IsTerminal, Write, stdin, stdout};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result, bail};
use clap::Args;
use rustyline::DefaultEditor;
use rustyline::error::ReadlineError;
use serde_json::{Value, json};
use signal_hook::consts::SIGINT;

use super::engine_args::kv_bytes;
use super::generate::is_broken_pipe;
use super::model_args::ModelArgs;
use super::sampling_args::SamplingArgs;
use crate::device;
use crate::generate::{Engine, EngineOptions, KvBudget, SamplingParams};
use crate::io::write_atomically;
use crate::models::FastLanguageModel;
use crate::train::Size;

const MAX_NEW_TOKENS: usize = 1024;
const COMMANDS: &str = "\
/reset         forget the conversation
/system TEXT   start anew with this system message; without TEXT, with none
/save FILE     write the conversation as JSON: {\"messages\": [..]}
/help          show this
/exit          leave, as Ctrl-D does; Ctrl-C stops an answer";

/// Talks to a model in the terminal, turn by turn.
///
/// What was said stays in the KV cache: each turn reads only what is new. Ctrl-C stops an answer; /help lists the
/// commands.
#[derive(Args, Debug)]
#[command(after_help = "Example:\n  ferrotune chat --model DIR --adapter runs/mine --temperature 0.7")]
pub struct ChatArgs {
    #[command(flatten)]
    pub model: ModelArgs,
    /// System message at the start
    #[arg(long, value_name = "TEXT")]
    pub system: Option<String>,
    #[command(flatten)]
    pub sampling: SamplingArgs,
    /// Memory for keys and values, such as 4GiB [default: a quarter of the host's free memory, 85 % of a GPU's]
    #[arg(long, value_name = "SIZE")]
    pub kv_cache_memory: Option<Size>,
}

/// Runs the conversation until the user leaves.
pub fn run(args: ChatArgs) -> Result<()> {
    let mut model = args.model.load(None)?;
    model.for_inference()?;
    if model.tokenizer()?.chat_template().is_none() {
        bail!(
            "{}: the checkpoint has no chat template, so it cannot chat; continue plain texts with ferrotune generate",
            model.dir.display()
        );
    }
    let params = args.sampling.params(&model, MAX_NEW_TOKENS)?;
    let interrupted = Arc::new(AtomicBool::new(false));
    signal_hook::flag::register(SIGINT, interrupted.clone()).context("installing the handler of Ctrl-C")?;

    let mut chat = Chat {
        engine: Engine::new(
            &model.decoder,
            EngineOptions::new(KvBudget::Bytes(kv_bytes(args.kv_cache_memory, model.decoder.device)?), 1),
        )?,
        model: &model,
        params,
        messages: Vec::new(),
        interrupted,
    };
    chat.start(args.system.as_deref());
    let talked = Input::open().and_then(|input| {
        if let Input::Terminal(_) = input {
            say(&format!(
                "{} on {}. /help lists commands.",
                args.model.model,
                device::describe(model.decoder.device)
            ))?;
        }
        talk(&mut chat, input)
    });
    match talked {
        Err(error) if is_broken_pipe(&error) => Ok(()),
        talked => talked,
    }
}

fn talk(chat: &mut Chat, mut input: Input) -> Result<()> {
    while let Some(line) = input.line()? {
        let line = line.trim();
        let done = match line.strip_prefix('/') {
            _ if line.is_empty() => continue,
            Some("exit") => return Ok(()),
            Some(command) => chat.command(command),
            None => chat.turn(line),
        };
        match done {
            Err(error) if is_broken_pipe(&error) => return Err(error),
            // A bad command or a turn that did not work ends nothing.
            Err(error) => eprintln!("error: {error:#}"),
            Ok(()) => {}
        }
    }
    Ok(())
}

fn say(text: &str) -> Result<()> {
    writeln!(stdout(), "{text}").context("writing to stdout")
}

/// Where the user's lines come from.
enum Input {
    Terminal(Box<DefaultEditor>),
    /// Of a file or another program, with the number of its last line.
    Pipe(usize),
}

impl Input {
    fn open() -> Result<Input> {
        if !stdin().is_terminal() {
            return Ok(Input::Pipe(0));
        }
        Ok(Input::Terminal(Box::new(DefaultEditor::new().context("opening the terminal")?)))
    }

    /// The next line; none at the end.
    fn line(&mut self) -> Result<Option<String>> {
        match self {
            Input::Terminal(editor) => loop {
                match editor.readline("> ") {
                    Ok(line) => {
                        // History is a convenience: a line that cannot be kept is no reason to stop.
                        let _ = editor.add_history_entry(line.trim());
                        return Ok(Some(line));
                    }
                    Err(ReadlineError::Interrupted) => say("(/exit or Ctrl-D leaves)")?,
                    Err(ReadlineError::Eof) => return Ok(None),
                    Err(error) => return Err(error).context("reading from the terminal"),
                }
            },
            Input::Pipe(number) => {
                let mut bytes = Vec::new();
                *number += 1;
                if stdin().lock().read_until(b'\n', &mut bytes).context("reading from stdin")? == 0 {
                    return Ok(None);
                }
                let text = String::from_utf8(bytes);
                text.map(Some).with_context(|| format!("stdin, line {number}: expected text in UTF-8"))
            }
        }
    }
}

struct Chat<'a> {
    model: &'a FastLanguageModel,
    params: SamplingParams,
    messages: Vec<Value>,
    /// What was said stays in its pages.
    engine: Engine,
    /// Raised by Ctrl-C.
    interrupted: Arc<AtomicBool>,
}

impl Chat<'_> {
    fn start(&mut self, system: Option<&str>) {
        self.messages = system.map(|text| json!({"role": "system", "content": text})).into_iter().collect();
    }

    fn command(&mut self, command: &str) -> Result<()> {
        let (name, rest) = command.split_once(char::is_whitespace).unwrap_or((command, ""));
        match (name, rest.trim()) {
            ("reset", _) => {
                self.messages.retain(|message| message["role"] == "system");
                say("(the conversation is forgotten)")?;
            }
            ("system", "") => {
                self.start(None);
                say("(no system message; the conversation starts anew)")?;
            }
            ("system", text) => {
                self.start(Some(text));
                say("(system message set; the conversation starts anew)")?;
            }
            ("save", "") => bail!("/save needs the name of a file"),
            ("save", file) => {
                let text = serde_json::to_string_pretty(&json!({"messages": self.messages}))?;
                write_atomically(Path::new(file), text.as_bytes())?;
                say(&format!("(saved to {file})"))?;
            }
            ("help", _) => say(COMMANDS)?,
            _ => bail!("/{name} is no command; /help lists them"),
        }
        Ok(())
    }

    /// Answers `text`; where that fails, the conversation stays as it was.
    fn turn(&mut self, text: &str) -> Result<()> {
        self.messages.push(json!({"role": "user", "content": text}));
        match self.answer() {
            Ok(answer) => {
                self.messages.push(json!({"role": "assistant", "content": answer}));
                // Another answer where the same question is asked again.
                self.params.seed = self.params.seed.wrapping_add(1);
                Ok(())
            }
            Err(error) => {
                self.messages.pop();
                Err(error.context("no answer; /reset starts anew"))
            }
        }
    }

    fn answer(&mut self) -> Result<String> {
        let input_ids = self.model.chat_ids(&self.messages)?;
        self.interrupted.store(false, Ordering::Relaxed);
        let mut answer = String::new();
        let mut out = stdout();
        for token in self.engine.stream(self.model, &input_ids, &self.params)? {
            let token = token?;
            out.write_all(token.text.as_bytes()).and_then(|()| out.flush()).context("writing to stdout")?;
            answer += &token.text;
            if self.interrupted.load(Ordering::Relaxed) {
                break;
            }
        }
        writeln!(out).context("writing to stdout")?;
        Ok(answer)
    }
}
