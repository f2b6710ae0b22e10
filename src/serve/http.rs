//! Routes, who may use them, and their limits.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result};
use axum::Router;
use axum::body::{Body, to_bytes};
use axum::extract::State;
use axum::http::{HeaderMap, HeaderValue, Method, Request as HttpRequest, Response, StatusCode, header};
use axum::serve::ListenerExt;
use serde_json::json;
use tokio::net::TcpListener;
use tokio::sync::{Semaphore, mpsc, oneshot};

use super::error::{ApiError, json_response};
use super::fields::Fields;
use super::messages::ServedModel;
use super::metrics::Metrics;
use super::worker::{Answer, Command, Shared};
use super::{chat, completions};
use crate::generate::Request;

/// Requests that are parsed and tokenised at the same time.
const PARSE_AT_ONCE: usize = 2;
const PAGE: &str = include_str!("chat.html");

/// What a request may take.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Bytes of a body.
    pub max_body: usize,
    /// Most tokens of an answer.
    pub max_tokens: usize,
    /// Requests that have been taken and not ended.
    pub max_open: usize,
    /// Answers to one prompt, and prompts of a request.
    pub max_samples: usize,
    /// Longest time of an answer, and of a body's arrival.
    pub request_time: Duration,
    /// Time that running answers have after the signal to stop.
    pub stop_time: Duration,
}

#[derive(Debug, Clone)]
pub struct ServeOptions {
    pub limits: Limits,
    /// Clients of `/v1` must show it.
    pub api_key: Option<String>,
    /// Whether clients may load and unload adapters.
    pub runtime_lora: bool,
}

pub(super) struct App {
    pub(super) model: ServedModel,
    pub(super) shared: Arc<Shared>,
    pub(super) limits: Limits,
    pub(super) metrics: Metrics,
    api_key: Option<String>,
    runtime_lora: bool,
    /// Only loopback addresses are served.
    local: bool,
    commands: Mutex<Option<Sender<Command>>>,
    stopping: AtomicBool,
    /// Of those who parse and tokenise, which takes memory.
    parsing: Arc<Semaphore>,
}

/// The HTTP side, bound to its address.
pub struct Server {
    listener: std::net::TcpListener,
    app: Arc<App>,
}

impl Server {
    /// Binds `address`; `commands` go to a [`Worker`](super::Worker).
    pub fn bind(
        address: SocketAddr,
        model: ServedModel,
        options: ServeOptions,
        commands: Sender<Command>,
        shared: Arc<Shared>,
    ) -> Result<Server> {
        let listener =
            std::net::TcpListener::bind(address).with_context(|| format!("listening on {address}"))?;
        listener.set_nonblocking(true)?;
        let app = App {
            model,
            shared,
            limits: options.limits,
            metrics: Metrics::default(),
            api_key: options.api_key,
            runtime_lora: options.runtime_lora,
            local: address.ip().is_loopback(),
            commands: Mutex::new(Some(commands)),
            stopping: AtomicBool::new(false),
            parsing: Arc::new(Semaphore::new(PARSE_AT_ONCE)),
        };
        Ok(Server { listener, app: Arc::new(app) })
    }

    /// Where it listens.
    pub fn address(&self) -> Result<SocketAddr> {
        Ok(self.listener.local_addr()?)
    }

    /// Serves until `stop` is raised, and then until what runs has ended or its time is over. The worker ends after it.
    pub fn run(self, stop: Arc<AtomicBool>) -> Result<()> {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
        runtime.block_on(async {
            // An event is a small write that must not wait for the answer to the one before, 40 ms where the client delays it.
            let listener = TcpListener::from_std(self.listener)?.tap_io(|stream| {
                if let Err(error) = stream.set_nodelay(true) {
                    tracing::debug!("TCP_NODELAY: {error}");
                }
            });
            let app = self.app.clone();
            let router = Router::new().fallback(handle).with_state(app.clone());
            let stopped = async move {
                while !stop.load(Ordering::Relaxed) {
                    tokio::time::sleep(Duration::from_millis(50)).await;
                }
                app.stopping.store(true, Ordering::Relaxed);
                app.commands.lock().unwrap_or_else(PoisonError::into_inner).take();
            };
            let (ended, end) = oneshot::channel::<()>();
            let serving = axum::serve(listener, router).with_graceful_shutdown(async move {
                stopped.await;
                let _ = ended.send(());
            });
            let limit = self.app.limits.stop_time;
            tokio::select! {
                result = async { serving.await } => result.context("serving")?,
                // Connections that stay open do not hold the server.
                () = async { let _ = end.await; tokio::time::sleep(limit).await } => {}
            }
            anyhow::Ok(())
        })?;
        runtime.shutdown_timeout(Duration::from_millis(100));
        Ok(())
    }
}

