use std::fmt;
use std::str::FromStr;

use anyhow::{Context, Result, bail};
use serde_json::{Map, Value, json};

use super::IGNORE_INDEX;
use super::records::Row;

/// The shape of a dataset's rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DatasetFormat {
    /// A string in `text`.
    Text,
    /// TRL's `messages`: a list of `{role, content}`; optionally `tools` and `chat_template_kwargs`.
    Messages,
    /// TRL's `prompt` and `completion`: two strings, or two lists of messages.
    PromptCompletion,
    /// `conversations`: a list of `{from, value}`; optionally `system` and `tools`.
    ShareGpt,
    /// `instruction`, `output`; optionally `input`, `system` and `history`.
    Alpaca,
    /// `input_ids`, token ids; optionally `labels`, -100 where nothing is trained and else the same.
    Tokens,
}

impl DatasetFormat {
    /// All formats with their names and the columns they are known by.
    pub const ALL: [(DatasetFormat, &'static str, &'static str); 6] = [
        (DatasetFormat::Tokens, "tokens", "input_ids (+ labels)"),
        (DatasetFormat::Messages, "messages", "messages"),
        (DatasetFormat::ShareGpt, "sharegpt", "conversations"),
        (DatasetFormat::PromptCompletion, "prompt_completion", "prompt + completion"),
        (DatasetFormat::Alpaca, "alpaca", "instruction + output (+ input)"),
        (DatasetFormat::Text, "text", "text"),
    ];

    /// Its name on the command line.
    pub fn name(self) -> &'static str {
        DatasetFormat::ALL.iter().find(|(format, ..)| *format == self).map_or("", |(_, name, _)| name)
    }

    /// The format whose columns `row` has, the first of [`ALL`](Self::ALL) if there are several.
    pub fn recognise(row: &Row) -> Option<DatasetFormat> {
        let has = |name: &str| row.get(name).is_some_and(|value| !value.is_null());
        if has("input_ids") {
            Some(DatasetFormat::Tokens)
        } else if has("messages") {
            Some(DatasetFormat::Messages)
        } else if has("conversations") {
            Some(DatasetFormat::ShareGpt)
        } else if has("prompt") && has("completion") {
            Some(DatasetFormat::PromptCompletion)
        } else if has("instruction") && row.contains_key("output") {
            Some(DatasetFormat::Alpaca)
        } else if has("text") {
            Some(DatasetFormat::Text)
        } else {
            None
        }
    }
}

impl fmt::Display for DatasetFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for DatasetFormat {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<DatasetFormat> {
        match DatasetFormat::ALL.iter().find(|(_, name, _)| *name == text) {
            Some((format, ..)) => Ok(*format),
            None => bail!(
                "unknown dataset format {text:?}: expected one of {}",
                DatasetFormat::ALL.map(|(_, name, _)| name).join(", ")
            ),
        }
    }
}

/// How rows become examples.
#[derive(Clone, Debug, Default)]
pub struct RowOptions {
    /// The shape of the rows; recognised by their columns if not given.
    pub dataset_format: Option<DatasetFormat>,
    /// The column that holds whole texts, whatever else is there.
    pub text_column: Option<String>,
    /// A text with `{column}` placeholders (`{{` and `}}` are braces) that makes one text of each row.
    pub template: Option<String>,
}

/// A row, understood.
#[derive(Clone, Debug, PartialEq)]
pub enum Example {
    /// One text to learn whole.
    Text(String),
    /// A text to continue and how.
    PromptCompletion {
        /// The text before.
        prompt: String,
        /// The text to learn.
        completion: String,
    },
    /// Messages for the chat template.
    Conversation(Conversation),
    /// Tokens, as they are.
    Tokens {
        /// The token ids.
        input_ids: Vec<u32>,
        /// Which of them are trained, as many.
        trained: Vec<bool>,
    },
}

/// Messages and what the chat template wants beside them.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Conversation {
    /// Objects with `role`, `content`, perhaps `tool_calls` and the like.
    pub messages: Vec<Value>,
    /// How many of the messages are the prompt, in a prompt-completion row.
    pub prompt_messages: Option<usize>,
    /// The tools' JSON schemas.
    pub tools: Option<Value>,
    /// `chat_template_kwargs`: more variables for the template.
    pub variables: Map<String, Value>,
}

