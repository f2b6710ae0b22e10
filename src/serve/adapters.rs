//! `POST /v1/load_lora_adapter` and `/v1/unload_lora_adapter`, as vLLM has them.

use std::path::PathBuf;
use std::sync::Arc;

use anyhow::Result;
use hyper::{Response, StatusCode};
use tch::Device;
use tokio::sync::oneshot;

use super::error::ApiError;
use super::fields::Fields;
use super::http::App;
use super::response::{Body, text_response};
use super::worker::Command;

pub(super) async fn load(app: Arc<App>, body: Vec<u8>) -> Result<Response<Body>, ApiError> {
    let mut fields = Fields::parse(&body)?;
    let name: String = fields.require("lora_name")?;
    let path: PathBuf = fields.require("lora_path")?;
    let replace = fields.take("load_inplace")?.unwrap_or(false);
    // vLLM numbers adapters by itself, too.
    fields.take::<i64>("lora_int_id")?;
    fields.finish()?;
    if name == app.model.name || name.is_empty() {
        return Err(ApiError::field("lora_name", format!("{name:?} cannot be the name of an adapter")));
    }
    if !replace && app.shared.adapters().contains(&name) {
        return Err(ApiError::bad(loaded_already(&name)).param("lora_name"));
    }
    // One at a time, and not by the engine, whose answers would wait for the disk. To the host's memory: a GPU's stream is
    // the engine's, which may be recording it.
    let turn = app.loading.clone().acquire_owned().await;
    let reader = app.clone();
    let read = tokio::task::spawn_blocking(move || {
        let _turn = turn;
        reader.model.adapters.read(&path, Device::Cpu)
    });
    let unreadable = |error| ApiError::field("lora_path", format!("{error:#}"));
    let adapter = read.await.map_err(|_| ApiError::bad("the adapter cannot be read"))?.map_err(unreadable)?;
    let (reply, done) = oneshot::channel();
    let adapter = Box::new(adapter);
    app.send(Command::LoadLora { name: name.clone(), adapter, replace, reply })?;
    finished(done).await?;
    Ok(text_response("text/plain", format!("Success: LoRA adapter '{name}' added successfully.")))
}

pub(super) async fn unload(app: &App, body: Vec<u8>) -> Result<Response<Body>, ApiError> {
    let mut fields = Fields::parse(&body)?;
    let name: String = fields.require("lora_name")?;
    fields.take::<i64>("lora_int_id")?;
    fields.finish()?;
    let (reply, done) = oneshot::channel();
    app.send(Command::UnloadLora { name: name.clone(), reply })?;
    finished(done).await?;
    Ok(text_response("text/plain", format!("Success: LoRA adapter '{name}' removed successfully.")))
}

pub(super) fn loaded_already(name: &str) -> String {
    format!("the adapter {name} is loaded already; load_inplace replaces it")
}

async fn finished(done: oneshot::Receiver<Result<()>>) -> Result<(), ApiError> {
    let stopped = |_| ApiError::new(StatusCode::SERVICE_UNAVAILABLE, "the engine has stopped");
    done.await.map_err(stopped)?.map_err(|error| ApiError::bad(format!("{error:#}")).param("lora_name"))
}
