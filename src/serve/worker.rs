//! The engine's side of the server: commands in, answers out.

use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, TryRecvError};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow};
use tokio::sync::{mpsc, oneshot};

use super::adapters::loaded_already;
use crate::generate::{Engine, EngineStats, EventKind, FinishReason, Request, RequestId, Token};
use crate::models::{Adapter, FastLanguageModel};

/// What HTTP asks of the engine.
pub enum Command {
    /// `at` comes back with the answers: several requests may share a channel.
    Submit {
        at: usize,
        request: Box<Request>,
        answers: mpsc::UnboundedSender<Answer>,
    },
    LoadLora {
        name: String,
        adapter: Box<Adapter>,
        /// Takes the place of one of that name.
        replace: bool,
        reply: oneshot::Sender<Result<()>>,
    },
    UnloadLora {
        name: String,
        reply: oneshot::Sender<Result<()>>,
    },
}

/// News of one sample of a request.
#[derive(Debug)]
pub struct Answer {
    pub at: usize,
    pub sample: usize,
    pub kind: AnswerKind,
}

#[derive(Debug)]
pub enum AnswerKind {
    Token(Token),
    Finished(FinishReason),
    /// The engine did not take the request, and why.
    Refused(String),
    Failed(String),
}

/// What both sides see.
#[derive(Debug, Default)]
pub struct Shared {
    /// Requests that have been sent and not ended.
    pub(super) open: AtomicUsize,
    state: Mutex<(EngineStats, Vec<String>)>,
}

impl Shared {
    /// After the last step.
    pub fn stats(&self) -> EngineStats {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).0
    }

    /// Names of the loaded adapters.
    pub fn adapters(&self) -> Vec<String> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).1.clone()
    }

    /// Requests that have been sent and not ended.
    pub fn open(&self) -> usize {
        self.open.load(Ordering::Relaxed)
    }
}

/// Runs an engine for the requests that come over a channel.
pub struct Worker {
    engine: Engine,
    commands: Receiver<Command>,
    shared: Arc<Shared>,
    routes: HashMap<RequestId, Route>,
}

/// Where the events of a request go.
struct Route {
    at: usize,
    answers: mpsc::UnboundedSender<Answer>,
    /// Samples that have not ended.
    left: usize,
}

/// How long an idle worker sleeps at most.
const IDLE: Duration = Duration::from_millis(100);

impl Worker {
    pub fn new(engine: Engine, commands: Receiver<Command>, shared: Arc<Shared>) -> Worker {
        let worker = Worker { engine, commands, shared, routes: HashMap::new() };
        worker.publish();
        worker
    }

    /// Serves until every sender of commands is gone and what they sent is answered.
    pub fn run(mut self, model: &FastLanguageModel) -> Result<()> {
        loop {
            let connected = self.take_commands(model, Some(IDLE));
            if self.engine.is_idle() && !connected {
                return Ok(());
            }
            self.step(model)?;
        }
    }

    /// Serves what there is, for at most `time`: between two steps of a training run. `weights` says whether the model's own
    /// weights have changed since the last call.
    pub fn serve_for(&mut self, model: &FastLanguageModel, time: Duration, weights: bool) -> Result<()> {
        if weights {
            self.engine.weights_changed();
        }
        let end = Instant::now() + time;
        loop {
            self.take_commands(model, None);
            if self.engine.is_idle() || Instant::now() >= end {
                return Ok(());
            }
            self.step(model)?;
        }
    }

    /// Takes the commands that are there; an idle engine waits for one as long as `wait`. False when no more can come.
    fn take_commands(&mut self, model: &FastLanguageModel, wait: Option<Duration>) -> bool {
        if let Some(wait) = wait.filter(|_| self.engine.is_idle()) {
            match self.commands.recv_timeout(wait) {
                Ok(command) => self.take(model, command),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return false,
            }
        }
        loop {
            match self.commands.try_recv() {
                Ok(command) => self.take(model, command),
                Err(TryRecvError::Empty) => return true,
                Err(TryRecvError::Disconnected) => return false,
            }
        }
    }

    fn take(&mut self, model: &FastLanguageModel, command: Command) {
        match command {
            Command::Submit { at, request, answers } => {
                let left = request.n;
                match self.engine.submit(model, *request) {
                    Ok(id) => drop(self.routes.insert(id, Route { at, answers, left })),
                    Err(error) => {
                        self.shared.open.fetch_sub(1, Ordering::Relaxed);
                        let kind = AnswerKind::Refused(format!("{error:#}"));
                        // Who left needs no answer.
                        let _ = answers.send(Answer { at, sample: 0, kind });
                    }
                }
            }
            Command::LoadLora { name, adapter, replace, reply } => {
                let loaded = if !replace && self.engine.lora(&name).is_some() {
                    Err(anyhow!(loaded_already(&name)))
                } else {
                    let adapter = adapter.to_device(model.decoder.device);
                    adapter.map(|adapter| self.engine.load_lora(&name, adapter))
                };
                self.publish();
                let _ = reply.send(loaded);
            }
            Command::UnloadLora { name, reply } => {
                let found = self.engine.unload_lora(&name);
                self.publish();
                let _ = reply
                    .send(found.then_some(()).ok_or_else(|| anyhow!("no adapter named {name} is loaded")));
            }
        }
    }

    fn step(&mut self, model: &FastLanguageModel) -> Result<()> {
        // Who left before the first token frees its place at once.
        let gone: Vec<RequestId> =
            self.routes.iter().filter(|(_, route)| route.answers.is_closed()).map(|(&id, _)| id).collect();
        for id in gone {
            self.engine.cancel(id);
            self.close(id);
        }
        for event in self.engine.step(model)? {
            let Some(route) = self.routes.get_mut(&event.request) else { continue };
            let kind = match event.kind {
                EventKind::Token(token) => AnswerKind::Token(token),
                EventKind::Finished(reason) => {
                    route.left -= 1;
                    AnswerKind::Finished(reason)
                }
                EventKind::Failed(error) => {
                    route.left = 0;
                    AnswerKind::Failed(format!("{error:#}"))
                }
            };
            let (answer, ended) = (Answer { at: route.at, sample: event.sample, kind }, route.left == 0);
            let answers = route.answers.clone();
            // Its place is free before the client can know.
            if ended {
                self.close(event.request);
            }
            let _ = answers.send(answer);
        }
        self.publish();
        Ok(())
    }

    fn close(&mut self, id: RequestId) {
        if self.routes.remove(&id).is_some() {
            self.shared.open.fetch_sub(1, Ordering::Relaxed);
        }
    }

    fn publish(&self) {
        let mut state = self.shared.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.0 = self.engine.stats();
        if !state.1.iter().map(String::as_str).eq(self.engine.loras()) {
            state.1 = self.engine.loras().map(str::to_string).collect();
        }
    }
}