impl RowOptions {
    /// Understands `row`. An Alpaca row becomes messages if `chat` (there is a chat template), else the text of the
    /// original Alpaca prompt.
    ///
    /// # Errors
    /// Columns of no known shape, or values of the wrong type; the caller adds where the row stands.
    pub fn example(&self, row: &Row, chat: bool) -> Result<Example> {
        if let Some(template) = &self.template {
            return Ok(Example::Text(fill(template, row)?));
        }
        if let Some(column) = &self.text_column {
            return Ok(Example::Text(string(row, column).with_context(|| columns(row))?.to_owned()));
        }
        match self.dataset_format.or_else(|| DatasetFormat::recognise(row)) {
            Some(DatasetFormat::Text) => Ok(Example::Text(string(row, "text")?.to_owned())),
            Some(DatasetFormat::Messages) => {
                let mut conversation = conversation(row, messages(row, "messages")?)?;
                conversation.tools = tools(row)?;
                Ok(Example::Conversation(conversation))
            }
            Some(DatasetFormat::PromptCompletion) => prompt_completion(row),
            Some(DatasetFormat::ShareGpt) => share_gpt(row),
            Some(DatasetFormat::Alpaca) => alpaca(row, chat),
            Some(DatasetFormat::Tokens) => tokens(row),
            None => {
                let known: Vec<String> = DatasetFormat::ALL
                    .iter()
                    .map(|(_, name, columns)| format!("{columns} ({name})"))
                    .collect();
                bail!(
                    "{} are of no known shape. Known: {}. Name the text with --text-column COLUMN, or build it with \
                     --template 'Question: {{question}} ..'",
                    columns(row),
                    known.join("; ")
                )
            }
        }
    }
}

pub(super) fn columns(row: &Row) -> String {
    format!("the columns [{}]", row.keys().map(String::as_str).collect::<Vec<_>>().join(", "))
}

pub(super) fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

fn string<'a>(row: &'a Row, column: &str) -> Result<&'a str> {
    match row.get(column) {
        Some(Value::String(text)) => Ok(text),
        Some(other) => bail!("column {column}: expected a string, found {}", kind(other)),
        None => bail!("there is no column {column}; {}", columns(row)),
    }
}

/// A column that may be absent, null or empty.
fn optional<'a>(row: &'a Row, column: &str) -> Result<Option<&'a str>> {
    match row.get(column) {
        None | Some(Value::Null) => Ok(None),
        Some(_) => Ok(Some(string(row, column)?).filter(|text| !text.is_empty())),
    }
}

/// `template` with each `{column}` replaced.
fn fill(template: &str, row: &Row) -> Result<String> {
    let mut text = String::new();
    let mut rest = template;
    while let Some(at) = rest.find(['{', '}']) {
        text.push_str(&rest[..at]);
        let brace = &rest[at..=at];
        rest = &rest[at + 1..];
        if let Some(after) = rest.strip_prefix(brace) {
            text.push_str(brace);
            rest = after;
        } else if let ("{", Some((column, after))) = (brace, rest.split_once('}')) {
            match row.get(column) {
                Some(Value::String(value)) => text.push_str(value),
                Some(Value::Null) => {}
                Some(value) => text.push_str(&value.to_string()),
                None => bail!("--template names {{{column}}}, but there are {}", columns(row)),
            }
            rest = after;
        } else {
            bail!(
                "--template has a single {brace}: write {{column}}, or {brace}{brace} for the brace itself"
            );
        }
    }
    text.push_str(rest);
    Ok(text)
}

/// A list, which CSV and some Parquet files hold as its JSON text.
fn list(row: &Row, column: &str) -> Result<Vec<Value>> {
    match row.get(column) {
        Some(Value::Array(items)) => Ok(items.clone()),
        Some(Value::String(text)) => serde_json::from_str(text).with_context(|| {
            format!("column {column}: expected a list, found a string that is not one in JSON")
        }),
        Some(other) => bail!("column {column}: expected a list, found {}", kind(other)),
        None => bail!("there is no column {column}; {}", columns(row)),
    }
}

pub(super) fn messages(row: &Row, column: &str) -> Result<Vec<Value>> {
    let mut messages = list(row, column)?;
    for (i, message) in messages.iter_mut().enumerate() {
        let place = || format!("column {column}, message {}", i + 1);
        if !message.is_object() {
            bail!("{}: expected an object with role and content, found {}", place(), kind(message));
        }
        match &message["role"] {
            Value::String(_) => {}
            Value::Null => bail!("{}: there is no role", place()),
            other => bail!("{}: role: expected a string, found {}", place(), kind(other)),
        }
        if !matches!(message["content"], Value::String(_) | Value::Array(_) | Value::Null) {
            bail!("{}: content: expected a string, found {}", place(), kind(&message["content"]));
        }
        plain_parts(message).with_context(place)?;
    }
    Ok(messages)
}

