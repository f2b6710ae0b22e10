//! `POST /v1/completions`.

use std::sync::Arc;

use hyper::Response;
use serde_json::Value;

use super::error::ApiError;
use super::fields::{Common, Fields};
use super::http::App;
use super::respond::{self, Kind, Reply};
use super::response::Body;
use crate::generate::Request;

/// What OpenAI's API takes for an answer whose length nobody gave.
const DEFAULT_TOKENS: usize = 16;

pub(super) async fn completions(app: Arc<App>, body: Vec<u8>) -> Result<Response<Body>, ApiError> {
    let (common, requests) = app.parsed(body, parse).await?;
    let prompts: Vec<usize> = requests.iter().map(|request| request.prompt_ids.len()).collect();
    let answers = app.submit(requests)?;
    let reply = Reply::new(&app, Kind::Text, &common.model, common.n, &prompts, common.include_usage);
    Ok(if common.stream {
        respond::streamed(reply, answers).await
    } else {
        respond::whole(reply, answers).await
    })
}

fn parse(app: &App, body: &[u8]) -> Result<(Common, Vec<Request>), ApiError> {
    let mut fields = Fields::parse(body)?;
    let prompt: Value = fields.require("prompt")?;
    let mut common = Common::take(&mut fields, &app.model, &app.shared.adapters(), &app.limits)?;
    if !common.limited {
        common.params.max_new_tokens = DEFAULT_TOKENS.min(common.params.max_new_tokens);
    }
    common.params.logprobs = fields.take::<usize>("logprobs")?;
    if common.params.logprobs.is_some_and(|top| top > 20) {
        return Err(ApiError::field("logprobs", "expected at most 20"));
    }
    if fields.take::<bool>("echo")?.unwrap_or(false) {
        return Err(ApiError::field("echo", "not supported"));
    }
    if fields.take::<usize>("best_of")?.is_some_and(|best_of| best_of != common.n) {
        return Err(ApiError::field("best_of", "not supported, other than n"));
    }
    fields.finish()?;
    let requests = prompts(app, prompt)?.into_iter().map(|prompt_ids| {
        let mut params = common.params.clone();
        app.model.fit(prompt_ids.len(), &mut params, common.limited)?;
        Ok(Request { prompt_ids, params, n: common.n, adapter: common.adapter.clone(), grammar: None })
    });
    let requests = requests.collect::<Result<Vec<_>, ApiError>>()?;
    Ok((common, requests))
}

/// A text, a list of texts, token ids, or a list of lists of them.
fn prompts(app: &App, prompt: Value) -> Result<Vec<Vec<i64>>, ApiError> {
    let bad = || ApiError::field("prompt", "expected a text, token ids, or a list of either");
    let ids = |value: &Value| -> Result<Vec<i64>, ApiError> {
        let ids: Vec<i64> = serde_json::from_value(value.clone()).map_err(|_| bad())?;
        match ids.iter().find(|&&id| id < 0 || id >= app.model.vocab_size) {
            Some(id) => Err(ApiError::field("prompt", format!("token id {id} is outside the vocabulary"))),
            None => Ok(ids),
        }
    };
    match &prompt {
        Value::String(text) => Ok(vec![app.model.text_ids(text)?]),
        Value::Array(list) if list.is_empty() => Err(ApiError::field("prompt", "the list is empty")),
        Value::Array(list) if list[0].is_number() => Ok(vec![ids(&prompt)?]),
        Value::Array(list) => list
            .iter()
            .map(|one| match one {
                Value::String(text) => app.model.text_ids(text),
                other => ids(other),
            })
            .collect(),
        _ => Err(bad()),
    }
}
