use std::collections::BTreeMap;
use std::fs;
use std::ops::Range;
use std::path::Path;
use std::sync::LazyLock;

use anyhow::{Context, Result, anyhow, bail};
use chrono::NaiveDateTime;
use fancy_regex::Regex;
use minijinja::value::Serde;
use minijinja::{Environment, Error, Value as JinjaValue};
use serde_json::{Map, Value};

use super::python;
use super::tokenizer::TEMPLATE_FILES;

/// What a conversation is rendered with besides its messages: the arguments of `apply_chat_template`.
#[derive(Clone, Copy, Debug, Default)]
pub struct RenderOptions<'a> {
    /// JSON schemas of the tools that the model may call, a list.
    pub tools: Option<&'a Value>,
    /// Documents for retrieval templates, a list of `{title, text}`.
    pub documents: Option<&'a Value>,
    /// Ends with the header of the assistant's next turn.
    pub add_generation_prompt: bool,
    /// Leaves the last message open, so that a model goes on with it.
    pub continue_final_message: bool,
    /// More variables for the template (`chat_template_kwargs`), such as `enable_thinking`.
    pub variables: Option<&'a Map<String, Value>>,
}

/// A rendered conversation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rendered {
    /// The text, special tokens included.
    pub text: String,
    /// Byte ranges of `text` that came from `{% generation %}` blocks, in order; neighbours are one.
    pub generation: Vec<Range<usize>>,
}

/// A checkpoint's chat template, rendered as transformers' `apply_chat_template` renders it.
#[derive(Clone)]
pub struct ChatTemplate {
    env: Environment<'static>,
    source: String,
    origin: String,
    /// Uses the filter `safe`.
    marks_safe: bool,
    variables: BTreeMap<String, String>,
    now: NaiveDateTime,
    /// By template name, the byte ranges of the rewritten source that stand in generation blocks.
    generation: BTreeMap<String, Vec<Range<usize>>>,
}

const DEFAULT: &str = "default";
/// The named template that transformers prefers when tools are given.
const TOOL_USE: &str = "tool_use";

static GENERATION_TAG: LazyLock<Regex> = LazyLock::new(|| {
    // A comment is matched as a whole, so that a tag in it is none.
    Regex::new(r"(?s)\{#.*?#\}|(\{%[-+]?\s*)(end)?generation(\s*[-+]?%\})").expect("the pattern is valid")
});

impl ChatTemplate {
    /// Compiles `source`; `origin` names it in errors (a file, as a rule).
    pub fn new(source: &str, origin: &str) -> Result<ChatTemplate> {
        Self::from_named(&[(DEFAULT.to_owned(), source.to_owned())], origin)
    }

    /// Another template with the variables and the date of this one.
    pub fn with_source(&self, source: &str, origin: &str) -> Result<ChatTemplate> {
        let mut other = Self::new(source, origin)?;
        other.variables.clone_from(&self.variables);
        other.set_now(self.now);
        Ok(other)
    }

    /// Reads a Jinja file.
    pub fn from_file(path: &Path) -> Result<ChatTemplate> {
        let source = fs::read_to_string(path)
            .with_context(|| format!("reading the chat template {}", path.display()))?;
        Self::new(&source, &path.display().to_string())
    }

    /// The template of a checkpoint folder whose `tokenizer_config.json` is `config`; files win over the JSON key.
    pub(super) fn from_checkpoint(dir: &Path, config: &Value) -> Result<Option<ChatTemplate>> {
        let [file, tool_use] = TEMPLATE_FILES.map(|name| dir.join(name));
        if file.is_file() {
            let mut named = vec![(DEFAULT.to_owned(), file.clone())];
            if tool_use.is_file() {
                named.push((TOOL_USE.to_owned(), tool_use));
            }
            let named = named
                .into_iter()
                .map(|(name, path)| {
                    let source = fs::read_to_string(&path)
                        .with_context(|| format!("reading the chat template {}", path.display()))?;
                    Ok((name, source))
                })
                .collect::<Result<Vec<_>>>()?;
            return Self::from_named(&named, &file.display().to_string()).map(Some);
        }
        let origin = format!("{} (chat_template)", dir.join("tokenizer_config.json").display());
        match &config["chat_template"] {
            Value::Null => Ok(None),
            Value::String(source) => Self::new(source, &origin).map(Some),
            Value::Array(list) => {
                let named = list
                    .iter()
                    .map(|item| {
                        Some((item["name"].as_str()?.to_owned(), item["template"].as_str()?.to_owned()))
                    })
                    .collect::<Option<Vec<_>>>()
                    .with_context(|| format!("{origin}: expected a list of {{name, template}}"))?;
                Self::from_named(&named, &origin).map(Some)
            }
            _ => bail!("{origin}: expected a string or a list of {{name, template}}"),
        }
    }