/// LLaMA-Factory's typed parts (`{type, value}`) as the fields that chat templates read.
fn plain_parts(message: &mut Value) -> Result<()> {
    let Value::Array(parts) = &message["content"] else { return Ok(()) };
    if parts.is_empty() || !parts.iter().all(|part| part["value"].is_string()) {
        return Ok(());
    }
    let (mut content, mut reasoning, mut calls) = (String::new(), String::new(), Vec::new());
    for part in parts {
        let value = part["value"].as_str().unwrap_or_default();
        match part["type"].as_str() {
            Some("text") => content.push_str(value),
            Some("reasoning") => reasoning.push_str(value),
            Some("tool_call") => calls.extend(tool_calls(value)?),
            other => bail!("content: a part has the unknown type {}", other.unwrap_or("(none)")),
        }
    }
    message["content"] = Value::from(content);
    if !reasoning.is_empty() {
        message["reasoning_content"] = Value::from(reasoning);
    }
    if !calls.is_empty() {
        message["tool_calls"] = Value::Array(calls);
    }
    Ok(())
}

fn conversation(row: &Row, messages: Vec<Value>) -> Result<Conversation> {
    if messages.is_empty() {
        bail!("the conversation is empty");
    }
    Ok(Conversation { messages, variables: variables(row)?, ..Default::default() })
}

/// The `chat_template_kwargs` column.
pub(super) fn variables(row: &Row) -> Result<Map<String, Value>> {
    match row.get("chat_template_kwargs") {
        None | Some(Value::Null) => Ok(Map::new()),
        Some(Value::Object(variables)) => Ok(variables.clone()),
        Some(other) => bail!("column chat_template_kwargs: expected an object, found {}", kind(other)),
    }
}

/// The `tools` column: a list, or its JSON text; an empty one is none.
pub(super) fn tools(row: &Row) -> Result<Option<Value>> {
    match row.get("tools") {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(text)) if text.trim().is_empty() => Ok(None),
        Some(_) => Ok(Some(list(row, "tools")?).filter(|tools| !tools.is_empty()).map(Value::Array)),
    }
}

fn prompt_completion(row: &Row) -> Result<Example> {
    match (row.get("prompt"), row.get("completion")) {
        (Some(Value::String(prompt)), Some(Value::String(completion))) => {
            Ok(Example::PromptCompletion { prompt: prompt.clone(), completion: completion.clone() })
        }
        (Some(Value::Array(_)), Some(Value::Array(_))) => {
            let mut all = messages(row, "prompt")?;
            let prompt_messages = Some(all.len());
            all.extend(messages(row, "completion")?);
            let conversation = conversation(row, all)?;
            Ok(Example::Conversation(Conversation { prompt_messages, tools: tools(row)?, ..conversation }))
        }
        (prompt, completion) => bail!(
            "prompt and completion must be two strings or two lists of messages, found {} and {}",
            prompt.map_or("nothing", kind),
            completion.map_or("nothing", kind)
        ),
    }
}

fn share_gpt(row: &Row) -> Result<Example> {
    let mut messages = Vec::new();
    if let Some(system) = optional(row, "system")? {
        messages.push(json!({"role": "system", "content": system}));
    }
    for (i, turn) in list(row, "conversations")?.iter().enumerate() {
        messages.push(share_gpt_turn(turn).with_context(|| format!("column conversations, turn {}", i + 1))?);
    }
    let tools = tools(row)?.map(|mut tools| {
        // Published ShareGPT files list bare functions; chat templates expect them wrapped as OpenAI's API does.
        for tool in tools.as_array_mut().into_iter().flatten() {
            if tool.get("function").is_none() && tool.get("name").is_some() {
                *tool = json!({"type": "function", "function": tool.take()});
            }
        }
        tools
    });
    Ok(Example::Conversation(Conversation { tools, ..conversation(row, messages)? }))
}