impl App {
    /// What `parse` makes of a body, on a thread of its own: templates and tokenizers of long prompts take their time. It counts
    /// as a part of the answer's, and who would be refused afterwards is refused before.
    pub(super) async fn parsed<T: Send + 'static>(
        self: &Arc<App>,
        body: Vec<u8>,
        parse: impl FnOnce(&App, &[u8]) -> Result<T, ApiError> + Send + 'static,
    ) -> Result<T, ApiError> {
        let open = self.shared.open();
        if open >= self.limits.max_open {
            return Err(self.busy(open));
        }
        let app = self.clone();
        let work = async {
            let turn = self.parsing.clone().acquire_owned().await;
            tokio::task::spawn_blocking(move || {
                // Held to the end, even if nobody waits for it any more.
                let _turn = turn;
                parse(&app, &body)
            })
            .await
        };
        let late = |_| ApiError::new(StatusCode::GATEWAY_TIMEOUT, "the request took too long to read");
        let parsed = tokio::time::timeout(self.limits.request_time, work).await.map_err(late)?;
        parsed.map_err(|_| ApiError::bad("the request cannot be read"))?
    }

    fn busy(&self, open: usize) -> ApiError {
        let message =
            format!("{open} requests are being answered, the most that this server takes: try again");
        ApiError::new(StatusCode::TOO_MANY_REQUESTS, message)
    }

    /// Sends requests to the engine; their answers come over one channel, with the place of their request.
    pub(super) fn submit(&self, requests: Vec<Request>) -> Result<mpsc::UnboundedReceiver<Answer>, ApiError> {
        let count = requests.len();
        if count > self.limits.max_open {
            let most = self.limits.max_open;
            return Err(ApiError::field(
                "prompt",
                format!("{count} prompts, this server takes {most} at once"),
            ));
        }
        let before = self.shared.open.fetch_add(count, Ordering::Relaxed);
        if before + count > self.limits.max_open {
            self.shared.open.fetch_sub(count, Ordering::Relaxed);
            return Err(self.busy(before));
        }
        let (sender, answers) = mpsc::unbounded_channel();
        for (at, request) in requests.into_iter().enumerate() {
            if let Err(error) =
                self.send(Command::Submit { at, request: Box::new(request), answers: sender.clone() })
            {
                self.shared.open.fetch_sub(count - at, Ordering::Relaxed);
                return Err(error);
            }
        }
        Ok(answers)
    }

    fn send(&self, command: Command) -> Result<(), ApiError> {
        let commands = self.commands.lock().unwrap_or_else(PoisonError::into_inner);
        let sent = commands.as_ref().is_some_and(|commands| commands.send(command).is_ok());
        if sent {
            Ok(())
        } else {
            Err(ApiError::new(StatusCode::SERVICE_UNAVAILABLE, "the server is stopping"))
        }
    }

    /// Refuses pages of other sites, which a browser would let send requests here, and names that others made point here.
    fn check_origin(&self, headers: &HeaderMap) -> Result<(), ApiError> {
        let text = |name| headers.get(name).and_then(|value: &HeaderValue| value.to_str().ok());
        let host = text(header::HOST).unwrap_or_default();
        let refuse = |message: &str| Err(ApiError::new(StatusCode::FORBIDDEN, message));
        if self.local && !is_loopback(host) {
            return refuse("this server answers localhost only");
        }
        match text(header::ORIGIN) {
            Some(origin) if origin.split_once("://").map(|(_, rest)| rest) != Some(host) => {
                refuse("requests from pages of other origins are refused")
            }
            _ => Ok(()),
        }
    }

    fn check_key(&self, headers: &HeaderMap) -> Result<(), ApiError> {
        let Some(key) = &self.api_key else { return Ok(()) };
        let given = headers.get(header::AUTHORIZATION).and_then(|value| value.to_str().ok());
        let given = given.and_then(|value| value.strip_prefix("Bearer ")).unwrap_or_default();
        // Every byte is looked at, whichever differs.
        let differences = given.bytes().zip(key.bytes()).fold(0, |all, (a, b)| all | (a ^ b));
        if given.len() == key.len() && differences == 0 {
            return Ok(());
        }
        Err(ApiError::new(StatusCode::UNAUTHORIZED, "a valid API key is needed: Authorization: Bearer KEY"))
    }
}

/// Whether a Host header names this machine to itself.
fn is_loopback(host: &str) -> bool {
    let name = match host.strip_prefix('[') {
        Some(rest) => rest.split(']').next().unwrap_or_default(),
        None => host.rsplit_once(':').map_or(host, |(name, _)| name),
    };
    name == "localhost" || name.parse::<IpAddr>().is_ok_and(|address| address.is_loopback())
}

/// One function for all: every answer is counted, every error has the same form.
async fn handle(State(app): State<Arc<App>>, request: HttpRequest<Body>) -> Response<Body> {
    let path = request.uri().path().to_string();
    let (response, known) = match route(app.clone(), request).await {
        Ok(response) => (response, true),
        Err(error) => (error.response(), error.status != StatusCode::NOT_FOUND),
    };
    // Paths that clients made up are one.
    app.metrics.response(if known { &path } else { "other" }, response.status().as_u16());
    response
}