    fn from_named(named: &[(String, String)], origin: &str) -> Result<ChatTemplate> {
        // `~` joins the text of what it is given, `+` escapes it: see `python::MARKUP_START`.
        let holds = |word: &str| named.iter().any(|(_, source)| source.contains(word));
        let marks_safe = holds("safe") && !holds(" ~ ");
        let mut env = python::environment(marks_safe);
        let mut default = None;
        let mut generation = BTreeMap::new();
        for (name, source) in named {
            let (rewritten, blocks) = open_generation_blocks(source);
            env.add_template_owned(name.clone(), rewritten).map_err(|error| explain(&error, origin))?;
            generation.insert(name.clone(), blocks);
            if name == DEFAULT {
                default = Some(source.clone());
            }
        }
        let source = default.with_context(|| {
            let names: Vec<&str> = named.iter().map(|(name, _)| name.as_str()).collect();
            format!("{origin}: no template is named \"default\", only {names:?}; choose one with --chat-template FILE")
        })?;
        let now = chrono::Local::now().naive_local();
        python::set_now(&mut env, now);
        Ok(ChatTemplate {
            env,
            source,
            origin: origin.to_owned(),
            marks_safe,
            variables: BTreeMap::new(),
            now,
            generation,
        })
    }

    /// The Jinja text.
    pub fn source(&self) -> &str {
        &self.source
    }

    /// The names and Jinja texts of all its templates: the default one, and perhaps one for tools.
    pub(super) fn sources(&self) -> Vec<(&str, String)> {
        self.env.templates().map(|(name, template)| (name, template.source().to_owned())).collect()
    }

    /// Where it came from: a file, or a key of `tokenizer_config.json`.
    pub fn origin(&self) -> &str {
        &self.origin
    }

    /// Whether it marks the assistant's words with `{% generation %}`.
    pub fn marks_generation(&self) -> bool {
        self.generation.values().any(|blocks| !blocks.is_empty())
    }

    /// Gives the template a variable in every rendering, such as `bos_token`.
    pub fn set_variable(&mut self, name: &str, value: String) {
        self.variables.insert(name.to_owned(), value);
    }

    /// The local time that `strftime_now` shows: when the template was loaded, so that all of a run's conversations
    /// bear one date.
    pub fn now(&self) -> NaiveDateTime {
        self.now
    }

    /// Sets [`now`](Self::now), so that a resumed run renders what the first one did.
    pub fn set_now(&mut self, now: NaiveDateTime) {
        self.now = now;
        python::set_now(&mut self.env, now);
    }

    /// The text of `messages`, each an object with `role` and, as a rule, `content`.
    ///
    /// # Errors
    /// The template's own `raise_exception`, or what the template cannot do with these messages, with its line.
    pub fn render(&self, messages: &[Value], options: &RenderOptions) -> Result<String> {
        Ok(self.render_spans(messages, options)?.text)
    }

    /// As [`render`](Self::render), with the ranges of `{% generation %}` blocks.
    pub fn render_spans(&self, messages: &[Value], options: &RenderOptions) -> Result<Rendered> {
        if options.continue_final_message {
            return self.render_open(messages, options);
        }
        let name = match options.tools {
            Some(_) if self.env.get_template(TOOL_USE).is_ok() => TOOL_USE,
            _ => DEFAULT,
        };
        let mut context = BTreeMap::new();
        for (name, value) in &self.variables {
            context.insert(name.as_str(), JinjaValue::from(value.as_str()));
        }
        if self.marks_safe && messages.iter().any(|one| one.to_string().contains(python::MARKUP_START)) {
            bail!(
                "chat template {}: a message holds U+FDD0, which stands for something else here",
                self.origin
            );
        }
        let messages: Vec<Value> = messages.iter().map(with_reasoning_names).collect();
        context.insert("messages", JinjaValue::from(Serde(messages)));
        context.insert("tools", JinjaValue::from(Serde(options.tools)));
        context.insert("documents", JinjaValue::from(Serde(options.documents)));
        context.insert("add_generation_prompt", JinjaValue::from(options.add_generation_prompt));
        for (name, value) in options.variables.into_iter().flatten() {
            context.insert(name, JinjaValue::from(Serde(value)));
        }
        let blocks = self.generation.get(name).map_or(&[][..], Vec::as_slice);
        let rendered = self.env.get_template(name).and_then(|template| {
            if blocks.is_empty() {
                return Ok(Rendered { text: template.render(context)?, generation: Vec::new() });
            }
            let (text, spans) = template.render_with_spans(context)?;
            let mut generation: Vec<Range<usize>> = Vec::new();
            for span in spans {
                let source = span.source_range();
                if blocks.iter().any(|block| block.start <= source.start && source.end <= block.end) {
                    let output = span.output_range();
                    match generation.last_mut() {
                        Some(last) if last.end == output.start => last.end = output.end,
                        _ => generation.push(output),
                    }
                }
            }
            Ok(Rendered { text, generation })
        });
        rendered.map_err(|error| explain(&error, &self.origin))
    }

