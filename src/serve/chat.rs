//! `POST /v1/chat/completions`.

use std::sync::Arc;

use hyper::Response;
use serde_json::{Map, Value, json};

use super::error::ApiError;
use super::fields::{Common, Fields};
use super::http::App;
use super::respond::{self, Kind, Reply};
use super::response::Body;
use crate::generate::{Grammar, Request};

pub(super) async fn completions(app: Arc<App>, body: Vec<u8>) -> Result<Response<Body>, ApiError> {
    let Parsed { common, request, tools } = app.parsed(body, parse).await?;
    let prompt_tokens = request.prompt_ids.len();
    let answers = app.submit(vec![request])?;
    let kind = Kind::Chat { tools };
    let reply = Reply::new(&app, kind, &common.model, common.n, &[prompt_tokens], common.include_usage);
    Ok(if common.stream {
        respond::streamed(reply, answers).await
    } else {
        respond::whole(reply, answers).await
    })
}

struct Parsed {
    common: Common,
    request: Request,
    tools: bool,
}

fn parse(app: &App, body: &[u8]) -> Result<Parsed, ApiError> {
    let mut fields = Fields::parse(body)?;
    let messages: Vec<Value> = fields.require("messages")?;
    if messages.is_empty() {
        return Err(ApiError::field("messages", "the list is empty"));
    }
    let mut common = Common::take(&mut fields, &app.model, &app.shared.adapters(), &app.limits)?;
    let tools = tools(&mut fields)?;
    let variables: Option<Map<String, Value>> = fields.take("chat_template_kwargs")?;
    let grammar = grammar(&mut fields, app)?;
    if grammar.is_some() && common.ignore_eos {
        let message = "not with response_format: its answer ends where the JSON does";
        return Err(ApiError::field("ignore_eos", message));
    }
    let wants = fields.take::<bool>("logprobs")?.unwrap_or(false);
    let top = fields.take::<usize>("top_logprobs")?;
    if top.is_some_and(|top| top > 20) {
        return Err(ApiError::field("top_logprobs", "expected at most 20"));
    }
    if top.is_some() && !wants {
        return Err(ApiError::field("top_logprobs", "needs logprobs"));
    }
    common.params.logprobs = wants.then_some(top.unwrap_or(0));
    fields.finish()?;
    let prompt_ids = app.model.chat_ids(messages, tools.as_ref(), variables.as_ref())?;
    app.model.fit(prompt_ids.len(), &mut common.params, common.limited)?;
    let request = Request {
        prompt_ids,
        params: common.params.clone(),
        n: common.n,
        adapter: common.adapter.clone(),
        grammar,
    };
    Ok(Parsed { common, request, tools: tools.is_some() })
}

/// The tools that the template shows; none where the choice is `none`.
fn tools(fields: &mut Fields) -> Result<Option<Value>, ApiError> {
    let tools: Option<Vec<Value>> = fields.take("tools")?;
    if let Some(tool) = tools.iter().flatten().find(|tool| !tool["function"]["name"].is_string()) {
        return Err(ApiError::field(
            "tools",
            format!("{tool}, expected {{\"type\", \"function\": {{\"name\", ..}}}}"),
        ));
    }
    let choice: Option<Value> = fields.take("tool_choice")?;
    match choice.as_ref().map(|choice| choice.as_str().unwrap_or("a named function")) {
        None | Some("auto") => Ok(tools.filter(|tools| !tools.is_empty()).map(Value::from)),
        Some("none") => Ok(None),
        Some(other) => {
            Err(ApiError::field("tool_choice", format!("{other} is not supported (supported: auto, none)")))
        }
    }
}

fn grammar(fields: &mut Fields, app: &App) -> Result<Option<Grammar>, ApiError> {
    let Some(format) = fields.take::<Value>("response_format")? else { return Ok(None) };
    let schema = match format["type"].as_str() {
        Some("text") => return Ok(None),
        Some("json_object") => json!({"type": "object"}),
        Some("json_schema") if format["json_schema"]["schema"].is_object() => {
            format["json_schema"]["schema"].clone()
        }
        _ => {
            let expected = "expected the type text, json_object, or json_schema with json_schema.schema";
            return Err(ApiError::field("response_format", expected));
        }
    };
    let bad = |error: &anyhow::Error| ApiError::field("response_format", format!("{error:#}"));
    let grammars = app.model.grammars.as_ref().map_err(bad)?;
    grammars.json_schema(&schema).map(Some).map_err(|error| bad(&error))
}