async fn route(app: Arc<App>, request: HttpRequest<Body>) -> Result<Response<Body>, ApiError> {
    let (parts, body) = request.into_parts();
    let path = parts.uri.path();
    let expected = match path {
        "/" | "/health" | "/metrics" | "/v1/models" => Method::GET,
        "/v1/chat/completions" | "/v1/completions" => Method::POST,
        "/v1/load_lora_adapter" | "/v1/unload_lora_adapter" if app.runtime_lora => Method::POST,
        _ => return Err(ApiError::new(StatusCode::NOT_FOUND, format!("there is nothing at {path}"))),
    };
    if parts.method != expected {
        let message = format!("{path} takes {expected}, not {}", parts.method);
        return Err(ApiError::new(StatusCode::METHOD_NOT_ALLOWED, message));
    }
    app.check_origin(&parts.headers)?;
    if path.starts_with("/v1/") {
        app.check_key(&parts.headers)?;
    }
    match path {
        "/" => Ok(text_response("text/html; charset=utf-8", PAGE.to_string())),
        "/health" if app.stopping.load(Ordering::Relaxed) => {
            Err(ApiError::new(StatusCode::SERVICE_UNAVAILABLE, "the server is stopping"))
        }
        "/health" => Ok(json_response(StatusCode::OK, &json!({"status": "ok"}))),
        "/metrics" => Ok(text_response("text/plain; version=0.0.4", app.metrics.text(&app.shared))),
        "/v1/models" => Ok(models(&app)),
        "/v1/chat/completions" => chat::completions(app.clone(), read(&app, body).await?).await,
        "/v1/completions" => completions::completions(app.clone(), read(&app, body).await?).await,
        "/v1/load_lora_adapter" => load_lora(&app, read(&app, body).await?).await,
        _ => unload_lora(&app, read(&app, body).await?).await,
    }
}

async fn read(app: &App, body: Body) -> Result<Vec<u8>, ApiError> {
    let limit = app.limits.max_body;
    let too_slow = |_| ApiError::new(StatusCode::REQUEST_TIMEOUT, "the body took too long to arrive");
    match tokio::time::timeout(app.limits.request_time, to_bytes(body, limit)).await.map_err(too_slow)? {
        Ok(bytes) => Ok(bytes.into()),
        Err(error) if format!("{error:?}").contains("LengthLimit") => {
            let message = format!("the body is larger than {limit} bytes");
            Err(ApiError::new(StatusCode::PAYLOAD_TOO_LARGE, message))
        }
        Err(error) => Err(ApiError::bad(format!("the body did not arrive: {error}"))),
    }
}

fn text_response(kind: &'static str, text: String) -> Response<Body> {
    let mut response = Response::new(Body::from(text));
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(kind));
    response
}

fn models(app: &App) -> Response<Body> {
    let model = |id: &str, parent: Option<&str>| {
        json!({
            "id": id, "object": "model", "created": app.model.created, "owned_by": "ferrotune", "parent": parent,
            "max_model_len": app.model.context
        })
    };
    let own = &app.model.name;
    let adapters = app.shared.adapters();
    let data = std::iter::once(model(own, None)).chain(adapters.iter().map(|name| model(name, Some(own))));
    json_response(StatusCode::OK, &json!({"object": "list", "data": data.collect::<Vec<_>>()}))
}

async fn load_lora(app: &App, body: Vec<u8>) -> Result<Response<Body>, ApiError> {
    let mut fields = Fields::parse(&body)?;
    let name: String = fields.require("lora_name")?;
    let path: PathBuf = fields.require("lora_path")?;
    fields.finish()?;
    if name == app.model.name || name.is_empty() {
        return Err(ApiError::field("lora_name", format!("{name:?} cannot be the name of an adapter")));
    }
    let (reply, done) = oneshot::channel();
    app.send(Command::LoadLora { name: name.clone(), path, reply })?;
    finished(done).await?;
    Ok(text_response("text/plain", format!("Success: LoRA adapter '{name}' added successfully.")))
}

async fn unload_lora(app: &App, body: Vec<u8>) -> Result<Response<Body>, ApiError> {
    let mut fields = Fields::parse(&body)?;
    let name: String = fields.require("lora_name")?;
    fields.finish()?;
    let (reply, done) = oneshot::channel();
    app.send(Command::UnloadLora { name: name.clone(), reply })?;
    finished(done).await?;
    Ok(text_response("text/plain", format!("Success: LoRA adapter '{name}' removed successfully.")))
}

async fn finished(done: oneshot::Receiver<Result<()>>) -> Result<(), ApiError> {
    let stopped = |_| ApiError::new(StatusCode::SERVICE_UNAVAILABLE, "the engine has stopped");
    done.await.map_err(stopped)?.map_err(|error| ApiError::bad(format!("{error:#}")))
}
