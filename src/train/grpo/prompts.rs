//! The prompts of a dataset.

use anyhow::{Context, Result, bail, ensure};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use serde_json::{Map, Value, json};

use crate::data::{Records, RenderOptions, Tokenizer, shuffle};

/// Which column holds the prompt, and what is put before it.
#[derive(Debug, Clone, Copy)]
pub struct PromptOptions<'a> {
    /// TRL's is `prompt`: a text, or a list of messages.
    pub prompt_column: &'a str,
    /// Makes a conversation of a text: a system message of this, then the user's.
    pub system_prompt: Option<&'a str>,
    /// Tokens at most; longer prompts are left out.
    pub longest: usize,
}

/// One of them.
#[derive(Debug, Clone, PartialEq)]
pub struct Prompt {
    /// As rewards see it: a text, or messages.
    pub value: Value,
    /// As the model sees it.
    pub text: String,
    pub ids: Vec<i64>,
    /// The row's other columns, for the rewards.
    pub columns: Map<String, Value>,
}

/// All of them, in the order of the files.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Prompts {
    pub rows: Vec<Prompt>,
    /// Rows whose prompt was too long.
    pub left_out: usize,
}

impl Prompts {
    /// Reads data files. A text is tokenised as it is; messages go through the chat template up to the assistant's turn (a last
    /// message of the assistant is continued), with the row's `tools` and `chat_template_kwargs`.
    ///
    /// # Errors
    /// A row that cannot be read or has no such column, with its place; nothing left.
    pub fn read(files: &[String], tokenizer: &Tokenizer, options: PromptOptions) -> Result<Prompts> {
        let mut prompts = Prompts { rows: Vec::new(), left_out: 0 };
        for record in Records::open(files)? {
            let mut record = record?;
            let prompt = record.row.shift_remove(options.prompt_column);
            let made = match prompt {
                Some(prompt) if !prompt.is_null() => {
                    make(prompt, record.row, tokenizer, options.system_prompt)
                }
                _ => Err(anyhow::anyhow!(
                    "no column {:?} (--prompt-column); the row has {}",
                    options.prompt_column,
                    record.row.keys().cloned().collect::<Vec<_>>().join(", ")
                )),
            };
            let made = made.with_context(|| record.place.to_string())?;
            if made.ids.len() > options.longest {
                prompts.left_out += 1;
            } else {
                prompts.rows.push(made);
            }
        }
        ensure!(!prompts.rows.is_empty() || prompts.left_out > 0, "{}: no rows", files.join(", "));
        ensure!(
            !prompts.rows.is_empty(),
            "{}: no prompt of at most {} tokens ({} are longer)",
            files.join(", "),
            options.longest,
            prompts.left_out
        );
        Ok(prompts)
    }

    /// Changes with any token of any prompt.
    pub fn fingerprint(&self) -> u32 {
        self.rows.iter().fold(0, |crc, prompt| {
            let bytes: Vec<u8> = prompt.ids.iter().flat_map(|id| id.to_le_bytes()).collect();
            crc32c::crc32c_append(crc, &bytes)
        })
    }

    /// The order of the prompts in an epoch.
    pub(super) fn order(&self, seed: u64, epoch: u64) -> Vec<usize> {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        rng.set_stream(epoch);
        let mut order: Vec<usize> = (0..self.rows.len()).collect();
        shuffle(&mut order, &mut rng);
        order
    }

    /// Tokens of the longest one.
    pub fn longest(&self) -> usize {
        self.rows.iter().map(|prompt| prompt.ids.len()).max().unwrap_or(0)
    }
}

fn make(
    prompt: Value,
    columns: Map<String, Value>,
    tokenizer: &Tokenizer,
    system_prompt: Option<&str>,
) -> Result<Prompt> {
    let value = match (prompt, system_prompt) {
        (Value::String(text), Some(system)) => {
            json!([{"role": "system", "content": system}, {"role": "user", "content": text}])
        }
        (Value::Array(mut messages), Some(system)) => {
            messages.insert(0, json!({"role": "system", "content": system}));
            Value::Array(messages)
        }
        (value, _) => value,
    };
    ensure!(value.as_array().is_none_or(|messages| !messages.is_empty()), "the prompt has no messages");
    let (text, special) = match &value {
        Value::String(text) => (text.clone(), true),
        Value::Array(messages) => (render(messages, &columns, tokenizer)?, false),
        other => bail!("the prompt is {other}, expected a text or a list of messages"),
    };
    // A chat template writes the special tokens itself.
    let ids: Vec<i64> = tokenizer.encode(&text, special)?.into_iter().map(i64::from).collect();
    ensure!(!ids.is_empty(), "the prompt is empty");
    Ok(Prompt { value, text, ids, columns })
}

fn render(messages: &[Value], columns: &Map<String, Value>, tokenizer: &Tokenizer) -> Result<String> {
    let Some(template) = tokenizer.chat_template() else {
        bail!(
            "the prompt is a conversation, but {} has no chat template: give one with --chat-template FILE",
            tokenizer.dir().display()
        );
    };
    let continues = messages.last().is_some_and(|message| message["role"] == "assistant");
    let options = RenderOptions {
        tools: columns.get("tools").filter(|tools| !tools.is_null()),
        variables: columns.get("chat_template_kwargs").and_then(Value::as_object),
        add_generation_prompt: !continues,
        continue_final_message: continues,
        ..Default::default()
    };
    template.render(messages, &options)
}
