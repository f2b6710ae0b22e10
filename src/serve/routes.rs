//! Which path does what.

use std::sync::Arc;

use http_body_util::{BodyExt, LengthLimitError, Limited};
use hyper::body::Incoming;
use hyper::{Method, Request, Response, StatusCode};
use percent_encoding::percent_decode_str;
use serde_json::{Value, json};

use super::error::ApiError;
use super::http::App;
use super::response::{Body, json_response, text_response};
use super::{adapters, chat, completions};

const PAGE: &str = include_str!("chat.html");
/// Behind it stands a model's name, which may have slashes.
const MODEL: &str = "/v1/models/";

/// One function for all: every answer is counted, every error has the same form.
pub(super) async fn handle(app: Arc<App>, request: Request<Incoming>) -> Response<Body> {
    let path = request.uri().path().to_string();
    let (response, known) = match route(app.clone(), request).await {
        Ok(response) => (response, true),
        Err(error) => (error.response(), error.status != StatusCode::NOT_FOUND),
    };
    // Names of models are one path, and paths that clients made up are another.
    let counted = match path.as_str() {
        _ if !known => "other",
        path if path.starts_with(MODEL) => "/v1/models/{model}",
        path => path,
    };
    app.metrics.response(counted, response.status().as_u16());
    response
}

async fn route(app: Arc<App>, request: Request<Incoming>) -> Result<Response<Body>, ApiError> {
    let (parts, body) = request.into_parts();
    let path = parts.uri.path();
    let allow = match path {
        "/" | "/health" | "/metrics" | "/v1/models" => "GET, HEAD",
        "/v1/chat/completions" | "/v1/completions" => "POST",
        "/v1/load_lora_adapter" | "/v1/unload_lora_adapter" if app.runtime_lora => "POST",
        _ if path.starts_with(MODEL) => "GET, HEAD",
        _ => return Err(ApiError::new(StatusCode::NOT_FOUND, format!("there is nothing at {path}"))),
    };
    // Of an answer to HEAD hyper sends the head alone.
    let method = if parts.method == Method::HEAD { "GET" } else { parts.method.as_str() };
    if !allow.split(", ").any(|one| one == method) {
        return Err(ApiError::method(path, &parts.method, allow));
    }
    app.check_origin(&parts.headers)?;
    if path.starts_with("/v1/") {
        app.check_key(&parts.headers)?;
    }
    match path {
        "/" => Ok(text_response("text/html; charset=utf-8", PAGE)),
        "/health" if app.is_stopping() => Err(ApiError::stopping()),
        "/health" => Ok(json_response(StatusCode::OK, &json!({"status": "ok"}))),
        "/metrics" => Ok(text_response("text/plain; version=0.0.4", app.metrics.text(&app.shared))),
        "/v1/models" => Ok(models(&app)),
        "/v1/chat/completions" => chat::completions(app.clone(), read(&app, body).await?).await,
        "/v1/completions" => completions::completions(app.clone(), read(&app, body).await?).await,
        "/v1/load_lora_adapter" => adapters::load(app.clone(), read(&app, body).await?).await,
        "/v1/unload_lora_adapter" => adapters::unload(&app, read(&app, body).await?).await,
        _ => model(&app, path.strip_prefix(MODEL).unwrap_or_default()),
    }
}

async fn read(app: &App, body: Incoming) -> Result<Vec<u8>, ApiError> {
    let limit = app.limits.max_body;
    let too_slow = |_| ApiError::new(StatusCode::REQUEST_TIMEOUT, "the body took too long to arrive");
    let body = Limited::new(body, limit).collect();
    match tokio::time::timeout(app.limits.request_time, body).await.map_err(too_slow)? {
        Ok(body) => Ok(body.to_bytes().into()),
        Err(error) if error.is::<LengthLimitError>() => {
            let message = format!("the body is larger than {limit} bytes");
            Err(ApiError::new(StatusCode::PAYLOAD_TOO_LARGE, message))
        }
        Err(error) => Err(ApiError::bad(format!("the body did not arrive: {error}"))),
    }
}

fn model_card(app: &App, id: &str) -> Value {
    let own = &app.model.name;
    json!({
        "id": id, "object": "model", "created": app.model.created, "owned_by": "ferrotune",
        "parent": (id != own).then_some(own), "max_model_len": app.model.max_model_len
    })
}

fn models(app: &App) -> Response<Body> {
    let adapters = app.shared.adapters();
    let ids = std::iter::once(&app.model.name).chain(&adapters);
    let data: Vec<Value> = ids.map(|id| model_card(app, id)).collect();
    json_response(StatusCode::OK, &json!({"object": "list", "data": data}))
}

fn model(app: &App, name: &str) -> Result<Response<Body>, ApiError> {
    let name = percent_decode_str(name).decode_utf8_lossy();
    if name != app.model.name && !app.shared.adapters().iter().any(|adapter| *adapter == name) {
        return Err(ApiError::no_model(&name));
    }
    Ok(json_response(StatusCode::OK, &model_card(app, &name)))
}
