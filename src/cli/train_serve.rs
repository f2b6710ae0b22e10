//! `ferrotune train --serve`: answers from the weights being trained.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use clap::Parser;

use super::engine_args::EngineArgs;
use super::serve::{HttpArgs, warn_if_open};
use crate::generate::{Engine, MOST_PROMPT_ROWS};
use crate::models::FastLanguageModel;
use crate::serve::{ServedModel, Server, Shared, Worker};
use crate::train::observer::TrainObserver;

/// Of the memory that is free at the start; the run has its own plan for the rest.
const SEQUENCES: u32 = 16;

/// The other flags of `ferrotune serve` at their defaults.
#[derive(Parser)]
struct Defaults {
    #[command(flatten)]
    engine: EngineArgs,
    #[command(flatten)]
    http: HttpArgs,
}

/// Serves between two steps: for at most as long as the step took, so that training keeps half of the time. The weights
/// change while nothing is being answered, so no token comes from a mixture of two steps.
pub struct ServeBetweenSteps {
    /// None once training is over.
    worker: Option<Worker>,
    server: Option<JoinHandle<Result<()>>>,
    address: SocketAddr,
    stop: Arc<AtomicBool>,
    /// When the present training step began.
    since: Instant,
    stop_time: Duration,
}

impl ServeBetweenSteps {
    /// Starts to listen on `address`; `name` is the model's in requests.
    pub fn start(address: SocketAddr, name: &str, model: &FastLanguageModel) -> Result<ServeBetweenSteps> {
        let Defaults { mut engine, http } = Defaults::parse_from(["serve"]);
        engine.max_num_seqs = SEQUENCES;
        // A step's own needs are not seen in what is free before the first.
        engine.max_num_batched_tokens = Some(MOST_PROMPT_ROWS as u32);
        let (commands, received) = mpsc::channel();
        let shared = Arc::new(Shared::default());
        let options = http.options(&engine);
        warn_if_open(address, &options);
        let stop_time = options.limits.stop_time;
        let engine = Engine::new(&model.decoder, engine.options(&model.decoder)?)?;
        let served = ServedModel::new(&http.name(name), model, &engine)?;
        let server = Server::bind(address, served, options, commands, shared.clone()).context("--serve")?;
        let address = server.address()?;
        println!("{} at http://{address}, with the weights of the last step", http.name(name));
        let stop = Arc::new(AtomicBool::new(false));
        let stopping = stop.clone();
        Ok(ServeBetweenSteps {
            worker: Some(Worker::new(engine, received, shared)),
            server: Some(std::thread::spawn(move || server.run(stopping))),
            address,
            stop,
            since: Instant::now(),
            stop_time,
        })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }
}

impl TrainObserver for ServeBetweenSteps {
    fn between_steps(&mut self, model: &FastLanguageModel, last: bool) -> Result<()> {
        let time = if last { self.stop_time } else { self.since.elapsed() };
        if let Some(worker) = &mut self.worker {
            worker.serve_for(model, time, true)?;
        }
        self.since = Instant::now();
        Ok(())
    }
}

impl Drop for ServeBetweenSteps {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        // Whoever still waits is told that the engine has stopped.
        drop(self.worker.take());
        if let Some(server) = self.server.take()
            && let Ok(Err(error)) = server.join()
        {
            tracing::warn!("--serve: {error:#}");
        }
    }
}