fn share_gpt_turn(turn: &Value) -> Result<Value> {
    let text = |names: [&str; 2]| match names.iter().find_map(|name| turn.get(name)) {
        Some(Value::String(text)) => Ok(text.as_str()),
        Some(other) => bail!("{}: expected a string, found {}", names[0], kind(other)),
        None => bail!("expected {{from, value}}, found {}", turn),
    };
    let (from, value) = (text(["from", "role"])?, text(["value", "content"])?);
    let role = match from {
        "human" | "user" | "input" => "user",
        "gpt" | "assistant" | "model" | "output" | "chatgpt" | "bot" => "assistant",
        "system" => "system",
        "tool" | "observation" | "function_response" => "tool",
        "function_call" => {
            return Ok(json!({"role": "assistant", "content": "", "tool_calls": tool_calls(value)?}));
        }
        other => bail!(
            "unknown role {other:?}: expected human, gpt, system, function_call, observation or tool (or user, \
             assistant)"
        ),
    };
    Ok(json!({"role": role, "content": value}))
}

/// `{"name", "arguments"}` or a list of them, in JSON, as OpenAI's `tool_calls`.
fn tool_calls(text: &str) -> Result<Vec<Value>> {
    let calls: Value = serde_json::from_str(text).context("a function call that is not JSON")?;
    let calls = match calls {
        Value::Array(calls) => calls,
        call => vec![call],
    };
    calls
        .into_iter()
        .map(|call| {
            if call["name"].is_string() {
                Ok(json!({"type": "function", "function": call}))
            } else {
                bail!("a function call without a name: {call}")
            }
        })
        .collect()
}

fn alpaca(row: &Row, chat: bool) -> Result<Example> {
    let instruction = string(row, "instruction")?;
    let output = string(row, "output")?;
    let input = optional(row, "input")?;
    if !chat {
        let prompt = match input {
            Some(input) => format!(
                "Below is an instruction that describes a task, paired with an input that provides further context. \
                 Write a response that appropriately completes the request.\n\n### Instruction:\n{instruction}\n\n\
                 ### Input:\n{input}\n\n### Response:\n"
            ),
            None => format!(
                "Below is an instruction that describes a task. Write a response that appropriately completes the \
                 request.\n\n### Instruction:\n{instruction}\n\n### Response:\n"
            ),
        };
        return Ok(Example::PromptCompletion { prompt, completion: output.to_owned() });
    }
    let mut messages = Vec::new();
    if let Some(system) = optional(row, "system")? {
        messages.push(json!({"role": "system", "content": system}));
    }
    if row.get("history").is_some_and(|history| !history.is_null()) {
        for pair in list(row, "history")? {
            let (Some(question), Some(answer)) = (pair[0].as_str(), pair[1].as_str()) else {
                bail!("column history: expected pairs of strings, found {pair}");
            };
            messages.push(json!({"role": "user", "content": question}));
            messages.push(json!({"role": "assistant", "content": answer}));
        }
    }
    let question = match input {
        Some(input) => format!("{instruction}\n{input}"),
        None => instruction.to_owned(),
    };
    messages.push(json!({"role": "user", "content": question}));
    let prompt_messages = Some(messages.len());
    messages.push(json!({"role": "assistant", "content": output}));
    Ok(Example::Conversation(Conversation { messages, prompt_messages, ..Default::default() }))
}

fn tokens(row: &Row) -> Result<Example> {
    let numbers = |column: &str| -> Result<Vec<i64>> {
        let number = |value: &Value| {
            value
                .as_i64()
                .with_context(|| format!("column {column}: expected whole numbers, found {}", kind(value)))
        };
        list(row, column)?.iter().map(number).collect()
    };
    let ids = numbers("input_ids")?;
    let input_ids: Vec<u32> = ids
        .iter()
        .map(|id| u32::try_from(*id).with_context(|| format!("column input_ids: {id} is no token id")))
        .collect::<Result<_>>()?;
    if row.get("labels").is_none_or(Value::is_null) {
        return Ok(Example::Tokens { trained: vec![true; input_ids.len()], input_ids });
    }
    let labels = numbers("labels")?;
    if labels.len() != ids.len() {
        bail!("column labels has {} numbers, input_ids {}", labels.len(), ids.len());
    }
    let trained = ids.iter().zip(&labels).map(|(id, label)| match *label {
        IGNORE_INDEX => Ok(false),
        label if label == *id => Ok(true),
        other => bail!(
            "column labels: {other} stands where input_ids has {id}: expected the same, not shifted, or -100"
        ),
    });
    Ok(Example::Tokens { trained: trained.collect::<Result<_>>()?, input_ids })
}
