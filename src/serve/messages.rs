//! Conversations and prompts as the model's tokens.

use anyhow::Result;
use serde_json::{Map, Value, json};

use super::error::ApiError;
use crate::data::{RenderOptions, TokenBytes, Tokenizer};
use crate::generate::{Engine, Grammars, SamplingParams};
use crate::models::{AdapterReader, FastLanguageModel};

/// What HTTP knows of the model: all but its weights.
pub struct ServedModel {
    /// What requests call it.
    pub name: String,
    pub tokenizer: Tokenizer,
    /// The checkpoint's own parameters, for what a request does not say.
    pub defaults: SamplingParams,
    /// The model's context, in tokens.
    pub context: usize,
    /// Most tokens of a prompt and its answer: no more than the context, nor than the engine has room for.
    pub max_model_len: usize,
    pub(super) vocab_size: i64,
    bos_token_id: Option<i64>,
    pub(super) created: i64,
    pub(super) grammars: Result<Grammars>,
    pub(super) token_bytes: TokenBytes,
    pub(super) adapters: AdapterReader,
}

impl ServedModel {
    /// What `engine` answers for `model`.
    ///
    /// # Errors
    /// A model without a tokenizer.
    pub fn new(name: &str, model: &FastLanguageModel, engine: &Engine) -> Result<ServedModel> {
        let tokenizer = model.tokenizer()?.clone();
        let config = &model.decoder.config;
        let context = config.max_position_embeddings.max(0) as usize;
        Ok(ServedModel {
            name: name.to_string(),
            defaults: model.generation_params()?,
            context,
            max_model_len: context.min(engine.room()),
            vocab_size: config.vocab_size,
            bos_token_id: tokenizer.bos_token_id().map(i64::from).or(config.bos_token_id),
            created: chrono::Utc::now().timestamp(),
            grammars: Grammars::new(&tokenizer),
            token_bytes: TokenBytes::new(&tokenizer),
            adapters: model.adapter_reader(),
            tokenizer,
        })
    }

    /// A plain text; an empty one is the token that starts a text.
    pub(super) fn text_ids(&self, text: &str) -> Result<Vec<i64>, ApiError> {
        let ids = self
            .tokenizer
            .encode(text, true)
            .map_err(|error| ApiError::field("prompt", format!("{error:#}")))?;
        match (ids.is_empty(), self.bos_token_id) {
            (true, Some(bos)) => Ok(vec![bos]),
            _ => Ok(ids.into_iter().map(i64::from).collect()),
        }
    }

    /// A conversation in the chat template's form, up to where the assistant speaks.
    pub(super) fn chat_ids(
        &self,
        messages: Vec<Value>,
        tools: Option<&Value>,
        variables: Option<&Map<String, Value>>,
    ) -> Result<Vec<i64>, ApiError> {
        let Some(template) = self.tokenizer.chat_template() else {
            return Err(ApiError::bad("the model has no chat template: use /v1/completions"));
        };
        let messages = messages.into_iter().map(message).collect::<Result<Vec<_>, _>>()?;
        let options = RenderOptions { tools, add_generation_prompt: true, variables, ..Default::default() };
        let bad = |error| ApiError::field("messages", format!("{error:#}"));
        let text = template.render(&messages, &options).map_err(bad)?;
        let ids = self.tokenizer.encode(&text, false).map_err(bad)?;
        Ok(ids.into_iter().map(i64::from).collect())
    }

    /// Leaves `params` the room that there is for an answer behind a prompt of `prompt` tokens.
    ///
    /// # Errors
    /// A prompt that leaves no room, or less than was asked for.
    pub(super) fn fit(
        &self,
        prompt: usize,
        params: &mut SamplingParams,
        limited: bool,
    ) -> Result<(), ApiError> {
        let most = self.max_model_len;
        let left = most.saturating_sub(prompt);
        if left > 0 && (!limited || params.max_new_tokens <= left) {
            params.max_new_tokens = params.max_new_tokens.min(left);
            return Ok(());
        }
        let context = self.context;
        let room = if most < context {
            format!(
                "this server has room for {most} tokens (its --kv-cache-memory; the model's context is {context})"
            )
        } else {
            format!("this model's context is {context} tokens")
        };
        let asked = if limited { params.max_new_tokens } else { 1 };
        let message = format!("{room}; the prompt has {prompt} and the answer may have {asked}");
        Err(ApiError::bad(message).code("context_length_exceeded"))
    }
}

/// A message of the API as templates expect it: texts in one piece, the arguments of calls as objects.
fn message(message: Value) -> Result<Value, ApiError> {
    let Value::Object(mut message) = message else {
        return Err(ApiError::field("messages", format!("{message}, expected an object")));
    };
    let role = message.get("role").and_then(Value::as_str).unwrap_or_default();
    match role {
        "developer" => drop(message.insert("role".into(), json!("system"))),
        "system" | "user" | "assistant" | "tool" | "function" => {}
        other => return Err(ApiError::field("messages", format!("role {other:?} is unknown"))),
    }
    if let Some(Value::Array(parts)) = message.get("content") {
        let mut text = String::new();
        for part in parts {
            match (part["type"].as_str(), part["text"].as_str()) {
                (Some("text"), Some(piece)) => text += piece,
                (kind, _) => {
                    let what = format!(
                        "a content part of type {} is not supported, only text",
                        kind.unwrap_or("null")
                    );
                    return Err(ApiError::field("messages", what));
                }
            }
        }
        message.insert("content".into(), text.into());
    }
    match message.get("content") {
        Some(Value::String(_)) => {}
        None | Some(Value::Null) if message.contains_key("tool_calls") => {
            message.insert("content".into(), "".into());
        }
        _ => {
            return Err(ApiError::field(
                "messages",
                "content is missing, expected a text or a list of parts",
            ));
        }
    }
    let calls = message.get_mut("tool_calls").filter(|calls| !calls.is_null());
    if let Some(calls) = calls {
        let wrong = |what: &Value| {
            let expected = "expected a list of {\"id\", \"type\", \"function\": {\"name\", \"arguments\"}}";
            ApiError::field("messages", format!("tool_calls: {what}, {expected}"))
        };
        let Value::Array(calls) = calls else { return Err(wrong(calls)) };
        for call in calls {
            if !call["function"]["name"].is_string() {
                return Err(wrong(call));
            }
            let arguments = &mut call["function"]["arguments"];
            if let Some(text) = arguments.as_str() {
                *arguments = serde_json::from_str(text).map_err(|error| {
                    ApiError::field("messages", format!("arguments of a tool call: {error}"))
                })?;
            }
        }
    }
    Ok(Value::Object(message))
}
