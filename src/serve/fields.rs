//! The fields of a request's JSON object, taken one by one, so that what is wrong or unknown can be named.

use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use super::error::ApiError;
use super::http::Limits;
use super::messages::ServedModel;
use crate::generate::SamplingParams;

/// Fields of OpenAI's API that change nothing about the answer of a local model.
const WITHOUT_EFFECT: [&str; 9] = [
    "user",
    "store",
    "metadata",
    "service_tier",
    "parallel_tool_calls",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_retention",
    "verbosity",
];

pub(super) struct Fields(Map<String, Value>);

impl Fields {
    /// # Errors
    /// What is no JSON object, with its place; invalid UTF-8 is none.
    pub(super) fn parse(body: &[u8]) -> Result<Fields, ApiError> {
        match serde_json::from_slice(body) {
            Ok(Value::Object(fields)) => Ok(Fields(fields)),
            Ok(_) => Err(ApiError::bad("the body is JSON, but no object")),
            Err(error) => Err(ApiError::bad(format!("the body is not JSON: {error}"))),
        }
    }

    /// A field; null counts as absent.
    pub(super) fn take<T: DeserializeOwned>(&mut self, name: &str) -> Result<Option<T>, ApiError> {
        match self.0.shift_remove(name) {
            None | Some(Value::Null) => Ok(None),
            Some(value) => {
                serde_json::from_value(value).map(Some).map_err(|error| ApiError::field(name, error))
            }
        }
    }

    pub(super) fn require<T: DeserializeOwned>(&mut self, name: &str) -> Result<T, ApiError> {
        self.take(name)?.ok_or_else(|| ApiError::field(name, "the field is missing"))
    }

    /// Refuses what nobody took.
    pub(super) fn finish(mut self) -> Result<(), ApiError> {
        for name in WITHOUT_EFFECT {
            self.0.shift_remove(name);
        }
        match self.0.into_iter().find(|(_, value)| !value.is_null()) {
            Some((name, _)) => Err(ApiError::field(&name, "unknown or unsupported field")),
            None => Ok(()),
        }
    }
}

/// What both kinds of completions ask for beside their prompt.
pub(super) struct Common {
    pub(super) params: SamplingParams,
    pub(super) n: usize,
    pub(super) adapter: Option<String>,
    /// The name that the request called the model by.
    pub(super) model: String,
    pub(super) stream: bool,
    pub(super) include_usage: bool,
    /// Whether the longest answer was given.
    pub(super) limited: bool,
    /// Whether the model's own stop tokens end nothing.
    pub(super) ignore_eos: bool,
}

impl Common {
    pub(super) fn take(
        fields: &mut Fields,
        served: &ServedModel,
        adapters: &[String],
        limits: &Limits,
    ) -> Result<Common, ApiError> {
        let model = fields.take::<String>("model")?.unwrap_or_else(|| served.name.clone());
        let adapter = if model == served.name {
            None
        } else if adapters.contains(&model) {
            Some(model.clone())
        } else {
            return Err(ApiError::no_model(&model));
        };
        let most_tokens = limits.max_tokens;
        let (name, given) = match fields.take::<usize>("max_completion_tokens")? {
            Some(given) => {
                fields.take::<usize>("max_tokens")?;
                ("max_completion_tokens", Some(given))
            }
            None => ("max_tokens", fields.take::<usize>("max_tokens")?),
        };
        if let Some(given) = given.filter(|&given| given == 0 || given > most_tokens) {
            let most = if most_tokens == usize::MAX { "more".to_string() } else { most_tokens.to_string() };
            return Err(ApiError::field(name, format!("{given}, expected 1 to {most}")));
        }
        let own = &served.defaults;
        let mut params = SamplingParams {
            temperature: fields.take("temperature")?.unwrap_or(own.temperature),
            top_p: fields.take("top_p")?.unwrap_or(own.top_p),
            top_k: top_k(fields)?.unwrap_or(own.top_k),
            min_p: fields.take("min_p")?.unwrap_or(own.min_p),
            repetition_penalty: fields.take("repetition_penalty")?.unwrap_or(own.repetition_penalty),
            presence_penalty: fields.take("presence_penalty")?.unwrap_or(own.presence_penalty),
            frequency_penalty: fields.take("frequency_penalty")?.unwrap_or(own.frequency_penalty),
            max_new_tokens: given.unwrap_or(most_tokens),
            stop: stop(fields)?,
            stop_token_ids: own.stop_token_ids.clone(),
            seed: seed(fields)?.unwrap_or_else(rand::random),
            logprobs: None,
        };
        let ignore_eos = fields.take("ignore_eos")?.unwrap_or(false);
        if ignore_eos {
            params.stop_token_ids.clear();
        }
        let stops: Vec<i64> = fields.take("stop_token_ids")?.unwrap_or_default();
        if let Some(id) = stops.iter().find(|id| !(0..served.vocab_size).contains(*id)) {
            let message = format!("{id} is outside the vocabulary, expected 0 to {}", served.vocab_size - 1);
            return Err(ApiError::field("stop_token_ids", message));
        }
        params.stop_token_ids.extend(stops);
        params.check().map_err(|error| {
            // It begins with the name.
            let message = format!("{error:#}");
            let name = message.split(' ').next().unwrap_or_default().to_owned();
            ApiError::bad(message).param(&name)
        })?;
        if fields.take::<Map<String, Value>>("logit_bias")?.is_some_and(|bias| !bias.is_empty()) {
            return Err(ApiError::field("logit_bias", "not supported"));
        }
        let n = fields.take("n")?.unwrap_or(1);
        if n == 0 || n > limits.max_samples {
            let most = limits.max_samples;
            let message = format!("n is {n}, expected 1 to {most} (the server's --max-num-seqs)");
            return Err(ApiError::bad(message).param("n"));
        }
        let stream = fields.take("stream")?.unwrap_or(false);
        let options = fields.take::<Map<String, Value>>("stream_options")?.unwrap_or_default();
        let mut options = Fields(options);
        let include_usage = options.take("include_usage")?.unwrap_or(false);
        options.finish()?;
        Ok(Common { params, n, adapter, model, stream, include_usage, limited: given.is_some(), ignore_eos })
    }
}

/// -1 and 0 keep all.
fn top_k(fields: &mut Fields) -> Result<Option<usize>, ApiError> {
    match fields.take::<i64>("top_k")? {
        Some(k) if k < -1 => Err(ApiError::field("top_k", format!("{k}, expected -1 or more"))),
        k => Ok(k.map(|k| usize::try_from(k).unwrap_or(0))),
    }
}

/// Any integer.
fn seed(fields: &mut Fields) -> Result<Option<u64>, ApiError> {
    Ok(fields.take::<i64>("seed")?.map(|seed| seed as u64))
}

fn stop(fields: &mut Fields) -> Result<Vec<String>, ApiError> {
    match fields.take::<Value>("stop")? {
        None => Ok(Vec::new()),
        Some(Value::String(stop)) => Ok(vec![stop]),
        Some(list) => serde_json::from_value(list)
            .map_err(|_| ApiError::field("stop", "expected a string or a list of strings")),
    }
}
