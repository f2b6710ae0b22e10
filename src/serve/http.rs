//! The server: who may use it, and its limits.

use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result};
use hyper::StatusCode;
use hyper::header::{AUTHORIZATION, HOST, HeaderMap, HeaderName, HeaderValue, ORIGIN};
use tokio::net::TcpListener;
use tokio::sync::{Semaphore, mpsc};

use super::connections;
use super::error::ApiError;
use super::messages::ServedModel;
use super::metrics::Metrics;
use super::worker::{Answer, Command, Shared};
use crate::generate::Request;

/// Requests that are parsed and tokenised at the same time.
const PARSE_AT_ONCE: usize = 2;

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
    /// Connections that are open; others wait to be taken.
    pub max_connections: usize,
    /// Time after which a connection is closed that sends no whole head of a request, or takes nothing of its answer.
    pub idle_time: Duration,
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
    pub(super) runtime_lora: bool,
    api_key: Option<String>,
    /// Only loopback addresses are served.
    local: bool,
    commands: Mutex<Option<Sender<Command>>>,
    stopping: AtomicBool,
    /// Of those who parse and tokenise, which takes memory.
    parsing: Arc<Semaphore>,
    /// Of those who read an adapter, likewise.
    pub(super) loading: Arc<Semaphore>,
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
            loading: Arc::new(Semaphore::new(1)),
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
            let listener = TcpListener::from_std(self.listener)?;
            let app = self.app.clone();
            let stopped = async move {
                while !stop.load(Ordering::Relaxed) {
                    tokio::time::sleep(Duration::from_millis(50)).await;
                }
                app.stopping.store(true, Ordering::Relaxed);
                app.commands.lock().unwrap_or_else(PoisonError::into_inner).take();
            };
            connections::serve(listener, self.app, stopped).await;
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

    pub(super) fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::Relaxed)
    }

    pub(super) fn send(&self, command: Command) -> Result<(), ApiError> {
        let commands = self.commands.lock().unwrap_or_else(PoisonError::into_inner);
        let sent = commands.as_ref().is_some_and(|commands| commands.send(command).is_ok());
        if sent { Ok(()) } else { Err(ApiError::stopping()) }
    }

    /// Refuses pages of other sites, which a browser would let send requests here, and names that others made point here.
    pub(super) fn check_origin(&self, headers: &HeaderMap) -> Result<(), ApiError> {
        let text = |name: HeaderName| headers.get(name).and_then(|value: &HeaderValue| value.to_str().ok());
        let host = text(HOST).unwrap_or_default();
        let refuse = |message: &str| Err(ApiError::new(StatusCode::FORBIDDEN, message));
        if self.local && !is_loopback(host) {
            return refuse("this server answers localhost only");
        }
        match text(ORIGIN) {
            Some(origin) if origin.split_once("://").map(|(_, rest)| rest) != Some(host) => {
                refuse("requests from pages of other origins are refused")
            }
            _ => Ok(()),
        }
    }

    pub(super) fn check_key(&self, headers: &HeaderMap) -> Result<(), ApiError> {
        let Some(key) = &self.api_key else { return Ok(()) };
        let given = headers.get(AUTHORIZATION).and_then(|value| value.to_str().ok());
        let given = given.and_then(|value| value.split_once(' '));
        let given = given.filter(|(scheme, _)| scheme.eq_ignore_ascii_case("Bearer"));
        let given = given.map_or("", |(_, key)| key.trim_start_matches(' '));
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