    /// Renders with a tag behind the last message and cuts there, as transformers does.
    fn render_open(&self, messages: &[Value], options: &RenderOptions) -> Result<Rendered> {
        const TAG: &str = "CONTINUE_FINAL_MESSAGE_TAG ";
        if options.add_generation_prompt {
            bail!("continue_final_message and add_generation_prompt exclude each other");
        }
        let mut messages = messages.to_vec();
        let last = messages.last_mut().context("continue_final_message: the conversation is empty")?;
        let content = match &mut last["content"] {
            Value::String(text) => Some(text),
            Value::Array(parts) => parts.iter_mut().rev().find_map(|part| match part.get_mut("text") {
                Some(Value::String(text)) => Some(text),
                _ => None,
            }),
            _ => None,
        };
        let content = content.context("continue_final_message: the last message has no text to continue")?;
        let kept = content.trim().to_owned();
        content.push_str(TAG);
        let mut rendered =
            self.render_spans(&messages, &RenderOptions { continue_final_message: false, ..*options })?;
        let cut = rendered.text.rfind(TAG.trim_end()).filter(|_| rendered.text.contains(&kept));
        let cut = cut.with_context(|| {
            format!("{}: continue_final_message: the template does not show the last message", self.origin)
        })?;
        let whole = rendered.text[cut..].starts_with(TAG);
        rendered.text.truncate(cut);
        if !whole {
            // The template trims messages, so what is left of the space before the tag goes as well.
            rendered.text.truncate(rendered.text.trim_end().len());
        }
        let end = rendered.text.len();
        rendered.generation.retain(|span| span.start < end);
        if let Some(span) = rendered.generation.last_mut() {
            span.end = span.end.min(end);
        }
        Ok(rendered)
    }
}

/// MiniJinja does not know `{% generation %}`: it becomes `{% with %}`, a scope of its own, as transformers makes it. Also
/// gives the ranges of the new source that stand inside.
fn open_generation_blocks(source: &str) -> (String, Vec<Range<usize>>) {
    let (mut rewritten, mut blocks) = (String::new(), Vec::new());
    let (mut copied, mut open) = (0, None);
    for tag in GENERATION_TAG.captures_iter(source).flatten().filter(|tag| tag.get(1).is_some()) {
        let whole = tag.get(0).expect("group 0 is the match");
        rewritten.push_str(&source[copied..whole.start()]);
        copied = whole.end();
        let closes = tag.get(2).is_some();
        if let (true, Some(start)) = (closes, open.take()) {
            blocks.push(start..rewritten.len());
        }
        rewritten.push_str(&tag[1]);
        rewritten.push_str(if closes { "endwith" } else { "with generation__ = true" });
        rewritten.push_str(&tag[3]);
        if !closes {
            open = Some(rewritten.len());
        }
    }
    rewritten.push_str(&source[copied..]);
    (rewritten, blocks)
}

/// `reasoning_content`, `thinking` and `reasoning` are one thing; transformers gives templates the first two.
fn with_reasoning_names(message: &Value) -> Value {
    let mut message = message.clone();
    if let Value::Object(fields) = &mut message {
        let reasoning = ["reasoning_content", "thinking", "reasoning"]
            .into_iter()
            .find_map(|name| fields.get(name).filter(|value| !value.is_null()))
            .cloned();
        if let Some(reasoning) = reasoning {
            fields.entry("thinking").or_insert_with(|| reasoning.clone());
            fields.insert("reasoning_content".to_owned(), reasoning);
        }
    }
    message
}

fn explain(error: &Error, origin: &str) -> anyhow::Error {
    let mut reason = error.detail().map_or_else(|| error.kind().to_string(), str::to_owned);
    let mut source = std::error::Error::source(error);
    while let Some(inner) = source {
        reason = format!("{reason}: {inner}");
        source = inner.source();
    }
    match error.line() {
        Some(line) => anyhow!("chat template {origin}, line {line}: {reason}"),
        None => anyhow!("chat template {origin}: {reason}"),
    }
}
